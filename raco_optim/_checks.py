"""Checks of arguments; each error names the rule, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

Choice = TypeVar("Choice", bound=str)

# Some optimizer or rule has these to set between steps.
_SETTINGS = ("c", "clip", "nonfinite", "rule", "solver", "weights")

# A squared norm p.Hp below ZERO (sum_i p_i |g_i|)^2 is the rounding error of a float64 Gram matrix.
ZERO = 64 * 2.0**-52

_SUM_TOLERANCE = 1e-6
# Rounding makes a float32 Gram matrix asymmetric and indefinite up to about this level.
_GRAM_TOLERANCE = 1e-4


def add_note(error: BaseException, note: str) -> None:
    """Adds a note to an exception, which keeps its class (PEP 678; Python 3.10 shows none)."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        vars(error)["__notes__"] = [*vars(error).get("__notes__", []), note]


def check_attribute(obj: object, name: str, base: type, fixed: Sequence[str] = ()) -> None:
    """Raises `AttributeError` for a misspelt setting, another rule's setting or a group's key.

    Other names are notes, as in torch. The user's own class may have any attribute.
    """
    if name.startswith("_") or name in vars(obj) or hasattr(type(obj), name):
        return
    # Lightning and Fabric imitate a class by an empty one.
    classes = [x for x in type(obj).__mro__ if issubclass(x, base)]
    own = next(x for x in classes if any(map(callable, vars(x).values())))
    if not own.__module__.startswith("raco_optim."):
        return
    known = [x for x in dir(own) if getattr(getattr(own, x), "fset", None)]
    if any(name in group for group in getattr(obj, "param_groups", ())):
        remedy = f"Set it in `param_groups`, as in group[{name!r}] = ..."
    elif close := get_close_matches(name.lower(), [*known, *fixed], 1, 0.7):
        remedy = f"Did you mean {close[0]!r}?"
    elif name in _SETTINGS:
        remedy = f"It has {', '.join(known) or 'no settings'}."
    else:
        return
    raise AttributeError(
        f"{own.__name__!r} object has no attribute {name!r}, so setting it would have no effect. "
        f"{remedy}"
    )


def checked_weights(weights: Any) -> list[float]:  # noqa: ANN401  # checked here
    """Returns `weights` as floats that sum to 1 exactly, or raises `ValueError`."""
    given = weights.values() if isinstance(weights, Mapping) else weights
    try:
        values = list(given)
        if isinstance(given, str | bytes | Set) or any(isinstance(x, str) for x in values):
            raise TypeError
        w = [float(x.detach() if isinstance(x, Tensor) else x) for x in values]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`weights` must be a sequence of numbers or a mapping from name to number; "
            f"got {weights!r}."
        ) from error
    if not w:
        raise ValueError("`weights` must hold at least one weight; got none. Pass one per loss.")
    if not all(math.isfinite(x) and x >= 0 for x in w):
        raise ValueError(f"`weights` must be finite and non-negative; got {w}.")
    total = math.fsum(w)
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ValueError(
            f"`weights` must sum to 1 (within {_SUM_TOLERANCE:g}); got {w}, which sums to "
            f"{total:.9g}. Divide each weight by the sum."
        )
    # Unchanged if the sum is 1 up to rounding: checking twice must change nothing.
    return w if abs(total - 1) <= 1e-15 else [x / total for x in w]


def checked_radius(c: Any, *, below_one: bool) -> float:  # noqa: ANN401  # checked here
    """Returns the radius `c` as a float, or raises `ValueError`."""
    try:
        value = math.nan if isinstance(c, str) else float(c)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`c` must be a number; got {c!r}.") from error
    if not (math.isfinite(value) and value >= 0 and (value < 1 or not below_one)):
        rule = "in [0, 1)" if below_one else "finite and non-negative"
        remedy = (
            " The descent guarantee needs c < 1; `CAGrad` accepts larger values without guarantee."
            if below_one
            else ""
        )
        raise ValueError(f"`c` must be {rule}; got {c!r}.{remedy}")
    return value


