"""Closures that return several losses, for inner optimizers that evaluate them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raco_optim.objectives import Losses, is_single

if TYPE_CHECKING:
    from raco_optim.optimizer.multi_objective import MultiObjectiveOptimizer

_RETURN = (
    "`closure` must return the losses, one per weight, as a list or mapping, without calling "
    "`backward` (or call `backward` and return None); it {got}. In a LightningModule, set "
    "`self.automatic_optimization = False` and call `backward` and `step` in `training_step`."
)


def step_with(optimizer: MultiObjectiveOptimizer, closure: Callable[[], Losses | None]) -> Any:  # noqa: ANN401
    """Performs the inner step; each evaluation of the closure runs `backward`."""
    core = optimizer._core
    if not callable(closure):
        raise TypeError(
            f"`closure` must be a function without arguments that returns the losses; got "
            f"{type(closure).__name__}. For losses, call `backward(losses)` and then `step()`."
        )

    def weighted_loss() -> Tensor | None:
        before = core.progress.report
        with torch.enable_grad():
            losses = closure()
        ran, got = core.progress.report is not before, ""
        if losses is None:
            if core.progress.report is None:
                got = "returned None without calling `backward`"
        elif ran:
            got = "called `backward` and returned losses"
        elif is_single(losses):
            got = f"returned a single {type(losses).__name__}"
        if got:
            raise TypeError(_RETURN.format(got=got))
        if losses is not None:
            optimizer.backward(losses)
        if optimizer._skipping():
            raise _SkippedError
        report = core.progress.report
        if report is None or (losses is None and not ran):
            return None
        return report.losses @ report.weights.to(report.losses)

    with contextlib.suppress(_SkippedError):
        return optimizer.optimizer.step(weighted_loss)
    return None


class _SkippedError(Exception):
    """Leaves the inner step if the losses of its closure are not finite."""
