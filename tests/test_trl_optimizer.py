"""The optimizer inside the trainer: its report and log, and changes between steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import raco_optim
from raco_optim.integrations import trl as trl_module
from raco_optim.integrations.trl import MultiObjectiveDPOTrainer
from tests import test_trl_trainer as base
from tests.test_trl_settings import lora
from tests.test_trl_trainer import (
    SGD,
    STEP,
    THREE,
    WEIGHTS,
    Settings,
    Watch,
    algorithm_1,
    assert_close,
    dpo_by_hand,
    flat,
    gradient_of,
    logs,
    make_trainer,
    parameters,
    stop_at,
    trained,
)
from tests.tiny_language_models import tiny_model, tiny_pairs

pytestmark = base.pytestmark
offline, settings = base.offline, base.settings


def optimizer_of(trainer: MultiObjectiveDPOTrainer) -> Any:
    return raco_optim.unwrap(trainer.optimizer)


def with_optimizer(
    settings: Settings, optimizer: Callable[..., Any], **changed: Any
) -> MultiObjectiveDPOTrainer:
    """A trainer with an optimizer of the user's."""
    model = tiny_model()
    others = {"optimizers": (optimizer(model.parameters()), None)}
    rows = tiny_pairs(8)
    return make_trainer(settings | changed, rows, model=model, eval_rows=rows[:3], others=others)


class TestReport:
    @pytest.mark.parametrize("method", ["raco", "cagrad", "mgda"])
    def test_describes_the_last_step(self, settings: Settings, method: str) -> None:
        trainer = make_trainer(settings, tiny_pairs(8), method=method)
        trainer.train()
        report, logged = optimizer_of(trainer).report, logs(trainer)[-1]
        assert report.names == tuple(WEIGHTS)
        assert report.weights.tolist() == list(WEIGHTS.values())
        for i, name in enumerate(WEIGHTS):
            assert logged[f"alpha/{name}"] == report.coefficients[i]
            assert logged[f"p/{name}"] == report.p[i]
            assert logged[f"grad_norm/{name}"] == report.gram[i, i].sqrt()
            assert logged[f"loss/{name}"] == pytest.approx(report.losses[i].item(), rel=1e-6)
        kinds = {"raco": raco_optim.CAGradClip, "cagrad": raco_optim.CAGrad}
        assert type(optimizer_of(trainer)) is kinds.get(method, raco_optim.MGDA)

    def test_callbacks_see_the_gradient_the_report_and_the_log(
        self, settings: Settings, tmp_path: Path
    ) -> None:
        settings |= SGD | {"gradient_accumulation_steps": 2, "max_steps": 3}
        trainer = make_trainer(settings, tiny_pairs(24))
        passes: list[int] = []
        trainer.model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
        logger = raco_optim.StepLogger(tmp_path / "steps.jsonl")
        norms, seen = [], []

        def log(state: Any, *_: Any, optimizer: Any, **__: Any) -> None:
            logger.log(optimizer, state.global_step)

        def look(*_: Any, model: torch.nn.Module, **__: Any) -> None:
            norms.append(math.hypot(*(p.grad.norm().item() for p in model.parameters())))

        trainer.add_callback(Watch("on_step_end", log))
        trainer.add_callback(Watch("on_pre_optimizer_step", look))
        trainer.add_callback(Watch("on_log", lambda *_, logs, **__: seen.append(logs)))
        with logger:
            trainer.train()
        assert len(passes) == 6, "one forward pass a micro-batch"
        assert norms == pytest.approx([entry["grad_norm"] for entry in logs(trainer)], rel=1e-5)
        assert {"p/helpful", "alpha/harmless", "clip_angle", "gap", "hurting"} <= seen[0].keys()
        assert all(isinstance(value, int | float) for value in seen[0].values())
        found = raco_optim.read_steps(tmp_path / "steps.jsonl")
        assert found.steps == (1, 2, 3)
        for report, logged in zip(found.reports, logs(trainer), strict=True):
            for i, name in enumerate(WEIGHTS):
                assert report.p_clipped[i] == logged[f"p_clipped/{name}"]


