"""The grid file: complete after any kill, refused if it is another's, and never run twice."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
import torch

from raco_optim.cli.errors import UsageError
from raco_optim.cli.files import held
from raco_optim.cli.grid import Point, grid_points, read_records, run_grid
from raco_optim.cli.records import append

SETTINGS = {"model": "tiny", "steps": 3}
POINTS = grid_points(["raco", "linear"], [{"a": 0.25, "b": 0.75}], seeds=[0, 1])


class Runs:
    """A run that costs nothing and remembers what it was called for."""

    def __init__(self):
        self.points = []

    def __call__(self, point):
        self.points.append(point)
        scores = {"loss": point.seed + point.weights["a"], "margin": 0.0, "accuracy": 1.0}
        return {"evaluation": {"a": {**scores, "labelled": 4}}, "training": {"seconds": 0.1}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


# Points


def test_grid_is_methods_times_weights_times_seeds_times_radii():
    weights = [{"a": 0.8, "b": 0.2}, {"a": 0.5, "b": 0.5}]
    points = grid_points(["raco", "linear", "mgda"], weights, [0, 1], [0.1, 0.4])
    # A radius concerns raco alone, weights don't concern mgda: 2 * (2 * 2 + 2 + 1).
    assert len(points) == 14
    assert {p.c for p in points if p.method == "raco"} == {0.1, 0.4}
    assert {p.c for p in points if p.method != "raco"} == {None}
    assert [dict(p.weights) for p in points if p.method == "mgda"] == [{"a": 0.5, "b": 0.5}] * 2
    assert [p.seed for p in points] == [0] * 7 + [1] * 7


# Records


def test_record_has_point_settings_result_and_environment(path):
    frozen = Point("raco", MappingProxyType({"a": 1.0}), seed=3, c=0.4)
    (record,) = run_grid(path, [frozen], SETTINGS, Runs())
    assert record["point"] == {"method": "raco", "weights": {"a": 1.0}, "seed": 3, "c": 0.4}
    assert record["settings"] == SETTINGS
    assert record["evaluation"] == {
        "a": {"loss": 4.0, "margin": 0.0, "accuracy": 1.0, "labelled": 4}
    }
    assert record["training"] == {"seconds": 0.1}
    assert record["extra"] == {}
    assert record["environment"]["python"].startswith("3.")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [record]
    assert read_records(path) == [record]


def test_values_become_json(path):
    """NumPy's and torch's scalars become numbers; a NaN or an infinity becomes null."""

    def run(point):
        scores = {
            "loss": torch.tensor(0.5, requires_grad=True),
            "margin": np.float32(0.25),
            "accuracy": np.array(1.0),
            "labelled": np.int64(4),
            "nan": float("nan"),
        }
        extra = {"curve": np.arange(3), "flag": np.bool_(True), "nan": torch.tensor(float("nan"))}
        training = {"seconds": Fraction(1, 2), "x": [float("inf")]}
        return {"evaluation": {"a": scores}, "training": training, "extra": extra}

    settings = SETTINGS | {"steps": np.int32(3), "radius": float("inf")}
    (record,) = run_grid(path, POINTS[:1], settings, run)
    scores = {"loss": 0.5, "margin": 0.25, "accuracy": 1.0, "labelled": 4, "nan": None}
    assert record["evaluation"]["a"] == scores
    assert record["training"] == {"seconds": 0.5, "x": [None]}
    assert record["extra"] == {"curve": [0, 1, 2], "flag": True, "nan": None}
    assert "NaN" not in path.read_text()
    assert read_records(path) == [record]
    same = SETTINGS | {"radius": float("inf")}
    assert run_grid(path, POINTS[:1], same, Runs()) == [record], "the settings are the same"


def test_what_json_cannot_hold_is_refused_before_a_run_and_kept_as_text_after_it(path, capsys):
    for points, settings in (
        (POINTS[:1], {"model": object()}),
        ([Point("linear", {"a": 1.0}, seed={1})], SETTINGS),
    ):
        runs = Runs()
        with pytest.raises(ValueError, match="must be a JSON value"):
            run_grid(path, points, settings, runs)
        assert runs.points == []
    assert not path.exists()
    (record,) = run_grid(
        path, POINTS[:1], SETTINGS, lambda point: Runs()(point) | {"extra": {"x": {1, 2}}}
    )
    assert record["extra"] == {"x": "{1, 2}"}
    assert "result['extra']['x'] is a set, which JSON can't hold" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_nan_in_a_record_is_refused(path, value):
    """Neither written, where a caller forgot `plain`, nor read, where another program wrote it."""
    run_grid(path, POINTS[:1], SETTINGS, Runs())
    before = path.read_bytes()
    record = read_records(path)[0] | {"training": {"seconds": [value]}}
    with pytest.raises(ValueError):
        append(path, record)
    assert path.read_bytes() == before
    for content in (json.dumps(record) + "\n", json.dumps(record)):  # the last line, too
        path.write_text(content)
        message = refusal(path)
        assert "line 1, is not JSON" in message and "a number must be finite" in message


def test_a_record_is_on_the_disk_before_the_next_run_starts(path, monkeypatch):
    synced = b""

    def fsync(descriptor):
        nonlocal synced
        assert os.path.samestat(os.fstat(descriptor), path.stat())
        synced = path.read_bytes()  # all of it has left the process

    monkeypatch.setattr(os, "fsync", fsync)
    runs, seen = Runs(), []

    def run(point):
        seen.append(len(synced.splitlines()))
        return runs(point)

    run_grid(path, POINTS, SETTINGS, run)
    assert seen == [0, 1, 2, 3]
    assert synced == path.read_bytes()


def test_a_full_disk_takes_nothing_of_a_record(path):
    run_grid(path, POINTS[:1], SETTINGS, Runs())
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))
        with pytest.raises(OSError, match="must be a writable file; got .*File too"):
            append(path, json.loads(before))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_only_what_is_missing_runs_and_all_records_come_back_in_order(path):
    first, second = Runs(), Runs()
    run_grid(path, [POINTS[2]], SETTINGS, first)
    records = run_grid(path, POINTS, SETTINGS, second)
    assert second.points == [POINTS[0], POINTS[1], POINTS[3]]
    assert [r["point"]["method"] for r in records] == [p.method for p in POINTS]
    assert [r["point"]["seed"] for r in records] == [p.seed for p in POINTS]
    assert run_grid(path, POINTS, SETTINGS, second) == records
    assert len(second.points) == 3


def test_order_of_the_objectives_is_no_difference(path):
    runs = Runs()
    for weights in ({"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5}):
        run_grid(path, [Point("linear", weights, 0)], SETTINGS, runs)
    assert len(runs.points) == 1


def test_failed_run_keeps_the_records_before_it(path):
    def run(point):
        if point.seed == 1:
            raise RuntimeError("out of memory")
        return Runs()(point)

    with pytest.raises(RuntimeError, match="out of memory"):
        run_grid(path, POINTS, SETTINGS, run)
    assert len(read_records(path)) == 2


# Kill -9


def test_cut_anywhere_in_the_last_line_the_file_becomes_what_it_was(path):
    run_grid(path, POINTS[:2], SETTINGS, Runs())
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    last = len(content) - 1
    for cut in [*range(start, start + 40), *range(start + 40, len(content), 37), last]:
        path.write_bytes(content[:cut])
        whole = cut == last  # the record lacks its newline alone
        assert len(read_records(path)) == (2 if whole else 1)
        runs = Runs()
        run_grid(path, POINTS[:2], SETTINGS, runs)
        assert path.read_bytes() == content
        assert len(runs.points) == (0 if whole else 1)


def test_dropping_a_cut_line_is_said(path, capsys):
    path.write_text('{"point": {"method": "lin')
    run_grid(path, POINTS[:1], SETTINGS, Runs())
    assert "results.jsonl: dropped an incomplete record" in capsys.readouterr().err


WEIGHTS = [{"a": k / 10, "b": 1 - k / 10} for k in range(1, 9)]
MANY = grid_points(["raco", "linear", "mgda"], WEIGHTS, range(4))


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


def run_slowly(path, log):
    """Runs the grid, in a process that is to be killed."""

    def run(point):
        with log.open("a") as file:
            file.write(point.label + "\n")
        time.sleep(0.01)
        # Long lines, so that some kills hit one that is being written.
        return {"evaluation": {}, "training": {}, "extra": {"text": "x" * 200_000}}

    with contextlib.redirect_stderr(io.StringIO()):
        run_grid(path, MANY, {"steps": 3}, run)


def test_killed_at_random_times_nothing_is_lost_or_doubled(path, tmp_path):
    # Its server imports this module once for all processes.
    context = multiprocessing.get_context("forkserver")
    log = tmp_path / "log.txt"
    generator = random.Random(0)
    kept = b""
    for trial in range(4):
        started = len(lines(log))
        process = context.Process(target=run_slowly, args=(path, log))
        process.start()
        if trial < 3:
            while len(lines(log)) < started + 2:
                time.sleep(0.01)
            time.sleep(generator.uniform(0.02, 0.15))
            process.kill()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if trial < 3 else 0)
        data = path.read_bytes() if path.exists() else b""
        assert data.startswith(kept), "a record that was on the disk is gone"
        kept = data[: data.rfind(b"\n") + 1]
        if trial == 2:
            early = kept.count(b"\n")
    assert 0 < early < len(MANY), "the kills came too late or too early to tell"
    points = [json.dumps(r["point"], sort_keys=True) for r in read_records(path)]
    assert len(points) == len(set(points)) == len(MANY)
    # A kill costs the run in progress, and no other one.
    assert len(MANY) <= len(lines(log)) <= len(MANY) + 3


# Refusals


def refusal(path, points=POINTS, settings=SETTINGS):
    before = path.read_bytes() if path.is_file() else None
    runs = Runs()
    with pytest.raises(UsageError) as caught:
        run_grid(path, points, settings, runs)
    assert runs.points == []
    assert (path.read_bytes() if path.is_file() else None) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_file_with_other_settings_is_refused(path):
    run_grid(path, POINTS[:1], SETTINGS, Runs())
    message = refusal(path, settings={**SETTINGS, "steps": 4, "beta": 0.1})
    assert "results.jsonl holds runs with other settings (steps = 3, beta = 'unset')" in message
    assert "this command (steps = 4, beta = 0.1)" in message


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"hello\n", ["line 1", "is not JSON"]),
        (b"hello", ["line 1", "is not JSON"]),
        (b"\x89PNG\r\n\x1a\n\x00", ["line 1", "is not JSON"]),
        (b'{"prompt": "x"}\n', ["line 1", "is not a record", "evaluation"]),
        (b"[1]\n", ["is not a record"]),
        (b'{"point": 1, "settings": {}, "evaluation": {}, "training": {}}\n', ["is not a record"]),
        (b'{"point": {}, "settings": {}, "evaluation": {}, "training": {}}\n', ["is not a record"]),
    ],
    ids=["text", "text without newline", "PNG", "data set", "array", "number", "no method"],
)
def test_file_of_something_else_is_refused_and_left_alone(path, content, fragments):
    path.write_bytes(content)
    message = refusal(path)
    assert [f for f in ["results.jsonl", *fragments] if f not in message] == []
    with pytest.raises(UsageError, match=r"results\.jsonl"):
        read_records(path)


def test_cut_and_repeated_lines_are_refused(path):
    run_grid(path, POINTS[:2], SETTINGS, Runs())
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first[:50] + b"\n" + second)
    assert "line 1, is not JSON" in refusal(path)
    path.write_bytes(first * 2)
    assert "line 2, repeats the point of line 1" in refusal(path)


def test_file_that_another_process_holds_is_refused(path):
    with held(path, "--output"):
        assert "one process at a time" in refusal(path)
    assert len(run_grid(path, POINTS, SETTINGS, Runs())) == 4


def test_output_that_cannot_be_written_is_refused_before_any_run(path):
    path.mkdir()
    assert "`--output` must be a file" in refusal(path)
    path.rmdir()
    path.write_text("")
    assert "Not a directory" in refusal(path / "below" / "results.jsonl")


def test_missing_file_cannot_be_read(path):
    with pytest.raises(UsageError, match="can't be read"):
        read_records(path)


def test_points_and_results_are_checked(path):
    with pytest.raises(ValueError, match="`points` must be distinct"):
        run_grid(path, [POINTS[0], POINTS[0]], SETTINGS, Runs())
    with pytest.raises(ValueError, match=r"`run` must return.*got \['loss'\]"):
        run_grid(path, POINTS, SETTINGS, lambda point: {"loss": 1.0})
    assert not path.exists()
