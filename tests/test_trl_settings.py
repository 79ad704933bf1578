"""The trainer under settings, data and accidents that it has in common with TRL's."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from trl import TrlParser

from raco_optim import unwrap
from raco_optim.gradients.per_example import LayerGradients
from raco_optim.integrations import trl as trl_module
from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
from tests import test_trl_trainer as base
from tests.test_trl_trainer import (
    BETA,
    SGD,
    WEIGHTS,
    Rows,
    Settings,
    Watch,
    assert_close,
    config,
    logs,
    make_trainer,
    parameters,
    stop_at,
    trained,
)
from tests.tiny_language_models import tiny_model, tiny_pairs, tiny_tokenizer

pytestmark = base.pytestmark
offline, settings = base.offline, base.settings

MICRO: Settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def stream(rows: Rows) -> IterableDataset:
    def pairs() -> Iterator[dict[str, Any]]:
        yield from rows

    return IterableDataset.from_generator(pairs)


# --- Adapters ------------------------------------------------------------------------------------


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, **{"target_modules": "all-linear"} | options)


def moved_adapters(model: PreTrainedModel) -> Any:
    """A model with adapters that change what it says."""
    torch.manual_seed(0)
    model = get_peft_model(model, lora(task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model


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


CHECKPOINTED = {"gradient_checkpointing": True}
DROPOUT = {"disable_dropout": False}
IA3 = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


KINDS = {
    "dropout": (lora(lora_dropout=0.3), True, DROPOUT),
    "checkpointed": (lora(lora_dropout=0.3, use_rslora=True), True, DROPOUT | CHECKPOINTED),
    "layer": (lora(target_modules=["q_proj"], modules_to_save=["down_proj"]), True, {}),
    "head": (lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), True, {}),
    "norm": (lora(modules_to_save=["norm"]), True, CHECKPOINTED),
    "embedding": (lora(target_modules=["q_proj", "embed_tokens"]), False, {}),
    "dora": (lora(use_dora=True), True, CHECKPOINTED),
    "prompt": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), False, {}),
    "ia3": (IA3Config(task_type="CAUSAL_LM", **IA3), False, {}),
}


class TestAdapters:
    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds(self, settings: Settings, served: list[bool], kind: str) -> None:
        """Same dropout masks, so the same step as with one backward pass for each loss."""
        rows, (peft_config, together, changed) = tiny_pairs(16, missing=0.3), KINDS[kind]
        settings |= SGD | MICRO | changed
        trainer = make_trainer(settings, rows, peft_config=peft_config)
        start = parameters(trainer)
        trainer.train()
        end = parameters(trainer)
        assert served == [together] * 4
        assert any(not torch.equal(start[name], end[name]) for name in start)
        dense = trained(settings, rows, peft_config=peft_config, gradients="dense")
        assert_close(dense, end, 1e-5)

    def test_goes_on_with_an_adapter(self, settings: Settings, served: list[bool]) -> None:
        """TRL keeps a copy of it as the reference, in the same model."""
        model = moved_adapters(tiny_model())
        options = settings | SGD | CHECKPOINTED
        trainer = make_trainer(options, tiny_pairs(8), model=model, reference=None)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        trainer.train()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
        assert moved and all(".default." in name for name in moved)
        assert served == [True, True]
        assert logs(trainer)[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)

    def test_weights_in_bf16(self, settings: Settings) -> None:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny_model().to(dtype)
            options = settings | SGD | CHECKPOINTED
            trainer = make_trainer(options, tiny_pairs(8), model=model, peft_config=lora())
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

        rows = tiny_pairs(8, missing=0.3)
        linear = trained(settings | SGD, rows, model=model(), method="linear")
        assert "lm_head.weight" not in linear
        assert_close(trained(settings | SGD, rows, model=model(), c=0.0), linear, 1e-5)

    @pytest.mark.filterwarnings("ignore")  # of torch, about its compiler's options
    @pytest.mark.parametrize(
        ("adapters", "checkpointing"),
        [(False, False), (True, False), (True, True)],
        ids=["full", "lora", "checkpointed"],
    )
    def test_compiled(
        self,
        settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        adapters: bool,
        checkpointing: bool,
    ) -> None:
        """The one backward pass for all losses does not see through the compiler."""
        # transformers sets it for `torch_compile`, and it would compile all later trainers.
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
        ends = []
        for backend in (None, "eager"):
            settings |= SGD | {"gradient_checkpointing": checkpointing, "max_steps": 1}
            trainer = make_trainer(
                settings | {"torch_compile": backend is not None, "torch_compile_backend": backend},
                tiny_pairs(8),
                model=tiny_model(layers=1),
                peft_config=lora() if adapters else None,
            )
            trainer.train()
            ends.append(parameters(trainer))
        assert unwrap(trainer.optimizer).report.gradients.startswith("dense: ")
        assert_close(*ends, 1e-5)


# --- Steps, logs, checkpoints --------------------------------------------------------------------


class TestSteps:
    def test_last_group_of_an_epoch_is_smaller(self, settings: Settings) -> None:
        rows = tiny_pairs(10, missing=0.4)
        settings |= SGD | {"max_steps": -1, "num_train_epochs": 2}
        whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        assert_close(trained(settings, rows, **MICRO), trained(settings, rows, **whole), 1e-5)

    def test_runs_are_equal_and_so_with_a_worker(self, settings: Settings) -> None:
        rows = tiny_pairs(12, missing=0.3)
        settings |= {"train_sampling_strategy": "random", "max_steps": -1, "num_train_epochs": 2}
        first, second, worker = (
            make_trainer(settings | MICRO, rows, dataloader_num_workers=n) for n in (0, 0, 1)
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
        rows, settings = tiny_pairs(24, missing=0.4), settings | {"max_steps": 6}
        single = make_trainer(settings, rows)
        several = make_trainer(settings, rows, logging_steps=3, logging_first_step=True)
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
        settings |= MICRO | DROPOUT | {"lr_scheduler_type": "linear"}

        def trainer(**changed: Any) -> MultiObjectiveDPOTrainer:
            return make_trainer(settings | changed, rows, peft_config=lora(lora_dropout=0.2))

        whole = trainer()
        whole.train()
        saved = {"save_strategy": "steps", "save_steps": 3}
        first = trainer(**saved)
        first.add_callback(stop_at(3))
        first.train()
        again = trainer(**saved)
        with pytest.raises(ValueError, match="`output_dir` must not hold another run"):
            again.train()
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == whole.state.global_step == 8
        assert_close(parameters(again), parameters(whole), 0.0)
        assert logs(again) == logs(whole)

    def test_goes_on_after_an_error(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = tiny_pairs(8)
        trainer, fresh = (make_trainer(settings | SGD | MICRO, rows) for _ in range(2))
        fail_in_second_pass(monkeypatch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.train()
        fresh.train()
        assert_close(parameters(trainer), parameters(fresh), 0.0)
        assert logs(trainer) == logs(fresh)

    @pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
    def test_tries_again_with_smaller_batches(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch, peft_config: LoraConfig | None
    ) -> None:
        """After the forward pass of the second of two micro-batches ran out of memory."""
        rows, seen = tiny_pairs(12), []
        settings |= SGD | {"gradient_accumulation_steps": 2, "max_steps": 1}
        trainer = make_trainer(settings, rows, peft_config=peft_config, auto_find_batch_size=True)
        trainer.add_callback(
            Watch("on_step_end", lambda *_, optimizer, **__: seen.append(optimizer))
        )
        fail_in_second_pass(monkeypatch, RuntimeError("CUDA out of memory."))
        trainer.train()
        assert [unwrap(x).report.gradients for x in seen] == ["per_example"]
        smaller = {"per_device_train_batch_size": 3}
        expected = trained(settings, rows, peft_config=peft_config, **smaller)
        assert_close(parameters(trainer), expected, 0.0)


def fail_in_second_pass(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    original, calls = trl_module.completion_log_probs, []

    def failing(*arguments: Any) -> Tensor:
        found = original(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise error
        return found

    monkeypatch.setattr(trl_module, "completion_log_probs", failing)


class TestOptimizers:
    def test_own_optimizer(self, settings: Settings) -> None:
        """With momentum, a scheduler, and a frozen parameter in its groups."""
        ends = []
        for method in ("raco", "linear"):
            model = tiny_model()
            model.model.embed_tokens.requires_grad_(False)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
            own = {"optimizers": (optimizer, scheduler)}
            settings |= {"method": method, "c": 0.0}
            ends.append(trained(settings, tiny_pairs(8), model=model, others=own))
        assert_close(*ends, 1e-5)

    def test_reference_follows_the_model(self, settings: Settings) -> None:
        settings |= {"sync_ref_model": True, "ref_model_sync_steps": 2}
        trainer = make_trainer(settings, tiny_pairs(8), ref_model_mixup_alpha=1.0)
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
        for peft_config in (None, lora()):
            trainer = make_trainer(settings, tiny_pairs(8), peft_config=peft_config)
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
        settings |= SGD | MICRO | {"method": method, "c": 0.0}
        rows = tiny_pairs(6)
        twice = trained(settings, stream(rows[:4]))
        assert_close(trained(settings, stream(rows)), twice, 1e-6)

    def test_ways_to_write_a_preference(self, settings: Settings) -> None:
        """Whole numbers, floats, NaN, null and NumPy's; a weight of 1 or null changes nothing."""
        rows = tiny_pairs(8, missing=0.4)
        expected = trained(settings, rows)
        floats = [row | {"weight_helpful": 1.0, "weight_harmless": None} for row in rows]
        for i, row in enumerate(floats):
            for name in WEIGHTS:
                sign = row[f"pref_{name}"]
                row[f"pref_{name}"] = (math.nan, None)[i % 2] if not sign else float(sign)
        numpy = [
            row | {f"pref_{n}": np.int8(row[f"pref_{n}"] or 0) for n in WEIGHTS} for row in rows
        ]
        for data in (floats, stream(floats), stream(numpy)):
            assert_close(trained(settings, data), expected, 0.0)

    def test_names_of_objectives(self, settings: Settings) -> None:
        weights = {"a b": 0.3, "x/y": 0.3, "é": 0.2, "p=q,r": 0.1, "_loss": 0.1}
        names = tuple(weights)
        settings |= {"weights": weights, "eval_strategy": "steps"}
        trainer = make_trainer(settings, tiny_pairs(8, names), eval_rows=tiny_pairs(4, names))
        trainer.train()
        keys = set().union(*trainer.state.log_history)
        for name in weights:
            assert {f"loss/{name}", f"alpha/{name}", f"eval_loss/{name}"} <= keys

    def test_objective_of_weight_zero(self, settings: Settings) -> None:
        """It is clipped to nothing, so it moves nothing; it is measured all the same."""
        rows, settings = tiny_pairs(8, ("a", "b"), missing=0.3), settings | SGD | {"c": 0.0}
        both = make_trainer(settings, rows, weights={"a": 1.0, "b": 0.0})
        both.train()
        assert_close(parameters(both), trained(settings, rows, weights={"a": 1.0}), 1e-6)
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
        for peft_config, data in ((None, stream(rows)), (lora(), rows)):
            whole = trained(settings, rows, peft_config=peft_config, per_device_train_batch_size=8)
            assert_close(trained(settings, data, peft_config=peft_config, **parts), whole, 1e-5)

    def test_stream_as_evaluation_set(self, settings: Settings) -> None:
        rows, trainer = tiny_pairs(7, missing=0.3), make_trainer(settings, tiny_pairs(4))
        a, b = (trainer.evaluate(data) for data in (stream(rows), Dataset.from_list(rows)))
        for key in ("eval_loss", "eval_margin/helpful", "eval_labelled/harmless"):
            assert a[key] == b[key]

    def test_conversations(self, settings: Settings) -> None:
        """With the prompt in a column of its own, and inside both answers."""
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }} <eos> {% endfor %}"
            "{% if add_generation_prompt %}{% endif %}"
        )
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        explicit = [
            row | {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
            for row in tiny_pairs(8)
        ]
        implicit = [
            {key: value for key, value in row.items() if key != "prompt"}
            | {answer: row["prompt"] + row[answer] for answer in ("chosen", "rejected")}
            for row in explicit
        ]
        a, b = (
            trained(settings, rows, others={"processing_class": tokenizer})
            for rows in (explicit, implicit)
        )
        assert_close(a, b, 0.0)

    def test_truncation(self, settings: Settings) -> None:
        rows, settings = tiny_pairs(8), settings | SGD | {"max_length": 6}
        parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        assert_close(trained(settings, rows, **parts), trained(settings, rows), 1e-5)


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
        parser = TrlParser((MultiObjectiveDPOConfig,))
        [config] = parser.parse_args_and_config(["--config", str(path)])
        assert (config.weights, config.c) == (WEIGHTS, 0.2)

    def test_copies(self, settings: Settings) -> None:
        made = config(settings, weights="helpful=0.7,harmless=0.3", c=0.3)
        fields = {field.name for field in dataclasses.fields(made) if field.init}
        stored = json.loads(made.to_json_string())
        for other in (
            MultiObjectiveDPOConfig(**{k: v for k, v in stored.items() if k in fields}),
            pickle.loads(pickle.dumps(made)),
            copy.deepcopy(made),
            dataclasses.replace(made, method="linear"),
        ):
            assert (other.weights, other.c, other.beta) == (WEIGHTS, 0.3, BETA)

    def test_reports_to_tensorboard(self, settings: Settings) -> None:
        make_trainer(settings | {"report_to": "tensorboard"}, tiny_pairs(8)).train()
        assert list(Path(settings["output_dir"]).rglob("events*"))
