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
# Okabe and Ito's colours, which differ for any colour vision; markers differ in print without
# colour. The sizes let methods show that end up in the same place.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"color": "#0072B2", "marker": "o", "markersize": 6},
    "cagrad": {"color": "#E69F00", "marker": "s", "markersize": 9, "markerfacecolor": "white"},
    "raco": {"color": "#009E73", "marker": "D", "markersize": 4.5},
    "mgda": {"color": "#CC79A7", "marker": "^", "markersize": 7},
}
