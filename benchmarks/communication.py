"""How much does a step with m losses send, beside the averaging of one gradient by DDP itself?

    python -m benchmarks.communication [--quick]

Processes on this machine talk through gloo. What they send is counted on the loopback interface,
all of them together, so that nothing else may use it meanwhile. It is given in numbers per process
and parameter, and stands beside the formula: an all-reduce in a ring sends 2 n (R - 1) / R, a
reduce-scatter or an all-gather half of it.

FSDP2 gathers the parameters for the forward pass and for every backward pass, and reduces and
scatters every gradient: (2 m + 1) n (R - 1) / R. With gloo it is (3 m + 1), because its
reduce-scatter sends as much as an all-reduce.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from benchmarks.harness import (
    Parser,
    environment,
    markdown_table,
    refusals_of,
    spread,
    write_results,
)
from raco_optim import CAGradClip

WIDTH, DEPTH, BATCH = 512, 8, 16
RANKS, LOSSES, STEPS = (2, 4), (2, 4, 8), 4


def formulas(m: int, number: int) -> dict[str, float]:
    """Returns what each way sends, in numbers per process and parameter."""
    share = (number - 1) / number
    return {
        "DDP, weighted sum": 2 * share,
        "raco_optim": (m + 1) * share,
        'raco_optim, gradients="representation"': 2 * share,
        "raco_optim, gram_every=4": ((m + 1) + 3 * 2) * share / 4,
        "each gradient averaged by an all-reduce": 2 * m * share,
        # Two gatherings and a reduce-scatter, which in gloo sends as much as an all-reduce.
        "FSDP2, weighted sum": 4 * share,
        "FSDP2, raco_optim": (3 * m + 1) * share,
    }


def make_model(m: int) -> tuple[nn.Module, nn.Module]:
    """Returns a trunk and a head that are the same in every process."""
    torch.manual_seed(0)
    layers = [x for _ in range(DEPTH) for x in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers), nn.Linear(WIDTH, m)


def run(rank: int, number: int, m: int, way: str, folder: str) -> None:
    """Trains in one process; the first one writes down what all sent in each step."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", number)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number)
    model = nn.Sequential(*make_model(m))
    if way.startswith("FSDP2"):
        mesh = init_device_mesh("cpu", (number,))
        for layer in (*model[0], model[1]):
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    wrapped = DistributedDataParallel(model) if way.startswith("DDP") else model
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4)
    through_z = "representation" in way
    opt = CAGradClip(
        adamw,
        [1 / m] * m,
        gradients="representation" if through_z else "dense",
        gram_every=4 if "gram_every" in way else 1,
    )
    sent = []
    for _ in range(2 * STEPS):  # the first half warms up
        x = torch.randn(BATCH, WIDTH)
        dist.barrier()
        time.sleep(0.05)
        before = _bytes_sent()
        dist.barrier()
        adamw.zero_grad()
        if through_z:
            z = model[0](x)
            opt.backward(list(model[1](z).square().mean(0)), representation=z)
        else:
            losses = list(wrapped(x).square().mean(0))
            if "weighted sum" in way:
                torch.stack(losses).mean().backward()
            elif "all-reduce" in way:
                parameters = list(model.parameters())
                for loss in losses:
                    for g in torch.autograd.grad(loss, parameters, retain_graph=True):
                        dist.all_reduce(g)
            else:
                opt.backward(losses)
        dist.barrier()
        time.sleep(0.05)
        sent.append(_bytes_sent() - before)
        adamw.step()
    dist.barrier()
    if rank == 0:
        n = sum(p.numel() for p in model.parameters())
        numbers = [count / (4 * n * number) for count in sent[STEPS:]]
        torch.save({"parameters": n, "sent": numbers}, f"{folder}/result")
    dist.barrier()
    os._exit(0)  # gloo's threads abort now and then at the interpreter's end


def measure(m: int, number: int, way: str) -> dict[str, Any]:
    """Runs the processes and returns what they sent, as a row of the results."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (number, m, way, folder), number)
        found = torch.load(f"{folder}/result")
    sent = found["sent"]
    mean = sum(sent) / len(sent)  # of as many steps as gram_every has
    return {
        "way": way,
        "m": m,
        "ranks": number,
        "parameters": found["parameters"],
        "numbers_per_parameter": spread(sent) | {"mean": mean},
        "formula": formulas(m, number)[way],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Renders the results as a markdown table."""
    lines = []
    for row in rows:
        numbers = (row["numbers_per_parameter"]["mean"], row["formula"])
        lines.append([row["way"], f"{row['ranks']}", f"{row['m']}", *(f"{x:.2f}" for x in numbers)])
    return markdown_table(["way", "processes", "m", "sent", "formula"], lines)


def _bytes_sent() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()  # Linux
    line = next(x for x in lines if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


@refusals_of("communication")
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all ways, writes the JSON and prints the table."""
    parser = Parser(prog="python -m benchmarks.communication")
    parser.add_argument("--quick", action="store_true", help="two processes, two losses; no JSON")
    options = parser.parse_args(arguments)
    ranks, losses = ((2,), (2,)) if options.quick else (RANKS, LOSSES)
    todo = [(m, number, way) for number in ranks for m in losses for way in formulas(m, number)]
    rows = [measure(*settings) for settings in tqdm(todo, leave=False)]
    results = {
        "question": __doc__.splitlines()[0],
        "environment": environment(seed=0),
        "unit": "numbers of 4 bytes per process and parameter, a step",
        "rows": rows,
    }
    print(table(rows))
    if not options.quick:
        print(f"Written to {write_results('communication', results)}.")


if __name__ == "__main__":
    main()
