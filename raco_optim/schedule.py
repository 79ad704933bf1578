"""A Gram matrix that serves several steps (``solve_every``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Names in their order; None for an absent loss.
Losses = list[str | None]


class Schedule:
    """Says when the Gram matrix is due, and keeps it until then.

    It is due every `every` steps, and whenever the losses are others, or others of them absent.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._kept: Tensor | None = None
        self._losses: Losses = []
        self.age = 0
        """Steps since the Gram matrix was computed."""

    def gram(self, losses: Losses) -> Tensor | None:
        """Returns the Gram matrix of an earlier step, or None where it is due."""
        if self._kept is None or self._losses != losses or self.age + 1 >= self.every:
            return None
        return self._kept

    def advance(self, gram: Tensor, losses: Losses, age: int) -> None:
        """Keeps the Gram matrix that a step used, and its age in steps."""
        self.age = age
        if self.every > 1:
            self._kept, self._losses = gram, losses

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs."""
        return {"gram": self._kept, "losses": self._losses, "age": self.age}

    def load(self, state: dict[str, Any]) -> None:
        """Takes what `state` returned."""
        if self.every > 1:
            self._kept, self._losses, self.age = state["gram"], state["losses"], state["age"]
