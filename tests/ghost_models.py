"""Small models for the mode "ghost": what it should find in each, and what it should leave alone.

A `Case` is a model and its losses. `covers` names the parameters that have no gradient of their own
when the cost rule lets every layer through; all others fall back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

Losses = list[Tensor | None]
DOUBLE = torch.float64


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    losses: Callable[[nn.Module], Losses]
    covers: frozenset[str] = field(default_factory=frozenset)
    random: bool = False
    """Whether the forward pass draws numbers, which differ between float32 and float64."""


CASES: dict[str, Case] = {}


def add(
    name: str,
    make: Callable[[], nn.Module],
    losses: Callable[[nn.Module], Losses],
    covers: Sequence[str] = (),
    *,
    random: bool = False,
) -> None:
    assert name not in CASES
    CASES[name] = Case(make, losses, frozenset(covers), random)


def data(*shape: int, seed: int = 1, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(
        dtype
    )


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def three(y: Tensor) -> Losses:
    """Curved, in conflict, and none a multiple of another."""
    wave = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return [(y - 1).square().mean(), (y + 0.7).square().mean(), (y * wave).sin().sum()]


def of(*shape: int, change: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[..., Losses]:
    """Losses of the model's output for one random input."""
    return lambda model: three(model(change(data(*shape, dtype=dtype_of(model)))))


