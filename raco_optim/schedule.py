"""A Gram matrix that serves several steps (``solve_every``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Schedule:
    """Says when the Gram matrix is due, and keeps it until then.

    It is due every `every` steps, and whenever other losses are absent than it was computed from.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._kept: Tensor | None = None
        self._absent: list[bool] = []
        self.age = 0
        """Steps since the Gram matrix was computed."""

    def gram(self, absent: list[bool]) -> Tensor | None:
        """Returns the Gram matrix of an earlier step, or None where it is due."""
        if self._kept is None or self._absent != absent or self.age + 1 >= self.every:
            return None
        return self._kept

    def advance(self, gram: Tensor, absent: list[bool], *, due: bool) -> None:
        """Counts a step, with the Gram matrix that it used."""
        self.age = 0 if due else self.age + 1
        if self.every > 1:
            self._kept, self._absent = gram, absent

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs."""
        return {"gram": self._kept, "absent": self._absent, "age": self.age}

    def load(self, state: dict[str, Any]) -> None:
        """Takes what `state` returned."""
        self._kept, self._absent, self.age = state["gram"], state["absent"], state["age"]
