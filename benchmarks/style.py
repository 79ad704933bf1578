"""How the benchmarks' pictures look."""

from __future__ import annotations

from typing import Any

INK, GREY = "#222222", "#767676"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "lines.linewidth": 1.4,
}
