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

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before torch reads it: the profiler that counts memory otherwise says when it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

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
# Time of the default over the floor, at most: set in advance, by case and m.
TARGETS = {
    "mlp-64": {2: 1.5, 4: 1.5, 8: 1.4, 40: 1.4},
    "mlp-256": {2: 1.35, 4: 1.5, 8: 1.5},
    "mlp-10M": {2: 1.17, 4: 1.20, 8: 1.25, 40: 1.7},
    "mlp-10M-batch-512": {2: 1.05, 4: 1.05, 8: 1.05},
}
# The default's memory over m gradients and the activations, at most.
MEMORY_TARGET = {"mlp-10M": 1.01, "mlp-10M-batch-512": 1.01}
SECONDS, LIMIT = 6.0, 300.0  # for a case and m; until it is given up


def quick(case: Case) -> Case:
    """Returns a case of the same kind that takes a second or two."""
    width = 16 if case.kind == "MLP" else 64
    sizes: dict[str, Any] = {"width": width, "depth": 2, "batch": 4, "tokens": min(case.tokens, 8)}
    return replace(case, **sizes, losses=case.losses[:2])


def judge(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Compares what was measured with the targets."""
    for row in rows:
        case, m, dense = row["case"], row["m"], row["candidates"].get(DENSE, {})
        pairs = [
            ("time over floor", dense.get("over_floor", {}).get("median"), TARGETS, m),
            ("memory over bound", dense.get("memory_over_bound"), MEMORY_TARGET, None),
        ]
        for what, measured, targets, key in pairs:
            target: Any = targets.get(case)
            at_most = target.get(key) if isinstance(target, dict) else target
            if measured is not None and at_most is not None:
                verdict = "reached" if measured <= at_most else "missed"
                numbers = {"measured": measured, "at_most": at_most}
                yield {"case": case, "m": m, "what": what, **numbers, "verdict": verdict}


def table(results: dict[str, Any]) -> str:
    """Renders the results as markdown tables."""
    lines = []
    for row in results["rows"]:
        for name, found in row["candidates"].items():
            over = found.get("over_floor")
            of_errors = row["errors"].get(name, {})
            lines.append(
                [
                    row["case"],
                    f"{row['m']}",
                    name,
                    f"{1000 * found['seconds']['median']:,.2f}",
                    f"{over['median']:.2f}" if over else "",
                    f"{over['lower_quartile']:.2f} to {over['upper_quartile']:.2f}" if over else "",
                    f"{found['over_weighted_sum']['median']:.2f}"
                    if "over_weighted_sum" in found
                    else "",
                    f"{found['peak_gradients']:.2f}",
                    *(f"{of_errors[k]:.0e}" if of_errors else "" for k in _ERRORS),
                ]
            )
    head = ["case", "m", "candidate", "ms", "over floor", "quartiles", "over weighted sum"]
    measured = markdown_table([*head, "peak, gradients", "1 - cos", "error of p"], lines)
    return f"{measured}\n\n{_verdicts(results)}"


_ERRORS = ("one_minus_cos", "error_of_p")


def blocks_of_the_page(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields name and text of the tables in `PAGE`."""
    rows = {(row["case"], row["m"]): row for row in results["rows"]}

    def lines(cases: Sequence[str], names: Sequence[str], cell: Any) -> Iterator[list[str]]:  # noqa: ANN401
        for case, name in ((case, name) for case in cases for name in names):
            found = [rows.get((case, m), {}).get("candidates", {}).get(name) for m in FEW]
            if any(found):
                title = f"{case}, {STYLES[name][0]}"
                yield [title, *(cell(x) if x else "" for x in found)]

    head = ["", *(f"m = {m}" for m in FEW)]
    others = [case for case in CASES if case != "mlp-10M"]

    def time(found: dict[str, Any]) -> str:
        return f"{found['over_floor']['median']:.2f}"

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
        shown = f"{v['measured']:.2f}" if v["verdict"] == "reached" else f"**{v['measured']:.2f}**"
        line = targets.setdefault(f"{v['case']}, {v['what']}", {})
        line[v["m"]] = f"{shown}, {v['at_most']:g}"
    judged = [[title, *(line.get(m, "") for m in FEW)] for title, line in targets.items()]
    yield "step-cost-targets", markdown_table(head, judged)


def _verdicts(results: dict[str, Any]) -> str:
    judged = [
        [v["case"], f"{v['m']}", v["what"], f"{v['measured']:.3f}", f"{v['at_most']}", v["verdict"]]
        for v in results["targets"]
    ]
    return markdown_table(["case", "m", "target", "measured", "at most", ""], judged)


@refusals_of("step_cost")
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes JSON and picture, and prints the table."""
    parser = Parser(prog="python -m benchmarks.step_cost")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--candidates", nargs="+", default=list(NAMES), choices=NAMES, metavar="X")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for JSON and picture")
    options = parser.parse_args(arguments)
    whole = not options.quick and set(options.cases) == set(CASES)
    whole = whole and set(options.candidates) == set(NAMES)
    folder, image = options.output, IMAGE
    if folder is not None:
        make_folder(folder, "--output")
        image = folder / IMAGE.name
    elif whole:
        folder = RESULTS
    torch.set_num_threads(1)  # for the environment to say so
    results: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "environment": environment(seed=options.seed, packages=("torchjd", "cvxpy", "clarabel")),
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
        settings = (case, m, options.candidates, options.seed)
        try:
            if options.quick:
                row = measure(*settings, seconds=0.0)
            else:
                row = apart(measure, *settings, SECONDS, seconds=LIMIT)
        except Died as error:
            print(f"{name}, m = {m}: left out, because {error}.")
            results["left_out"].append({"case": name, "m": m, "why": str(error)})
        else:
            shown = {"case": name, "kind": case.kind, "batch": case.batch, "tokens": case.tokens}
            results["rows"].append({**shown, **row})
        results["targets"] = [] if options.quick else list(judge(results["rows"]))
        if folder is not None:  # each time, so that an interruption loses one case at most
            write_json(folder / "step_cost.json", results)
    print(table(results))
    if folder is None:
        print("Not written: that takes --output, or all cases at full size.")
        return
    draw_figure(image, results)
    if folder == RESULTS:
        write_whole(PAGE, filled(PAGE.read_text(), blocks_of_the_page(results)))
    print(f"Written to {folder / 'step_cost.json'} and {image}.")


if __name__ == "__main__":
    main()
