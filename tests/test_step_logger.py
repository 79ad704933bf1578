"""A log says what the optimizer said, to the last bit, whatever happens to the process."""

import dataclasses
import json
import math
import os
import re
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raco_optim import (
    MGDA,
    CAGradClip,
    LinearScalarization,
    MultiObjectiveOptimizer,
    Outcome,
    StepLogger,
    read_steps,
)

NO_VALUE = (NotImplementedError, RuntimeError)  # of the meta device, where nothing can be read


@pytest.fixture
def path(tmp_path):
    return tmp_path / "steps.jsonl"


def make(method=CAGradClip, weights=(0.2, 0.8), **kwargs):
    x = nn.Parameter(torch.tensor([2.0, 3.0]))
    inner = torch.optim.SGD([x], 0.01)
    if method is MultiObjectiveOptimizer:
        return x, method(inner, lambda gram: gram.new_ones(2), weights=weights, **kwargs)
    return x, method(inner, weights, **kwargs)


def step(x, opt, t=0):
    opt.zero_grad()
    opt.backward([(x[0] - 2 * x[1] + t).square(), (x[0] * x[1] - t).square()])
    opt.step()


def write(path, steps=3, method=CAGradClip, resume=False, **kwargs):
    """Logs some steps, and returns what `report` said of them."""
    x, opt = make(method, **kwargs)
    reports = []
    with StepLogger(path, resume=resume) as logger:
        for t in range(steps):
            step(x, opt, t)
            logger.log(opt)
            reports.append(opt.report)
    return reports


def all_bits(reports):
    return [bits(report) for report in reports]


def bits(report):
    """All of a report, so that -0.0 and types are told apart, and every NaN is the same."""
    found: list[object] = []
    for field in dataclasses.fields(report):
        value = getattr(report, field.name)
        if isinstance(value, Tensor):
            value = value.where(~value.isnan(), math.nan)
            value = (value.dtype, value.device.type, value.shape, value.numpy().tobytes())
        elif isinstance(value, float):
            value = "nan" if math.isnan(value) else value.hex()
        found.append((field.name, type(value), value))
    return found


