"""Checks before a training starts, in one process or in several."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn

from raco_optim.distributed.agreement import parameter_settings, raise_together
from raco_optim.distributed.group import Group, launched_world_size
from raco_optim.integrations.sharding import refused
from raco_optim.wrapper.parameters import Parameters

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

# Settings that must be equal in all processes: the loss, the batches, and when the processes
# communicate.
_SETTINGS = (
    *("weights", "method", "c", "solver", "nonfinite", "modpo_objective", "loss_type", "beta"),
    *(
        "loss_weights",
        "label_smoothing",
        "simpo_gamma",
        "seed",
        "data_seed",
        "train_sampling_strategy",
    ),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"),
    *("num_train_epochs", "logging_strategy", "logging_steps", "eval_strategy", "eval_steps"),
    *("save_strategy", "save_steps"),
)


def current_group() -> Group | None:
    """Returns the processes that train together; None if there is only one."""
    group = Group()
    return group if group.is_distributed else None


def check_processes(args: TrainingArguments) -> None:
    """Raises `ValueError` if the Trainer misses processes or gives them unequal batches.

    With several processes it makes each load its batches (``dispatch_batches=False``).
    """
    group = current_group()
    number = max(launched_world_size(), 1 if group is None else group.world_size)
    if number != args.world_size:
        raise ValueError(
            f"the Trainer must see all processes, {number}; it sees {args.world_size}. Launch the "
            f"script with `torchrun` or `accelerate launch`; without accelerators, pass "
            f"use_cpu=True too."
        )
    if number == 1:
        return
    batches = args.accelerator_config
    if not batches.even_batches:
        raise ValueError(
            "`accelerator_config` must have `even_batches` at True, because all processes need the "
            "same number of batches; got False."
        )
    if batches.dispatch_batches:
        raise ValueError(
            "`accelerator_config` must have `dispatch_batches` off, because the batches of the "
            "processes differ in length and can't be joined; got True."
        )
    batches.dispatch_batches = False  # None is True for a stream


def check_stored(dataset: object, group: Group | None) -> None:
    """Raises `ValueError` if TRL can't share reference log-probabilities between processes."""
    if group is not None and isinstance(dataset, Dataset) and not dataset.cache_files:
        raise ValueError(
            "`precompute_ref_log_probs` must be False with several processes and a data set in "
            "memory, because TRL shares the log-probabilities in a file next to the data set's; "
            "got True. Load the data set from a file (datasets.load_dataset)."
        )


def check_whole(trainer: Trainer) -> None:
    """Raises `ValueError` if the model is sharded before the Trainer shards it."""
    if _all_shared(trainer.model.parameters()).is_sharded:
        raise ValueError(refused("sharding of the model before the training"))


def average_gradients(model: nn.Module, group: Group) -> None:
    """Averages ``.grad`` of the parameters over the processes."""
    for p in model.parameters():
        if p.grad is not None:
            with group.contact():
                dist.all_reduce(p.grad, group=group.group)
            p.grad.div_(group.world_size)


def check_start(trainer: Trainer, group: Group | None, resume: str | bool | None) -> None:
    """Raises `ValueError` in all processes if they disagree or the folder holds another run."""
    args = trainer.args
    models = [trainer.model] if trainer.ref_model is None else [trainer.model, trainer.ref_model]
    settings = {f"`{name}`": vars(args)[name] for name in _SETTINGS}
    if group is not None:
        parameters = _all_shared(p for model in models for p in model.parameters())
        settings |= parameter_settings(group, parameters)
    with raise_together(group, settings):
        found = sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*"))
        steps = [int(n) for name in found if (n := name.rpartition("-")[2]).isdigit()]
        settings["the last checkpoint in `output_dir`"] = max(steps, default=None)
        if found and not resume:
            raise ValueError(
                f"`output_dir` must not hold another run; got {args.output_dir} with {found[0]}. "
                f"Pass resume_from_checkpoint=True to continue that run, or choose another folder."
            )


def _all_shared(parameters: Iterable[Tensor]) -> Parameters:
    tensors = list(parameters)
    return Parameters(tensors, [True] * len(tensors), [], [p.requires_grad for p in tensors])
