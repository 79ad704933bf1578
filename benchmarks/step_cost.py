"""What do time and memory of one whole step with m losses cost, beside the backward passes alone?

    python -m benchmarks.step_cost [--quick]

A step is the forward pass, what fills ``.grad``, and AdamW's step. `floor` is the least that a
method needs if it looks at each loss's gradient: m calls of `torch.autograd.grad` over all
parameters, a ``.grad`` for every parameter that any loss reaches, and AdamW. `weighted_sum` has one
backward pass. The rest are our modes and TorchJD's two engines.

Each case and m has a process of its own, because what earlier cases leave of the heap decides
whether large blocks have to be faulted in, a third of a step's time. There all candidates share the
parameters and are timed in turn on one thread, by the process's CPU time. A ratio is that of two
times of the same round, as median and quartiles over the rounds; with ``gram_every=4`` both are
means over four rounds in a row, of which one has a Gram matrix.

Memory is counted in torch's allocator, above parameters and AdamW's state: what a candidate holds
between steps counts as its own. The bound is m gradients beside the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness import (
    RESULTS,
    Died,
    Parser,
    apart,
    environment,
    filled,
    make_folder,
    markdown_table,
    refusals_of,
    write_json,
    write_whole,
)
from benchmarks.step_cost_cases import (
    APPROXIMATIONS,
    DENSE,
    GHOST,
    NAMES,
    TORCHJD,
    WEIGHTED_SUM,
    C,
    Case,
)
from benchmarks.step_cost_figure import IMAGE, STYLES, draw_figure
from benchmarks.step_cost_measure import measure

PAGE = IMAGE.parents[1] / "cost.md"
SEED = 0
FEW = (2, 4, 8, 40)
CASES = {
    "mlp-64": Case("MLP", 64, 3, 64, losses=FEW),
    "mlp-256": Case("MLP", 256, 3, 64),
    "mlp-10M": Case("MLP", 1024, 10, 64, losses=FEW, errors=True),
    "mlp-10M-batch-512": Case("MLP", 1024, 10, 512, without=(*APPROXIMATIONS, TORCHJD[1])),
    "resnet-10M": Case("ResNet", 512, 2, 16, losses=(8,)),
    "transformer-50M": Case(
        "transformer", 1024, 4, 4, losses=(8,), tokens=16, without=(TORCHJD[1],)
    ),
}
# What the default takes at most, set in advance: by measure, case and m.
TARGETS: dict[str, dict[str, dict[int, float]]] = {
    "time over floor": {
        "mlp-64": {2: 1.5, 4: 1.5, 8: 1.4, 40: 1.4},
        "mlp-256": {2: 1.35, 4: 1.5, 8: 1.5},
        "mlp-10M": {2: 1.17, 4: 1.20, 8: 1.25, 40: 1.7},
        "mlp-10M-batch-512": {2: 1.05, 4: 1.05, 8: 1.05},
    },
    "memory over bound": {
        "mlp-10M": dict.fromkeys(FEW, 1.01),
        "mlp-10M-batch-512": dict.fromkeys(FEW, 1.01),
    },
}
SECONDS, LIMIT = 6.0, 300.0  # for a case and m; until it is given up


def quick(case: Case) -> Case:
    """Returns a case of the same kind that takes a second or two."""
    width = 16 if case.kind == "MLP" else 64
    sizes: dict[str, Any] = {"width": width, "depth": 2, "batch": 4, "tokens": min(case.tokens, 8)}
    return replace(case, **sizes, losses=case.losses[:2])


def judge(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Compares the default with its targets."""
    for row in rows:
        case, m, dense = row["case"], row["m"], row["candidates"].get(DENSE, {})
        found = (dense.get("over_floor", {}).get("median"), dense.get("memory_over_bound"))
        for (what, targets), measured in zip(TARGETS.items(), found, strict=True):
            at_most = targets.get(case, {}).get(m)
            if measured is not None and at_most is not None:
                verdict = "reached" if measured <= at_most else "missed"
                numbers = {"measured": measured, "at_most": at_most}
                yield {"case": case, "m": m, "what": what, **numbers, "verdict": verdict}