class Net(nn.Module):
    """Parts by name, and a forward pass that is written where the case is."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._run = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self._run(self, *inputs)


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.4 * torch.randn(*shape))


# Linear layers, and inputs of all forms

for shape in ((6, 5), (2, 3, 5), (2, 2, 3, 5)):
    for bias in (True, False):
        add(
            f"linear {len(shape)}-D, {'with' if bias else 'no'} bias",
            lambda bias=bias: nn.Sequential(
                nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 4, bias=bias)
            ),
            of(*shape),
            ["0.weight", "2.weight"],
        )
for bias in (True, False):
    add(
        f"linear 1-D, {'with' if bias else 'no'} bias",
        lambda bias=bias: nn.Sequential(
            nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 4, bias=bias)
        ),
        of(5),
        ["0.weight", "2.weight"],
    )
add("one row", lambda: nn.Linear(5, 7), of(1, 5), ["weight"])
add("one feature out", lambda: nn.Linear(5, 1), of(6, 5), ["weight"])
add("one feature in", lambda: nn.Linear(1, 5), of(6, 1), ["weight"])
add("transposed input", lambda: nn.Linear(5, 7), of(5, 6, change=lambda x: x.T), ["weight"])
add(
    "transposed 3-D input",
    lambda: nn.Linear(5, 7),
    of(3, 2, 5, change=lambda x: x.transpose(0, 1)),
    ["weight"],
)
add("strided input", lambda: nn.Linear(5, 7), of(6, 10, change=lambda x: x[:, ::2]), ["weight"])
add(
    "expanded input",
    lambda: nn.Linear(5, 7),
    of(1, 5, change=lambda x: x.expand(6, 5)),
    ["weight"],
)
add(
    "expanded output",
    lambda: Net(lambda m, x: m.a(x).unsqueeze(1).expand(6, 3, 7).tanh(), a=nn.Linear(5, 7)),
    of(6, 5),
    ["a.weight"],
)
add(
    "linear of 3-D without bias, transposed",
    lambda: nn.Linear(5, 7, bias=False),
    of(2, 5, 3, change=lambda x: x.transpose(1, 2)),
    ["weight"],
)
add(
    "input with a gradient of its own",
    lambda: nn.Linear(5, 7),
    of(6, 5, change=lambda x: x.requires_grad_()),
    ["weight"],
)


# Weights as factors of a product

add("x @ W", lambda: Net(lambda m, x: x @ m.w, w=matrix(5, 7)), of(6, 5), ["w"])
add("3-D x @ W", lambda: Net(lambda m, x: x @ m.w, w=matrix(5, 7)), of(2, 3, 5), ["w"])
add(
    "Conv1D of transformers",
    lambda: Net(
        lambda m, x: torch.addmm(m.b, x.view(-1, 5), m.w).view(2, 3, 7), w=matrix(5, 7), b=matrix(7)
    ),
    of(2, 3, 5),
    ["w"],
)
add(
    "addmm with beta",
    lambda: Net(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.3), w=matrix(5, 7), b=matrix(7)),
    of(6, 5),
    ["w"],
)
add(
    "addmm with alpha",
    lambda: Net(lambda m, x: torch.addmm(m.b, x, m.w, alpha=3), w=matrix(5, 7), b=matrix(7)),
    of(6, 5),
)
add("W @ x", lambda: Net(lambda m, x: m.w @ x, w=matrix(7, 5)), of(5, 6))
add(
    "W1 @ W2",
    lambda: Net(lambda m: m.a @ m.b, a=matrix(5, 7), b=matrix(7, 4)),
    lambda m: three(m()),
    ["b"],
)
add("W @ W", lambda: Net(lambda m: m.w @ m.w, w=matrix(5, 5)), lambda m: three(m()))
add("W.t() @ W", lambda: Net(lambda m: m.w.t() @ m.w, w=matrix(5, 5)), lambda m: three(m()))
add("x @ W.t().t()", lambda: Net(lambda m, x: x @ m.w.t().t(), w=matrix(5, 7)), of(6, 5), ["w"])
add("x @ W.T", lambda: Net(lambda m, x: x @ m.w.T, w=matrix(7, 5)), of(6, 5))
add("einsum", lambda: Net(lambda m, x: torch.einsum("na,ba->nb", x, m.w), w=matrix(7, 5)), of(6, 5))
add(
    "sparse x @ W",
    lambda: Net(lambda m, x: x.relu().to_sparse() @ m.w, w=matrix(5, 7)),
    of(6, 5),
)
add(
    "complex product",
    lambda: Net(lambda m, x: (torch.complex(x, x + 1) @ (m.w + 0j)).abs(), w=matrix(5, 7)),
    of(6, 5),
)
add(
    "complex product of a cast weight",
    lambda: Net(
        lambda m, x: (torch.complex(x, x + 1) @ m.w.to(torch.complex(x, x).dtype)).imag,
        w=matrix(5, 7),
    ),
    of(6, 5),
)
add("bilinear", lambda: Net(lambda m, x: m.a(x, x + 1), a=nn.Bilinear(5, 5, 3)), of(6, 5))
add(
    "two weights in one product",
    lambda: Net(lambda m, x: m.a(x) @ m.b.weight.t(), a=nn.Linear(5, 7), b=nn.Linear(7, 4)),
    of(6, 5),
    ["a.weight", "b.weight"],
)
add(
    "as W and as W.t() (autoencoder)",
    lambda: Net(lambda m, x: m.a(x).tanh() @ m.a.weight, a=nn.Linear(5, 7)),
    of(6, 5),
)
add(
    "square, as W and as W.t()",
    lambda: Net(lambda m, x: m.a(x).tanh() @ m.a.weight, a=nn.Linear(5, 5)),
    of(6, 5),
)
add(
    "slices of one parameter",
    lambda: Net(
        lambda m, x: F.linear(F.linear(x, m.w[:35].view(7, 5)).tanh(), m.w[35:].view(4, 7)),
        w=matrix(63),
    ),
    of(6, 5),
)
add(
    "rows of a weight",
    lambda: Net(lambda m, x: F.linear(x, m.w[:4]) + F.linear(x, m.w[4:]), w=matrix(8, 5)),
    of(6, 5),
)


# The same layer several times

add(
    "twice",
    lambda: Net(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(5, 5)),
    of(6, 5),
    ["a.weight"],
)
add(
    "three times",
    lambda: Net(lambda m, x: m.a(m.a(m.a(x).tanh()) + x), a=nn.Linear(5, 5, bias=False)),
    of(2, 3, 5),
    ["a.weight"],
)
add(
    "twice on one input",
    lambda: Net(lambda m, x: m.a(x).tanh() * m.a(x), a=nn.Linear(5, 7)),
    of(6, 5),
    ["a.weight"],
)


def recurrent(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[0])
    for step in x:
        h = (m.a(step) + m.b(h)).tanh()
    return h


add(
    "recurrent",
    lambda: Net(recurrent, a=nn.Linear(5, 5), b=nn.Linear(5, 5, bias=False)),
    of(4, 3, 5),
    ["a.weight", "b.weight"],
)
add(
    "batches of several sizes",
    lambda: Net(lambda m, x: torch.cat([m.a(x), m.a(x[:2] * 2), m.a(x[2:3])]), a=nn.Linear(5, 7)),
    of(6, 5),
    ["a.weight"],
)
add(
    "square x @ W, twice",
    lambda: Net(lambda m, x: (x @ m.w).tanh() @ m.w, w=matrix(5, 5)),
    of(6, 5),
    ["w"],
)


# What comes behind a layer

add(
    "ReLU in place",
    lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 4)),
    of(6, 5),
    ["0.weight", "2.weight"],
)


def in_place(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x)
    h += 1
    h[1:3] *= 2
    h[:, 0].sigmoid_()
    return m.b(h)


add(
    "slices changed in place",
    lambda: Net(in_place, a=nn.Linear(5, 7), b=nn.Linear(7, 4)),
    of(6, 5),
    ["a.weight", "b.weight"],
)


class Block(nn.Module):
    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(5), nn.Linear(5, 9), nn.Linear(9, 5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))
        return y


add(
    "residual blocks with dropout",
    lambda: nn.Sequential(Block(), Block()),
    of(2, 3, 5),
    ["0.up.weight", "0.down.weight", "1.up.weight", "1.down.weight"],
    random=True,
)
for name, norm in {
    "LayerNorm": lambda: nn.LayerNorm(7),
    "RMSNorm": lambda: nn.RMSNorm(7),
    "GroupNorm": lambda: nn.GroupNorm(7, 7, affine=True),
    "BatchNorm": lambda: nn.BatchNorm1d(7),
}.items():
    add(
        name,
        lambda norm=norm: nn.Sequential(
            nn.Linear(5, 7),
            nn.Tanh() if norm().__class__ is nn.GroupNorm else norm(),
            nn.Linear(7, 4),
        ),
        of(6, 5),
        ["0.weight", "2.weight"],
    )


# Convolutions

IMAGE, SIGNAL = (2, 3, 6, 5), (2, 3, 9)
for name, options in {
    "2-D": {"kernel_size": 3},
    "2-D, strided and padded": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
    "2-D, dilated": {"kernel_size": (2, 3), "dilation": (3, 2), "padding": 2},
    "2-D, same": {"kernel_size": 3, "padding": "same"},
    "2-D, same with a dilation": {"kernel_size": (2, 3), "padding": "same", "dilation": 2},
    "2-D, reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "2-D, no bias": {"kernel_size": 2, "bias": False},
    "2-D, kernel 1": {"kernel_size": 1},
    "2-D, kernel 1, strided": {"kernel_size": 1, "stride": 2},
    "2-D, stride that leaves a rest": {"kernel_size": 2, "stride": 3},
}.items():
    add(
        f"convolution {name}",
        lambda options=options: nn.Conv2d(3, 4, **options),
        of(*IMAGE),
        ["weight"],
    )
for name, options in {
    "1-D": {"kernel_size": 3},
    "1-D, strided, padded, dilated": {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    "1-D, same with a dilation": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "1-D, circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    "1-D, kernel 1": {"kernel_size": 1},
}.items():
    add(
        f"convolution {name}",
        lambda options=options: nn.Conv1d(3, 4, **options),
        of(*SIGNAL),
        ["weight"],
    )
add("convolution 2-D, unbatched", lambda: nn.Conv2d(3, 4, 3), of(3, 6, 5), ["weight"])
add("convolution 1-D, unbatched", lambda: nn.Conv1d(3, 4, 3), of(3, 9), ["weight"])
add(
    "convolution 2-D, channels last",
    lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    of(*IMAGE, change=lambda x: x.to(memory_format=torch.channels_last)),
    ["weight"],
)
add(
    "convolution of a transposed signal",
    lambda: nn.Conv1d(3, 4, 3),
    of(2, 9, 3, change=lambda x: x.transpose(1, 2)),
    ["weight"],
)
add(
    "convolution twice, and on another size",
    lambda: Net(
        lambda m, x: m.a(m.a(x).tanh()).flatten(1).sum(1) + m.a(x[..., ::2]).flatten(1).sum(1),
        a=nn.Conv2d(3, 3, 2, padding=1),
    ),
    of(*IMAGE),
    ["a.weight"],
)
add(
    "one kernel with two strides",
    lambda: Net(
        lambda m, x: torch.cat(
            [F.conv1d(x, m.w).flatten(1), F.conv1d(x, m.w, stride=2, padding=1).flatten(1)], 1
        ),
        w=matrix(4, 3, 3),
    ),
    of(*SIGNAL),
    ["w"],
)
add(
    "convolutions and a head",
    lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, 2),
        nn.GroupNorm(1, 2),
        nn.Flatten(),
        nn.Linear(12, 3),
    ),
    of(*IMAGE),
    ["0.weight", "3.weight", "6.weight"],
)
add("convolution with groups", lambda: nn.Conv2d(4, 4, 3, groups=2), of(2, 4, 5, 5))
add("depthwise convolution", lambda: nn.Conv1d(3, 3, 3, groups=3), of(*SIGNAL))
add("transposed convolution", lambda: nn.ConvTranspose2d(3, 4, 3), of(*IMAGE))
add("transposed convolution 1-D", lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), of(*SIGNAL))
add("convolution 3-D", lambda: nn.Conv3d(2, 3, 2), of(2, 2, 3, 4, 3))


# Embeddings

IDS = torch.tensor([[3, 1, 1], [7, 3, 0]])


def of_ids(ids: Tensor = IDS) -> Callable[[nn.Module], Losses]:
    return lambda model: three(model(ids))


for name, ids in {
    "1-D": torch.tensor([3, 1, 1, 8]),
    "2-D": IDS,
    "3-D": IDS.view(1, 2, 3).expand(2, 2, 3),
    "int32": IDS.int(),
    "no repetition": torch.tensor([4, 2]),
    "one": torch.tensor([4]),
}.items():
    add(f"embedding of ids: {name}", lambda: nn.Embedding(9, 5), of_ids(ids), ["weight"])
add("embedding of a number", lambda: nn.Embedding(9, 5), of_ids(torch.tensor(4)), ["weight"])
add("embedding with padding", lambda: nn.Embedding(9, 5, padding_idx=1), of_ids(), ["weight"])
add("embedding with padding 0", lambda: nn.Embedding(9, 5, padding_idx=0), of_ids(), ["weight"])
add("embedding with padding -2", lambda: nn.Embedding(9, 5, padding_idx=-2), of_ids(), ["weight"])
add("embedding with max_norm", lambda: nn.Embedding(9, 5, max_norm=1.0), of_ids(), ["weight"])
add("embedding scaled by frequency", lambda: nn.Embedding(9, 5, scale_grad_by_freq=True), of_ids())
add("bag of embeddings", lambda: nn.EmbeddingBag(9, 5), of_ids())
add("rows by index", lambda: Net(lambda m, ids: m.w[ids], w=matrix(9, 5)), of_ids())
add(
    "embedding of a transposed table",
    lambda: Net(lambda m, ids: F.embedding(ids, m.w.t()), w=matrix(5, 9)),
    of_ids(),
)
add(
    "embedding, twice",
    lambda: Net(lambda m, ids: m.e(ids).tanh() * m.e(ids + 1), e=nn.Embedding(9, 5)),
    of_ids(),
    ["e.weight"],
)
add(
    "embedding and linear layer",
    lambda: nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 4)),
    of_ids(),
    ["0.weight", "1.weight"],
)
add(
    "one-hot product",
    lambda: Net(lambda m, ids: F.one_hot(ids, 9).to(m.w.dtype) @ m.w, w=matrix(9, 5)),
    of_ids(),
    ["w"],
)


class Tied(nn.Module):
    """Embedding and head of one weight, as language models have."""

    def __init__(
        self, lookups: int = 1, heads: int = 1, *, bias: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5, **options)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 9, bias=bias)
        self.head.weight = self.embedding.weight
        self.lookups, self.heads = lookups, heads

    def forward(self, ids: Tensor) -> Tensor:
        h = sum(self.embedding(ids + i) for i in range(self.lookups))
        h = self.mix(h).tanh()
        return torch.stack([self.head(h * (i + 1)) for i in range(self.heads)])


TIED = ["embedding.weight", "mix.weight"]
add("tied", Tied, of_ids(), TIED)
add("tied with a bias", lambda: Tied(bias=True), of_ids(), TIED)
add("tied, looked up twice", lambda: Tied(2), of_ids(), TIED)
add("tied, two heads", lambda: Tied(1, 2), of_ids(), TIED)
add("tied, all twice", lambda: Tied(2, 2), of_ids(), TIED)
add("tied with padding", lambda: Tied(2, 2, padding_idx=1), of_ids(), TIED)
add("tied, 1-D ids of int32", Tied, of_ids(torch.tensor([1, 1, 4], dtype=torch.int32)), TIED)
add("tied, scaled by frequency", lambda: Tied(scale_grad_by_freq=True), of_ids(), ["mix.weight"])
add(
    "tied, one id alone",
    Tied,
    lambda m: [
        m(IDS).square().mean(),
        m.embedding(IDS).sin().sum(),
        m.head(data(2, 5, dtype=dtype_of(m))).exp().mean(),
    ],
    TIED,
)
add(
    "tied and transposed (soft ids)",
    lambda: Net(
        lambda m, ids: m.e(ids) + (m.e(ids) @ m.e.weight.t()).softmax(-1) @ m.e.weight,
        e=nn.Embedding(9, 5),
    ),
    of_ids(),
)


# Layers of torch

add(
    "attention",
    lambda: Net(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(6, 2, batch_first=True)),
    of(2, 3, 6),
    ["a.in_proj_weight", "a.out_proj.weight"],
)
add(
    "attention to something else",
    lambda: Net(
        lambda m, x: m.a(x, x[:, :2], x[:, :2])[0], a=nn.MultiheadAttention(6, 2, batch_first=True)
    ),
    of(2, 3, 6),
    ["a.out_proj.weight"],
)
add(
    "transformer layer in training",
    lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.2, batch_first=True),
    of(2, 3, 6),
    ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"],
    random=True,
)
add(
    "transformer layer, norm first",
    lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, norm_first=True, activation="gelu"),
    of(3, 2, 6),
    ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"],
)
# What torch makes of these depends on its build; equal they must be.
for name, layer in {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}.items():
    add(name, lambda layer=layer: Net(lambda m, x: m.a(x)[0], a=layer(5, 4, 2)), of(3, 2, 5), ["?"])
add(
    "LSTM in both directions",
    lambda: Net(lambda m, x: m.a(x)[0], a=nn.LSTM(5, 4, bidirectional=True, batch_first=True)),
    of(2, 3, 5),
    ["?"],
)


def cells(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[0])
    for step in x:
        h = m.a(step, h)
    return h


add("GRU cell", lambda: Net(cells, a=nn.GRUCell(5, 5)), of(3, 2, 5), ["?"])


# Weights that are computed

add(
    "weight norm",
    lambda: nn.Sequential(weight_norm(nn.Linear(5, 7)), nn.Tanh(), nn.Linear(7, 4)),
    of(6, 5),
    ["2.weight"],
)
add(
    "spectral norm",
    lambda: nn.Sequential(spectral_norm(nn.Linear(5, 7)), nn.Tanh(), nn.Linear(7, 4)).eval(),
    of(6, 5),
    ["2.weight"],
)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).t()


class Lora(nn.Module):
    def __init__(self, *, merged: bool) -> None:
        super().__init__()
        self.base = nn.Linear(5, 7).requires_grad_(False)
        self.a, self.b, self.merged = matrix(2, 5), matrix(7, 2), merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.b @ self.a)
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


def symmetric() -> nn.Module:
    layer = nn.Linear(5, 5)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 4))


add("parametrization", symmetric, of(6, 5), ["2.weight"])
add(
    "masked weight",
    lambda: Net(lambda m, x: F.linear(x, m.w * (m.w > 0)), w=matrix(7, 5)),
    of(6, 5),
)
add("adapters", lambda: Lora(merged=False), of(6, 5), ["a", "b"])
# In B A, A is the second factor: B is then its input.
add("merged adapters", lambda: Lora(merged=True), of(6, 5), ["a"])
add(
    "weight in another precision",
    lambda: Net(lambda m, x: F.linear(x.to(DOUBLE), m.a.weight.to(DOUBLE)), a=nn.Linear(5, 7)),
    of(6, 5),
    ["a.weight"],
)
add(
    "functional call",
    lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)),
    lambda m: three(functional_call(m, dict(m.named_parameters()), data(6, 5, dtype=dtype_of(m)))),
    ["0.weight", "2.weight"],
)
add(
    "vmap",
    lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)),
    lambda m: three(torch.vmap(m)(data(6, 5, dtype=dtype_of(m)))),
    ["?"],
)


# Which losses reach what


def penalty(m: nn.Module) -> Losses:
    first, second, third = three(m(data(6, 5, dtype=dtype_of(m))))
    return [first, second + 0.1 * m[2].weight.square().sum(), third]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


add("penalty on a weight", mlp, penalty, ["0.weight"])
add(
    "a loss that is a penalty",
    mlp,
    lambda m: [*three(m(data(6, 5, dtype=dtype_of(m)))), m[0].weight.square().sum()],
    ["2.weight"],
)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.shared = nn.Linear(5, 7), nn.Linear(7, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 2) for _ in range(3))
        self.spare = nn.Linear(2, 2)


def heads(m: nn.Module) -> Losses:
    h = m.shared(m.trunk(data(6, 5, dtype=dtype_of(m))).tanh()).tanh()
    return [(head(h) - i).square().mean() for i, head in enumerate(m.heads)]


HEADS = ["trunk.weight", "shared.weight", *(f"heads.{i}.weight" for i in range(3))]
add("a head for each loss", Heads, heads, HEADS)
add(
    "absent loss",
    Heads,
    lambda m: [heads(m)[0], None, heads(m)[2]],
    [h for h in HEADS if "1" not in h],
)
add(
    "only one loss there",
    Heads,
    lambda m: [None, heads(m)[1], None],
    [*HEADS[:2], "heads.1.weight"],
)
add(
    "graphs that are not shared",
    Heads,
    lambda m: [heads(m)[0], heads(m)[1], heads(m)[2]],
    HEADS,
)
add(
    "a loss that misses a layer",
    mlp,
    lambda m: [
        m[0](data(6, 5, dtype=dtype_of(m))).square().mean(),
        *three(m(data(6, 5, dtype=dtype_of(m)))),
    ],
    ["0.weight", "2.weight"],
)
add(
    "a layer for one loss only",
    lambda: Net(
        lambda m, x: [
            *three(m.b(m.a(x).tanh())),
            m.c(m.a(x)).exp().mean(),
        ],
        a=nn.Linear(5, 7),
        b=nn.Linear(7, 4),
        c=nn.Linear(7, 3),
    ),
    lambda m: m(data(6, 5, dtype=dtype_of(m))),
    ["a.weight", "b.weight", "c.weight"],
)


def frozen() -> nn.Module:
    m = nn.Sequential(*mlp(), nn.Tanh(), nn.Linear(4, 3))
    m[2].weight.requires_grad_(False)
    return m


add("frozen weight", frozen, of(6, 5), ["0.weight", "4.weight"])
add(
    "frozen trunk",
    lambda: nn.Sequential(nn.Linear(5, 7).requires_grad_(False), nn.Tanh(), nn.Linear(7, 4)),
    of(6, 5),
    ["2.weight"],
)
add(
    "a loss that is the output of a layer",
    lambda: Net(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(5, 7), b=nn.Linear(7, 1, bias=False)),
    lambda m: [m(data(1, 5, dtype=dtype_of(m))), m(data(4, 5, dtype=dtype_of(m))).exp().mean()],
    ["a.weight", "b.weight"],
)
add(
    "a loss that is a weight",
    lambda: nn.Linear(1, 1),
    lambda m: [m.weight, *three(m(data(4, 1, dtype=dtype_of(m))))],
)
add(
    "a loss that is a weight, transposed",
    lambda: nn.Linear(1, 1),
    lambda m: [m.weight.t(), *three(m(data(4, 1, dtype=dtype_of(m))))],
)
add(
    "parts of one node",
    lambda: nn.Sequential(*mlp(), nn.Tanh()),
    lambda m: list(m(data(6, 5, dtype=dtype_of(m))).sum(0).unbind()),
    ["0.weight", "2.weight"],
)
add(
    "one loss", mlp, lambda m: three(m(data(6, 5, dtype=dtype_of(m))))[:1], ["0.weight", "2.weight"]
)
add(
    "forty losses",
    mlp,
    lambda m: [
        (m(data(6, 5, dtype=dtype_of(m))) * data(6, 4, seed=i, dtype=dtype_of(m))).sin().sum()
        for i in range(40)
    ],
    ["0.weight", "2.weight"],
)


def no_rows(m: nn.Module) -> Losses:
    empty = m(data(0, 5, dtype=dtype_of(m)))
    return [empty.sum() + term for term in three(m[2].bias) if term is not None]


add("no rows", mlp, no_rows, ["0.weight", "2.weight"])
add(
    "no features",
    lambda: Net(lambda m, x: F.linear(x, m.w, m.b), w=matrix(4, 0), b=matrix(4)),
    of(6, 0),
    ["w"],
)
add(
    "empty batch of images",
    lambda: nn.Conv2d(3, 4, 3),
    lambda m: [
        m(data(0, 3, 5, 5, dtype=dtype_of(m))).sum() + term
        for term in three(m.bias)
        if term is not None
    ],
    ["weight"],
)


# What stands between a layer and its loss


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0].cos()  # not the true derivative


class Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


class OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, 2 * grad.t() @ x  # not the true derivative


add(
    "custom function between layers",
    lambda: Net(lambda m, x: m.b(Scale.apply(m.a(x))), a=nn.Linear(5, 7), b=nn.Linear(7, 4)),
    of(6, 5),
    ["a.weight", "b.weight"],
)
add(
    "custom function that takes the weight",
    lambda: Net(
        lambda m, x: m.b(OwnLinear.apply(x, m.a.weight)), a=nn.Linear(5, 7), b=nn.Linear(7, 4)
    ),
    of(6, 5),
    ["b.weight"],
)
add(
    "weight in its layer and in a custom function",
    lambda: Net(lambda m, x: m.a(x) + OwnLinear.apply(x, m.a.weight), a=nn.Linear(5, 7)),
    of(6, 5),
)
add(
    "untouched by the gradient",
    lambda: Net(lambda m, x: m.b(x) + Blocked.apply(m.a(x)), a=nn.Linear(5, 4), b=nn.Linear(5, 4)),
    of(6, 5),
    ["b.weight"],
)


def gradient_penalty(m: nn.Module) -> Losses:
    x = data(6, 5, dtype=dtype_of(m)).requires_grad_()
    y = m(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return [*three(y)[:2], (slope.norm(dim=1) - 1).square().mean()]


add("gradients inside a loss", mlp, gradient_penalty, ["?"])


def with_context(context: Callable[[], Any]) -> Callable[[nn.Module], Losses]:
    def losses(m: nn.Module) -> Losses:
        with context():
            return three(m(data(6, 5, dtype=dtype_of(m))))

    return losses


add("saved on the host", mlp, with_context(save_on_cpu), ["0.weight", "2.weight"])
add(
    "saved by hooks",
    mlp,
    with_context(
        lambda: saved_tensors_hooks(lambda x: x.clone().numpy(force=True), torch.from_numpy)
    ),
    ["0.weight", "2.weight"],
)
add("nothing around it", mlp, with_context(nullcontext), ["0.weight", "2.weight"])
add(
    "checkpoint",
    lambda: nn.Sequential(Block(), Block(), nn.Linear(5, 4)),
    lambda m: three(
        m[2](checkpoint(m[1], m[0](data(2, 3, 5, dtype=dtype_of(m))), use_reentrant=False))
    ),
    ["0.up.weight", "0.down.weight", "1.up.weight", "1.down.weight", "2.weight"],
    random=True,
)
add(
    "two checkpoints of one block",
    lambda: nn.Sequential(Block(0.0), nn.Linear(5, 4)),
    lambda m: three(
        m[1](
            checkpoint(
                m[0],
                checkpoint(m[0], data(2, 3, 5, dtype=dtype_of(m)), use_reentrant=False),
                use_reentrant=False,
            )
        )
    ),
    ["0.up.weight", "0.down.weight", "1.weight"],
)
add(
    "large and small numbers",
    mlp,
    lambda m: [
        1e12 * three(m(data(6, 5, dtype=dtype_of(m))))[0],
        1e-12 * three(m(data(6, 5, dtype=dtype_of(m))))[1],
        three(m(data(6, 5, dtype=dtype_of(m))))[2],
    ],
    ["0.weight", "2.weight"],
)
add(
    "large and small inputs",
    lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 4)),
    of(6, 5, change=lambda x: x * torch.logspace(-6, 6, 6, dtype=x.dtype)[:, None]),
    ["0.weight", "2.weight"],
)
add(
    "classification",
    lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)),
    lambda m: list(
        F.cross_entropy(m(data(6, 5, dtype=dtype_of(m))), torch.arange(6) % 4, reduction="none")[:3]
        * math.pi
    ),
    ["0.weight", "2.weight"],
)
