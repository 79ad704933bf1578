"""The trainer's losses: those of TRL, soft labels and weights, mixtures of experts."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from tests import test_trl_trainer as base
from tests.test_trl_trainer import (
    BETA,
    SGD,
    STEP,
    WEIGHTS,
    Rows,
    Settings,
    assert_close,
    flat,
    gradient_of,
    log_ratio,
    logs,
    make_trainer,
    parameters,
    trained,
)
from tests.tiny_language_models import WORDS, tiny_model, tiny_pairs, tiny_tokenizer

pytestmark = base.pytestmark
offline, settings = base.offline, base.settings

MICRO: Settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
SCHEDULE: Settings = {"warmup_steps": 1, "max_steps": 3, "lr_scheduler_type": "linear"}


def agreed(count: int, *, length: int | None = None) -> Rows:
    """Pairs of which all objectives prefer the chosen answer, of a length or of any."""
    rows = [row | {"pref_helpful": 1, "pref_harmless": 1} for row in tiny_pairs(count)]
    for i, row in enumerate(rows):
        if length is not None:
            row["chosen"] = " ".join(WORDS[(i + j) % len(WORDS)] for j in range(length))
            row["rejected"] = " ".join(WORDS[(3 * i + 2 * j) % len(WORDS)] for j in range(length))
    return rows


def stock(settings: Settings, rows: Rows, model: PreTrainedModel | None = None) -> DPOTrainer:
    """TRL's trainer, after training."""
    model = tiny_model() if model is None else model
    trainer = DPOTrainer(
        model,
        copy.deepcopy(model),
        DPOConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:3]),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer


def tiny_mixture() -> PreTrainedModel:
    return tiny_model("mixtral")


class TestAgainstTRL:
    @pytest.mark.parametrize(
        "changed",
        [
            MICRO | SCHEDULE | {"loss_type": "sigmoid"},
            MICRO | SCHEDULE | {"loss_type": "ipo"},
            MICRO | SCHEDULE | {"loss_type": "sigmoid_norm"},
            SGD | {"loss_type": "hinge"},
            SGD | {"loss_type": "robust", "label_smoothing": 0.1},
            SGD | {"loss_type": "apo_zero"},
            SGD | {"loss_type": "apo_down"},
            # MPO. TRL's mean of SFT is over tokens, ours over answers: here they are as long.
            SGD | {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.5]},
        ],
        ids=lambda changed: str(changed["loss_type"]),
    )
    def test_losses(self, settings: Settings, changed: Settings) -> None:
        rows = agreed(16, length=5 if "loss_weights" in changed else None)
        settings |= changed
        trl, ours = stock(settings, rows), make_trainer(settings, rows, method="linear")
        ours.train()
        assert_close(parameters(ours), parameters(trl), 1e-6)
        for a, b in zip(logs(ours), logs(trl), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)

    def test_metrics(self, settings: Settings) -> None:
        """All of TRL's own, in training and in evaluation."""
        rows = agreed(8)
        settings |= SGD
        trl = stock(settings, rows)
        ours = make_trainer(settings, rows, eval_rows=rows[:3], method="linear")
        ours.train()
        for a, b in zip(logs(ours), logs(trl), strict=True):
            assert a["margin/helpful"] == pytest.approx(b["rewards/margins"], abs=1e-5)
        pairs = [*zip(logs(ours), logs(trl), strict=True), (ours.evaluate(), trl.evaluate())]
        for a, b in pairs:
            own = {k: x for k, x in b.items() if not any(t in k for t in ("second", "runtime"))}
            assert {"logps/chosen", "eval_logps/chosen"} & own.keys()
            assert {k: a[k] for k in own} == pytest.approx(own, rel=1e-4, abs=1e-6)

    def test_metrics_do_not_depend_on_micro_batches(self, settings: Settings) -> None:
        found = []
        for size in (8, 2):
            parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
            trainer = make_trainer(settings | SGD | parts | {"max_steps": 1}, tiny_pairs(8))
            trainer.train()
            found.append(logs(trainer)[0])
        assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


class TestLabels:
    def test_soft_labels_and_weights_by_hand(self, settings: Settings) -> None:
        """The gradient of a formula on logits, in micro-batches of one pair."""
        rows = tiny_pairs(6, seed=3)
        labels, weights = [0.5, -1.0, 0.2, None, 1.0, -0.7], [1.0, 2.0, 0.25, 1.0, 0.0, None]
        model, reference = tiny_model(seed=1), tiny_model(seed=2)
        total = torch.zeros(())
        for row, label, weight in zip(rows, labels, weights, strict=True):
            row.update(pref_helpful=label, weight_helpful=weight)
            if label and weight != 0:
                x = BETA * (log_ratio(model, row) - log_ratio(reference, row).detach())
                first = (1 + label) / 2
                expected = first * logsigmoid(x) + (1 - first) * logsigmoid(-x)
                total = total - (1.0 if weight is None else weight) * expected
        loss = total / (1 + 2 + 0.25 + 1)
        gradient, start = gradient_of(loss, model), flat(model)
        options = settings | STEP | {"weights": {"helpful": 1.0}, "c": 0.0}
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
        trainer = make_trainer(options, rows, model=model, reference=reference)
        trainer.train()
        torch.testing.assert_close(start - flat(model), gradient, rtol=1e-4, atol=2e-6)
        [logged] = logs(trainer)
        assert logged["loss/helpful"] == pytest.approx(loss.item(), rel=1e-5)
        assert logged["labelled/helpful"] == 4

    @pytest.mark.parametrize("method", ["raco", "modpo", "amopo"])
    def test_weight_two_is_the_pair_twice(self, settings: Settings, method: str) -> None:
        rows = [row | {"margin_harmless": 0.3} for row in tiny_pairs(4)]
        settings |= SGD | {"method": method, "per_device_train_batch_size": 8, "max_steps": 1}
        twice = trained(settings, [*rows, rows[1]])
        for i, row in enumerate(rows):
            row.update(weight_helpful=1 + (i == 1), weight_harmless=1 + (i == 1))
        assert_close(trained(settings, rows), twice, 1e-5)


