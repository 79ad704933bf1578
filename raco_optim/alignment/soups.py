"""Rewarded soups: averages of the parameters of several models."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from raco_optim._checks import checked_weights

# Prefixes of peft's factors: LoRA, LoHa, LoKr, VeRA, and rotations.
_FACTOR = re.compile(r"\b(lora|hada|lokr|vera|oft|boft|hra)_")


def rewarded_soup(
    state_dicts: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    r"""Averages the parameters of models that were each trained on one objective.

    .. math:: \theta = \sum_i w_i \theta_i

    The models must be fine-tuned from the same model. The factors of LoRA adapters must not be
    averaged: with the updates :math:`\Delta_i = B_i A_i`,

    .. math:: \left( \sum_i w_i B_i \right) \left( \sum_i w_i A_i \right) \ne \sum_i w_i B_i A_i

    Merge each adapter into its model first (in peft, `merge_and_unload`) and average the merged
    models, as `raco-optim soup` does.

    Args:
        state_dicts: Objective -> state dict of its model. All must have the same keys, shapes and
            dtypes.
        weights: Objective -> weight, >= 0; they sum to 1. Models with weight 0 are ignored.

    Returns:
        A new state dict, on the devices of the first one. Floating tensors are averaged in float64
        and rounded once to their dtype; other tensors must be equal and are copied.

    Raises:
        TypeError: `state_dicts` or `weights` is not a mapping.
        ValueError: Names, keys, shapes or dtypes differ, or tensors that are not floating; a model
            holds factors of adapters; or the weights are negative or do not sum to 1.

    Example:
        >>> import torch
        >>> from raco_optim.alignment import rewarded_soup
        >>> helpful, short = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 0.0])}
        >>> rewarded_soup({"helpful": helpful, "short": short}, {"helpful": 0.75, "short": 0.25})
        {'w': tensor([1.5000, 1.5000])}

    References:
        Ramé et al., "Rewarded soups: towards Pareto-optimal alignment by interpolating weights
        fine-tuned on diverse rewards", arXiv 2306.04488.
    """
    for argument, value in (("state_dicts", state_dicts), ("weights", weights)):
        if not isinstance(value, Mapping):
            raise TypeError(
                f"`{argument}` must be a mapping from the name of an objective; got "
                f"{type(value).__name__}."
            )
    shares = dict(zip(weights, checked_weights(weights), strict=True))
    if set(state_dicts) != set(shares):
        raise ValueError(
            f"`weights` must have the names of `state_dicts`, {list(state_dicts)}; got "
            f"{list(shares)}."
        )
    used = {name: state_dicts[name] for name in state_dicts if shares[name] > 0}
    first_name, first = next(iter(used.items()))
    factors = [key for key in first if _FACTOR.search(key)]
    if factors and len(used) > 1:
        raise ValueError(
            f"`state_dicts` must hold merged models; got {factors[0]!r}, a factor of an adapter. "
            f"Call `merge_and_unload` of each model first, because averaged factors do not give "
            f"the average of the models."
        )
    for name, other in used.items():
        _check_alike(first_name, first, name, other)
    soup = {}
    for key, like in first.items():
        if like.is_floating_point():
            total = torch.zeros_like(like, dtype=torch.float64)
            for name, state_dict in used.items():
                total += shares[name] * state_dict[key].detach().to(total)
            soup[key] = total.to(like.dtype)
        else:
            soup[key] = like.detach().clone()
    return soup


def _check_alike(
    first_name: str, first: Mapping[str, Tensor], name: str, other: Mapping[str, Tensor]
) -> None:
    names = f"{first_name!r} and {name!r}"
    if first.keys() != other.keys():
        odd = sorted(first.keys() ^ other.keys())
        raise ValueError(
            f"`state_dicts` must have equal keys; got {odd[0]!r} in only one of {names} "
            f"({len(odd)} such keys). Do the models have the same architecture?"
        )
    for key, a in first.items():
        b = other[key]
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(
                f"`state_dicts` must have equal shapes and dtypes; got {list(a.shape)}, {a.dtype} "
                f"and {list(b.shape)}, {b.dtype} for {key!r} of {names}."
            )
        if not a.is_floating_point() and not torch.equal(a, b.to(a.device)):
            raise ValueError(
                f"`state_dicts` must have equal tensors of dtype {a.dtype}, which can't be "
                f"averaged; got different ones for {key!r} of {names}. Load quantised models in "
                f"full precision."
            )
