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
from raco_optim.distributed.agreement import LOSSES, parameter_settings, raise_together
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
    r"""Wraps `torch.optim` optimizers to step along a combination of several gradients.

    ``backward(losses)`` computes one gradient per loss and their Gram matrix H, gets coefficients
    :math:`\alpha(H)` from `rule` and adds :math:`\sum_i \alpha_i g_i` to ``.grad``. ``step()`` runs
    the inner optimizer. Clip gradients between the two. ``param_groups``, ``state``, ``defaults``
    and all attributes that the wrapper lacks are those of the inner optimizer: pass the wrapper to
    schedulers, checkpoints and gradient scalers.

    A loss that is None is absent from the step: H and the weights cover the other losses only.
    `CAGradClip` divides these weights by their sum W and multiplies the coefficients by W, so
    :math:`g_0` remains :math:`\sum_i w_i g_i`.

    Args:
        inner: An optimizer, or a list of optimizers of different parameters that step together.
            LBFGS needs a closure. It sees the combined gradient and the weighted loss, which do not
            match exactly: leave ``line_search_fn`` at None.
        rule: A `raco_optim.rules.Rule`, or any callable from the Gram matrix, ``[m, m]``, float64,
            to the coefficients, ``[m]``, as a tensor or `MixingCoefficients`, for example a
            ``Weighting`` of TorchJD that works on a Gram matrix.
        weights: w, one number >= 0 per loss, summing to 1, or a mapping from the losses' names to
            them: `backward` then takes a mapping with the same keys. Default: any number of
            losses, uniform weights.
        shared_parameters: Parameters that enter the Gram matrix and get
            :math:`\sum_i \alpha_i g_i`; the others (task heads) get :math:`\sum_i w_i g_i`. They
            keep this role in any group; frozen parameters that join later may be included. The key
            ``"shared"`` (True or False) of a group overrides it. Default: all parameters.
        gradients: How to compute the gradients and H. Exact: ``"dense"``, all m gradients at once;
            ``"ghost"``, without the gradients of layers whose inputs and output gradients are
            cheaper; ``"per_example"``, one backward pass for losses of one scalar per example
            (needs `model`, and `scalars` in `backward`). If the last two are not possible, the
            gradients are dense and the report says why. Approximate, with one more backward pass:
            ``"representation"``, H of the gradients with respect to a tensor passed to `backward`;
            or an iterable of parameters, H of the gradients with respect to them.
        nonfinite: What to do if a loss, its gradient or a coefficient of `rule` is NaN or Inf.
            ``"raise"`` (default): a `FloatingPointError` that names it. ``"skip"``: no update, and
            the report counts it (with LBFGS: none after the first non-finite evaluation).
            On an accelerator both copy m (m + 2) numbers to the CPU per step, and one more bit if
            `gradients` is approximate. ``"propagate"``: combine with alpha = w, as
            ``loss.backward()`` would, or with non-finite coefficients of `rule`, for a `GradScaler`
            to detect and skip; with a `GradScaler` use only this.
        gram_every: Number of steps that use the same H (default 1). Values above 1 are an
            approximation that needs one backward pass in each step without a new H.
        model: With ``gradients="per_example"``, the model; its first dimension must be the
            examples. It gets forward hooks. Parameters of unknown layers get one backward pass per
            loss.
        process_group: The processes of torch.distributed that train the model together. Default:
            all of them. Every gradient is the mean over them, where an absent loss counts as zero.
            `DTensor` parameters (FSDP2) already average their gradients.

    Raises:
        TypeError: `inner` holds no optimizer, `rule` is not callable, `gradients` is neither a
            mode nor parameters, or the name of a loss is not a string.
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

    # Under torch.compile, the solver's branches would specialise on values of the Gram matrix.
    @torch._disable_dynamo  # type: ignore[attr-defined]  # not in torch's stubs
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

        After an exception, parameters, ``.grad``, state and pending gradients are unchanged.

        Args:
            losses: Scalar tensors, whose graphs may overlap, or callables without arguments that
                return one, evaluated one at a time (each graph is freed before the next forward
                pass); None for a loss that is absent from this batch. A mapping if the weights are
                one.
            accumulate: Whether to keep the gradients of this micro-batch, per loss, and write
                nothing. The next call with False adds its own gradients and combines the sums; the
                Gram matrix is that of the sums. As with ``loss.backward()``, divide the losses by
                the number of micro-batches yourself.
            representation: With ``gradients="representation"``, the tensor in the graph from which
                all losses are computed.
            scalars: With ``gradients="per_example"``, the tensor in the graph with one scalar per
                example, ``[N]``, from which all losses are computed.
            retain_graph: Whether to keep the graph.

        Raises:
            TypeError, ValueError: A loss is invalid; see `per_loss_gradients`. The number or the
                names of the losses differ from the weights. With an approximation: a loss is a
                callable, or `accumulate` is True.
            FloatingPointError: A loss, gradient or coefficient is not finite;
                ``nonfinite="raise"``.
            RuntimeError: Another process failed or can't be reached.
            Exception: An error in a backward pass keeps its class; a note names the loss.
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
        if group is not None and batch.pending is None:  # other processes may have losses
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
    ) -> Any:  # noqa: ANN401  # the result of the inner step
        """Runs the step of the inner optimizer.

        Args:
            closure: Zeroes the gradients and returns the losses; `backward` runs on them first
                (several times with LBFGS), and `step` returns the weighted loss. A closure that
                returns None, such as Lightning's, must have called `backward`.

        Raises:
            RuntimeError: Gradients were accumulated but not combined.
            TypeError: `closure` is not callable, returned a single loss, or called `backward` and
                returned losses.
        """
        if closure is not None:
            return step_with(self, closure)
        if self._core.unheld is not None:  # there was no `backward` yet
            self._core.warn_of_others(self.param_groups)
        return None if self._skipping() else self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters, and drops accumulated ones."""
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self._core.progress = replace(self._core.progress, pending=None, skip=False)

    @property
    def _group(self) -> Group | None:
        """The processes that average their gradients; None for a single one."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self._core.group
        return group if group.world_size > 1 else None

    def _parameters(self, group: Group | None) -> Parameters:
        """Returns the parameters with their roles; chooses the mode again if they changed."""
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
        """Checks the arguments of `backward` in all processes before the first pass."""
        core = self._core
        kept = core.progress.kept
        parameters = self._parameters(group)
        settings = {} if group is None else parameter_settings(group, parameters) | core.settings()
        # A micro-batch without messages may fail without telling the other processes.
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
                        f'`{argument}` must be None unless gradients="{mode}"; got '
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
            # With several micro-batches or processes, only the gradients show if all are absent.
            if not accumulate and pending is None and (group is None or approximate):
                check_any_present(ordered)
            if core.gram_every > 1 and not isinstance(core.mode, ApproximateMode):
                check_approximation(batch, accumulate=accumulate)
            core.mode.check(batch, accumulate=accumulate)
            check_losses(ordered, parameters.tensors, names)
            if not alone:
                must_agree = parameters.is_sharded or approximate
                settings[LOSSES] = batch.present if must_agree else names
                settings["`accumulate`"] = accumulate
                settings["whether the Gram matrix is due"] = not kept.serves(
                    batch.present, core.gram_every
                )
        return batch if core.unheld is None else core.watching(batch)

    def _solve(self, batch: Batch, gradients: PerLossGradients, mode: str, age: int) -> StepReport:
        """Computes the Gram matrix, and the coefficients by the rule."""
        core, names, m = self._core, batch.names, len(batch.names)
        gram, values = gradients.gram(), gradients.values
        present = [i for i, value in enumerate(values) if value is not None]
        losses = self._losses(values, gram)
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
        norms = gradients.head_norms()
        if not gram.is_cpu:  # the only copy to the CPU, where the rest is computed
            host = torch.cat([gram.flatten(), norms, losses]).cpu()
            gram, norms, losses = torch.split(host, [m * m, m, m])
            gram = gram.view(m, m)
        problem, vectors = None, (norms.tolist(), losses.tolist())
        if not math.isfinite(sum(map(sum, (*gram.tolist(), *vectors)))):  # the sum may overflow
            rows = torch.cat([gram, norms[:, None], losses[:, None]], dim=1).tolist()
            problem = first_nonfinite(names, rows, gradients.nonfinite_ranks)
        if problem is None:
            mixing = vars(self._mix(batch, gram, present))
            alpha = mixing["coefficients"].tolist()
            if all(map(math.isfinite, alpha)):
                return StepReport(gram=gram, losses=losses, **made, **mixing)
            problem = f"`rule` must return finite coefficients; got {alpha}. Correct the rule."
        report = StepReport(
            gram=gram, losses=losses, coefficients=torch.zeros_like(made["weights"]), **made
        )
        return self._not_finite(report, problem)

    @staticmethod
    def _losses(values: Sequence[Tensor | None], gram: Tensor) -> Tensor:
        """Returns the values of the losses, 0 for an absent one, float64 where `gram` is."""
        # Stacked first, because each copy to the CPU waits for the accelerator.
        there = [v.reshape(()).double() for v in values if v is not None]
        found = iter(torch.stack(there).to(gram.device) if there else ())
        zero = gram.new_zeros(())
        return torch.stack([zero if v is None else next(found) for v in values])

    def _mix(self, batch: Batch, gram: Tensor, present: Sequence[int]) -> MixingCoefficients:
        """Returns the rule's coefficients for the present losses; an absent one gets 0."""
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
                # Via the CPU: every process would unpickle a tensor of cuda:0 on cuda:0.
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
            note = f"The rule raised this for the {len(gram)} present losses."
            checks.add_note(error, note)
            raise
        if mixing.coefficients.shape != gram.shape[:1]:
            raise ValueError(
                f"`rule` must return one coefficient for each of the {len(gram)} present losses; "
                f"got shape {list(mixing.coefficients.shape)}."
            )
        return mixing

    def _checked_combination(
        self, report: StepReport, combined: Sequence[Tensor | None]
    ) -> StepReport:
        """Raises, or marks the step as skipped, if the combined gradient is not finite."""
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
            f'{problem} Or choose nonfinite="skip" to skip such updates, or '
            f'nonfinite="propagate" for a GradScaler to detect and skip them.'
        )

    def _skipping(self) -> bool:
        progress = self._core.progress
        if progress.pending is not None:
            raise RuntimeError(
                "gradients were accumulated but not combined. Call `backward` without "
                "`accumulate=True` on the last micro-batch, or `zero_grad` to drop them."
            )
        if progress.skip:
            self._core.progress = replace(progress, skip=False)
        return progress.skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parameters(self._group)
