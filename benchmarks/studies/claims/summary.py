"""Rows of runs -> estimates over starts or seeds, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import markdown_table
from benchmarks.studies.estimates import Array, Estimate, text

Rows = Sequence[Mapping[str, Any]]
PAIRS = {
    "clipped / CAGrad": ("raco", "cagrad"),
    "CAGrad / weighted": ("cagrad", "linear"),
    "clipped / weighted": ("raco", "linear"),
}


def chosen(rows: Rows, **wanted: Any) -> Rows:  # noqa: ANN401  # values of a row
    """The rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def different(rows: Rows, name: str) -> list[Any]:
    """The values of a column, each once."""
    return list(dict.fromkeys(row[name] for row in rows))


def ratio(logs: Array) -> Estimate | None:
    """Geometric mean over units of a ratio, with its interval; NaN is a unit that has none."""
    known = logs[np.isfinite(logs)]
    if not len(known):
        return None
    return Estimate(*(float(np.exp(x)) for x in vars(Estimate.of_units(known)).values()))


def _logs(values: Sequence[float | None]) -> Array:
    return np.log(np.array([np.nan if x is None else x for x in values], dtype=float))


def _ratios(of: Mapping[str, Array]) -> dict[str, Estimate | None]:
    return {name: ratio(of[one] - of[other]) for name, (one, other) in PAIRS.items()}


def _c_of(rule: str, c: float) -> float:
    return 0.0 if rule == "linear" else c


def speed(rows: Rows) -> list[dict[str, Any]]:
    """Ratios of the steps to 1 % of the start's distance to the front, over starts."""
    found = []
    for problem in different(rows, "problem"):
        for c in sorted(set(different(rows, "c")) - {0.0}):
            logs, never, turned = {}, {}, 0.0
            for rule in ("linear", "cagrad", "raco"):
                [row] = chosen(rows, problem=problem, rule=rule, c=_c_of(rule, c))
                by_start = _logs(row["steps"]).reshape(row["units"], -1)
                logs[rule] = by_start
                never[rule] = int(np.isnan(by_start).sum())
                turned = float(np.mean(row["clip_changed"]))
            ratios = {}
            for name, (one, other) in PAIRS.items():
                differences = logs[one] - logs[other]
                kept = differences[np.isfinite(differences).any(1)]
                ratios[name] = ratio(np.nanmean(kept, axis=1)) if len(kept) else None
            row = {"on": problem, "c": c, **ratios}
            found.append({**row, "clipping turns": turned, "never there": never})
    return found


def radius(rows: Rows) -> list[dict[str, Any]]:
    """Test losses at every c minus those of the weighted sum, over seeds."""
    base = {row["seed"]: row for row in chosen(rows, rule="linear")}
    found = []
    for c in sorted(set(different(rows, "c")) - {0.0}):
        line: dict[str, Any] = {"c": c}
        for rule, title in (("cagrad", "CAGrad"), ("raco", "clipped")):
            here = [(row, base[row["seed"]]) for row in chosen(rows, rule=rule, c=c)]
            weighted = np.array([row["weighted"] - other["weighted"] for row, other in here])
            least = np.array([row["losses"][0] - other["losses"][0] for row, other in here])
            line[f"{title}, weighted loss"] = Estimate.of_units(weighted)
            line[f"{title}, least weight"] = Estimate.of_units(least)
        found.append(line)
    return found


def objectives(rows: Rows) -> list[dict[str, Any]]:
    """Ratios with many losses: of steps on the bowls, of the weighted test loss on the digits."""
    found = []
    for on, key in (("bowls", "steps"), ("digits", "weighted")):
        of_set = chosen(rows, on=on)
        for m in different(of_set, "m"):
            for kind in different(of_set, "weights"):
                here = chosen(of_set, m=m, weights=kind)
                for c in sorted(set(different(here, "c")) - {0.0}):
                    of = {
                        rule: _logs([row[key] for row in chosen(here, rule=rule, c=_c_of(rule, c))])
                        for rule in ("linear", "cagrad", "raco")
                    }
                    never = {rule: int(np.isnan(x).sum()) for rule, x in of.items()}
                    row = {"on": on, "m": m, "weights": kind, "c": c, "ratio of": key}
                    found.append({**row, **_ratios(of), "never there": never})
    return found


def noise(rows: Rows) -> list[dict[str, Any]]:
    """p and the update from a batch against those from all training data, over seeds."""
    found = []
    for m in different(rows, "m"):
        for c in different(rows, "c"):
            for size in different(rows, "batch"):
                here = chosen(rows, m=m, c=c, batch=size)

                def by_seed(rule: str, key: str, here: Rows = here) -> Array:
                    of_rule = chosen(here, rule=rule)
                    seeds = different(of_rule, "seed")
                    return np.array(
                        [np.mean([r[key] for r in chosen(of_rule, seed=s)]) for s in seeds]
                    )

                angles = {rule: by_seed(rule, "angle") for rule in ("cagrad", "raco")}
                found.append(
                    {
                        "m": m,
                        "c": c,
                        "batch": size,
                        "variation of p": Estimate.of_units(by_seed("cagrad", "variation")),
                        "bias of p": Estimate.of_units(by_seed("cagrad", "bias")),
                        "angle, CAGrad": Estimate.of_units(angles["cagrad"]),
                        "angle, clipped - CAGrad": Estimate.of_units(
                            angles["raco"] - angles["cagrad"]
                        ),
                    }
                )
    return found


SUMMARIES = {"speed": speed, "radius": radius, "objectives": objectives, "noise": noise}


def table(part: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """A part of the summary in Markdown, a row a line; ratios are bold where 1 is outside."""

    def cell(name: str, value: Any) -> str:  # noqa: ANN401  # what JSON can hold
        if isinstance(value, Mapping) and "value" in value:
            return text(value, ratio="/" in name, sign=part == "radius" or " - " in name)
        if isinstance(value, Mapping):
            return "/".join(map(str, value.values()))
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    rows = [[cell(name, value) for name, value in line.items()] for line in lines]
    return f"## {part}\n\n{markdown_table(list(lines[0]), rows)}"
