"""The trainer: each step against a computation by hand, and what is TRL's against TRL."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer

from raco_optim.gradients.per_example import LayerGradients
from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
from raco_optim.integrations.trl_config import METHODS
from tests import oracles
from tests.tiny_language_models import FAMILIES, tiny_model, tiny_pairs, tiny_tokenizer

# Of TRL, transformers and their friends, about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WEIGHTS = {"helpful": 0.7, "harmless": 0.3}
BETA = 0.5
Settings = dict[str, Any]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return {
        "output_dir": str(tmp_path / "run"),
        "beta": BETA,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }


def make_trainer(
    settings: Settings,
    rows: list[dict[str, Any]] | IterableDataset,
    *,
    model: PreTrainedModel | None = None,
    eval_rows: list[dict[str, Any]] | None = None,
    peft_config: LoraConfig | None = None,
    **changed: Any,
) -> MultiObjectiveDPOTrainer:
    model = tiny_model() if model is None else model
    options = {"weights": dict(WEIGHTS)} | settings | changed
    reference = None
    early = options.get("precompute_ref_log_probs")
    free = options.get("loss_type") in (["simpo"], ["sft"], "simpo")
    if peft_config is None and not early and not free:
        reference = copy.deepcopy(model)
    return MultiObjectiveDPOTrainer(
        model,
        reference,
        MultiObjectiveDPOConfig(**options),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def trained(settings: Settings, rows: Any, **changed: Any) -> dict[str, Tensor]:
    trainer = make_trainer(settings, rows, **changed)
    trainer.train()
    return parameters(trainer)


def parameters(trainer: DPOTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def log_ratio(model: PreTrainedModel, row: dict[str, Any]) -> Tensor:
    """log pi(chosen) - log pi(rejected), from the logits."""
    tokenizer = tiny_tokenizer()
    prompt = len(tokenizer(row["prompt"])["input_ids"])
    sums = []
    for answer in ("chosen", "rejected"):
        ids = torch.tensor([tokenizer(row["prompt"] + row[answer] + "<eos>")["input_ids"]])
        log_probs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        each = log_probs.gather(1, ids[0, 1:, None])[:, 0]
        sums.append(each[prompt - 1 :].sum())
    return sums[0] - sums[1]


def losses_by_hand(
    model: PreTrainedModel, reference: PreTrainedModel, rows: list[dict[str, Any]]
) -> dict[str, Tensor]:
    deltas = [log_ratio(model, row) - log_ratio(reference, row).detach() for row in rows]
    found = {}
    for name in WEIGHTS:
        signs = [row[f"pref_{name}"] for row in rows]
        terms = [
            -torch.nn.functional.logsigmoid(BETA * s * d)
            for s, d in zip(signs, deltas, strict=True)
            if s
        ]
        found[name] = sum(terms) / len(terms)
    return found


class TestAgainstHand:
    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_step_is_that_of_algorithm_1(self, settings: Settings, accumulation: int) -> None:
        """From logits to the update of SGD, without the library."""
        rows = tiny_pairs(6, missing=0.4, seed=3)
        model, reference = tiny_model(seed=1), tiny_model(seed=2)
        c, w = 0.6, torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
        losses = losses_by_hand(model, reference, rows)
        named = dict(model.named_parameters())
        gradients = [
            torch.autograd.grad(loss, list(named.values()), retain_graph=True)
            for loss in losses.values()
        ]
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients]).double()
        gram = flat @ flat.T
        truth = oracles.exact_minimum(gram.numpy(), w.numpy(), c)
        p = torch.as_tensor(truth.p)
        clipped = torch.minimum(p, w)
        direction = clipped @ flat
        g0 = w @ flat
        expected = g0 + c * g0.norm() * direction / direction.norm()
        before = torch.cat([q.detach().flatten() for q in named.values()])

        trainer = MultiObjectiveDPOTrainer(
            model,
            reference,
            MultiObjectiveDPOConfig(
                **settings
                | {
                    "weights": WEIGHTS,
                    "c": c,
                    "optim": "sgd",
                    "learning_rate": 1.0,
                    "max_grad_norm": 0.0,
                    "max_steps": 1,
                    "per_device_train_batch_size": 6 // accumulation,
                    "gradient_accumulation_steps": accumulation,
                }
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        after = torch.cat([q.detach().flatten() for q in model.parameters()])
        torch.testing.assert_close((before - after).double(), expected, rtol=1e-4, atol=1e-6)

        logged = trainer.state.log_history[0]
        total = sum(w * losses[name].item() for name, w in WEIGHTS.items())
        assert logged["loss"] == pytest.approx(total, rel=1e-4)
        for i, name in enumerate(WEIGHTS):
            assert logged[f"loss/{name}"] == pytest.approx(losses[name].item(), rel=1e-5)
            assert logged[f"p/{name}"] == pytest.approx(p[i].item(), abs=1e-5)
            assert logged[f"p_clipped/{name}"] == pytest.approx(clipped[i].item(), abs=1e-5)
            assert logged[f"grad_norm/{name}"] == pytest.approx(flat[i].norm().item(), rel=1e-4)
        cosine = gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()
        assert logged["cosine/helpful/harmless"] == pytest.approx(cosine.item(), abs=1e-5)

    def test_evaluation_is_over_all_labelled_pairs(self, settings: Settings) -> None:
        rows = tiny_pairs(8, missing=0.4, seed=5)
        model, reference = tiny_model(seed=1), tiny_model(seed=2)
        trainer = MultiObjectiveDPOTrainer(
            model,
            reference,
            MultiObjectiveDPOConfig(**settings, weights=WEIGHTS),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )
        metrics = trainer.evaluate()
        with torch.no_grad():
            losses = losses_by_hand(model, reference, rows)
            deltas = [(log_ratio(model, r) - log_ratio(reference, r)).item() for r in rows]
        for name in WEIGHTS:
            margins = [
                BETA * row[f"pref_{name}"] * delta
                for row, delta in zip(rows, deltas, strict=True)
                if row[f"pref_{name}"]
            ]
            assert metrics[f"eval_labelled/{name}"] == len(margins)
            assert metrics[f"eval_loss/{name}"] == pytest.approx(losses[name].item(), rel=1e-4)
            mean = sum(margins) / len(margins)
            assert metrics[f"eval_margin/{name}"] == pytest.approx(mean, rel=1e-3, abs=1e-6)
            right = sum(margin > 0 for margin in margins) / len(margins)
            assert metrics[f"eval_accuracy/{name}"] == pytest.approx(right)
        total = sum(w * losses[name].item() for name, w in WEIGHTS.items())
        assert metrics["eval_loss"] == pytest.approx(total, rel=1e-4)

    def test_reference_model_scores_one_half(self, settings: Settings) -> None:
        trainer = make_trainer(settings, tiny_pairs(4), eval_rows=tiny_pairs(6))
        metrics = trainer.evaluate()
        for name in WEIGHTS:
            assert metrics[f"eval_loss/{name}"] == pytest.approx(math.log(2))
            assert metrics[f"eval_accuracy/{name}"] == 0.5


class TestAgainstTRL:
    @pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm"])
    def test_agreeing_objectives_are_trl(self, settings: Settings, loss_type: str) -> None:
        rows = tiny_pairs(16)
        for row in rows:
            row.update(pref_helpful=1, pref_harmless=1)
        settings |= {"loss_type": [loss_type], "gradient_accumulation_steps": 2, "warmup_steps": 1}
        settings |= {
            "max_steps": 3,
            "lr_scheduler_type": "linear",
            "per_device_train_batch_size": 2,
        }
        model = tiny_model()
        stock = DPOTrainer(
            model,
            copy.deepcopy(model),
            DPOConfig(**settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )
        ours = make_trainer(settings, rows, method="linear")
        stock.train()
        ours.train()
        assert_close(parameters(ours), parameters(stock), 1e-6)
        for a, b in zip(ours.state.log_history[:3], stock.state.log_history[:3], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
            assert a["accuracy/helpful"] >= b["rewards/accuracies"]  # ties count half here
            assert a["margin/helpful"] == pytest.approx(
                b["rewards/margins"] if loss_type == "sigmoid" else a["margin/helpful"], abs=1e-5
            )

    def test_clipping_sees_the_combined_gradient(self, settings: Settings) -> None:
        rows = tiny_pairs(8)
        settings |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.05, "max_steps": 1}
        start = {n: p.detach() for n, p in tiny_model().named_parameters()}
        trainer = make_trainer(settings, rows)
        trainer.train()
        end = parameters(trainer)
        moved = math.sqrt(sum((end[n] - start[n]).square().sum().item() for n in end))
        assert moved == pytest.approx(0.05, rel=1e-3)
        assert trainer.state.log_history[0]["grad_norm"] > 0.05

    def test_one_forward_pass_a_batch(self, settings: Settings) -> None:
        model = tiny_model()
        trainer = make_trainer(settings, tiny_pairs(8), model=model)
        calls = []
        model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        assert len(calls) == settings["max_steps"]


class TestLimits:
    def test_zero_radius_is_the_weighted_sum(self, settings: Settings) -> None:
        rows = tiny_pairs(8, missing=0.3)
        linear = trained(settings, rows, method="linear")
        assert_close(trained(settings, rows, method="raco", c=0.0), linear, 1e-5)
        assert_close(trained(settings, rows, method="cagrad", c=0.0), linear, 1e-5)

    def test_one_objective_is_dpo(self, settings: Settings) -> None:
        """m = 1: p = w = 1, so the gradient is 1 + c times as long."""
        rows = tiny_pairs(8)
        one = {"weights": {"helpful": 1.0}, "max_grad_norm": 0.0, "optim": "sgd"}
        raco = trained(settings, rows, learning_rate=0.1, c=0.25, **one)
        dpo = trained(settings, rows, learning_rate=0.125, method="linear", **one)
        assert_close(raco, dpo, 1e-6)

    @pytest.mark.parametrize("method", ["raco", "linear", "amopo"])
    def test_micro_batches_change_nothing(self, settings: Settings, method: str) -> None:
        rows = tiny_pairs(16, missing=0.5, seed=7)
        whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
        a = trained(settings, rows, method=method, **whole)
        assert_close(a, trained(settings, rows, method=method, **parts), 1e-4)

    @pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_one_backward_pass_for_all_losses_is_one_for_each(
        self,
        settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        checkpointing: bool,
        adapters: bool,
    ) -> None:
        rows = tiny_pairs(16, missing=0.3)
        changed = {"gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing}

        lora = LoraConfig(r=2, target_modules="all-linear") if adapters else None

        served = []
        original = LayerGradients.gradients

        def watched(*arguments: Any, **options: Any) -> Any:
            found = original(*arguments, **options)
            served.append(found[1])
            return found

        monkeypatch.setattr(LayerGradients, "gradients", watched)
        together = trained(settings, rows, peft_config=lora, **changed)
        assert served and not any(served)
        each = trained(settings, rows, peft_config=lora, gradients="dense", **changed)
        assert_close(each, together, 1e-5)

    @pytest.mark.parametrize("method", ["raco", "linear"])
    def test_checkpointing_changes_nothing(self, settings: Settings, method: str) -> None:
        rows = tiny_pairs(8)
        a = trained(settings, rows, method=method)
        b = trained(settings, rows, method=method, gradient_checkpointing=True)
        assert_close(a, b, 1e-6)

    def test_precomputed_reference_changes_nothing(self, settings: Settings) -> None:
        rows = tiny_pairs(8)
        plain = make_trainer(settings, rows, eval_rows=rows)
        early = make_trainer(settings, rows, eval_rows=rows, precompute_ref_log_probs=True)
        plain.train()
        early.train()
        assert_close(parameters(plain), parameters(early), 1e-5)
        a, b = plain.evaluate(), early.evaluate()
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-5)

    def test_unlabelled_pairs_change_nothing(self, settings: Settings) -> None:
        rows = tiny_pairs(4)
        tie = dict(tiny_pairs(1, seed=9)[0], pref_helpful=0, pref_harmless=None)
        settings |= {"max_steps": 1}
        assert_close(
            trained(settings, rows, per_device_train_batch_size=4),
            trained(settings, [*rows[:2], tie, *rows[2:]], per_device_train_batch_size=5),
            1e-5,
        )

    @pytest.mark.parametrize("method", METHODS)
    def test_batch_without_labels_moves_nothing(self, settings: Settings, method: str) -> None:
        rows = [dict(row, pref_helpful=0, pref_harmless=None) for row in tiny_pairs(4)]
        rows += tiny_pairs(1)  # for a later step, which is not taken
        for row in rows:
            row["margin_harmless"] = 0.5
        settings |= {"max_steps": 1, "weight_decay": 0.0}
        start = {n: p.detach() for n, p in tiny_model().named_parameters()}
        assert_close(trained(settings, rows, method=method), start, 0.0)

    def test_modpo_without_margins_is_scaled_dpo(self, settings: Settings) -> None:
        rows = [dict(row, margin_harmless=0.0) for row in tiny_pairs(8)]
        modpo = trained(settings, rows, method="modpo")
        dpo = trained(settings, rows, method="linear", weights={"helpful": 1.0}, beta=BETA / 0.7)
        assert_close(modpo, dpo, 1e-5)


class TestSettings:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("lora", [False, True])
    def test_families_of_models(self, settings: Settings, family: str, lora: bool) -> None:
        """bf16 autocast, checkpointing, accumulation, three objectives, a scheduler."""
        objectives = ("helpful", "harmless", "short")
        changed: Settings = {
            "weights": {"helpful": 0.5, "harmless": 0.3, "short": 0.2},
            "bf16": True,
            "gradient_checkpointing": True,
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 1,
        }
        trainer = make_trainer(
            settings,
            tiny_pairs(16, objectives, missing=0.3),
            model=tiny_model(family),
            eval_rows=tiny_pairs(5, objectives),
            peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
            **changed,
        )
        start = parameters(trainer)
        trainer.train()
        end = parameters(trainer)
        assert any(not torch.equal(start[name], end[name]) for name in start)
        assert all("lora" in name for name in start) or not lora
        metrics = trainer.evaluate()
        logged = trainer.state.log_history[0]
        for name in objectives:
            assert math.isfinite(metrics[f"eval_loss/{name}"])
            assert 0 <= logged[f"p_clipped/{name}"] <= changed["weights"][name] + 1e-12
        assert logged["gap"] <= 1e-9

    @pytest.mark.filterwarnings("ignore")  # of torch, about its compiler's options
    def test_compiled_model(self, settings: Settings) -> None:
        rows = tiny_pairs(8)
        settings |= {"optim": "sgd"}
        compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
        assert_close(trained(settings, rows, **compiled), trained(settings, rows), 1e-5)

    @pytest.mark.parametrize("loss_type", ["simpo", "kto_pair", "bco_pair", "sft"])
    def test_loss_types(self, settings: Settings, loss_type: str) -> None:
        trainer = make_trainer(settings, tiny_pairs(8, missing=0.3), loss_type=[loss_type])
        trainer.train()
        assert math.isfinite(trainer.state.log_history[0]["loss/helpful"])

    def test_resumes_where_it_was(self, settings: Settings, tmp_path: Path) -> None:
        rows = tiny_pairs(16, missing=0.3)
        settings |= {"max_steps": 4, "lr_scheduler_type": "linear"}
        whole = trained(settings, rows)
        settings |= {"save_strategy": "steps", "save_steps": 2}
        first = make_trainer(settings, rows)
        stop = _StopAt(2)
        first.add_callback(stop)
        first.train()
        assert first.state.global_step == 2
        again = make_trainer(settings, rows)
        with pytest.raises(ValueError, match="`output_dir` must not hold another run"):
            again.train()
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 4
        assert_close(parameters(again), whole, 0.0)

    def test_new_pairs_arrive_while_training(self, settings: Settings) -> None:
        seen = []

        def stream() -> Iterator[dict[str, Any]]:
            for i in range(100):
                seen.append(i)
                yield tiny_pairs(1, seed=i)[0]

        dataset = IterableDataset.from_generator(stream)
        trainer = make_trainer(settings, dataset, max_steps=3)
        start = parameters(trainer)
        trainer.train()
        end = parameters(trainer)
        assert trainer.state.global_step == 3
        assert any(not torch.equal(start[name], end[name]) for name in start)
        assert max(seen) < 30, "the stream is read as far as it is needed"

    def test_several_evaluation_sets(self, settings: Settings) -> None:
        rows = tiny_pairs(8)
        model = tiny_model()
        trainer = MultiObjectiveDPOTrainer(
            model,
            copy.deepcopy(model),
            MultiObjectiveDPOConfig(**settings, weights=WEIGHTS, eval_strategy="steps"),
            train_dataset=Dataset.from_list(rows),
            eval_dataset={
                "near": Dataset.from_list(rows),
                "far": Dataset.from_list(tiny_pairs(5, seed=4)),
            },
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        keys = set().union(*trainer.state.log_history)
        assert {"eval_near_loss/helpful", "eval_far_loss/helpful", "eval_far_loss"} <= keys

    def test_evaluates_new_data(self, settings: Settings) -> None:
        trainer = make_trainer(
            settings, tiny_pairs(4), peft_config=LoraConfig(r=2), precompute_ref_log_probs=True
        )
        metrics = trainer.evaluate(Dataset.from_list(tiny_pairs(5, seed=8)))
        assert metrics["eval_labelled/helpful"] == 5

    def test_reaches_the_reporting_callbacks(self, settings: Settings) -> None:
        logged: dict[str, float] = {}

        class Reporter(TrainerCallback):
            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                logged.update(logs)

        trainer = make_trainer(settings, tiny_pairs(8))
        trainer.add_callback(Reporter())
        trainer.train()
        assert {"p/helpful", "alpha/harmless", "clip_angle", "gap", "hurting"} <= logged.keys()
        assert all(isinstance(value, int | float) for value in logged.values())

    def test_step_that_fails_and_is_tried_again(self, settings: Settings) -> None:
        """As with `auto_find_batch_size`, within one call of `train`."""
        rows = tiny_pairs(8, missing=0.3)
        settings |= {"gradient_accumulation_steps": 2, "max_steps": 1}
        trainer = make_trainer(settings, rows)
        batches, counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, "cpu")
        trainer.create_optimizer()
        trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
        trainer.accelerator.gradient_state._set_sync_gradients(False)
        trainer.training_step(trainer.model, dict(batches[0]), counts)
        trainer.train()
        assert_close(parameters(trainer), trained(settings, rows), 0.0)

    def test_what_was_left_within_a_step_is_forgotten(self, settings: Settings) -> None:
        class Stop(TrainerCallback):
            def on_substep_end(self, _: Any, __: Any, control: Any, **___: Any) -> Any:
                control.should_training_stop = True
                return control

        rows = tiny_pairs(8)
        settings |= {"gradient_accumulation_steps": 2, "max_steps": 1}
        trainer = make_trainer(settings, rows)
        stop = Stop()
        trainer.add_callback(stop)
        trainer.train()
        trainer.remove_callback(stop)
        trainer.train()
        assert_close(parameters(trainer), trained(settings, rows), 0.0)
        assert trainer.state.log_history[0]["labelled/helpful"] == 8


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


class TestBadInput:
    @pytest.fixture
    def fails(self, settings: Settings) -> Callable[..., None]:
        def check(match: str, rows: list[dict[str, Any]] | None = None, **changed: Any) -> None:
            with pytest.raises(ValueError, match=match):
                make_trainer(settings, tiny_pairs(4) if rows is None else rows, **changed)
            assert not Path(settings["output_dir"]).exists() or not any(
                Path(settings["output_dir"]).iterdir()
            )

        return check

    def test_missing_column(self, fails: Callable[..., None]) -> None:
        fails(
            "`train_dataset` must have the column `pref_brief`; it has prompt, chosen",
            weights={"helpful": 0.5, "brief": 0.5},
        )
        rows = tiny_pairs(4)
        fails(
            "`eval_dataset` must have the column `pref_harmless`",
            rows,
            eval_rows=[{k: v for k, v in row.items() if k != "pref_harmless"} for row in rows],
        )

    @pytest.mark.parametrize("column", ["chosen", "rejected"])
    def test_missing_text(self, fails: Callable[..., None], column: str) -> None:
        rows = [{k: v for k, v in row.items() if k != column} for row in tiny_pairs(4)]
        fails(f"`train_dataset` must have the column `{column}`; it has prompt, .* A pair is", rows)

    @pytest.mark.parametrize("value", ["yes", 1.5, 2, True])
    def test_value_is_no_preference(self, fails: Callable[..., None], value: object) -> None:
        rows = [dict(row, pref_helpful=value) for row in tiny_pairs(4)]
        fails(r"column `pref_helpful` must hold \+1 .* got", rows)

    def test_objective_without_labels(self, fails: Callable[..., None]) -> None:
        rows = [dict(row, pref_helpful=0) for row in tiny_pairs(4)]
        fails("`train_dataset` must label at least one pair in `pref_helpful`", rows)

    def test_stream_with_a_bad_value(self, settings: Settings) -> None:
        rows = [*tiny_pairs(4), dict(tiny_pairs(1)[0], pref_helpful=7)]
        stream = IterableDataset.from_generator(lambda: iter(rows))
        trainer = make_trainer(settings, stream)
        with pytest.raises(ValueError, match=r"column `pref_helpful` must hold .* got 7"):
            trainer.train()

    def test_objective_whose_pairs_are_all_too_long(self, fails: Callable[..., None]) -> None:
        rows = [dict(row, pref_helpful=0) for row in tiny_pairs(4)]
        rows.append(dict(tiny_pairs(1)[0], prompt="the " * 40, pref_helpful=1))
        fails(
            "`train_dataset` must label .* `pref_helpful` .* `max_length` = 30", rows, max_length=30
        )
        fails(
            "`eval_dataset` must label .* `pref_help", tiny_pairs(4), max_length=30, eval_rows=rows
        )

    def test_empty_stream(self, settings: Settings) -> None:
        with pytest.raises(ValueError, match="`train_dataset` must hold at least one pair"):
            make_trainer(settings, IterableDataset.from_generator(lambda: iter([])))

    def test_data_that_trl_does_not_take(self, settings: Settings) -> None:
        rows = {"train": Dataset.from_list(tiny_pairs(4))}
        with pytest.raises(TypeError, match="`train_dataset` must be a `Dataset`"):
            make_trainer(settings, DatasetDict(rows))

    def test_predictions(self, settings: Settings) -> None:
        trainer = make_trainer(settings, tiny_pairs(4))
        with pytest.raises(ValueError, match="predictions are not computed"):
            trainer.predict(Dataset.from_list(tiny_pairs(4)))

    def test_modpo_needs_margins(self, fails: Callable[..., None]) -> None:
        fails("must have the column `margin_harmless`", method="modpo")
        rows = [dict(row, margin_harmless=math.nan) for row in tiny_pairs(4)]
        fails("column `margin_harmless` must hold .* got nan", rows, method="modpo")
        fails("`modpo_objective` must be one of", method="modpo", modpo_objective="brief")
        fails(
            "`weights` must be positive for `modpo_objective`",
            method="modpo",
            weights={"helpful": 0.0, "harmless": 1.0},
        )

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"weights": {"helpful": 0.7, "harmless": 0.7}}, "`weights` must sum to 1"),
            ({"weights": "helpful=0.7;harmless"}, "`weights` must be of the form"),
            ({"weights": "helpful=0.7,helpful=0.3"}, "each name once"),
            ({"weights": None}, "`weights` must map objectives to weights"),
            ({"weights": {}}, "`weights` must map objectives to weights"),
            ({"method": "pcgrad"}, "`method` must be one of"),
            ({"c": 1.0}, r"`c` must be in \[0, 1\)"),
            ({"method": "cagrad", "c": -1.0}, "`c` must be finite and non-negative"),
            ({"solver": "newton"}, "`solver` must be one of"),
            ({"beta": 0.0}, "`beta` must be a number above 0"),
            ({"label_smoothing": 0.5}, "`label_smoothing` must be a number 0 or more and below"),
            ({"loss_type": ["simpo"], "simpo_gamma": -1.0}, "`simpo_gamma` must be a number 0 or"),
            ({"optim": "lomo"}, "`optim` must step after the backward pass"),
            ({"loss_type": ["sigmoid", "exo_pair"]}, "`loss_type` must be one of"),
            ({"loss_type": []}, "`loss_type` must name at least one loss"),
            ({"loss_weights": [0.0]}, "`loss_weights` must not all be 0"),
            ({"loss_weights": [-1.0]}, "`loss_weights` must be a number 0 or more"),
            ({"loss_type": ["simpo"], "sync_ref_model": True}, "`sync_ref_model` must be False"),
            ({"loss_type": ["ipo"], "label_smoothing": 0.1}, "`label_smoothing` must be 0"),
            ({"method": "amopo", "label_smoothing": 0.1}, "`label_smoothing` must be 0"),
            ({"simpo_gamma": 0.1}, r"`simpo_gamma` must be 0 with \['sigmoid'\]"),
            ({"ld_alpha": 0.5}, "`ld_alpha` must be None"),
            ({"f_divergence_type": "js_divergence"}, "`f_divergence_type` must be"),
            ({"use_weighting": True}, "`use_weighting` must be False"),
            ({"activation_offloading": True}, "`activation_offloading` must be False"),
            ({"use_liger_kernel": True}, "`use_liger_kernel` must be False"),
            (
                {
                    "gradient_checkpointing": True,
                    "gradient_checkpointing_kwargs": {"use_reentrant": True},
                },
                "`gradient_checkpointing_kwargs` must not ask for reentrant",
            ),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
    )
    def test_setting(self, fails: Callable[..., None], changed: Settings, match: str) -> None:
        fails(match, **changed)

    def test_images(self, fails: Callable[..., None]) -> None:
        rows = [dict(row, images=["x.png"]) for row in tiny_pairs(4)]
        fails("`train_dataset` must not have images", rows)

    def test_metrics_from_predictions(self, settings: Settings) -> None:
        model = tiny_model()
        with pytest.raises(ValueError, match="`compute_metrics` must be None"):
            MultiObjectiveDPOTrainer(
                model,
                copy.deepcopy(model),
                MultiObjectiveDPOConfig(**settings, weights=WEIGHTS),
                train_dataset=Dataset.from_list(tiny_pairs(4)),
                processing_class=tiny_tokenizer(),
                compute_metrics=lambda _: {},
            )

    def test_no_reference_for_a_model_built_in_memory(self, settings: Settings) -> None:
        with pytest.raises(ValueError, match="`ref_model` must be a copy of a model .* got None"):
            MultiObjectiveDPOTrainer(
                tiny_model(),
                None,
                MultiObjectiveDPOConfig(**settings, weights=WEIGHTS),
                train_dataset=Dataset.from_list(tiny_pairs(4)),
                processing_class=tiny_tokenizer(),
            )

    def test_config_of_trl(self, settings: Settings) -> None:
        with pytest.raises(TypeError, match="`args` must be a MultiObjectiveDPOConfig"):
            MultiObjectiveDPOTrainer(
                tiny_model(), None, DPOConfig(**settings), train_dataset=Dataset.from_list([])
            )

    @pytest.mark.parametrize("method", ["raco", "linear"])
    def test_nan(self, settings: Settings, method: str) -> None:
        model = tiny_model()
        trainer = make_trainer(settings, tiny_pairs(8), model=model, method=method)
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
        before = parameters(trainer)
        with pytest.raises(FloatingPointError, match="NaN or Inf"):
            trainer.train()
        after = parameters(trainer)
        assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)
