"""One backward pass for all losses, against one for each."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.step_cost_memory import measure_memory
from raco_optim import CAGradClip, per_loss_gradients
from raco_optim.gradients.per_example import LayerGradients
from tests.tiny_language_models import FAMILIES, tiny_model

Gradients = list[list[Tensor | None]]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of transformers, about itself
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

N, TOKENS = 5, 7


def some_losses(z: Tensor) -> list[Tensor]:
    """Curved, so that the sensitivities differ from example to example."""
    return [z.square().mean(), z.sin().sum(), (z[:2] * z[3:]).sum()]


def by_layers(layers: LayerGradients, z: Tensor, losses: list[Tensor | None]) -> Gradients | None:
    found, why = layers.gradients(z, losses, [str(i) for i in range(len(losses))])
    assert (found is None) == bool(why)
    return found


# Language models normalise in float32, whatever their dtype.
SINGLE = 1e-5


def assert_equal(found: Gradients | None, expected: Gradients, tolerance: float = 1e-10) -> None:
    assert found is not None
    for row, true_row in zip(found, expected, strict=True):
        for g, true in zip(row, true_row, strict=True):
            assert (g is None) == (true is None)
            if g is not None and true is not None:
                assert g.dtype == true.dtype
                torch.testing.assert_close(g, true, rtol=tolerance, atol=tolerance)


def adapted(family: str, **options: object) -> nn.Module:
    """A language model with adapters that do something, in float64."""
    config = LoraConfig(r=3, target_modules="all-linear", **options)
    model = get_peft_model(tiny_model(family), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model.double()


def scores(model: nn.Module, ids: Tensor) -> Tensor:
    log_probs = model(input_ids=ids).logits.log_softmax(-1)
    return log_probs[:, :-1].gather(2, ids[:, 1:, None]).sum((1, 2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_of_language_models(family: str, checkpointing: bool) -> None:
    model = adapted(family)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(3, 20, (N, TOKENS))
    expected = per_loss_gradients(some_losses(scores(model, ids)), parameters)
    passes = []
    block = model.get_base_model().model.layers[0].self_attn
    block.register_forward_hook(lambda *_: passes.append(1))
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    layers = LayerGradients(model, parameters)
    z = scores(model, ids)
    found = by_layers(layers, z, some_losses(z))
    assert_equal(found, expected, SINGLE)
    # The first time two more passes are compared.
    assert len(passes) == 1 + 3 * checkpointing
    passes.clear()
    z = scores(model, ids)
    assert_equal(by_layers(layers, z, some_losses(z)), expected, SINGLE)
    assert len(passes) == 1 + checkpointing, "recomputed once, not once for every loss"


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"use_dora": True},
        {"use_dora": True, "lora_dropout": 0.5},
    ],
    ids=str,
)
def test_variants_of_adapters(options: dict[str, object]) -> None:
    model = adapted("llama", **options).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(3, 20, (N, TOKENS))
    torch.manual_seed(1)
    expected = per_loss_gradients(some_losses(scores(model, ids)), parameters)
    layers = LayerGradients(model, parameters)
    torch.manual_seed(1)
    z = scores(model, ids)
    assert_equal(by_layers(layers, z, some_losses(z)), expected, SINGLE)


class Net(nn.Module):
    """Two linear layers, the second used twice, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.unused = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).tanh()).tanh()
        return self.norm(self.second(h)).square().sum((1, 2))


@pytest.fixture
def net() -> Net:
    net = Net().double()
    net.norm.requires_grad_(False)
    return net


X = torch.linspace(-1, 1, N * TOKENS * 4, dtype=torch.float64).sin().view(N, TOKENS, 4)