def strictly(line):
    """Reads JSON as its standard has it, without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(
    ("method", "kwargs"),
    [
        (CAGradClip, {}),
        (CAGradClip, {"gram_every": 3}),
        (CAGradClip, {"solver": "pgd", "nonfinite": "propagate"}),
        (MGDA, {}),
        (LinearScalarization, {}),
        (MultiObjectiveOptimizer, {}),
    ],
)
def test_reports_come_back_to_the_last_bit(path, method, kwargs):
    expected = write(path, 5, method, **kwargs)
    log = read_steps(path)
    assert log.steps == (0, 1, 2, 3, 4)
    assert all_bits(log.reports) == all_bits(expected)
    lines = path.read_text().splitlines()
    assert [strictly(line)["step"] for line in lines[1:]] == list(log.steps)


def cosine(u, v):
    return u @ v / math.sqrt((u @ u) * (v @ v))


def test_other_readers_find_what_a_report_derives(path):
    """From the gradients themselves, which were chosen: three that conflict."""
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    rows = torch.tensor([[3.0, 0, 1], [-1, 2, 0], [0, -2, 1]], dtype=torch.float64)
    opt = CAGradClip(torch.optim.SGD([x], 0.1), [0.6, 0.3, 0.1], 0.4)
    with StepLogger(path) as logger:
        opt.backward([row @ x for row in rows])
        logger.log(opt)
    entry = strictly(path.read_text().splitlines()[1])
    expected = [[float(cosine(u, v)) for v in rows] for u in rows]
    assert torch.allclose(torch.tensor(entry["cosines"]), torch.tensor(expected))
    p, p_clipped = (torch.tensor(entry[n], dtype=torch.float64) for n in ("p", "p_clipped"))
    turned = 1 - float(cosine(p @ rows, p_clipped @ rows))
    assert turned > 1e-3, "clipping turns the correction, so that there is something to see"
    assert entry["clip_angle"] == pytest.approx(turned, rel=1e-6)
    assert entry["outcome"] == "CORRECTED"
    assert entry["gradients"] == opt.report.gradients


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_what_is_not_finite_is_valid_json_and_comes_back(path, nonfinite, bad):
    x, opt = make(weights={"a": 0.5, "b": 0.25, "ç": 0.25}, nonfinite=nonfinite)
    expected = []
    with StepLogger(path) as logger:
        for factor in (1.0, bad):
            opt.zero_grad()
            opt.backward({"a": x[0] * factor, "b": x @ x, "ç": None})
            opt.step()
            logger.log(opt)
            expected.append(opt.report)
    reports = read_steps(path).reports
    assert all_bits(reports) == all_bits(expected)
    assert reports[1].outcome in (Outcome.SKIPPED, Outcome.NONFINITE)
    assert reports[1].absent == ("ç",)
    for line in path.read_text().splitlines():
        strictly(line)


def test_a_step_is_in_the_file_before_the_next_begins(tmp_path):
    x, opt = make()
    path = tmp_path / "new" / "folder" / "steps.jsonl"
    logger = StepLogger(path)
    for t in range(3):
        step(x, opt, t)
        logger.log(opt)
        log = read_steps(path)
        assert bits(log.reports[-1]) == bits(opt.report)
        assert len(log.steps) == t + 1
    logger.close()


def test_a_log_that_was_cut_anywhere_is_read_and_goes_on(path):
    """tests/test_jsonl.py cuts at every byte."""
    expected = all_bits(write(path, steps=2))
    data = path.read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in sorted({*range(0, len(data), 61), *(i + k for i in ends for k in (-1, 0, 1))}):
        path.write_bytes(data[:cut])
        whole = max(0, sum(cut >= end for end in ends) - 1)  # a line is whole without its newline
        if whole:
            assert all_bits(read_steps(path).reports) == expected[:whole]
        else:
            with pytest.raises(ValueError, match="must be a log with at least one step"):
                read_steps(path)
        after = expected[:whole] + all_bits(write(path, steps=1, resume=True))
        found = read_steps(path)
        assert all_bits(found.reports) == after
        assert found.steps == tuple(range(len(after)))
        assert cut < ends[0] or found.run == json.loads(data[: ends[0]])["run"]


def test_a_run_that_goes_on_from_a_checkpoint_replaces_what_was_beyond_it(path):
    before = write(path, steps=5, resume=True)  # there is nothing to go on with yet
    run = read_steps(path).run
    x, opt = make()
    with StepLogger(path, resume=True) as logger:
        for t in (3, 7):
            step(x, opt, t)
            logger.log(opt, step=t)
    log = read_steps(path)
    assert log.steps == (0, 1, 2, 3, 7)
    assert log.run == run
    assert all_bits(log.reports[:3]) == all_bits(before[:3])
    assert bits(log.reports[4]) == bits(opt.report)
    write(path, steps=1, resume=True)
    assert read_steps(path).steps == (0, 1, 2, 3, 7, 8)


def test_a_step_is_logged_once(path):
    x, opt = make()
    with StepLogger(path) as logger:
        logger.log(opt)  # no backward yet
        assert not path.exists()
        for _ in range(2):
            opt.zero_grad()
            for k in range(3):
                opt.backward([x[0], x[1]], accumulate=k < 2)
                logger.log(opt)
            opt.step()
            logger.log(opt)
    assert read_steps(path).steps == (0, 1)


def test_the_optimizer_may_be_inside_a_wrapper(path):
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    x, opt = make()
    with StepLogger(str(path)) as logger:
        step(x, opt)
        logger.log(Wrapper(Wrapper(opt)))
        with pytest.raises(TypeError, match="`optimizer` must be a MultiObjectiveOptimizer"):
            logger.log(torch.optim.SGD([x], 0.1))
    assert bits(read_steps(path).reports[0]) == bits(opt.report)


def test_nothing_is_read_from_a_device_until_a_hundred_steps_are_under_way(tmp_path, path):
    """On the meta device whatever reads a value raises; see tests/test_no_sync.py."""
    with torch.device("meta"):
        x = nn.Parameter(torch.empty(2))
    kept = torch.ones(2, dtype=torch.float64, device="meta")
    opt = MultiObjectiveOptimizer(torch.optim.SGD([x], 0.1), lambda _: kept, nonfinite="propagate")
    logger = StepLogger(path)
    for _ in range(100):
        opt.zero_grad()
        opt.backward([x[0], x[1]])
        logger.log(opt)
    with pytest.raises(NO_VALUE):
        _ = opt.report
    opt.backward([x[0], x[1]])
    with pytest.raises(NO_VALUE):
        logger.log(opt)
    with pytest.raises(NO_VALUE):
        logger.close()
    with pytest.raises(ZeroDivisionError), StepLogger(tmp_path / "other.jsonl") as other:
        opt.backward([x[0], x[1]])
        other.log(opt)
        _ = 1 / 0  # says more than what closing the log raises


def test_a_step_under_way_keeps_its_numbers(path, monkeypatch):
    """As on an accelerator: nothing has arrived yet, and the rule uses its memory again."""
    monkeypatch.setattr("raco_optim.step_log.logger._Unread.arrived", False)
    x = nn.Parameter(torch.tensor([2.0, 3.0]))
    kept = torch.zeros(2, dtype=torch.float64)
    opt = MultiObjectiveOptimizer(torch.optim.SGD([x], 0.1), lambda _: kept.add_(1))
    with StepLogger(path) as logger:
        for _ in range(3):
            opt.backward([x[0], x[1]])
            logger.log(opt)
        assert len(path.read_text().splitlines()) == 1, "the header alone"
    reports = read_steps(path).reports
    assert [r.coefficients.tolist() for r in reports] == [[1, 1], [2, 2], [3, 3]]


def test_a_full_disk_leaves_whole_lines_and_loses_nothing(path):
    x, opt = make()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with StepLogger(path) as logger:
        step(x, opt)
        logger.log(opt)
        size = path.stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, hard))
            step(x, opt, 1)
            with pytest.raises(OSError, match="`path` must be a writable file; got "):
                logger.log(opt)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.stat().st_size == size
        step(x, opt, 2)
        logger.log(opt)
    assert read_steps(path).steps == (0, 1, 2)
    assert bits(read_steps(path).reports[2]) == bits(opt.report)


def test_two_writers_of_one_file_are_noticed(path):
    x, opt = make()
    with StepLogger(path) as first, StepLogger(path, resume=True) as second:
        for logger in (first, second):
            step(x, opt)
            logger.log(opt)
        step(x, opt)
        with pytest.raises(OSError, match="`path` must be written by one process at a time; got "):
            first.log(opt)
        second.log(opt)
        with pytest.raises(OSError):
            first.close()
    assert read_steps(path).steps == (0, 1, 2)


def log_on(rank, path, alone):
    """Trains on a rank's own batch, and returns what the report said."""
    x = nn.Parameter(torch.tensor([2.0, 3.0]))
    group = dist.new_subgroups(group_size=1)[0] if alone else None
    opt = CAGradClip(torch.optim.SGD([x], 0.1), [0.2, 0.8], process_group=group)
    reports = []
    with StepLogger(path.format(rank=rank)) as logger:
        for t in range(3):
            step(x, opt, t + rank)
            logger.log(opt)
            reports.append(bits(opt.report))
    return reports


