"""The optimizer whose ``backward`` takes several losses. What a step keeps is kept here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from raco_optim import _checks as checks
from raco_optim import step as stages
from raco_optim.gradients import check_losses
from raco_optim.materialized import Gradients, Memory
from raco_optim.processes import Processes, is_sharded
from raco_optim.report import StepReport
from raco_optim.schedule import Schedule
from raco_optim.step import MODES, NONFINITE, Mode, NonFinite, Rule, Step
from raco_optim.weights import Losses, LossWeights, Weights
from raco_optim.wrapper import OptimizerWrapper

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Skipped(Exception):
    """Leaves the inner step when the losses of its closure are not finite."""


class MultiObjectiveOptimizer(OptimizerWrapper):
    r"""Wraps a `torch.optim` optimizer so that it steps along a combination of several gradients.

    ``backward(losses)`` computes one gradient per loss and their Gram matrix H, asks `rule` for
    coefficients :math:`\alpha(H)` and adds :math:`\sum_i \alpha_i g_i` to ``.grad``; ``step()`` is
    the step of the inner optimizer. What comes between the two (gradient clipping, unscaling)
    sees the combined gradient. ``param_groups``, ``state`` and ``defaults`` are those of the inner
    optimizer, so schedulers, checkpoints and gradient scalers work on the wrapper as on any
    optimizer; pass the wrapper to all of them.

    Args:
        inner: The optimizer to drive. LBFGS needs a closure; it sees the combined gradient and the
            weighted loss, which is not its antiderivative: leave ``line_search_fn`` at None.
        rule: Maps the Gram matrix, ``[m, m]``, float64, to the coefficients, ``[m]``, as a tensor
            or as `MixingCoefficients`. The ``Weighting`` classes of TorchJD that work on a Gram
            matrix are such rules (all but ExcessMTL, MoDo and SDMGrad, which work on Jacobians).
        weights: w, one number >= 0 per loss, summing to 1, or a mapping from the losses' names to
            them: `backward` then takes a mapping with the same keys. Default: any number of
            losses, uniform weights.
        shared_parameters: Only these enter the Gram matrix and get
            :math:`\sum_i \alpha_i g_i`; the other parameters (task heads) get
            :math:`\sum_i w_i g_i`. Default: all parameters of `inner`.
        nonfinite: What to do when a loss, its gradient or a coefficient of `rule` is NaN or Inf.
            ``"raise"``: `FloatingPointError` that names it. ``"skip"``: no update, counted in the
            report (with LBFGS: none from the first evaluation that was not finite). On an
            accelerator each costs a copy of m (m + 2) numbers to the host per step, and of a bit
            where `gram` is approximate. ``"propagate"``: combine with alpha = w, as
            ``loss.backward()`` would, or with `rule`'s coefficients as they are, so that a
            `GradScaler` sees it and skips; under a `GradScaler` use no other.
        gram: How H is had. Exact: ``"materialized"``, from the m gradients, or ``"ghost"``,
            without those of layers for which inputs and output gradients are the cheaper way
            (losses given as callables, and micro-batches, are materialized). Approximate, with one
            backward pass for the combined gradient: ``"representation"``, from the gradients with
            respect to a tensor that is passed to `backward`, or an iterable of parameters, from
            their part of the gradients.
        solve_every: H serves this many steps; above 1 an approximation, with one backward pass in
            each step between.
        process_group: The processes of torch.distributed that train the model together. Default:
            all of them. Every gradient is the mean over them, an absent loss counting as zero;
            what `DTensor` parameters (FSDP2) have averaged themselves is taken as it is.

    Raises:
        TypeError: `inner` is not an optimizer, `rule` is not callable, or `gram` is neither a mode
            nor parameters.
        ValueError: Another argument is out of its range.

    Example:
        >>> import torch
        >>> from raco_optim import MultiObjectiveOptimizer
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> rule = lambda gram: 0.5 / gram.diagonal().sqrt()  # unit gradients, averaged
        >>> opt = MultiObjectiveOptimizer(torch.optim.SGD([x], lr=1.0), rule)
        >>> opt.backward([x[0], 100 * x[1]])
        >>> opt.step()
        >>> x.data
        tensor([0.5000, 0.5000])
    """

    _deterministic = False  # a user's rule may draw at random: the first process's result counts

    def __init__(
        self,
        inner: Optimizer,
        rule: Rule,
        *,
        weights: Weights | None = None,
        shared_parameters: Iterable[Tensor] | None = None,
        nonfinite: NonFinite = "raise",
        gram: Mode | Iterable[Tensor] = "materialized",
        solve_every: int = 1,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(inner)
        if not callable(rule):
            raise TypeError(
                f"`rule` must be a callable from the Gram matrix to the coefficients; got {rule!r}."
            )
        self.rule = rule
        self.nonfinite: NonFinite = checks.checked_choice("nonfinite", nonfinite, NONFINITE)
        self._weights = LossWeights(weights)
        known = list(self._places().values())
        self._shared = None
        if shared_parameters is not None:
            chosen = checks.checked_parameters("shared_parameters", shared_parameters, known)
            self._shared = self._places_of(chosen)
        self._mode: Mode | list[Tensor] = checks.checked_mode(gram, MODES, known)
        self._schedule = Schedule(checks.checked_count("solve_every", solve_every))
        self._memory = Memory()
        self.processes = Processes(process_group)
        self.last_step: Step | None = None  # what the last `backward` left on its device
        self._pending: Gradients | None = None
        self._skip, self._skipped = False, 0

    def backward(
        self, losses: Losses, *, accumulate: bool = False, representation: Tensor | None = None
    ) -> None:
        """Adds the combined gradient of the losses to ``.grad``, as ``loss.backward()`` does.

        Args:
            losses: Scalar tensors that share a graph or not, or callables without arguments that
                return one, evaluated one at a time (each graph is freed before the next forward
                pass); None for a loss that is absent from this batch and contributes zero. A
                mapping if the weights are one. The graph is freed.
            accumulate: Keep the gradients of this micro-batch, per loss, and write nothing. The
                next call without it adds its own and combines the sums: the Gram matrix is that
                of the accumulated gradients. As with ``loss.backward()``, dividing the losses by
                the number of micro-batches is the caller's part.
            representation: With ``gram="representation"``, the tensor in the graph from which all
                losses are computed.

        Raises:
            TypeError, ValueError: A loss is not what it must be; see `per_loss_gradients`. The
                number or names of the losses differ from those of the weights. With an
                approximation: a loss is a callable, or gradients are to be accumulated.
            FloatingPointError: A loss, gradient or coefficient isn't finite; ``nonfinite="raise"``.
            RuntimeError: A backward pass failed, here or in another process, or another process is
                not to be reached.

        After an exception, parameters, ``.grad``, state and pending gradients are as before.
        """
        places, chosen = self._places(), self._shared
        parameters = list(places.values())
        shared = [chosen is None or at in chosen for at in places]
        pending = self._pending
        names, ordered, key = self._checked(losses, parameters, shared, representation, accumulate)
        if accumulate:
            self._pending = stages.accumulate(names, ordered, parameters, pending, self.processes)
            self._pending.named = isinstance(losses, Mapping)
            return
        earlier = self._schedule.gram(key)
        weights = self._weights.of(len(names))
        rest = pending, self._memory, self.processes, representation, earlier
        gradients = stages.collect(self._mode, names, ordered, parameters, shared, *rest)
        rule = self.rule if self._deterministic else partial(self.processes.by_first, self.rule)
        try:
            step = stages.solve(gradients, weights, shared, rule, self.nonfinite)
            step = stages.write(parameters, gradients, step, shared, self.nonfinite)
        except FloatingPointError as error:
            raise FloatingPointError(
                f'{error} Or choose nonfinite="skip" to leave out such updates, or '
                f'nonfinite="propagate" if a GradScaler is to see them and skip.'
            ) from None
        age = 0 if earlier is None else self._schedule.age + 1
        if step.skip:
            self._skip = True
            self._skipped += 1
        else:
            self._schedule.advance(step.gram, key, age)
        self.last_step = dataclasses.replace(step, age=age, skipped=self._skipped)
        self._pending = None

    def step(  # type: ignore[override]  # the closure returns losses, not a loss
        self, closure: Callable[[], Losses | None] | None = None
    ) -> Any:  # noqa: ANN401  # what the inner step returns
        """Performs the step of the inner optimizer.

        Args:
            closure: Zeroes the gradients and returns the losses; `backward` runs on them first
                (several times with LBFGS). The result of the step is then the weighted loss.
                If it returns None, as Lightning's does, `backward` has run before.

        Raises:
            RuntimeError: Gradients were accumulated but not combined.
        """
        if closure is None:
            return None if self._skipping() else self.optimizer.step()

        def weighted_loss() -> Tensor | None:
            with torch.enable_grad():
                losses = closure()
            if losses is not None:
                self.backward(losses)
            last = self.last_step
            if last is None:
                raise TypeError("`closure` must return the losses; got None.")
            if self._skipping():
                raise _Skipped
            return None if losses is None else last.losses @ last.losses.new_tensor(last.weights)

        with contextlib.suppress(_Skipped):
            return self.optimizer.step(weighted_loss)  # type: ignore[arg-type]  # a Tensor
        return None

    def _skipping(self) -> bool:
        if self._pending is not None:
            raise RuntimeError(
                "gradients were accumulated and not combined. Call `backward` without "
                "`accumulate=True` on the last micro-batch, or `zero_grad` to drop them."
            )
        skip, self._skip = self._skip, False
        return skip

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters, and drops accumulated ones."""
        super().zero_grad(set_to_none=set_to_none)
        self._pending, self._skip = None, False

    @property
    def report(self) -> StepReport:
        """What the last `backward` did. Reading it waits for the device.

        Raises:
            RuntimeError: There was no `backward` yet.
        """
        if self.last_step is not None:
            return stages.report(self.last_step)
        raise RuntimeError("there is nothing to report yet. Call `backward` first.")

    @property
    def weights(self) -> dict[str, float] | tuple[float, ...] | None:
        """The user's weights, in the form they were given; they may be set between steps."""
        return self._weights.given

    @weights.setter
    def weights(self, weights: Weights) -> None:
        self._weights.replace(weights)

    def _checked(
        self,
        losses: Losses,
        parameters: list[Tensor],
        shared: list[bool],
        representation: Tensor | None,
        accumulate: bool,
    ) -> tuple[tuple[str, ...], list[Any], list[str | None]]:
        """Returns names, losses in their order, and names with None for the absent ones."""
        sharded, pending = is_sharded(parameters), self._pending
        exact = self._mode in stages.EXACT and self._schedule.every == 1
        facts = self.processes.facts(parameters, shared, self._mode) | self._settings()
        # A micro-batch that sends nothing may fail without the other processes.
        with self.processes.agreeing(facts, alone=accumulate and not sharded):
            names, ordered = self._weights.order(losses, pending)
            # Whether all are absent from micro-batches and processes, the gradients tell.
            if not accumulate and pending is None and not (exact and self.processes.several):
                checks.check_any_present(ordered)
            checks.check_fit(self._mode, ordered, representation, exact, accumulate, sharded)
            check_losses(ordered, parameters, names)
            key = [None if x is None else name for name, x in zip(names, ordered, strict=True)]
            present = key if sharded or not exact else names
            facts |= {"`losses` (None if absent)": present, "`accumulate`": accumulate}
            facts["whether the Gram matrix is due"] = self._schedule.gram(key) is None
        return names, ordered, key

    def _settings(self) -> dict[str, Any]:
        """What must be the same in all processes."""
        own = {"solve_every": self._schedule.every, "nonfinite": self.nonfinite}
        return {f"`{name}`": x for name, x in (self._described() | own).items() if name != "rule"}

    def _described(self) -> dict[str, Any]:
        rule = {} if self._deterministic else {"rule": self.rule}
        return {**rule, "weights": self.weights}

    def _own_state(self) -> dict[str, Any]:
        own = {"skipped": self._skipped, "schedule": self._schedule.state()}
        return self._weights.state() | own

    def _check_own_state(self, own: dict[str, Any]) -> None:
        super()._check_own_state({"schedule": None, **own})  # older states have none
        self._weights.check(own)

    def _reset(self) -> None:
        self._schedule = Schedule(self._schedule.every)

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self._weights.values, self._skipped = own["weights"], own["skipped"]
        if own.get("schedule") is not None:
            self._schedule.load(own["schedule"])
