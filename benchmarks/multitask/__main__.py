"""Runs the study, or what is left of it; then summary, timing, tables and figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import Parser, UsageError, make_folder
from benchmarks.multitask import figures, summary, tables, timing
from benchmarks.multitask.data import SETS
from benchmarks.multitask.methods import METHODS
from benchmarks.multitask.study import FOLDER, Plan, Study


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, runs and reports; returns the exit code."""
    parser = Parser(
        prog="python -m benchmarks.multitask",
        description="Runs the study on real sets. Stopped at any time, it goes on where it was.",
    )
    add = parser.add_argument
    add("--sets", nargs="+", choices=SETS, default=list(SETS), help="default: all")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--seeds", nargs="+", type=int, default=list(Plan.seeds), help="default: 0 to 4")
    add("--output", type=Path, default=FOLDER, help="folder of the records (default: %(default)s)")
    add("--runs-only", action="store_true", help="leave out summary, timing, tables and figures")
    try:
        options = parser.parse_args(arguments)
        make_folder(options.output, "--output")
        plan = Plan(seeds=tuple(options.seeds), methods=tuple(options.methods))
        for name in options.sets:
            Study(name, plan, options.output).run()
        if not options.runs_only:
            for name in options.sets:
                summary.write(name, options.output)
            if not (options.output / timing.FILE).exists():
                timing.write(options.output)
            tables.write(options.output)
            figures.write(options.output)
    except UsageError as error:
        print(f"multitask: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # Two runs side by side on one thread each do more than one run on two, and a sum's last digits
    # depend on how many threads share it.
    torch.set_num_threads(1)
    sys.exit(main())
