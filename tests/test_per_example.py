"""One backward pass for all losses, against one for each."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raco_optim import per_loss_gradients
from raco_optim.gradients.per_example import LinearLayerGradients
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


def by_layers(
    layers: LinearLayerGradients, z: Tensor, losses: list[Tensor | None]
) -> Gradients | None:
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
    layers = LinearLayerGradients(model, parameters)
    z = scores(model, ids)
    found = by_layers(layers, z, some_losses(z))
    assert_equal(found, expected, SINGLE)
    # The first time one more pass looks whether examples interact.
    assert len(passes) == 1 + 2 * checkpointing
    passes.clear()
    z = scores(model, ids)
    assert_equal(by_layers(layers, z, some_losses(z)), expected, SINGLE)
    assert len(passes) == 1 + checkpointing, "recomputed once, not once for every loss"


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"lora_bias": True}])
def test_variants_of_adapters(options: dict[str, object]) -> None:
    model = adapted("llama", **options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(3, 20, (N, TOKENS))
    expected = per_loss_gradients(some_losses(scores(model, ids)), parameters)
    layers = LinearLayerGradients(model, parameters)
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
    layers = LinearLayerGradients(net, parameters)
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
    layers = LinearLayerGradients(net, parameters)
    z = net(X)
    a, b, _ = some_losses(z)
    found = by_layers(layers, z, [a, None, b])
    assert found is not None
    assert all(g is None for g in found[1])
    expected = per_loss_gradients(some_losses(net(X))[:2], parameters)
    assert_equal([found[0], found[2]], expected)


def test_serves_one_batch_after_the_other(net: Net) -> None:
    parameters = [p for p in net.parameters() if p.requires_grad]
    layers = LinearLayerGradients(net, parameters)
    for x in (X, X.flip(0)[:4], X):
        z = net(x)
        expected = per_loss_gradients([(net(x) ** 2).sum(), net(x).mean()], parameters)
        assert_equal(by_layers(layers, z, [(z**2).sum(), z.mean()]), expected)


def test_leaves_the_model_as_it_was(net: Net) -> None:
    before = net(X)
    layers = LinearLayerGradients(net, [net.first.weight])
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
    layers = LinearLayerGradients(model, parameters)
    z = model(X)
    assert_equal(by_layers(layers, z, some_losses(z)), expected)


def test_autocast_is_as_exact_as_autograd(net: Net) -> None:
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
        layers = LinearLayerGradients(net, parameters)
        z = net(X.float()).float()
        found = by_layers(layers, z, some_losses(z))
    assert found is not None
    errors = [
        torch.cat([g.flatten() for row in rows for g in row if g is not None]).double() - truth
        for rows in (found, ordinary)
    ]
    assert errors[0].norm() < 1.5 * errors[1].norm()


class TestFallsBack:
    """None, and the graph still serves one backward pass a loss."""

    def check(self, model: nn.Module, parameters: list[Tensor], x: Tensor = X) -> None:
        layers = LinearLayerGradients(model, parameters)
        z = model(x)
        losses = some_losses(z)
        assert by_layers(layers, z, losses) is None
        per_loss_gradients(losses, parameters)

    def test_other_layers(self, net: Net) -> None:
        net.norm.requires_grad_(True)
        self.check(net, list(net.parameters()))

    def test_rows_are_not_examples(self) -> None:
        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x.flatten(0, 1)).tanh().sum(-1).view(N, TOKENS).sum(1)

        model = Flat().double()
        self.check(model, list(model.parameters()))

    def test_tied_weight(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = nn.Embedding(9, 4)
                self.head = nn.Linear(4, 9, bias=False)
                self.head.weight = self.embedding.weight

            def forward(self, ids: Tensor) -> Tensor:
                return self.head(self.embedding(ids)).tanh().sum((1, 2))

        model = Tied().double()
        self.check(model, [model.head.weight], torch.randint(0, 9, (N, TOKENS)))

    def test_weight_used_outside_its_layer(self) -> None:
        class Outside(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return (self.layer(x) @ self.head.weight.T).tanh().sum((1, 2))

        model = Outside().double()
        self.check(model, [model.layer.weight, model.layer.bias, model.head.weight])

    def test_weight_used_in_its_layer_and_outside(self) -> None:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return (self.layer(x) @ self.layer.weight.T).tanh().sum((1, 2))

        model = Both().double()
        self.check(model, list(model.parameters()))

    def test_hook_on_a_parameter(self, net: Net) -> None:
        net.first.weight.register_hook(lambda g: 2 * g)
        self.check(net, [net.first.weight])

    def test_parameter_of_another_model(self, net: Net) -> None:
        other = nn.Parameter(torch.ones(2, dtype=torch.float64))
        layers = LinearLayerGradients(net, [net.first.weight, other])
        z = net(X)
        assert by_layers(layers, z, some_losses(z)) is None


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
    layers = LinearLayerGradients(model, parameters)
    z = model(X)
    assert_equal(by_layers(layers, z, some_losses(z)), expected)
