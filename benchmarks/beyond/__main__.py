"""Runs what is left of the comparison, or of some of its parts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.beyond import study
from benchmarks.multitask.data import SETS
from raco_optim.cli.errors import UsageError
from raco_optim.cli.files import make_folder

PARTS = (*SETS, "small_2", "small_3")


def run(part: str, seeds: Sequence[int]) -> None:
    """Runs what is left of a part."""
    if part in SETS:
        study.SetStudy(part, seeds=seeds).run()
    else:
        size, m = part.split("_")
        study.run_models(size, int(m), seeds=seeds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beyond", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(study.SEEDS))
    options = parser.parse_args(arguments)
    try:
        make_folder(study.FOLDER, "--output")
        for part in options.parts:
            run(part, options.seeds)
    except UsageError as error:
        print(f"beyond: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
