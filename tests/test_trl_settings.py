"""The trainer under settings, data and accidents that it has in common with TRL's."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, TrainerCallback
from trl import TrlParser

from raco_optim.gradients.per_example import LayerGradients
from raco_optim.integrations import trl as trl_module
from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
from tests import oracles
from tests import test_trl_trainer as base
from tests.test_trl_trainer import (
    BETA,
    WEIGHTS,
    Settings,
    assert_close,
    make_trainer,
    parameters,
    trained,
)
from tests.tiny_language_models import tiny_model, tiny_pairs, tiny_tokenizer

pytestmark = base.pytestmark
offline, settings = base.offline, base.settings

Rows = list[dict[str, Any]]
SGD: Settings = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}
THREE = {"a": 0.5, "b": 0.3, "c": 0.2}
TIMES = ("runtime", "second", "flos")


def stream(rows: Rows) -> IterableDataset:
    def pairs() -> Iterator[dict[str, Any]]:
        yield from rows

    return IterableDataset.from_generator(pairs)


def logs(trainer: MultiObjectiveDPOTrainer) -> list[dict[str, float]]:
    """What was logged in training, without times."""
    return [
        {key: value for key, value in entry.items() if not any(t in key for t in TIMES)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


class Watch(TrainerCallback):
    """Calls a function at one event."""

    def __init__(self, event: str, call: Callable[..., None]) -> None:
        setattr(self, event, lambda _, state, control, **others: call(state, control, **others))


# --- One step, against formulas ------------------------------------------------------------------


def answer_scores(model: PreTrainedModel, row: dict[str, Any]) -> list[tuple[Tensor, int]]:
    """Log-probability and number of tokens of chosen and rejected, from the logits."""
    tokenizer = tiny_tokenizer()
    prompt = len(tokenizer(row["prompt"])["input_ids"])
    found = []
    for answer in ("chosen", "rejected"):
        ids = torch.tensor([tokenizer(row["prompt"] + row[answer] + "<eos>")["input_ids"]])
        log_probs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        each = log_probs.gather(1, ids[0, 1:, None])[prompt - 1 :, 0]
        found.append((each.sum(), len(each)))
    return found


def dpo(r: Tensor, _: Tensor, n: Tensor) -> Tensor:
    """Label smoothing 0.1. Here and below: r of winners and losers, [2, n], and their lengths."""
    x = BETA * (r[0] - r[1])
    return (-0.9 * logsigmoid(x) - 0.1 * logsigmoid(-x)).mean()


def per_token(r: Tensor, _: Tensor, n: Tensor) -> Tensor:
    return -logsigmoid(BETA * (r[0] / n[0] - r[1] / n[1])).mean()


def ipo(r: Tensor, _: Tensor, n: Tensor) -> Tensor:
    return (r[0] / n[0] - r[1] / n[1] - 1 / (2 * BETA)).square().mean()


def simpo(_: Tensor, policy: Tensor, n: Tensor) -> Tensor:
    return -logsigmoid(BETA * (policy[0] / n[0] - policy[1] / n[1]) - 0.2).mean()


def kto(r: Tensor, _: Tensor, n: Tensor) -> Tensor:
    z = r.detach().mean(1).clamp(min=0)
    return (
        1 - (torch.sigmoid(BETA * (r[0] - z[1])) + torch.sigmoid(BETA * (z[0] - r[1]))).mean() / 2
    )


@pytest.mark.parametrize(
    ("loss", "changed"),
    [
        (dpo, {"loss_type": "sigmoid", "label_smoothing": 0.1, "gradient_accumulation_steps": 3}),
        (per_token, {"loss_type": "sigmoid_norm", "gradient_accumulation_steps": 2}),
        (ipo, {"loss_type": "ipo", "gradient_accumulation_steps": 2}),
        (simpo, {"loss_type": "simpo", "simpo_gamma": 0.2, "gradient_accumulation_steps": 6}),
        (kto, {"loss_type": "kto_pair"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_step_on_three_objectives(
    settings: Settings, loss: Callable[..., Tensor], changed: Settings
) -> None:
    """From logits to the update of SGD, without the library; weights not in order of columns."""
    rows = tiny_pairs(6, ("c", "a", "b"), missing=0.3, seed=1)
    model, reference, c = tiny_model(seed=1), tiny_model(seed=2), 0.7
    policy = [answer_scores(model, row) for row in rows]
    old = [answer_scores(reference, row) for row in rows]
    losses = []
    for name in THREE:
        order = [
            (i, (0, 1) if row[f"pref_{name}"] > 0 else (1, 0))
            for i, row in enumerate(rows)
            if row[f"pref_{name}"]
        ]
        score = torch.stack([torch.stack([policy[i][j][0] for j in js]) for i, js in order], 1)
        before = torch.stack([torch.stack([old[i][j][0] for j in js]) for i, js in order], 1)
        tokens = torch.tensor([[policy[i][j][1] for j in js] for i, js in order]).T
        losses.append(loss(score - before.detach(), score, tokens))
    w = torch.tensor(list(THREE.values()), dtype=torch.float64)
    weights = list(model.parameters())
    flat = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(x, weights, retain_graph=True)])
            for x in losses
        ]
    ).double()
    p = torch.as_tensor(oracles.exact_minimum((flat @ flat.T).numpy(), w.numpy(), c).p)
    direction, g0 = torch.minimum(p, w) @ flat, w @ flat
    expected = g0 + c * g0.norm() * direction / direction.norm()

    start = torch.cat([q.detach().flatten() for q in weights])
    options = settings | SGD | {"learning_rate": 1.0, "max_steps": 1, "c": c, "weights": THREE}
    batch = 6 // changed.get("gradient_accumulation_steps", 1)
    trainer = MultiObjectiveDPOTrainer(
        model,
        None if loss is simpo else reference,
        MultiObjectiveDPOConfig(**options | {"per_device_train_batch_size": batch} | changed),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    end = torch.cat([q.detach().flatten() for q in weights])
    torch.testing.assert_close((start - end).double(), expected, rtol=1e-3, atol=2e-6)
    for name, x in zip(THREE, losses, strict=True):
        assert logs(trainer)[0][f"loss/{name}"] == pytest.approx(x.item(), rel=1e-4)


def test_step_of_modpo(settings: Settings) -> None:
    rows = [
        dict(row, margin_harmless=0.7 * (i - 2)) for i, row in enumerate(tiny_pairs(4, missing=0.3))
    ]
    model, reference, w = tiny_model(seed=1), tiny_model(seed=2), WEIGHTS
    terms = []
    for row in rows:
        ratio = base.log_ratio(model, row) - base.log_ratio(reference, row).detach()
        x = BETA * ratio - w["harmless"] * row["margin_harmless"]
        if row["pref_helpful"]:
            terms.append(-logsigmoid(row["pref_helpful"] * x / w["helpful"]))
    weights = list(model.parameters())
    expected = torch.autograd.grad(sum(terms) / len(terms), weights)
    start = [p.detach().clone() for p in weights]
    options = settings | SGD | {"learning_rate": 1.0, "max_steps": 1, "method": "modpo"}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    MultiObjectiveDPOTrainer(
        model,
        reference,
        MultiObjectiveDPOConfig(**options, weights=WEIGHTS),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    ).train()
    for before, after, gradient in zip(start, weights, expected, strict=True):
        torch.testing.assert_close(before - after.detach(), gradient, rtol=1e-4, atol=1e-6)


# --- Adapters ------------------------------------------------------------------------------------


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, **{"target_modules": "all-linear"} | options)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether one backward pass served all losses, call by call."""
    calls: list[bool] = []
    original = LayerGradients.gradients

    def watched(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        calls.append(found[0] is not None)
        return found

    monkeypatch.setattr(LayerGradients, "gradients", watched)
    return calls


class TestAdapters:
    @pytest.mark.parametrize(
        ("config", "together", "changed"),
        [
            (lora(lora_dropout=0.3), True, {"disable_dropout": False}),
            (
                lora(lora_dropout=0.3, use_rslora=True),
                True,
                {"disable_dropout": False, "gradient_checkpointing": True},
            ),
            (lora(target_modules=["q_proj"], modules_to_save=["down_proj"]), True, {}),
            (lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), True, {}),
            (lora(modules_to_save=["norm"]), True, {"gradient_checkpointing": True}),
            (lora(target_modules=["q_proj", "embed_tokens"]), False, {}),
            (lora(use_dora=True), True, {"gradient_checkpointing": True}),
            (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), False, {}),
            (
                IA3Config(
                    task_type="CAUSAL_LM",
                    target_modules=["k_proj", "down_proj"],
                    feedforward_modules=["down_proj"],
                ),
                False,
                {},
            ),
        ],
        ids=["dropout", "checkpointed", "layer", "head", "norm", "embedding", "dora"]
        + ["prompt", "ia3"],
    )
    def test_kinds(
        self,
        settings: Settings,
        served: list[bool],
        config: PeftConfig,
        together: bool,
        changed: Settings,
    ) -> None:
        """Same dropout masks, so the same step as one backward pass for each loss."""
        rows = tiny_pairs(16, missing=0.3)
        changed = (
            SGD | changed | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        )
        start = parameters(make_trainer(settings, rows, peft_config=config, **changed))
        end = trained(settings, rows, peft_config=config, **changed)
        assert served == [together] * 4
        assert any(not torch.equal(start[name], end[name]) for name in start)
        changed["gradients"] = "dense"
        assert_close(trained(settings, rows, peft_config=config, **changed), end, 1e-5)

    @pytest.mark.parametrize("changed", [{}, {"gradient_checkpointing": True}], ids=["", "ckpt"])
    def test_goes_on_with_an_adapter(
        self, settings: Settings, served: list[bool], changed: Settings
    ) -> None:
        """TRL keeps a copy of it as the reference, in the same model."""
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), lora(task_type="CAUSAL_LM"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.2)
        trainer = MultiObjectiveDPOTrainer(
            model,
            args=MultiObjectiveDPOConfig(**settings | SGD | changed, weights=WEIGHTS),
            train_dataset=Dataset.from_list(tiny_pairs(8)),
            processing_class=tiny_tokenizer(),
        )
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        trainer.train()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
        assert moved and all(".default." in name for name in moved)
        assert served == [True, True]
        assert logs(trainer)[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)

    def test_weights_in_bf16(self, settings: Settings) -> None:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            trainer = make_trainer(
                settings,
                tiny_pairs(8),
                model=tiny_model().to(dtype),
                peft_config=lora(),
                gradient_checkpointing=True,
                **SGD,
            )
            trainer.train()
            found.append(logs(trainer)[1])
        exact, rounded = found
        for key in ("loss", "loss/helpful", "p/helpful", "cosine/helpful/harmless"):
            assert rounded[key] == pytest.approx(exact[key], abs=0.05)

    def test_tied_embeddings(self, settings: Settings) -> None:
        def model() -> PreTrainedModel:
            config = copy.deepcopy(tiny_model().config)
            config.tie_word_embeddings = True
            torch.manual_seed(0)
            return type(tiny_model())(config)

        rows, zero = tiny_pairs(8, missing=0.3), SGD | {"c": 0.0}
        linear = trained(settings, rows, model=model(), method="linear", **SGD)
        assert "lm_head.weight" not in linear
        assert_close(trained(settings, rows, model=model(), **zero), linear, 1e-5)


