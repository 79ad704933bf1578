"""The objectives: the user's weights, and by them the names and the order of the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from raco_optim._checks import as_list, check_any_present, checked_weights

if TYPE_CHECKING:
    from raco_optim.distributed.group import Group
    from raco_optim.wrapper.parameters import Parameters

Weights = Sequence[float] | Mapping[str, float]
Loss = Tensor | Callable[[], Tensor]
Losses = Iterable[Loss | None] | Mapping[str, Loss | None]
Gradient = list[Tensor | None]
Found = tuple[Tensor | None, Gradient]
"""Value and gradient of a loss; None for the value of an absent one."""


@dataclass(frozen=True)
class Pending:
    """Values and gradients of earlier micro-batches of a step."""

    names: tuple[str, ...]
    named: bool
    parameters: Parameters
    values: list[Tensor | None]
    rows: list[Gradient]


@dataclass(frozen=True)
class Batch:
    """What one call of ``backward`` is about; all stages share it.

    Attributes:
        names: Names of the losses, in the order of the weights.
        losses: The losses; None for an absent one.
        weights: The user's weights, ``[m]``.
        parameters: The parameters, with their roles.
        pending: Gradients of earlier micro-batches.
        group: The processes that average their gradients; None for a process on its own.
        through: The tensor that the mode asks for: the representation, or scalars per example.
        retain_graph: Whether the graph of the losses is kept.
    """

    names: tuple[str, ...]
    losses: list[Loss | None]
    weights: list[float]
    parameters: Parameters
    pending: Pending | None
    group: Group | None
    through: Tensor | None
    retain_graph: bool

    @property
    def tensors(self) -> list[Tensor | None] | None:
        """The losses if none is a callable, else None."""
        found = [x for x in self.losses if x is None or isinstance(x, Tensor)]
        return found if len(found) == len(self.losses) else None

    @property
    def present(self) -> list[str | None]:
        """Names of the losses, with None for the absent ones."""
        return [n if x is not None else None for n, x in zip(self.names, self.losses, strict=True)]

    def check_any_present(self) -> None:
        """Raises `ValueError` if no loss is there, in this micro-batch or before."""
        if self.pending is None:
            check_any_present(self.losses)


class Objectives:
    """Weights by position or by name; or none, for any number of losses.

    Attributes:
        names: Names of the losses, None where positions name them.
        weights: The weights, summing to 1; None where none are given.
    """

    def __init__(self, weights: Weights | None) -> None:
        self.names: tuple[str, ...] | None = None
        self.weights: list[float] | None = None
        if weights is None:
            return
        keys = _keys(weights)
        if keys is None:
            self.weights = checked_weights(weights)
        else:
            self.names = tuple(_checked_name(key) for key in keys)
            self.weights = checked_weights([weights[key] for key in keys])  # type: ignore[call-overload]

    @property
    def number(self) -> int | None:
        """Number of losses, None for any."""
        return None if self.weights is None else len(self.weights)

    @property
    def given(self) -> Mapping[str, float] | tuple[float, ...] | None:
        """The weights in the form they were given, read-only."""
        if self.weights is None:
            return None
        if self.names is None:
            return tuple(self.weights)
        return _ReadOnlyDict(zip(self.names, self.weights, strict=True))

    def replace(self, weights: Weights) -> None:
        """Takes other weights for the same losses, or raises `ValueError`."""
        keys = _keys(weights)
        if (None if keys is None else set(keys)) != (self.names and set(self.names)):
            expected = "a sequence" if self.names is None else f"a mapping with {list(self.names)}"
            raise ValueError(f"`weights` must stay {expected}; got {weights!r}.")
        ordered: Any = [weights[name] for name in self.names] if self.names else weights  # type: ignore[call-overload]
        checked = checked_weights(ordered)
        if self.number not in (None, len(checked)):
            raise ValueError(f"`weights` must keep its {self.number} entries; got {len(checked)}.")
        self.weights = checked

    def of(self, number: int) -> list[float]:
        """Returns the weights of so many losses, uniform where none are given."""
        return self.weights or [1 / number] * number

    def order(self, losses: Losses, pending: Pending | None) -> tuple[tuple[str, ...], list[Any]]:
        """Returns names and losses in the order of the weights, or raises.

        Losses without names are named by their positions. They must agree with those of earlier
        micro-batches.
        """
        names, number = self.names, self.number
        if pending is not None and number is None:
            names, number = pending.names if pending.named else None, len(pending.names)
        keys = _keys(losses)
        if keys is not None:
            if names is None and number is None:
                names = tuple(_checked_name(key) for key in keys)
            if names is None or set(keys) != set(names):
                expected = (
                    f"a sequence of {number}" if names is None else f"a mapping with {list(names)}"
                )
                raise ValueError(
                    f"`losses` must be {expected}, like the weights; got the names {list(keys)}."
                )
            return names, [losses[name] for name in names]  # type: ignore[call-overload]
        ordered = as_list(losses)
        if names is not None:
            raise ValueError(
                f"`losses` must be a mapping with the names {list(names)}; got a "
                f"{type(losses).__name__}."
            )
        if number is not None and number != len(ordered):
            remedy = (
                "Pass None for a loss that is absent from this batch."
                if len(ordered) < number
                else "Give each loss a weight."
            )
            raise ValueError(
                f"`losses` must hold one loss per weight, {number}; got {len(ordered)}. {remedy}"
            )
        return tuple(str(i) for i in range(len(ordered))), ordered

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs."""
        return {"weights": self.weights, "names": None if self.names is None else list(self.names)}

    def loaded(self, state: Mapping[str, Any]) -> tuple[list[float] | None, list[int] | None]:
        """Returns weights and the place of each loss in a state of the same losses, or raises."""
        saved, names = state["weights"], state["names"]
        try:
            same = (
                names is None
                if self.names is None
                else names is not None and sorted(names) == sorted(self.names)
            )
            if not same or (None if saved is None else len(saved)) != self.number:
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"`state_dict` must be of the same losses, {self.names or self.number}; got "
                f"{names or (len(saved) if isinstance(saved, list) else saved)!r}."
            ) from None
        places = None if self.names is None else [names.index(name) for name in self.names]
        weights = None if saved is None else checked_weights(saved)
        if weights is not None and places is not None:
            weights = [weights[place] for place in places]
        return weights, places


class _ReadOnlyDict(dict[str, float]):
    """The weights by name, which say how to set them when somebody changes an entry."""

    def _refuse(self, *_: object, **__: object) -> Any:  # noqa: ANN401
        raise TypeError(
            "`weights` is read-only; set all at once, as in opt.weights = {**opt.weights, ...}, "
            "so that they sum to 1."
        )

    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]
    clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[dict[str, float]], tuple[dict[str, float]]]:
        return dict, (dict(self),)


def _keys(values: object) -> list[Any] | None:
    """Returns the keys of a mapping; a TensorDict iterates over its batch instead."""
    if isinstance(values, Mapping) or (hasattr(values, "keys") and hasattr(values, "__getitem__")):
        return list(values.keys())
    return None


def _checked_name(name: object) -> str:
    """Returns the name as a plain string, which a checkpoint and a log can hold, or raises."""
    if not isinstance(name, str):
        raise TypeError(
            f"names of losses must be strings; got {name!r}, of type {type(name).__name__}. Pass "
            f"a sequence for losses without names."
        )
    return str.__str__(name)  # not `str(name)`, which an enum may override