def test_biases_unused_frozen_and_repeated_layers(net: Net) -> None:
    net.first.weight.requires_grad_(False)
    parameters = list(net.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    expected = per_loss_gradients(some_losses(net(X)), trainable)
    layers = LayerGradients(net, parameters)
    z = net(X)
    found = by_layers(layers, z, some_losses(z))
    assert found is not None
    kept = [[g for g, p in zip(row, parameters, strict=True) if p.requires_grad] for row in found]
    assert_equal(kept, expected)
    assert all(
        g is None
        for row in found
        for g, p in zip(row, parameters, strict=True)
        if not p.requires_grad
    )


def test_absent_loss(net: Net) -> None:
    parameters = [p for p in net.parameters() if p.requires_grad]
    layers = LayerGradients(net, parameters)
    z = net(X)
    a, b, _ = some_losses(z)
    found = by_layers(layers, z, [a, None, b])
    assert found is not None
    assert all(g is None for g in found[1])
    expected = per_loss_gradients(some_losses(net(X))[:2], parameters)
    assert_equal([found[0], found[2]], expected)


def test_serves_one_batch_after_the_other(net: Net) -> None:
    parameters = [p for p in net.parameters() if p.requires_grad]
    layers = LayerGradients(net, parameters)
    for x in (X, X.flip(0)[:4], X):
        z = net(x)
        expected = per_loss_gradients([(net(x) ** 2).sum(), net(x).mean()], parameters)
        assert_equal(by_layers(layers, z, [(z**2).sum(), z.mean()]), expected)


def test_leaves_the_model_as_it_was(net: Net) -> None:
    before = net(X)
    layers = LayerGradients(net, [net.first.weight])
    torch.testing.assert_close(net(X), before, rtol=0, atol=0)
    assert net.first._forward_hooks
    del layers
    assert not net.first._forward_hooks
    assert all(p.grad is None for p in net.parameters())


def test_hooks_and_changes_in_place_that_a_model_has(net: Net) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            net.first.register_forward_hook(lambda _, __, output: output * 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.net.second(torch.relu_(self.net.first(x)))
            h += 1
            h *= 2
            return h.tanh().sum((1, 2))

    model = Changing()
    parameters = list(net.first.parameters()) + list(net.second.parameters())
    expected = per_loss_gradients(some_losses(model(X)), parameters)
    layers = LayerGradients(model, parameters)
    z = model(X)
    assert_equal(by_layers(layers, z, some_losses(z)), expected)


def test_autocast_is_as_exact_as_autograd(net: Net) -> None:
    nn.init.normal_(net.norm.weight)  # or the squares of the output have a constant sum
    parameters = [p for p in net.parameters() if p.requires_grad]
    truth = torch.cat(
        [
            g.flatten()
            for row in per_loss_gradients(some_losses(net(X)), parameters)
            for g in row
            if g is not None
        ]
    )
    net = net.float()
    with torch.autocast("cpu", torch.bfloat16):
        ordinary = per_loss_gradients(some_losses(net(X.float()).float()), parameters)
        layers = LayerGradients(net, parameters)
        z = net(X.float()).float()
        found = by_layers(layers, z, some_losses(z))
    assert found is not None
    errors = [
        torch.cat([g.flatten() for row in rows for g in row if g is not None]).double() - truth
        for rows in (found, ordinary)
    ]
    assert errors[0].norm() < 1.5 * errors[1].norm()


class Tied(nn.Module):
    """A table of embeddings, with a padding index, that is also the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, padding_idx=2)
        self.head = nn.Linear(4, 9)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids)).tanh().sum((1, 2))


class Outside(nn.Module):
    """A weight that is used by its layer (or not), and by an operation of its own."""

    def __init__(self, *, inside: bool = True) -> None:
        super().__init__()
        self.inside = inside
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = layer(x).tanh()
        y = self.layers[2](x) if self.inside else x
        return (y @ self.layers[2].weight.T).tanh().sum((1, 2))


class Flat(nn.Module):
    """Tokens of all examples in one dimension, in one of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x).flatten(0, 1)).tanh().sum(-1).view(N, TOKENS).sum(1)


class Scaled(nn.Module):
    """A norm with weights 1 + w, one with w, and a module that no kind of layer is like."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.w = nn.Linear(4, 9), nn.LayerNorm(9), Shifted(9)
        self.gate = nn.PReLU(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.w(self.norm(self.linear(x).tanh())).sin()).square().sum((1, 2))


class Shifted(nn.Module):
    """A norm by its behaviour alone."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, n))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x / x.norm(dim=-1, keepdim=True)