def checked_choice(argument: str, value: Choice, choices: Sequence[str]) -> Choice:
    """Returns `value` if it is one of `choices`, or raises `ValueError`."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{argument}` must be one of {expected}; got {value!r}.")
    return value


def checked_count(argument: str, value: Any) -> int:  # noqa: ANN401  # checked here
    """Returns `value` if it is an integer of at least 1, or raises `ValueError`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{argument}` must be an integer of at least 1; got {value!r}.")
    return value


def as_gram(gram: Tensor | Sequence[Sequence[float]], *, batched: bool = False) -> Tensor:
    """Returns `gram` as a float64 tensor, ``[m, m]`` or ``[..., m, m]``; values are not read."""
    if isinstance(gram, Tensor):
        tensor = gram.detach()
    else:
        try:  # numpy, because torch rounds Python's numbers to float32
            array = np.asarray(gram)
            if array.dtype.kind not in "biufc":
                raise TypeError
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"`gram` must be a square matrix of numbers; got {gram!r}.") from error
        # numpy has more number types than torch.
        kind = np.complex128 if array.dtype.kind == "c" else np.float64
        tensor = torch.from_numpy(array.astype(kind))
    if tensor.is_complex():
        raise ValueError(f"`gram` must be real; got {tensor.dtype}. Pass gram.real.")
    if tensor.layout is not torch.strided:
        raise ValueError(f"`gram` must be dense; got {tensor.layout}. Pass gram.to_dense().")
    is_square = tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2] > 0
    if not is_square or (tensor.dim() > 2 and not batched):
        raise ValueError(
            f"`gram` must have shape {'[..., m, m]' if batched else '[m, m]'} with m >= 1; got "
            f"{list(tensor.shape)}."
        )
    return tensor.to(torch.float64)


def check_gram_values(rows: list[list[float]]) -> None:
    """Raises `ValueError` unless the rows are finite, symmetric and have a diagonal >= 0."""
    for i, row in enumerate(rows):
        for j, entry in enumerate(row):
            if not math.isfinite(entry):
                raise ValueError(
                    f"`gram` must be finite; got {entry!r} at [{i}, {j}]. "
                    f"The gradient of loss {i if not math.isfinite(row[i]) else j} is NaN or Inf."
                )
    for i, row in enumerate(rows):
        if row[i] < 0:
            raise ValueError(
                f"`gram` must have a non-negative diagonal, <g_i, g_i>; got {row[i]!r} at "
                f"[{i}, {i}]. Is it a Gram matrix of gradients?"
            )
    for i, row in enumerate(rows):
        for j in range(i):
            scale = math.sqrt(row[i]) * math.sqrt(rows[j][j])
            if abs(row[j] - rows[j][i]) > _GRAM_TOLERANCE * scale:
                raise ValueError(
                    f"`gram` must be symmetric; got {row[j]!r} at [{i}, {j}] and {rows[j][i]!r} "
                    f"at [{j}, {i}]. Pass (gram + gram.T) / 2 if this is only rounding."
                )
            if abs(row[j]) > (1 + _GRAM_TOLERANCE) * scale:
                raise ValueError(
                    f"`gram` must satisfy |H_ij| <= sqrt(H_ii H_jj); got {row[j]!r} at "
                    f"[{i}, {j}] with the diagonal entries {row[i]!r} and {rows[j][j]!r}. "
                    f"Is it a Gram matrix of gradients?"
                )


def checked_parameters(
    argument: str,
    parameters: Any,  # noqa: ANN401  # checked here
    known: list[Tensor] | None = None,
    *,
    frozen: bool = False,
) -> list[Tensor]:
    """Returns the parameters as a list if all are known (or frozen, with `frozen`), or raises."""
    advice = "Pass for example model.trunk.parameters()."
    single = isinstance(parameters, Tensor) or not isinstance(parameters, Iterable)
    chosen = [parameters] if single else list(parameters)
    identities = {id(p) for p in known or ()}
    for p in chosen:
        if not isinstance(p, Tensor):
            raise TypeError(f"`{argument}` must be tensors; got {type(p).__name__}. {advice}")
        joins_later = frozen and isinstance(p, Parameter) and not p.requires_grad
        if known is not None and id(p) not in identities and not joins_later:
            raise ValueError(
                f"`{argument}` must be parameters of `inner`; got another tensor, of shape "
                f"{list(p.shape)}. {advice}"
            )
    if known is not None and not chosen:
        raise ValueError(
            f"`{argument}` must hold at least one parameter of `inner`; got none. {advice}"
        )
    return chosen