class TestBetweenSteps:
    def test_weights_and_radius(self, settings: Settings) -> None:
        """After the first step c = 0 and other weights: the weighted gradient, by hand."""
        rows, model, reference = tiny_pairs(8), tiny_model(seed=1), tiny_model(seed=2)
        weights = {"helpful": 0.2, "harmless": 0.8}
        expected: list[Tensor] = []

        def change(state: Any, *_: Any, optimizer: Any, **__: Any) -> None:
            if state.global_step == 1:
                found = raco_optim.unwrap(optimizer)
                found.weights, found.c = weights, 0.0
                total = sum(
                    weight * dpo_by_hand(model, reference, rows[4:], name)[0]
                    for name, weight in weights.items()
                )
                expected.extend([total, flat(model) - 0.3 * gradient_of(total, model)])

        trainer = make_trainer(settings | SGD, rows, model=model, reference=reference)
        trainer.add_callback(Watch("on_step_end", change))
        trainer.train()
        total, end = expected
        torch.testing.assert_close(flat(model), end, rtol=1e-4, atol=1e-6)
        first, second = logs(trainer)
        assert first["alpha/helpful"] != WEIGHTS["helpful"]
        assert {name: second[f"alpha/{name}"] for name in weights} == weights
        assert second["loss"] == pytest.approx(total.item(), rel=1e-4)

    def test_before_the_first_step(self, settings: Settings) -> None:
        rows = tiny_pairs(8)
        trainer = make_trainer(settings, rows)
        trainer.create_optimizer()
        with pytest.raises(ValueError, match=r"`c` must be in \[0, 1\)"):
            optimizer_of(trainer).c = 1.5
        with pytest.raises(ValueError, match="`weights` must stay a mapping with"):
            optimizer_of(trainer).weights = {"helpful": 0.5, "brief": 0.5}
        optimizer_of(trainer).c = 0.0
        trainer.train()
        assert_close(parameters(trainer), trained(settings, rows, method="linear"), 1e-5)

    def test_evaluation_keeps_the_yardstick(self, settings: Settings) -> None:
        trainer = make_trainer(settings, tiny_pairs(8), eval_rows=tiny_pairs(5))
        trainer.train()
        before = trainer.evaluate()
        optimizer_of(trainer).weights = {"helpful": 0.1, "harmless": 0.9}
        assert trainer.evaluate()["eval_loss"] == before["eval_loss"]

    @pytest.mark.parametrize("method", ["raco", "mgda"])
    def test_resumes_with_changed_weights_and_radius(self, settings: Settings, method: str) -> None:
        rows = tiny_pairs(16, missing=0.3)
        settings |= {"max_steps": 4, "lr_scheduler_type": "linear", "method": method}
        weights = {"helpful": 0.2, "harmless": 0.8}

        def change(state: Any, *_: Any, optimizer: Any, **__: Any) -> None:
            if state.global_step == 1:
                found = raco_optim.unwrap(optimizer)
                found.weights = weights
                if method == "raco":
                    found.c = 0.9

        def run(stop: int, **changed: Any) -> MultiObjectiveDPOTrainer:
            trainer = make_trainer(settings, rows, **changed)
            trainer.add_callback(Watch("on_step_end", change))
            trainer.add_callback(stop_at(stop))
            trainer.train()
            return trainer

        whole, saved = run(4), {"save_strategy": "steps", "save_steps": 2}
        run(2, **saved)
        again = make_trainer(settings, rows, **saved)
        with pytest.warns(UserWarning, match="resumes with `weights` from its checkpoint") as seen:
            again.train(resume_from_checkpoint=True)
        about_c = [w for w in seen if "with `c` from its checkpoint, 0.9, not" in str(w.message)]
        assert len(about_c) == (method == "raco")
        assert optimizer_of(again).weights == weights
        assert_close(parameters(again), parameters(whole), 0.0)
        assert logs(again) == logs(whole)

    def test_resuming_without_a_change_does_not_warn(
        self, settings: Settings, recwarn: pytest.WarningsRecorder
    ) -> None:
        settings |= {"save_strategy": "steps", "save_steps": 1}
        make_trainer(settings, tiny_pairs(8), max_steps=1).train()
        make_trainer(settings, tiny_pairs(8), max_steps=2).train(resume_from_checkpoint=True)
        assert not [w for w in recwarn if "from its checkpoint" in str(w.message)]