def hooked(change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Outside().double()
        model.forward = lambda x: (  # type: ignore[method-assign]
            model.layers[2](model.layers[1](model.layers[0](x).tanh()).tanh()).sin().sum((1, 2))
        )
        change(model)
        return model

    return make


def functional() -> nn.Module:
    """Other weights in place of a layer's, whose gradients reach the parameter."""
    model = Outside().double()
    first, second, third = model.layers

    def forward(x: Tensor) -> Tensor:
        weights = {"weight": 2 * second.weight}
        h = torch.func.functional_call(second, weights, (first(x).tanh(),))
        return third(h.tanh()).sin().sum((1, 2))

    model.forward = forward  # type: ignore[method-assign]
    return model


def replaced(model: nn.Module) -> None:
    """A forward pass of its own, as other libraries give a layer."""
    layer = model.layers[0]
    layer.forward = lambda x: 3 * x @ layer.weight.T  # type: ignore[method-assign]


# name -> (model, what is not covered, "" for nothing)
KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tied": (Tied, ""),
    "norms": (Scaled, "is in no known layer"),
    "outside too": (Outside, "is used outside its layer"),
    "outside alone": (lambda: Outside(inside=False), "is in no known layer"),
    "tokens of all examples": (Flat, "is not [N, ..., features]"),
    "hook of a parameter": (
        hooked(lambda m: m.layers[0].weight.register_hook(lambda g: 2 * g)),
        "or has a hook",
    ),
    "hook before": (
        hooked(lambda m: m.layers[0].register_forward_pre_hook(lambda _, x: (2 * x[0],))),
        "",
    ),
    "hook after": (
        hooked(lambda m: m.layers[0].register_forward_hook(lambda _, __, y: 2 * y)),
        "",
    ),
    "backward hook": (
        hooked(lambda m: m.layers[1].register_full_backward_hook(lambda _, g, __: (2 * g[0],))),
        "",
    ),
    "forward pass of its own": (hooked(replaced), "is in no known layer"),
    "functional": (functional, "is in no known layer"),
}


def more_losses(z: Tensor, m: int) -> list[Tensor]:
    return [*some_losses(z), *(z.cos().mean() * k + z[k] for k in range(m - 3))]


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("m", [3, 6])
def test_kinds_of_layers(case: str, m: int) -> None:
    """Exact, whether one pass serves all parameters, some or none."""
    torch.manual_seed(0)
    make, missing = KINDS[case]
    model = make().double()
    parameters = list(model.parameters())
    x = torch.randint(0, 9, (N, TOKENS)) if case == "tied" else X
    layers = LayerGradients(model, parameters)
    for _ in range(3):
        expected = per_loss_gradients(more_losses(model(x), m), parameters)
        z = model(x)
        found, why = layers.gradients(z, more_losses(z, m), [str(i) for i in range(m)])
        assert missing in why and bool(missing) == bool(why)
        assert found is not None or m == 3
        assert_equal(found or expected, expected)


@pytest.mark.parametrize("late", [False, True])
def test_a_hook_before_ours(late: bool) -> None:
    """It changes the output before it is marked, unless it is seen."""
    model = hooked(lambda _: None)()
    parameters = list(model.parameters())
    layers = LayerGradients(model, parameters)
    for step in range(3):
        if step == (1 if late else 0):
            model.layers[0].register_forward_hook(lambda _, __, y: 3 * y, prepend=True)
        expected = per_loss_gradients(more_losses(model(X), 4), parameters)
        z = model(X)
        found, why = layers.gradients(z, more_losses(z, 4), ["a", "b", "c", "d"])
        assert bool(why) == (step >= late)
        assert_equal(found or expected, expected)


