"""Results of the claims -> tables in Markdown, put into docs/claims.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alignment.analysis import Estimate, steps_to_reach
from benchmarks.harness import RESULTS, filled, markdown_table, write_whole
from benchmarks.multitask.analysis import REPLICATES, Array
from benchmarks.multitask.data import SETS
from benchmarks.multitask.methods import METHODS
from benchmarks.multitask.study import FOLDER
from benchmarks.multitask.tables import interval, summaries

PAGE = Path(__file__).parents[2] / "docs" / "claims.md"
TITLES = {
    **{name: method.title for name, method in METHODS.items()},
    "soft": "CAGrad-Clip, soft",
}
Rows = Sequence[Mapping[str, Any]]


def fill_page() -> None:
    """Writes the tables of the committed results into the page, if there is one."""
    if PAGE.exists():
        write_whole(PAGE, claims_filled())


def claims_filled() -> str:
    """The page with the text between `<!-- table NAME -->` and `<!-- end -->` made anew."""
    page = PAGE.read_text()
    found = json.loads((RESULTS / "claims.json").read_text())
    return filled(page, blocks(found, summaries(FOLDER)))


def blocks(found: Mapping[str, Rows], sets: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of every table that there are results for."""
    if all(name in sets for name in SETS):
        yield "sets", real_sets(sets)
    made = {
        "speed": speed,
        "radius": radius,
        "objectives": objectives,
        "noise toys": noise_of_toys,
        "noise digits": noise_of_batches,
    }
    for name, make in made.items():
        if name == "speed" and name in found:
            yield name, make(found[name], found.get("longer", ()))
        elif name.split()[0] in found:
            yield name, make(found[name.split()[0]])
    if "radius" in found:
        yield "speed digits", speed_on_digits(found["radius"])


def over_units(values: Array) -> Estimate:
    """Mean over units (starts or seeds) with a bootstrap interval."""
    count = len(values)
    draws = np.random.default_rng(0).multinomial(count, [1 / count] * count, REPLICATES) / count
    return Estimate.of(np.concatenate([[values.mean()], draws @ values]))


def shown(estimate: Estimate, *, sign: bool = True) -> str:
    """A number with its interval; a difference is bold where 0 is outside."""
    text = interval(vars(estimate), sign=sign)
    return f"**{text}**" if sign and (estimate.low > 0 or estimate.high < 0) else text


def real_sets(sets: Mapping[str, Any]) -> str:
    """CAGrad-Clip minus CAGrad, the weighted sum and MGDA on the three real sets."""
    names = ("distance, loss", "distance, error", "gap", "hypervolume, loss", "mean rank")
    rows = []
    for name in SETS:
        for other in ("cagrad", "linear", "mgda"):
            against = sets[name]["methods"][other]["against"]["raco"]
            flipped = [
                Estimate(-row["value"], -row["high"], -row["low"])
                for row in (against[measure] for measure in names)
            ]
            rows.append([f"{name}: minus {TITLES[other]}", *map(shown, flipped)])
    return markdown_table(["CAGrad-Clip", *(_arrow(name) for name in names)], rows)


def _arrow(name: str) -> str:
    return f"{name} {'↑' if name.startswith('hyper') else '↓'}"


def _ratio(logs: Array) -> str:
    """Geometric mean over units of a ratio, bold where 1 is outside."""
    found = over_units(logs)
    low, value, high = (np.exp(x) for x in (found.low, found.value, found.high))
    text = f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return f"**{text}**" if low > 1 or high < 1 else text