@pytest.mark.parametrize(
    ("parts", "peft_config"), [(1, lora()), (2, lora()), (2, None)], ids=["lora", "parts", "full"]
)
def test_a_skipped_step_changes_nothing(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    parts: int,
    peft_config: LoraConfig | None,
) -> None:
    """The scores of the second step, or of its first micro-batch, are NaN."""
    rows = tiny_pairs(12)
    settings |= {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
    expected = make_trainer(settings, [*rows[:4], *rows[8:]], peft_config=peft_config)
    expected.train()
    original, calls = trl_module.completion_log_probs, itertools.count()
    monkeypatch.setattr(
        trl_module,
        "completion_log_probs",
        lambda *args: original(*args) * (math.nan if next(calls) == parts else 1.0),
    )
    settings |= {"nonfinite": "skip", "max_steps": 3}
    trainer = make_trainer(settings, rows, peft_config=peft_config)
    trainer.train()
    assert_close(parameters(trainer), parameters(expected), 0.0)
    assert optimizer_of(trainer).report.skipped == 1
    first, skipped, last = logs(trainer)
    assert [entry.get("skipped") for entry in (first, skipped, last)] == [None, 1, 1]
    assert skipped["labelled/helpful"] == 0
    assert not {"p/helpful", "loss/helpful", "margin/helpful"} & skipped.keys()
    assert last["loss/helpful"] == logs(expected)[1]["loss/helpful"]
    assert all(math.isfinite(x) for entry in logs(trainer) for x in entry.values())


class TestInnerOptimizer:
    @pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
    def test_choices_of_the_trainer(self, settings: Settings, optim: str) -> None:
        """With c = 0, the step along the weighted gradient that TRL's trainer takes."""
        rows = tiny_pairs(8, missing=0.3)
        settings |= {"optim": optim, "lr_scheduler_type": "cosine", "warmup_steps": 1}
        assert_close(trained(settings, rows, c=0.0), trained(settings, rows, method="linear"), 1e-4)

    def test_modes_of_an_optimizer(self, settings: Settings) -> None:
        """Schedule-free optimizers have other weights in evaluations than in training."""
        calls: list[str] = []

        class TwoModes(torch.optim.SGD):
            def train(self) -> None:
                calls.append("train")

            def eval(self) -> None:
                calls.append("eval")

        trainer = with_optimizer(settings, lambda params: TwoModes(params, lr=0.1))
        trainer.train()
        assert calls == ["train"] * 2
        trainer.evaluate()
        assert calls[2:] == ["eval"]

    def test_of_the_user(self, settings: Settings) -> None:
        trainer = with_optimizer(settings, lambda params: torch.optim.SGD(params, lr=0.1))
        inner = optimizer_of(trainer).optimizer
        assert type(inner) is torch.optim.SGD
        trainer.train()
        trainer.train()
        assert optimizer_of(trainer).optimizer is inner
        assert type(trainer.lr_scheduler).__name__ == "LambdaLR"

    @pytest.mark.parametrize("method", ["raco", "linear"])
    def test_wrapped_by_the_user(self, settings: Settings, method: str) -> None:
        def wrapped(params: Any) -> Any:
            return raco_optim.CAGradClip(torch.optim.SGD(params), WEIGHTS)

        with pytest.raises(ValueError, match="`optimizers` must hold the inner .* got CAGradClip"):
            with_optimizer(settings, wrapped, method=method)

    def test_stepping_in_the_backward_pass(self, settings: Settings) -> None:
        """Refused by the name of the class too, not only by `optim`."""

        class AdaLomo(torch.optim.SGD):
            pass

        with pytest.raises(ValueError, match="`inner` must step after .* got AdaLomo"):
            with_optimizer(settings, AdaLomo)


class TestAbsentObjectives:
    @pytest.mark.parametrize(
        ("method", "factor"),
        [
            ("mgda", {"helpful": 1.0, "harmless": 1.0}),
            ("raco", {"helpful": 0.98, "harmless": 0.42}),
        ],
    )
    def test_pairs_with_one_label_each(
        self, settings: Settings, method: str, factor: dict[str, float]
    ) -> None:
        """One pair a step. MGDA: the gradient of the one objective; raco: w_i (1 + c) times it."""
        rows = tiny_pairs(4)
        for i, row in enumerate(rows):
            row["pref_harmless" if i % 2 else "pref_helpful"] = None
        model, reference = tiny_model(seed=1), tiny_model(seed=2)
        options = settings | STEP | {"per_device_train_batch_size": 1, "max_steps": 4}
        options |= {"method": method, "c": 0.4}
        trainer = make_trainer(options, rows, model=model, reference=reference)
        expected: list[Tensor] = []

        def predict(state: Any, *_: Any, **__: Any) -> None:
            row = rows[state.global_step]
            name = "harmless" if row["pref_helpful"] is None else "helpful"
            model.eval()
            g = gradient_of(dpo_by_hand(model, reference, [row], name)[0], model)
            assert g.norm() > 1e-3
            expected.append(flat(model) - factor[name] * g)

        ends: list[Tensor] = []
        trainer.add_callback(Watch("on_step_begin", predict))
        trainer.add_callback(Watch("on_step_end", lambda *_, **__: ends.append(flat(model))))
        trainer.train()
        assert len(ends) == 4
        for end, by_hand in zip(ends, expected, strict=True):
            torch.testing.assert_close(end, by_hand, rtol=1e-4, atol=1e-6)
        for i, logged in enumerate(logs(trainer)):
            absent, present = ("helpful", "harmless") if i % 2 == 0 else ("harmless", "helpful")
            assert logged["grad_norm"] > 0
            assert logged[f"p/{present}"] == 1
            assert logged[f"labelled/{absent}"] == 0
            keys = {f"{key}/{absent}" for key in ("p", "p_clipped", "alpha", "grad_norm", "loss")}
            assert not (keys | {"cosine/helpful/harmless"}) & logged.keys()
        assert optimizer_of(trainer).report.absent == ("harmless",)

    @pytest.mark.parametrize("parts", [1, 3])
    def test_correction_of_the_others(self, settings: Settings, parts: int) -> None:
        """W alpha(H, w / W) over the two objectives of three that are there."""
        rows = [row | {"pref_b": None} for row in tiny_pairs(6, tuple(THREE), missing=0.3, seed=4)]
        later = tiny_pairs(1, tuple(THREE))
        model, reference, c = tiny_model(seed=1), tiny_model(seed=2), 0.7
        g = torch.stack(
            [gradient_of(dpo_by_hand(model, reference, rows, k)[0], model) for k in ("a", "c")]
        )
        truth = algorithm_1(g, [THREE["a"], THREE["c"]], c)
        assert truth.correction.norm() > 1e-3
        before = flat(model)
        options = settings | STEP | {"per_device_train_batch_size": 6 // parts, "c": c}
        options |= {"gradient_accumulation_steps": parts, "weights": THREE}
        trainer = make_trainer(options, rows + later, model=model, reference=reference)
        trainer.train()
        torch.testing.assert_close(before - flat(model), truth.step, rtol=1e-3, atol=1e-6)
        report = optimizer_of(trainer).report
        assert report.absent == ("b",)
        assert report.p.isnan().tolist() == [False, True, False]
        for name, p in zip(("a", "c"), truth.p, strict=True):
            assert logs(trainer)[0][f"p/{name}"] == pytest.approx(p.item(), abs=1e-5)

    def test_step_without_any_label_has_no_report(self, settings: Settings) -> None:
        rows = tiny_pairs(12)
        for row in rows[4:8]:
            row.update(pref_helpful=0, pref_harmless=None)
        trainer = make_trainer(settings | SGD, rows, max_steps=3)
        reports: list[Any] = []

        def look(*_: Any, optimizer: Any, **__: Any) -> None:
            reports.append(raco_optim.unwrap(optimizer).last_step)

        trainer.add_callback(Watch("on_step_end", look))
        trainer.train()
        assert reports[0] is reports[1] is not reports[2]
        assert "p/helpful" not in logs(trainer)[1]
        expected = trained(settings | SGD, [*rows[:4], *rows[8:]])
        assert_close(parameters(trainer), expected, 0.0)
