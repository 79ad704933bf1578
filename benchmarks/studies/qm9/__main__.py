"""Runs what is missing of the study, then writes its summary, table and picture."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.harness import Parser, make_folder, refusals_of, write_results
from benchmarks.studies.qm9.data import load
from benchmarks.studies.qm9.protocol import Protocol, Runs, Study
from benchmarks.studies.qm9.summary import Summary, draw, table
from raco_optim.cli import UsageError

FOLDER = Path("build/qm9")
PICTURE = Path(__file__).parents[3] / "docs" / "images" / "qm9.png"


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.studies.qm9`."""
    parser = Parser(prog="qm9", description="Eleven targets of QM9 by every method.")
    parser.add_argument("--runs", type=Path, default=FOLDER / "runs.jsonl", help="file of runs")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the wheel of qm9pack")
    parser.add_argument("--summary", action="store_true", help="only summarise finished runs")
    with refusals_of("qm9"):
        asked = parser.parse_args(arguments)
        torch.set_num_threads(1)
        protocol = Protocol()
        runs = Runs(asked.runs, protocol.settings())
        make_folder(asked.data, "--data")
        data = load(asked.data, protocol.sizes)
        if not asked.summary:
            Study(protocol, runs, data).run()
        summary = Summary(runs, protocol, data.units.tolist())
        if not summary.scores("equal"):
            raise UsageError(f"{asked.runs} has no finished multi-task run yet.")
        found = summary.as_json()
        write_results("qm9", found)
        draw(PICTURE, found["mlp"])
        print(table(found["mlp"]))


if __name__ == "__main__":
    main()
