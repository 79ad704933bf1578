"""The optimizer whose ``backward`` takes several losses. It holds all state between steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from raco_optim import _checks as checks
from raco_optim.distributed.agreement import parameter_settings, raise_together
from raco_optim.distributed.group import Group
from raco_optim.gradients import PerLossGradients
from raco_optim.gradients.approximate import (
    ApproximateGradients,
    ApproximateMode,
    KeptGram,
    check_approximation,
)
from raco_optim.gradients.combine import write_gradients
from raco_optim.gradients.dense import check_losses, check_parameters
from raco_optim.objectives import (
    Batch,
    Losses,
    Objectives,
    Weights,
    check_any_present,
    is_mapping,
)
from raco_optim.optimizer.closure import step_with
from raco_optim.optimizer.core import (
    BetweenSteps,
    Core,
    Mode,
    Options,
    Progress,
    check_options,
    checked_gradients,
    checked_nonfinite,
)
from raco_optim.report import StepReport, first_nonfinite
from raco_optim.rules.function import FunctionRule
from raco_optim.rules.rule import MixingCoefficients, Rule
from raco_optim.wrapper.parameters import Parameters, Roles

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Mode -> the argument of `backward` that it needs.
_THROUGH = {"representation": "representation", "per_example": "scalars"}


class MultiObjectiveOptimizer(BetweenSteps):
    r"""Wraps `torch.optim` optimizers so that they step along a combination of several gradients.

    ``backward(losses)`` computes one gradient per loss and their Gram matrix H, asks `rule` for
    coefficients :math:`\alpha(H)` and adds :math:`\sum_i \alpha_i g_i` to ``.grad``; ``step()`` is
    the step of the inner optimizer. Gradient clipping between the two sees the combined gradient.
    ``param_groups``, ``state``, ``defaults`` and attributes that the wrapper lacks are those of the
    inner optimizer: pass the wrapper to schedulers, checkpoints and gradient scalers.

    A loss that is absent from a step (None) takes no part: H and the weights run over the losses
    that are there, and `CAGradClip` divides these weights by their sum W and multiplies the
    coefficients by W, so that :math:`g_0` stays :math:`\sum_i w_i g_i`.

    Args:
        inner: An optimizer, or a list of optimizers of different parameters that step together.
            LBFGS needs a closure, and sees the combined gradient and the weighted loss, which is
            not its antiderivative: leave ``line_search_fn`` at None.
        rule: A `raco_optim.rules.Rule`, or any callable from the Gram matrix, ``[m, m]``, float64,
            to the coefficients, ``[m]``, as a tensor or as `MixingCoefficients`. The ``Weighting``
            classes of TorchJD that work on a Gram matrix are such callables.
        weights: w, one number >= 0 per loss, summing to 1, or a mapping from the losses' names to
            them: `backward` then takes a mapping with the same keys. Default: any number of
            losses, uniform weights.
        shared_parameters: Only these enter the Gram matrix and get
            :math:`\sum_i \alpha_i g_i`; the other parameters (task heads) get
            :math:`\sum_i w_i g_i`. They keep that role in whatever group they are; frozen ones
            that join later may be among them. A group can say it too, by the key ``"shared"``
            (True or False). Default: all parameters.
        gradients: How the gradients and H are computed. Exact: ``"dense"``, all m gradients at
            once; ``"ghost"``, without those of layers for which inputs and output gradients are
            cheaper; ``"per_example"``, by one backward pass for losses of one scalar per example
            (`model`, and `scalars` in `backward`). Where the last two can't be had, the gradients
            are dense and the report says why. Approximate, with one more backward pass:
            ``"representation"``, H of the gradients with respect to a tensor that is passed to
            `backward`, or an iterable of parameters, H of their part of the gradients.
        nonfinite: What to do when a loss, its gradient or a coefficient of `rule` is NaN or Inf.
            ``"raise"`` (default): `FloatingPointError` that names it. ``"skip"``: no update,
            counted in the report (with LBFGS: none from the first evaluation that was not finite).
            On an accelerator each costs a copy of m (m + 2) numbers to the host per step, and of a
            bit where `gradients` is approximate. ``"propagate"``: combine with alpha = w, as
            ``loss.backward()`` would, or with `rule`'s coefficients as they are, so that a
            `GradScaler` sees it and skips; under a `GradScaler` use no other.
        gram_every: H serves this many steps (default 1); above 1 an approximation, with one
            backward pass in each step between.
        model: With ``gradients="per_example"``, the model; its first dimension is that of the
            examples, and it gets forward hooks. Layers that are not known have one backward pass
            for each loss.
        process_group: The processes of torch.distributed that train the model together. Default:
            all of them. Every gradient is the mean over them, an absent loss counting as zero;
            what `DTensor` parameters (FSDP2) have averaged themselves is taken as it is.

    Raises:
        TypeError: `inner` holds no optimizer, `rule` is not callable, `gradients` is neither a
            mode nor parameters, or a name of a loss is no string.
        ValueError: Another argument is out of its range, or `inner` steps during the backward
            pass or differentiates gradients (AdaHessian).

    Warns:
        UserWarning: At the first `backward`, if the losses depend on parameters that no inner
            optimizer holds.

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

    def __init__(
        self,
        inner: Optimizer | Sequence[Optimizer],
        rule: Rule | Callable[[Tensor], Tensor | MixingCoefficients],
        *,
        weights: Weights | None = None,
        shared_parameters: Iterable[Tensor] | None = None,
        gradients: Mode | Iterable[Tensor] = "dense",
        **options: Unpack[Options],
    ) -> None:
        check_options(type(self).__name__, options)
        super().__init__(inner)
        asked, subset = checked_gradients(gradients, options.get("model"))
        self._core = Core(
            objectives=Objectives(weights),
            rule=rule if isinstance(rule, Rule) else FunctionRule(rule),
            asked=asked,
            roles=Roles(shared_parameters, subset, self.param_groups),
            group=Group(options.get("process_group")),
            gram_every=checks.checked_count("gram_every", options.get("gram_every", 1)),
            nonfinite=checked_nonfinite(options.get("nonfinite", "raise")),
            model=options.get("model"),
        )
        self._parameters(self._group)

    # Traced, the solver's branches would specialise on the values of the Gram matrix.
    @torch._disable_dynamo  # type: ignore[attr-defined]  # of which torch says nothing in public
    def backward(
        self,
        losses: Losses,
        *,
        accumulate: bool = False,
        representation: Tensor | None = None,
        scalars: Tensor | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Adds the combined gradient of the losses to ``.grad``, as ``loss.backward()`` does.

        Args:
            losses: Scalar tensors that share a graph or not, or callables without arguments that
                return one, evaluated one at a time (each graph is freed before the next forward
                pass); None for a loss that is absent from this batch. A mapping if the weights are
                one.
            accumulate: Keep the gradients of this micro-batch, per loss, and write nothing. The
                next call without it adds its own and combines the sums: the Gram matrix is that
                of the accumulated gradients. As with ``loss.backward()``, dividing the losses by
                the number of micro-batches is the caller's part.
            representation: With ``gradients="representation"``, the tensor in the graph from which
                all losses are computed.
            scalars: With ``gradients="per_example"``, the tensor of one scalar per example,
                ``[N]``, in the graph, from which all losses are computed.
            retain_graph: Keep the graph, which is freed otherwise.

        Raises:
            TypeError, ValueError: A loss is not what it must be; see `per_loss_gradients`. The
                number or names of the losses differ from those of the weights. With an
                approximation: a loss is a callable, or gradients are to be accumulated.
            FloatingPointError: A loss, gradient or coefficient isn't finite; ``nonfinite="raise"``.
            RuntimeError: Another process failed, or is not to be reached.
            Exception: What a backward pass raises keeps its class; a note names the loss.

        After an exception, parameters, ``.grad``, state and pending gradients are as before.
        """
        core, group = self._core, self._group
        through = {"representation": representation, "scalars": scalars}
        batch = self._batch(losses, group, through, accumulate, retain_graph)
        mode, progress = core.mode, core.progress
        if accumulate:
            pending = mode.accumulate(batch, named=is_mapping(losses))
            core.progress = replace(progress, pending=pending)
            return
        reused = core.gram_every > 1 and progress.kept.serves(batch.present, core.gram_every)
        gradients: PerLossGradients = (
            ApproximateGradients(batch, progress.kept.gram) if reused else mode.collect(batch)
        )
        if group is not None and batch.pending is None:  # absent here, it may be there
            check_any_present(gradients.values)
        age = progress.kept.age + 1 if reused else 0
        report = self._solve(batch, gradients, "earlier step" if reused else mode.ran, age)
        combined = [] if report.skip else gradients.combine(report.coefficients, report.weights)
        if not report.skip and core.nonfinite != "propagate" and not gradients.exact:
            report = self._checked_combination(report, combined)
        if core.unheld is not None:
            core.warn_of_unheld(batch.parameters, type(self).__name__)
        if report.skip:
            skipped = progress.skipped + 1
            report = replace(report, skipped=skipped)
            core.progress = Progress(report, None, True, skipped, progress.kept)
        else:
            kept = progress.kept
            if core.gram_every > 1:
                kept = KeptGram(report.gram, batch.present, report.gram_age)
            after = Progress(report, None, progress.skip, progress.skipped, kept)
            write_gradients(
                batch.parameters.tensors, combined, partial(setattr, core, "progress", after)
            )

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
            TypeError: `closure` returned one loss, or losses of which it ran `backward` itself.
        """
        if closure is not None:
            return step_with(self, closure)
        return None if self._skipping() else self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters, and drops accumulated ones."""
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self._core.progress = replace(self._core.progress, pending=None, skip=False)

    @property
    def _group(self) -> Group | None:
        """The processes that average their gradients; None for a process on its own."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self._core.group
        return group if group.world_size > 1 else None

    def _parameters(self, group: Group | None) -> Parameters:
        """Returns the parameters with their roles; chooses the mode anew where they changed."""
        core = self._core
        parameters = core.roles.current(self.optimizer.param_groups)
        mode_of = id(parameters), group is not None
        if core.mode_of != mode_of:
            core.mode, core.mode_of = core.chosen_mode(parameters, group), mode_of
        return parameters

    def _batch(
        self,
        losses: Losses,
        group: Group | None,
        through: dict[str, Tensor | None],
        accumulate: bool,
        retain_graph: bool,
    ) -> Batch:
        """Checks what was passed to `backward`, in all processes, before the first pass."""
        core = self._core
        kept = core.progress.kept
        parameters = self._parameters(group)
        settings = {} if group is None else parameter_settings(group, parameters) | core.settings()
        # A micro-batch that sends nothing may fail without the other processes.
        alone = group is None or (accumulate and not parameters.is_sharded)
        with contextlib.nullcontext() if alone else raise_together(group, settings):
            check_parameters(parameters.tensors)
            pending = core.progress.pending
            pending = pending and pending.moved_to(parameters)
            names, ordered = core.objectives.order(losses, pending)
            wanted = _THROUGH.get(core.asked, "")
            for argument, tensor in through.items():
                if tensor is not None and argument != wanted:
                    mode = next(mode for mode, name in _THROUGH.items() if name == argument)
                    raise ValueError(
                        f'`{argument}` is used with gradients="{mode}" alone; got one, of type '
                        f"{type(tensor).__name__}. Leave it out, or choose that mode."
                    )
            batch = Batch(
                names,
                ordered,
                core.objectives.of(len(names)),
                parameters,
                pending,
                group,
                through.get(wanted),
                retain_graph,
            )
            approximate = core.gram_every > 1 or isinstance(core.mode, ApproximateMode)
            # Whether all are absent from micro-batches and processes, the gradients tell.
            if not accumulate and pending is None and (group is None or approximate):
                check_any_present(ordered)
            if core.gram_every > 1 and not isinstance(core.mode, ApproximateMode):
                check_approximation(batch, accumulate=accumulate)
            core.mode.check(batch, accumulate=accumulate)
            check_losses(ordered, parameters.tensors, names)
            if not alone:
                must_agree = parameters.is_sharded or approximate
                settings["`losses` (None if absent)"] = batch.present if must_agree else names
                settings["`accumulate`"] = accumulate
                settings["whether the Gram matrix is due"] = not kept.serves(
                    batch.present, core.gram_every
                )
        return batch if core.unheld is None else core.watching(batch)

    def _solve(self, batch: Batch, gradients: PerLossGradients, mode: str, age: int) -> StepReport:
        """Computes the Gram matrix and asks the rule for coefficients.

        Raises:
            FloatingPointError: See the class.
            ValueError: The rule returned something other than one coefficient per loss.
        """
        core, names, m = self._core, batch.names, len(batch.names)
        gram, values = gradients.gram(), gradients.values
        present = [i for i, value in enumerate(values) if value is not None]
        there = [v.reshape(()).double() for v in values if v is not None]
        # Stacked before they are moved: an accelerator waits for each copy to the host.
        found = iter(torch.stack(there).to(gram.device) if there else ())
        zero = gram.new_zeros(())
        losses = torch.stack([zero if v is None else next(found) for v in values])
        made: dict[str, Any] = {
            "names": names,
            "weights": torch.tensor(batch.weights, dtype=torch.float64, device="cpu"),
            "absent": tuple(n for n, v in zip(names, values, strict=True) if v is None),
            "skipped": core.progress.skipped,
            "gram_age": age,
            "gradients": mode,
        }
        if core.nonfinite == "propagate":
            finite = gram.isfinite().all() & losses.isfinite().all()
            unit = torch.eye(m, dtype=gram.dtype, device=gram.device)
            mixing = vars(self._mix(batch, torch.where(finite, gram, unit), present))
            w = [0.0 if v is None else x for x, v in zip(batch.weights, values, strict=True)]
            for name, x in mixing.items():
                if x is not None:
                    other: Any = torch.nan
                    if name == "coefficients":
                        other = torch.tensor(w, dtype=x.dtype, device="cpu")
                        other = other.to(x.device, non_blocking=True)
                    made[name] = torch.where(finite.to(x.device), x, other)
            return StepReport(gram=gram, losses=losses, **made)
        # The one copy to the host; what follows is of size m and done there.
        host = torch.cat([gram.flatten(), gradients.head_norms(), losses]).cpu()
        gram, norms, losses = torch.split(host, [m * m, m, m])
        gram, problem = gram.view(m, m), None
        if not math.isfinite(sum(host.tolist())):  # the sum may overflow
            rows = torch.cat([gram, norms[:, None], losses[:, None]], dim=1).tolist()
            problem = first_nonfinite(names, rows, gradients.nonfinite_ranks)
        if problem is None:
            mixing = vars(self._mix(batch, gram, present))
            alpha = mixing["coefficients"].tolist()
            if all(map(math.isfinite, alpha)):
                return StepReport(gram=gram, losses=losses, **made, **mixing)
            problem = f"`rule` must return finite coefficients; got {alpha}. Mend it."
        report = StepReport(
            gram=gram, losses=losses, coefficients=torch.zeros_like(made["weights"]), **made
        )
        return self._not_finite(report, problem)

    def _mix(self, batch: Batch, gram: Tensor, present: Sequence[int]) -> MixingCoefficients:
        """Asks the rule for coefficients of the losses that are there; an absent one gets 0."""
        rule, weights, m = self._core.rule, batch.weights, len(batch.names)
        some_absent = len(present) < m
        if not present:  # in any micro-batch
            none = gram.new_full((m,), torch.nan)
            return MixingCoefficients(gram.new_zeros(m), p=none, p_clipped=none)
        if some_absent:
            gram, weights = gram[present][:, present], [weights[i] for i in present]
        with torch.no_grad():
            if rule.deterministic or batch.group is None:
                mixing = self._asked(rule, gram, weights)
            else:
                with raise_together(batch.group):
                    mixing = self._asked(rule, gram, weights)
                # By the host: a tensor of cuda:0 would be unpickled on cuda:0 in every process.
                own = [None if x is None else x.cpu() for x in vars(mixing).values()]
                mixing = MixingCoefficients(*batch.group.broadcast_from_first(own))
            if not some_absent:
                return mixing

            def spread(x: Tensor | None, fill: float) -> Tensor | None:
                return None if x is None else x.new_full((m,), fill).index_put_((index,), x)

            index = torch.tensor(present, device=mixing.coefficients.device)
            alpha = spread(mixing.coefficients, 0.0)
            assert alpha is not None
            p, p_clipped = (spread(x, torch.nan) for x in (mixing.p, mixing.p_clipped))
            return MixingCoefficients(alpha, p, p_clipped, mixing.gap)

    @staticmethod
    def _asked(rule: Rule, gram: Tensor, weights: Sequence[float]) -> MixingCoefficients:
        try:
            mixing = rule(gram, weights)
        except Exception as error:
            note = f"It was raised by the rule, for the {len(gram)} losses that are present."
            checks.add_note(error, note)
            raise
        if mixing.coefficients.shape != gram.shape[:1]:
            raise ValueError(
                f"`rule` must return one coefficient for each of the {len(gram)} losses that are "
                f"present; got shape {list(mixing.coefficients.shape)}."
            )
        return mixing

    def _checked_combination(
        self, report: StepReport, combined: Sequence[Tensor | None]
    ) -> StepReport:
        """Raises, or marks the step to be skipped, where the combined gradient is not finite."""
        extremes = [torch.stack(g.aminmax()) for g in combined if g is not None and g.numel()]
        if not extremes or bool(torch.cat(extremes).isfinite().all()):
            return report
        zeros = torch.zeros_like(report.coefficients)
        report = replace(report, coefficients=zeros, p=None, p_clipped=None, gap=None)
        return self._not_finite(report, "the combined gradient is NaN or Inf.")

    def _not_finite(self, report: StepReport, problem: str) -> StepReport:
        if self._core.nonfinite == "skip":
            return replace(report, skip=True)
        raise FloatingPointError(
            f'{problem} Or choose nonfinite="skip" to leave out such updates, or '
            f'nonfinite="propagate" if a GradScaler is to see them and skip.'
        )

    def _skipping(self) -> bool:
        progress = self._core.progress
        if progress.pending is not None:
            raise RuntimeError(
                "gradients were accumulated and not combined. Call `backward` without "
                "`accumulate=True` on the last micro-batch, or `zero_grad` to drop them."
            )
        if progress.skip:
            self._core.progress = replace(progress, skip=False)
        return progress.skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parameters(self._group)
