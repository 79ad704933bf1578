"""A wrapper of optimizers that behaves like `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from raco_optim._checks import add_note
from raco_optim.wrapper.joint import BareOptimizer, JointOptimizer

STATE_KEY = "raco_optim"
_GIVEN = "use the gradient as it is and not differentiate it again (`create_graph`)"
_AFTER = "step after the backward pass, not during it, because gradients are combined in between"
# Class in lower case -> what it must do and can't.
_REFUSED = {"adahessian": _GIVEN, "sophiah": _GIVEN} | dict.fromkeys(
    ("lomo", "adalomo", "layerwisedummyoptimizer"), _AFTER
)


def _delegated(name: str, doc: str) -> Any:  # noqa: ANN401  # a property, which mypy lets override
    return property(
        lambda self: getattr(self.optimizer, name),
        lambda self, value: setattr(self.optimizer, name, value),
        doc=doc,
    )


class OptimizerWrapper(BareOptimizer):
    """Delegates groups, state, defaults and unknown attributes to the inner optimizers.

    Its hooks receive the wrapper. Global optimizer hooks run twice, for it and the inner optimizer.
    """

    # `GradScaler` would set the scale for an optimizer that unscales itself (fused AdamW) on the
    # wrapper, where the inner one does not see it; with False, `GradScaler` unscales.
    _step_supports_amp_scaling = False

    _own_state: Callable[[], dict[str, Any]]  # the wrapper's part of a checkpoint
    _loader: Callable[[Any], Callable[[], None]]  # checks that part, returns a function to load it
    _reset: Callable[[], None]  # for a state without that part
    _follow: Callable[[], None]  # called after the groups have changed

    def __init__(self, inner: Optimizer | Sequence[Optimizer]) -> None:
        found: list[Any] = list(inner) if isinstance(inner, list | tuple) and inner else [inner]
        for given in found:
            if isinstance(given, OptimizerWrapper):
                raise TypeError(
                    f"`inner` must be an optimizer of torch.optim; got {type(given).__name__}, "
                    f"which already wraps one. Pass its `optimizer` instead."
                )
            if not isinstance(given, Optimizer):
                raise TypeError(
                    f"`inner` must be an optimizer of torch.optim, or a list of them; got "
                    f"{given if given == [] else type(given).__name__}. Build it first: "
                    f"{type(self).__name__}(AdamW(model.parameters()), ...)."
                )
            for kind in type(given).__mro__:
                if must := _REFUSED.get(kind.__name__.lower()):
                    raise ValueError(
                        f"`inner` must {must}; got {type(given).__name__}. Choose another one."
                    )
            if search := getattr(given, "defaults", {}).get("line_search_fn"):
                raise ValueError(
                    f"`inner` must not search along lines, since the combined gradient is not the "
                    f"gradient of the loss that its closure returns; got line_search_fn="
                    f"{search!r}. Build it with line_search_fn=None."
                )
        self._add_hooks()
        vars(self)["optimizer"] = found[0] if len(found) == 1 else JointOptimizer(found)

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The inner optimizers."""
        inner = self.optimizer
        return inner.optimizers if isinstance(inner, JointOptimizer) else (inner,)

    param_groups = _delegated("param_groups", "Parameter groups of the inner optimizer.")
    state = _delegated("state", "State of the inner optimizer.")
    defaults = _delegated("defaults", "Default options of the inner optimizer.")

    def _saved(self) -> dict[str, Any]:
        return {**self.optimizer.state_dict(), STATE_KEY: self._own_state()}

    def _load(self, state_dict: Any) -> None:  # noqa: ANN401
        given, several = state_dict, len(self.optimizers) > 1
        if not isinstance(given, Mapping) and not (several and isinstance(given, list | tuple)):
            raise ValueError(
                f"`state_dict` must be a mapping from `state_dict()`; got {type(given).__name__}."
            )
        load = self._reset
        if isinstance(given, Mapping) and STATE_KEY in given:
            load = self._loader(given[STATE_KEY])
            given = {key: value for key, value in given.items() if key != STATE_KEY}
        # Torch's `load_state_dict` creates new groups and entries, so these stay unchanged.
        before = [dict(vars(optimizer)) for optimizer in self.optimizers]
        try:
            self.optimizer.load_state_dict(given)
        except BaseException as error:
            for optimizer, attributes in zip(self.optimizers, before, strict=True):
                vars(optimizer).update(attributes)
            if isinstance(error, AttributeError | KeyError | TypeError):
                got = (
                    f"one without {error}" if isinstance(error, KeyError) else f"another ({error})"
                )
                raise ValueError(
                    f"`state_dict` must come from `state_dict()` of this optimizer or of an "
                    f"optimizer like its inner one; got {got}."
                ) from error
            add_note(error, "The inner optimizer raised this. Nothing was loaded.")
            raise
        load()
        self._follow()

    def _having(self, name: str) -> list[Optimizer]:
        """Returns the inner optimizers that have an attribute."""
        there = name != "optimizer" and hasattr(self, "optimizer")
        return [x for x in self.optimizers if hasattr(x, name)] if there else []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        # Python calls this only for missing names. Names such as `__reduce__` are not forwarded,
        # so pickle and copy see the wrapper.
        found = [] if name.startswith("__") else self._having(name)
        values = [getattr(x, name) for x in found]
        if len(values) == 1:
            return values[0]
        if values and all(map(callable, values)):  # such as train() and eval()
            return lambda *args, **kwargs: [method(*args, **kwargs) for method in values]
        several = f"; {len(values)} inner optimizers have it. Read it from one of `optimizers`"
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}{several if values else ''}"
        )

    def __setattr__(self, name: str, value: object) -> None:
        own = name in self.__dict__ or hasattr(type(self), name)
        found = [] if own else self._having(name)
        for optimizer in found:  # it would have no effect on the wrapper
            setattr(optimizer, name, value)
        if not found:
            super().__setattr__(name, value)