def speed(rows: Rows, longer: Rows) -> str:
    """Ratios of the steps to 1 % of the start's distance to the front."""
    cells = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        here = {(row["rule"], row["c"]): row for row in rows if row["problem"] == problem}
        units = here["linear", 0.0]["units"]

        def of(name: str, c: float, here: Mapping = here) -> Array:
            return _steps([here[name, c]])

        for c in (0.4, 0.8):
            linear, cagrad, raco = of("linear", 0.0), of("cagrad", c), of("raco", c)
            long = _steps(r for r in longer if (r["problem"], r["c"]) == (problem, c))
            turned = np.mean(here["raco", c]["clip_changed"])
            cells.append(
                [
                    f"{problem}, c = {c:g}",
                    *(
                        _compared(x, y, units)
                        for x, y in ((raco, cagrad), (cagrad, linear), (raco, linear))
                    ),
                    _compared(raco, long, units) if len(long) else "-",
                    f"{turned:.0%}",
                    "/".join(str(int(np.isnan(x).sum())) for x in (linear, cagrad, raco))
                    + f" of {len(linear)}",
                ]
            )
    head = ["steps", "Clip / CAGrad", "CAGrad / weighted", "Clip / weighted"]
    head += ["Clip / weighted with (1 + c) lr", "clipping turns"]
    return markdown_table([*head, "never there (weighted/CAGrad/Clip)"], cells)


def _steps(rows: Iterable[Mapping[str, Any]]) -> Array:
    values = [np.nan if x is None else x for row in rows for x in row["steps"]]
    return np.array(values, dtype=float)


def _compared(x: Array, y: Array, units: int) -> str:
    logs = np.log(x / y).reshape(units, -1)
    kept = np.isfinite(logs).any(1)
    if not kept.any():
        return "-"
    return _ratio(np.nanmean(logs[kept], axis=1))


def speed_on_digits(rows: Rows) -> str:
    """Ratio of the steps to nine tenths of CAGrad's progress in the validation loss."""
    cells = []
    for c in sorted({row["c"] for row in rows if row["c"]}):
        logs: dict[str, list[float]] = {"raco": [], "linear": []}
        for seed in dict.fromkeys(row["seed"] for row in rows):
            curves = {
                row["rule"]: [(20 * i, x) for i, x in enumerate(_falling(row["curve"]))]
                for row in rows
                if row["seed"] == seed and row["c"] in (c, 0.0)
            }
            steps = steps_to_reach(curves)
            for name, values in logs.items():
                values.append(np.log(steps[name] / steps["cagrad"]))
        cells.append([f"{c:g}"])
        for values in logs.values():
            finite = np.array([x for x in values if np.isfinite(x)])
            missing = len(values) - len(finite)
            text = _ratio(finite) if len(finite) else "-"
            cells[-1].append(text + (f" ({missing} never there)" if missing else ""))
    return markdown_table(["c", "Clip / CAGrad", "weighted / CAGrad"], cells)


def _falling(curve: Sequence[float]) -> Array:
    """The best value so far: what early stopping keeps."""
    return np.minimum.accumulate(curve)


def radius(rows: Rows) -> str:
    """Test losses at every c minus those of the weighted sum."""
    base = {row["seed"]: row for row in rows if row["rule"] == "linear"}
    cells = []
    for c in sorted({row["c"] for row in rows if row["c"]}):
        line = [f"{c:g}"]
        for measure in (lambda r: r["weighted"], lambda r: r["losses"][0]):
            for name in ("cagrad", "raco", "soft"):
                here = [r for r in rows if r["rule"] == name and r["c"] == c]
                line.append(
                    shown(
                        over_units(np.array([measure(r) - measure(base[r["seed"]]) for r in here]))
                    )
                )
        cells.append(line)
    names = ("CAGrad", "Clip", "soft")
    return markdown_table(
        ["c", *(f"weighted loss, {n}" for n in names), *(f"least weight, {n}" for n in names)],
        cells,
    )


def objectives(rows: Rows) -> str:
    """Weighted loss (bowls: what is left of it) for many losses, per rule, and what p is like."""
    cells = []
    for on, key in (("quadratics", "steps"), ("digits", "weighted")):
        for m in (5, 10, 20):
            for kind in ("equal", "half on one"):
                here = [r for r in rows if (r["on"], r["m"], r["weights"]) == (on, m, kind)]
                for c in (0.4, 0.8):
                    cells.append(
                        [f"{on}, m = {m}, {kind}, c = {c:g}", *_versus(here, key, c), *_p(here, c)]
                    )
    head = ["", "CAGrad / weighted", "Clip / weighted", "soft / weighted", "Clip / CAGrad"]
    return markdown_table(
        [*head, "losses in p", "clip angle", "hurting: weighted, CAGrad, Clip"], cells
    )


