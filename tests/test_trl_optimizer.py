"""The optimizer inside the trainer: its report and log, and what may be set between steps."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import logsigmoid

import raco_optim
from raco_optim.integrations import trl as trl_module
from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
from tests import oracles
from tests import test_trl_trainer as base
from tests.test_trl_settings import SGD, THREE, Watch, logs, lora
from tests.test_trl_trainer import (
    BETA,
    WEIGHTS,
    Settings,
    assert_close,
    log_ratio,
    make_trainer,
    parameters,
    trained,
)
from tests.tiny_language_models import tiny_model, tiny_pairs, tiny_tokenizer

pytestmark = base.pytestmark
offline, settings = base.offline, base.settings

STEP: Settings = SGD | {"learning_rate": 1.0}


def optimizer_of(trainer: MultiObjectiveDPOTrainer) -> Any:
    return raco_optim.unwrap(trainer.optimizer)


def with_optimizer(
    settings: Settings, optimizer: Callable[..., Any], **changed: Any
) -> MultiObjectiveDPOTrainer:
    """A trainer with an optimizer of the user's."""
    model = tiny_model()
    return MultiObjectiveDPOTrainer(
        model,
        copy.deepcopy(model),
        MultiObjectiveDPOConfig(**{"weights": WEIGHTS} | settings | changed),
        train_dataset=Dataset.from_list(tiny_pairs(8)),
        eval_dataset=Dataset.from_list(tiny_pairs(3)),
        processing_class=tiny_tokenizer(),
        optimizers=(optimizer(model.parameters()), None),
    )


