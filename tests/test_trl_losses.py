"""What the trainer minimises: TRL's own losses, soft labels and weights, mixtures of experts."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
from tests import test_trl_trainer as base
from tests.test_trl_settings import SGD, logs, stream
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
from tests.tiny_language_models import WORDS, tiny_model, tiny_pairs, tiny_tokenizer

pytestmark = base.pytestmark
offline, settings = base.offline, base.settings

Rows = list[dict[str, Any]]


def agreed(count: int, *, length: int | None = None) -> Rows:
    """Pairs of which all objectives prefer the chosen answer, of a length or of any."""
    rows = [dict(row, pref_helpful=1, pref_harmless=1) for row in tiny_pairs(count)]
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
    """A mixture of experts whose auxiliary loss counts."""
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            router_aux_loss_coef=0.5,
            output_router_logits=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


class TestAgainstTRL:
    @pytest.mark.parametrize(
        "changed",
        [
            {"loss_type": "hinge"},
            {"loss_type": "robust", "label_smoothing": 0.1},
            {"loss_type": "apo_zero"},
            {"loss_type": "apo_down"},
            # MPO; TRL's mean of SFT runs over tokens, ours over answers: here they are as long.
            {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.5]},
        ],
        ids=lambda changed: str(changed["loss_type"]),
    )
    def test_losses(self, settings: Settings, changed: Settings) -> None:
        rows = agreed(8, length=5)
        settings |= SGD | changed
        trl, ours = stock(settings, rows), make_trainer(settings, rows, method="linear")
        ours.train()
        assert_close(parameters(ours), parameters(trl), 1e-6)
        for a, b in zip(logs(ours), logs(trl), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)

    def test_metrics(self, settings: Settings) -> None:
        """All of TRL's own, in training and in evaluation."""
        rows = agreed(8)
        settings |= SGD
        trl = stock(settings, rows)
        ours = make_trainer(settings, rows, eval_rows=rows[:3], method="linear")
        ours.train()
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
        for row, label, weight in zip(rows, labels, weights, strict=True):
            row.update(pref_helpful=label, weight_helpful=weight)
        model, reference = tiny_model(seed=1), tiny_model(seed=2)
        total = torch.zeros(())
        for row in (r for r in rows if r["pref_helpful"] and r["weight_helpful"] != 0):
            x = BETA * (log_ratio(model, row) - log_ratio(reference, row).detach())
            first = (1 + row["pref_helpful"]) / 2
            weight = 1.0 if row["weight_helpful"] is None else row["weight_helpful"]
            total = total - weight * (first * logsigmoid(x) + (1 - first) * logsigmoid(-x))
        loss = total / (1 + 2 + 0.25 + 1)
        trained_weights = list(model.parameters())
        expected = torch.autograd.grad(loss, trained_weights)
        start = [p.detach().clone() for p in trained_weights]
        options = settings | SGD | {"learning_rate": 1.0, "max_steps": 1, "c": 0.0}
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
        trainer = MultiObjectiveDPOTrainer(
            model,
            reference,
            MultiObjectiveDPOConfig(**options, weights={"helpful": 1.0}),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        for p, before, gradient in zip(trained_weights, start, expected, strict=True):
            torch.testing.assert_close(before - p.detach(), gradient, rtol=1e-4, atol=2e-6)
        [logged] = logs(trainer)
        assert logged["loss/helpful"] == pytest.approx(loss.item(), rel=1e-5)
        assert logged["labelled/helpful"] == 4

    @pytest.mark.parametrize("method", ["raco", "modpo", "amopo"])
    def test_weight_two_is_the_pair_twice(self, settings: Settings, method: str) -> None:
        rows = [dict(row, margin_harmless=0.3) for row in tiny_pairs(4)]
        settings |= SGD | {"method": method, "per_device_train_batch_size": 8, "max_steps": 1}
        twice = trained(settings, [*rows, rows[1]])
        for i, row in enumerate(rows):
            row.update(weight_helpful=1 + (i == 1), weight_harmless=1 + (i == 1))
        weighted = trained(settings, rows)
        assert_close(weighted, twice, 1e-5)

    def test_hard_labels_as_numbers_and_weights_of_one(self, settings: Settings) -> None:
        rows = tiny_pairs(8, missing=0.3)
        plain = trained(settings, rows)
        same = [dict(row, weight_helpful=1.0, weight_harmless=None) for row in rows]
        for row in same:
            for name in WEIGHTS:
                label = row[f"pref_{name}"]
                row[f"pref_{name}"] = None if label is None else float(label)
        assert_close(trained(settings, same), plain, 0.0)
        assert_close(trained(settings, stream(same)), plain, 0.0)

    @pytest.mark.parametrize("weight", [-1.0, math.inf, "heavy"])
    def test_bad_weight(self, settings: Settings, weight: object) -> None:
        rows = [dict(row, weight_helpful=weight) for row in tiny_pairs(4)]
        with pytest.raises(ValueError, match="column `weight_helpful` must hold weights"):
            make_trainer(settings, rows)

    def test_weights_of_zero_are_no_labels(self, settings: Settings) -> None:
        rows = [dict(row, weight_helpful=0) for row in tiny_pairs(4)]
        with pytest.raises(ValueError, match="must label at least one pair in `pref_helpful`"):
            make_trainer(settings, rows)


class TestMixtureOfExperts:
    @pytest.fixture
    def mixture(self) -> PreTrainedModel:
        return tiny_mixture()

    def test_weighted_sum_is_trl(self, settings: Settings, mixture: PreTrainedModel) -> None:
        rows = agreed(8)
        settings |= SGD | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        trl = stock(settings, rows, copy.deepcopy(mixture))
        for method in ("linear", "raco"):
            ours = make_trainer(
                settings, rows, model=copy.deepcopy(mixture), method=method, c=0.0, eval_rows=rows
            )
            ours.train()
            assert_close(parameters(ours), parameters(trl), 1e-5)
            for a, b in zip(logs(ours), logs(trl), strict=True):
                for key in ("loss", "aux_loss"):
                    assert a[key] == pytest.approx(b[key], rel=1e-5)
        metrics = ours.evaluate()
        total = sum(w * metrics[f"eval_loss/{name}"] for name, w in WEIGHTS.items())
        assert metrics["eval_loss"] == pytest.approx(total + 0.5 * metrics["eval_aux_loss"])

    def test_auxiliary_loss_is_not_mixed(
        self, settings: Settings, mixture: PreTrainedModel
    ) -> None:
        """Its gradient comes on top of what the objectives agree on without it."""
        rows = tiny_pairs(4)
        settings |= SGD | {"learning_rate": 1.0, "max_steps": 1, "c": 0.7}
        start = {n: p.detach().clone() for n, p in mixture.named_parameters()}
        ends = {
            coefficient: trained(
                settings,
                rows,
                model=copy.deepcopy(mixture),
                router_aux_loss_coef=coefficient,
            )
            for coefficient in (0.0, 0.5)
        }
        losses = []
        mixture.register_forward_hook(lambda *x: losses.append(x[-1].aux_loss))
        probe = make_trainer(settings | {"method": "linear"}, rows, model=mixture)
        batch = next(iter(probe.get_train_dataloader()))
        mixture.train()
        probe._forward(mixture, batch)
        gradients = torch.autograd.grad(losses[0], list(mixture.parameters()), allow_unused=True)
        for (name, before), gradient in zip(start.items(), gradients, strict=True):
            extra = torch.zeros_like(before) if gradient is None else 0.5 * gradient
            expected: Tensor = ends[0.0][name] - extra
            torch.testing.assert_close(ends[0.5][name], expected, rtol=1e-4, atol=1e-5)
        assert any(not torch.equal(ends[0.0][n], ends[0.5][n]) for n in start)

    def test_adapters_beside_the_experts(
        self, settings: Settings, mixture: PreTrainedModel
    ) -> None:
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        rows, settings = tiny_pairs(8), settings | SGD | {"gradient_checkpointing": True}
        plain = trained(settings, rows, model=mixture, peft_config=lora)
        assert all(torch.isfinite(p).all() for p in plain.values())


class TestReferenceFree:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> str:
        tiny_model().save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    @pytest.mark.parametrize("changed", [{"loss_type": ["simpo"]}, {"method": "amopo"}])
    def test_no_reference_is_loaded(
        self, settings: Settings, folder: str, changed: Settings
    ) -> None:
        """From a path, where TRL loads one, and from memory, where it has none to load."""
        ends = []
        for model in (folder, tiny_model()):
            trainer = MultiObjectiveDPOTrainer(
                model,
                args=MultiObjectiveDPOConfig(**settings | SGD | changed, weights=WEIGHTS),
                train_dataset=Dataset.from_list(tiny_pairs(8)),
                processing_class=tiny_tokenizer(),
            )
            assert trainer.ref_model is None
            assert not trainer.args.precompute_ref_log_probs
            trainer.train()
            ends.append(parameters(trainer))
        assert_close(ends[0], ends[1], 0.0)
        if "method" in changed:
            with pytest.raises(ValueError, match="needs a reference model, but the method amopo"):
                trainer.evaluate(Dataset.from_list(tiny_pairs(3)))
        else:
            assert math.isfinite(trainer.evaluate(Dataset.from_list(tiny_pairs(3)))["eval_loss"])

    def test_amopo_is_measured_by_the_loss_of_all(self, settings: Settings, folder: str) -> None:
        trainer = MultiObjectiveDPOTrainer(
            folder,
            args=MultiObjectiveDPOConfig(**settings, method="amopo", weights=WEIGHTS),
            train_dataset=Dataset.from_list(tiny_pairs(4)),
            eval_dataset=Dataset.from_list(tiny_pairs(3)),
        )
        assert trainer.ref_model is not None
        assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2))

    def test_reference_that_would_never_run(self, settings: Settings) -> None:
        with pytest.raises(ValueError, match="`ref_model` must be None with the loss simpo"):
            MultiObjectiveDPOTrainer(
                tiny_model(),
                tiny_model(),
                MultiObjectiveDPOConfig(**settings, loss_type="simpo", weights=WEIGHTS),
                train_dataset=Dataset.from_list(tiny_pairs(4)),
                processing_class=tiny_tokenizer(),
            )
