"""Checks of types, shapes, dtypes and numbers, without waiting for a device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor


def check_tensor(
    argument: str,
    value: Any,  # noqa: ANN401  # checked here
    shape: Mapping[str, int | None],
) -> None:
    """Raises unless the value is a tensor of the shape: dimension name -> size or None."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{argument}` must be a tensor; got {type(value).__name__}.")
    sizes = list(shape.values())
    if value.dim() != len(sizes) or any(
        size not in (None, actual) for size, actual in zip(sizes, value.shape, strict=True)
    ):
        known = [f"{name} = {size}" for name, size in shape.items() if size is not None]
        raise ValueError(
            f"`{argument}` must have shape [{', '.join(shape)}]"
            f"{' with ' if known else ''}{' and '.join(known)}; got {list(value.shape)}."
        )


def check_log_probs(
    argument: str,
    value: Any,  # noqa: ANN401  # checked here
    shape: Mapping[str, int | None],
) -> None:
    """Raises unless the value is a floating tensor of the shape."""
    check_tensor(argument, value, shape)
    if not value.is_floating_point():
        raise ValueError(f"`{argument}` must be of a floating dtype; got {value.dtype}.")


def checked_number(
    argument: str,
    value: Any,  # noqa: ANN401  # checked here
    *,
    positive: bool = False,
    below: float = math.inf,
) -> float:
    """Returns the value as a float if it is >= 0 (or > 0) and below the bound, or raises."""
    number = float(value) if isinstance(value, Real) else math.nan
    if not (0 <= number < below) or (positive and number == 0):
        low = "above 0" if positive else "0 or more"
        high = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"`{argument}` must be a number {low} and {high}; got {value!r}.")
    return number