class TestReport:
    @pytest.mark.parametrize("method", ["raco", "cagrad", "mgda"])
    def test_says_what_the_last_step_did(self, settings: Settings, method: str) -> None:
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

    @pytest.mark.parametrize("config", [None, lora()], ids=["full", "lora"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("mode", ["per_example", "dense"])
    def test_one_backward_pass_by_default(
        self, settings: Settings, config: LoraConfig | None, checkpointing: bool, mode: str
    ) -> None:
        settings |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing}
        settings |= {"gradients": mode} if mode == "dense" else {}
        trainer = make_trainer(settings, tiny_pairs(16, missing=0.3), peft_config=config)
        seen = []

        def look(*_: Any, optimizer: Any, **__: Any) -> None:
            seen.append(raco_optim.unwrap(optimizer).report.gradients)

        trainer.add_callback(Watch("on_pre_optimizer_step", look))
        trainer.train()
        assert seen == [mode] * 2

    def test_adapters_after_a_forward_pass_that_failed(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a larger batch, whose graph nobody went back through."""
        original, calls, seen = trl_module.completion_log_probs, itertools.count(), []

        def too_large(*arguments: Any) -> Tensor:
            found = original(*arguments)
            if next(calls) == 0:
                raise RuntimeError("CUDA out of memory.")
            return found

        def look(*_: Any, optimizer: Any, **__: Any) -> None:
            seen.append(raco_optim.unwrap(optimizer).report.gradients)

        monkeypatch.setattr(trl_module, "completion_log_probs", too_large)
        rows, options = tiny_pairs(12), SGD | {"auto_find_batch_size": True}
        trainer = make_trainer(settings, rows, peft_config=lora(), **options)
        trainer.add_callback(Watch("on_step_end", look))
        trainer.train()
        assert seen == ["per_example"] * 2
        monkeypatch.setattr(trl_module, "completion_log_probs", original)
        smaller = SGD | {"per_device_train_batch_size": 3}
        expected = trained(settings, rows, peft_config=lora(), **smaller)
        assert_close(parameters(trainer), expected, 0.0)

    @pytest.mark.filterwarnings("ignore")  # of torch, about its compiler's options
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_compiled_adapters(self, settings: Settings, checkpointing: bool) -> None:
        rows, options = tiny_pairs(8), SGD | {"gradient_checkpointing": checkpointing}
        compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
        trainer = make_trainer(settings, rows, peft_config=lora(), **options, **compiled)
        trainer.train()
        assert optimizer_of(trainer).report.gradients.startswith("dense: ")
        plain = trained(settings, rows, peft_config=lora(), **options)
        assert_close(parameters(trainer), plain, 1e-5)

    def test_step_logger_in_a_callback(self, settings: Settings, tmp_path: Path) -> None:
        path = tmp_path / "steps.jsonl"
        trainer = make_trainer(settings, tiny_pairs(12), max_steps=3)
        with raco_optim.StepLogger(path) as logger:

            def log(state: Any, *_: Any, optimizer: Any, **__: Any) -> None:
                logger.log(optimizer, state.global_step)

            trainer.add_callback(Watch("on_step_end", log))
            trainer.train()
        found = raco_optim.read_steps(path)
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
        losses: dict[str, Tensor] = {}

        def change(state: Any, *_: Any, optimizer: Any, **__: Any) -> None:
            if state.global_step == 1:
                found = raco_optim.unwrap(optimizer)
                found.weights, found.c = weights, 0.0
                losses.update(base.losses_by_hand(model, reference, rows[4:]))
                total = sum(weights[name] * loss for name, loss in losses.items())
                gradients = torch.autograd.grad(total, list(model.parameters()))
                pairs = zip(model.parameters(), gradients, strict=True)
                expected.extend(p.detach() - 0.3 * g for p, g in pairs)

        trainer = MultiObjectiveDPOTrainer(
            model,
            reference,
            MultiObjectiveDPOConfig(**settings | SGD, weights=WEIGHTS),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )
        trainer.add_callback(Watch("on_step_end", change))
        trainer.train()
        for p, end in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), end, rtol=1e-4, atol=1e-6)
        first, second = logs(trainer)
        assert first["alpha/helpful"] != WEIGHTS["helpful"]
        assert {name: second[f"alpha/{name}"] for name in weights} == weights
        total = sum(weights[name] * loss.item() for name, loss in losses.items())
        assert second["loss"] == pytest.approx(total, rel=1e-4)

    def test_before_the_first_step(self, settings: Settings) -> None:
        rows = tiny_pairs(8)
        trainer = make_trainer(settings, rows)
        trainer.create_optimizer()
        optimizer_of(trainer).c = 0.0
        trainer.train()
        assert_close(parameters(trainer), trained(settings, rows, method="linear"), 1e-5)

    def test_what_was_set_is_refused_as_in_the_config(self, settings: Settings) -> None:
        trainer = make_trainer(settings, tiny_pairs(4))
        trainer.create_optimizer()
        with pytest.raises(ValueError, match=r"`c` must be in \[0, 1\)"):
            optimizer_of(trainer).c = 1.5
        with pytest.raises(ValueError, match="`weights` must stay a mapping with"):
            optimizer_of(trainer).weights = {"helpful": 0.5, "brief": 0.5}

    def test_evaluation_keeps_the_yardstick(self, settings: Settings) -> None:
        trainer = make_trainer(settings, tiny_pairs(8), eval_rows=tiny_pairs(5))
        trainer.train()
        before = trainer.evaluate()
        optimizer_of(trainer).weights = {"helpful": 0.1, "harmless": 0.9}
        assert trainer.evaluate()["eval_loss"] == before["eval_loss"]

    @pytest.mark.parametrize("method", ["raco", "mgda"])
    def test_resumes_with_what_was_set(self, settings: Settings, method: str) -> None:
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
            trainer.add_callback(base._StopAt(stop))
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

    def test_resuming_says_nothing_where_nothing_was_set(
        self, settings: Settings, recwarn: pytest.WarningsRecorder
    ) -> None:
        settings |= {"save_strategy": "steps", "save_steps": 1}
        make_trainer(settings, tiny_pairs(8), max_steps=1).train()
        make_trainer(settings, tiny_pairs(8), max_steps=2).train(resume_from_checkpoint=True)
        assert not [w for w in recwarn if "from its checkpoint" in str(w.message)]


class TestNonfinite:
    @pytest.fixture
    def spoil(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        """Makes the scores of one forward pass NaN."""
        original = trl_module.completion_log_probs

        def choose(number: int) -> None:
            calls = itertools.count()
            monkeypatch.setattr(
                trl_module,
                "completion_log_probs",
                lambda *args: original(*args) * (math.nan if next(calls) == number else 1.0),
            )

        return choose

    @pytest.mark.parametrize("parts", [1, 2])
    @pytest.mark.parametrize("config", [None, lora()], ids=["full", "lora"])
    def test_skipped_step_is_as_if_it_had_not_been(
        self,
        settings: Settings,
        spoil: Callable[[int], None],
        parts: int,
        config: LoraConfig | None,
    ) -> None:
        rows = tiny_pairs(12)
        settings |= {
            "per_device_train_batch_size": 4 // parts,
            "gradient_accumulation_steps": parts,
        }
        expected = make_trainer(settings, [*rows[:4], *rows[8:]], peft_config=config)
        expected.train()
        spoil(parts)  # the second step, or its first micro-batch
        changed = {"nonfinite": "skip", "max_steps": 3}
        trainer = make_trainer(settings, rows, peft_config=config, **changed)
        trainer.train()
        assert_close(parameters(trainer), parameters(expected), 0.0)
        assert optimizer_of(trainer).report.skipped == 1
        first, skipped, last = logs(trainer)
        assert [entry.get("skipped") for entry in (first, skipped, last)] == [None, 1, 1]
        assert skipped["labelled/helpful"] == 0
        assert not {"p/helpful", "loss/helpful", "margin/helpful"} & skipped.keys()
        assert last["loss/helpful"] == logs(expected)[1]["loss/helpful"]
        assert all(math.isfinite(x) for entry in logs(trainer) for x in entry.values())

    def test_error_names_objective_and_remedy(
        self, settings: Settings, spoil: Callable[[int], None]
    ) -> None:
        spoil(0)
        with pytest.raises(FloatingPointError, match='loss .helpful. is NaN .* nonfinite="skip"'):
            make_trainer(settings, tiny_pairs(8)).train()

    @pytest.mark.parametrize("method", ["linear", "amopo", "modpo"])
    def test_one_loss_cannot_be_skipped(self, settings: Settings, method: str) -> None:
        with pytest.raises(ValueError, match=f"`nonfinite` must be 'raise' with .*'{method}'"):
            MultiObjectiveDPOConfig(**settings, weights=WEIGHTS, method=method, nonfinite="skip")

    def test_other_ways(self, settings: Settings) -> None:
        with pytest.raises(ValueError, match="`nonfinite` must be one of 'raise', 'skip'"):
            MultiObjectiveDPOConfig(**settings, weights=WEIGHTS, nonfinite="propagate")


class TestInnerOptimizer:
    @pytest.mark.parametrize(
        "optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "rmsprop", "adagrad", "sgd"]
    )
    def test_choices_of_the_trainer(self, settings: Settings, optim: str) -> None:
        """With c = 0, the step along the weighted gradient that TRL's trainer takes."""
        rows = tiny_pairs(8, missing=0.3)
        settings |= {"optim": optim, "lr_scheduler_type": "cosine", "warmup_steps": 1}
        assert_close(trained(settings, rows, c=0.0), trained(settings, rows, method="linear"), 1e-4)

    def test_modes_of_an_optimizer(self, settings: Settings) -> None:
        """As schedule-free ones have them: other weights in evaluations than in training."""
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
        with pytest.raises(ValueError, match="`optimizers` must hold the inner .* got CAGradClip"):
            with_optimizer(
                settings,
                lambda params: raco_optim.CAGradClip(torch.optim.SGD(params), WEIGHTS),
                method=method,
            )

    def test_stepping_in_the_backward_pass(self, settings: Settings) -> None:
        """The optimizer refuses by name what the name of `optim` does not tell."""

        class AdaLomo(torch.optim.SGD):
            pass

        with pytest.raises(ValueError, match="`inner` must step after .* got AdaLomo"):
            with_optimizer(settings, AdaLomo)


# --- Objectives that are absent ------------------------------------------------------------------


def gradient_of(model: Any, reference: Any, rows: list[dict[str, Any]], objective: str) -> Tensor:
    """Gradient of an objective's DPO loss, from the logits, as one vector."""
    terms = []
    for row in rows:
        sign = row[f"pref_{objective}"]
        if sign:
            delta = log_ratio(model, row) - log_ratio(reference, row).detach()
            terms.append(-logsigmoid(BETA * sign * delta))
    gradients = torch.autograd.grad(sum(terms) / len(terms), list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients]).double()


def flat(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


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
        trainer = MultiObjectiveDPOTrainer(
            model,
            reference,
            MultiObjectiveDPOConfig(**options, weights=WEIGHTS, method=method, c=0.4),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )
        expected: list[Tensor] = []

        def predict(state: Any, *_: Any, **__: Any) -> None:
            row = rows[state.global_step]
            name = "harmless" if row["pref_helpful"] is None else "helpful"
            model.eval()
            g = gradient_of(model, reference, [row], name)
            assert g.norm() > 1e-3
            expected.append(flat(model).double() - factor[name] * g)

        ends: list[Tensor] = []
        trainer.add_callback(Watch("on_step_begin", predict))
        trainer.add_callback(Watch("on_step_end", lambda *_, **__: ends.append(flat(model))))
        trainer.train()
        assert len(ends) == 4
        for end, by_hand in zip(ends, expected, strict=True):
            torch.testing.assert_close(end.double(), by_hand, rtol=1e-4, atol=1e-6)
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
        rows = [dict(row, pref_b=None) for row in tiny_pairs(6, tuple(THREE), missing=0.3, seed=4)]
        later = tiny_pairs(1, tuple(THREE))
        model, reference, c = tiny_model(seed=1), tiny_model(seed=2), 0.7
        g = torch.stack([gradient_of(model, reference, rows, name) for name in ("a", "c")])
        w = torch.tensor([THREE["a"], THREE["c"]], dtype=torch.float64)
        shares = w / w.sum()
        truth = torch.as_tensor(oracles.exact_minimum((g @ g.T).numpy(), shares.numpy(), c).p)
        g0, direction = w @ g, torch.minimum(truth, shares) @ g
        expected = g0 + c * g0.norm() * direction / direction.norm()
        assert c * g0.norm() > 1e-3  # there is a correction

        before = flat(model)
        options = settings | STEP | {"max_steps": 1, "per_device_train_batch_size": 6 // parts}
        trainer = MultiObjectiveDPOTrainer(
            model,
            reference,
            MultiObjectiveDPOConfig(
                **options, weights=THREE, c=c, gradient_accumulation_steps=parts
            ),
            train_dataset=Dataset.from_list(rows + later),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        torch.testing.assert_close((before - flat(model)).double(), expected, rtol=1e-3, atol=1e-6)
        report = optimizer_of(trainer).report
        assert report.absent == ("b",)
        assert report.p.isnan().tolist() == [False, True, False]
        for name, p in zip(("a", "c"), truth, strict=True):
            assert logs(trainer)[0][f"p/{name}"] == pytest.approx(p.item(), abs=1e-5)

    def test_step_without_any_label_has_no_report(self, settings: Settings) -> None:
        rows = [
            dict(row, pref_helpful=0, pref_harmless=None) if 4 <= i < 8 else row
            for i, row in enumerate(tiny_pairs(12))
        ]
        trainer = make_trainer(settings, rows, max_steps=3, **SGD)
        reports: list[Any] = []

        def look(*_: Any, optimizer: Any, **__: Any) -> None:
            reports.append(raco_optim.unwrap(optimizer).last_step)

        trainer.add_callback(Watch("on_step_end", look))
        trainer.train()
        assert reports[0] is reports[1] is not reports[2]
        assert "p/helpful" not in logs(trainer)[1]
        expected = trained(settings | SGD, [*rows[:4], *rows[8:]], max_steps=2)
        assert_close(parameters(trainer), expected, 0.0)
