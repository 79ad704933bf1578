"""The optimizer whose ``backward`` takes several losses. It holds all state between steps."""

from __future__ import annotations

import contextlib
import reprlib
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from raco_optim import _checks as checks
from raco_optim.distributed import replicated
from raco_optim.distributed.agreement import parameter_settings, raise_together
from raco_optim.distributed.group import Group
from raco_optim.gradients import ghost
from raco_optim.gradients.approximate import (
    ApproximateGradients,
    ApproximateMode,
    KeptGram,
    check_approximation,
)
from raco_optim.gradients.combine import write_gradients
from raco_optim.gradients.dense import (
    DenseMode,
    PerLossGradients,
    check_losses,
    check_parameters,
)
from raco_optim.gradients.graph import walk_graph
from raco_optim.gradients.per_example import PerExampleMode
from raco_optim.objectives import Batch, Losses, Objectives, Pending, Weights, is_mapping
from raco_optim.report import StepReport, first_nonfinite
from raco_optim.rules.function import FunctionRule
from raco_optim.rules.rule import MixingCoefficients, Rule
from raco_optim.wrapper.optimizer import OptimizerWrapper
from raco_optim.wrapper.parameters import Parameters, Roles

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

NonFinite = Literal["raise", "skip", "propagate"]
Mode = Literal["dense", "ghost", "per_example", "representation"]
MODES = ("dense", "ghost", "per_example", "representation")
# Mode -> the argument of `backward` that it needs.
_THROUGH = {"representation": "representation", "per_example": "scalars"}
_CLOSURE = (
    "`closure` must return the losses, one per weight, as a list or mapping, and leave `backward` "
    "to `step` (or call `backward` itself and return None); it {got}. In a LightningModule, set "
    "`self.automatic_optimization = False` and call `backward` and `step` in `training_step`."
)


class Options(TypedDict, total=False):
    """Keyword arguments that every `MultiObjectiveOptimizer` takes; it documents them."""

    nonfinite: NonFinite
    gram_every: int
    model: nn.Module | None
    process_group: ProcessGroup | None


@dataclass(frozen=True)
class _Progress:
    """What one call hands to the next; replaced at once, so that an interrupt can't split it."""

    report: StepReport | None = None
    pending: Pending | None = None
    skip: bool = False
    skipped: int = 0
    kept: KeptGram = field(default_factory=KeptGram)


@dataclass
class _Core:
    """All that the optimizer holds; wrappers that imitate its class (Fabric's) share it."""

    objectives: Objectives
    rule: Rule
    asked: str
    roles: Roles
    group: Group
    gram_every: int
    nonfinite: NonFinite
    model: nn.Module | None
    mode: Any = None
    mode_of: tuple[int, bool] | None = None
    unheld: dict[int, Tensor] | None = field(default_factory=dict)
    progress: _Progress = field(default_factory=_Progress)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"mode": None, "mode_of": None}


