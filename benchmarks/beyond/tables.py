"""Records -> `summary.json`, and the tables of docs/beyond.md."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.beyond import analysis, fronts, study
from benchmarks.beyond.candidates import BASELINES, CANDIDATES, COMPARED_NAMES, RADII, TITLES
from benchmarks.harness import environment, filled, markdown_table, write_whole
from benchmarks.multitask.data import SETS

PAGE = Path(__file__).parents[2] / "docs" / "beyond.md"
FILE = "summary.json"
Summary = Mapping[str, Any]
OTHERS = tuple(name for name in COMPARED_NAMES if name != "raco")
CERTAIN = "**{}**"


def summarise(folder: Path = study.FOLDER) -> dict[str, Any]:
    """Everything that the page's tables say, from the records that there are."""
    tasks: dict[str, Any] = {}
    for name in SETS:
        tasks[name] = analysis.of_set(study.set_records(name, folder))
    for size, m in itertools.product(study.MODEL_SEEDS, (2, 3)):
        if (folder / f"{size}_{m}.jsonl").exists():
            tasks[f"{size}_{m}"] = analysis.of_model(study.model_records(size, m, folder))
    found = {
        "level": analysis.LEVEL,
        "tasks": tasks,
        "chosen": study.chosen(folder),
        "fronts": fronts.summarise(folder),
        "radii": fronts.radii(folder),
        "smaller radii": fronts.smaller_radii(folder),
        "trust": json.loads((folder / "trust.json").read_text())["rows"],
        "many": _many(json.loads((folder / "many.json").read_text())["rows"]),
        "toys": _toys(json.loads((folder / "toys.json").read_text())["rows"]),
        "cost": json.loads((folder / "cost.json").read_text())["rows"],
    }
    return {**_rounded(found), "environment": environment(packages=["torchjd", "aclsum"])}


def write(folder: Path = study.FOLDER) -> Path:
    """Writes the summary and, if it is the committed folder's, fills the page."""
    path = folder / FILE
    found = summarise(folder)
    write_whole(path, json.dumps(found, indent=1) + "\n")
    if folder == study.FOLDER and PAGE.exists():
        write_whole(PAGE, filled(PAGE.read_text(), blocks(found)))
    return path


def task_title(name: str) -> str:
    """A task's name for people."""
    size, _, m = name.partition("_")
    model = "SmolLM2" if size == "smollm2" else "small model"
    return f"{model}, {m} objectives" if m else name


def blocks(found: Summary) -> Iterator[tuple[str, str]]:
    """Name and text of every table."""
    for measure in analysis.MEASURES:
        yield measure, differences(found["tasks"], measure, "raco")
    yield "deviation from the weighted sum", differences(found["tasks"], "deviation", "linear")
    yield (
        "least weight from the weighted sum",
        differences(found["tasks"], "least weight", "linear"),
    )
    yield "hurting from the weighted sum", differences(found["tasks"], "hurting", "linear")
    yield "values", values(found["tasks"])
    yield "verdicts", verdicts(found["tasks"], found["cost"])
    yield "steps", steps(found["tasks"])
    yield "chosen", chosen(found["chosen"])
    yield "fronts", front_table(found["fronts"])
    yield "smaller radii", smaller_table(found["smaller radii"])
    yield "radii", radius_table(found["radii"])
    yield "trust", trust_table(found["trust"])
    yield "many", many_table(found["many"])
    yield "toys", toy_table(found["toys"])
    yield "cost", cost_table(found["cost"])


def differences(tasks: Summary, measure: str, other: str) -> str:
    """Method minus the other on every task, with corrected intervals."""
    shown = [name for name in COMPARED_NAMES if name != other]
    columns = [t for t, task in tasks.items() if measure in task["methods"]["raco"]["measures"]]
    rows = []
    for method in shown:
        cells = [TITLES[method]]
        for task in columns:
            row = tasks[task]["methods"].get(method)
            cells.append("-" if row is None else _cell(row["against"][other][measure]))
        rows.append(cells)
    return markdown_table(["", *map(task_title, columns)], rows)


def values(tasks: Summary) -> str:
    """CAGrad-Clip's own values, to which the differences relate."""
    rows = []
    for method in ("linear", "raco"):
        for measure in analysis.MEASURES:
            cells = [f"{TITLES[method]}: {measure}"]
            for task in tasks.values():
                found = task["methods"][method]["measures"].get(measure)
                cells.append("-" if found is None else _number(found["value"]))
            rows.append(cells)
    return markdown_table(["", *map(task_title, tasks)], rows)


