"""The attributes of a user's object, as a state that ``torch.load(weights_only=True)`` can read.

`nn.Module.state_dict` would not do: it leaves out plain attributes and buffers that are None at
construction, and TorchJD's stateful weightings have both.
"""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_NUMBERS = (bool, int, float, complex)
# Exact types: torch.load does not read classes derived from them, as numpy.float64 is from float.
_PLAIN = (*_NUMBERS, type(None), str, bytes, torch.dtype, torch.device, torch.Size)
_INTERNAL = nn.Module().__dict__.keys()
_Namespace = dict[str, Any]


def attributes_of(obj: object) -> dict[str, Any]:
    """Returns copies of the attributes of an object, or of a module and all its submodules."""
    values, left_out, devices = {}, [], set[str]()
    for prefix, space, _ in _namespaces(obj):
        for name in sorted(space.keys() - _INTERNAL):
            try:
                values[prefix + name] = _copied(space[name], devices)
            except TypeError:
                left_out.append(prefix + name)
                if not callable(space[name]):
                    warnings.warn(
                        f"`rule` has the attribute {prefix + name!r} of type "
                        f"{type(space[name]).__name__}, which a checkpoint cannot hold: it starts "
                        f"anew on resumption. Give the rule `state_dict` and `load_state_dict`.",
                        stacklevel=4,
                    )
    # Some rules work on the host whatever the device, and `map_location` would move their tensors.
    on_host = devices <= {"cpu"}
    if not values:
        return {}
    return {
        "types": _types(obj),
        "attributes": values,
        "left_out": left_out,
        "on_host": on_host,
    }


def set_attributes(obj: object, state: Mapping[str, Any]) -> None:
    """Sets what `attributes_of` returned; a parameter remains the same tensor."""
    for space, name, value in new_values(obj, state):
        if isinstance(space.get(name), nn.Parameter):
            space[name].data.copy_(value)
        else:
            space[name] = value


def new_values(obj: object, state: Any) -> list[tuple[_Namespace, str, Any]]:  # noqa: ANN401
    """Returns namespace, name and value of every entry; raises `ValueError` if one does not fit."""
    spaces, values = _namespaces(obj), []
    if isinstance(state, Mapping) and not state:
        state = {"types": _types(obj), "attributes": {}, "left_out": [], "on_host": True}
    try:
        types = dict(state["types"])
        entries = dict(state["attributes"])
        known, device = {*entries, *state["left_out"]}, "cpu" if state["on_host"] else None
    except (TypeError, KeyError, ValueError):
        raise bad_state("be what its `state_dict` returned", state) from None
    if types != _types(obj):
        raise bad_state(f"be that of {_types(obj)}", types)
    for key, stored in entries.items():
        path, dot, name = str(key).rpartition(".")
        own = [(space, tensors) for prefix, space, tensors in spaces if prefix == path + dot]
        # An attribute may be new: some objects make theirs in the first call.
        later = [] if isinstance(obj, FunctionType) else own[:1]
        holding = [part for part in own if name in part[0]] or later
        if not holding or name in _INTERNAL:
            raise bad_state(f"fit the rule, which has no attribute {key!r}", state)
        space, tensors = holding[0]
        old = space.get(name)
        try:
            value = _copied(stored, set(), device)
        except TypeError:
            raise bad_state(f"hold what a checkpoint can hold; {key!r} does not", state) from None
        kinds = {_kind(value), _kind(old)} - {type(None)}
        fits = len(kinds) < 2 and (not tensors or value is None or isinstance(value, Tensor))
        if isinstance(old, nn.Parameter):
            fits = getattr(value, "shape", None) == old.shape and value.dtype == old.dtype
        if not fits:
            raise bad_state(f"hold another {key!r}, which is {old!r} now", stored)
        values.append((space, name, value))
    needed = {prefix + name for prefix, space, _ in spaces for name in space.keys() - _INTERNAL}
    if missing := sorted(needed - known):
        raise bad_state(f"hold {missing[0]!r}", state)
    return values


def bad_state(rule: str, got: object) -> ValueError:
    """Returns the error for a state of a rule."""
    return ValueError(
        f"`state` of the rule must {rule}; got {reprlib.repr(got)}. Load a checkpoint of the same "
        f"rule."
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


def _types(obj: object) -> dict[str, str]:
    parts = obj.named_modules() if isinstance(obj, nn.Module) else [("", obj)]
    return {path: type(part).__name__ for path, part in parts}


def _kind(value: object) -> type:
    """Returns the type, and one type for all numbers and tensors, which may follow each other."""
    return float if isinstance(value, (*_NUMBERS, Tensor)) else type(value)


def _copied(value: Any, devices: set[str], device: str | None = None) -> Any:  # noqa: ANN401
    """Copies a value, to `device` if it is given; `TypeError` if a checkpoint cannot hold it."""
    if isinstance(value, Tensor):
        devices.add(value.device.type)
        return value.detach().clone().to(device or value.device).as_subclass(Tensor)
    if type(value) is dict:
        return {_copied(k, devices): _copied(v, devices, device) for k, v in value.items()}
    if type(value) in (tuple, list, set):
        return type(value)(_copied(item, devices, device) for item in value)
    if type(value) not in _PLAIN:
        raise TypeError
    return value
