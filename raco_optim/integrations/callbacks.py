"""Callbacks of the trainer: a log of the steps in the output folder, and one progress bar."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raco_optim.step_log import StepLogger

if TYPE_CHECKING:
    from transformers import Trainer, TrainerState, TrainingArguments

STEP_LOG = "steps.jsonl"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' warning about a deprecated name that TRL and peft use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        yield


def add_to(trainer: Trainer, *, step_log: bool) -> None:
    """Replaces the Trainer's progress bar and, with `step_log`, logs the reports of the steps."""
    from transformers import ProgressCallback, TrainerCallback

    class OneBar(ProgressCallback):  # type: ignore[misc]  # transformers is not type-checked
        """The Trainer's progress bar, without a second one for evaluations during training."""

        def on_prediction_step(self, *args: Any, **others: Any) -> None:  # noqa: ANN401
            if self.training_bar is None:
                super().on_prediction_step(*args, **others)

    class StepLog(_StepLog, TrainerCallback):  # type: ignore[misc]
        """Writes `STEP_LOG`."""

    handlers = trainer.callback_handler.callbacks
    handlers[:] = [OneBar() if type(x) is ProgressCallback else x for x in handlers]
    if step_log:
        trainer.add_callback(StepLog())


class _StepLog:
    """Writes the reports of all steps to the output folder, for `raco_optim.plot`.

    A run that resumes from a checkpoint appends to the file; a new run renames an existing one.
    """

    def __init__(self) -> None:
        self._logger: StepLogger | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: object, **__: object
    ) -> None:
        self.on_train_end()
        path = Path(args.output_dir, STEP_LOG)
        if state.global_step == 0 and state.is_world_process_zero and path.exists():
            path.replace(path.with_suffix(".old.jsonl"))
        self._logger = StepLogger(path, resume=state.global_step > 0)

    def on_step_end(
        self,
        _: TrainingArguments,
        state: TrainerState,
        __: object,
        *,
        optimizer: Any,  # noqa: ANN401  # wrapped by Accelerate
        **___: object,
    ) -> None:
        if self._logger is not None:
            self._logger.log(optimizer, state.global_step)

    def on_train_end(self, *_: object, **__: object) -> None:
        if self._logger is not None:
            self._logger.close()
        self._logger = None
