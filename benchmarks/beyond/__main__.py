"""Runs what is left of the comparison, or of some of its parts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.beyond import cost, figures, study, tables, toys, trust_region
from benchmarks.beyond.candidates import RADII
from benchmarks.harness import environment, make_folder, refusals_of, write_whole
from benchmarks.multitask import many
from benchmarks.multitask.data import SETS

MODELS = ("small_2", "small_3", "smollm2_2", "smollm2_3")


def many_losses() -> dict[str, Any]:
    """5 and 10 yes-or-no tasks on the digits."""
    rows = many.objectives(study.FRONT_SEEDS, (5, 10), RADII, 200, study.COMPARED)
    return {"rows": many.all_rows(rows), "environment": environment(packages=["scikit-learn"])}


def on_toys() -> dict[str, Any]:
    """Problems with known fronts."""
    return {"rows": list(toys.rows()), "environment": environment()}


FILES: dict[str, Callable[[], dict[str, Any]]] = {
    "toys": on_toys,
    "many": many_losses,
    "trust": trust_region.measure,
    "cost": cost.times,
}
PARTS = (*SETS, *MODELS, "front", "radii", *FILES)


def run(part: str, seeds: Sequence[int] | None, methods: Sequence[str] | None) -> None:
    """Runs what is left of a part."""
    if part in SETS:
        chosen = methods or tuple(study.COMPARED)
        study.SetStudy(part, seeds=seeds or study.SEEDS, methods=chosen).run()
    elif part in MODELS:
        size, m = part.split("_")
        study.run_models(size, int(m), seeds=seeds, methods=methods)
    elif part == "front":
        study.run_fronts()
    elif part == "radii":
        study.run_radii()
    elif not (path := study.FOLDER / f"{part}.json").exists():
        write_whole(path, json.dumps(FILES[part]()) + "\n")


@refusals_of("beyond")
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beyond", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the protocol")
    parser.add_argument("--methods", nargs="+", choices=study.COMPARED, help="default: all")
    options = parser.parse_args(arguments)
    make_folder(study.FOLDER, "--output")
    for part in options.parts:
        run(part, options.seeds, options.methods)
    if options.parts == list(PARTS):
        tables.write()
        figures.write()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
