"""The figures that the docs quote are those of the JSON files that they name."""

import json
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EVIDENCE, ALGORITHM, COST = (
    " ".join((ROOT / "docs" / f"{name}.md").read_text().split())
    for name in ("evidence", "algorithm", "cost")
)
STUDIES = ("small_2", "small_3", "smollm2_2", "smollm2_3")


def load(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def interval(found, digits):
    """A difference with its interval, as the pages write it: bold where it leaves out 0."""
    text = f"{found['value']:+.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


@pytest.mark.parametrize(
    ("row", "measure"),
    [
        ("accuracy, smallest weight", "least accuracy"),
        ("weighted accuracy", "weighted accuracy"),
        ("hypervolume of the accuracies", "hypervolume accuracy"),
    ],
)
def test_differences_to_weighted_dpo(row, measure):
    found = [load(f"alignment_{s}")["methods"]["raco"]["minus"]["linear"] for s in STUDIES]
    assert f"| {row} | {' | '.join(interval(x[measure], 3) for x in found)} |" in EVIDENCE


def test_steps_that_raise_a_loss():
    cells = []
    for study in STUDIES:
        points = load(f"alignment_{study}")["points"]
        raco, linear = (
            statistics.mean(x["hurting_steps"] for x in points if x["method"] == name)
            for name in ("raco", "linear")
        )
        cells.append(f"{100 * raco:.0f} %, not {100 * linear:.0f} %")
    assert f"| steps that raise some loss | {' | '.join(cells)} |" in EVIDENCE


def test_tax():
    two, three = (load(f"alignment_{s}")["methods"] for s in STUDIES[:2])
    for found, name, other in [
        (two, "linear", "single"),
        (two, "raco", "linear"),
        (three, "raco", "linear"),
    ]:
        assert interval(found[name]["minus"][other]["nats per token"], 2) in EVIDENCE


def test_clipping_at_a_large_radius_keeps_the_weights():
    for study, objectives in (("small_2", "two objectives"), ("small_3", "three")):
        [found] = [x for x in load(f"alignment_{study}")["radii"] if x["c"] == 0.9]
        shown = interval(found["raco minus cagrad"]["weighted accuracy"], 3)
        assert f"{shown} with {objectives}" in EVIDENCE


def test_clipping_cannot_turn_a_vertex():
    shares = [
        point["vertex_share"]
        for study in ("small_2", "smollm2_2")
        for point in load(f"alignment_{study}")["points"]
        if point["method"] == "raco" and point["weights"][0] != 0.5
    ]
    assert f"in {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the steps" in EVIDENCE


def test_smaller_radii():
    for c in (0.1, 0.2):
        saved = []
        for rows in load("beyond")["over c"].values():
            if isinstance(rows[0], list):
                lost = {row[1]: row[2] for row in rows if row[0] == "CAGrad-Clip"}
                saved.append(100 * (1 - lost[c] / lost[0.4]))
        assert f"takes away {min(saved):.0f} to {max(saved):.0f} %" in EVIDENCE


def test_differences_to_the_weighted_sum_on_multitask_sets():
    found = [load(f"multitask/{name}_summary") for name in ("digits", "health", "papers")]
    against = [x["methods"]["raco"]["against"]["linear"] for x in found]
    rank = " | ".join(interval(x["mean rank"], 2) for x in against)
    assert f"| mean rank of ten methods | {rank} |" in EVIDENCE
    gap = " | ".join(interval(x["gap"], 3) for x in against)
    assert f"| weighted loss above the best method's | {gap} |" in EVIDENCE
    least = " | ".join(interval(x["least weight"], 3) for x in against)
    assert f"| loss of the task with the smallest weight | {least} |" in EVIDENCE
    winners = [x for one in found for x in one["winners"].values()]
    assert all(x["best"] != "raco" for x in winners)
    tied = sum("raco" in x["not told apart"] for x in winners)
    assert f"in {tied} of {len(winners)} cases" in EVIDENCE


def test_claims_about_c_and_clipping():
    found = load("claims")
    for row in found["radius"]:
        if row["c"] in (0.2, 0.8):
            shown = interval(row["clipped, least weight"], 3)
            assert f"{shown} of loss at c = 0.2" in EVIDENCE or f"{shown} at c = 0.8" in EVIDENCE
        moved = interval(row["clipped, weighted loss"], 3)
        assert (moved[0] == "*") == (row["c"] == 0.8) == (f"{moved} at c = 0.8" in EVIDENCE)
    steps = [x["clipped / CAGrad"]["value"] for x in found["speed"]]
    assert f"{min(steps):.2f} to {max(steps):.2f} on four toy problems" in EVIDENCE
    many = [x for x in found["objectives"] if (x["on"], x["c"]) == ("bowls", 0.8)]
    bowls = [x["clipped / CAGrad"]["value"] for x in many]
    assert f"{min(bowls):.2f} to {max(bowls):.2f} of CAGrad's steps at c = 0.8" in EVIDENCE


def test_claims_about_many_objectives():
    found = load("claims")
    noise = [x for x in found["noise"] if (x["m"], x["batch"]) == (10, 64)]
    mass = [x["variation of p"]["value"] for x in noise]
    assert f"{min(mass):.2f} to {max(mass):.2f} of the mass of p" in EVIDENCE
    left = [
        100 * (1 - row[f"{rule} / weighted"]["value"])
        for row in found["objectives"]
        for rule in ("CAGrad", "clipped")
        if row["on"] == "digits" and row["m"] in (10, 20)
    ]
    assert f"end {min(left):.0f} to {max(left):.0f} % below the weighted sum" in EVIDENCE


def over_floor(case, name, losses):
    rows = {r["m"]: r["candidates"] for r in load("step_cost")["rows"] if r["case"] == case}
    return [rows[m][name]["over_floor"]["median"] for m in losses]


def listed(values):
    *first, last = (f"{x:.2f}" for x in values)
    return f"{', '.join(first)} and {last}"


def test_cost_of_a_step():
    dense = listed(over_floor("mlp-10M", "dense", (2, 4, 8, 40)))
    assert f"takes {dense} times as long as the backward passes" in EVIDENCE
    assert f"takes {listed(over_floor('mlp-10M', 'ghost', (2, 4, 8, 40)))} times" in EVIDENCE
    large = over_floor("mlp-10M-batch-512", "dense", (2, 4, 8))
    assert f"and {min(large):.2f} to {max(large):.2f} times at batch 512" in EVIDENCE
    small = over_floor("mlp-64", "dense", (2, 4, 8, 40)) + over_floor("mlp-256", "dense", (2, 4, 8))
    assert f"it takes {min(small):.1f} to {max(small):.1f} times as long" in EVIDENCE


def test_cost_of_a_step_of_the_trainer():
    results = load("alignment_cost")["results"]
    lora = [x["raco"]["over_trl"]["median"] for model in results.values() for x in model.values()]
    assert f"takes {min(lora):.2f} to {max(lora):.2f} times as long as a step of TRL" in EVIDENCE
    cases = load("one_pass")["cases"]
    two, four = (x["one / TRL"]["median"] for x in cases if "one / TRL" in x)
    shown = f"takes {two:.2f} times as long with two objectives and {four:.2f} with four"
    assert shown in EVIDENCE
    passes = [x["one / passes"]["median"] for x in cases if x["model"] == "wide layers"]
    assert f"takes {listed(passes)} times as long as m passes" in COST


@pytest.mark.parametrize("m", [2, 3, 10, 40])
def test_speed_of_the_solver(m):
    results = load("solver_speed")
    found = {x["family"]: x["candidates"] for x in results["rows"] if x["m"] == m}
    exact = [found[name]["exact"] for name in ("random", "all_conflicting")]
    mixing = [found[name]["coefficients"] for name in ("random", "all_conflicting")]
    time = exact[0]["microseconds"]

    def times(rows, key="times_faster_than_torchjd"):
        return " / ".join(f"{x[key]:.0f}" for x in rows)

    targets = results["targets_times_faster"]
    quartiles = f"({time['lower_quartile']:.0f} to {time['upper_quartile']:.0f})"
    row = [
        f"{m}",
        f"{time['median']:.0f} {quartiles}",
        times(exact),
        f"{targets['in_a_loop'][str(m)]}",
        times(exact, "times_faster_than_torchjd_cold"),
        f"{targets['one_call'][str(m)]}",
        times(mixing),
        f"{found['random']['torchjd']['largest_error']:.0e}",
    ]
    assert f"| {' | '.join(row)} |" in ALGORITHM
    assert f"{time['median']:.0f}" in EVIDENCE


def test_solvers_that_were_tried_on_many_matrices():
    solvers = load("fuzz_subproblem")["solvers"]
    assert all(found["failures"] == 0 for found in solvers.values())
    assert f"checks {solvers['exact']['grams']:,} Gram matrices" in ALGORITHM
    assert f"In {solvers['exact']['unproved']} (" in ALGORITHM
    few = [solvers[name] for name in ("pgd", "slsqp")]
    assert f"on {few[0]['grams']:,} each" in ALGORITHM
    assert f"{few[0]['unproved']} and {few[1]['unproved']} of their gaps" in ALGORITHM


QM9_ROWS = {
    "equal gradient lengths": "unit",
    "CAGrad-Clip, c = 0.1": "clip-0.1",
    "CAGrad-Clip, c = 0.4": "clip-0.4",
    "CAGrad-Clip, c = 0.9": "clip-0.9",
    "MGDA": "mgda",
    "PCGrad": "pcgrad",
    "UPGrad": "upgrad",
}


def delta_m(row):
    d = row["delta_m"]
    assert d["n"] == 5
    return f"{d['value']:.1f} [{d['low']:.1f}, {d['high']:.1f}]"


def test_qm9_table():
    rows = load("qm9")["mlp"]
    names = {"weighted sum, one pass": ("equal", "log")}
    names |= {title: (name, f"{name}-log") for title, name in QM9_ROWS.items()}
    for title, (plain, logs) in names.items():
        assert f"| {title} | {delta_m(rows[plain])} | {delta_m(rows[logs])} |" in EVIDENCE
    others = [x["delta_m"]["value"] for name, x in rows.items() if name != "log"]
    assert rows["log"]["delta_m"]["value"] < min(others)


def test_qm9_absent_losses():
    source, random = (load("qm9")["sparse"][kind] for kind in ("source", "random"))
    shown = [interval(source[name]["gain"], 0) for name in ("clip-0.4", "mgda", "imtlg")]
    assert "{} points with CAGrad-Clip, {} with MGDA, {} with IMTL-G".format(*shown) in EVIDENCE
    logarithms = interval(source["clip-0.4-log"]["over_sum_of_logarithms"], 0)
    assert f"the logarithms beats their sum by {logarithms}" in EVIDENCE
    log, equal = (random[name]["left_out"]["value"] for name in ("log", "equal"))
    assert f"Δm is {log:,.0f}, with equal weights {equal:.0f}" in EVIDENCE


def test_qm9_second_network():
    rows = load("qm9")["schnet"]
    names = "equal", "log", "clip-0.4", "clip-0.4-log"
    assert all(rows[name]["delta_m"]["n"] == 2 for name in names)
    equal, log, clip, clip_log = (f"{rows[name]['delta_m']['value']:.1f}" for name in names)
    assert f"{equal} with equal weights, {log} with the sum of logarithms" in EVIDENCE
    assert f"with CAGrad-Clip {clip}, or {clip_log} on logarithms" in EVIDENCE