class MultiObjectiveOptimizer(OptimizerWrapper):
    r"""Wraps `torch.optim` optimizers so that they step along a combination of several gradients.

    ``backward(losses)`` computes one gradient per loss and their Gram matrix H, asks `rule` for
    coefficients :math:`\alpha(H)` and adds :math:`\sum_i \alpha_i g_i` to ``.grad``; ``step()`` is
    the step of the inner optimizer. What comes between the two (gradient clipping, unscaling)
    sees the combined gradient. ``param_groups``, ``state`` and ``defaults`` are those of the inner
    optimizer, so schedulers, checkpoints and gradient scalers work on the wrapper as on any
    optimizer; pass the wrapper to all of them. Attributes that the wrapper lacks are read from and
    set on the inner optimizer.

    A loss that is absent from a step (None) takes no part: H and the weights run over the losses
    that are there, and `CAGradClip` divides these weights by their sum W and multiplies the
    coefficients by W, so that :math:`g_0` stays :math:`\sum_i w_i g_i`.

    Args:
        inner: The optimizer to drive, or a list of optimizers of different parameters that step
            together. LBFGS needs a closure; it sees the combined gradient and the weighted loss,
            which is not its antiderivative: leave ``line_search_fn`` at None.
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
            cheaper; ``"per_example"``, by one backward pass for losses that depend on one scalar
            per example (`model`, and `scalars` in `backward`). Where "ghost" and "per_example"
            can't be had the gradients are dense, and the report says why. Approximate, with one
            backward pass for the combined gradient: ``"representation"``, H of the gradients with
            respect to a tensor that is passed to `backward`, or an iterable of parameters, H of
            their part of the gradients.
        nonfinite: What to do when a loss, its gradient or a coefficient of `rule` is NaN or Inf.
            ``"raise"`` (default): `FloatingPointError` that names it. ``"skip"``: no update,
            counted in the report (with LBFGS: none from the first evaluation that was not finite).
            On an accelerator each costs a copy of m (m + 2) numbers to the host per step, and of a
            bit where `gradients` is approximate. ``"propagate"``: combine with alpha = w, as
            ``loss.backward()`` would, or with `rule`'s coefficients as they are, so that a
            `GradScaler` sees it and skips; under a `GradScaler` use no other.
        gram_every: H serves this many steps (default 1); above 1 an approximation, with one
            backward pass in each step between.
        model: With ``gradients="per_example"``, the module with the linear layers; its first
            dimension is that of the examples. It gets forward hooks.
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
        unknown = set(options) - set(Options.__annotations__)
        if unknown:
            raise TypeError(f"{type(self).__name__} got the unexpected arguments {sorted(unknown)}")
        super().__init__(inner)
        asked, subset, model = "subset", _checked_gradients(gradients), options.get("model")
        if isinstance(subset, str):
            asked, subset = subset, None
        if (asked == "per_example") != isinstance(model, nn.Module):
            raise TypeError(
                f'`model` must be a torch.nn.Module with gradients="per_example" and None '
                f"otherwise; got {type(model).__name__} and gradients={asked!r}."
            )
        self._core = _Core(
            objectives=Objectives(weights),
            rule=rule if isinstance(rule, Rule) else FunctionRule(rule),
            asked=asked,
            roles=Roles(shared_parameters, subset, self.param_groups),
            group=Group(options.get("process_group")),
            gram_every=checks.checked_count("gram_every", options.get("gram_every", 1)),
            nonfinite=_checked_nonfinite(options.get("nonfinite", "raise")),
            model=model,
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
        reused = progress.kept.serves(batch.present, core.gram_every)
        gradients: PerLossGradients
        if reused:
            assert progress.kept.gram is not None
            gradients = ApproximateGradients(batch, progress.kept.gram)
        else:
            gradients = mode.collect(batch)
        if group is not None:  # a loss that is absent here may be there
            checks.check_any_present(gradients.values)
        report = replace(
            self._solve(batch, gradients),
            gradients="earlier step" if reused else mode.ran,
            gram_age=progress.kept.age + 1 if reused else 0,
        )
        combined = [] if report.skip else gradients.combine(report.coefficients, report.weights)
        if not report.skip and core.nonfinite != "propagate" and not gradients.exact:
            report = self._checked_combination(report, combined)
        self._warn_of_unheld()
        if report.skip:
            skipped = progress.skipped + 1
            report = replace(report, skipped=skipped)
            core.progress = _Progress(report, None, True, skipped, progress.kept)
        else:
            kept = progress.kept
            if core.gram_every > 1:
                kept = KeptGram(report.gram, batch.present, report.gram_age)
            after = _Progress(report, None, progress.skip, progress.skipped, kept)
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
        if closure is None:
            return None if self._skipping() else self.optimizer.step()
        core = self._core

        def weighted_loss() -> Tensor | None:
            before = core.progress.report
            with torch.enable_grad():
                losses = closure()
            if isinstance(losses, Tensor) and losses.dim() == 0:
                raise TypeError(_CLOSURE.format(got="returned one tensor"))
            if losses is not None and core.progress.report is not before:
                raise TypeError(_CLOSURE.format(got="called `backward` and returned losses"))
            if losses is not None:
                self.backward(losses)
            report = core.progress.report
            if report is None:
                raise TypeError(_CLOSURE.format(got="returned None, and there was no `backward`"))
            if self._skipping():
                raise _SkippedError
            return None if losses is None else report.losses @ report.weights.to(report.losses)

        with contextlib.suppress(_SkippedError):
            return self.optimizer.step(weighted_loss)  # type: ignore[arg-type]  # a Tensor
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters, and drops accumulated ones."""
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self._core.progress = replace(self._core.progress, pending=None, skip=False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the inner optimizer.

        Args:
            param_group: As in torch. Where `shared_parameters` was given and does not hold these
                parameters, the key ``"shared"`` says whether they are shared. With several inner
                optimizers the key ``"optimizer"`` is the position of the one that takes them.

        Raises:
            ValueError: A key is missing or of no use. Nothing is added then.
        """
        params = param_group["params"]
        if isinstance(params, Tensor | Iterator):  # in place, as torch does
            param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
        self._core.roles.check_group(param_group)
        self.optimizer.add_param_group(param_group)

    @property
    def report(self) -> StepReport:
        """What the last `backward` did. Reading it waits for the device.

        Raises:
            RuntimeError: There was no `backward` yet.
        """
        if self.last_step is not None:
            return self.last_step.to_host()
        raise RuntimeError("there is nothing to report yet. Call `backward` first.")

    @property
    def last_step(self) -> StepReport | None:
        """The report with its tensors still on their device; None before the first `backward`."""
        return self._core.progress.report

    @property
    def weights(self) -> Mapping[str, float] | tuple[float, ...] | None:
        """The user's weights, as they were given, read-only; others may be set between steps."""
        return self._core.objectives.given

    @weights.setter
    def weights(self, weights: Weights) -> None:
        self._core.objectives.replace(weights)

    @property
    def rule(self) -> Any:  # noqa: ANN401  # a Rule, or the function that was given
        """The rule; another one may be set between steps."""
        rule = self._core.rule
        return rule.function if isinstance(rule, FunctionRule) else rule

    @rule.setter
    def rule(self, rule: Rule | Callable[[Tensor], Tensor | MixingCoefficients]) -> None:
        self._core.rule = rule if isinstance(rule, Rule) else FunctionRule(rule)

    @property
    def nonfinite(self) -> NonFinite:
        """What to do with NaN and Inf; may be set between steps."""
        return self._core.nonfinite

    @nonfinite.setter
    def nonfinite(self, nonfinite: NonFinite) -> None:
        self._core.nonfinite = _checked_nonfinite(nonfinite)

    @property
    def is_main(self) -> bool:
        """Whether this is the first of the processes, or the only one."""
        return self._core.group.is_main

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
        parameters = core.roles.current(self.param_groups)
        mode_of = id(parameters), group is not None
        if core.mode_of != mode_of:
            core.mode, core.mode_of = self._chosen_mode(parameters, group), mode_of
        return parameters

    def _chosen_mode(self, parameters: Parameters, group: Group | None) -> Any:  # noqa: ANN401
        """Chooses how gradients are computed; the only place where that is decided."""
        core = self._core
        if core.asked in ("representation", "subset"):
            return ApproximateMode(core.asked)
        if parameters.is_sharded:
            from raco_optim.distributed.sharded import ShardedMode

            return ShardedMode(core.asked)
        gather = None if group is None else replicated.gather
        if core.asked == "per_example":
            assert core.model is not None
            return PerExampleMode(core.model, parameters.tensors, gather)
        return ghost.GhostMode(gather) if core.asked == "ghost" else DenseMode(gather)

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
        settings: dict[str, Any] = {}
        if group is not None:
            settings = parameter_settings(group, parameters) | self._settings()
        # A micro-batch that sends nothing may fail without the other processes.
        alone = group is None or (accumulate and not parameters.is_sharded)
        with contextlib.nullcontext() if alone else raise_together(group, settings):
            check_parameters(parameters.tensors)
            pending = core.progress.pending
            if pending is not None and not pending.parameters.are(parameters):
                raise RuntimeError(
                    "parameters must stay the same between the micro-batches of a step; some were "
                    "frozen, added, removed or replaced. Call `zero_grad` and begin the step anew."
                )
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
            if not accumulate and (group is None or approximate):
                batch.check_any_present()
            if core.gram_every > 1:
                check_approximation(batch, accumulate=accumulate)
            core.mode.check(batch, accumulate=accumulate)
            check_losses(ordered, parameters.tensors, names)
            all_of_them = batch.present if parameters.is_sharded or approximate else names
            settings["`losses` (None if absent)"] = list(all_of_them)
            settings["`accumulate`"] = accumulate
            settings["whether the Gram matrix is due"] = not kept.serves(
                batch.present, core.gram_every
            )
        return batch if core.unheld is None else self._watching(batch)

    def _solve(self, batch: Batch, gradients: PerLossGradients) -> StepReport:
        """Computes the Gram matrix and asks the rule for coefficients.

        Raises:
            FloatingPointError: See the class.
            ValueError: The rule returned something other than one coefficient per loss.
        """
        core, names, m = self._core, batch.names, len(batch.names)
        gram = gradients.gram()
        present = [i for i, value in enumerate(gradients.values) if value is not None]
        zero = gram.new_zeros(())
        losses = torch.stack(
            [zero if v is None else v.to(gram).reshape(()) for v in gradients.values]
        )
        w = torch.tensor(batch.weights, dtype=torch.float64, device="cpu")
        report = StepReport(
            names=names,
            weights=w,
            gram=gram,
            coefficients=torch.zeros_like(w),
            losses=losses,
            absent=tuple(n for n, v in zip(names, gradients.values, strict=True) if v is None),
            skipped=core.progress.skipped,
        )
        if core.nonfinite == "propagate":
            finite = gram.isfinite().all() & losses.isfinite().all()
            unit = torch.eye(m, dtype=gram.dtype, device=gram.device)
            mixing = self._mix(batch, torch.where(finite, gram, unit), present)
            alpha = mixing.coefficients
            p, p_clipped, gap = (
                None if x is None else torch.where(finite.to(x.device), x, torch.nan)
                for x in (mixing.p, mixing.p_clipped, mixing.gap)
            )
            alpha = torch.where(finite.to(alpha.device), alpha, w.to(alpha))
            return replace(report, coefficients=alpha, p=p, p_clipped=p_clipped, gap=gap)
        # The one copy to the host; what follows is of size m and done there.
        norms = gradients.head_norms()
        host = torch.cat([gram, norms[:, None], losses[:, None]], dim=1).cpu()
        gram, losses = host[:, :m], host[:, m + 1]
        report = replace(report, gram=gram, losses=losses)
        if bool(host.isfinite().all()):
            problem = None
        else:
            problem = first_nonfinite(names, host.tolist(), gradients.nonfinite_ranks)
        if problem is None:
            mixing = self._mix(batch, gram, present)
            values = mixing.coefficients.tolist()
            if all(-torch.inf < x < torch.inf for x in values):
                return replace(
                    report,
                    coefficients=mixing.coefficients,
                    p=mixing.p,
                    p_clipped=mixing.p_clipped,
                    gap=mixing.gap,
                )
            problem = f"`rule` must return finite coefficients; got {values}. Mend it."
        return self._not_finite(report, problem)

    def _mix(self, batch: Batch, gram: Tensor, present: Sequence[int]) -> MixingCoefficients:
        """Asks the rule for coefficients of the losses that are there; an absent one gets 0."""
        rule, weights, m = self._core.rule, batch.weights, len(batch.names)
        some_absent = len(present) < m
        if some_absent:
            gram, weights = gram[present][:, present], [weights[i] for i in present]
        with torch.no_grad():
            if rule.deterministic or batch.group is None:
                mixing = rule(gram, weights)
            else:
                with raise_together(batch.group):
                    mixing = rule(gram, weights)
                mixing = batch.group.broadcast_from_first(mixing)
            if not some_absent:
                return mixing

            def spread(x: Tensor | None, fill: float) -> Tensor | None:
                return None if x is None else x.new_full((m,), fill).index_put_((index,), x)

            index = torch.tensor(present, device=mixing.coefficients.device)
            alpha = spread(mixing.coefficients, 0.0)
            assert alpha is not None
            p, p_clipped = (spread(x, torch.nan) for x in (mixing.p, mixing.p_clipped))
            return MixingCoefficients(alpha, p, p_clipped, mixing.gap)

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

    def _watching(self, batch: Batch) -> Batch:
        """Looks, before the first step, for parameters that nobody holds."""
        core, tensors = self._core, batch.parameters.tensors
        if batch.parameters.is_sharded:  # the leaves are gathered copies, which nobody holds
            return batch
        held, walked = {id(p) for p in tensors}, set[Any]()

        def watched(loss: Any) -> Any:  # noqa: ANN401  # a tensor or what else a callable returned
            for node in walk_graph(getattr(loss, "grad_fn", None), walked):
                leaf = getattr(node, "variable", None)
                if isinstance(leaf, nn.Parameter) and id(leaf) not in held:
                    core.unheld = {**(core.unheld or {}), id(leaf): leaf}
            return loss

        losses = [
            watched(loss)
            if loss is None or isinstance(loss, Tensor)
            else (lambda loss=loss: watched(loss()))
            for loss in batch.losses
        ]
        return replace(batch, losses=losses)

    def _warn_of_unheld(self) -> None:
        found, self._core.unheld = self._core.unheld, None
        if found:
            warnings.warn(
                f"the losses depend on {len(found)} parameters, with "
                f"{sum(p.numel() for p in found.values())} numbers, that no inner optimizer holds: "
                f"`backward` gives them no gradient, and they do not move. Pass all optimizers "
                f"together, {type(self).__name__}([trunk_optimizer, head_optimizer], ...), or "
                f"freeze these parameters with requires_grad_(False).",
                stacklevel=4,
            )

    def _settings(self) -> dict[str, Any]:
        """Returns what must be the same in all processes."""
        core = self._core
        own = core.rule.settings() | {
            "weights": core.objectives.state_dict(),
            "gradients": core.asked,
            "gram_every": core.gram_every,
            "nonfinite": core.nonfinite,
        }
        return {f"`{name}`": value for name, value in own.items()}

    def _described(self) -> Iterator[tuple[str, str]]:
        """Yields what `repr` shows of the wrapper itself."""
        core = self._core
        if isinstance(core.rule, FunctionRule):
            yield "rule", repr(core.rule.function)
        if core.objectives.weights is not None:
            yield "weights", str(core.objectives)
        for name, value in core.rule.settings().items():
            yield name, repr(value)
        if core.asked != "dense":
            yield "gradients", repr(core.asked)
        if core.gram_every > 1:
            yield "gram_every", repr(core.gram_every)
        if core.nonfinite != "raise":
            yield "nonfinite", repr(core.nonfinite)

    @reprlib.recursive_repr()  # a rule may be a method of the optimizer
    def __repr__(self) -> str:
        own = "".join(f"{name}={value}, " for name, value in self._described())
        lines = textwrap.wrap(own, 96, break_long_words=False, break_on_hyphens=False)
        inside = textwrap.indent("\n".join([*lines, repr(self.optimizer)]), "  ")
        return f"{type(self).__name__}(\n{inside}\n)"

    def __str__(self) -> str:
        report = self.last_step
        return repr(self) if report is None else f"{self!r}\n{report}"

    def _own_state(self) -> dict[str, Any]:
        core = self._core
        state, rule = core.objectives.state_dict(), core.rule.state_dict()
        state |= {"rule": rule} if isinstance(core.rule, FunctionRule) else rule
        progress = core.progress
        return state | {"skipped": progress.skipped, "kept_gram": progress.kept.state_dict()}

    def _loader(self, own: Mapping[str, Any]) -> Callable[[], None]:
        core = self._core
        weights, places = core.objectives.loaded(own)
        rule_state: Any = own.get("rule")
        if not isinstance(core.rule, FunctionRule):
            rule_state = {key: own[key] for key in core.rule.state_dict()}
        core.rule.check_state(rule_state)
        skipped, kept = own["skipped"], KeptGram.loaded(own["kept_gram"], places)
        if not isinstance(skipped, int) or isinstance(skipped, bool) or skipped < 0:
            raise ValueError(
                f"`state_dict` must hold, as 'skipped', a number of updates >= 0; got {skipped!r}."
            )

        def load() -> None:
            core.objectives.weights = weights
            core.rule.load_state_dict(rule_state)
            kept_or_none = kept if core.gram_every > 1 else KeptGram()
            core.progress = replace(core.progress, skipped=skipped, kept=kept_or_none)

        return load

    def _reset(self) -> None:
        self._core.progress = replace(self._core.progress, kept=KeptGram())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parameters(self._group)


class _SkippedError(Exception):
    """Leaves the inner step when the losses of its closure are not finite."""


def unwrap(optimizer: Any) -> MultiObjectiveOptimizer:  # noqa: ANN401  # or any wrapper of one
    """Returns the `MultiObjectiveOptimizer` inside other wrappers.

    Accelerate's ``AcceleratedOptimizer``, for one, hides the methods that torch optimizers lack.
    The result has them: ``backward``, ``report``, ``weights``, ``c``.

    Args:
        optimizer: The optimizer, or a wrapper that holds it as its attribute ``optimizer``.

    Raises:
        TypeError: There is no `MultiObjectiveOptimizer` inside.

    Example:
        >>> import torch, raco_optim
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = raco_optim.CAGradClip(torch.optim.SGD([x], lr=0.1), [0.5, 0.5], c=0.0)
        >>> raco_optim.unwrap(opt) is opt
        True
    """
    found = optimizer
    # Lightning's and Fabric's wrappers are instances too: the innermost one is meant.
    while not isinstance(found, MultiObjectiveOptimizer) or isinstance(
        found.optimizer, MultiObjectiveOptimizer
    ):
        try:
            found = found.optimizer
        except AttributeError:
            raise TypeError(
                f"`optimizer` must be a MultiObjectiveOptimizer such as CAGradClip, or a wrapper "
                f"of one; got {type(optimizer).__name__}."
            ) from None
    return found


def backward(optimizer: Any, losses: Losses, **options: Any) -> None:  # noqa: ANN401
    """Calls ``backward`` of the optimizer that `unwrap` finds; see there.

    Args:
        optimizer: The optimizer, or a wrapper of it.
        losses: See `MultiObjectiveOptimizer.backward`.
        **options: As there.

    Raises:
        TypeError: There is no `MultiObjectiveOptimizer` inside.

    Example:
        >>> import torch, raco_optim
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = raco_optim.CAGradClip(torch.optim.SGD([x], lr=0.1), [0.5, 0.5], c=0.0)
        >>> raco_optim.backward(opt, [x[0], x[1]])
        >>> x.grad
        tensor([0.5000, 0.5000])
    """
    unwrap(optimizer).backward(losses, **options)


def _checked_gradients(gradients: Any) -> Any:  # noqa: ANN401  # a mode or parameters
    if isinstance(gradients, str):
        return checks.checked_choice("gradients", gradients, MODES)
    if isinstance(gradients, Tensor) or not isinstance(gradients, Iterable):
        raise TypeError(
            f"`gradients` must be one of {', '.join(map(repr, MODES))}, or an iterable of "
            f"parameters; got "
            f"{'a single tensor' if isinstance(gradients, Tensor) else repr(gradients)}."
        )
    return gradients


def _checked_nonfinite(nonfinite: NonFinite) -> NonFinite:
    return checks.checked_choice("nonfinite", nonfinite, ("raise", "skip", "propagate"))
