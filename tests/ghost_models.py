"""Small models for the mode "ghost", and which of their parameters it should cover."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from tests.problems_nn import OwnBackward

DOUBLE = torch.float64


def data(*shape, seed=1, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)


def x_of(model, *shape, seed=1):
    """Inputs in the dtype of the model, ``[6, 5]`` by default."""
    return data(*shape or (6, 5), seed=seed, dtype=next(model.parameters()).dtype)


def three(y):
    """Curved, in conflict, and none a multiple of another."""
    wave = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return [(y - 1).square().mean(), (y + 0.7).square().mean(), (y * wave).sin().sum()]


def of(*shape, change=lambda x: x):
    """Losses of the model's output for one random input."""
    return lambda model: three(model(change(x_of(model, *shape))))


def of_ids(ids=((3, 1, 1), (7, 3, 0)), dtype=torch.int64):
    return lambda model: three(model(torch.tensor(ids, dtype=dtype)))


@dataclass(frozen=True)
class Case:
    """A model and its losses."""

    make: Callable
    covers: str | None
    """Parameters without a gradient of their own when every layer may be covered; None where that
    depends on the build of torch."""
    losses: Callable = of(6, 5)


class Net(nn.Module):
    """Parts by name, and a forward pass that is written where the case is."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._run = forward

    def forward(self, *inputs):
        return self._run(self, *inputs)


def matrix(*shape):
    return nn.Parameter(0.4 * torch.randn(*shape))


def net(covers, forward, losses=of(6, 5), **parts):  # noqa: B008  # it has no state
    """A `Net` of matrices, which are given by their shape, and layers, by their maker."""
    makers = {k: partial(matrix, *x) if isinstance(x, tuple) else x for k, x in parts.items()}
    return Case(lambda: Net(forward, **{k: make() for k, make in makers.items()}), covers, losses)


def chain(*layers):
    return lambda: nn.Sequential(*(make() for make in layers))


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


def recurrent(m, x):
    h = torch.zeros_like(x[0])
    for step in x:
        h = (m.a(step) + m.b(h)).tanh()
    return h


def cells(m, x):
    h = torch.zeros_like(x[0])
    for step in x:
        h = m.a(step, h)
    return h


def in_place(m, x):
    h = m.a(x)
    h += 1
    h[1:3] *= 2
    h[:, 0].sigmoid_()
    return m.b(h)


def two_strides(m, x):
    found = F.conv1d(x, m.w), F.conv1d(x, m.w, stride=2, padding=1)
    return torch.cat([y.flatten(1) for y in found], 1)


def convolutions():
    first = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
    return nn.Sequential(
        *first, nn.Conv2d(4, 2, 2), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(12, 3)
    )


class Block(nn.Module):
    def __init__(self, dropout=0.3):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(5), nn.Linear(5, 9), nn.Linear(9, 5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Tied(nn.Module):
    """Embedding and head of one weight, as language models have."""

    def __init__(self, lookups=1, heads=1, *, bias=False, **options):
        super().__init__()
        self.embedding = nn.Embedding(9, 5, **options)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 9, bias=bias)
        self.head.weight = self.embedding.weight
        self.lookups, self.heads = lookups, heads

    def forward(self, ids):
        h = sum(self.embedding(ids + i) for i in range(self.lookups))
        h = self.mix(h).tanh()
        return torch.stack([self.head(h * (i + 1)) for i in range(self.heads)])


def each_alone(m):
    """One loss of both uses of the table, and one of each."""
    ids = torch.tensor([[3, 1, 1], [7, 3, 0]])
    alone = m.embedding(ids).sin().sum(), m.head(x_of(m, 2, 5)).exp().mean()
    return [m(ids).square().mean(), *alone]


class Lora(nn.Module):
    def __init__(self, *, merged):
        super().__init__()
        self.base = nn.Linear(5, 7).requires_grad_(False)
        self.a, self.b, self.merged = matrix(2, 5), matrix(7, 2), merged

    def forward(self, x):
        if self.merged:
            return F.linear(x, self.base.weight + self.b @ self.a)
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).t()


def symmetric():
    layer = nn.Linear(5, 5)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 4))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.shared = nn.Linear(5, 7), nn.Linear(7, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 2) for _ in range(3))
        self.spare = nn.Linear(2, 2)


def heads(m):
    h = m.shared(m.trunk(x_of(m)).tanh()).tanh()
    return [(head(h) - i).square().mean() for i, head in enumerate(m.heads)]


def frozen():
    m = nn.Sequential(*mlp(), nn.Tanh(), nn.Linear(4, 3))
    m[2].weight.requires_grad_(False)
    return m


def penalty(m):
    first, second, third = of(6, 5)(m)
    return [first, second + 0.1 * m[2].weight.square().sum(), third]


def of_nothing(part, *shape):
    """Losses of a parameter, and of the model for a batch without examples."""
    return lambda m: [m(x_of(m, *shape)).sum() + term for term in three(part(m))]


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0].cos()  # not the true derivative


class OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, 2 * grad.t() @ x  # not the true derivative


def gradient_penalty(m):
    x = x_of(m).requires_grad_()
    y = m(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return [*three(y)[:2], (slope.norm(dim=1) - 1).square().mean()]


def inside(context):
    def losses(m):
        with context():
            return of(6, 5)(m)

    return losses


again = partial(checkpoint, use_reentrant=False)
linear, table = partial(partial, nn.Linear), partial(partial, nn.Embedding, 9, 5)
conv1d, conv2d = partial(partial, nn.Conv1d, 3, 4), partial(partial, nn.Conv2d, 3, 4)
attention = partial(nn.MultiheadAttention, 6, 2, batch_first=True)
encoder = partial(partial, nn.TransformerEncoderLayer, 6, 2, 8)
LAYER, BEHIND, ONE = linear(5, 7), linear(7, 4), linear(1, 1)
IMAGE, SIGNAL, TOKENS = of(2, 3, 6, 5), of(2, 3, 9), of(2, 3, 6)
MLP, AB, TIED = "0.weight 2.weight", "a.weight b.weight", "embedding.weight mix.weight"
BLOCKS = "0.up.weight 0.down.weight 1.up.weight 1.down.weight"
TRUNK = "trunk.weight shared.weight"
ATTENTION = "self_attn.in_proj_weight self_attn.out_proj.weight"

CASES = {
    # Linear layers, and inputs of all forms
    **{
        f"linear, input {shape}, bias {bias}": Case(
            chain(linear(5, 7, bias=bias), nn.Tanh, linear(7, 4, bias=bias)), MLP, of(*shape)
        )
        for shape in ((5,), (6, 5), (2, 3, 5), (2, 2, 3, 5))
        for bias in (True, False)
    },
    "one row": Case(LAYER, "weight", of(1, 5)),
    "one feature out": Case(linear(5, 1), "weight"),
    "one feature in": Case(linear(1, 5), "weight", of(6, 1)),
    "transposed": Case(LAYER, "weight", of(5, 6, change=lambda x: x.T)),
    "transposed 3-D": Case(LAYER, "weight", of(3, 2, 5, change=lambda x: x.transpose(0, 1))),
    "transposed 3-D, no bias": Case(
        linear(5, 7, bias=False), "weight", of(2, 5, 3, change=lambda x: x.transpose(1, 2))
    ),
    "strided input": Case(LAYER, "weight", of(6, 10, change=lambda x: x[:, ::2])),
    "expanded input": Case(LAYER, "weight", of(1, 5, change=lambda x: x.expand(6, 5))),
    "expanded output": net("a.weight", lambda m, x: m.a(x)[:, None].expand(6, 3, 7), a=LAYER),
    "input with a gradient": Case(LAYER, "weight", of(6, 5, change=lambda x: x.requires_grad_())),
    # Weights as factors of a product
    "x @ W": net("w", lambda m, x: x @ m.w, w=(5, 7)),
    "3-D x @ W": net("w", lambda m, x: x @ m.w, of(2, 3, 5), w=(5, 7)),
    "Conv1D of transformers": net(
        "w", lambda m, x: torch.addmm(m.b, x.view(-1, 5), m.w), of(2, 3, 5), w=(5, 7), b=(7,)
    ),
    "addmm with beta": net("w", lambda m, x: torch.addmm(m.b, x, m.w, beta=0.3), w=(5, 7), b=(7,)),
    "addmm with alpha": net("", lambda m, x: torch.addmm(m.b, x, m.w, alpha=3), w=(5, 7), b=(7,)),
    "W @ x": net("", lambda m, x: m.w @ x, of(5, 6), w=(7, 5)),
    "W1 @ W2": net("b", lambda m: m.a @ m.b, lambda m: three(m()), a=(5, 7), b=(7, 4)),
    "W @ W": net("", lambda m: m.w @ m.w, lambda m: three(m()), w=(5, 5)),
    "W.t() @ W": net("", lambda m: m.w.t() @ m.w, lambda m: three(m()), w=(5, 5)),
    "x @ W.t().t()": net("w", lambda m, x: x @ m.w.t().t(), w=(5, 7)),
    "x @ W.T": net("", lambda m, x: x @ m.w.T, w=(7, 5)),
    "einsum": net("", lambda m, x: torch.einsum("na,ba->nb", x, m.w), w=(7, 5)),
    "sparse x @ W": net("", lambda m, x: x.relu().to_sparse() @ m.w, w=(5, 7)),
    "complex product": net("", lambda m, x: (torch.complex(x, x + 1) @ (m.w + 0j)).abs(), w=(5, 7)),
    "complex product of a cast weight": net(
        "", lambda m, x: (z := torch.complex(x, x + 1)).matmul(m.w.to(z.dtype)).imag, w=(5, 7)
    ),
    "bilinear": net("", lambda m, x: m.a(x, x + 1), a=partial(nn.Bilinear, 5, 5, 3)),
    "two weights in a product": net(AB, lambda m, x: m.a(x) @ m.b.weight.t(), a=LAYER, b=BEHIND),
    "as W and as W.t() (autoencoder)": net("", lambda m, x: m.a(x).tanh() @ m.a.weight, a=LAYER),
    "square, W and W.t()": net("", lambda m, x: m.a(x).tanh() @ m.a.weight, a=linear(5, 5)),
    "slices of one parameter": net(
        "", lambda m, x: F.linear(F.linear(x, m.w[:35].view(7, 5)), m.w[35:].view(4, 7)), w=(63,)
    ),
    "rows of a weight": net("", lambda m, x: F.linear(x, m.w[:4]) + F.linear(x, m.w[4:]), w=(8, 5)),
    # The same layer several times
    "twice": net("a.weight", lambda m, x: m.a(m.a(x).tanh()), a=linear(5, 5)),
    "thrice": net("a.weight", lambda m, x: m.a(m.a(m.a(x).tanh()) + x), a=linear(5, 5, bias=False)),
    "twice on one input": net("a.weight", lambda m, x: m.a(x).tanh() * m.a(x), a=LAYER),
    "recurrent": net(AB, recurrent, of(4, 3, 5), a=linear(5, 5), b=linear(5, 5, bias=False)),
    "batches of several sizes": net(
        "a.weight", lambda m, x: torch.cat([m.a(x), m.a(x[:2] * 2), m.a(x[2:3])]), a=LAYER
    ),
    "square x @ W, twice": net("w", lambda m, x: (x @ m.w).tanh() @ m.w, w=(5, 5)),
    # What comes behind a layer
    "ReLU in place": Case(chain(LAYER, partial(nn.ReLU, inplace=True), BEHIND), MLP),
    "slices changed in place": net(AB, in_place, a=LAYER, b=BEHIND),
    "residual blocks with dropout": Case(chain(Block, Block), BLOCKS, of(2, 3, 5)),
    "LayerNorm": Case(chain(LAYER, partial(nn.LayerNorm, 7), BEHIND), MLP),
    "RMSNorm": Case(chain(LAYER, partial(nn.RMSNorm, 7), BEHIND), MLP),
    "BatchNorm": Case(chain(LAYER, partial(nn.BatchNorm1d, 7), BEHIND), MLP),
    # Convolutions
    **{
        f"convolution {options}": Case(partial(nn.Conv2d, 3, 4, **options), "weight", IMAGE)
        for options in (
            {"kernel_size": 3},
            {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
            {"kernel_size": (2, 3), "dilation": (3, 2), "padding": 2},
            {"kernel_size": 3, "padding": "same"},
            {"kernel_size": (2, 3), "padding": "same", "dilation": 2},
            {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
            {"kernel_size": 2, "bias": False},
            {"kernel_size": 1, "stride": 2},
            {"kernel_size": 2, "stride": 3},
        )
    },
    **{
        f"convolution 1-D {options}": Case(partial(nn.Conv1d, 3, 4, **options), "weight", SIGNAL)
        for options in (
            {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
            {"kernel_size": 4, "padding": "same", "dilation": 2},
            {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
            {"kernel_size": 1},
        )
    },
    "convolution, unbatched": Case(conv2d(3), "weight", of(3, 6, 5)),
    "convolution 1-D, unbatched": Case(conv1d(3), "weight", of(3, 9)),
    "convolution, channels last": Case(
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        "weight",
        of(2, 3, 6, 5, change=lambda x: x.to(memory_format=torch.channels_last)),
    ),
    "convolution 1-D, transposed": Case(
        conv1d(3), "weight", of(2, 9, 3, change=lambda x: x.transpose(1, 2))
    ),
    "convolution twice, and on another size": net(
        "a.weight",
        lambda m, x: sum(y.flatten(1).sum(1) for y in (m.a(m.a(x).tanh()), m.a(x[..., ::2]))),
        IMAGE,
        a=partial(nn.Conv2d, 3, 3, 2, padding=1),
    ),
    "one kernel with two strides": net("w", two_strides, SIGNAL, w=(4, 3, 3)),
    "convolutions and a head": Case(convolutions, "0.weight 3.weight 6.weight", IMAGE),
    "convolution with groups": Case(partial(nn.Conv2d, 4, 4, 3, groups=2), "", of(2, 4, 5, 5)),
    "depthwise convolution": Case(partial(nn.Conv1d, 3, 3, 3, groups=3), "", SIGNAL),
    "transposed convolution": Case(partial(nn.ConvTranspose2d, 3, 4, 3), "", IMAGE),
    "transposed convolution 1-D": Case(partial(nn.ConvTranspose1d, 3, 4, 3), "", SIGNAL),
    "convolution 3-D": Case(partial(nn.Conv3d, 2, 3, 2), "", of(2, 2, 3, 4, 3)),
    # Embeddings
    "embedding": Case(table(), "weight", of_ids()),
    **{
        f"embedding of ids {ids}": Case(table(), "weight", of_ids(ids))
        for ids in (4, [4], [4, 2], [3, 1, 1, 8], [[[3, 1], [7, 3]], [[3, 1], [7, 3]]])
    },
    "embedding of int32": Case(table(), "weight", of_ids(dtype=torch.int32)),
    "embedding with padding 0": Case(table(padding_idx=0), "weight", of_ids()),
    "embedding with padding 1": Case(table(padding_idx=1), "weight", of_ids()),
    "embedding with padding -2": Case(table(padding_idx=-2), "weight", of_ids()),
    "embedding with max_norm": Case(table(max_norm=1.0), "weight", of_ids()),
    "embedding scaled by frequency": Case(table(scale_grad_by_freq=True), "", of_ids()),
    "bag of embeddings": Case(partial(nn.EmbeddingBag, 9, 5), "", of_ids()),
    "rows by index": net("", lambda m, ids: m.w[ids], of_ids(), w=(9, 5)),
    "embedding, transposed": net("", lambda m, i: F.embedding(i, m.w.t()), of_ids(), w=(5, 9)),
    "embedding, twice": net(
        "e.weight", lambda m, i: m.e(i).tanh() * m.e(i + 1), of_ids(), e=table()
    ),
    "embedding and layer": Case(chain(table(), linear(5, 4)), "0.weight 1.weight", of_ids()),
    "one-hot product": net(
        "w", lambda m, i: F.one_hot(i, 9).to(m.w.dtype) @ m.w, of_ids(), w=(9, 5)
    ),
    "tied": Case(Tied, TIED, of_ids()),
    "tied with a bias": Case(partial(Tied, bias=True), TIED, of_ids()),
    "tied, looked up twice": Case(partial(Tied, 2), TIED, of_ids()),
    "tied, two heads": Case(partial(Tied, 1, 2), TIED, of_ids()),
    "tied with padding, all twice": Case(partial(Tied, 2, 2, padding_idx=1), TIED, of_ids()),
    "tied, 1-D ids of int32": Case(Tied, TIED, of_ids([1, 1, 4], torch.int32)),
    "tied, by frequency": Case(partial(Tied, scale_grad_by_freq=True), "mix.weight", of_ids()),
    "tied, each use alone": Case(Tied, TIED, each_alone),
    "soft ids": net(
        "",
        lambda m, i: m.e(i) + (m.e(i) @ m.e.weight.t()).softmax(-1) @ m.e.weight,
        of_ids(),
        e=table(),
    ),
    # Layers of torch
    "attention": net(
        "a.in_proj_weight a.out_proj.weight", lambda m, x: m.a(x, x, x)[0], TOKENS, a=attention
    ),
    "attention to others": net(
        "a.out_proj.weight", lambda m, x: m.a(x, x[:, 1:], x[:, 1:])[0], TOKENS, a=attention
    ),
    **{
        f"transformer layer {options}": Case(
            encoder(**options),
            f"{ATTENTION} linear1.weight linear2.weight",
            TOKENS,
        )
        for options in (
            {"dropout": 0.2, "batch_first": True},
            {"dropout": 0.0, "norm_first": True, "activation": "gelu"},
        )
    },
    **{
        f"{kind.__name__} {options}": net(
            None, lambda m, x: m.a(x)[0], of(3, 2, 5), a=partial(kind, 5, 4, **options)
        )
        for kind, options in (
            (nn.LSTM, {"num_layers": 2}),
            (nn.LSTM, {"bidirectional": True, "batch_first": True}),
            (nn.GRU, {"num_layers": 2}),
            (nn.RNN, {"num_layers": 2}),
        )
    },
    "GRU cell": net(None, cells, of(3, 2, 5), a=partial(nn.GRUCell, 5, 5)),
    # Weights that are computed
    "weight norm": Case(chain(lambda: weight_norm(LAYER()), nn.Tanh, BEHIND), "2.weight"),
    "spectral": Case(lambda: chain(lambda: spectral_norm(LAYER()), BEHIND)().eval(), "1.weight"),
    "parametrization": Case(symmetric, "2.weight"),
    "masked weight": net("", lambda m, x: F.linear(x, m.w * (m.w > 0)), w=(7, 5)),
    "adapters": Case(partial(Lora, merged=False), "a b"),
    # In B A, A is the second factor: B is then its input.
    "merged adapters": Case(partial(Lora, merged=True), "a"),
    "weight in another precision": net(
        "a.weight", lambda m, x: F.linear(x.to(DOUBLE), m.a.weight.to(DOUBLE)), a=LAYER
    ),
    "functional call": Case(
        mlp, MLP, lambda m: three(functional_call(m, dict(m.named_parameters()), x_of(m)))
    ),
    "vmap": Case(mlp, None, lambda m: three(torch.vmap(m)(x_of(m)))),
    # Which losses reach what
    "penalty on a weight": Case(mlp, "0.weight", penalty),
    "a penalty alone": Case(mlp, "2.weight", lambda m: [*of(6, 5)(m), m[0].weight.square().sum()]),
    **{
        f"a head for each loss, there: {there}": Case(
            Heads,
            " ".join([TRUNK, *(f"heads.{i}.weight" for i in there)]),
            lambda m, there=there: [x if i in there else None for i, x in enumerate(heads(m))],
        )
        for there in ([0, 1, 2], [0, 2], [1])
    },
    "graphs that are not shared": Case(
        mlp, MLP, lambda m: [of(6, 5)(m)[0], None, of(6, 5)(m)[1], of(6, 5)(m)[2]]
    ),
    "a loss of one layer": Case(mlp, MLP, lambda m: [m[0](x_of(m)).square().mean(), *of(6, 5)(m)]),
    "a layer for one loss only": net(
        f"{AB} c.weight",
        lambda m, x: [*three(m.b(m.a(x).tanh())), m.c(m.a(x)).exp().mean()],
        lambda m: m(x_of(m)),
        a=LAYER,
        b=BEHIND,
        c=linear(7, 3),
    ),
    "frozen weight": Case(frozen, "0.weight 4.weight"),
    "frozen trunk": Case(chain(lambda: LAYER().requires_grad_(False), nn.Tanh, BEHIND), "2.weight"),
    "a loss that is the output of a layer": net(
        AB,
        lambda m, x: m.b(m.a(x).tanh()),
        lambda m: [m(x_of(m, 1, 5)), m(x_of(m, 4, 5)).exp().mean()],
        a=LAYER,
        b=linear(7, 1, bias=False),
    ),
    "a weight as a loss": Case(ONE, "", lambda m: [m.weight, *three(m(x_of(m, 4, 1)))]),
    "a loss that is a weight, transposed": Case(
        ONE, "", lambda m: [m.weight.t(), *three(m(x_of(m, 4, 1)))]
    ),
    "parts of one node": Case(mlp, MLP, lambda m: list(m(x_of(m)).tanh().sum(0).unbind())),
    "one loss": Case(mlp, MLP, lambda m: of(6, 5)(m)[:1]),
    "fifteen losses": Case(
        mlp, MLP, lambda m: [(m(x_of(m)) * x_of(m, 6, 4, seed=i)).sin().sum() for i in range(15)]
    ),
    "no rows": Case(mlp, MLP, of_nothing(lambda m: m[2].bias, 0, 5)),
    "no features": net("w", lambda m, x: F.linear(x, m.w, m.b), of(6, 0), w=(4, 0), b=(4,)),
    "no images": Case(conv2d(3), "weight", of_nothing(lambda m: m.bias, 0, 3, 5, 5)),
    # What stands between a layer and its loss
    "function between layers": net(AB, lambda m, x: m.b(Scale.apply(m.a(x))), a=LAYER, b=BEHIND),
    "custom function that takes the weight": net(
        "b.weight", lambda m, x: m.b(OwnLinear.apply(x, m.a.weight)), a=LAYER, b=BEHIND
    ),
    "weight in its layer and in a custom function": net(
        "", lambda m, x: m.a(x) + OwnLinear.apply(x, m.a.weight), a=LAYER
    ),
    "untouched by the gradient": net(
        "b.weight",
        lambda m, x: m.b(x) + OwnBackward.apply(m.a(x), lambda _: None),
        a=LAYER,
        b=LAYER,
    ),
    "gradients inside a loss": Case(mlp, None, gradient_penalty),
    "saved on the host": Case(mlp, MLP, inside(save_on_cpu)),
    "saved by hooks": Case(
        mlp,
        MLP,
        inside(lambda: saved_tensors_hooks(lambda x: x.numpy(force=True).copy(), torch.from_numpy)),
    ),
    "checkpoint": Case(
        chain(Block, Block, linear(5, 4)),
        f"{BLOCKS} 2.weight",
        lambda m: three(m[2](again(m[1], m[0](x_of(m, 2, 3, 5))))),
    ),
    "two checkpoints of one block": Case(
        chain(partial(Block, 0.0), linear(5, 4)),
        "0.up.weight 0.down.weight 1.weight",
        lambda m: three(m[1](again(m[0], again(m[0], x_of(m, 2, 3, 5))))),
    ),
    "large and small losses": Case(
        mlp,
        MLP,
        lambda m: [k * x for k, x in zip((1e12, 1e-12, 1.0), of(6, 5)(m), strict=True)],
    ),
    "large and small inputs": Case(
        chain(LAYER, partial(nn.LayerNorm, 7), BEHIND),
        MLP,
        of(6, 5, change=lambda x: x * torch.logspace(-6, 6, 6, dtype=x.dtype)[:, None]),
    ),
}
