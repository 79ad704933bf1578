"""What do time and memory of one whole step with m losses cost, beside the backward passes alone?

    python -m benchmarks.step_cost

A step is the forward pass, what fills ``.grad``, and AdamW's step. All candidates share the
parameters and are timed in turn on one thread, in a process for each case and m. `floor` is the
forward pass, one backward pass per loss, whose results are dropped, and AdamW: what any method
costs that looks at each loss's gradient. `weighted_sum` has one backward pass. The rest are our
modes and TorchJD.

A ratio is that of two times of the same round, as median and quartiles over the rounds. With
``gram_every=4`` both times are means over four rounds in a row, of which one solves.

Memory is counted in torch's allocator, and compared as the peak above what the weighted sum holds
between two steps (parameters and AdamW's state): what a candidate holds itself counts as its own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# Before torch reads it: the profiler that counts memory otherwise says when it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from tqdm import tqdm

from benchmarks.harness import environment, interleaved, spread, write_results
from benchmarks.step_cost_candidates import (
    DENSE,
    FLOOR,
    NAMES,
    WEIGHTED_SUM,
    C,
    Problem,
)
from benchmarks.step_cost_errors import STEPS, measure_errors
from benchmarks.step_cost_figure import draw
from benchmarks.step_cost_memory import measure_memory
from benchmarks.step_cost_models import Batch, Case, make
from benchmarks.step_cost_table import table
from benchmarks.step_cost_targets import TARGETS, judge

ALL = (2, 4, 8, 16, 40)
# Left out where a round would take minutes: TorchJD's default, which is slower and larger than with
# a Gram matrix per parameter wherever both were measured, and its engine with a large batch.
SLOWER = ("torchjd_autojac",)
SLOWER_BATCH = ("torchjd_autojac", "torchjd_autogram")
# Left out where what the candidates hold does not fit into memory together.
LARGER = (*SLOWER, "gram_every")
MANY = 8  # losses; above, `SLOWER` is left out
CASES = {
    "mlp-0.3M": Case("mlp", "MLP", 176, 10, 256, losses=ALL, errors=True),
    "mlp-10M": Case("mlp", "MLP", 1024, 10, 64, losses=ALL, small_batch=True, errors=True),
    "mlp-10M-batch-512": Case("mlp", "MLP", 1024, 10, 512, without=SLOWER_BATCH),
    "mlp-100M": Case("mlp", "MLP", 3200, 10, 64, small_batch=True, without=LARGER),
    "conv-8M": Case("conv", "ResNet", 512, 2, 16, errors=True),
    "transformer-3M": Case("transformer", "transformer", 256, 4, 1, 512, errors=True),
    "transformer-50M": Case(
        "transformer", "transformer", 1024, 4, 4, 16, small_batch=True, without=SLOWER
    ),
}
REFERENCES = (FLOOR, WEIGHTED_SUM, DENSE)
MALLOC = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")
SECONDS = 10.0  # for a case and m, within the numbers of rounds below
ROUNDS = (5, 15)
BURST = 0.1  # seconds: short steps are repeated
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "step-cost.png"


def quick(case: Case) -> Case:
    """Returns a case of the same kind that takes seconds."""
    return replace(
        case,
        width=16 if case.kind == "mlp" else 64,
        depth=2,
        batch=4,
        tokens=min(case.tokens, 8),
        losses=(2, 8),
    )


def measure(
    case: Case,
    m: int,
    names: Sequence[str],
    seed: int,
    rounds: int | None = None,
    burst: float = BURST,
) -> dict[str, Any]:
    """Measures time and memory of the candidates for one case and one number of losses."""
    torch.set_num_threads(1)
    model, batches = make(case, m, seed)
    batch = batches[0]
    problem = Problem(model)
    left_out = {*case.without, *(SLOWER if m > MANY else ())}
    candidates = {name: problem.candidate(name) for name in names if name not in left_out}
    problem.candidate(WEIGHTED_SUM)(batch)  # AdamW's state is there from here on
    n = sum(p.numel() for p in problem.parameters)
    state = sum(p.nbytes for p in problem.parameters) + sum(
        value.nbytes
        for values in problem.adamw.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    )
    memory = {}
    round_seconds = 0.0
    for name, candidate in candidates.items():
        start = time.perf_counter()
        call = partial(candidate, batch)
        memory[name] = measure_memory(call, candidate.zero_grad, cycle=candidate.cycle)
        taken = (time.perf_counter() - start) / (1 + candidate.cycle)
        round_seconds += max(burst, taken)
    rounds = rounds or min(max(ROUNDS[0], round(SECONDS / round_seconds)), ROUNDS[1])
    faults: dict[str, list[int]] = {name: [] for name in candidates}
    calls = {name: _counting(c, batch, faults[name]) for name, c in candidates.items()}
    seconds = interleaved(calls, repeats=rounds, burst=burst)
    problem.adamw.zero_grad()
    found: dict[str, dict[str, Any]] = {}
    for name, candidate in candidates.items():
        window = candidate.cycle
        mine = means(seconds[name], window)
        found[name] = {"seconds": spread(mine)}
        for reference in REFERENCES:
            if reference in seconds:
                ratios = zip(mine, means(seconds[reference], window), strict=True)
                found[name][f"over_{reference}"] = spread([a / b for a, b in ratios])
        found[name]["page_faults"] = statistics.median(means(faults[name], window))
        held, peak = memory[name]
        found[name]["memory"] = {
            "held_bytes": held,
            "peak_bytes": peak,
            "held_gradients": held / (4 * n),
            "peak_gradients": peak / (4 * n),
        }
        if WEIGHTED_SUM in memory:
            one = memory[WEIGHTED_SUM].peak
            found[name]["memory"] |= {
                "over_weighted_sum": (held + peak) / one,
                "over_weighted_sum_with_state": (state + held + peak) / (state + one),
            }
    return {
        "m": m,
        "parameters": n,
        "state_bytes": state,
        "rounds": rounds,
        "candidates": found,
        "errors": measure_errors(case, m, names, seed) if case.errors else {},
    }


def measure_elsewhere(*settings: Any) -> dict[str, Any]:  # noqa: ANN401
    """Calls `measure` in a process of its own.

    What earlier cases leave of the heap decides whether large blocks are at hand or have to be
    faulted in, and with it a third of a step's time.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *settings).result()


