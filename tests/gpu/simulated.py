"""An accelerator for machines without one: a device of its own, whose values lie on the CPU.

A tensor on it has the device ``fakegpu:0``, and autograd treats it as on any other device. As on a
GPU, an operation refuses tensors of two devices (a scalar tensor of the CPU may take part in
arithmetic), nothing has a NumPy view, and the host waits wherever it reads a value, asks for a
result whose size depends on values, or copies between host and device. Each wait is recorded with
the line of the library that caused it.

PyTorch takes such a device once per process, and other libraries then find an accelerator: use it
in a process of its own.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "fakegpu"
aten = torch.ops.aten
# The host waits for a value, or for the number of results.
_READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._linalg_eigh.default,
    aten.linalg_eig.default,
    aten.linalg_eigvals.default,
    aten._unique2.default,
}
# Copies between devices; an index on the host is copied too.
_COPIES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
# What takes no scalar tensor of the CPU beside tensors of a GPU.
_STRICT = ("mm", "bmm", "addmm", "addmv", "mv", "dot", "baddbmm", "cat", "stack", "linalg")

waits: list[str] = []


class OnDevice(torch.Tensor):
    """A tensor of the simulated device, with its values in `values`."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(function, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnDevice({self.values!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = OnDevice(self.values.clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]


def _is_here(device: Any) -> bool:
    return torch.device(device).type in (NAME, "privateuseone")


def _wait(what: str) -> None:
    frames = [f for f in traceback.extract_stack() if "/raco_optim/" in f.filename]
    at = f"{frames[-1].filename.rsplit('/raco_optim/')[-1]}: {frames[-1].line}" if frames else ""
    waits.append(f"{what} ({at})" if at else what)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, OnDevice)]
    name = str(function)
    device = kwargs.get("device")
    to_device = bool(here) if device is None else _is_here(device)
    mixed = bool(here) and len(here) < len(tensors)
    if function in _READS and here:
        _wait(name)
    elif function in _COPIES:
        moved = function is aten._to_copy.default and bool(here) != to_device
        if (mixed or moved) and not kwargs.get("non_blocking"):
            _wait(name)
    elif function in _INDEXED and here:
        if mixed or any(x.dtype == torch.bool for x in tensors[1:] if x.dim()):
            _wait(name)
    elif mixed:
        strict = any(f"aten.{word}" in name for word in _STRICT)
        elsewhere = [x for x in tensors if not isinstance(x, OnDevice)]
        if strict or any(x.dim() for x in elsewhere):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:0 and cpu! (when calling {name})"
            )
    if device is not None and to_device:
        kwargs = {**kwargs, "device": "cpu"}
    known: dict[int, torch.Tensor] = {}

    def inside(x: Any) -> Any:
        if isinstance(x, OnDevice):
            known[id(x.values)] = x
            return x.values
        return x

    result = function(*tree_map(inside, args), **tree_map(inside, kwargs))

    def outside(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in known and function is not aten._to_copy.default:
            return known[id(x)]
        return OnDevice(x) if to_device else x

    return tree_map(outside, result)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(function, args, kwargs or {})


class _Made(TorchFunctionMode):
    """Tensors made of lists, and lists made of tensors, pass dispatch by."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and _is_here(kwargs.get("device", "cpu")):
            kwargs["device"] = "cpu"
            return function(*args, **kwargs).to(NAME)
        if function is torch.Tensor.new_tensor and args[0].device.type == NAME:
            device = kwargs.pop("device", args[0].device)
            made = torch.tensor(args[1], dtype=kwargs.pop("dtype", args[0].dtype))
            return made.to(device) if _is_here(device) else made
        if args and isinstance(args[0], OnDevice):
            if function is torch.Tensor.__getitem__ and len(args) > 1:
                parts = args[1] if isinstance(args[1], tuple) else (args[1],)
                parts = tuple(torch.tensor(x) if isinstance(x, list) else x for x in parts)
                return function(args[0], parts if isinstance(args[1], tuple) else parts[0])
            if function is torch.Tensor.tolist:
                return args[0].cpu().tolist()
            if function is torch.Tensor.numpy and kwargs.get("force"):
                return args[0].detach().cpu().numpy()
            if function in (torch.Tensor.numpy, torch.Tensor.__array__):
                raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy.")
        return function(*args, **kwargs)


@contextlib.contextmanager
def device() -> Iterator[str]:
    """Provides the device; yields its name."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        registration._setup_privateuseone_for_python_backend(NAME)
    with _Made(), _Dispatch():
        yield NAME
