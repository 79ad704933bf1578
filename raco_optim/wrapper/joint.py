"""Several optimizers that step together, as one `torch.optim.Optimizer`."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_KEY = "optimizer"
_Group = dict[str, Any]


class BareOptimizer(Optimizer):
    """An optimizer with hooks, without groups, state and defaults, which could diverge."""

    _saved: Callable[[], dict[str, Any]]
    _load: Callable[[Any], None]

    def _add_hooks(self) -> None:
        for moment in ("step", "state_dict", "load_state_dict"):
            self.__dict__[f"_optimizer_{moment}_pre_hooks"] = OrderedDict()
            self.__dict__[f"_optimizer_{moment}_post_hooks"] = OrderedDict()
        self._patch_step_function()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the inner optimizer, with the wrapper's under the key "raco_optim".

        It does not contain accumulated gradients: save between steps.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._saved()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: Any) -> None:  # noqa: ANN401  # a mapping, or several
        """Loads a result of `state_dict`, or the state of a plain inner optimizer.

        With several inner optimizers, also a list of their states.

        Raises:
            ValueError: The state does not fit the losses, the method, this version or the inner
                optimizer. Nothing is loaded.
        """
        given = state_dict
        if isinstance(given, Mapping):
            given = dict(given)
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                given = pre_hook(self, given) or given
        self._load(given)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Like Optimizer, without hooks and without the `step` that a scheduler replaced.
        own = self.__dict__.items()
        return {name: x for name, x in own if name != "step" and not name.endswith("_hooks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._add_hooks()
        self.__dict__.update(state)


class JointOptimizer(BareOptimizer):
    """Joins optimizers of different parameters: one list of groups, one step, one state."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._add_hooks()
        self.optimizers = tuple(optimizers)
        held: set[int] = set()
        for optimizer in self.optimizers:
            closure = inspect.signature(optimizer.step).parameters.get("closure")
            needed = closure is not None and closure.default is inspect.Parameter.empty
            if needed or hasattr(optimizer, "first_step"):  # LBFGS, and SAM
                raise ValueError(
                    f"`inner` must hold optimizers that step without a closure; got "
                    f"{type(optimizer).__name__} among several. Use it alone."
                )
            own = _held(optimizer.param_groups)
            if own & held:
                raise ValueError(
                    f"`inner` must hold optimizers of different parameters; got "
                    f"{type(optimizer).__name__}, which shares {len(own & held)} with an earlier "
                    f"one."
                )
            held |= own
        self._groups: list[_Group] = []
        self._owned: list[tuple[_Group, int]] = []
        self._merge()

    @property
    def param_groups(self) -> Any:  # noqa: ANN401  # a list, as in Optimizer
        """The groups of all optimizers, in the order in which they were added."""
        self._merge()
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: Iterable[_Group]) -> None:
        self._assign(list(groups), {id(group): k for group, k in self._owned})

    def _merge(self) -> None:
        """Synchronises this list of groups with those of the optimizers."""
        joint, owners = list(self._groups), {id(group): k for group, k in self._owned}
        for k, optimizer in enumerate(self.optimizers):
            old = [id(group) for group, owner in self._owned if owner == k]
            now = {id(group): group for group in optimizer.param_groups}
            owners |= dict.fromkeys(now, k)
            if len(old) == len(now):  # each is the same or replaces another
                new = dict(zip(old, now.values(), strict=True))
                joint = [new.get(id(group), group) for group in joint]
            else:
                joint = [group for group in joint if id(group) in now or id(group) not in old]
                joint += [group for key, group in now.items() if key not in old]
        self._assign(joint, owners)

    def _assign(self, groups: list[_Group], owners: dict[int, int]) -> None:
        """Gives each group to its optimizer: the owner, the named one, or by its parameters."""
        held = [_held(optimizer.param_groups) for optimizer in self.optimizers]
        for group in groups:
            if id(group) not in owners:
                holding = [k for k, own in enumerate(held) if _held([group]) & own]
                position = group.get(_KEY, holding[0] if len(holding) == 1 else None)
                owners[id(group)] = self._checked_position(position)
        for k, optimizer in enumerate(self.optimizers):
            # In place, because SAM shares its list with another optimizer.
            optimizer.param_groups[:] = [group for group in groups if owners[id(group)] == k]
        self._groups[:] = groups
        self._owned = [(group, owners[id(group)]) for group in groups]

    def _checked_position(self, position: Any) -> int:  # noqa: ANN401  # checked here
        if type(position) is not int or position not in range(len(self.optimizers)):
            self._groups[:] = [group for group, _ in self._owned]  # without the new group
            raise ValueError(
                f'a new parameter group must have the key "{_KEY}" with the position, from 0, of '
                f"one of the {len(self.optimizers)} inner optimizers; got {position!r}."
            )
        return position

    state: Any = property(
        lambda self: _State(self.optimizers), doc="The states of all optimizers, by parameter."
    )

    @property
    def defaults(self) -> Any:  # type: ignore[override]  # noqa: ANN401  # a mapping
        """The default options that all optimizers share, with the values of the first one."""
        first, *others = (optimizer.defaults for optimizer in self.optimizers)
        common = {key: x for key, x in first.items() if all(key in other for other in others)}
        return MappingProxyType(common)

    def add_param_group(self, param_group: _Group) -> None:
        """Adds a group to the inner optimizer at the position under the key "optimizer"."""
        optimizer = self.optimizers[self._checked_position(param_group.get(_KEY))]
        before = _held(self.param_groups)
        optimizer.add_param_group(param_group)
        if _held(optimizer.param_groups[-1:]) & before:
            del optimizer.param_groups[-1]
            raise ValueError("some parameters appear in more than one parameter group")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters."""
        self._merge()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        """Calls the closure once, then lets every optimizer step."""
        self._merge()
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def _saved(self) -> dict[str, Any]:
        """Returns one state in torch's form, for an optimizer with all the groups."""
        self._merge()
        parts = [optimizer.state_dict() for optimizer in self.optimizers]
        for optimizer, part in zip(self.optimizers, parts, strict=True):
            keys = [k for k in (*part, *part["state"]) if type(k) is not int]
            if set(keys) != {"state", "param_groups"}:
                raise ValueError(
                    f"states of several inner optimizers must have torch's form; got a state of "
                    f"{type(optimizer).__name__} with {keys}. Save `state_dict()` of each of "
                    f"`optimizers` instead."
                )
        joint: dict[str, Any] = {"state": {}, "param_groups": []}
        groups = [iter(part["param_groups"]) for part in parts]
        number = 0
        for _, k in self._owned:
            group = next(groups[k])
            new = dict(enumerate(group["params"], start=number))
            number += len(new)
            state = parts[k]["state"]
            joint["state"] |= {i: state[old] for i, old in new.items() if old in state}
            joint["param_groups"].append(group | {"params": list(new)})
        return joint

    def _load(self, state_dict: Any) -> None:  # noqa: ANN401
        """Loads a joint state, or a sequence of states of the optimizers, or raises."""
        self._merge()
        for optimizer, part in zip(self.optimizers, self._parts(state_dict), strict=True):
            optimizer.load_state_dict(part)

    def _parts(self, state_dict: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        owners, number = [k for _, k in self._owned], len(self.optimizers)
        if not isinstance(state_dict, Mapping):
            if len(state_dict) != number:
                raise ValueError(
                    f"`state_dict` must hold one state for each of the {number} inner optimizers; "
                    f"got {len(state_dict)}."
                )
            return list(state_dict)
        groups, state = state_dict["param_groups"], state_dict["state"]
        said = [group.get(_KEY, k) for group, k in zip(groups, owners, strict=False)]
        if len(groups) != len(owners) or said != owners:
            raise ValueError(
                f"`state_dict` must have {len(owners)} parameter groups, of the inner optimizers "
                f"{owners}; got {len(groups)}, of {said}. Add groups in the order of the saved run."
            )
        parts: list[dict[str, Any]] = [{"state": {}, "param_groups": []} for _ in range(number)]
        for group, k in zip(groups, owners, strict=True):
            parts[k]["param_groups"].append(group)
            parts[k]["state"] |= {i: state[i] for i in group["params"] if i in state}
        return parts

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.optimizers))


def _held(groups: Iterable[Mapping[str, Any]]) -> set[int]:
    """Returns the identities of the parameters in groups."""
    return {id(p) for group in groups for p in group["params"]}


class _State(MutableMapping[Tensor, Any]):
    """The states of several optimizers as one mapping."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._of: dict[Tensor, Any] = {}
        for x in optimizers:
            held = (p for group in x.param_groups for p in group["params"])
            self._of |= dict.fromkeys((*held, *x.state), x.state)

    def __getitem__(self, p: Tensor) -> Any:  # noqa: ANN401
        return self._of[p][p]

    def __setitem__(self, p: Tensor, entry: Any) -> None:  # noqa: ANN401
        self._of[p][p] = entry

    def __delitem__(self, p: Tensor) -> None:
        del self._of[p][p]

    def __contains__(self, p: object) -> bool:
        return p in self._of and p in self._of[p]  # type: ignore[index]  # no entry is made

    def __iter__(self) -> Iterator[Tensor]:
        return (p for p, state in self._of.items() if p in state)

    def __len__(self) -> int:
        return len(list(iter(self)))
