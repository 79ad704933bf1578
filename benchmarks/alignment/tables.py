"""From the records of a study to JSON in benchmarks/results and to tables in Markdown."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.alignment.analysis import weights_text
from benchmarks.alignment.claims import claims
from benchmarks.alignment.data import statistics
from benchmarks.alignment.study import FOLDER, OBJECTIVES, TRIALS, C, file_for
from benchmarks.alignment.summary import Summary, plain
from benchmarks.harness import (
    RESULTS,
    Parser,
    UsageError,
    markdown_table,
    refusals_of,
    write_results,
)
from raco_optim.cli.grid import read_records

TITLES = {
    "initial": "untrained",
    "single": "single-objective DPO",
    "soup": "rewarded soup",
    "modpo": "MODPO",
    "amopo": "AMoPO",
    "linear": "weighted DPO",
    "mgda": "MGDA",
    "cagrad": "CAGrad",
    "raco": "CAGrad-Clip (RACO)",
}


def interval(found: Mapping[str, float], digits: int = 3, *, sign: bool = False) -> str:
    """``value [low, high]``."""
    if found["value"] is None:
        return "-"
    form = f"{'+' if sign else ''}.{digits}f"
    if found["low"] is None or found["low"] == found["high"]:
        return f"{found['value']:{form}}"
    return f"{found['value']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def share(value: float | None) -> str:
    """A share in percent, a dash for None."""
    return "-" if value is None else f"{value:.0%}"


def methods_table(summary: Mapping[str, Any]) -> str:
    """One line a method: hypervolume and distance, the two spaces beside each other."""
    rows = []
    for name, found in summary["methods"].items():
        rows.append(
            [
                TITLES[name],
                str(found["points"]),
                str(found["seeds"]),
                interval(found["hypervolume"]["accuracy"]),
                interval(found["distance"]["accuracy"]),
                interval(found["hypervolume"]["loss"]),
                interval(found["distance"]["loss"]),
                share(found["training"]["hurting_steps"]),
            ]
        )
    head = ["method", "points", "seeds", "hypervolume, accuracy", "distance, accuracy"]
    return markdown_table([*head, "hypervolume, loss", "distance, loss", "hurting steps"], rows)


def differences_table(summary: Mapping[str, Any]) -> str:
    """One line a method: what users with the study's weights gain or lose against weighted DPO."""
    rows = [
        [f"{TITLES[name]} - {TITLES['linear']}", *gains(found["minus_linear"])]
        for name, found in summary["methods"].items()
        if name not in ("initial", "linear")
    ]
    rows.append(
        [f"{TITLES['raco']} - {TITLES['cagrad']}", *gains(summary["clipping"][0])],
    )
    head = ["difference", "weighted accuracy", "weighted loss", "accuracy, least weight"]
    return markdown_table([*head, "loss, least weight"], rows)


def clipping_table(summary: Mapping[str, Any]) -> str:
    """One line a radius: CAGrad-Clip minus CAGrad."""
    rows = [[f"{found['c']:g}", *gains(found)] for found in summary["clipping"][1:]]
    head = ["c", "weighted accuracy", "weighted loss", "accuracy, least weight"]
    return markdown_table([*head, "loss, least weight"], rows)


def gains(differences: Mapping[str, Any]) -> list[str]:
    """Differences of accuracy, where more is better, and of loss, weighted and of the minority."""
    cells = []
    for name in ("weighted", "minority"):
        error = differences[name]["accuracy"]
        if error["value"] is not None:
            error = {"value": -error["value"], "low": -error["high"], "high": -error["low"]}
        cells.append(interval(error, sign=True))
        cells.append(interval(differences[name]["loss"], sign=True))
    return cells


def tax_table(summary: Mapping[str, Any]) -> str:
    """One line a method: what it cost, also per what it brought."""
    before = next(p for p in summary["points"] if p["method"] == "initial")["capability"]
    rows = []
    for name, found in summary["methods"].items():
        if name != "initial":
            nats, choices = found["tax"]["nats_per_token"], found["tax"]["choice_accuracy"]
            relative = None if nats["value"] is None else nats["value"] / before["nats_per_token"]
            rows.append(
                [
                    TITLES[name],
                    interval(nats, sign=True),
                    "-" if relative is None else f"{relative:+.1%}",
                    "-" if found["tax_per_gain"] is None else f"{found['tax_per_gain']:.3f}",
                    interval(choices, sign=True),
                ]
            )
    head = ["method", f"nats per token (untrained: {before['nats_per_token']:.3f})", "relative"]
    head.append("nats per 0.1 of weighted accuracy")
    return markdown_table([*head, f"choices (untrained: {before['choice_accuracy']:.3f})"], rows)


def points_table(summary: Mapping[str, Any]) -> str:
    """One line a point."""
    objectives = summary["settings"]["objectives"]
    rows = []
    for point in summary["points"]:
        scores = [point["objectives"][name] for name in objectives]
        rows.append(
            [
                TITLES[point["method"]],
                weights_text(point["weights"]),
                *(interval(score["accuracy"], 2) for score in scores),
                *(interval(score["loss"], 2) for score in scores),
                *(f"{score['margin']:+.2f}" for score in scores),
                share(point["training"]["conflicting_steps"]),
                share(point["training"]["hurting_steps"]),
                share(point["training"]["vertex_share"]),
            ]
        )
    measures = [f"{what}, {name}" for what in ("accuracy", "loss", "margin") for name in objectives]
    return markdown_table(
        ["method", "weights", *measures, "conflict", "hurting", "p at a vertex"], rows
    )


