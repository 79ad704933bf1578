"""Controls: does a method do more than other weights, or a smaller c, would?

- where the methods end beside the curve that the weighted sum draws when its weights move;
- what CAGrad-Clip pays in weighted loss for the steps that hurt no loss, as c grows, and what the
  candidates pay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alignment.analysis import Array
from benchmarks.beyond import analysis, study
from benchmarks.beyond.candidates import BASELINES, CANDIDATES
from raco_optim.cli.grid import read_records

TASKS = ("digits", "small_2")


def losses_of(records: analysis.Records) -> dict[tuple[str, tuple[float, ...]], Array]:
    """Held-out losses by method and weights, ``[seeds, 2]``, seeds in order."""
    found: dict[tuple[str, tuple[float, ...]], dict[int, list[float]]] = {}
    for record in records:
        point = record["point"]
        key = point["method"], tuple(point["weights"].values())
        losses = [scores["loss"] for scores in record["evaluation"].values()]
        found.setdefault(key, {})[point["seed"]] = losses
    return {key: np.array([rows[s] for s in sorted(rows)]) for key, rows in found.items()}


def curve(records: analysis.Records) -> Array:
    """Mean losses of the weighted sum from the first loss's largest weight on, ``[W, 2]``."""
    rows = sorted(losses_of(records).items(), key=lambda item: -item[0][1][0])
    return np.array([values.mean(0) for _, values in rows])


def above(point: Array, curve: Array) -> float:
    """How far a point lies above (worse, +) or below (better, -) a curve.

    Along the diagonal, in the mean of both losses: the t for which point - t is on the curve, whose
    points are joined by straight lines; NaN where the diagonal misses it.
    """
    height = curve @ [0.5, 0.5]
    along = curve @ [1.0, -1.0]
    order = np.argsort(along)
    at = float(point[0] - point[1])
    if not along[order[0]] <= at <= along[order[-1]]:
        return float("nan")
    return float(point.mean() - np.interp(at, along[order], height[order]))


def summarise(folder: Path = study.FOLDER) -> dict[str, Any]:
    """Mean over weights of how far a method's points lie above the curve; bootstrap over seeds."""
    found: dict[str, Any] = {}
    for task in TASKS:
        records = (
            study.set_records(task, folder)
            if task == "digits"
            else study.model_records("small", 2, folder)
        )
        front = losses_of(
            [
                *(record for record in records if record["point"]["method"] == "linear"),
                *read_records(folder / f"{task}_front.jsonl"),
            ]
        )
        seeds = len(study.FRONT_SEEDS)
        points = {key: rows[:seeds] for key, rows in losses_of(records).items()}
        front = {key: rows[:seeds] for key, rows in front.items()}
        ordered = sorted(front, key=lambda key: -key[1][0])
        generator = np.random.default_rng(0)
        drawn = generator.multinomial(seeds, [1 / seeds] * seeds, analysis.REPLICATES["model"])
        draws = np.concatenate([np.ones((1, seeds)), drawn]) / seeds
        found[task] = {}
        for method in (*BASELINES[1:], *CANDIDATES):
            mine = [rows for (name, _), rows in points.items() if name == method]
            values = [
                np.nanmean(
                    [
                        above(d @ rows, np.array([d @ front[key] for key in ordered]))
                        for rows in mine
                    ]
                )
                for d in draws
            ]
            found[task][method] = analysis.interval(np.array(values), analysis.LEVEL)
    return found


def radii(folder: Path = study.FOLDER) -> dict[str, list[dict[str, Any]]]:
    """By task and method at its c: weighted loss above the weighted sum's, hurting, least weight.

    Small model, means over weights and the seeds of `study.FRONT_SEEDS`.
    """
    found = {}
    for m in (2, 3):
        records = [
            *study.model_records("small", m, folder),
            *read_records(folder / f"small_{m}_radii.jsonl"),
        ]
        groups: dict[tuple[str, float], list[dict[str, float]]] = {}
        for record in records:
            point = record["point"]
            if point["seed"] not in study.FRONT_SEEDS:
                continue
            w = np.array(list(point["weights"].values()))
            losses = np.array([scores["loss"] for scores in record["evaluation"].values()])
            smallest = np.isclose(w, w.min())
            groups.setdefault((point["method"], point["c"] or 0.0), []).append(
                {
                    "weighted": float(w @ losses),
                    "least weight": float(losses[smallest].mean()),
                    "hurting": record["training"]["hurting_steps"],
                    "unequal": not smallest.all(),
                }
            )
        base = np.mean([row["weighted"] for row in groups["linear", 0.0]])
        found[f"small_{m}"] = [
            {
                "method": method,
                "c": c,
                "excess": float(np.mean([row["weighted"] for row in rows]) - base),
                "hurting": float(np.mean([row["hurting"] for row in rows])),
                "least weight": float(
                    np.mean([row["least weight"] for row in rows if row["unequal"]])
                ),
            }
            for (method, c), rows in groups.items()
        ]
    return found


def smaller_radii(folder: Path = study.FOLDER) -> dict[str, Any]:
    """CAGrad-Clip with smaller c against itself with the c that tuning chose, as a candidate is.

    By task and c: differences with intervals, and whether the target is reached.
    """
    found: dict[str, Any] = {}
    for m in (2, 3):
        records = [
            record
            for record in study.model_records("small", m, folder)
            if record["point"]["method"] in BASELINES
            and record["point"]["seed"] in study.FRONT_SEEDS
        ]
        for record in read_records(folder / f"small_{m}_radii.jsonl"):
            point = {**record["point"], "method": f"{record['point']['c']:g}"}
            records.append({**record, "point": point})
        methods = analysis.of_model(records)["methods"]
        found[f"small_{m}"] = {
            f"{c:g}": {
                "against": methods[f"{c:g}"]["against"]["raco"],
                "reaches": methods[f"{c:g}"]["reaches"],
            }
            for c in study.SMALLER_RADII
        }
    return found