def tables(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields name and text of the tables of `PAGE`."""
    rows = {(row["case"], row["m"]): row for row in results["rows"]}
    head = ["", *(f"m = {m}" for m in FEW)]

    def lines(
        cases: Sequence[str], names: Sequence[str], cell: Callable[[dict[str, Any]], str]
    ) -> Iterator[list[str]]:
        for case, name in ((case, name) for case in cases for name in names):
            found = [rows.get((case, m), {}).get("candidates", {}).get(name) for m in FEW]
            if any(found):
                title = f"{case}, {STYLES[name][0]}"
                yield [title, *(cell(x) if x else "" for x in found)]

    def time(found: dict[str, Any]) -> str:
        return f"{found['over_floor']['median']:.2f}"

    others = [case for case in CASES if case != "mlp-10M"]
    shown = [*lines(["mlp-10M"], NAMES[1:], time), *lines(others, (DENSE, GHOST, TORCHJD[0]), time)]
    yield "step-cost-time", markdown_table(head, shown)
    memory = lines(["mlp-10M"], NAMES, lambda x: f"{x['peak_gradients']:.2f}")
    yield "step-cost-memory", markdown_table(head, memory)
    found = {m: rows.get(("mlp-10M", m), {}).get("errors", {}) for m in FEW[:3]}
    errors = [
        [STYLES[name][0], *(f"{found[m][name]['one_minus_cos']:.0e}" for m in found)]
        for name in (WEIGHTED_SUM, GHOST, *APPROXIMATIONS)
        if all(name in of_m for of_m in found.values())
    ]
    yield "step-cost-errors", markdown_table(head[:4], errors)
    targets: dict[str, dict[int, str]] = {}
    for v in results["targets"]:
        cell = f"{v['measured']:.2f}" if v["verdict"] == "reached" else f"**{v['measured']:.2f}**"
        line = targets.setdefault(f"{v['case']}, {v['what']}", {})
        line[v["m"]] = f"{cell}, {v['at_most']:g}"
    judged = [[title, *(line.get(m, "") for m in FEW)] for title, line in targets.items()]
    yield "step-cost-targets", markdown_table(head, judged)


@refusals_of("step_cost")
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes JSON and picture, and prints the tables."""
    parser = Parser(prog="python -m benchmarks.step_cost")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--output", type=Path, help="folder for JSON and picture")
    options = parser.parse_args(arguments)
    folder, image = options.output, IMAGE
    if folder is not None:
        make_folder(folder, "--output")
        image = folder / IMAGE.name
    elif not options.quick and set(options.cases) == set(CASES):
        folder = RESULTS
    torch.set_num_threads(1)  # for the environment to say so
    results: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "environment": environment(seed=SEED, packages=("torchjd", "cvxpy", "clarabel")),
        "c": C,
        "weights": "uniform",
        "quick": options.quick,
        "targets": [],
        "left_out": [],
        "rows": [],
    }
    cases = {name: quick(CASES[name]) if options.quick else CASES[name] for name in options.cases}
    todo = [(name, m) for name, case in cases.items() for m in case.losses]
    for name, m in (progress := tqdm(todo, leave=False)):
        progress.set_description(f"{name}, m = {m}")
        case = cases[name]
        try:
            if options.quick:
                row = measure(case, m, NAMES, SEED, seconds=0.0)
            else:
                row = apart(measure, case, m, NAMES, SEED, SECONDS, seconds=LIMIT)
        except Died as error:
            print(f"{name}, m = {m}: left out, because {error}.")
            results["left_out"].append({"case": name, "m": m, "why": str(error)})
        else:
            shown = {"case": name, "kind": case.kind, "batch": case.batch, "tokens": case.tokens}
            results["rows"].append({**shown, **row})
        results["targets"] = [] if options.quick else list(judge(results["rows"]))
        if folder is not None:  # each time, so that an interruption loses one case at most
            write_json(folder / "step_cost.json", results)
    found = dict(tables(results))
    print(*found.values(), sep="\n\n")
    if folder is None:
        print("Not written: that takes --output, or all cases at full size.")
        return
    draw_figure(image, results)
    if folder == RESULTS:
        write_whole(PAGE, filled(PAGE.read_text(), found.items()))
    print(f"Written to {folder / 'step_cost.json'} and {image}.")


if __name__ == "__main__":
    main()
