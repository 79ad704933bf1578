"""Runs the study, or what is left of it; then summaries and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import (
    RESULTS,
    Parser,
    environment,
    make_folder,
    refusals_of,
    write_json,
)
from benchmarks.studies.multitask import summary
from benchmarks.studies.multitask.data import SETS
from benchmarks.studies.multitask.methods import METHODS
from benchmarks.studies.multitask.study import FOLDER, Plan, Study


@refusals_of("multitask")
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, runs and reports."""
    parser = Parser(
        prog="python -m benchmarks.studies.multitask",
        description="Runs the study on real sets. Stopped at any time, it goes on where it was.",
    )
    add = parser.add_argument
    add("--sets", nargs="+", choices=SETS, default=list(SETS), help="default: all")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--seeds", nargs="+", type=int, default=list(Plan.seeds), help="default: 0 to 4")
    add("--output", type=Path, default=FOLDER, help="folder of the runs: %(default)s")
    options = parser.parse_args(arguments)
    make_folder(options.output, "--output")
    plan = Plan(seeds=tuple(options.seeds), methods=tuple(options.methods))
    for name in options.sets:
        found = summary.summarise(Study(name, plan, options.output).run())
        print(f"## {name}\n\n{summary.table(found)}\n")
        packages = ("torchjd", "scikit-learn", "statsmodels", "aclsum")
        found["environment"] = environment(packages=packages)
        # A part of the study takes no whole one's place.
        folder = RESULTS / "multitask" if plan == Plan() else options.output
        path = folder / f"{name}_summary.json"
        write_json(path, found)
        print(path)


if __name__ == "__main__":
    # Two runs side by side on one thread each do more than one run on two, and a sum's last digits
    # depend on how many threads share it.
    torch.set_num_threads(1)
    main()