# --- Steps, logs, checkpoints --------------------------------------------------------------------


class TestSteps:
    def test_last_group_of_an_epoch_is_smaller(self, settings: Settings) -> None:
        rows = tiny_pairs(10, missing=0.4)
        settings |= SGD | {"max_steps": -1, "num_train_epochs": 2}
        parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        assert_close(trained(settings, rows, **parts), trained(settings, rows, **whole), 1e-5)

    def test_runs_are_equal_and_so_with_a_worker(self, settings: Settings) -> None:
        rows = tiny_pairs(12, missing=0.3)
        settings |= {"train_sampling_strategy": "random", "max_steps": -1, "num_train_epochs": 2}
        settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        first, second, worker = (
            make_trainer(settings, rows, dataloader_num_workers=n) for n in (0, 0, 1)
        )
        for trainer in (first, second, worker):
            trainer.train()
            assert_close(parameters(trainer), parameters(first), 0.0)
            assert logs(trainer) == logs(first)
        pickle.loads(pickle.dumps(first.data_collator))

    def test_evaluation_between_steps_changes_nothing(self, settings: Settings) -> None:
        rows, held_out = tiny_pairs(16, missing=0.3), tiny_pairs(7, missing=0.3, seed=2)
        settings |= {"max_steps": 6, "logging_steps": 3, "gradient_accumulation_steps": 2}
        plain = make_trainer(settings, rows)
        watched = make_trainer(
            settings, rows, eval_rows=held_out, eval_strategy="steps", eval_steps=2
        )
        plain.train()
        watched.train()
        assert_close(parameters(watched), parameters(plain), 0.0)
        assert logs(watched) == logs(plain)
        found = [entry for entry in watched.state.log_history if "eval_loss" in entry]
        assert [entry["step"] for entry in found] == [2, 4, 6]
        labels = sum(1 for row in held_out if row["pref_helpful"])
        assert all(entry["eval_labelled/helpful"] == labels for entry in found)
        assert all(key.startswith("eval_") or key in ("epoch", "step") for key in found[0])

    def test_logs_are_means_over_their_steps(self, settings: Settings) -> None:
        rows = tiny_pairs(24, missing=0.4)
        single = make_trainer(settings, rows, max_steps=6)
        several = make_trainer(
            settings, rows, max_steps=6, logging_steps=3, logging_first_step=True
        )
        single.train()
        several.train()
        for entry, (start, stop) in zip(logs(several), [(0, 1), (1, 3), (3, 6)], strict=True):
            steps = logs(single)[start:stop]
            for key in ("p/harmless", "alpha/helpful", "gap", "hurting", "conflicting", "loss"):
                mean = sum(step[key] for step in steps) / len(steps)
                assert entry[key] == pytest.approx(mean, rel=1e-6, abs=1e-12)
            pairs = sum(step["labelled/helpful"] for step in steps)
            assert entry["labelled/helpful"] == pairs
            for key in ("loss/helpful", "margin/helpful", "accuracy/helpful"):
                total = sum(step.get(key, 0.0) * step["labelled/helpful"] for step in steps)
                assert entry[key] == pytest.approx(total / pairs)

    def test_resumes_within_an_epoch(self, settings: Settings) -> None:
        """Bit by bit: the order of the pairs, a dropped pair, dropout, AdamW, the scheduler."""
        rows = tiny_pairs(14, missing=0.3)
        settings |= {"train_sampling_strategy": "random", "max_steps": -1, "num_train_epochs": 2}
        settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        settings |= {"lr_scheduler_type": "linear", "disable_dropout": False}

        def trainer(**changed: Any) -> MultiObjectiveDPOTrainer:
            return make_trainer(settings | changed, rows, peft_config=lora(lora_dropout=0.2))

        def stop(state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = control.should_training_stop or state.global_step == 3

        whole = trainer()
        whole.train()
        saved = {"save_strategy": "steps", "save_steps": 3}
        first = trainer(**saved)
        first.add_callback(Watch("on_step_end", stop))
        first.train()
        again = trainer(**saved)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == whole.state.global_step == 8
        assert_close(parameters(again), parameters(whole), 0.0)
        assert logs(again) == logs(whole)

    def test_best_model(self, settings: Settings) -> None:
        metric = "eval_accuracy/helpful"
        trainer = make_trainer(
            settings,
            tiny_pairs(16),
            eval_rows=tiny_pairs(8, seed=2),
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model=metric,
            greater_is_better=True,
            max_steps=4,
            learning_rate=0.05,
        )
        trainer.train()
        seen = [entry[metric] for entry in trainer.state.log_history if metric in entry]
        assert len(set(seen)) > 1
        assert trainer.evaluate()[metric] == max(seen) != seen[-1]

    def test_goes_on_after_an_error(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = tiny_pairs(8)
        settings |= SGD | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        trainer = make_trainer(settings, rows)
        original, calls = trl_module.completion_log_probs, []

        def interrupted(*arguments: Any) -> Tensor:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(trl_module, "completion_log_probs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.train()
        fresh = make_trainer(settings, rows)
        fresh.train()
        assert_close(parameters(trainer), parameters(fresh), 0.0)
        assert logs(trainer) == logs(fresh)

    def test_tries_again_with_smaller_batches(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After an out-of-memory error in the second of two micro-batches."""
        rows = tiny_pairs(12)
        settings |= SGD | {"gradient_accumulation_steps": 2}
        original, calls = trl_module.completion_log_probs, []

        def too_large(*arguments: Any) -> Tensor:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("CUDA out of memory.")
            return original(*arguments)

        monkeypatch.setattr(trl_module, "completion_log_probs", too_large)
        found = trained(settings, rows, auto_find_batch_size=True)
        monkeypatch.setattr(trl_module, "completion_log_probs", original)
        assert_close(found, trained(settings, rows, per_device_train_batch_size=3), 0.0)


class TestOptimizers:
    def test_callbacks_see_the_combined_gradient(self, settings: Settings) -> None:
        seen = []

        def look(*_: Any, model: torch.nn.Module, **__: Any) -> None:
            squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
            seen.append(math.sqrt(sum(squares)))

        trainer = make_trainer(settings, tiny_pairs(8), gradient_accumulation_steps=2, **SGD)
        trainer.add_callback(Watch("on_pre_optimizer_step", look))
        trainer.train()
        assert seen == pytest.approx([entry["grad_norm"] for entry in logs(trainer)], rel=1e-5)

    def test_own_optimizer(self, settings: Settings) -> None:
        """With momentum, a scheduler, and a frozen parameter in its groups."""

        def ended(method: str) -> dict[str, Tensor]:
            model = tiny_model()
            model.model.embed_tokens.requires_grad_(False)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            trainer = MultiObjectiveDPOTrainer(
                model,
                copy.deepcopy(model),
                MultiObjectiveDPOConfig(**settings, weights=WEIGHTS, method=method, c=0.0),
                train_dataset=Dataset.from_list(tiny_pairs(8)),
                processing_class=tiny_tokenizer(),
                optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)),
            )
            trainer.train()
            return parameters(trainer)

        assert_close(ended("raco"), ended("linear"), 1e-5)

    def test_reference_follows_the_model(self, settings: Settings) -> None:
        trainer = make_trainer(
            settings,
            tiny_pairs(8),
            sync_ref_model=True,
            ref_model_sync_steps=2,
            ref_model_mixup_alpha=1.0,
        )
        trainer.train()
        pairs = zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_reference_is_not_run_in_vain(self, settings: Settings) -> None:
        trainer = make_trainer(settings, tiny_pairs(8), method="amopo")
        calls: list[int] = []
        trainer.ref_model.register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        assert not calls


class TestMemory:
    def test_graph_is_freed_without_the_collector(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original, scores = trl_module.completion_log_probs, []

        def remembered(*arguments: Any) -> Tensor:
            found = original(*arguments)
            scores.append(weakref.ref(found))
            return found

        monkeypatch.setattr(trl_module, "completion_log_probs", remembered)
        for config in (None, lora()):
            trainer = make_trainer(settings, tiny_pairs(8), peft_config=config)
            gc.disable()
            try:
                trainer.train()
            finally:
                gc.enable()
        assert len(scores) == 4
        assert not any(score() is not None for score in scores)

    def test_nothing_grows(self, settings: Settings) -> None:
        tensors = []

        def count(state: Any, *_: Any, **__: Any) -> None:
            if state.global_step % 10 == 0:
                tensors.append(sum(isinstance(x, Tensor) for x in gc.get_objects()))

        trainer = make_trainer(settings, tiny_pairs(8), max_steps=30, logging_steps=5)
        trainer.add_callback(Watch("on_log", count))
        trainer.train()
        assert len(tensors) >= 3
        assert tensors[0] == tensors[1] == tensors[2]


# --- Data ----------------------------------------------------------------------------------------


class TestData:
    @pytest.mark.parametrize("method", ["raco", "linear"])
    def test_stream_that_ends_within_a_group_of_micro_batches(
        self, settings: Settings, method: str
    ) -> None:
        """The third batch of two pairs has no partner; the next step starts without it."""
        settings |= SGD | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        rows = tiny_pairs(6)
        found = trained(settings, stream(rows), method=method, c=0.0, max_steps=2)
        twice = trained(settings, stream(rows[:4]), method=method, c=0.0, max_steps=2)
        assert_close(found, twice, 1e-6)

    def test_ways_to_write_a_preference(self, settings: Settings) -> None:
        rows = tiny_pairs(8, missing=0.4)
        expected = trained(settings, rows)
        floats = [dict(row) for row in rows]
        for i, row in enumerate(floats):
            for name in WEIGHTS:
                sign = row[f"pref_{name}"]
                row[f"pref_{name}"] = (math.nan, None)[i % 2] if not sign else float(sign)
        numpy = [
            dict(row, **{f"pref_{n}": np.int8(row[f"pref_{n}"] or 0) for n in WEIGHTS})
            for row in rows
        ]
        for data in (floats, stream(numpy)):
            assert_close(trained(settings, data), expected, 0.0)

    def test_names_of_objectives(self, settings: Settings) -> None:
        weights = {"a b": 0.3, "x/y": 0.3, "é": 0.2, "p=q,r": 0.1, "_loss": 0.1}
        trainer = make_trainer(
            settings,
            tiny_pairs(8, tuple(weights)),
            eval_rows=tiny_pairs(4, tuple(weights)),
            weights=weights,
            eval_strategy="steps",
        )
        trainer.train()
        keys = set().union(*trainer.state.log_history)
        for name in weights:
            assert {f"loss/{name}", f"alpha/{name}", f"eval_loss/{name}"} <= keys

    def test_objective_of_weight_zero(self, settings: Settings) -> None:
        """Clipped to nothing, so it moves nothing; it is measured all the same."""
        rows = tiny_pairs(8, ("a", "b"), missing=0.3)
        settings |= SGD
        both = make_trainer(settings, rows, weights={"a": 1.0, "b": 0.0}, c=0.0)
        both.train()
        assert_close(parameters(both), trained(settings, rows, weights={"a": 1.0}, c=0.0), 1e-6)
        assert logs(both)[0]["alpha/b"] == 0
        assert "loss/b" in logs(both)[0]

    def test_micro_batches_without_labels(self, settings: Settings) -> None:
        """Of one objective, and of any, at the start, in the middle and at the end of a group."""
        rows = tiny_pairs(8, seed=3)
        for i, row in enumerate(rows):
            if i in (0, 3, 7):
                row.update(pref_helpful=None, pref_harmless=0)
            elif i in (1, 2, 6):
                row["pref_helpful"] = None
        settings |= SGD | {"max_steps": 1}
        parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
        for config, data in ((None, stream(rows)), (lora(), rows)):
            whole = trained(settings, rows, peft_config=config, per_device_train_batch_size=8)
            assert_close(trained(settings, data, peft_config=config, **parts), whole, 1e-5)

    def test_stream_as_evaluation_set(self, settings: Settings) -> None:
        rows = tiny_pairs(7, missing=0.3)
        found = [
            make_trainer(settings, tiny_pairs(4)).evaluate(data)
            for data in (stream(rows), Dataset.from_list(rows))
        ]
        for key in ("eval_loss", "eval_margin/helpful", "eval_labelled/harmless"):
            assert found[0][key] == found[1][key]

    def test_conversations(self, settings: Settings) -> None:
        """With the prompt in a column of its own, and inside of both answers."""
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }} <eos> {% endfor %}"
            "{% if add_generation_prompt %}{% endif %}"
        )
        explicit: Rows = []
        for row in tiny_pairs(8):
            said = {"prompt": [{"role": "user", "content": row["prompt"]}]}
            for answer in ("chosen", "rejected"):
                said[answer] = [{"role": "assistant", "content": row[answer]}]
            explicit.append(row | said)
        implicit = [
            {key: value for key, value in row.items() if key != "prompt"}
            | {answer: row["prompt"] + row[answer] for answer in ("chosen", "rejected")}
            for row in explicit
        ]
        ends = []
        for rows in (explicit, implicit):
            model = tiny_model()
            trainer = MultiObjectiveDPOTrainer(
                model,
                copy.deepcopy(model),
                MultiObjectiveDPOConfig(**settings, weights=WEIGHTS),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
            trainer.train()
            ends.append(parameters(trainer))
        assert_close(ends[0], ends[1], 0.0)

    def test_truncation(self, settings: Settings) -> None:
        rows, settings = tiny_pairs(8), settings | SGD | {"max_length": 6}
        parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        assert_close(trained(settings, rows, **parts), trained(settings, rows), 1e-5)

    def test_margins_too_large_for_float32(self, settings: Settings) -> None:
        rows = [dict(row, margin_harmless=1e300) for row in tiny_pairs(4)]
        trainer = make_trainer(settings, rows, method="modpo")
        start = parameters(trainer)
        with pytest.raises(FloatingPointError, match="NaN or Inf"):
            trainer.train()
        assert_close(parameters(trainer), start, 0.0)


# --- Config --------------------------------------------------------------------------------------


class TestConfig:
    def test_command_line(self, tmp_path: Path) -> None:
        arguments = "--weights helpful=0.7,harmless=0.3 --method cagrad --c 0.3 --loss_type ipo"
        [config] = TrlParser((MultiObjectiveDPOConfig,)).parse_args_and_config(
            ["--output_dir", str(tmp_path), "--bf16", "False", *arguments.split()]
        )
        assert config.weights == WEIGHTS
        assert (config.method, config.c, config.loss_type) == ("cagrad", 0.3, ["ipo"])

    @pytest.mark.parametrize(
        "weights", ["{helpful: 0.7, harmless: 0.3}", "helpful=0.7,harmless=0.3"]
    )
    def test_yaml(self, tmp_path: Path, weights: str) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(f"output_dir: {tmp_path}\nbf16: false\nc: 0.2\nweights: {weights}\n")
        [config] = TrlParser((MultiObjectiveDPOConfig,)).parse_args_and_config(
            ["--config", str(path)]
        )
        assert (config.weights, config.c) == (WEIGHTS, 0.2)

    def test_copies(self, settings: Settings) -> None:
        config = MultiObjectiveDPOConfig(**settings, weights="helpful=0.7,harmless=0.3", c=0.3)
        fields = {field.name for field in dataclasses.fields(config) if field.init}
        stored = json.loads(config.to_json_string())
        for other in (
            MultiObjectiveDPOConfig(**{k: v for k, v in stored.items() if k in fields}),
            pickle.loads(pickle.dumps(config)),
            copy.deepcopy(config),
            dataclasses.replace(config, method="linear"),
        ):
            assert (other.weights, other.c, other.beta) == (WEIGHTS, 0.3, BETA)

    def test_reports_to_tensorboard(self, settings: Settings) -> None:
        make_trainer(settings | {"report_to": "tensorboard"}, tiny_pairs(8)).train()
        assert list(Path(settings["output_dir"]).rglob("events*"))
