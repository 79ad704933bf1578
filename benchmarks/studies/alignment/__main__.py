"""Runs the study, or what is left of it; then summaries, tables and the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import RESULTS, Parser, make_folder, refusals_of, write_json
from benchmarks.studies.alignment import study, summary

PICTURE = Path(__file__).parents[3] / "docs" / "images" / "alignment-small-2.png"


@refusals_of("alignment")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every size with every number of objectives."""
    parser = Parser(
        prog="python -m benchmarks.studies.alignment",
        description="Runs the study on real text. Stopped at any time, it goes on where it was.",
    )
    add = parser.add_argument
    sizes, numbers = list(study.TRIALS), list(study.OBJECTIVES)
    add("--size", nargs="+", choices=sizes, default=sizes, help="models (default: both)")
    add(
        "--objectives", nargs="+", type=int, choices=numbers, default=numbers, help="(default: 2 3)"
    )
    add("--seeds", nargs="+", type=int, help="seeds (default: those of the plan)")
    add("--output", type=Path, default=study.FOLDER, help="folder of the runs: %(default)s")
    options = parser.parse_args(arguments)
    make_folder(options.output, "--output")
    for size in options.size:
        for m in options.objectives:
            plan = study.plan_for(size)
            if options.seeds:
                plan = dataclasses.replace(plan, seeds=tuple(options.seeds))
            found = summary.Results(study.run(size, m, plan, options.output)).as_dict()
            print(summary.table(found))
            # A part of the study takes no whole one's place.
            path = (options.output if options.seeds else RESULTS) / f"alignment_{size}_{m}.json"
            write_json(path, found)
            if (size, m) == ("small", 2) and not options.seeds:
                summary.draw(PICTURE, found)
            print(path)


if __name__ == "__main__":
    # Two runs side by side on one thread each do more than one run on two, and a sum's last digits
    # depend on how many threads share it.
    torch.set_num_threads(1)
    main()