def verdicts(tasks: Summary, cost: Summary) -> str:
    """Where a method reaches the target and where it is told worse, and what it costs."""
    rows = []
    for method in OTHERS:
        reached, worse = [], []
        for name, task in tasks.items():
            row = task["methods"].get(method)
            if row is None:
                continue
            how = [
                x.removeprefix("by ") for x in ("by distance", "by deviation") if row["reaches"][x]
            ]
            if how:
                reached.append(f"{task_title(name)} ({', '.join(how)})")
            if row["reaches"]["told worse"]:
                worse.append(task_title(name))
        extra = [f"{case[method]['median'] - 1:+.1%}" for case in cost.values() if method in case]
        rows.append(
            [
                TITLES[method],
                "; ".join(reached) or "none",
                "; ".join(worse) or "none",
                ", ".join(extra) or "-",
            ]
        )
    head = ["", "reaches the target on", "worse than CAGrad-Clip on", "extra time of a step"]
    return markdown_table(head, rows, text=3)


def steps(tasks: Summary) -> str:
    """Steps to nine tenths of CAGrad-Clip's progress, over CAGrad-Clip's."""
    columns = [t for t in tasks if not t.startswith("smollm2")]
    rows = []
    for method in OTHERS:
        cells = [TITLES[method]]
        for task in columns:
            found = tasks[task]["methods"][method]["steps"]
            text = f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
            certain = found["low"] > 1 or found["high"] < 1
            cells.append(CERTAIN.format(text) if certain else text)
        rows.append(cells)
    return markdown_table(["", *map(task_title, columns)], rows)


def chosen(found: Summary) -> str:
    """What tuning chose."""
    rows = []
    for method in COMPARED_NAMES:
        cells = [TITLES[method]]
        for setting in found.values():
            lr, c = setting[method]["lr"], setting[method]["c"]
            cells.append(f"{lr:g}" + ("" if c is None else f", {c:g}"))
        rows.append(cells)
    return markdown_table(["learning rate, c", *found], rows)


def front_table(found: Summary) -> str:
    """How much lower than the weighted sum's curve the points of a method lie."""
    rows = []
    for method in (*BASELINES[1:], *CANDIDATES):
        rows.append([TITLES[method], *(_cell(found[task][method]) for task in found)])
    return markdown_table(["", *map(task_title, found)], rows)


def smaller_table(found: Summary) -> str:
    """CAGrad-Clip with smaller c, minus itself at the c of the study."""
    measures = ("deviation", "hypervolume", "least weight", "hurting")
    rows = []
    for task, by_radius in found.items():
        for c, row in by_radius.items():
            cells = [task_title(task), c, *(_cell(row["against"][name]) for name in measures)]
            reached = row["reaches"]["by distance"] or row["reaches"]["by deviation"]
            rows.append([*cells, "yes" if reached else "no"])
    return markdown_table(["", "c", *measures, "reaches the target"], rows)


def radius_table(found: Summary) -> str:
    """What the methods pay in weighted loss for the steps that they save from hurting."""
    keys = list(dict.fromkeys((row["method"], row["c"]) for rows in found.values() for row in rows))
    keys.sort(key=lambda key: (COMPARED_NAMES.index(key[0]), key[1]))
    rows = []
    for key in keys:
        cells = [TITLES[key[0]], f"{key[1]:g}" if key[1] else "-"]
        for task in found.values():
            row = next((r for r in task if (r["method"], r["c"]) == key), None)
            cells += (
                ["-"] * 3
                if row is None
                else [
                    f"{row['excess']:+.4f}",
                    f"{row['hurting']:.0%}",
                    f"{row['least weight']:.3f}",
                ]
            )
        rows.append(cells)
    head = ["method", "c"]
    for task in found:
        head += [f"{task_title(task)}: weighted loss", "hurting", "least weight"]
    return markdown_table(head, rows)


def trust_table(found: Summary) -> str:
    """Noise between batches over the decrease of a step, and the cost of a second forward pass."""
    rows = [
        [
            name,
            f"{np.mean(row['noise']):.1f} ({min(row['noise']):.1f} to {max(row['noise']):.1f})",
            f"{row['cost']['median'] - 1:+.0%}",
        ]
        for name, row in found.items()
    ]
    return markdown_table(["", "noise / decrease, five seeds", "second forward pass"], rows)


