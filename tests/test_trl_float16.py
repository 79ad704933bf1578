"""float16 with the Trainer's GradScaler, which Accelerate has on accelerators only; simulated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

import raco_optim
from raco_optim import read_steps
from raco_optim.integrations import trl as trl_module
from tests import test_trl_trainer as base
from tests.test_trl_trainer import Settings, Watch, logs, make_trainer, parameters
from tests.tiny_language_models import tiny_pairs

pytestmark = base.pytestmark
offline, settings = base.offline, base.settings


@contextmanager
def float16_on_cpus(scale: float) -> Iterator[None]:
    """Gives Accelerate the autocast to float16 and the scaler of an accelerator."""
    original = trl_module.DPOTrainer.create_accelerator_and_postprocess

    def created(self: Any) -> None:
        original(self)
        AcceleratorState._shared_state["_mixed_precision"] = "fp16"
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    with mock.patch.object(trl_module.DPOTrainer, "create_accelerator_and_postprocess", created):
        yield


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    difference = sum(float((a[name] - b[name]).square().sum()) for name in b)
    return math.sqrt(difference / sum(float(x.square().sum()) for x in b.values()))


FOUR: Settings = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1}
FOUR |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("scale", [2.0**10, 2.0**16])
def test_trains_as_in_float32(settings: Settings, tmp_path: Path, scale: float) -> None:
    """The scale is in no log, and no clipping sees it."""
    rows = tiny_pairs(16, missing=0.3)
    settings |= FOUR | {"max_grad_norm": 0.5}
    before = parameters(make_trainer(settings, rows))
    expected = make_trainer(settings | {"output_dir": str(tmp_path / "float32")}, rows)
    expected.train()
    with float16_on_cpus(scale):
        trainer = make_trainer(settings | {"fp16": True}, rows)
        trainer.train()
    moved = {name: p - before[name] for name, p in parameters(expected).items()}
    found = {name: p - before[name] for name, p in parameters(trainer).items()}
    assert 0 < distance(found, moved) < 0.02
    for mine, theirs in zip(logs(trainer), logs(expected), strict=True):
        for key in ("loss", "grad_norm", "grad_norm/helpful", "alpha/harmless", "loss/harmless"):
            assert mine[key] == pytest.approx(theirs[key], rel=0.02, abs=0.01)
    found_step, step = (
        read_steps(Path(one.args.output_dir, "steps.jsonl")).reports[-1]
        for one in (trainer, expected)
    )
    torch.testing.assert_close(found_step.gram, step.gram, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(found_step.losses, step.losses, rtol=0.01, atol=1e-3)


def test_without_a_correction_it_is_the_weighted_loss(settings: Settings) -> None:
    """Which TRL and Accelerate scale, unscale and step by themselves."""
    rows = tiny_pairs(16, missing=0.3)
    settings |= FOUR | {"fp16": True}
    with float16_on_cpus(2.0**12):
        stock = base.trained(settings, rows, method="linear")
        found = base.trained(settings, rows, c=0.0)
    assert distance(found, stock) < 1e-4


def test_an_overflow_is_skipped_counted_and_ends(settings: Settings) -> None:
    rows = tiny_pairs(32, missing=0.3)
    values: list[dict[str, Tensor]] = []
    settings |= {"max_steps": 8, "fp16": True, "max_grad_norm": 1.0}
    with float16_on_cpus(2.0**20):
        trainer = make_trainer(settings, rows)
        before = parameters(trainer)
        record = Watch("on_step_end", lambda *_, **__: values.append(parameters(trainer)))
        trainer.add_callback(record)
        trainer.train()
    same = [
        all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip([before, *values], values, strict=False)
    ]
    skips = sum(same)
    assert 0 < skips < 8 and same == [True] * skips + [False] * (8 - skips)
    found = logs(trainer)
    assert [entry.get("skipped") for entry in found] == [min(i + 1, skips) for i in range(8)]
    assert "grad_norm/helpful" not in found[0]
    assert raco_optim.unwrap(trainer.optimizer).report.skipped == skips


@pytest.mark.parametrize("method", ["raco", "linear"])
def test_a_loss_that_is_not_finite_is_an_error(settings: Settings, method: str) -> None:
    forward = trl_module.completion_log_probs
    nan = mock.patch.object(trl_module, "completion_log_probs", lambda *x: forward(*x) * torch.inf)
    settings |= {"fp16": True, "method": method}
    with float16_on_cpus(2.0**10), nan, pytest.raises(FloatingPointError, match="NaN or Inf"):
        base.trained(settings, tiny_pairs(8))


def test_needs_an_accelerator(settings: Settings) -> None:
    """Accelerate would train in float32 without a word."""
    with pytest.raises(ValueError, match="`fp16` must be False on cpu"):
        make_trainer(settings | {"fp16": True}, tiny_pairs(4))
