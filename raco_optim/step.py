"""The stages in a row: what the optimizer wrapper, and any trainer with its own loop, calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from raco_optim import ghost, materialized, replicated, surrogate
from raco_optim._checks import check_any_present
from raco_optim.coefficients import MixingCoefficients
from raco_optim.combine import Coefficients
from raco_optim.gradients import Found, Loss, iterate_gradients
from raco_optim.materialized import Gradients, Memory, add_pending
from raco_optim.processes import Processes, is_sharded
from raco_optim.report import StepReport, make_report

Rule = Callable[[Tensor], Tensor | MixingCoefficients]
NonFinite = Literal["raise", "skip", "propagate"]
NONFINITE = ("raise", "skip", "propagate")
Mode = Literal["materialized", "ghost", "representation"]
MODES = ("materialized", "ghost", "representation")
EXACT = ("materialized", "ghost")


class PerLossGradients(Protocol):
    """What a mode knows of the gradients of m losses."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the losses."""

    @property
    def values(self) -> list[Tensor | None]:
        """Values of the losses; None for an absent one."""

    @property
    def where(self) -> str:
        """Which processes have a loss that is NaN or Inf, in words: " on rank 1"; "" for none."""

    def gram(self, shared: Sequence[bool]) -> Tensor:
        """Computes the Gram matrix of the shared part, ``[m, m]``, float64."""

    def finite(self, shared: Sequence[bool]) -> Tensor:
        """Computes what is finite where the other part is, one number per loss, ``[m]``."""

    def add_to_grad(
        self, parameters: Sequence[Tensor], coefficients: Coefficients, *, check: bool
    ) -> bool:
        """Adds the combined gradient to ``.grad``.

        The gradients are consumed. With `check`, nothing is written and False returned where the
        combined gradient is NaN or Inf though the Gram matrix is not.
        """


@dataclass(frozen=True)
class Step:
    """What a step computed, as it was left on its device."""

    names: tuple[str, ...]
    weights: list[float]
    gram: Tensor
    mixing: MixingCoefficients
    losses: Tensor
    absent: list[bool]
    skip: bool
    age: int = 0
    skipped: int = 0
    """Updates left out so far, this one included."""


def collect(
    mode: Mode | list[Tensor],
    names: tuple[str, ...],
    losses: list[Loss | None],
    parameters: list[Tensor],
    shared: Sequence[bool],
    pending: Gradients | None,
    memory: Memory,
    processes: Processes,
    representation: Tensor | None = None,
    gram: Tensor | None = None,
) -> PerLossGradients:
    """Does what `mode` needs backward passes for, before there are coefficients.

    Args:
        mode: The mode, or the parameters whose part of the gradients enters the Gram matrix.
        names: Names of the losses.
        losses: The losses.
        parameters: The parameters of the optimizer.
        shared: Which of them enter the Gram matrix.
        pending: Gradients of earlier micro-batches.
        memory: Memory for materialized gradients.
        processes: The processes over which gradients are averaged.
        representation: What the mode of that name takes the gradients with respect to.
        gram: The Gram matrix of an earlier step, if it serves this one too.
    """
    tensors = [loss for loss in losses if loss is None or isinstance(loss, Tensor)]
    complete = len(tensors) == len(losses)
    if gram is not None:
        return surrogate.SurrogateGradients(names, tensors, gram, processes)
    if isinstance(mode, list):
        return surrogate.collect(names, tensors, mode, "gram", processes)
    if representation is not None:
        return surrogate.collect(names, tensors, [representation], "representation", processes)
    cut = is_sharded(parameters)
    if mode == "ghost" and complete and pending is None and not (processes.several or cut):
        return ghost.collect(names, tensors, parameters, shared, memory)
    found = _iterate_gradients(names, losses, parameters, pending, processes)
    if cut:
        from raco_optim import sharded

        return sharded.collect(names, found, parameters, shared, processes)
    gradients = average(names, found, parameters, shared, memory, processes)
    if processes.several:  # a loss that is absent here may be there
        check_any_present(gradients.values)
    return gradients


def average(
    names: tuple[str, ...],
    found: Iterable[Found],
    parameters: Sequence[Tensor],
    shared: Sequence[bool],
    memory: Memory | None,
    processes: Processes,
) -> PerLossGradients:
    """Gathers the gradients of a model that every process holds as a whole."""
    if processes.several:
        return replicated.collect(names, found, parameters, shared, processes)
    return materialized.collect(names, found, memory=memory)


def accumulate(
    names: tuple[str, ...],
    losses: list[Loss | None],
    parameters: list[Tensor],
    pending: Gradients | None,
    processes: Processes,
) -> Gradients:
    """Computes the gradients of a micro-batch, and adds the pending ones."""
    found = _iterate_gradients(names, losses, parameters, pending, processes)
    return materialized.collect(names, found, keep=True)


def _iterate_gradients(
    names: tuple[str, ...],
    losses: list[Loss | None],
    parameters: list[Tensor],
    pending: Gradients | None,
    processes: Processes,
) -> Iterator[Found]:
    if not is_sharded(parameters):
        return add_pending(iterate_gradients(losses, parameters, names), pending)
    from raco_optim import sharded

    return add_pending(sharded.iterate_gradients(losses, parameters, names, processes), pending)