class TestMixtureOfExperts:
    def test_weighted_sum_is_trl(self, settings: Settings) -> None:
        rows = agreed(8)
        settings |= SGD | MICRO
        trl = stock(settings, rows, tiny_mixture())
        for method in ("linear", "raco"):
            options = settings | {"method": method, "c": 0.0}
            ours = make_trainer(options, rows, model=tiny_mixture(), eval_rows=rows)
            ours.train()
            assert_close(parameters(ours), parameters(trl), 1e-5)
            for a, b in zip(logs(ours), logs(trl), strict=True):
                for key in ("loss", "aux_loss"):
                    assert a[key] == pytest.approx(b[key], rel=1e-5)
        metrics = ours.evaluate()
        total = sum(w * metrics[f"eval_loss/{name}"] for name, w in WEIGHTS.items())
        assert metrics["eval_loss"] == pytest.approx(total + 0.5 * metrics["eval_aux_loss"])

    def test_auxiliary_loss_is_not_mixed(self, settings: Settings) -> None:
        """Its gradient is added to the combined gradient of the objectives."""
        rows, mixture = tiny_pairs(4), tiny_mixture()
        settings |= STEP | {"c": 0.7}
        without, with_it = (
            trained(settings, rows, model=tiny_mixture(), router_aux_loss_coef=coefficient)
            for coefficient in (0.0, 0.5)
        )
        losses: list[Any] = []
        mixture.register_forward_hook(lambda *x: losses.append(x[-1].aux_loss))
        probe = make_trainer(settings | {"method": "linear"}, rows, model=mixture)
        mixture.train()
        probe._forward(mixture, next(iter(probe.get_train_dataloader())))
        named = dict(mixture.named_parameters())
        gradients = torch.autograd.grad(losses[0], list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            extra = 0 if gradient is None else 0.5 * gradient
            torch.testing.assert_close(with_it[name], without[name] - extra, rtol=1e-4, atol=1e-5)
        assert any(not torch.equal(without[n], with_it[n]) for n in named)

    def test_adapters_beside_the_experts(self, settings: Settings) -> None:
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        settings |= SGD | {"gradient_checkpointing": True}
        plain = trained(settings, tiny_pairs(8), model=tiny_mixture(), peft_config=lora)
        assert all(torch.isfinite(p).all() for p in plain.values())


class TestReferenceFree:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> str:
        tiny_model().save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    @pytest.mark.parametrize("changed", [{"loss_type": ["simpo", "sft"]}, {"method": "amopo"}])
    def test_no_reference_is_loaded(
        self, settings: Settings, folder: str, changed: Settings
    ) -> None:
        """From a path, where TRL loads one, and from memory, where it has none to load."""
        ends = []
        for model in (folder, tiny_model()):
            options = settings | SGD | changed
            trainer = make_trainer(options, tiny_pairs(8), model=model, reference=None)
            assert trainer.ref_model is None
            assert not trainer.args.precompute_ref_log_probs
            trainer.train()
            ends.append(parameters(trainer))
        assert_close(*ends, 0.0)
        if "method" in changed:
            with pytest.raises(ValueError, match="needs a reference model, but the method amopo"):
                trainer.evaluate(Dataset.from_list(tiny_pairs(3)))
        else:
            assert math.isfinite(trainer.evaluate(Dataset.from_list(tiny_pairs(3)))["eval_loss"])

    def test_amopo_is_measured_by_the_loss_of_all(self, settings: Settings, folder: str) -> None:
        settings |= {"method": "amopo"}
        rows = tiny_pairs(4)
        trainer = make_trainer(settings, rows, model=folder, reference=None, eval_rows=rows[:3])
        assert trainer.ref_model is not None
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(math.log(2))
        assert metrics["eval_accuracy/helpful"] == 0.5, "a margin of 0 counts half"

    def test_reference_that_would_never_run(self, settings: Settings) -> None:
        with pytest.raises(ValueError, match="`ref_model` must be None with the loss simpo"):
            make_trainer(settings, tiny_pairs(4), reference=tiny_model(), loss_type="simpo")
