"""Results -> a markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Renders the results as a markdown table."""
    lines = [
        "| case | m | candidate | ms | over floor | quartiles | over weighted sum "
        "| peak, gradients | held, gradients | peak over weighted sum | with state "
        "| page faults | 1 - cos | error of p |",
        "|" + "---|" * 14,
    ]
    for row in rows:
        for name, found in row["candidates"].items():
            memory, over = found["memory"], found.get("over_floor")
            errors = row["errors"].get(name, {}).values()
            cells = [
                row["case"],
                row["m"],
                name,
                f"{1000 * found['seconds']['median']:,.1f}",
                f"{over['median']:.2f}" if over else "",
                f"{over['lower_quartile']:.2f} to {over['upper_quartile']:.2f}" if over else "",
                _number(found.get("over_weighted_sum", {}).get("median"), ".2f"),
                f"{memory['peak_gradients']:.2f}",
                f"{memory['held_gradients']:.2f}",
                _number(memory.get("over_weighted_sum"), ".2f"),
                _number(memory.get("over_weighted_sum_with_state"), ".2f"),
                f"{found['page_faults']:,.0f}",
                *(
                    _number(max((e[key] for e in errors if key in e), default=None), ".0e")
                    for key in ("one_minus_cos", "p_error")
                ),
            ]
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
