r"""The contribution of a layer to the gradients, from its input x and its output gradient delta.

With :math:`D_n` the gradient of :math:`z_n`, the part of loss i is :math:`\sum_n u_{in} D_n`. The
sensitivities u come last, so one product gives D for any number of losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Numbers of D at a time, to stay in the cache of a CPU, or to fill an accelerator.
_BLOCK, _BLOCK_OF_ACCELERATOR = 2**20, 2**26


@dataclass(frozen=True)
class Sensitivities:
    """u, ``[m, N]``: the derivatives of the losses with respect to the scalars."""

    u: Tensor

    @cached_property
    def paired(self) -> bool:
        """Whether the second half of the examples has the negative u of the first, as in pairs."""
        chosen, rejected = self.u.tensor_split(2, 1)
        return chosen.shape == rejected.shape and torch.equal(chosen, -rejected)

    def add_weighted(self, total: Tensor, d: Tensor, *, fresh: bool, folded: bool = False) -> None:
        """Adds ``u @ d`` to `total`, ``[m, k]``, or writes it; d: ``[N, k]`` or ``[N / 2, k]``."""
        u = self.u[:, : len(d)] if folded else self.u
        u = u.to(torch.promote_types(d.dtype, torch.float32))
        if total.dtype == d.dtype == u.dtype:
            total.addmm_(u, d, beta=0 if fresh else 1)
        else:
            add(total, u @ d.to(u.dtype), fresh=fresh)


class Part(Protocol):
    """A part of the gradients of one parameter."""

    def add_to(self, total: Tensor, s: Sensitivities, *, fresh: bool) -> None:
        """Adds the part to `total`, ``[m, *shape]``, or writes it."""

    def size(self) -> tuple[Tensor, torch.dtype]:
        """Returns the norm of the summands, which scales their rounding error, and their dtype."""


Kind = Callable[[str, nn.Module, Tensor, Tensor], Part]
"""Name of a parameter, layer, x (None if only the bias is trained) and delta -> its part."""


@dataclass(frozen=True)
class _Outer:
    """The weight of a product, ``[b, a]``: the sum over tokens of left times right."""

    left: Tensor  # [N, T, b]
    right: Tensor  # [N, T, a]

    def add_to(self, total: Tensor, s: Sensitivities, *, fresh: bool) -> None:
        m, tokens = len(s.u), self.left.shape[1]
        # m products against one, and m N products of numbers of D, which memory slows down.
        if (m - 1) * tokens > 2 * m + 4:
            self._by_example(total, s, fresh)
        else:
            self._by_loss(total, s, fresh)

    def size(self) -> tuple[Tensor, torch.dtype]:
        return norm(norm(self.left, -1) * norm(self.right, -1)), self.left.dtype

    def _by_example(self, total: Tensor, s: Sensitivities, fresh: bool) -> None:
        left, right = self.left, self.right
        if s.paired:  # one product for both completions of a pair
            left, right = (torch.cat(x.tensor_split(2), 1) for x in (left, right))
            left[:, left.shape[1] // 2 :].neg_()
        (n, _, b), a = left.shape, right.shape[2]
        flat, left = total.view(len(total), -1), left.mT
        for start, end in blocks(b, n * a, left.device):
            d = (left[:, start:end] @ right).view(n, -1)
            s.add_weighted(flat[:, start * a : end * a], d, fresh=fresh, folded=s.paired)
            del d  # the next block reuses its memory, which is in the cache

    def _by_loss(self, total: Tensor, s: Sensitivities, fresh: bool) -> None:
        right, dtype = self.right.flatten(0, 1), self.left.dtype
        u = s.u.to(torch.promote_types(dtype, torch.float32))
        scales = torch.ones_like(u[:, 0])
        if dtype != u.dtype:  # at most 1, to fit into float16 for any scale of the losses
            exponents = torch.frexp(u.abs().amax(1)).exponent.clamp(-126, 126)
            scales = torch.ldexp(scales, exponents)
        for of_loss, row, scale in zip(total, (u / scales[:, None]).to(dtype), scales, strict=True):
            left = (row[:, None, None] * self.left).flatten(0, 1).T
            if dtype == u.dtype == total.dtype:
                of_loss.addmm_(left, right, beta=0 if fresh else 1)
            else:
                add(of_loss, (left @ right).to(u.dtype) * scale, fresh=fresh)


@dataclass(frozen=True)
class Vectors:
    """A vector: the sum over tokens."""

    delta: Tensor  # [N, T, features]

    def size(self) -> tuple[Tensor, torch.dtype]:
        """See `Part`."""
        return norm(self.delta), self.delta.dtype

    def add_to(self, total: Tensor, s: Sensitivities, *, fresh: bool) -> None:
        """See `Part`."""
        single = torch.promote_types(self.delta.dtype, torch.float32)
        s.add_weighted(total, self.delta.sum(1, dtype=single), fresh=fresh)


@dataclass(frozen=True)
class _Lookup(Vectors):
    """A table with gradients for few rows."""

    ids: Tensor  # [N, T]

    def add_to(self, total: Tensor, s: Sensitivities, *, fresh: bool) -> None:
        if fresh:
            total.zero_()
        found, index = torch.unique(self.ids, return_inverse=True)
        u = s.u.to(torch.promote_types(self.delta.dtype, torch.float32))
        for of_loss, row in zip(total, u, strict=True):
            delta = (row[:, None, None] * self.delta).flatten(0, 1)
            sums = delta.new_zeros(len(found), delta.shape[1]).index_add_(0, index.flatten(), delta)
            of_loss[found] += sums.to(total.dtype)


def norm(x: Tensor, dim: int | None = None) -> Tensor:
    """Returns the norm, in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    found: Tensor = torch.linalg.vector_norm(x, dim=dim, dtype=dtype)
    return found


