"""Measures of a set -> one JSON file: values, intervals, paired differences, who is best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alignment.analysis import Estimate
from benchmarks.harness import UsageError, environment, write_whole
from benchmarks.multitask.analysis import MEASURES, Array, Results
from benchmarks.multitask.methods import METHODS
from raco_optim.cli.grid import read_records

AGAINST = ("raco", "linear")


def write(name: str, folder: Path) -> Path:
    """Writes `<folder>/<name>_summary.json` from the records of a set."""
    path = folder / f"{name}_summary.json"
    packages = ("torchjd", "scikit-learn", "statsmodels", "aclsum")
    found = summarise(read_records(folder / f"{name}.jsonl"))
    write_whole(
        path, json.dumps({**found, "environment": environment(packages=packages)}, indent=1) + "\n"
    )
    return path


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything that tables and figures show of a set, of its complete seeds.

    Raises:
        UsageError: There are no records, or no seed is complete.
    """
    if not records:
        raise UsageError("There are no records to summarise. Run the study first.")
    results = Results(records)
    records = [record for record in records if record["point"]["seed"] in results.seeds]
    measures = results.measures()
    scores = results.scores()
    conflicts = results.training("conflicting_steps")
    steps = results.training("steps")
    equal = results.equal_gaps()
    return {
        "set": records[0]["settings"]["set"],
        "settings": records[0]["settings"],
        "tasks": list(results.tasks),
        "weights": results.weights.tolist(),
        "seeds": list(results.seeds),
        "constant_scores": np.mean(
            [record["extra"]["constant"][1] for record in records], axis=0
        ).tolist(),
        "methods": {
            method: {
                "title": METHODS[method].title,
                "chosen": _chosen(records, method),
                "conflicting_steps": float(conflicts[k]),
                "steps": float(steps[k]),
                "scores": {task: _estimate(scores[k, i]) for i, task in enumerate(results.tasks)},
                "points": {
                    space: values[k].mean(1).tolist()
                    for space, values in (*results.relative.items(), ("score", results.score))
                },
                **{name: _estimate(values[k]) for name, values in measures.items()},
                "gap of the equal run": _estimate(equal[k]),
                "gain of the weights": _estimate(equal[k] - measures["gap"][k]),
                "against": {
                    other: {
                        name: _estimate(values[k] - values[results.methods.index(other)])
                        for name, values in measures.items()
                    }
                    for other in AGAINST
                    if other in results.methods and other != method
                },
            }
            for k, method in enumerate(results.methods)
        },
        "winners": {name: _winners(results, name, values) for name, values in measures.items()},
    }


def _estimate(values: Array) -> dict[str, float]:
    return vars(Estimate.of(values))


def _chosen(records: Sequence[dict[str, Any]], method: str) -> dict[str, Any]:
    record = next(r for r in records if r["point"]["method"] == method)
    return {"lr": record["training"]["lr"], "parameter": record["point"]["c"]}


def _winners(results: Results, name: str, values: Array) -> dict[str, Any]:
    """The best method, and the others of which the data cannot tell it."""
    signed = -values if MEASURES[name] else values
    best = int(signed[:, 0].argmin())
    tied = []
    for k, method in enumerate(results.methods):
        if k != best and Estimate.of(signed[k] - signed[best]).low <= 0:
            tied.append(method)
    return {"best": results.methods[best], "not told apart": tied}
