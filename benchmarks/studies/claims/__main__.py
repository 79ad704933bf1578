"""Runs the parts that are left; then the summary and its tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    Parser,
    UsageError,
    environment,
    make_folder,
    refusals_of,
    write_json,
    write_results,
)
from benchmarks.studies.claims import digits, toys
from benchmarks.studies.claims.summary import SUMMARIES, table
from benchmarks.studies.estimates import plain

FILE = Path("build/claims/rows.json")
SEEDS = (0, 1, 2, 3, 4)
COUNTS = (5, 10, 20)
_DAMAGED = (OSError, ValueError, TypeError)  # what is no file, no JSON, or no object of it

PARTS: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
    "speed": toys.speed,
    "radius": lambda: digits.radius(SEEDS, (0.2, 0.4, 0.6, 0.8, 0.95)),
    "objectives": lambda: chain(
        toys.many_bowls(SEEDS, COUNTS), digits.many_tasks(SEEDS, COUNTS, toys.RADII, steps=200)
    ),
    "noise": lambda: digits.noise(SEEDS, (16, 64, 256, 1024), toys.RADII, draws=40),
}


def run(path: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Runs the parts that the file lacks; a part is on the disk before the next one starts."""
    make_folder(path.parent, "--output")
    try:
        found = dict(json.loads(path.read_text())) if path.exists() else {}
    except _DAMAGED as error:
        raise UsageError(
            f"`--output` must hold what this program wrote; got {path} ({error})."
        ) from error
    for name in parts:
        if name not in found:
            print(name, flush=True)
            found[name] = plain(list(PARTS[name]()))
            found["environment"] = environment(packages=["scikit-learn"])
            write_json(path, found)
    return found


@refusals_of("claims")
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and runs."""
    parser = Parser(prog="python -m benchmarks.studies.claims")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=FILE, help="the runs: %(default)s")
    options = parser.parse_args(arguments)
    rows = run(options.output, options.parts)
    found = plain({name: make(rows[name]) for name, make in SUMMARIES.items() if name in rows})
    for name, lines in found.items():
        print(table(name, lines), end="\n\n")
    if found.keys() == SUMMARIES.keys():
        found["environment"] = rows["environment"]
        print(write_results("claims", found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
