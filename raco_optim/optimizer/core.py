"""The state of a `MultiObjectiveOptimizer` between steps."""

from __future__ import annotations

import reprlib
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from raco_optim import _checks as checks
from raco_optim.distributed import replicated
from raco_optim.distributed.group import Group
from raco_optim.gradients import ghost
from raco_optim.gradients.approximate import ApproximateMode, KeptGram
from raco_optim.gradients.dense import DenseMode
from raco_optim.gradients.graph import walk_graph
from raco_optim.gradients.per_example import PerExampleMode
from raco_optim.objectives import Batch, Objectives, Pending, Weights
from raco_optim.report import StepReport
from raco_optim.rules.cagrad import CAGradRule
from raco_optim.rules.function import FunctionRule
from raco_optim.rules.rule import MixingCoefficients, Rule
from raco_optim.wrapper.optimizer import STATE_KEY, OptimizerWrapper
from raco_optim.wrapper.parameters import Parameters, Roles

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NonFinite = Literal["raise", "skip", "propagate"]
Mode = Literal["dense", "ghost", "per_example", "representation"]
MODES = ("dense", "ghost", "per_example", "representation")
_STATE_VERSION = 1
_DEFAULTS = {"gradients": "dense", "gram_every": 1, "nonfinite": "raise"}
_FIXED = ("shared_parameters", "gradients", "gram_every", "model", "process_group", "optimizer")


class Options(TypedDict, total=False):
    """Keyword arguments of every `MultiObjectiveOptimizer`, which documents them."""

    nonfinite: NonFinite
    gram_every: int
    model: nn.Module | None
    process_group: ProcessGroup | None


@dataclass(frozen=True)
class Progress:
    """State that each call passes to the next; replaced in one go, even under an interrupt."""

    report: StepReport | None = None
    pending: Pending | None = None
    skip: bool = False
    skipped: int = 0
    kept: KeptGram = field(default_factory=KeptGram)


