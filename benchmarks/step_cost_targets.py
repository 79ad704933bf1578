"""What was aimed at before anything was measured, and whether it is met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.step_cost_candidates import APPROXIMATIONS, DENSE, GHOST

TARGETS: dict[str, Any] = {
    "dense over floor, batch 64": {
        "cases": ["mlp-10M", "mlp-100M"],
        "at_most": {"2": 1.10, "4": 1.15, "8": 1.20},
    },
    "dense over floor, batch 512": {"cases": ["mlp-10M-batch-512"], "at_most": 1.05},
    "ghost over floor, m = 8, small batch": {"at_most": 0.70},
    # Never slower, to the hundredth that a ratio is good for.
    "ghost over dense": {"at_most": 1.01, "of": "lower quartile"},
    # Where layers are covered: elsewhere it is dense, and has the memory of that.
    "memory of ghost over weighted sum, small batch": {"at_most": 2.0},
    "cheapest approximation over weighted sum, m = 40": {"at_most": 1.5},
}


def judge(rows: Sequence[dict[str, Any]], small_batch: Sequence[str]) -> list[dict[str, Any]]:
    """Compares every row with the targets that apply to it.

    A ratio meets its target with its median. That ghost is never slower than dense is
    contradicted only by a lower quartile above: where both do the same, half the medians are.
    """
    return [
        {
            "target": target,
            "case": row["case"],
            "m": row["m"],
            "measured": measured,
            "at_most": bound,
            "met": "met" if measured <= bound else "missed",
        }
        for row in rows
        for target, measured, bound in _applicable(row, small_batch)
    ]


def _applicable(
    row: dict[str, Any], small_batch: Sequence[str]
) -> Iterator[tuple[str, float, float]]:
    case, m, found = row["case"], row["m"], row["candidates"]
    target = "dense over floor, batch 64"
    at_most = TARGETS[target]["at_most"].get(str(m))
    ratio = _ratio(found, DENSE, "over_floor")
    if case in TARGETS[target]["cases"] and at_most is not None and ratio is not None:
        yield target, ratio, at_most
    target = "dense over floor, batch 512"
    if case in TARGETS[target]["cases"] and ratio is not None:
        yield target, ratio, TARGETS[target]["at_most"]
    target = "ghost over floor, m = 8, small batch"
    ratio = _ratio(found, GHOST, "over_floor")
    if case in small_batch and m == 8 and ratio is not None:
        yield target, ratio, TARGETS[target]["at_most"]
    target = "ghost over dense"
    ratio = _ratio(found, GHOST, f"over_{DENSE}", "lower_quartile")
    if ratio is not None:
        yield target, ratio, TARGETS[target]["at_most"]
    target = "memory of ghost over weighted sum, small batch"
    if case in small_batch and GHOST in found and "over_weighted_sum" in found[GHOST]["memory"]:
        yield target, found[GHOST]["memory"]["over_weighted_sum"], TARGETS[target]["at_most"]
    target = "cheapest approximation over weighted sum, m = 40"
    ratios = [_ratio(found, name, "over_weighted_sum") for name in APPROXIMATIONS]
    known = [ratio for ratio in ratios if ratio is not None]
    if m == 40 and known:
        yield target, min(known), TARGETS[target]["at_most"]


def _ratio(found: dict[str, Any], name: str, over: str, quantile: str = "median") -> float | None:
    value = found.get(name, {}).get(over, {}).get(quantile)
    return None if value is None else float(value)
