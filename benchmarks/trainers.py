"""Trainers whose steps are timed in turn: what `alignment_cost` and `one_pass` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

from benchmarks.harness import clock_of
from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer

STEPS = 3  # of a trainer in its turn; the first is not counted


class Timer(TrainerCallback):  # type: ignore[misc]  # transformers is not type-checked
    """Seconds of every step, from its begin to its end: clipping and optimizer are in it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, list[float]()

    def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401, D102
        self.start = self.clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401, D102
        self.seconds.append(self.clock() - self.start)


def make_trainer(
    kind: type[DPOTrainer],
    model: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    rows: list[dict[str, Any]],
    device: str,
    *,
    lora: bool,
    **settings: Any,  # noqa: ANN401
) -> DPOTrainer:
    """Returns a trainer that trains `STEPS` steps at each call of `train`; settings as TRL's."""
    is_ours = issubclass(kind, MultiObjectiveDPOTrainer)
    config = (MultiObjectiveDPOConfig if is_ours else DPOConfig)(
        max_steps=STEPS,
        bf16=device != "cpu",
        use_cpu=device == "cpu",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    policy, tokenizer = model
    timer = Timer(clock_of(device))
    trainer = kind(
        policy,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear") if lora else None,
        callbacks=[timer],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.timer = timer
    return trainer


def seconds_of_steps(trainers: Mapping[str, DPOTrainer], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of trainers that take turns, in an order that changes."""
    names = list(trainers)
    found: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = trainers[name].timer.seconds
            seconds.clear()
            trainers[name].train()
            found[name] += seconds[1:]
    return found


def resident_bytes(field: str) -> int:
    """Returns ``"VmRSS"``, the memory of this process, or ``"VmHWM"``, its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