def solve(
    gradients: PerLossGradients,
    weights: list[float],
    shared: Sequence[bool],
    rule: Rule,
    nonfinite: NonFinite,
) -> Step:
    """Computes the Gram matrix of the shared part of the gradients, and the coefficients.

    Raises:
        FloatingPointError: See `MultiObjectiveOptimizer`.
        ValueError: The rule returned something other than one coefficient per loss.
    """
    names, m = gradients.names, len(gradients.names)
    gram = gradients.gram(shared)
    absent = [value is None for value in gradients.values]
    zero = gram.new_zeros(())
    losses = torch.stack([zero if v is None else v.to(gram).reshape(()) for v in gradients.values])
    skip = False
    if nonfinite == "propagate":
        finite = gram.isfinite().all() & losses.isfinite().all()
        mixing = _mix(
            rule, torch.where(finite, gram, torch.eye(m, dtype=gram.dtype, device=gram.device))
        )
        alpha = mixing.coefficients
        mixing = MixingCoefficients(
            torch.where(finite.to(alpha.device), alpha, alpha.new_tensor(weights)),
            *(_nan_unless(finite, x) for x in (mixing.p, mixing.p_clipped, mixing.gap)),
        )
    else:
        heads = gradients.finite(shared)
        # The one copy to the host; what follows is of size m and done there.
        host = torch.cat([gram, heads[:, None], losses[:, None]], dim=1).cpu()
        gram, losses = host[:, :m], host[:, m + 1]
        problem = _first_nonfinite(names, host.tolist())
        message = None if problem is None else _message(problem, gradients.where)
        mixing = MixingCoefficients(gram.new_zeros(m))
        if message is None:
            found = _mix(rule, gram)
            values = found.coefficients.tolist()  # of what the rule was given on the host
            if all(map(math.isfinite, values)):
                mixing = found
            else:
                message = f"`rule` must return finite coefficients; got {values}. Mend it."
        if message is not None and nonfinite == "raise":
            raise FloatingPointError(message)
        skip = message is not None
    return Step(names, weights, gram, mixing, losses, absent, skip)


def write(
    parameters: Sequence[Tensor],
    gradients: PerLossGradients,
    step: Step,
    shared: Sequence[bool],
    nonfinite: NonFinite,
) -> Step:
    """Adds the combined gradient to ``.grad``; the heads get the weighted sum.

    The gradients are consumed. Returns the step, marked where the update is to be skipped; nothing
    was written then.

    Raises:
        FloatingPointError: See `MultiObjectiveOptimizer`.
    """
    if step.skip:
        return step
    weights = torch.tensor(step.weights, dtype=torch.float64, device="cpu")
    coefficients = Coefficients(step.mixing.coefficients, weights, shared)
    if gradients.add_to_grad(parameters, coefficients, check=nonfinite != "propagate"):
        return step
    if nonfinite == "raise":
        raise FloatingPointError(_message("the combined gradient"))
    zeros = torch.zeros_like(step.mixing.coefficients)
    return replace(step, mixing=MixingCoefficients(zeros), skip=True)


def report(step: Step) -> StepReport:
    """Says what a step did; waits for the device."""
    return make_report(
        names=step.names,
        weights=step.weights,
        gram=step.gram,
        p=step.mixing.p,
        p_clipped=step.mixing.p_clipped,
        coefficients=step.mixing.coefficients,
        gap=step.mixing.gap,
        losses=step.losses,
        absent=step.absent,
        skip=step.skip,
        skipped=step.skipped,
        age=step.age,
    )


def _nan_unless(finite: Tensor, x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.where(finite.to(x.device), x, torch.nan)


def _first_nonfinite(names: Sequence[str], host: list[list[float]]) -> str | None:
    m = len(names)
    for i, name in enumerate(names):
        if not math.isfinite(host[i][m + 1]):
            return f"loss {name!r}"
    for i, name in enumerate(names):
        if not (math.isfinite(host[i][i]) and math.isfinite(host[i][m])):
            return f"the gradient of loss {name!r}"
    return None


def _message(problem: str, where: str = "") -> str:
    return f"{problem} is NaN or Inf{where}. Find its cause (torch.autograd.set_detect_anomaly)."


def _mix(rule: Rule, gram: Tensor) -> MixingCoefficients:
    with torch.no_grad():
        mixing = rule(gram.clone())  # its own: it may write there
    if not isinstance(mixing, Tensor | MixingCoefficients):
        raise TypeError(
            f"`rule` must return a tensor or MixingCoefficients; got {type(mixing).__name__}."
        )
    if isinstance(mixing, Tensor):
        mixing = MixingCoefficients(mixing)
    alpha = mixing.coefficients
    if alpha.shape != gram.shape[:1] or not alpha.is_floating_point():
        raise ValueError(
            f"`rule` must return a real tensor of shape [{len(gram)}], one coefficient per loss; "
            f"got shape {list(alpha.shape)} and dtype {alpha.dtype}."
        )
    return mixing