def test_of_several_processes_the_first_one_of_the_group_writes(tmp_path, two_ranks):
    reports = two_ranks.run(log_on, f"{tmp_path}/together.jsonl", False)
    log = read_steps(tmp_path / "together.jsonl")
    assert all_bits(log.reports) == reports[0] == reports[1]
    reports = two_ranks.run(log_on, f"{tmp_path}/rank{{rank}}.jsonl", True)
    for rank in range(2):
        assert all_bits(read_steps(tmp_path / f"rank{rank}.jsonl").reports) == reports[rank]
    assert reports[0] != reports[1]


def test_the_logger_says_what_is_wrong(tmp_path):
    x, opt = make()
    step(x, opt)
    there = tmp_path / "there.jsonl"
    write(there, steps=1)
    data = there.read_bytes()
    with pytest.raises(FileExistsError) as raised:
        StepLogger(there).log(opt)
    assert str(raised.value) == (
        f"`path` must be a new file; got {str(there)!r}, which exists. Choose another, or pass "
        f"resume=True to continue its run."
    )
    for unwritable, why in [
        (there / "below.jsonl", "File exists"),
        (tmp_path, "Is a directory"),
        (Path(os.devnull), "Invalid argument"),
    ]:
        with pytest.raises(OSError) as raised:
            StepLogger(unwritable, resume=True).log(opt)
        assert str(raised.value) == (
            f"`path` must be a writable file; got {str(unwritable)!r} ({why}). Free "
            f"disk space, or choose another path."
        )
    assert there.read_bytes() == data
    logger = StepLogger(tmp_path / "new.jsonl")
    for wrong in (-1, 1.0, True):
        with pytest.raises(ValueError, match=f"at least 0, above the last one; got {wrong}"):
            logger.log(opt, step=wrong)
    logger.log(opt, step=5)
    step(x, opt)
    with pytest.raises(ValueError, match="`step` must be an integer of at least 6, .*; got 5"):
        logger.log(opt, step=5)
    logger.close()
    logger.close()
    with pytest.raises(ValueError, match="`log` must be called before `close`; got .* resume=True"):
        logger.log(opt)
    assert read_steps(tmp_path / "new.jsonl").steps == (5,)


