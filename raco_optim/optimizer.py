"""The wrapper: an optimizer whose ``backward`` takes several losses. All state is here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from raco_optim._checks import checked_choice, checked_weights
from raco_optim.gradients import Loss
from raco_optim.report import StepReport, make_report
from raco_optim.step import NONFINITE, Gradients, NonFinite, Rule, Step, collect, solve, write

Weights = Sequence[float] | Mapping[str, float]
Losses = Iterable[Loss | None] | Mapping[str, Loss | None]

_STATE_KEY = "raco_optim"
_STATE_VERSION = 1


class _Skipped(Exception):
    """Leaves the inner step when the losses of its closure are not finite."""


class MultiObjectiveOptimizer(Optimizer):
    r"""Wraps a `torch.optim` optimizer so that it steps along a combination of several gradients.

    ``backward(losses)`` computes one gradient per loss and their Gram matrix H, asks `rule` for
    coefficients :math:`\alpha(H)` and adds :math:`\sum_i \alpha_i g_i` to ``.grad``; ``step()`` is
    the step of the inner optimizer. What comes between the two (gradient clipping, unscaling)
    sees the combined gradient. ``param_groups``, ``state`` and ``defaults`` are those of the inner
    optimizer, so schedulers, checkpoints and gradient scalers work on the wrapper as on any
    optimizer; pass the wrapper to all of them.

    Args:
        inner: The optimizer to drive. With LBFGS, `step` needs a closure, the gradient is the
            combined one, and the value that LBFGS sees is the weighted loss, of which it is not
            the gradient: leave ``line_search_fn`` at None.
        rule: Maps the Gram matrix, ``[m, m]``, float64, to the coefficients, ``[m]``, as a tensor
            or as `MixingCoefficients`. Every TorchJD ``Weighting`` is such a rule.
        weights: w, one number >= 0 per loss, summing to 1, or a mapping from the losses' names to
            them: `backward` then takes a mapping with the same keys. Default: any number of
            losses, uniform weights.
        shared_parameters: Only these enter the Gram matrix and get
            :math:`\sum_i \alpha_i g_i`; the other parameters (task heads) get
            :math:`\sum_i w_i g_i`. Default: all parameters of `inner`.
        nonfinite: What to do when a loss or its gradient is NaN or Inf. ``"raise"``:
            `FloatingPointError` with the loss's name. ``"skip"``: no update, counted in the
            report. ``"propagate"``: combine with alpha = w, as ``loss.backward()`` would, so that
            a `GradScaler` sees it and skips. On an accelerator the first two cost one copy of
            m (m + 2) numbers to the host per step; the third costs none.

    Raises:
        TypeError: `inner` is not an optimizer or `rule` is not callable.
        ValueError: `weights`, `shared_parameters` or `nonfinite` is out of its range.

    Note:
        Hooks registered on the wrapper are given the wrapper. Hooks registered for all optimizers
        at once run twice, for the wrapper and for the inner optimizer.

    Example:
        >>> import torch
        >>> from raco_optim import MultiObjectiveOptimizer
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> inverse_norms = lambda gram: 0.5 / gram.diagonal().sqrt()
        >>> opt = MultiObjectiveOptimizer(torch.optim.SGD([x], lr=1.0), inverse_norms)
        >>> opt.backward([x[0], 100 * x[1]])
        >>> opt.step()
        >>> x.data
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        inner: Optimizer,
        rule: Rule,
        *,
        weights: Weights | None = None,
        shared_parameters: Iterable[Tensor] | None = None,
        nonfinite: NonFinite = "raise",
    ) -> None:
        if not isinstance(inner, Optimizer):
            raise TypeError(
                f"`inner` must be a torch.optim.Optimizer; got {type(inner).__name__}. Build it "
                f"first: {type(self).__name__}(torch.optim.AdamW(model.parameters()), ...)."
            )
        if not callable(rule):
            raise TypeError(
                f"`rule` must be a callable from the Gram matrix to the coefficients; got {rule!r}."
            )
        # Optimizer.__init__ would make parameter groups of its own, which drift apart from those
        # of the inner optimizer when a checkpoint is loaded; hooks are all that is needed of it.
        self.optimizer = inner
        self.rule = rule
        self.nonfinite = checked_choice("nonfinite", nonfinite, NONFINITE)
        self._names: tuple[str, ...] | None = None
        self._weights: list[float] | None = None
        if weights is not None:
            self._weights = checked_weights(weights)
            self._names = tuple(weights) if isinstance(weights, Mapping) else None
        self._shared = self._checked_shared(shared_parameters)
        self._pending: Gradients | None = None
        self._last: Step | None = None
        self._skip = False
        self._skipped = 0
        self._add_hooks()

    # -- the step ---------------------------------------------------------------------------------

    def backward(self, losses: Losses, *, accumulate: bool = False) -> None:
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

        Raises:
            TypeError, ValueError: A loss is not what it must be; see `per_loss_gradients`. The
                number or the names of the losses differ from those of the weights.
            FloatingPointError: A loss or its gradient is NaN or Inf and ``nonfinite="raise"``.
            RuntimeError: A backward pass failed; see `per_loss_gradients`. Several processes
                train together (torch.distributed).

        After an exception, parameters, ``.grad``, optimizer state and accumulated gradients are
        as before the call.
        """
        _check_single_process()
        names, ordered = self._named(losses)
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = collect(names, ordered, parameters, self._pending, keep=accumulate)
        if accumulate:
            self._pending = gradients
            return
        weights = self._weights or [1 / len(names)] * len(names)
        shared = [self._shared is None or id(p) in self._shared for p in parameters]
        step = solve(names, weights, gradients, shared, self.rule, self.nonfinite)
        if step.skip:
            self._skipped += 1
        else:
            write(parameters, gradients, step, shared)
        self._last, self._skip, self._pending = step, step.skip, None

    def step(self, closure: Callable[[], Losses] | None = None) -> Any:  # noqa: ANN401
        """Performs the step of the inner optimizer.

        Args:
            closure: Zeroes the gradients and returns the losses; `backward` runs on them first
                (several times with LBFGS). The result of the step is then the weighted loss.

        Raises:
            RuntimeError: Gradients were accumulated but not combined.
        """
        if closure is not None:

            def weighted_loss() -> Tensor:
                with torch.enable_grad():
                    losses = closure()
                self.backward(losses)
                if self._skip or self._last is None:
                    raise _Skipped
                return self._last.losses @ self._last.losses.new_tensor(self._last.weights)

            try:
                return self.optimizer.step(weighted_loss)  # type: ignore[arg-type]  # a Tensor
            except _Skipped:
                self._skip = False
                return None
        if self._pending is not None:
            raise RuntimeError(
                "gradients were accumulated and not combined. Call `backward` without "
                "`accumulate=True` on the last micro-batch, or `zero_grad` to drop them."
            )
        if self._skip:
            self._skip = False
            return None
        return self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters, and drops accumulated ones."""
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self._pending = None
        self._skip = False

    @property
    def report(self) -> StepReport:
        """What the last `backward` did. Reading it waits for the device.

        Raises:
            RuntimeError: There was no `backward` yet.
        """
        if self._last is None:
            raise RuntimeError("there is nothing to report yet. Call `backward` first.")
        step = self._last
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
            skipped=self._skipped,
        )

    # -- hyperparameters --------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, float] | tuple[float, ...] | None:
        """The user's weights, in the form they were given; they may be set between steps."""
        if self._weights is None:
            return None
        if self._names is None:
            return tuple(self._weights)
        return dict(zip(self._names, self._weights, strict=True))

    @weights.setter
    def weights(self, weights: Weights) -> None:
        if self._names is not None:
            if not isinstance(weights, Mapping) or set(weights) != set(self._names):
                raise ValueError(
                    f"`weights` must be a mapping with the names {list(self._names)}; got "
                    f"{weights!r}."
                )
            weights = {name: weights[name] for name in self._names}
        checked = checked_weights(weights)
        if self._weights is not None and len(checked) != len(self._weights):
            raise ValueError(
                f"`weights` must keep its {len(self._weights)} entries; got {len(checked)}. Build "
                f"a new optimizer for another number of losses."
            )
        self._weights = checked

    # -- an optimizer like any other: groups, state and defaults are those of the inner one -------

    @property  # type: ignore[override]  # a plain attribute in Optimizer
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the inner optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property  # type: ignore[override]  # a plain attribute in Optimizer
    def state(self) -> Any:  # noqa: ANN401
        """State of the inner optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:  # noqa: ANN401
        self.optimizer.state = state

    @property  # type: ignore[override]  # a plain attribute in Optimizer
    def defaults(self) -> dict[str, Any]:
        """Default options of the inner optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the inner optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Returns the inner optimizer's state, with the wrapper's under the key "raco_optim".

        Accumulated gradients are not part of it: take a checkpoint between steps.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.optimizer.state_dict()
        state_dict[_STATE_KEY] = {"version": _STATE_VERSION, **self._own_state()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, or the state of a plain inner optimizer.

        Raises:
            ValueError: The state is of another number of losses, of other names, of a newer
                version, or does not fit the inner optimizer. Nothing is loaded then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        own = state_dict.pop(_STATE_KEY, None)
        if own is not None:
            self._check_own_state(own)
        self.optimizer.load_state_dict(state_dict)
        if own is not None:
            self._load_own_state(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __repr__(self) -> str:
        own = ", ".join(f"{name}={value!r}" for name, value in self._described().items())
        inner = repr(self.optimizer).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {own},\n  {inner}\n)"

    def __getstate__(self) -> dict[str, Any]:
        # As in Optimizer, hooks are not kept, nor is the `step` that a scheduler put in place.
        return {
            name: value
            for name, value in self.__dict__.items()
            if name != "step" and not name.endswith("_hooks")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._add_hooks()

    # -- private ----------------------------------------------------------------------------------

    def _described(self) -> dict[str, Any]:
        return {"rule": self.rule, "weights": self.weights}

    def _own_state(self) -> dict[str, Any]:
        names = None if self._names is None else list(self._names)
        return {"weights": self._weights, "names": names, "skipped": self._skipped}

    def _check_own_state(self, own: dict[str, Any]) -> None:
        if own["version"] > _STATE_VERSION:
            raise ValueError(
                f"`state_dict` must be of version {_STATE_VERSION} or older; got version "
                f"{own['version']}. Update raco_optim."
            )
        names = None if self._names is None else list(self._names)
        numbers = [None if w is None else len(w) for w in (self._weights, own["weights"])]
        if own["names"] != names or numbers[0] != numbers[1]:
            raise ValueError(
                f"`state_dict` must be of the same losses, {names or numbers[0]}; got "
                f"{own['names'] or numbers[1]}."
            )

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self._weights = own["weights"]
        self._skipped = own["skipped"]

    def _named(self, losses: Losses) -> tuple[tuple[str, ...], list[Loss | None]]:
        """Returns names and losses in the order of the weights, or raises."""
        if isinstance(losses, Tensor) and losses.dim() == 0:
            raise TypeError(
                "`losses` must be a sequence or a mapping of losses; got a single tensor. Pass "
                "[loss]."
            )
        if isinstance(losses, Mapping):
            names = self._names
            if names is None and self._weights is None:
                names = tuple(losses)
            if names is None or set(losses) != set(names):
                expected = (
                    f"a sequence of {len(self._weights or ())} losses, like the weights"
                    if names is None
                    else f"a mapping with the names of the weights, {list(names)}"
                )
                raise ValueError(f"`losses` must be {expected}; got the names {list(losses)}.")
            ordered = [losses[name] for name in names]
        else:
            if not isinstance(losses, Iterable):
                raise TypeError(
                    f"`losses` must be a sequence or a mapping of losses; got "
                    f"{type(losses).__name__}."
                )
            if self._names is not None:
                raise ValueError(
                    f"`losses` must be a mapping with the names of the weights, "
                    f"{list(self._names)}; got a {type(losses).__name__}."
                )
            ordered = list(losses)
            names = tuple(str(i) for i in range(len(ordered)))
        expected_number = len(ordered) if self._weights is None else len(self._weights)
        if len(ordered) != expected_number or not ordered:
            raise ValueError(
                f"`losses` must hold one loss per weight, {expected_number or 'at least one'}; got "
                f"{len(ordered)}. Pass None for a loss that is absent from this batch."
            )
        if self._pending is not None and len(self._pending.values) != len(ordered):
            raise ValueError(
                f"`losses` must be as many as in the accumulated micro-batches, "
                f"{len(self._pending.values)}; got {len(ordered)}."
            )
        return names, ordered

    def _checked_shared(self, shared: Iterable[Tensor] | None) -> dict[int, Tensor] | None:
        if shared is None:
            return None
        chosen = {id(p): p for p in shared}
        known = {id(p) for group in self.param_groups for p in group["params"]}
        foreign = [list(p.shape) for key, p in chosen.items() if key not in known]
        if foreign or not chosen:
            raise ValueError(
                f"`shared_parameters` must be parameters of `inner`, at least one; got "
                f"{f'{len(foreign)} others, of shapes {foreign}' if foreign else 'none'}. Pass for "
                f"example model.trunk.parameters()."
            )
        return chosen

    def _add_hooks(self) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()


def backward(optimizer: Any, losses: Losses, *, accumulate: bool = False) -> None:  # noqa: ANN401
    """Calls ``backward`` of the `MultiObjectiveOptimizer` that other wrappers may hide.

    Accelerate's ``AcceleratedOptimizer``, for one, forwards the methods of torch optimizers only.

    Args:
        optimizer: The optimizer, or a wrapper that holds it as its attribute ``optimizer``.
        losses: See `MultiObjectiveOptimizer.backward`.
        accumulate: See there.

    Raises:
        TypeError: There is no `MultiObjectiveOptimizer` inside.

    Example:
        >>> import torch
        >>> import raco_optim
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = raco_optim.CAGradClip(torch.optim.SGD([x], lr=0.1), [0.5, 0.5], c=0.0)
        >>> raco_optim.backward(opt, [x[0], x[1]])
        >>> x.grad
        tensor([0.5000, 0.5000])
    """
    inside = optimizer
    while not isinstance(inside, MultiObjectiveOptimizer):
        try:
            inside = inside.optimizer
        except AttributeError:
            raise TypeError(
                f"`optimizer` must be a MultiObjectiveOptimizer such as CAGradClip, or a wrapper "
                f"of one; got {type(optimizer).__name__}."
            ) from None
    inside.backward(losses, accumulate=accumulate)


def _check_single_process() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
        if ranks > 1:
            raise RuntimeError(
                f"`backward` does not average gradients over processes yet, and torch.distributed "
                f"runs with {ranks}: their parameters would drift apart. Train in one process."
            )