@dataclass
class Core:
    """The state of an optimizer; wrappers that imitate its class (Fabric's) share it."""

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
    unheld: set[Tensor] | None = field(default_factory=set)
    progress: Progress = field(default_factory=Progress)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"mode": None, "mode_of": None}

    def chosen_mode(self, parameters: Parameters, group: Group | None) -> Any:  # noqa: ANN401
        """Returns the mode that computes gradients; the only place that decides it."""
        if self.asked in ("representation", "subset"):
            return ApproximateMode(self.asked)
        model: Any = self.model  # not None with "per_example"
        if parameters.is_sharded:
            from raco_optim.distributed.sharded import ShardedMode
            from raco_optim.distributed.sharded_layers import ShardedPerExampleMode

            if self.asked == "per_example":
                return ShardedPerExampleMode(model, parameters.tensors, self.group)
            return ShardedMode(self.asked)
        gather = None if group is None else replicated.gather
        if self.asked == "per_example":
            return PerExampleMode(model, parameters.tensors, gather)
        return ghost.GhostMode(gather) if self.asked == "ghost" else DenseMode(gather)

    def settings(self) -> dict[str, Any]:
        """Returns the settings that must be equal in all processes."""
        own = self.rule.settings() | {"weights": self.objectives.given} | self._chosen()
        return {f"`{name}`": value for name, value in own.items()}

    def described(self) -> dict[str, str]:
        """Returns the settings that `repr` shows."""
        shown = {}
        if isinstance(self.rule, FunctionRule):
            shown["rule"] = repr(self.rule.function)
        if self.objectives.weights is not None:
            shown["weights"] = str(self.objectives)
        others = {name: x for name, x in self._chosen().items() if x != _DEFAULTS[name]}
        return shown | {name: repr(x) for name, x in (self.rule.settings() | others).items()}

    def _chosen(self) -> dict[str, Any]:
        own = (self.asked, self.gram_every, self.nonfinite)
        return dict(zip(_DEFAULTS, own, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimizer's own part of a checkpoint."""
        state = {"version": _STATE_VERSION} | self.objectives.state_dict()
        rule = self.rule.state_dict()
        state |= rule if isinstance(self.rule, CAGradRule) else {"rule": rule}  # c, or any names
        kept_gram = dict(vars(self.progress.kept))
        return state | {"skipped": self.progress.skipped, "kept_gram": kept_gram}

    def loader(self, own: Any, cls: str) -> Callable[[], None]:  # noqa: ANN401
        """Checks a state without changing anything, and returns a function that loads it."""
        has_radius = isinstance(self.rule, CAGradRule)
        needed = {"version", "weights", "names", "skipped", "kept_gram"}
        needed.add("c" if has_radius else "rule")
        if not isinstance(own, Mapping) or needed - own.keys():
            got = sorted(needed - own.keys()) if isinstance(own, Mapping) else type(own).__name__
            raise ValueError(
                f"`state_dict` must come from a {cls}; its entry {STATE_KEY!r} "
                f"{'lacks' if isinstance(got, list) else 'is a'} {got}. Remove this entry to load "
                f"the rest as the state of the inner optimizer."
            )
        version, skipped = own["version"], own["skipped"]
        if type(version) is not int or version > _STATE_VERSION:
            raise ValueError(
                f"`state_dict` must be of version {_STATE_VERSION} or older; got version "
                f"{version!r}. Update raco_optim."
            )
        if type(skipped) is not int or skipped < 0:
            raise ValueError(
                f"`state_dict` must hold an integer >= 0 as 'skipped'; got {skipped!r}."
            )
        weights, places = self.objectives.loaded(own)
        rule_state = {"c": own["c"]} if has_radius else own["rule"]
        self.rule.check_state(rule_state)
        names: Any = own["names"] or (weights and [str(i) for i in range(len(weights))])
        kept = KeptGram.loaded(own["kept_gram"], names, places)

        def load() -> None:
            self.objectives.weights = weights
            self.rule.load_state_dict(rule_state)
            used = kept if self.gram_every > 1 else KeptGram()
            self.progress = replace(self.progress, skipped=skipped, kept=used)

        return load

    def watching(self, batch: Batch) -> Batch:
        """Collects, before the first step, parameters that no inner optimizer holds."""
        # With FSDP2 the leaves are gathered copies.
        held = set() if batch.parameters.is_sharded else set(batch.parameters.tensors)
        walked, unheld = set[Any](), self.unheld

        def watched(loss: Any) -> Any:  # noqa: ANN401  # a tensor, or any result of a callable
            for node in walk_graph(getattr(loss, "grad_fn", None), walked):
                leaf = getattr(node, "variable", None)
                if unheld is not None and isinstance(leaf, nn.Parameter) and leaf not in held:
                    unheld.add(leaf)
            return loss

        losses = [
            (lambda loss=loss: watched(loss())) if callable(loss) else watched(loss)
            for loss in batch.losses
        ]
        return replace(batch, losses=losses)

    def warn_of_unheld(self, parameters: Parameters, cls: str) -> None:
        """Warns once about these parameters."""
        found = (self.unheld or set()).difference(parameters.tensors)  # some may have joined
        self.unheld = None
        if found and parameters.is_sharded:  # gathered copies are known only by their shapes
            shapes = [p.shape for p in parameters.tensors]
            for p in list(found):
                if p.shape in shapes:
                    shapes.remove(p.shape)
                    found.remove(p)
        if found:
            warnings.warn(
                f"the losses depend on {len(found)} parameters, with "
                f"{sum(p.numel() for p in found)} numbers, that no inner optimizer holds. "
                f"`backward` gives them no gradient, so they are not trained. Pass all optimizers "
                f"together, {cls}([trunk_optimizer, head_optimizer], ...), or "
                f"freeze these parameters with requires_grad_(False).",
                stacklevel=5,  # two frames are torch's, around `backward`
            )

    def warn_of_others(self, groups: Iterable[dict[str, Any]]) -> None:
        """Warns before the first `backward` if a step uses the gradients of another."""
        found = (p.grad for group in groups for p in group["params"] if p.grad is not None)
        local = (getattr(g, "to_local", lambda g=g: g)() for g in found)
        if any(g.layout is torch.strided and not g.is_meta and bool(g.any()) for g in local):
            warnings.warn(
                "`step` uses gradients that `loss.backward()` computed, so the weights and the "
                "rule of this optimizer have no effect. Call its `backward(losses)` instead.",
                stacklevel=4,  # one frame is torch's, around `step`
            )


class BetweenSteps(OptimizerWrapper):
    """Attributes of a `MultiObjectiveOptimizer` to read and set between steps."""

    _core: Core

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the inner optimizer.

        Args:
            param_group: As in torch. The key ``"shared"`` says whether its parameters are shared;
                it is required if `shared_parameters` was given without them. With several inner
                optimizers, the key ``"optimizer"`` is required: the position of the one to add the
                group to.

        Raises:
            ValueError: A key is missing or has no use. Nothing is added.
        """
        if "params" not in param_group:
            self.optimizer.add_param_group(param_group)  # raises
        params = param_group["params"]
        if isinstance(params, Tensor | Iterator):  # in place, like torch
            param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
        if "optimizer" in param_group and len(self.optimizers) == 1:
            raise ValueError(
                'the key "optimizer" of `param_group` must be left out, because there is only one '
                "inner optimizer."
            )
        self._core.roles.check_group(param_group)
        self.optimizer.add_param_group(param_group)

    @property
    def report(self) -> StepReport:
        """The report of the last `backward`. Reading it waits for the device.

        Raises:
            RuntimeError: There was no `backward` yet.
        """
        if self.last_step is not None:
            return self.last_step.to_host()
        raise RuntimeError("there is no report yet. Call `backward` first.")

    @property
    def last_step(self) -> StepReport | None:
        """The report with tensors on their device; None before the first `backward`."""
        return self._core.progress.report

    @property
    def weights(self) -> Mapping[str, float] | tuple[float, ...] | None:
        """The user's weights, read-only, in the given form; may be set between steps."""
        return self._core.objectives.given

    @weights.setter
    def weights(self, weights: Weights) -> None:
        self._core.objectives.replace(weights)

    @property
    def rule(self) -> Any:  # noqa: ANN401  # a Rule, or the function that was given
        """The rule, or the user's function; may be set between steps."""
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
        self._core.nonfinite = checked_nonfinite(nonfinite)

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, or the only one."""
        return self._core.group.is_main

    def __setattr__(self, name: str, value: object) -> None:
        if not self._having(name):  # an inner optimizer may have a `model`
            if name in _FIXED:
                raise AttributeError(
                    f"`{name}` can't be changed after the optimizer is built; got {value!r}. Build "
                    f"another optimizer with it, and load this one's state_dict()."
                )
            checks.check_attribute(self, name, BetweenSteps, _FIXED)
        super().__setattr__(name, value)

    @reprlib.recursive_repr()  # a rule may be a method of the optimizer
    def __repr__(self) -> str:
        own = "".join(f"{name}={value}, " for name, value in self._core.described().items())
        lines = textwrap.wrap(own, 96, break_long_words=False, break_on_hyphens=False)
        inside = textwrap.indent("\n".join([*lines, repr(self.optimizer)]), "  ")
        return f"{type(self).__name__}(\n{inside}\n)"

    def __str__(self) -> str:
        report = self.last_step
        return repr(self) if report is None else f"{self!r}\n{report}"

    def _own_state(self) -> dict[str, Any]:
        return self._core.state_dict()

    def _loader(self, own: Any) -> Callable[[], None]:  # noqa: ANN401
        return self._core.loader(own, type(self).__name__)

    def _reset(self) -> None:
        self._core.progress = replace(self._core.progress, kept=KeptGram())

    def _follow(self) -> None:
        """Registers loaded groups; the next `backward` reports any error in them."""
        with suppress(ValueError):
            self._core.roles.current(self.param_groups)


def check_options(cls: str, options: Mapping[str, Any]) -> None:
    """Raises `TypeError` for an argument that no optimizer takes."""
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        known = ["shared_parameters", "gradients", *Options.__annotations__]
        raise TypeError(f"{cls} got the unexpected arguments {unknown}; it takes {known}.")


def checked_gradients(gradients: Any, model: Any) -> tuple[str, Any]:  # noqa: ANN401
    """Returns the mode, and the parameters for the mode "subset", or raises."""
    asked = gradients if isinstance(gradients, str) else "subset"
    if isinstance(gradients, str):
        checks.checked_choice("gradients", gradients, MODES)
    elif isinstance(gradients, Tensor) or not isinstance(gradients, Iterable):
        raise TypeError(
            f"`gradients` must be one of {', '.join(map(repr, MODES))}, or an iterable of "
            f"parameters; got "
            f"{'a single tensor' if isinstance(gradients, Tensor) else repr(gradients)}."
        )
    if (asked == "per_example") != isinstance(model, nn.Module):
        raise TypeError(
            f'`model` must be a torch.nn.Module with gradients="per_example" and None otherwise; '
            f"got {type(model).__name__} and gradients={asked!r}."
        )
    return asked, None if isinstance(gradients, str) else gradients


def checked_nonfinite(nonfinite: NonFinite) -> NonFinite:
    """Returns `nonfinite` if it is valid, or raises."""
    return checks.checked_choice("nonfinite", nonfinite, ("raise", "skip", "propagate"))
