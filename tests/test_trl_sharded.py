"""The trainer with FSDP2: two processes with half of the model each do the steps of one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import raco_optim
from raco_optim.integrations import trl as trl_module
from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
from tests import test_trl_trainer as base
from tests.ranks import Failure, Ranks
from tests.test_trl_distributed import (
    EIGHT,
    MICRO,
    TIMES,
    Trained,
    assert_logged_alike,
    assert_same,
    distance,
    launched,
)
from tests.test_trl_losses import tiny_mixture
from tests.test_trl_settings import Watch
from tests.test_trl_trainer import Settings, parameters
from tests.tiny_language_models import FAMILIES, tiny_model, tiny_pairs, tiny_tokenizer

pytestmark = base.pytestmark
offline, settings = base.offline, base.settings

FSDP: Settings = {"fsdp": True, "fsdp_config": {"version": 2}}


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """Lets Accelerate shard a model on CPUs, as it does on accelerators."""
    original = AcceleratorState.__init__

    def changed(self: Any, *args: Any, fsdp_plugin: Any = None, **others: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **others)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            # From which others copy it.
            PartialState._shared_state["distributed_type"] = self.distributed_type

    with mock.patch.object(AcceleratorState, "__init__", changed):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


@dataclass(frozen=True)
class Case:
    """One training; what is not said is as in a single process with the joint batch."""

    family: str = "llama"
    changed: Settings = field(default_factory=dict)
    lora: bool = False
    missing: float = 0.3
    resume: bool = False
    fsdp: Settings = field(default_factory=dict)
    experts: bool = False
    ran: str = "per_example"  # how the gradients were computed; "" where they are not combined


def run(rank: int | None, case: Case, settings: Settings, folder: Path) -> Trained:
    """Trains, in one process or as a rank under FSDP2, and evaluates."""
    # AdamW would make a step of the rounding of a gradient that is nearly zero, as Gemma's are.
    settings = settings | EIGHT | {"max_steps": 4, "adam_epsilon": 1e-3} | case.changed
    settings |= {"weights": base.WEIGHTS, "c": 0.6, "max_grad_norm": 0.5}
    settings["output_dir"] += "-one" if rank is None else "-two"
    if rank is None and case.experts:
        settings["gradient_accumulation_steps"] *= 2
    elif rank is None:
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            settings[key] *= 2
    else:
        settings |= FSDP | {"fsdp_config": {"version": 2, **case.fsdp}}
    peft = LoraConfig(r=2, target_modules="all-linear") if case.lora else None
    name = "mixture" if case.experts else case.family
    train_rows, held_out = (
        Dataset.from_json(str(folder / f"{x}.jsonl"), cache_dir=str(folder / "cache"))
        for x in (f"train-{case.missing}", "test")
    )

    def trainer(**others: Any) -> MultiObjectiveDPOTrainer:
        made = MultiObjectiveDPOTrainer(
            str(folder / name),
            args=MultiObjectiveDPOConfig(**settings | others),
            train_dataset=train_rows,
            eval_dataset=held_out,
            processing_class=tiny_tokenizer(),
            peft_config=peft,
        )
        if case.resume:  # what somebody has set before the checkpoint
            made.add_callback(Watch("on_step_begin", reweigh))
        return made

    ran: list[str] = []
    with launched(rank), fsdp_on_cpus():
        if case.resume and rank is not None:
            first = trainer(save_strategy="steps", save_steps=2)
            first.add_callback(Watch("on_step_end", stop))
            first.train()
        torch.manual_seed(0)
        last = trainer()
        if case.ran:
            last.add_callback(
                Watch("on_step_end", lambda *_, optimizer, **__: ran.append(how(optimizer)))
            )
        last.train(resume_from_checkpoint=case.resume and rank is not None)
        last.evaluate()
    for module in last.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # gathered by the evaluation, perhaps
    assert rank is None or all(x.startswith(case.ran) for x in ran), ran
    found = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in parameters(last).items()}
    assert any(isinstance(p, DTensor) for p in found.values()) == (rank is not None)
    found = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in found.items()}
    logs = [
        {
            key: value
            for key, value in entry.items()
            # A run that goes on has the mean over all its steps, not over those since then.
            if key != "train_loss" and not any(t in key for t in TIMES)
        }
        for entry in last.state.log_history
    ]
    return found, logs


def stop(state: Any, control: Any, **_: Any) -> None:
    control.should_training_stop = control.should_training_stop or state.global_step == 2


def how(optimizer: Any) -> str:
    return raco_optim.unwrap(optimizer).report.gradients


def reweigh(state: Any, _: Any, *, optimizer: Any, **__: Any) -> None:
    if state.global_step == 1:
        raco_optim.unwrap(optimizer).weights = {"helpful": 0.4, "harmless": 0.6}


SHARDS: Settings = {"state_dict_type": "SHARDED_STATE_DICT"}
CASES: dict[str, Case] = {
    "plain": Case("llama"),
    "checkpointing": Case("llama", MICRO | {"gradient_checkpointing": True}),
    "checkpointing by FSDP": Case(
        "qwen3",
        {"method": "mgda"},
        fsdp={"activation_checkpointing": True, "reshard_after_forward": False},
    ),
    "adapters": Case("qwen3", MICRO, lora=True),
    "few labels": Case("qwen3", MICRO, missing=0.8),
    "few labels, linear": Case("gemma3", MICRO | {"method": "linear"}, missing=0.8, ran=""),
    "a pass for each": Case("gemma3", MICRO | {"gradients": "dense"}, missing=0.8, ran="dense"),
    # With 1e-3, the rounding of float32 moves the end of this run by 1.6e-5, in one process too.
    "precomputed": Case("gemma3", MICRO | {"precompute_ref_log_probs": True, "adam_epsilon": 1e-2}),
    "resumed": Case("gemma3", resume=True),
    "resumed from shards": Case("llama", MICRO, resume=True, fsdp=SHARDS),
    "resumed adapters": Case("llama", lora=True, resume=True),
    "experts": Case(changed=MICRO, experts=True, ran="dense: a parameter is in no known layer"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and pairs in files, as the ranks read them."""
    made = tmp_path_factory.mktemp("files")
    for family in FAMILIES:
        tiny_model(family, seed=1).save_pretrained(made / family)
    tiny_mixture().save_pretrained(made / "mixture")
    rows = {f"train-{x}": tiny_pairs(32, missing=x, seed=3) for x in (0.3, 0.8)}
    for name, pairs in (rows | {"test": tiny_pairs(7, missing=0.3, seed=8)}).items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return made


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(two_ranks: Ranks, settings: Settings, folder: Path, name: str) -> None:
    case = CASES[name]
    expected, expected_logs = run(None, case, settings, folder)
    mine, theirs = two_ranks.run(run, case, settings, folder)
    assert_same(mine, theirs)
    assert distance(mine[0], expected) < 1e-5
    if case.experts:  # their auxiliary loss is a mean over batches, one of which is filled up
        mine[1].pop(), expected_logs.pop()
    assert_logged_alike(mine[1], expected_logs, 1e-4)


