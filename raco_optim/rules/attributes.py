"""The attributes of a user's object, as a state that ``torch.load(weights_only=True)`` can read.

`nn.Module.state_dict` would not do: it leaves out plain attributes and buffers that are None at
construction, and TorchJD's stateful weightings have both.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_NUMBERS = (bool, int, float, complex)
# Exact types: torch.load does not read classes derived from them, as numpy.float64 is from float.
_PLAIN = (*_NUMBERS, type(None), str, bytes, torch.dtype, torch.device, torch.Size)
_LEFT_OUT = {"left_out": True}
_INTERNAL = nn.Module().__dict__.keys()
_Namespace = dict[str, Any]


def attributes_of(obj: object) -> dict[str, Any]:
    """Returns copies of the attributes of an object, or of a module and all its submodules."""
    state = {}
    for prefix, space, _ in _namespaces(obj):
        for name in space.keys() - _INTERNAL:
            try:
                state[prefix + name] = _packed(space[name])
            except TypeError:
                state[prefix + name] = _LEFT_OUT
                if not callable(space[name]):
                    warnings.warn(
                        f"`rule` has the attribute {prefix + name!r} of type "
                        f"{type(space[name]).__name__}, which a checkpoint cannot hold: it starts "
                        f"anew on resumption. Give the rule `state_dict` and `load_state_dict`.",
                        stacklevel=4,
                    )
    return dict(sorted(state.items()))


def set_attributes(obj: object, state: Mapping[str, Any]) -> None:
    """Sets what `attributes_of` returned; a parameter remains the same tensor."""
    for space, name, value in new_values(obj, state):
        if isinstance(space.get(name), nn.Parameter):
            space[name].data.copy_(value)
        else:
            space[name] = value


def new_values(obj: object, state: Any) -> list[tuple[_Namespace, str, Any]]:  # noqa: ANN401
    """Returns namespace, name and value of every entry; raises `ValueError` if one does not fit."""
    if not isinstance(state, Mapping):
        raise bad_state("be a mapping", state)
    spaces, values = _namespaces(obj), []
    for key, packed in state.items():
        path, dot, name = str(key).rpartition(".")
        own = [(space, tensors) for prefix, space, tensors in spaces if prefix == path + dot]
        holding = [part for part in own if name in part[0]]
        if not holding and not isinstance(obj, FunctionType):
            holding = own[:1]  # some objects make attributes in their first call
        if not holding or name in _INTERNAL:
            raise bad_state(f"fit the rule, which has no attribute {key!r}", state)
        space, tensors = holding[0]
        if packed == _LEFT_OUT:
            continue
        try:
            value = _unpacked(packed)
        except TypeError:
            raise bad_state(f"hold what a checkpoint can hold; {key!r} does not", state) from None
        old = space.get(name)
        kinds = {_kind(value), _kind(old)} - {type(None)}
        fits = len(kinds) < 2 and (not tensors or value is None or isinstance(value, Tensor))
        if isinstance(old, nn.Parameter):
            fits = getattr(value, "shape", None) == old.shape and value.dtype == old.dtype
        if not fits:
            raise bad_state(f"hold another {key!r}, which is {old!r} now", packed)
        values.append((space, name, value))
    known = {prefix + name for prefix, space, _ in spaces for name in space.keys() - _INTERNAL}
    if missing := sorted(known - state.keys()):
        raise bad_state(f"hold {missing[0]!r}", list(state))
    return values


def bad_state(rule: str, got: object) -> ValueError:
    """Returns the error for a state of a rule."""
    return ValueError(
        f"`state` of the rule must {rule}; got {got!r}. Load a checkpoint of the same rule."
    )


def _namespaces(obj: object) -> list[tuple[str, _Namespace, bool]]:
    """Returns the dicts that hold attributes: prefix of the names, dict, whether of tensors."""
    if isinstance(obj, nn.Module):
        return [
            (path and f"{path}.", space, space is not module.__dict__)
            for path, module in obj.named_modules()
            for space in (module.__dict__, module._buffers, module._parameters)
        ]
    plain = hasattr(obj, "__dict__") and not isinstance(obj, type | ModuleType)
    return [("", obj.__dict__, False)] if plain else []


def _kind(value: object) -> type:
    """Returns the type, and one type for all numbers and tensors, which may follow each other."""
    return float if isinstance(value, (*_NUMBERS, Tensor)) else type(value)


def _packed(value: Any) -> Any:  # noqa: ANN401  # any value
    """Copies a value for a checkpoint; raises `TypeError` if a checkpoint cannot hold it."""
    if isinstance(value, Tensor):
        # Some rules work on the host for any device, and `map_location` moves all tensors.
        on_host = value.device.type == "cpu"
        return {"tensor": value.detach().clone().as_subclass(Tensor), "on_host": on_host}
    if type(value) is dict:
        return {"dict": {_plain(key): _packed(item) for key, item in value.items()}}
    if type(value) in (tuple, list, set):
        return type(value)(map(_plain if type(value) is set else _packed, value))
    return _plain(value)


def _unpacked(packed: Any) -> Any:  # noqa: ANN401  # any value
    if type(packed) is dict and packed.keys() == {"tensor", "on_host"}:
        tensor = packed["tensor"].detach()
        return tensor.cpu().clone() if packed["on_host"] else tensor.clone()
    if type(packed) is dict and packed.keys() == {"dict"}:
        return {_plain(key): _unpacked(item) for key, item in packed["dict"].items()}
    if type(packed) in (tuple, list, set):
        return type(packed)(map(_unpacked, packed))
    return _plain(packed)


def _plain(value: Any) -> Any:  # noqa: ANN401  # any value
    if type(value) is tuple:  # as a key
        return tuple(map(_plain, value))
    if type(value) not in _PLAIN:
        raise TypeError
    return value