def test_a_run_with_other_losses_is_not_gone_on_with(path):
    write(path, steps=1)
    data = path.read_bytes() + b'{"cut sho'
    path.write_bytes(data)
    x, opt = make(weights={"a": 0.2, "b": 0.8})
    opt.backward({"a": x[0], "b": x[1]})
    with pytest.raises(ValueError) as raised, StepLogger(path, resume=True) as logger:
        logger.log(opt)
    assert str(raised.value) == (
        f"`path` must be the log of a run with the losses ['a', 'b'] to continue it; got "
        f"{str(path)!r} with the losses ['0', '1']. Use a separate file for each run."
    )
    assert path.read_bytes() == data


HEADER = b'{"raco_optim": "step log", "version": 1, "run": "x"}\n'
NO_STEP = "must be a log with at least one step; got {}"
NO_LOG = "must be a log of a StepLogger; got {}, whose line "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f"{NO_STEP}, which has none. Call `StepLogger"),
        (HEADER, NO_STEP),
        (b"notes\nof mine\n", f"{NO_LOG}1 is something"),
        (b"notes without an end", f"{NO_LOG}1"),
        (b"[1]\n", f"{NO_LOG}1"),
        (b'{"step": 0}\n', f"{NO_LOG}1"),
        (b'{"raco_optim": "step log"}\n', f"{NO_LOG}1"),
        (HEADER.replace(b"step", b"any"), f"{NO_LOG}1"),
        (HEADER.replace(b'"x"', b"3"), f"{NO_LOG}1"),
        (HEADER.replace(b"1", b'"1"'), f"{NO_LOG}1"),
        (bytes(range(256)), f"{NO_LOG}1"),
        (HEADER + b"\n", f"{NO_LOG}2"),
        (HEADER + b'{"step": 0}\n', f"{NO_LOG}2"),
        (HEADER.replace(b"1", b"2"), "must be a log of version 1 or older; got version 2"),
    ],
)
def test_what_is_no_log_is_refused_and_left_alone(path, content, message):
    path.write_bytes(content)
    pattern = "^" + re.escape(f"`path` {message}".format(repr(str(path))))
    with pytest.raises(ValueError, match=pattern):
        read_steps(path)
    if NO_STEP not in message:
        with pytest.raises(ValueError, match=pattern):
            write(path, steps=1, resume=True)
        assert path.read_bytes() == content


def test_a_damaged_line_is_refused(path):
    write(path, steps=2)
    head, first, second = path.read_text().splitlines()
    for damage in (
        {"gap": math.nan},  # a bare NaN is not JSON
        {"gram": [[1.0]]},
        {"weights": [1.0, "one"]},
        {"losses": None},
        {"names": 3},
        {"names": ["a", 3]},
        {"absent": "a"},
        {"skip": "no"},
        {"skipped": 1.5},
        {"gradients": None},
        {"step": "1"},
    ):
        path.write_text("\n".join([head, json.dumps(json.loads(first) | damage), second, ""]))
        with pytest.raises(ValueError, match="whose line 2 is something else"):
            read_steps(path)


def test_runs_that_were_mixed_are_refused(tmp_path):
    for name in "ab":
        write(tmp_path / name, steps=2)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    with pytest.raises(ValueError) as raised:
        read_steps(mixed)
    assert str(raised.value) == (
        f"`path` must be the log of one run; got {str(mixed)!r}, where another run begins at line "
        f"4. Use a separate file for each run."
    )


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(OSError) as raised:
        read_steps(tmp_path / "missing.jsonl")
    path = str(tmp_path / "missing.jsonl")
    assert str(raised.value) == (
        f"`path` must be a readable file; got {path!r} ({os.strerror(2)})."
    )
