"""Which parameters are trained, and which are shared: a property of tensors and of groups."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any

import torch.distributed as dist
from torch import Tensor

from raco_optim._checks import checked_parameters

_KEY = "shared"


@dataclass(frozen=True)
class Parameters:
    """The parameters of an optimizer in the order of its groups, with their roles.

    Attributes:
        tensors: The parameters.
        shared: Which of them enter the Gram matrix; the others are heads.
        subset: Those from which an approximate Gram matrix is computed.
        trained: Which of them require gradients.
    """

    tensors: list[Tensor]
    shared: list[bool]
    subset: list[Tensor]
    trained: list[bool]

    @cached_property
    def is_sharded(self) -> bool:
        """Whether there is a `DTensor` among them (FSDP2, tensor parallelism)."""
        if not (dist.is_available() and dist.is_initialized()):
            return False
        # Not above: it takes half a second, and needs a torch that was built with it.
        from torch.distributed.tensor import DTensor

        return any(isinstance(p, DTensor) for p in self.tensors)

    def are(self, other: Parameters) -> bool:
        """Whether the others are the same tensors, of which the same are trained."""
        return (
            len(self.tensors) == len(other.tensors)
            and all(map(is_, self.tensors, other.tensors))
            and self.trained == other.trained
        )

    def only_subset(self) -> Parameters:
        """Returns the subset, all of it shared."""
        everything = [True] * len(self.subset)
        return Parameters(self.subset, everything, self.subset, everything)


class Roles:
    """Knows by identity which parameters are shared, whatever happens to the groups.

    A parameter keeps its role when it is frozen, moved to another group, or removed and added
    again. A tensor that takes the place of another one in its group (as Accelerate's FSDP2 does)
    takes over its role. The key "shared" of a group decides for all of the group's parameters.

    Args:
        shared: The shared parameters; None if all are that no group says otherwise of.
        subset: Those from which an approximate Gram matrix is computed.
        groups: The groups of the optimizer.
    """

    def __init__(
        self,
        shared: Iterable[Tensor] | None,
        subset: Iterable[Tensor] | None,
        groups: Sequence[dict[str, Any]],
    ) -> None:
        self._all_shared = shared is None
        self._shared: dict[int, tuple[weakref.ref[Tensor], bool]] = {}
        self._subset: list[weakref.ref[Tensor]] = []
        self._seen: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._flags: list[Any] = []
        self._current: Parameters | None = None
        held = [p for group in groups for p in group["params"]]
        if shared is not None:
            chosen = checked_parameters("shared_parameters", shared, held, frozen=True)
            identities = {id(p) for p in chosen}
            for group in groups:
                given = _key_of(group)
                for p in group["params"]:
                    if given is False and id(p) in identities:
                        raise ValueError(
                            f'`shared_parameters` must agree with the key "{_KEY}" of the groups; '
                            f"got a parameter of shape {list(p.shape)} that is in it and in a "
                            f'group with "{_KEY}": False.'
                        )
                    self._remember(p, id(p) in identities if given is None else given)
            for p in chosen:  # those too that are frozen now and join later
                self._remember(p, True)
        if subset is not None:
            unique = {id(p): p for p in checked_parameters("gradients", subset, held)}
            self._subset = [weakref.ref(p) for p in unique.values()]
        self.current(groups)

    def current(self, groups: Sequence[dict[str, Any]]) -> Parameters:
        """Returns the parameters that the groups hold now, with their roles, or raises."""
        tensors = [p for group in groups for p in group["params"]]
        trained, flags = [p.requires_grad for p in tensors], [group.get(_KEY) for group in groups]
        now = self._current
        if (
            now is not None
            and flags == self._flags
            and now.are(Parameters(tensors, [], [], trained))
        ):
            return now
        held = {id(p) for p in tensors}
        subset = list(self._subset)
        shared = []
        for group in groups:
            before = next((old for g, old in self._seen if g is group), [])
            same_length = len(before) == len(group["params"])
            for j, p in enumerate(group["params"]):
                replaced = before[j] if same_length and id(before[j]) not in held else None
                if replaced is not None and replaced.shape != p.shape:
                    replaced = None
                shared.append(self._role(p, group, replaced))
                if replaced is not None:
                    subset = [weakref.ref(p) if ref() is replaced else ref for ref in subset]
        for p, is_shared in zip(tensors, shared, strict=True):
            self._remember(p, is_shared)
        self._subset = subset
        chosen = {id(p) for ref in subset if (p := ref()) is not None}
        self._seen = [(group, list(group["params"])) for group in groups]
        self._flags = flags
        in_subset = [p for p in tensors if id(p) in chosen and p.requires_grad]
        self._current = Parameters(tensors, shared, in_subset, trained)
        return self._current

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raises unless a group to be added says, of parameters never seen, if they are shared."""
        for p in group["params"]:
            self._role(p[1] if isinstance(p, tuple) else p, group, None)

    def _role(self, p: Tensor, group: Mapping[str, Any], replaced: Tensor | None) -> bool:
        given = _key_of(group)
        if given is not None:
            return given
        for tensor in (p, replaced):
            ref, is_shared = self._shared.get(id(tensor), (None, False))
            if tensor is not None and ref is not None and ref() is tensor:
                return is_shared
        if self._all_shared:
            return True
        raise ValueError(
            f"a new parameter group must say whether its parameters are shared, since "
            f"`shared_parameters` was given; got a parameter of shape {list(p.shape)} of which "
            f'nothing says it. Add "{_KEY}": True (or False, for a head) to its group.'
        )

    def _remember(self, p: Tensor, is_shared: bool) -> None:
        self._shared[id(p)] = weakref.ref(p), is_shared

    def __getstate__(self) -> dict[str, Any]:
        # Weak references can't be copied; what is held now is what a copy can know.
        alive = [(p, s) for ref, s in self._shared.values() if (p := ref()) is not None]
        subset = [p for ref in self._subset if (p := ref()) is not None]
        return {"all_shared": self._all_shared, "shared": alive, "subset": subset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._all_shared = state["all_shared"]
        self._shared = {}
        for p, is_shared in state["shared"]:
            self._remember(p, is_shared)
        self._subset = [weakref.ref(p) for p in state["subset"]]
        self._seen, self._flags, self._current = [], [], None


def _key_of(group: Mapping[str, Any]) -> bool | None:
    given = group.get(_KEY)
    if given is not None and not isinstance(given, bool):
        raise ValueError(
            f'the key "{_KEY}" of a parameter group must be True or False; got {given!r}.'
        )
    return given
