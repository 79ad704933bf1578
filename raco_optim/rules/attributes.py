"""The attributes of a user's object as a state for ``torch.load(weights_only=True)``.

`nn.Module.state_dict` leaves out plain attributes and buffers that are None at construction, which
TorchJD's stateful weightings need.
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
# Exact types: torch.load does not read derived classes such as numpy.float64.
_PLAIN = (*_NUMBERS, type(None), str, bytes, torch.dtype, torch.device, torch.Size)
_INTERNAL = nn.Module().__dict__.keys()
# The dict with an attribute, its name there, and whether the dict holds only tensors.
_Place = tuple[dict[str, Any], str, bool]


def attributes_of(obj: object) -> dict[str, Any]:
    """Returns copies of the attributes of an object, or of a module and all its submodules."""
    values, left_out, devices = {}, [], set[str]()
    for key, (space, name, _) in sorted(_places(obj).items()):
        try:
            values[key] = _copied(space[name], devices)
        except TypeError:
            left_out.append(key)
            if not callable(space[name]):
                warnings.warn(
                    f"`rule` has the attribute {key!r} of type {type(space[name]).__name__}, which "
                    f"a checkpoint can't hold, so a resumed run loses it. Give the rule "
                    f"`state_dict` and `load_state_dict`.",
                    stacklevel=4,
                )
    if not values:
        return {}
    types = {prefix: type(part).__name__ for prefix, part in _parts(obj).items()}
    # A rule may work on the CPU for any device; `map_location` must not move its tensors.
    on_host = devices <= {"cpu"}
    return {"types": types, "attributes": values, "left_out": left_out, "on_host": on_host}


def set_attributes(obj: object, state: Mapping[str, Any]) -> None:
    """Sets the attributes of a state from `attributes_of`; parameters stay the same tensors."""
    for (space, name, _), value in new_values(obj, state):
        if isinstance(space.get(name), nn.Parameter):
            space[name].data.copy_(value)
        else:
            space[name] = value


def new_values(obj: object, state: Any) -> list[tuple[_Place, Any]]:  # noqa: ANN401
    """Returns place and value of each entry; raises `ValueError` if one does not fit."""
    parts, places, values = _parts(obj), _places(obj), []
    types = {prefix: type(part).__name__ for prefix, part in parts.items()}
    if isinstance(state, Mapping) and not state:
        state = {"types": types, "attributes": {}, "left_out": [], "on_host": True}
    try:
        given, entries = dict(state["types"]), dict(state["attributes"])
        known, device = {*entries, *state["left_out"]}, "cpu" if state["on_host"] else None
    except (TypeError, KeyError, ValueError):
        raise bad_state("come from its `state_dict`", state) from None
    if given != types:
        raise bad_state(f"come from {types}", given)
    for key, stored in entries.items():
        place = places.get(key) or _place_of_new(str(key), parts)
        if place is None:
            raise bad_state(f"fit the rule, which has no attribute {key!r}", state)
        space, name, only_tensors = place
        old = space.get(name)
        try:
            value = _copied(stored, set(), device)
        except TypeError:
            raise bad_state(f"hold types that a checkpoint can hold in {key!r}", state) from None
        kinds = {_kind(value), _kind(old)} - {type(None)}
        fits = len(kinds) < 2 and (not only_tensors or value is None or isinstance(value, Tensor))
        if isinstance(old, nn.Parameter):
            fits = getattr(value, "shape", None) == old.shape and value.dtype == old.dtype
        if not fits:
            raise bad_state(f"hold {key!r} of the kind of {old!r}", stored)
        values.append((place, value))
    if missing := sorted(places.keys() - known):
        raise bad_state(f"hold {missing[0]!r}", state)
    return values


def bad_state(rule: str, got: object) -> ValueError:
    """Returns the error for a state of a rule."""
    return ValueError(
        f"`state` of the rule must {rule}; got {reprlib.repr(got)}. Load a checkpoint of the same "
        f"rule."
    )


def _parts(obj: object) -> dict[str, object]:
    """Returns an object, or a module and its submodules, by the prefix of their attributes."""
    if isinstance(obj, nn.Module):
        return {path and f"{path}.": module for path, module in obj.named_modules()}
    return {"": obj}


def _places(obj: object) -> dict[str, _Place]:
    """Returns the places of the attributes, by their names with a prefix."""
    places: dict[str, _Place] = {}
    for prefix, part in _parts(obj).items():
        if isinstance(part, type | ModuleType):
            continue
        spaces = [(getattr(part, "__dict__", {}), False)]
        if isinstance(part, nn.Module):
            spaces += [(part._buffers, True), (part._parameters, True)]
        for space, only_tensors in spaces:
            names = space.keys() - _INTERNAL
            places |= {prefix + name: (space, name, only_tensors) for name in names}
    return places


def _place_of_new(key: str, parts: Mapping[str, object]) -> _Place | None:
    """Returns the place of an attribute that an object creates in its first call."""
    path, dot, name = key.rpartition(".")
    part = parts.get(path + dot)
    if name in _INTERNAL or isinstance(part, type | ModuleType | FunctionType):
        return None
    return (part.__dict__, name, False) if hasattr(part, "__dict__") else None


def _kind(value: object) -> type:
    """Returns the type of a value; one type for all numbers and tensors, which may alternate."""
    return float if isinstance(value, (*_NUMBERS, Tensor)) else type(value)


def _copied(value: Any, devices: set[str], device: str | None = None) -> Any:  # noqa: ANN401
    """Copies a value, to `device` if given; raises `TypeError` if a checkpoint can't hold it."""
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
