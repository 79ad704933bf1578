"""Training with FSDP2, by Accelerate's settings: each process holds a part of the model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raco_optim.optimizer import MultiObjectiveOptimizer

if TYPE_CHECKING:
    from transformers import Trainer

# What torch's optimizer checkpoints leave out: weights, c, and how many steps were skipped.
_OWN_STATE = "raco_optim.pt"


def refused(what: str) -> str:
    """Says that the trainer does not work with something, and what does."""
    return (
        f"{what} must be off, because MultiObjectiveDPOTrainer does not work with it. Where each "
        f"process is to hold a part of the model, use FSDP2: fsdp=True with "
        f"fsdp_config={{'version': 2}}, or `accelerate launch` with fsdp_version 2. Else launch "
        f"with `torchrun` or `accelerate launch --multi_gpu`."
    )


def prepare(trainer: Trainer) -> None:
    """Checks how the model is to be sharded, and sets in which precision.

    Call it when there is an accelerator, and before the reference model is sharded.

    Raises:
        ValueError: By something other than FSDP2, or FSDP is set and Accelerate ignores it.
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    found = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "tensor or context parallelism": trainer.accelerator.parallelism_config is not None,
        "FSDP of version 1": plugin is not None and plugin.fsdp_version != 2,
    }
    for name, on in found.items():
        if on:
            raise ValueError(refused(name))
    if plugin is None:
        launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if trainer.args.fsdp or launched:
            raise ValueError(
                f"{'`fsdp`' if trainer.args.fsdp else 'FSDP'} is set and has no effect, because "
                f"Accelerate shards models on several accelerators only; got "
                f"{trainer.args.world_size} process(es) on {trainer.args.device.type}. Launch one "
                f"process per accelerator, or turn FSDP off."
            )
        return
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "`cpu_ram_efficient_loading` of FSDP must be off, because TRL shards the reference "
            "model without the values that the first process alone has loaded then; got True. Set "
            "it to False in `fsdp_config` or in Accelerate's configuration."
        )
    if "SHARDED" in str(plugin.state_dict_type) and trainer.args.process_index == 0:
        warnings.warn(
            "with SHARDED_STATE_DICT, checkpoints hold shards and no model.safetensors, and "
            "`save_model` writes none. `accelerate merge-weights "
            "checkpoint-N/pytorch_model_fsdp_0 FOLDER` makes one; or set state_dict_type to "
            "FULL_STATE_DICT.",
            stacklevel=2,
        )
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.param_dtype == policy.reduce_dtype == policy.output_dtype:
        # Accelerate's own would round log-probabilities and gradients of 8 bits: log 2 to 0.6875.
        plugin.mixed_precision_policy = replace(
            policy, reduce_dtype=torch.float32, output_dtype=None
        )


def present_in_all(
    losses: Sequence[Tensor | None], scores: Tensor, counts: Tensor | None
) -> list[Tensor | None]:
    """Puts a zero where a loss is absent here and present elsewhere: all need its backward pass.

    Args:
        losses: m losses of this process's pairs, None for an objective that labels none of them.
        scores: The scores of the completions, with the graph of the forward pass.
        counts: Labelled pairs of each objective in all processes and micro-batches, ``[m]``.
    """
    there = [True] * len(losses) if counts is None else [n > 0 for n in counts.tolist()]
    return [
        0 * scores.sum() if loss is None and somewhere else loss
        for loss, somewhere in zip(losses, there, strict=True)
    ]


def save_own_state(optimizer: MultiObjectiveOptimizer, folder: str) -> None:
    """Saves what Accelerate's checkpoint of the optimizer lacks; call it in one process."""
    torch.save(optimizer._own_state(), Path(folder, _OWN_STATE))


def load_own_state(optimizer: MultiObjectiveOptimizer, folder: str) -> None:
    """Loads it; call it in every process."""
    optimizer._loader(torch.load(Path(folder, _OWN_STATE), weights_only=True))()
