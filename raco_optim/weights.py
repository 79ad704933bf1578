"""The user's weights, and by them the names and the order of the losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raco_optim._checks import as_list, checked_weights
from raco_optim.gradients import Loss
from raco_optim.materialized import Gradients

Weights = Sequence[float] | Mapping[str, float]
Losses = Iterable[Loss | None] | Mapping[str, Loss | None]


class LossWeights:
    """Weights by position or by name; or none, for any number of losses.

    Attributes:
        names: Names of the losses, None where positions name them.
        values: The weights, summing to 1; None where none are given.
    """

    def __init__(self, given: Weights | None) -> None:
        self.names = tuple(given) if isinstance(given, Mapping) else None
        self.values = None if given is None else checked_weights(given)

    @property
    def number(self) -> int | None:
        """Number of losses, None for any."""
        return None if self.values is None else len(self.values)

    @property
    def given(self) -> dict[str, float] | tuple[float, ...] | None:
        """The weights in the form they were given."""
        if self.values is None:
            return None
        if self.names is None:
            return tuple(self.values)
        return dict(zip(self.names, self.values, strict=True))

    def replace(self, weights: Weights) -> None:
        """Takes other weights for the same losses, or raises `ValueError`."""
        given = set(weights) if isinstance(weights, Mapping) else None
        if given != (None if self.names is None else set(self.names)):
            expected = "a sequence" if self.names is None else f"a mapping with {self.names}"
            raise ValueError(f"`weights` must stay {expected}; got {weights!r}.")
        ordered: Any = [weights[name] for name in self.names] if self.names else weights  # type: ignore[call-overload]
        checked = checked_weights(ordered)
        if self.number not in (None, len(checked)):
            raise ValueError(f"`weights` must keep its {self.number} entries; got {len(checked)}.")
        self.values = checked

    def of(self, number: int) -> list[float]:
        """Returns the weights of so many losses, uniform where none are given."""
        return self.values or [1 / number] * number

    def order(self, losses: Losses, pending: Gradients | None) -> tuple[tuple[str, ...], list[Any]]:
        """Returns names and losses in the order of the weights, or raises.

        Losses without names are named by their positions.

        Args:
            losses: What the user passed.
            pending: Of earlier micro-batches, with whose names they must agree.
        """
        names, number = self.names, self.number
        if pending is not None and number is None:
            names, number = pending.names if pending.named else None, len(pending.names)
        if isinstance(losses, Mapping):
            if names is None and number is None:
                names = tuple(losses)
            if names is None or set(losses) != set(names):
                expected = (
                    f"a sequence of {number}" if names is None else f"a mapping with {list(names)}"
                )
                raise ValueError(
                    f"`losses` must be {expected}, like the weights; got the names {list(losses)}."
                )
            return names, [losses[name] for name in names]
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

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs."""
        return {"weights": self.values, "names": None if self.names is None else list(self.names)}

    def check(self, state: dict[str, Any]) -> None:
        """Raises `ValueError` unless a state is of the same losses."""
        names = self.state()["names"]
        number = None if state["weights"] is None else len(state["weights"])
        if state["names"] != names or number != self.number:
            raise ValueError(
                f"`state_dict` must be of the same losses, {names or self.number}; got "
                f"{state['names'] or number}."
            )
        if state["weights"] is not None:
            checked_weights(state["weights"])
