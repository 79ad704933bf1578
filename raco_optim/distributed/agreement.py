"""Settings that must be equal in all processes, and errors that all processes raise."""

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
LOSSES = "`losses` (None if absent)"
_ONE_MODEL = (
    "Start from one model: wrap it in DistributedDataParallel before building the optimizer, or "
    "broadcast it. If these processes train different models, pass the processes of one model as "
    "`process_group` (for a single process, torch.distributed.new_subgroups(group_size=1)[0])."
)


@contextmanager
def raise_together(
    group: Group | None, settings: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Runs a block; all processes raise if it fails in one or `settings` differ."""
    if group is None:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # the other processes wait, whatever the error
        failure = error
    try:
        failure = _outcome(group, failure, settings or {})
        if failure is not None:
            raise failure
    finally:
        del failure  # breaks a reference cycle with its traceback, which keeps the graph


def error_everywhere(group: Group, failure: Exception | None) -> Exception:
    """Returns the error to raise here after some process failed; all processes must call it."""
    text = None
    if failure is not None:
        notes = getattr(failure, "__notes__", ())
        text = " ".join([f"{type(failure).__name__}: {failure}", *notes])
    found = group.gather(text)
    if failure is not None:
        return failure
    named = [f"rank {r}: {text}" for r, text in found.items() if text is not None]
    more = f" ({len(named) - 1} more failed)" if len(named) > 1 else ""
    return RuntimeError(f"another process failed; nothing was changed here. {named[0]}{more}")


def parameter_settings(group: Group, parameters: Parameters) -> dict[str, Any]:
    """Returns roles of the parameters and, until compared, values, which must be equal."""
    trained = [p for p in parameters.tensors if p.requires_grad]
    kinds = {f"{p.dtype} on {p.device.type}" for p in trained}
    number = f"{len(trained)} with {sum(p.numel() for p in trained)} numbers, "
    shared = [j for j, is_shared in enumerate(parameters.shared) if is_shared]
    subset = {id(p) for p in parameters.subset}
    settings: dict[str, Any] = {
        "the parameters": number + " and ".join(sorted(kinds)),
        "`shared_parameters`": "all" if all(parameters.shared) else shared,
        "the parameters in `gradients`": [
            j for j, p in enumerate(parameters.tensors) if id(p) in subset
        ],
    }
    if not group.compared:
        own = [p for p in trained if type(p) in (Tensor, Parameter)]
        settings[_VALUES] = [(p.shape, p.stride(), _fingerprint(p)) for p in own]
    return settings


def _outcome(
    group: Group, failure: Exception | None, settings: Mapping[str, Any]
) -> Exception | None:
    """Returns the error to raise in this process; None if all succeeded and agree."""
    texts = {name: repr(value) for name, value in settings.items()}
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    try:
        failed, largest, least = group.maximum([failure is not None, number, -number])
        if failed:
            return error_everywhere(group, failure)
        agreed = largest == -least
        group.compared = agreed and (group.compared or _VALUES in texts)
        return None if agreed else _difference(group, texts)
    except RuntimeError as error:
        return failure or error  # the cause first


def _difference(group: Group, settings: Mapping[str, str]) -> ValueError | None:
    (rank, first), *others = group.gather(settings).items()
    for r, other in others:
        for name in [*first, *other]:
            # If only some processes sent the values, all compare them in the next call.
            if name == _VALUES and not (name in first and name in other):
                continue
            if first.get(name) != other.get(name):
                got = f"{first.get(name)} on rank {rank}, {other.get(name)} on rank {r}. "
                none = ", 0 * outputs.sum() for None" if name == LOSSES else ""
                got += f"Pass the same value in all processes{none}."
                got = f"others. {_ONE_MODEL}" if name == _VALUES else got
                return ValueError(f"{name} must be the same in all processes; got {got}")
    return None


def _fingerprint(parameter: Tensor) -> int | None:
    """Returns the sum of the bits as integers, which does not depend on the order."""
    if parameter.is_meta:
        return None
    flat = torch.view_as_real(parameter) if parameter.is_complex() else parameter
    flat = flat.detach().reshape(-1)
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return int(flat.view(whole).sum(dtype=torch.int64))
