"""Runs the study, or what is left of it; afterwards the tables."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.alignment import study
from benchmarks.harness import Parser, refusals_of


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(
        prog="python -m benchmarks.alignment",
        description="Runs the study on real text. Stopped at any time, it goes on where it was.",
    )
    parser.add_argument(
        "--size",
        nargs="+",
        choices=study.TRIALS,
        default=["small", "smollm2"],
        help="models: small (from scratch), smollm2, gemma3 (default: small smollm2)",
    )
    parser.add_argument(
        "--objectives",
        nargs="+",
        type=int,
        choices=study.OBJECTIVES,
        default=[2, 3],
        help="numbers of objectives (default: 2 3)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds (default: those of the plan)")
    parser.add_argument("--output", type=Path, default=study.FOLDER, help="default: %(default)s")
    return parser.parse_args(arguments)


@refusals_of("alignment")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every size with every number of objectives."""
    options = parse(arguments)
    for size in options.size:
        for m in options.objectives:
            plan = study.plan_for(size)
            if options.seeds:
                plan = dataclasses.replace(plan, seeds=tuple(options.seeds))
            study.run(size, m, plan, options.output)
            print(study.file_for(size, m, options.output))


if __name__ == "__main__":
    # Two runs side by side on one thread each do more than one run on two, and a sum's last digits
    # depend on how many threads share it.
    torch.set_num_threads(1)
    main()