def means(values: Sequence[float], window: int) -> list[float]:
    """Returns the means of each `window` values in a row."""
    return [
        statistics.fmean(values[start : start + window])
        for start in range(len(values) - window + 1)
    ]


def _counting(
    step: Callable[[Batch], object], batch: Batch, faults: list[int]
) -> Callable[[], None]:
    """Returns a step that counts its page faults: memory that the system first had to give.

    Its first call does nothing: it is the one with which `interleaved` warms up, and the
    measurement of memory did that already.
    """
    warm = False

    def call() -> None:
        nonlocal warm
        if warm:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            step(batch)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        warm = True

    return call


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes the JSON and the picture, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cost")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--candidates", nargs="+", default=list(NAMES), help=", ".join(NAMES))
    parser.add_argument("--losses", nargs="+", type=int, help="values of m, of those of the case")
    parser.add_argument("--rounds", type=int, help="default: by the time that a round takes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for JSON and picture")
    options = parser.parse_args(arguments)
    for option, chosen, known in (
        ("--cases", options.cases, CASES),
        ("--candidates", options.candidates, NAMES),
    ):
        unknown = [name for name in chosen if name not in known]
        if unknown:
            message = f"{option} must be of {', '.join(known)}; got {', '.join(unknown)}."
            parser.exit(2, f"{parser.prog}: {message}\n")
    if options.rounds is not None and options.rounds < ROUNDS[0]:
        parser.exit(2, f"{parser.prog}: --rounds must be at least {ROUNDS[0]}.\n")
    torch.set_num_threads(1)  # for the environment to say so
    cases = {name: CASES[name] for name in CASES if name in options.cases}
    names = [name for name in NAMES if name in options.candidates]
    if options.quick:
        cases = {name: quick(case) for name, case in cases.items()}
    todo = [
        (name, m)
        for name, case in cases.items()
        for m in case.losses
        if options.losses is None or m in options.losses
    ]
    whole = set(cases) == set(CASES) and names == list(NAMES) and options.losses is None
    path = image = None
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        path = str(options.output.resolve() / "step_cost")
        image = options.output.resolve() / IMAGE.name
    elif whole and not options.quick:
        path, image = "step_cost", IMAGE
    small = [name for name, case in cases.items() if case.small_batch]
    rows: list[dict[str, Any]] = []
    killed: list[dict[str, Any]] = []
    results = {
        "question": __doc__.splitlines()[0],
        "environment": environment(seed=options.seed, packages=("torchjd", "cvxpy", "clarabel")),
        "malloc": {name: os.environ.get(name) for name in MALLOC},
        "c": C,
        "weights": "uniform",
        "quick": options.quick,
        "titles": {name: case.title for name, case in cases.items()},
        "steps_of_errors": STEPS,
        "small_batch": small,
        "targets": TARGETS,
        "met": [],
        "killed": killed,
        "rows": rows,
    }
    for name, m in (progress := tqdm(todo, leave=False)):
        progress.set_description(f"{name}, m = {m}")
        case = cases[name]
        settings = (case, m, names, options.seed, options.rounds)
        try:
            row = measure(*settings, burst=0.0) if options.quick else measure_elsewhere(*settings)
        except concurrent.futures.process.BrokenProcessPool:
            print(f"{name}, m = {m}: the process was killed, probably for memory; left out.")
            killed.append({"case": name, "m": m})
        else:
            rows.append({"case": name, "batch": case.batch, "tokens": case.tokens, **row})
        results["met"] = [] if options.quick else judge(rows, small)
        if path is not None:  # each time, so that an interruption loses one case at most
            written = write_results(path, results)
    print(table(rows))
    for verdict in results["met"]:
        print("{met:8} {case}, m = {m}: {target}: {measured:.3f}".format(**verdict))
    if path is None or image is None:
        print("Not written: that takes --output, or all cases at full size.")
        return
    draw(image, results)
    print(f"Written to {written} and {image}.")


if __name__ == "__main__":
    main()