def _versus(rows: Rows, key: str, c: float) -> list[str]:
    def of(name: str) -> Array:
        radius_ = 0.0 if name == "linear" else c
        found = [r[key] for r in rows if r["rule"] == name and r["c"] == radius_]
        return np.log(np.array([np.nan if x is None else x for x in found], dtype=float))

    pairs = (("cagrad", "linear"), ("raco", "linear"), ("soft", "linear"), ("raco", "cagrad"))
    found = []
    for x, y in pairs:
        logs = of(x) - of(y)
        missing = int(np.isnan(logs).sum())
        text = _ratio(logs[~np.isnan(logs)]) if missing < len(logs) else "-"
        found.append(text + (f" ({missing} never there)" if missing else ""))
    return found


def _p(rows: Rows, c: float) -> list[str]:
    def mean(name: str, key: str) -> float:
        radius_ = 0.0 if name == "linear" else c
        found = [r.get(key) for r in rows if r["rule"] == name and r["c"] == radius_]
        return float(np.mean([x for x in found if x is not None]))

    if "active" not in rows[0]:
        return ["-", "-", "-"]
    hurting = ", ".join(f"{mean(name, 'hurting'):.0%}" for name in ("linear", "cagrad", "raco"))
    return [f"{mean('raco', 'active'):.1f}", f"{mean('raco', 'clip_angle'):.2f}", hurting]


def noise_of_toys(rows: Rows) -> str:
    """What is left of the weighted loss, mean over the last 100 of 400 steps, in thousandths."""
    cells = []
    toys = [row for row in rows if row["on"] != "digits"]
    for on in dict.fromkeys(row["on"] for row in toys):
        for size in dict.fromkeys(row["noise"] for row in toys):
            here = {
                (r["rule"], r["c"]): 1000 * np.array(r["excess"]).reshape(-1, 3).mean(1)
                for r in toys
                if (r["on"], r["noise"]) == (on, size)
            }
            line = [f"{on}, noise {size:g}", shown(over_units(here["linear", 0.0]), sign=False)]
            for c in (0.4, 0.8):
                line.append(shown(over_units(here["cagrad", c] - here["linear", 0.0])))
                line.append(shown(over_units(here["raco", c] - here["cagrad", c])))
            cells.append(line)
    head = ["", "weighted sum"]
    for c in (0.4, 0.8):
        head += [f"CAGrad - weighted, c = {c:g}", f"Clip - CAGrad, c = {c:g}"]
    return markdown_table(head, cells)


def noise_of_batches(rows: Rows) -> str:
    """p and the update from a batch against those from all training data."""
    cells = []
    digits = [row for row in rows if row["on"] == "digits"]
    for m in dict.fromkeys(row["m"] for row in digits):
        for c in (0.4, 0.8):
            for size in dict.fromkeys(row["batch"] for row in digits):
                here = [r for r in digits if (r["m"], r["c"], r["batch"]) == (m, c, size)]
                plain, clipped = (
                    [r for r in here if r["rule"] == name] for name in ("cagrad", "raco")
                )
                angle = _by_seed(clipped, "angle") - _by_seed(plain, "angle")
                cells.append(
                    [
                        f"m = {m}, c = {c:g}, batch {size}",
                        *(
                            shown(over_units(_by_seed(plain, key)), sign=False)
                            for key in ("variation", "bias")
                        ),
                        f"{np.mean([r['vertex'] for r in plain]):.0%} "
                        f"({np.mean([r['vertex_exact'] for r in plain]):.0%})",
                        shown(over_units(_by_seed(plain, "angle")), sign=False),
                        shown(over_units(angle)),
                    ]
                )
    head = ["", "variation of p", "bias of p", "p at a vertex (all data)", "angle, CAGrad"]
    return markdown_table([*head, "angle, Clip - CAGrad"], cells)


def _by_seed(rows: Rows, key: str) -> Array:
    seeds = dict.fromkeys(row["seed"] for row in rows)
    mean: Callable[[int], float] = lambda s: np.mean([r[key] for r in rows if r["seed"] == s])  # noqa: E731
    return np.array([mean(seed) for seed in seeds])