class Gatherings(TorchDispatchMode):
    """Counts the messages by which FSDP2 gathers parameters."""

    count = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather_base" in str(call)
        return call(*args, **(kwargs or {}))


def gatherings(rank: int, settings: Settings, folder: Path) -> tuple[str, list[int], int]:
    """How gradients were computed, how often parameters were gathered by step, and the groups."""
    seen: list[int] = []
    settings = settings | FSDP | {"weights": base.WEIGHTS, "loss_type": "simpo"}  # no reference
    with launched(rank), fsdp_on_cpus(), Gatherings() as sent:
        trainer = sharded_trainer(settings, folder)
        trainer.add_callback(Watch("on_step_begin", lambda *_, **__: seen.append(sent.count)))
        trainer.add_callback(Watch("on_step_end", lambda *_, **__: seen.append(sent.count)))
        trainer.train()
    states = {x._get_fsdp_state() for x in trainer.model.modules() if isinstance(x, FSDPModule)}
    groups = sum(len(state._fsdp_param_groups) for state in states)
    counts = [end - begin for begin, end in zip(seen[::2], seen[1::2], strict=True)]
    return how(trainer.optimizer), counts, groups


@pytest.mark.parametrize("mode", ["per_example", "dense"])
def test_one_gathering_for_all_losses(
    two_ranks: Ranks, settings: Settings, folder: Path, mode: str
) -> None:
    """One in the forward pass and one in the backward pass, but for the last layers."""
    settings |= {"gradients": mode, "max_steps": 3, "max_grad_norm": 0.0}
    for ran, counts, groups in two_ranks.run(gatherings, settings, folder):
        assert ran == mode
        again = 0 if mode == "per_example" else groups  # of the second loss
        assert counts[1:] == 2 * [groups + groups - 1 + again]


