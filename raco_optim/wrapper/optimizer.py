"""An optimizer around others, which torch and its ecosystem take for an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from raco_optim._checks import add_note
from raco_optim.wrapper.joint import BareOptimizer, JointOptimizer

_STATE_KEY = "raco_optim"
_STATE_VERSION = 1
# They differentiate the gradient itself, which only one loss's backward pass could offer.
_NEED_CREATE_GRAPH = ("adahessian", "sophiah")
# They step inside the backward pass of the model, layer by layer, or do not step at all.
_STEP_IN_BACKWARD = ("layerwisedummyoptimizer", "lomo", "adalomo")


class OptimizerWrapper(BareOptimizer):
    """Delegates parameter groups, state and defaults to `optimizer`, and adds its own state.

    What the wrapper lacks, attributes and methods, is read from the inner optimizer and set there.

    Note:
        Hooks registered on the wrapper are given the wrapper. Hooks registered for all optimizers
        at once run twice, for the wrapper and for the inner optimizer.
    """

    # An inner optimizer that unscales gradients itself (fused AdamW) would be told the scale on
    # the wrapper; with False, `GradScaler` unscales.
    _step_supports_amp_scaling = False

    def __init__(self, inner: Optimizer | Sequence[Optimizer]) -> None:
        found: list[Any] = list(inner) if isinstance(inner, list | tuple) and inner else [inner]
        for given in found:
            if not isinstance(given, Optimizer) or isinstance(given, OptimizerWrapper):
                raise TypeError(
                    f"`inner` must be an optimizer of torch.optim, or a list of them; got "
                    f"{type(given).__name__}. Build it first: "
                    f"{type(self).__name__}(AdamW(model.parameters()), ...)."
                )
            self._check_steps_after_backward(given)
        self.optimizer = found[0] if len(found) == 1 else JointOptimizer(found)
        self._add_hooks()

    @staticmethod
    def _check_steps_after_backward(inner: Optimizer) -> None:
        names = {kind.__name__.lower() for kind in type(inner).__mro__}
        got = f"got {type(inner).__name__}. Choose another optimizer"
        if names & set(_NEED_CREATE_GRAPH):
            raise ValueError(
                f"`inner` must step along a gradient that it is given, not differentiate it again "
                f"(`create_graph`); {got}."
            )
        if names & set(_STEP_IN_BACKWARD):
            raise ValueError(
                f"`inner` must step after the backward pass, when gradients are combined, not "
                f"during it; {got}."
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the inner optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # noqa: ANN401  # as in Optimizer
        """State of the inner optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:  # noqa: ANN401  # as in Optimizer
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """Default options of the inner optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the inner optimizer."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

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

        With several inner optimizers also a list of their single states.

        Raises:
            ValueError: The state does not fit the losses, the method, this version or the inner
                optimizer. Nothing is loaded then.
        """
        given: Any = state_dict
        own = None
        if isinstance(given, Mapping):
            given = dict(given)
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                given = pre_hook(self, given) or given
            own = given.pop(_STATE_KEY, None)
        elif not (isinstance(given, list | tuple) and isinstance(self.optimizer, JointOptimizer)):
            raise ValueError(
                f"`state_dict` must be a mapping, as `state_dict` returns it; got "
                f"{type(given).__name__}."
            )
        load = None if own is None else self._checked_state(own)
        try:
            self.optimizer.load_state_dict(given)
        except (AttributeError, KeyError, TypeError) as error:
            got = f"one without {error}" if isinstance(error, KeyError) else f"another ({error})"
            raise ValueError(
                f"`state_dict` must be what `state_dict` of this optimizer, or of one like its "
                f"inner optimizer, returned; got {got}."
            ) from error
        except ValueError as error:
            add_note(error, "It was raised by the inner optimizer. Nothing was loaded.")
            raise
        self._reset()
        if load is not None:
            load()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _own_state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the wrapper itself."""
        return {}

    def _loader(self, own: Mapping[str, Any]) -> Any:  # noqa: ANN401  # a callable
        """Checks a state, changing nothing, and returns what loads it."""

    def _checked_state(self, own: object) -> Any:  # noqa: ANN401
        expected = f"`state_dict` must be of a {type(self).__name__}"
        if not isinstance(own, Mapping):
            raise ValueError(
                f"{expected}; got a {type(own).__name__} under {_STATE_KEY!r}. Without that key it "
                f"is loaded as the state of the inner optimizer."
            )
        missing = [key for key in ("version", *self._own_state()) if key not in own]
        if missing:
            raise ValueError(
                f"{expected}; under {_STATE_KEY!r} it lacks {missing}. Without that key it is "
                f"loaded as the state of the inner optimizer."
            )
        version = own["version"]
        if not isinstance(version, int) or version > _STATE_VERSION:
            raise ValueError(
                f"`state_dict` must be of version {_STATE_VERSION} or older; got version "
                f"{version!r}. Update raco_optim."
            )
        return self._loader(own)

    def _reset(self) -> None:
        """Forgets what belongs to the run before a state is loaded."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        # Only what is found nowhere else comes here. Python's own names stay unforwarded, so that
        # pickle and copy ask the wrapper; without `optimizer` it is being unpickled.
        if name.startswith("__") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: object) -> None:
        own = name == "optimizer" or name in self.__dict__ or hasattr(type(self), name)
        inner = None if own else getattr(self, "optimizer", None)
        if inner is not None and hasattr(inner, name):
            setattr(inner, name, value)  # on the wrapper it would have no effect
        else:
            super().__setattr__(name, value)