def add(total: Tensor, part: Tensor, *, fresh: bool) -> None:
    """Adds a part to a total of any dtype, or writes it."""
    if fresh:
        total.copy_(part)
    else:
        total.add_(part)


def blocks(rows: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yields ranges of rows, of `width` numbers each, to process at a time."""
    size = _BLOCK if device.type == "cpu" else _BLOCK_OF_ACCELERATOR
    step = max(1, size // width, 16)
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def definition(layer: nn.Module) -> Any:  # noqa: ANN401
    """Returns what `kind_of` depends on, to notice changes."""
    own = vars(layer)
    plain = {k: x for k, x in own.items() if isinstance(x, bool | int | float | str | None)}
    return type(layer).forward, own.get("forward"), plain | {"training": None}


def kind_of(layer: nn.Module) -> Kind | None:
    """Returns how a layer's gradients follow from x and delta; None if unknown."""
    own: dict[str, Any] = dict(layer.named_parameters(recurse=False))
    weight = own.get("weight")
    if type(weight) is not nn.Parameter or own.keys() - {"weight", "bias"}:
        return None
    # Other libraries may have replaced the forward pass of a layer.
    if "forward" in vars(layer) or any(True for _ in layer.children()):
        return None
    forward = type(layer).forward
    if isinstance(layer, nn.Linear):
        # Some libraries patch the class too.
        is_torchs = forward is nn.Linear.forward and forward.__module__ == nn.Linear.__module__
        return _linear if is_torchs else None
    if forward.__module__ == "transformers.pytorch_utils" and type(layer).__name__ == "Conv1D":
        return _transposed
    if _is_dora(layer):
        return _magnitude
    try:
        if isinstance(layer, nn.Embedding):
            return _embedding if _is_table(layer) else None
        # Trying a layer with running statistics would change them.
        tried = weight.dim() == 1 and not any(True for _ in layer.buffers())
        return _norm_of(layer) if tried else None
    except Exception:  # a layer may raise anything
        return None


def _linear(name: str, _: nn.Module, x: Tensor, delta: Tensor) -> Part:
    if name == "bias":
        return _sums(delta)
    delta = delta.flatten(1, -2) if delta.dim() > 2 else delta[:, None]
    return _Outer(delta, x.to(delta.dtype).reshape(*delta.shape[:2], -1))


def _transposed(name: str, layer: nn.Module, x: Tensor, delta: Tensor) -> Part:
    part = _linear(name, layer, x, delta)
    return _Outer(part.right, part.left) if isinstance(part, _Outer) else part


def _magnitude(_: str, __: nn.Module, x: Tensor, delta: Tensor) -> Part:
    return _sums(x.to(torch.promote_types(x.dtype, torch.float32)) * delta)


def _sums(delta: Tensor) -> Vectors:
    return Vectors(delta.reshape(len(delta), -1, delta.shape[-1]))


def _embedding(_: str, layer: Any, ids: Tensor, delta: Tensor) -> Part:  # noqa: ANN401
    delta = delta * _run(layer, ids, weight=layer.weight.new_ones(len(layer.weight), 1))
    if layer.padding_idx is not None:
        delta = delta.masked_fill((ids == layer.padding_idx)[..., None], 0)
    return _Lookup(_sums(delta).delta, ids.reshape(len(ids), -1))


def _norm(at: float, name: str, layer: nn.Module, x: Tensor, delta: Tensor) -> Part:
    """Returns the part for output x-hat w or x-hat (1 + w); the layer gives x-hat for w = `at`."""
    if name == "weight":
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        delta = delta * _scaled(layer, x, x.new_full(x.shape[-1:], at))
    return _sums(delta)


def _is_dora(layer: nn.Module) -> bool:
    """Whether it is peft's, which gives (m / |V| - 1) W x + m / |V| B A x for a magnitude m."""
    is_pefts = type(layer).forward.__module__ == "peft.tuners.lora.dora"
    return is_pefts and type(layer).__name__ == "DoraLinearLayer"


@torch.no_grad()
def input_of(layer: Any, args: Sequence[Any], others: Mapping[str, Any], output: Any) -> Any:  # noqa: ANN401
    """Returns a layer's only input, or, for DoRA's m, V x / |V|; None if neither is known."""
    given = (*args, *others.values())
    if len(given) == 1 or not _is_dora(layer):
        return given[0] if len(given) == 1 else None
    base, wx = others.get("base_layer"), others.get("base_result")
    if layer.fan_in_fan_out or type(base) is not nn.Linear:
        return None
    if wx is None:
        wx = nn.functional.linear(args[0], base.weight.to(args[0].dtype))
    elif base.bias is not None:
        wx = wx - base.bias
    return (wx + output) / layer.weight


def _is_table(layer: Any) -> bool:  # noqa: ANN401
    """Returns whether the output is the row of each index, times a factor free of the weight."""
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        return False
    ids = torch.arange(min(8, len(layer.weight)), device=layer.weight.device)
    scale = _run(layer, ids, weight=layer.weight.new_ones(len(layer.weight), 1))
    row = _run(layer, ids)
    return scale.shape == (len(ids), 1) and torch.allclose(
        row, layer.weight[ids] * scale, rtol=0.01
    )


def _norm_of(layer: nn.Module) -> Kind | None:
    """Tries w = 0, 1 and others: whether the output is x-hat w or x-hat (1 + w)."""
    n = len(layer.get_parameter("weight"))
    x = torch.arange(6 * n).sin().view(2, 3, n).to(layer.get_parameter("weight"))
    w = torch.arange(n).cos().to(x)
    zero, one, some = (_scaled(layer, x, v) for v in (torch.zeros_like(w), torch.ones_like(w), w))
    for at, base, x_hat in ((1.0, 0 * one, one), (0.0, zero, zero)):
        found = (zero, base), (one, base + x_hat), (some, base + x_hat * w)
        if all(torch.allclose(a, b, rtol=0.02, atol=0.01) for a, b in found) and one.any():
            return partial(_norm, at)
    return None


def _scaled(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    bias: Any = layer._parameters.get("bias")
    return _run(layer, x, weight=weight, bias=None if bias is None else torch.zeros_like(weight))


@torch.no_grad()
def _run(layer: nn.Module, x: Tensor, **parameters: Tensor | None) -> Tensor:
    """Runs a layer with other parameters and without its hooks."""
    twin = object.__new__(type(layer))  # FSDP2's layers can't be copied
    twin.__dict__ = vars(layer) | {"_parameters": {**layer._parameters, **parameters}}
    found: Tensor = twin.forward(x)
    return found