def exported(rank: int, settings: Settings, folder: Path) -> dict[str, Tensor] | None:
    """Trains, and returns the whole model."""
    settings = settings | FSDP | {"weights": base.WEIGHTS}
    with launched(rank), fsdp_on_cpus():
        trainer = sharded_trainer(settings, folder)
        trainer.train()
        found: dict[str, Tensor] = trainer.accelerator.get_state_dict(trainer.model)
    return found if rank == 0 else None


def sharded_trainer(settings: Settings, folder: Path) -> MultiObjectiveDPOTrainer:
    return MultiObjectiveDPOTrainer(
        str(folder / "llama"),
        args=MultiObjectiveDPOConfig(**settings),
        train_dataset=Dataset.from_list(tiny_pairs(16, missing=0.3)),
        processing_class=tiny_tokenizer(),
    )


def test_saves_a_model_for_everybody(two_ranks: Ranks, settings: Settings, folder: Path) -> None:
    settings |= {"save_strategy": "steps", "save_steps": 2}
    state, _ = two_ranks.run(exported, settings, folder)
    checkpoint = Path(settings["output_dir"], "checkpoint-2")
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], x) for name, x in loaded.items())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapters"])
def test_bfloat16_rounds_neither_scores_nor_sums(
    two_ranks: Ranks, settings: Settings, folder: Path, lora: bool
) -> None:
    """The first loss is log 2, as policy and reference are one."""
    case = Case("qwen3", MICRO | {"bf16": True, "max_steps": 2}, lora=lora)
    mine, theirs = two_ranks.run(run, case, settings, folder)
    assert_same(mine, theirs)
    assert mine[1][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert mine[1][1]["loss"] != pytest.approx(math.log(2), abs=1e-6)
    _, alone = run(None, case, settings, folder)
    assert mine[1][0]["grad_norm/helpful"] == pytest.approx(alone[0]["grad_norm/helpful"], rel=0.05)


# --- Accidents -----------------------------------------------------------------------------------


def nan_scores(rank: int, settings: Settings, folder: Path) -> None:
    forward = trl_module.completion_log_probs

    def spoiled(*arguments: Any) -> Tensor:
        return forward(*arguments) * (math.nan if rank == 1 else 1.0)

    with (
        launched(rank),
        fsdp_on_cpus(),
        mock.patch.object(trl_module, "completion_log_probs", spoiled),
    ):
        sharded_trainer(settings | FSDP | {"weights": base.WEIGHTS}, folder).train()


@pytest.mark.parametrize("method", ["raco", "linear"])
def test_nan_in_one_process_is_raised_in_all(
    two_ranks: Ranks, settings: Settings, folder: Path, method: str
) -> None:
    for outcome in two_ranks.outcomes(nan_scores, settings | {"method": method}, folder):
        assert isinstance(outcome, Failure)
        assert "NaN or Inf" in outcome.trace


def refused(rank: int, settings: Settings, folder: Path, shards: bool, launcher: bool) -> None:
    told = {"ACCELERATE_USE_FSDP": "true"} if launcher else {}
    with (
        launched(rank),
        fsdp_on_cpus() if shards else nullcontext(),
        mock.patch.dict(os.environ, told),
    ):
        sharded_trainer(settings | {"weights": base.WEIGHTS}, folder)


@pytest.mark.parametrize(
    ("changed", "shards", "launcher", "message"),
    [
        (
            {"fsdp": True, "fsdp_config": {"version": 1}},
            True,
            False,
            "FSDP of version 1 must be off",
        ),
        (FSDP, False, False, "`fsdp` is set and has no effect"),
        ({}, False, True, "FSDP is set and has no effect"),
        (
            {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}},
            True,
            False,
            "`cpu_ram_efficient_loading` of FSDP must be off",
        ),
    ],
)
def test_what_would_not_be_sharded_is_refused(
    two_ranks: Ranks,
    settings: Settings,
    folder: Path,
    changed: Settings,
    shards: bool,
    launcher: bool,
    message: str,
) -> None:
    for outcome in two_ranks.outcomes(refused, settings | changed, folder, shards, launcher):
        assert isinstance(outcome.error, ValueError)
        assert message in outcome.trace
