"""What all processes must agree on, and how an error in one of them reaches all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from raco_optim.distributed.group import Group
from raco_optim.wrapper.parameters import Parameters

_VALUES = "the values of the parameters"
_REMEDIES = {
    _VALUES: (
        "Start from one model: wrap it in DistributedDataParallel before the optimizer is built, "
        "or broadcast it. If these processes do not train one model, pass as `process_group` the "
        "group of those that do (for a process on its own, "
        "torch.distributed.new_subgroups(group_size=1)[0])."
    ),
}


@contextmanager
def raise_together(
    group: Group | None, settings: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Runs what needs no message, and raises in all processes if it fails in one of them.

    Args:
        group: The processes; None for a process on its own.
        settings: What must be the same in all of them; it may be filled on the way.

    Raises:
        ValueError: A setting differs. The message has its values.
        RuntimeError: It failed elsewhere. The message says where and how.
    """
    if group is None:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the others are waiting
        failure = error
    texts = {name: repr(value) for name, value in (settings or {}).items()}
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    try:
        failed, largest, least = group.maximum([failure is not None, number, -number])
    except RuntimeError:
        try:
            if failure is not None:
                raise failure from None  # the cause, rather than what came of it
            raise
        finally:
            del failure
    if failed:
        try:
            raise_everywhere(group, failure)
        finally:
            del failure
    if largest != -least:
        _raise_difference(group, texts)
    group.compared = group.compared or _VALUES in texts


def raise_everywhere(group: Group, failure: Exception | None) -> None:
    """Raises the failure of this process, or says what failed elsewhere; all must call it."""
    found = group.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # a cycle with its traceback would keep the graph
    named = [f"rank {r}: {text}" for r, text in found.items() if text is not None]
    more = f" ({len(named) - 1} more failed)" if len(named) > 1 else ""
    raise RuntimeError(f"another process failed, and nothing was changed here. {named[0]}{more}")


def parameter_settings(group: Group, parameters: Parameters) -> dict[str, Any]:
    """Returns what must be the same of the parameters; until it was once, their values too."""
    trained = [p for p in parameters.tensors if p.requires_grad]
    kinds = {(p.dtype, p.device.type) for p in trained}
    subset = {id(p) for p in parameters.subset}
    settings: dict[str, Any] = {
        "the parameters": (
            f"{len(trained)} with {sum(p.numel() for p in trained)} numbers, "
            + " and ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        ),
        "`shared_parameters`": (
            "all"
            if all(parameters.shared)
            else [j for j, is_shared in enumerate(parameters.shared) if is_shared]
        ),
        "the parameters in `gradients`": [
            j for j, p in enumerate(parameters.tensors) if id(p) in subset
        ],
    }
    if not group.compared:
        own = [p for p in trained if type(p) in (Tensor, Parameter)]
        settings[_VALUES] = [(p.shape, p.stride(), _fingerprint(p)) for p in own]
    return settings


def _raise_difference(group: Group, settings: Mapping[str, str]) -> None:
    found = group.gather(settings)
    group.compared = False  # by all of them, the next time
    (rank, first), *others = found.items()
    name, r, got = next(
        (name, r, other.get(name))
        for r, other in others
        for name in [*first, *other]
        if first.get(name) != other.get(name)
    )
    values = f"{first.get(name)} on rank {rank}, {got} on rank {r}"
    raise ValueError(
        f"{name} must be the same in all processes; got "
        f"{'others' if name == _VALUES else values}. "
        f"{_REMEDIES.get(name, 'Pass the same to all of them.')}"
    )


def _fingerprint(parameter: Tensor) -> int | None:
    if parameter.is_meta:
        return None
    # Sums of whole numbers do not depend on their order, and so not on the machine.
    flat = torch.view_as_real(parameter) if parameter.is_complex() else parameter
    flat = flat.detach().reshape(-1)
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return int(flat.view(whole).sum(dtype=torch.int64))
