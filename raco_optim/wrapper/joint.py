"""Several optimizers that step together, as one `torch.optim.Optimizer`."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_KEY = "optimizer"


class BareOptimizer(Optimizer):
    """An optimizer with the hooks of one, but without groups, state and defaults of its own.

    `Optimizer.__init__` is not called: it would make parameter groups, which drift apart from
    those of the inner optimizers as soon as a checkpoint is loaded.
    """

    def _add_hooks(self) -> None:
        # Into the dict: `setattr` may reach for the inner optimizer's.
        for moment in ("step", "state_dict", "load_state_dict"):
            self.__dict__[f"_optimizer_{moment}_pre_hooks"] = OrderedDict()
            self.__dict__[f"_optimizer_{moment}_post_hooks"] = OrderedDict()
        self._patch_step_function()

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


class JointOptimizer(BareOptimizer):
    """Joins optimizers: their groups in order, one step, one state.

    Args:
        optimizers: Two or more optimizers, which hold no parameter in common.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        self._add_hooks()
        held: set[int] = set()
        for optimizer in self.optimizers:
            closure = inspect.signature(optimizer.step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                raise ValueError(
                    f"`inner` must hold optimizers that step without a closure; got "
                    f"{type(optimizer).__name__} among several. Use it alone."
                )
            own = _held(optimizer.param_groups)
            if own & held:
                raise ValueError(
                    f"`inner` must hold optimizers of different parameters; got "
                    f"{type(optimizer).__name__} with {len(own & held)} that an earlier one holds."
                )
            held |= own

    @property
    def param_groups(self) -> Any:  # noqa: ANN401  # a list, as in Optimizer
        """The groups of all optimizers, in order."""
        return _Groups(self.optimizers)

    @param_groups.setter
    def param_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        found: list[list[dict[str, Any]]] = [[] for _ in self.optimizers]
        held = [_held(optimizer.param_groups) for optimizer in self.optimizers]
        for group in groups:
            owners = [k for k, own in enumerate(held) if _held([group]) & own]
            if not owners:
                raise ValueError(
                    f"`param_groups` must hold parameters of the inner optimizers; got a group of "
                    f"{len(group['params'])} others. Use `add_param_group`."
                )
            found[owners[0]].append(group)
        for optimizer, own in zip(self.optimizers, found, strict=True):
            optimizer.param_groups = own

    @property
    def state(self) -> Any:  # noqa: ANN401  # a mapping, as in Optimizer
        """The states of all optimizers, by parameter."""
        return _State(self.optimizers)

    @state.setter
    def state(self, state: Mapping[Tensor, Any]) -> None:
        given = dict(state)
        joint = _State(self.optimizers)
        for p in list(joint):
            del joint[p]
        joint.update(given)

    @property
    def defaults(self) -> dict[str, Any]:
        """The default options that all optimizers have, with the first one's values."""
        first, *others = (optimizer.defaults for optimizer in self.optimizers)
        return {key: x for key, x in first.items() if all(key in other for other in others)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the inner optimizer whose position the key "optimizer" gives."""
        group = dict(param_group)
        position = group.pop(_KEY, None)
        if position not in range(len(self.optimizers)) or isinstance(position, bool):
            raise ValueError(
                f'`param_group` must say by the key "{_KEY}" which of the {len(self.optimizers)} '
                f"inner optimizers takes it, by its position from 0; got {position!r}."
            )
        if _held([group]) & _held(self.param_groups):
            raise ValueError("`param_group` must hold new parameters; got one that is held.")
        self.optimizers[position].add_param_group(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Calls the closure once, then lets every optimizer step."""
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns one state in torch's form, which an optimizer with all the groups can load."""
        joint: dict[str, Any] = {"state": {}, "param_groups": []}
        start = 0
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            joint["state"] |= {start + k: entry for k, entry in own["state"].items()}
            for group in own["param_groups"]:
                numbers = [start + k for k in group["params"]]
                joint["param_groups"].append(group | {"params": numbers})
            start += sum(len(group["params"]) for group in own["param_groups"])
        return joint

    def load_state_dict(self, state_dict: Any) -> None:  # noqa: ANN401  # or a sequence of them
        """Loads a joint state, or a sequence of states of the single optimizers.

        Raises:
            ValueError: The groups differ. Nothing is loaded then.
        """
        parts = self._parts(state_dict)
        before = [optimizer.state_dict() for optimizer in self.optimizers]
        try:
            for optimizer, part in zip(self.optimizers, parts, strict=True):
                optimizer.load_state_dict(part)
        except BaseException:
            for optimizer, part in zip(self.optimizers, before, strict=True):
                optimizer.load_state_dict(part)
            raise

    def _parts(self, state_dict: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        counts = [len(optimizer.param_groups) for optimizer in self.optimizers]
        if not isinstance(state_dict, Mapping):
            parts = list(state_dict)
            if len(parts) != len(counts):
                raise ValueError(
                    f"`state_dict` must hold one state for each of the {len(counts)} inner "
                    f"optimizers; got {len(parts)}."
                )
            return parts
        groups, state = list(state_dict["param_groups"]), state_dict["state"]
        if len(groups) != sum(counts):
            raise ValueError(
                f"`state_dict` must have {sum(counts)} parameter groups; got {len(groups)}."
            )
        parts = []
        for count in counts:
            own, groups = groups[:count], groups[count:]
            numbers = [k for group in own for k in group["params"]]
            parts.append(
                {"state": {k: state[k] for k in numbers if k in state}, "param_groups": own}
            )
        return parts

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name.startswith("__") or name == "optimizers":
            raise AttributeError(name)
        found = [getattr(x, name) for x in self.optimizers if hasattr(x, name)]
        if found and all(map(callable, found)):  # such as train() and eval() of all that have it

            def call_all(*args: Any, **kwargs: Any) -> list[Any]:  # noqa: ANN401
                return [method(*args, **kwargs) for method in found]

            return found[0] if len(found) == 1 else call_all
        if len(found) == 1:
            return found[0]
        several = f"; {len(found)} inner optimizers have it: ask one of `optimizers`"
        raise AttributeError(f"{type(self).__name__} has no {name!r}{several if found else ''}.")

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.optimizers))


def _held(groups: Sequence[Mapping[str, Any]]) -> set[int]:
    """Returns the identities of the parameters in groups."""
    found = set()
    for group in groups:
        params = group["params"]
        for p in [params] if isinstance(params, Tensor) else params:
            found.add(id(p[1] if isinstance(p, tuple) else p))
    return found


class _Groups(list[dict[str, Any]]):
    """The groups of several optimizers; what is deleted is deleted from the optimizer's list."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        super().__init__(group for x in optimizers for group in x.param_groups)
        self._optimizers = optimizers

    def __delitem__(self, index: Any) -> None:  # noqa: ANN401  # an integer or a slice
        gone = self[index]
        super().__delitem__(index)
        for optimizer in self._optimizers:
            for group in [gone] if isinstance(gone, dict) else gone:
                optimizer.param_groups[:] = [g for g in optimizer.param_groups if g is not group]

    def pop(self, index: Any = -1) -> dict[str, Any]:  # noqa: ANN401
        """Removes a group from its optimizer, and returns it."""
        group = self[index]
        del self[index]
        return group

    def remove(self, group: dict[str, Any]) -> None:
        """Removes a group from its optimizer."""
        del self[next(k for k, g in enumerate(self) if g is group)]

    def clear(self) -> None:
        """Removes all groups."""
        del self[:]

    def _refuse(self, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        raise TypeError(
            "groups of several inner optimizers can be deleted here, not added or exchanged. Use "
            f'`add_param_group` with the key "{_KEY}", or `param_groups` of the inner optimizer.'
        )

    append = extend = insert = sort = reverse = __setitem__ = __iadd__ = __imul__ = _refuse


class _State(MutableMapping[Tensor, Any]):
    """The states of several optimizers."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def _of(self, p: Tensor) -> Any:  # noqa: ANN401  # a mapping
        for optimizer in self._optimizers:
            if p in optimizer.state or id(p) in _held(optimizer.param_groups):
                return optimizer.state
        raise KeyError(p)

    def __getitem__(self, p: Tensor) -> Any:  # noqa: ANN401
        return self._of(p)[p]

    def __setitem__(self, p: Tensor, entry: Any) -> None:  # noqa: ANN401
        self._of(p)[p] = entry

    def __delitem__(self, p: Tensor) -> None:
        del self._of(p)[p]

    def __contains__(self, p: object) -> bool:
        return any(p in optimizer.state for optimizer in self._optimizers)

    def __iter__(self) -> Iterator[Tensor]:
        return (p for optimizer in self._optimizers for p in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)
