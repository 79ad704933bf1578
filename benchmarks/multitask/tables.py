"""Summaries -> tables in Markdown; for the committed results they are also put into the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import filled, markdown_table, write_whole
from benchmarks.multitask import timing
from benchmarks.multitask.analysis import MEASURES
from benchmarks.multitask.data import SETS
from benchmarks.multitask.methods import METHODS
from benchmarks.multitask.study import FOLDER

PAGE = Path(__file__).parents[2] / "docs" / "multitask-results.md"
SHOWN = ("mean rank", "gap", "hypervolume, loss", "hypervolume, error", "distance, loss")
COMPARED = (*SHOWN, "least weight")


def write(folder: Path = FOLDER) -> Path:
    """Writes `<folder>/tables.md`, and the page's tables where the folder is the committed one."""
    found = summaries(folder)
    path = folder / "tables.md"
    write_whole(path, "\n\n".join(f"## {name}\n\n{block}" for name, block in blocks(found)))
    if folder == FOLDER and PAGE.exists():
        write_whole(PAGE, filled(PAGE.read_text(), blocks(found)))
    return path


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    """The summaries that a folder has, and the timing."""
    names = [*(name for name in SETS), "timing"]
    paths = {name: folder / f"{name}_summary.json" for name in names}
    paths["timing"] = folder / timing.FILE
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def blocks(found: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Name and text of every table."""
    sets = {name: found[name] for name in SETS if name in found}
    if sets:
        yield "winners", winners(sets)
        yield "effort", effort(sets)
        yield "equal", equal(sets)
    for name, summary in sets.items():
        yield f"{name} measures", measures(summary)
        yield f"{name} differences to CAGrad-Clip", differences(summary, "raco")
        yield f"{name} differences to the weighted sum", differences(summary, "linear")
        yield f"{name} scores", scores(summary)
    if "timing" in found:
        yield "time", step_times(found["timing"])


def measures(summary: Mapping[str, Any]) -> str:
    """A row a method: measures with their intervals, the best one in bold."""
    rows = []
    for method, row in summary["methods"].items():
        cells = [row["title"]]
        for name in SHOWN:
            text = interval(row[name])
            best = summary["winners"][name]["best"] == method
            cells.append(f"**{text}**" if best else text)
        rows.append(cells)
    return markdown_table(["method", *(_titled(name) for name in SHOWN)], rows)


def differences(summary: Mapping[str, Any], other: str) -> str:
    """A row a method: its measures minus those of another; in bold where 0 is outside."""
    rows = []
    for row in summary["methods"].values():
        against = row["against"].get(other)
        if against:
            cells = [interval(against[name], sign=True) for name in COMPARED]
            for i, name in enumerate(COMPARED):
                if against[name]["low"] > 0 or against[name]["high"] < 0:
                    cells[i] = f"**{cells[i]}**"
            rows.append([row["title"], *cells])
    return markdown_table(
        [f"minus {METHODS[other].title}", *(_titled(name) for name in COMPARED)], rows
    )


def scores(summary: Mapping[str, Any]) -> str:
    """A row a method: test score of every task, mean over weights, and how it trained."""
    rows = [
        [
            row["title"],
            *(interval(row["scores"][task]) for task in summary["tasks"]),
            f"{row['conflicting_steps']:.0%}",
            f"{row['steps']:.0f}",
        ]
        for row in summary["methods"].values()
    ]
    return markdown_table(["method", *summary["tasks"], "steps in conflict", "steps"], rows)


def winners(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Who is best by every measure, and who is not told from it."""
    rows = []
    for name in MEASURES:
        cells = [_titled(name)]
        for summary in sets.values():
            found = summary["winners"][name]
            tied = [METHODS[method].title for method in found["not told apart"]]
            text = f"**{METHODS[found['best']].title}**"
            cells.append(f"{text}; {', '.join(tied)}" if tied else text)
        rows.append(cells)
    return markdown_table(["measure", *sets], rows)


def equal(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Gap of the run at equal weights, used for all weights, minus the gap of a run for each."""
    rows = []
    for method, chosen in METHODS.items():
        cells = [chosen.title]
        for summary in sets.values():
            row = summary["methods"].get(method)
            if row is None:
                cells += ["-", "-"]
                continue
            gain = row["gain of the weights"]
            text = interval(gain, sign=True)
            cells.append(f"{row['gap of the equal run']['value']:.3f}")
            cells.append(f"**{text}**" if gain["low"] > 0 or gain["high"] < 0 else text)
        rows.append(cells)
    head = [f"{name}: {what}" for name in sets for what in ("equal run", "minus own gap")]
    return markdown_table(["method", *head], rows)


def effort(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """What the tuning chose."""
    rows = []
    for method, chosen in METHODS.items():
        values = "-"
        if chosen.values:
            values = f"{chosen.parameter} in {{{', '.join(f'{v:g}' for v in chosen.values)}}}"
        cells = [chosen.title, values]
        for summary in sets.values():
            row = summary["methods"].get(method)
            text = "-" if row is None else f"{row['chosen']['lr']:g}"
            if row and row["chosen"]["parameter"] is not None:
                text += f", {row['chosen']['parameter']:g}"
            cells.append(text)
        rows.append(cells)
    return markdown_table(["method", "own parameter", *(f"{name}: chosen" for name in sets)], rows)


def step_times(found: Mapping[str, Any]) -> str:
    """Medians and quartiles of the time of a step."""
    names = [name for name in SETS if name in found]
    rows = [
        [METHODS[method].title]
        + [
            f"{t['median']:.2f} [{t['lower_quartile']:.2f}, {t['upper_quartile']:.2f}]"
            for t in (found[name][method] for name in names)
        ]
        for method in METHODS
    ]
    return markdown_table(["method", *names], rows)


def _titled(name: str) -> str:
    return f"{name} {'↑' if MEASURES[name] else '↓'}"


def interval(estimate: Mapping[str, float], *, sign: bool = False) -> str:
    """A number with its interval; three decimals, two digits where all are below 0.01."""
    small = max(abs(estimate["low"]), abs(estimate["high"])) < 0.01
    form = ("+" if sign else "") + (".2g" if small else ".3f")
    value, low, high = (f"{estimate[name]:{form}}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