def test_a_layer_that_changes_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a patch of its class, which nothing but the numbers shows: an error, then m passes."""
    model = hooked(lambda _: None)()
    parameters = [layer.weight for layer in model.layers]
    layers = LayerGradients(model, parameters)
    z = model(X)
    layers.gradients(z, some_losses(z), ["a", "b", "c"])
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * x @ self.weight.T)
    raised = 0
    for _ in range(200):
        z = model(X)
        try:
            found, why = layers.gradients(z, some_losses(z), ["a", "b", "c"])
        except RuntimeError as error:
            assert "must compute the same in every step" in str(error)
            raised += 1
        else:
            assert found is not None or "examples interact" in why
    assert raised <= 1 and found is None


def test_parameter_of_another_model(net: Net) -> None:
    other = nn.Parameter(torch.ones(2, dtype=torch.float64))
    layers = LayerGradients(net, [net.first.weight, other])
    z = net(X)
    found, why = layers.gradients(z, [z.mean(), z.var()], ["a", "b"])
    assert not why
    z = net(X)
    expected = per_loss_gradients([z.mean(), z.var()], [net.first.weight, other])
    assert_equal(found, expected)


def test_a_reentrant_checkpoint_is_an_error() -> None:
    model = mlp()
    opt = optimizer(model, RAN)
    x = rows(0).requires_grad_()
    z = checkpoint(model, x, use_reentrant=True).squeeze(-1)
    with pytest.raises(RuntimeError, match="reentrant"):
        backward(opt, three(z), z)


@pytest.mark.filterwarnings("ignore")  # of torch, about its compiler's options
def test_a_compiled_model_falls_back() -> None:
    models = [mlp(), mlp()]
    for model, mode in zip(models, (RAN, "dense"), strict=True):
        opt = optimizer(model, mode)
        z = torch.compile(model, backend="aot_eager")(rows(0)).squeeze(-1)
        with torch._functorch.config.patch(donated_buffer=False):
            backward(opt, three(z), z)
        assert opt.report.gradients.startswith("dense")
    assert_same(*models, 1e-12)


def test_part_of_a_model_checkpointed(net: Net) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = checkpoint(self.net, x, use_reentrant=False)
            return z

    model = Checkpointed()
    parameters = [p for p in net.parameters() if p.requires_grad]
    expected = per_loss_gradients(some_losses(net(X)), parameters)
    layers = LayerGradients(model, parameters)
    z = model(X)
    assert_equal(by_layers(layers, z, some_losses(z)), expected)


# The mode of the optimizer, against one backward pass a loss


DOUBLE = torch.float64
RAN, CALLABLES = "per_example", "dense: callables"
PARTLY = "per_example; one pass for each loss where "
OTHER_SHAPE = "a layer's output is not [N, ..., features]"
OUTSIDE = "a parameter is used outside its layer, or has a hook (1 of 5 parameters: 0.weight)"
INTERACT = "dense: examples interact, or a hook changes gradients"
MORE = "dense: a loss depends on more than the scalars"
Forward = Callable[[nn.Module, Tensor], Tensor]


def mlp(dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 1)
    ).to(dtype)


def rows(step: int, n: int = 6) -> Tensor:
    return torch.randn(n, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(step))


def tokens(step: int, t: int = 5) -> Tensor:
    """``[6, t, 4]``, every token another."""
    return (rows(step)[:, None] * torch.arange(1, t + 1, dtype=DOUBLE)[:, None]).sin()


def flat(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.to(next(model.parameters()).dtype)).squeeze(-1).double()


def summed(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.to(next(model.parameters()).dtype)).flatten(1).double().sum(1)


def three(z: Tensor) -> list[Tensor]:
    return [z.square().mean(), z.sin().sum(), (z[:2] * z[-2:]).sum()]


def optimizer(model: nn.Module, mode: str, **options: object) -> CAGradClip:
    inner = torch.optim.SGD(model.parameters(), 0.05)
    options |= {"model": model} if mode == RAN else {}
    return CAGradClip(inner, [0.5, 0.2, 0.3], gradients=mode, **options)


def backward(opt: CAGradClip, losses: list, z: Tensor, **options: object) -> None:
    scalars = {"scalars": z} if opt._core.asked == RAN else {}
    opt.backward(losses, **scalars, **options)


def assert_same(model: nn.Module, other: nn.Module, tolerance: float) -> None:
    """`.grad`, relative to the norm of the whole of it."""
    grads = [[p.grad for p in m.parameters()] for m in (model, other)]
    assert [g is None for g in grads[0]] == [g is None for g in grads[1]]
    assert [g.dtype for g in grads[0] if g is not None] == [
        g.dtype for g in grads[1] if g is not None
    ]
    a, b = (torch.cat([g.double().flatten() for g in row if g is not None]) for row in grads)
    assert (a - b).norm() <= tolerance * b.norm()


def compare(
    make: Callable[[], nn.Module],
    forward: Forward,
    *,
    x: Callable[[int], Tensor] = rows,
    tolerance: float = 1e-12,
    losses: Callable[[Tensor], list] = three,
    expected: str = RAN,
    **options: object,
) -> None:
    """Three steps in both modes."""
    models = [make(), make()]
    opts = [optimizer(m, mode, **options) for m, mode in zip(models, (RAN, "dense"), strict=True)]
    for step in range(3):
        for model, opt in zip(models, opts, strict=True):
            opt.zero_grad()
            z = forward(model, x(step))
            backward(opt, losses(z), z)
        assert opts[0].report.gradients == expected
        assert opts[0].report.absent == opts[1].report.absent
        gram, true = (opt.report.gram for opt in opts)
        assert (gram - true).norm() <= 10 * tolerance * true.norm()
        values = [opt.report.losses for opt in opts]
        torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)
        assert_same(*models, tolerance)
        opts[1].step()
        models[0].load_state_dict(models[1].state_dict())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(DOUBLE, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.02)],
    ids=str,
)
@pytest.mark.parametrize("shape", ["[N, F]", "[N, T, F]", "[N, T, S, F]", "not contiguous"])
def test_mode_equals_dense(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = {
        "[N, F]": rows,
        "[N, T, F]": tokens,
        "[N, T, S, F]": lambda step: tokens(step, 6).unflatten(1, (2, 3)),
        "not contiguous": lambda step: tokens(step).mT.contiguous().mT,
    }
    forward = flat if shape == "[N, F]" else summed
    compare(lambda: mlp(dtype), forward, x=inputs[shape], tolerance=tolerance)


def test_adapters() -> None:
    class Adapted(nn.Module):
        """A frozen layer with a low-rank correction, as LoRA adds it."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.base = nn.Linear(4, 8).requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 8, bias=False)
            self.out = nn.Linear(8, 1).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.base(x) + self.up(self.down(x))).tanh())

    compare(lambda: Adapted().double(), summed, x=tokens)