def ablation_table(summary: Mapping[str, Any]) -> str:
    """One line a radius and method, at one weight."""
    objectives = summary["settings"]["objectives"]
    rows = []
    for point in summary["ablation"]:
        angle = point["training"]["clip_angle"]
        rows.append(
            [
                TITLES[point["method"]],
                f"{point['c']:g}",
                *(interval(point["objectives"][name]["accuracy"]) for name in objectives),
                *(interval(point["objectives"][name]["loss"]) for name in objectives),
                interval(point["weighted"]["loss"]),
                share(point["training"]["hurting_steps"]),
                "-" if angle is None else f"{angle:.3f}",
            ]
        )
    measures = [f"{what}, {name}" for what in ("accuracy", "loss") for name in objectives]
    return markdown_table(
        ["method", "c", *measures, "weighted loss", "hurting steps", "clip angle"], rows
    )


def claims_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """One line a claim, one column a study."""
    studies = [f"{s['settings']['size']}, {len(s['settings']['objectives'])}" for s in summaries]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for study, summary in zip(studies, summaries, strict=True):
        for claim in summary["claims"]:
            cell = f"**{claim['verdict']}**"
            if claim["measured"]:
                cell += f"; {claim['measured']}"
            rows.setdefault((claim["claim"], claim["seed"]), {})[study] = cell
    lines = [[*key, *(cells.get(study, "-") for study in studies)] for key, cells in rows.items()]
    return markdown_table(["claim", "paper", *studies], lines, text=2 + len(studies))


def section(summary: Mapping[str, Any]) -> str:
    """All tables of one study."""
    settings, held_out = summary["settings"], summary["held_out"]
    names = ", ".join(settings["objectives"])
    sizes = settings["sizes"]
    parts = [
        f"## {settings['size']}, {len(settings['objectives'])} objectives: {names}",
        f"{len(summary['seeds'])} seeds; {sizes['steps']} steps of {sizes['batch_size']} pairs; "
        f"{held_out['pairs']} held-out pairs of {held_out['papers']} papers, in conflict "
        f"{held_out['any_conflict']:.0%}; no model's accuracies have a sum above "
        f"{held_out['accuracy_sum']:.3f}.",
        "### The methods",
        methods_table(summary),
        differences_table(summary),
        "### The alignment tax",
        tax_table(summary),
    ]
    if summary["ablation"]:
        weights = weights_text(summary["ablation"][0]["weights"])
        parts += [f"### The radius c, at weights {weights}", ablation_table(summary)]
        parts += ["CAGrad-Clip minus CAGrad:", clipping_table(summary)]
    parts += ["### Every point", points_table(summary)]
    return "\n\n".join(parts)


def summarise(size: str, m: int, folder: Path = FOLDER) -> dict[str, Any]:
    """Reads a study's records; writes its summary and a copy of the records to `RESULTS`."""
    path = file_for(size, m, folder)
    if not path.exists():
        path = file_for(size, m, RESULTS)
    records = read_records(path)
    summary = Summary.of(records)
    found = plain(
        {
            "environment": records[0]["environment"],
            **summary.as_dict(),
            "held_out": statistics(summary.pairs),
            "c": C,
            "claims": [dataclasses.asdict(claim) for claim in claims(summary)],
        }
    )
    write_results(f"alignment_{size}_{m}", found)
    if path.parent != RESULTS:
        shutil.copy(path, RESULTS / path.name)
    return found


@refusals_of("alignment.tables")
def main(arguments: Sequence[str] | None = None) -> None:
    """Summarises every study that there is and prints its tables."""
    parser = Parser(prog="python -m benchmarks.alignment.tables")
    text = f"folder (default: {FOLDER}, and what is committed)"
    parser.add_argument("--records", type=Path, help=text)
    parser.add_argument("--from-json", action="store_true", help="print what was summarised before")
    options = parser.parse_args(arguments)
    studies = list(itertools.product(TRIALS, OBJECTIVES))
    folder = options.records or FOLDER
    if options.records and not any(file_for(*study, folder).exists() for study in studies):
        raise UsageError(
            f"`--records` must be a folder with records of the study; got {folder}, which has "
            f"none. Leave it out for those that are committed."
        )
    summaries = []
    for size, m in studies:
        kept = RESULTS / f"alignment_{size}_{m}.json"
        if options.from_json:
            if kept.exists():
                summaries.append(json.loads(kept.read_text()))
        elif any(file_for(size, m, place).exists() for place in (folder, RESULTS)):
            summaries.append(summarise(size, m, folder))
    print("## The paper's claims", claims_table(summaries), sep="\n\n", end="\n\n")
    print("\n\n".join(section(summary) for summary in summaries))


if __name__ == "__main__":
    main()