def many_table(found: Sequence[Summary]) -> str:
    """Weighted test loss over CAGrad-Clip's, and hurting steps, with 5 and 10 losses."""
    cases = list(dict.fromkeys((row["m"], row["weights"], row["c"]) for row in found))
    rows = []
    for method in COMPARED_NAMES:
        cells = [TITLES[method]]
        for case in cases:
            row = next(
                r for r in found if (r["m"], r["weights"], r["c"], r["method"]) == (*case, method)
            )
            hurting = f"{row['hurting']:.0%}"
            cells.append(hurting if method == "raco" else f"{_ratio(row)}; {hurting}")
        rows.append(cells)
    return markdown_table(["", *(f"m = {m}, {kind}, c = {c:g}" for m, kind, c in cases)], rows)


def toy_table(found: Sequence[Summary]) -> str:
    """Medians over starts and weights."""
    rows = []
    for problem in dict.fromkeys(row["problem"] for row in found):
        here = [row for row in found if row["problem"] == problem]
        for method in COMPARED_NAMES:
            mine = {(row["noise"], row["c"]): row for row in here if row["method"] == method}
            if not mine:
                continue
            cells = [problem, TITLES[method]]
            for c in RADII:
                still = mine.get((0.0, c), mine.get((0.0, 0.0)))
                noisy = mine.get((0.3, c), mine.get((0.3, 0.0)))
                cells += [
                    _steps(still),
                    *(_of(row, "deviation") for row in (still, noisy)),
                ]
            rows.append(cells)
    head = ["problem", "method"]
    for c in RADII:
        head += [f"c = {c:g}: steps", "deviation", "with noise"]
    return markdown_table(head, rows, text=2)


def cost_table(found: Summary) -> str:
    """Seconds of a step over those of CAGrad-Clip's: median and quartiles."""
    rows = [
        [
            TITLES[method],
            *(
                f"{row[method]['median']:.3f} [{row[method]['lower_quartile']:.3f}, "
                f"{row[method]['upper_quartile']:.3f}]"
                for row in found.values()
            ),
        ]
        for method in CANDIDATES
    ]
    return markdown_table(["", *found], rows)


def _many(rows: Sequence[Summary]) -> list[dict[str, Any]]:
    """Log ratio of the weighted test loss to CAGrad-Clip's, mean over seeds, corrected interval."""
    at = {(r["m"], r["weights"], r["rule"], r["c"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    draws = np.random.default_rng(0).multinomial(
        len(seeds), [1 / len(seeds)] * len(seeds), analysis.REPLICATES["set"]
    )
    found = []
    for m, kind in dict.fromkeys((r["m"], r["weights"]) for r in rows):
        for method in COMPARED_NAMES:
            for c in RADII:
                own = 0.0 if method == "linear" else c
                mine = [at[m, kind, method, own, s] for s in seeds]
                base = [at[m, kind, "raco", c, s] for s in seeds]
                logs = np.array(
                    [np.log(a["weighted"] / b["weighted"]) for a, b in zip(mine, base, strict=True)]
                )
                drawn = np.concatenate([[logs.mean()], draws @ logs / len(seeds)])
                ratio = analysis.interval(np.exp(drawn), analysis.LEVEL)
                hurting = float(np.mean([row["hurting"] for row in mine]))
                names = {"m": m, "weights": kind, "method": method, "c": c}
                found.append({**names, **ratio, "hurting": hurting})
    return found


def _toys(rows: Sequence[Summary]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        kept = {name: row[name] for name in ("problem", "noise", "method", "c")}
        for name in ("steps", "distance", "deviation"):
            if name in row:
                known = [np.inf if x is None else x for x in row[name]]
                median = float(np.median(known))
                kept[name] = median if np.isfinite(median) else None
        found.append(kept)
    return found


def _cell(row: Mapping[str, float]) -> str:
    text = f"{_number(row['value'], '+')} [{_number(row['low'], '+')}, {_number(row['high'], '+')}]"
    return CERTAIN.format(text) if row["low"] > 0 or row["high"] < 0 else text


def _ratio(row: Mapping[str, float]) -> str:
    text = f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    return CERTAIN.format(text) if row["low"] > 1 or row["high"] < 1 else text


def _number(x: float, sign: str = "") -> str:
    return f"{x:{sign}.3f}" if abs(x) >= 0.0095 or x == 0 else f"{x:{sign}.1g}"


def _steps(row: Mapping[str, Any]) -> str:
    if "steps" not in row:
        return "-"
    return "never" if row["steps"] is None else f"{row['steps']:.0f}"


def _of(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.1e}" if name in row else "-"


def _rounded(value: Any) -> Any:  # noqa: ANN401  # what JSON can hold
    if isinstance(value, dict):
        return {name: _rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