def test_a_gradient_that_is_zero_but_for_rounding() -> None:
    """Of the bias of the keys, by which softmax does not change."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            weights = (self.q(x) @ self.k(x).mT).softmax(-1)
            return self.o(weights @ self.v(x)).tanh()

    compare(lambda: Attention().double(), summed, x=tokens)
    compare(lambda: Attention(), summed, x=tokens, tolerance=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 2.0**16, 1e30])
def test_scaled_losses_of_half_precision_layers(scale: float) -> None:
    """Sensitivities leave the range of float16, and their products with what follows do not."""

    def losses(z: Tensor) -> list[Tensor]:
        return [scale * loss for loss in three(z)]

    def half(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return model(x.float()).squeeze(-1).double() / 16

    found = mlp(torch.float32)
    opt = optimizer(found, RAN)
    z = half(found, rows(0))
    backward(opt, losses(z), z)
    assert opt.report.gradients == RAN
    truth = mlp()
    backward(optimizer(truth, "dense"), losses(flat(truth, rows(0)) / 16), z)
    a, b = (torch.cat([p.grad.double().flatten() for p in m.parameters()]) for m in (found, truth))
    assert (a - b).norm() <= 0.01 * b.norm()


@pytest.mark.parametrize("absent", [[0], [1, 2]], ids=str)
def test_absent_losses_of_the_mode(absent: list[int]) -> None:
    def losses(z: Tensor) -> list[Tensor | None]:
        return [None if i in absent else loss for i, loss in enumerate(three(z))]

    compare(mlp, flat, losses=losses)


def test_heads_of_the_mode() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = mlp()[:3], nn.Linear(8, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.trunk(x).tanh())

    models = [Heads(), Heads()]
    models[1].load_state_dict(models[0].state_dict())
    for model, mode in zip(models, (RAN, "dense"), strict=True):
        opt = optimizer(model, mode, shared_parameters=model.trunk.parameters())
        z = flat(model, rows(0))
        backward(opt, three(z), z)
        assert opt.report.gradients == mode
    assert_same(*models, 1e-12)


def test_micro_batches_of_the_mode() -> None:
    models = [mlp(), mlp()]
    opts = [optimizer(m, mode) for m, mode in zip(models, (RAN, "dense"), strict=True)]
    for model, opt in zip(models, opts, strict=True):
        # All forward passes come first, and one of evaluation between.
        scalars = [flat(model, rows(step, n)) for step, n in ((0, 6), (1, 3), (2, 6))]
        flat(model, rows(9, 2))
        for k, z in enumerate(scalars):
            losses = three(z)
            losses[k] = None
            backward(opt, losses, z, accumulate=k < 2)
            assert opt._core.mode.ran == opt._core.asked
        assert opt.report.absent == ()
    torch.testing.assert_close(opts[0].report.gram, opts[1].report.gram)
    assert_same(*models, 1e-12)


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_peak_is_that_of_a_pass_for_each_loss(m: int, parts: int) -> None:
    """And of blocks, which take 4 MB for layers of any size; micro-batches add nothing."""
    peaks = []
    for mode in (RAN, "dense"):
        layers = [layer for _ in range(6) for layer in (nn.Linear(512, 512), nn.Tanh())]
        model = nn.Sequential(*layers)
        options = {"model": model} if mode == RAN else {}
        inner = torch.optim.SGD(model.parameters(), 0.01)
        opt = CAGradClip(inner, [1 / m] * m, gradients=mode, **options)

        def step(model: nn.Module = model, opt: CAGradClip = opt) -> None:
            for k in range(parts):
                z = model(torch.ones(4, 16, 512)).sum((1, 2))
                losses = [(z * i).sin().sum() for i in range(1, m + 1)]
                backward(opt, losses, z, accumulate=k < parts - 1)

        found = measure_memory(step, opt.zero_grad)
        peaks.append(found.held + found.peak)
        assert opt.report.gradients == mode
    assert peaks[0] <= 1.1 * peaks[1] + 2**22


def test_the_sum_over_micro_batches_leaves_the_earlier_ones_alone() -> None:
    model = mlp()
    opt = optimizer(model, RAN)
    backward(opt, three(z := flat(model, rows(0))), z, accumulate=True)
    pending = opt._core.progress.pending
    before = copy.deepcopy(pending.rows)
    backward(opt, three(z := flat(model, rows(1))), z, accumulate=True)
    z = flat(model, rows(2))
    with pytest.raises(FloatingPointError):
        backward(opt, [z.sum() * torch.inf] * 3, z)
    for row, row_before in zip(pending.rows, before, strict=True):
        assert all(torch.equal(g, h) for g, h in zip(row, row_before, strict=True))


def test_a_micro_batch_without_losses_needs_no_scalars() -> None:
    model = mlp()
    opt = optimizer(model, RAN)
    opt.backward([None, None, None], accumulate=True)
    z = flat(model, rows(0))
    backward(opt, three(z), z)
    other = mlp()
    backward(optimizer(other, "dense"), three(flat(other, rows(0))), z)
    assert_same(model, other, 1e-12)


def test_evaluation_between_steps() -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            model(x[:2])
        model(x[:3])  # with a graph, and of another size
        return model(x).squeeze(-1)

    compare(mlp, forward)


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_checkpoints_of_the_mode(part: bool) -> None:
    def forward(model: nn.Sequential, x: Tensor) -> Tensor:
        first = model[:2](x) if part else x
        z: Tensor = checkpoint(model[2:] if part else model, first, use_reentrant=False)
        return z.squeeze(-1)

    compare(mlp, forward)


@pytest.mark.parametrize("form", ["tensors", "callables", "one callable"])
def test_callables_fall_back(form: str) -> None:
    def losses(z: Tensor) -> list:
        called = {"tensors": 0, "callables": 3, "one callable": 1}[form]
        return [
            (lambda loss=loss: loss * 1) if i < called else loss for i, loss in enumerate(three(z))
        ]

    model, other = mlp(), mlp()
    opt = optimizer(model, RAN)
    z = flat(model, rows(0))
    if form == "callables":  # each may have a forward pass of its own, and there are no scalars
        opt.backward([lambda i=i: three(flat(model, rows(0)))[i] for i in range(3)])
    else:
        opt.backward(losses(z), scalars=z, retain_graph=True)
    assert opt.report.gradients == (RAN if form == "tensors" else CALLABLES)
    backward(optimizer(other, "dense"), three(flat(other, rows(0))), z)
    assert_same(model, other, 1e-12)


def test_freezing_and_unfreezing_between_steps() -> None:
    models = [mlp(), mlp()]
    opts = [optimizer(m, mode) for m, mode in zip(models, (RAN, "dense"), strict=True)]
    ran = []
    for step in range(6):
        for model, opt in zip(models, opts, strict=True):
            model[0].weight.requires_grad_(step not in (1, 2))
            model[4].requires_grad_(step not in (2, 3))
            opt.zero_grad()
            z = flat(model, rows(step))
            if step == 5:
                model[2].requires_grad_(False)  # after the forward pass
            backward(opt, three(z), z)
        ran.append(opts[0].report.gradients)
        assert_same(*models, 1e-12)
        for opt in opts:
            opt.step()
    assert ran == [RAN] * 6


def test_they_are_watched_from_the_next_forward_pass_on() -> None:
    model, other = mlp(), mlp()
    opt = optimizer(model, RAN)
    for m in (model, other):
        m[0].requires_grad_(False)
    for _ in range(2):
        opt.zero_grad()
        z = flat(model, rows(0))
        backward(opt, three(z), z)
    assert opt.report.gradients == RAN
    backward(optimizer(other, "dense"), three(flat(other, rows(0))), z)
    assert_same(model, other, 1e-12)


def outside(share: float) -> Forward:
    """Uses the first weight beside its layer, for that share of its gradient."""

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        x = x.to(model[0].weight.dtype)
        layer = torch.autograd.grad(model(x).sum(), model[0].weight)[0].norm()
        alone = x.sum(0).norm() * len(model[0].weight) ** 0.5
        beside = (x @ model[0].weight.mT).sum(1)
        return model(x).squeeze(-1) + (share * layer / alone).detach() * beside

    return forward


class BatchNormalized(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 1))


def clamped(model: nn.Module, x: Tensor) -> Tensor:
    h = model[1](model[0](x))
    h.register_hook(lambda g: g.clamp(-0.05, 0.05))
    return model[2:](h).squeeze(-1)


def tokens_first(model: nn.Module, x: Tensor) -> Tensor:
    """``[T, N, F]`` with as many tokens as examples."""
    return model(tokens(int(x[0, 0] * 1000) % 7, 6).transpose(0, 1)).sum((0, 2))


# name -> (model, forward pass, what the report says)
FALLS_BACK = {
    "packed": (
        mlp,
        lambda m, x: m(x.view(1, 6, 4)).view(6),
        f"dense: {OTHER_SHAPE} (5 of 5 parameters: 0.weight, ...)",
    ),
    "packed tokens": (
        mlp,
        lambda m, x: m(torch.stack([x, -x, x * x]).reshape(1, 18, 4)).view(3, 6).sum(0),
        f"dense: {OTHER_SHAPE} (5 of 5 parameters: 0.weight, ...)",
    ),
    "one layer packed": (
        mlp,
        lambda m, x: m[2:](m[:2](x.view(1, 6, 4)).view(6, 8)).squeeze(-1),
        f"{PARTLY}{OTHER_SHAPE} (2 of 5 parameters: 0.weight, ...)",
    ),
    "tokens first": (mlp, tokens_first, INTERACT),
    "used outside for 1 %": (mlp, outside(0.01), PARTLY + OUTSIDE),
    "used outside for 1 %, float32": (
        lambda: mlp(torch.float32),
        lambda m, x: outside(0.01)(m, x).double(),
        PARTLY + OUTSIDE,
    ),
    "used outside for 3 %, bfloat16": (
        lambda: mlp(torch.bfloat16),
        lambda m, x: outside(0.03)(m, x).double(),
        PARTLY + OUTSIDE,
    ),
    "batch normalization": (lambda: BatchNormalized().double(), flat, INTERACT),
    "clamped activations": (mlp, clamped, INTERACT),
    "centred": (mlp, lambda m, x: flat(m, x) * flat(m, x).mean(), INTERACT),
}


@pytest.mark.parametrize("case", FALLS_BACK)
def test_what_falls_back_is_right_and_says_why(case: str) -> None:
    make, forward, why = FALLS_BACK[case]
    rounding = {"32": 1e-6, "16": 0.02}.get(case[-2:], 1e-14)
    compare(make, forward, expected=why, tolerance=rounding)


def test_a_loss_with_parameters_beside_the_scalars_falls_back() -> None:
    for index in range(3):
        models = [mlp(), mlp()]
        for model, mode in zip(models, (RAN, "dense"), strict=True):
            opt = optimizer(model, mode)
            z = flat(model, rows(0))
            losses = three(z)
            losses[index] = losses[index] + 0.1 * model[0].weight.square().sum()
            backward(opt, losses, z)
            assert opt.report.gradients == (MORE if mode == RAN else mode)
        assert_same(*models, 0)


def test_batch_normalization_that_begins_after_some_steps() -> None:
    """In evaluation it is a constant scale, and examples do not interact."""
    models = [BatchNormalized().double(), BatchNormalized().double()]
    opts = [optimizer(m, mode) for m, mode in zip(models, (RAN, "dense"), strict=True)]
    ran = []
    for training in (False, False, True, False):
        for model, opt in zip(models, opts, strict=True):
            model.train(training)
            opt.zero_grad()
            z = flat(model, rows(0))
            backward(opt, three(z), z)
        ran.append(opts[0].report.gradients)
        assert_same(*models, 1e-12)
    assert ran == [RAN, RAN, INTERACT, RAN]


@pytest.mark.parametrize("case", ["of another model", "of no layer"])
def test_scalars_that_do_not_reach_the_parameters(case: str) -> None:
    model = mlp()
    opt = optimizer(model, RAN)
    x = torch.ones(6, dtype=DOUBLE, requires_grad=True)
    z = flat(mlp(), rows(0)) if case == "of another model" else x * 2
    with pytest.raises(ValueError, match="loss '0' must depend on a parameter of the optimizer"):
        opt.backward(three(z), scalars=z)
    assert all(p.grad is None for p in model.parameters())


# name -> (scalars for z, exception, what its message says)
BAD_SCALARS = {
    "none": (lambda z: None, TypeError, "got NoneType"),
    "matrix": (lambda z: z[:, None], TypeError, r"got shape \[6, 1\]"),
    "sum": (lambda z: z.sum(), TypeError, r"got shape \[\]"),
    "detached": (lambda z: z.detach(), TypeError, "without a graph"),
    "list": (lambda z: list(z), TypeError, "got list"),
    "a copy": (lambda z: z * 1, ValueError, "loss '0' must depend on `scalars`"),
}


@pytest.mark.parametrize("case", BAD_SCALARS)
def test_bad_scalars(case: str) -> None:
    change, exception, message = BAD_SCALARS[case]
    model, other = mlp(), mlp()
    opt = optimizer(model, RAN)
    z = flat(model, rows(0))
    if case == "a copy":  # the losses still reach the parameters, by another way
        backward(opt, three(z), change(z))
        assert opt.report.gradients == MORE
        backward(optimizer(other, "dense"), three(flat(other, rows(0))), z)
        assert_same(model, other, 0)
        return
    with pytest.raises(exception, match=message):
        opt.backward(three(z), scalars=change(z))
    assert all(p.grad is None for p in model.parameters())
    backward(opt, three(z), z)


@pytest.mark.parametrize("mode", ["dense", "ghost"])
def test_scalars_and_model_are_for_this_mode(mode: str) -> None:
    model = mlp()
    opt = optimizer(model, mode)
    z = flat(model, rows(0))
    with pytest.raises(ValueError, match='`scalars`.*gradients="per_example"'):
        opt.backward(three(z), scalars=z)
    with pytest.raises(TypeError, match="`model`"):
        CAGradClip(torch.optim.SGD(model.parameters(), 0.1), [1.0], gradients=mode, model=model)
    with pytest.raises(TypeError, match="`model`"):
        CAGradClip(torch.optim.SGD(model.parameters(), 0.1), [0.5, 0.5], gradients=RAN)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_model_and_optimizer(how: str, tmp_path) -> None:
    model = mlp()
    opt = optimizer(model, RAN)
    z = flat(model, rows(0))
    backward(opt, three(z), z)
    for p in model.parameters():
        p.grad = None
    pair = (model, opt)
    if how == "deepcopy":
        twin, twin_opt = copy.deepcopy(pair)
    elif how == "pickle":
        twin, twin_opt = pickle.loads(pickle.dumps(pair))
    else:
        torch.save(pair, tmp_path / "pair.pt")
        twin, twin_opt = torch.load(tmp_path / "pair.pt", weights_only=False)
    for m, o in ((model, opt), (twin, twin_opt)):
        z = flat(m, rows(1))
        backward(o, three(z), z)
        assert o.report.gradients == RAN
    assert_same(model, twin, 0)
    alone = copy.deepcopy(model)
    z = flat(alone, rows(1))
    assert torch.equal(z, flat(model, rows(1)))
    z.sum().backward()  # whose hooks do nothing


def test_the_hooks_go_with_the_optimizer() -> None:
    model = mlp()
    opt = optimizer(model, RAN)
    z = flat(model, rows(0))
    backward(opt, three(z), z)
    del z
    assert sum(len(m._forward_hooks) for m in model.modules()) == 3
    reference = weakref.ref(opt)
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        del opt
        assert reference() is None
    finally:
        gc.enable()
    assert not any(m._forward_hooks for m in model.modules())


def test_two_optimizers_of_one_model() -> None:
    models = [mlp(), mlp()]
    for model, mode in zip(models, (RAN, "dense"), strict=True):
        opts = [optimizer(model, mode), optimizer(model, mode)]
        z = flat(model, rows(0))
        backward(opts[0], three(z), z, retain_graph=True)
        backward(opts[1], three(z)[::-1], z)
        assert opts[1].report.gradients == mode
    assert_same(*models, 1e-12)


def test_backward_in_no_grad_and_nan() -> None:
    model = mlp()
    opt = optimizer(model, RAN, nonfinite="skip")
    z = flat(model, rows(0))
    losses = three(z)
    with torch.no_grad():
        backward(opt, losses, z)
    assert opt.report.gradients == RAN
    z = flat(model, rows(1))
    backward(opt, [three(z)[0] * torch.nan, *three(z)[1:]], z)
    assert opt.report.skipped == 1


def test_a_graph_that_differs_from_step_to_step() -> None:
    """Some graphs are checked at once, others when they come again; few are remembered."""
    models = [mlp(), mlp()]
    opts = [optimizer(model, mode) for model, mode in zip(models, (RAN, "dense"), strict=True)]
    ran = []
    for length in [*range(12), *range(12)]:
        for model, opt in zip(models, opts, strict=True):
            opt.zero_grad()
            z = flat(model, rows(0))
            for _ in range(length):
                z = z.sin() + 1
            backward(opt, three(z), z)
        assert_same(*models, 1e-12)
        ran.append(opts[0].report.gradients)
    assert ran[:8] + ran[12:] == [RAN] * 20
    assert all(x.startswith("dense: the graph is new") for x in ran[8:12])


def test_one_backward_pass_of_the_layers() -> None:
    """For any number of losses, once it is known that examples do not interact."""
    model = mlp()
    passes = []
    model[2].register_full_backward_hook(lambda *_: passes.append(1))
    opt = optimizer(model, RAN)
    counts = []
    for step in range(3):
        z = flat(model, rows(step))
        passes.clear()
        backward(opt, three(z), z)
        counts.append(len(passes))
    assert counts == [3, 1, 1]
