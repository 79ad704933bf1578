"""Runs what is left of the comparison, or of some of its parts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.beyond import study
from benchmarks.multitask.data import SETS
from raco_optim.cli.errors import UsageError
from raco_optim.cli.files import make_folder

PARTS: dict[str, Callable[[], object]] = {
    **{name: lambda name=name: study.SetStudy(name).run() for name in SETS},
    **{
        f"small_{m}": lambda m=m: study.run_models("small", m, tuple(study.COMPARED))
        for m in (2, 3)
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beyond", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(arguments)
    try:
        make_folder(study.FOLDER, "--output")
        for name in options.parts:
            PARTS[name]()
    except UsageError as error:
        print(f"beyond: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
