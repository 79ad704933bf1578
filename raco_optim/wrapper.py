"""An optimizer around another one, which torch and its ecosystem take for an optimizer."""

from __future__ import annotations

import reprlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_STATE_KEY = "raco_optim"
_STATE_VERSION = 1


class OptimizerWrapper(Optimizer):
    """Delegates parameter groups, state and defaults to `optimizer`, and adds its own state.

    `Optimizer.__init__` is not called: it would make parameter groups of its own, which drift
    apart from those of the inner optimizer as soon as a checkpoint is loaded. Its hooks are all
    that is needed of it.

    Note:
        Hooks registered on the wrapper are given the wrapper. Hooks registered for all optimizers
        at once run twice, for the wrapper and for the inner optimizer.
    """

    def __init__(self, inner: Optimizer) -> None:
        given: object = inner
        if not isinstance(given, Optimizer) or isinstance(given, OptimizerWrapper):
            raise TypeError(
                f"`inner` must be an optimizer of torch.optim; got {type(given).__name__}. "
                f"Build it first: {type(self).__name__}(AdamW(model.parameters()), ...)."
            )
        self.optimizer = inner
        self._add_hooks()

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

        Raises:
            ValueError: The state does not fit the losses, the method, this version or the inner
                optimizer. Nothing is loaded then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        own = state_dict.pop(_STATE_KEY, None)
        if own is not None:
            self._check_own_state(own)
        try:
            self.optimizer.load_state_dict(state_dict)
        except KeyError as error:
            raise ValueError(
                f"`state_dict` must be what `state_dict` of this optimizer, or of one like its "
                f"inner optimizer, returned; got one without {error}."
            ) from error
        self._reset()
        if own is not None:
            self._load_own_state(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _places(self) -> dict[tuple[int, int], Tensor]:
        """Returns the parameters by the numbers of their group and of their place in it."""
        groups = enumerate(self.param_groups)
        return {(i, j): p for i, group in groups for j, p in enumerate(group["params"])}

    def _places_of(self, parameters: Sequence[Tensor]) -> set[tuple[int, int]]:
        """Returns where parameters are: Accelerate puts other tensors in their places (FSDP2)."""
        chosen = {id(p) for p in parameters}
        return {place for place, p in self._places().items() if id(p) in chosen}

    def _own_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the wrapper itself."""
        return {}

    def _check_own_state(self, own: dict[str, Any]) -> None:
        """Raises `ValueError` unless `_load_own_state` can load it."""
        missing = [key for key in ("version", *self._own_state()) if key not in own]
        if missing:
            raise ValueError(
                f"`state_dict` must be of a {type(self).__name__}; under {_STATE_KEY!r} it lacks "
                f"{missing}. Without that key it is loaded as the state of the inner optimizer."
            )
        if own["version"] > _STATE_VERSION:
            raise ValueError(
                f"`state_dict` must be of version {_STATE_VERSION} or older; got version "
                f"{own['version']}. Update raco_optim."
            )

    def _reset(self) -> None:
        """Forgets what belongs to the run before a state is loaded."""

    def _load_own_state(self, own: dict[str, Any]) -> None:
        """Loads a state that was checked."""

    def _described(self) -> dict[str, Any]:
        """What `repr` shows of the wrapper itself."""
        return {}

    @reprlib.recursive_repr()  # a rule may be a method of the wrapper
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

    def _add_hooks(self) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()
