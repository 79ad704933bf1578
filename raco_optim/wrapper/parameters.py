"""The roles of parameters: trained or frozen, shared or in a head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from raco_optim._checks import checked_parameters

_KEY = "shared"
_Role = tuple[bool, bool]  # whether a parameter is shared, and whether it is in the subset


@dataclass(frozen=True)
class Parameters:
    """The parameters of an optimizer, in the order of its groups, with their roles."""

    tensors: list[Tensor]
    shared: list[bool]  # whether each enters the Gram matrix; the others are heads
    subset: list[Tensor]  # for an approximate Gram matrix
    trained: list[bool]  # whether each requires a gradient

    @cached_property
    def is_sharded(self) -> bool:
        """Whether any of them is a `DTensor` (FSDP2, tensor parallelism)."""
        if not (dist.is_available() and dist.is_initialized()):
            return False
        # Imported here, because it takes half a second and not every torch has it.
        from torch.distributed.tensor import DTensor

        return any(isinstance(p, DTensor) for p in self.tensors)

    def are(self, other: Parameters) -> bool:
        """Returns whether the others are the same tensors in the same roles."""
        return (
            len(self.tensors) == len(other.tensors)
            and all(map(is_, self.tensors, other.tensors))
            and self.trained == other.trained
            and self.shared == other.shared
            and list(map(id, self.subset)) == list(map(id, other.subset))
        )

    def only_subset(self) -> Parameters:
        """Returns the subset, all of it shared."""
        everything = [True] * len(self.subset)
        return Parameters(self.subset, everything, self.subset, everything)


class Roles:
    """Remembers which parameters are shared, whatever happens to the groups.

    A parameter keeps its role when it is frozen, moved to another group, or removed and added
    again. A tensor that replaces another of its shape in a group (as in Accelerate's FSDP2)
    inherits its role. The key "shared" of a group overrides both. `shared` is None if all
    parameters are shared by default.
    """

    def __init__(
        self,
        shared: Iterable[Tensor] | None,
        subset: Iterable[Tensor] | None,
        groups: Sequence[dict[str, Any]],
    ) -> None:
        held = [p for group in groups for p in group["params"]]
        chosen = held
        if shared is not None:  # may include frozen parameters that join later
            chosen = checked_parameters("shared_parameters", shared, held, frozen=True)
        within = [] if subset is None else checked_parameters("gradients", subset, held)
        is_shared, in_subset = set(map(id, chosen)), set(map(id, within))
        if shared is not None:
            for group in groups:
                both = [p for p in group["params"] if id(p) in is_shared]
                if both and _key_of(group) is False:
                    raise ValueError(
                        f'`shared_parameters` must agree with the key "{_KEY}" of the groups; got '
                        f"a parameter of shape {list(both[0].shape)} that is also in a group with "
                        f'"{_KEY}": False.'
                    )
        known = [(p, (id(p) in is_shared, id(p) in in_subset)) for p in [*held, *chosen]]
        self._start(shared is None, known)
        self.current(groups)

    def _start(self, all_shared: bool, known: Iterable[tuple[Tensor, _Role]]) -> None:
        self._all_shared = all_shared
        # Strong references to the parameters in the groups, because `torch.utils.swap_tensors`
        # refuses weak ones; weak references to the others, to free their memory.
        self._held: dict[int, tuple[Tensor, _Role]] = {}
        self._others = WeakTensorKeyDictionary(dict(known))
        self._groups: list[tuple[dict[str, Any], bool | None, list[Tensor]]] = []
        self._current: Parameters | None = None

    def current(self, groups: Sequence[dict[str, Any]]) -> Parameters:
        """Returns the parameters that the groups hold now, with their roles, or raises."""
        found = [(group, _key_of(group), list(group["params"])) for group in groups]
        tensors = [p for _, _, params in found for p in params]
        now = Parameters(tensors, [], [], [p.requires_grad for p in tensors])
        before, after = (
            [(id(group), key, len(params)) for group, key, params in seen]
            for seen in (self._groups, found)
        )
        if (
            before == after
            and self._current is not None
            and all(map(is_, tensors, self._current.tensors))
            and now.trained == self._current.trained
        ):
            return self._current
        identities, held = set(map(id, tensors)), {}
        for group, key, params in found:
            old = next((earlier for g, _, earlier in self._groups if g is group), [])
            for j, p in enumerate(params):
                known = self._known(p)
                if known is None and len(old) == len(params) and id(old[j]) not in identities:
                    known = self._known(old[j]) if old[j].shape == p.shape else None
                held[id(p)] = p, self._role(p, key, known)
        self._others.update(self._held.values())
        for p in tensors:
            self._others.pop(p, None)  # type: ignore[no-untyped-call]
        self._held, self._groups = held, found
        now.shared.extend(held[id(p)][1][0] for p in tensors)
        now.subset.extend(p for p in tensors if held[id(p)][1][1] and p.requires_grad)
        # `load_state_dict` makes new groups of the same parameters, which change nothing.
        if self._current is None or not self._current.are(now):
            self._current = now
        return self._current

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raises if a new group does not say whether its unknown parameters are shared."""
        for p in group["params"]:
            tensor = p[1] if isinstance(p, tuple) else p
            self._role(tensor, _key_of(group), self._known(tensor))

    def _known(self, p: Tensor) -> _Role | None:
        held = self._held.get(id(p))
        return self._others.get(p) if held is None else held[1]  # type: ignore[no-untyped-call]

    def _role(self, p: Tensor, key: bool | None, known: _Role | None) -> _Role:
        if key is None and known is None and not self._all_shared:
            raise ValueError(
                f"a new parameter group must say whether its parameters are shared, because "
                f"`shared_parameters` was given; got a new parameter of shape {list(p.shape)}. "
                f'Add "{_KEY}": True (or False, for a head) to its group.'
            )
        is_shared, in_subset = known or (True, False)
        return is_shared if key is None else key, in_subset

    def __getstate__(self) -> dict[str, Any]:
        # Weak references can't be copied.
        known = [*self._held.values(), *self._others.items()]  # type: ignore[no-untyped-call]
        return {"all_shared": self._all_shared, "known": known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start(**state)


def _key_of(group: Mapping[str, Any]) -> bool | None:
    given = group.get(_KEY)
    if given is not None and not isinstance(given, bool):
        raise ValueError(
            f'the key "{_KEY}" of a parameter group must be True or False; got {given!r}.'
        )
    return given
