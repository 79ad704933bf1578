"""Per-loss gradients against one ordinary backward pass per loss, and the fate of the graphs."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raco_optim import CAGradClip, per_loss_gradients
from tests.problems_nn import Buffered, batch, bits, network, said, two_losses


def by_backward(parameters, forward):
    """The witness: for every loss its own forward pass and `loss.backward()`."""
    parameters, rows = list(parameters), []
    for i in range(len(forward())):
        for p in parameters:
            p.grad = None
        forward()[i].backward()
        rows.append([p.grad for p in parameters])
    for p in parameters:
        p.grad = None
    return rows


FORMS = {
    "shared graph": lambda forward: forward(),
    "own graphs": lambda forward: [forward()[i] for i in range(len(forward()))],
    "callables": lambda forward: [lambda i=i: forward()[i] for i in range(len(forward()))],
    "callable last": lambda forward: [*forward()[:-1], lambda: forward()[-1]],
    "callable first": lambda forward: [lambda: forward()[0], *forward()[1:]],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_one_backward_pass_per_loss_bit_for_bit(form, dtype):
    model, x = network(dtype), batch(0, dtype=dtype)

    def forward():
        return [*two_losses(model, x), model[0](x).square().mean()]

    expected = by_backward(model.parameters(), forward)
    assert expected[2][3] is None, "the third loss does not reach the last layer"
    found = per_loss_gradients(FORMS[form](forward), model.parameters())
    assert bits(found) == bits(expected)
    assert all(p.grad is None for p in model.parameters())


def test_absent_loss_is_a_row_of_none_wherever_it_stands():
    """And a loss that stands twice has its row twice."""
    model = network()
    first, second = by_backward(model.parameters(), lambda: two_losses(model, batch(0)))
    for absent in range(3):
        losses = two_losses(model, batch(0))
        losses.insert(absent, None)
        found = per_loss_gradients([*losses, losses[0 if absent else 1]], list(model.parameters()))
        assert found.pop(absent) == [None] * 4
        assert bits(found) == bits([first, second, first])


def test_frozen_and_unreached_parameters_are_none():
    model = network()
    model[0].weight.requires_grad_(False)
    spare = nn.Parameter(torch.ones(3))
    rows = per_loss_gradients(two_losses(model, batch(0)), [*model.parameters(), spare])
    assert [[g is None for g in row] for row in rows] == [[True, False, False, False, True]] * 2


def test_tied_weights_get_the_sum_over_their_uses():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    token = torch.tensor([1])
    (row,) = per_loss_gradients([head(embedding(token))[0, 4]], [embedding.weight])
    # L = <e_1, e_4>: dL/de_1 = e_4 through the embedding, dL/de_4 = e_1 through the head.
    expected = torch.zeros(5, 3)
    expected[1], expected[4] = embedding.weight[4].detach(), embedding.weight[1].detach()
    torch.testing.assert_close(row[0], expected)


def test_any_shape_and_memory_format():
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    for value in (torch.tensor(2.0), torch.randn(4, 3).T, images, torch.empty(0)):
        x = nn.Parameter(value)
        (row,) = per_loss_gradients([(x**2).sum()], [x])
        assert torch.equal(row[0], 2 * x.detach())


def test_hooks_on_the_accumulation_of_grad_do_not_run_and_hooks_on_tensors_do():
    """DistributedDataParallel hangs its hooks on the former: it would average only one loss."""
    x, calls = nn.Parameter(torch.ones(2)), []
    x.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    x.register_hook(lambda grad: calls.append("tensor") or 2 * grad)
    rows = per_loss_gradients([x.sum(), 3 * x.sum()], [x])
    assert calls == ["tensor", "tensor"]
    assert [row[0].tolist() for row in rows] == [[2, 2], [6, 6]]


class HoldsOn(torch.autograd.Function):
    """Keeps a tensor on the node itself, where freeing the saved tensors does not reach."""

    @staticmethod
    def forward(ctx, x, activation):
        ctx.activation = activation
        return (x * activation).sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.activation, None


def saved(x):
    activation = x.exp()
    return activation, lambda: (activation * activation).sum()


def on_the_node(x):
    activation = torch.ones(2)
    return activation, lambda: HoldsOn.apply(x, activation)


@pytest.mark.parametrize("held", [saved, on_the_node])
def test_graph_of_a_callable_is_freed_before_the_next_forward(held):
    x, alive, references = nn.Parameter(torch.ones(2)), [], []

    def loss():
        alive.append([reference() is not None for reference in references])
        activation, make = held(x)
        references.append(weakref.ref(activation))
        return make()

    per_loss_gradients([loss, loss, loss], [x])
    assert alive == [[], [False], [False, False]]
    assert [reference() for reference in references] == [None] * 3


@pytest.mark.parametrize(
    "others_after", [[], [None], [lambda x: lambda: x.prod()]], ids=["none", "absent", "callable"]
)
def test_last_tensor_frees_the_shared_graph(others_after):
    """While the user still holds the losses: m graphs' worth of activations must not wait."""
    x = nn.Parameter(torch.ones(2))
    activation = (x.exp() * 2).sin()
    trunk = (activation * activation).sum()
    losses = [trunk * 2, trunk * 3]
    reference = weakref.ref(activation)
    del activation, trunk
    per_loss_gradients([*losses, *(make and make(x) for make in others_after)], [x])
    assert reference() is None


@pytest.mark.parametrize("first", ["tensor", "callable"])
def test_gradient_survives_the_forward_of_the_next_callable(first):
    """Which may refill a buffer that the gradient is, as autograd returned it."""
    x, buffer = nn.Parameter(torch.ones(2)), torch.zeros(2)

    def loss(value):
        buffer.fill_(value)
        return Buffered.apply(x, buffer)

    losses = [lambda: loss(1.0), lambda: loss(2.0)]
    if first == "tensor":
        losses[0] = losses[0]()
    rows = per_loss_gradients(losses, [x])
    assert [row[0].tolist() for row in rows] == [[1, 1], [2, 2]]


class Checkpointed(nn.Module):
    """A language model in small: embedding, checkpointed block, head."""

    def __init__(self, use_reentrant, *, embed):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4) if embed else None
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)
        self.use_reentrant = use_reentrant

    def losses(self):
        tokens = torch.arange(5)
        if self.embedding is None:  # an input that needs no gradients: torch itself would warn
            h = nn.functional.one_hot(tokens, 5)[:, :4].float().requires_grad_()
        else:
            h = self.embedding(tokens)
        if self.use_reentrant is None:
            h = self.block(h)
        else:
            h = checkpoint(self.block, h, use_reentrant=self.use_reentrant)
        out = self.head(h)
        return [out[:, 0].square().mean(), out[:, 1].exp().mean()]


@pytest.mark.parametrize("embed", [True, False], ids=["after an embedding", "first layers"])
def test_reentrant_checkpoint_is_an_error_with_advice_and_others_change_nothing(embed):
    model = Checkpointed(use_reentrant=True, embed=embed)
    opt = CAGradClip(torch.optim.SGD(model.parameters(), 0.1), [0.5, 0.5])
    with pytest.raises(RuntimeError, match=r"loss '0'.*use_reentrant=False"):
        opt.backward(model.losses())
    assert all(p.grad is None for p in model.parameters())
    grads = []
    for use_reentrant in (None, False):
        model = Checkpointed(use_reentrant, embed=embed)
        grads.append(bits(per_loss_gradients(model.losses(), list(model.parameters()))))
    assert grads[0] == grads[1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_with_donated_buffers_off(backend):
    torch.compiler.reset()
    model = network()
    compiled = torch.compile(model, backend=backend)
    expected = by_backward(model.parameters(), lambda: two_losses(model, batch(0)))
    with torch._functorch.config.patch(donated_buffer=False):  # the name that the remedy gives
        for form in ("shared graph", "callables"):
            losses = FORMS[form](lambda: two_losses(compiled, batch(0)))
            found = per_loss_gradients(losses, list(model.parameters()))
            torch.testing.assert_close(found, expected)


def test_donated_buffers_are_named_with_their_remedy(monkeypatch):
    """A compiled model says this in the first of several backward passes on a GPU."""
    text = (
        "This backward function was compiled with non-empty donated buffers which requires "
        "create_graph=False and retain_graph=False."
    )

    def grad(*args, **kwargs):
        raise RuntimeError(text)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    model = network()
    with pytest.raises(RuntimeError) as caught:
        per_loss_gradients(two_losses(model, batch(0)), list(model.parameters()))
    for words in (text, "torch._functorch.config.donated_buffer = False", "callables"):
        assert words in said(caught.value)


@pytest.mark.parametrize(
    "mode", ["dense", "ghost", "per_example", "representation", "subset", "gram_every"]
)
def test_retain_graph(mode):
    """The same losses serve twice, whether one pass or several go through their graph."""
    model, plain = network(), network()
    options = {"per_example": {"model": model}, "gram_every": {"gram_every": 3}}.get(mode, {})
    kind = {"gram_every": "dense", "subset": list(model[2].parameters())}.get(mode, mode)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    opt = CAGradClip(inner, [0.6, 0.4], c=0.0, gradients=kind, **options)
    z = model(batch(0)).sum(1)
    losses = [z.square().mean(), z.sin().sum()]
    through = {"per_example": {"scalars": z}, "representation": {"representation": z}}.get(mode, {})
    opt.backward(losses, **through, retain_graph=True)
    opt.backward(losses, **through, retain_graph=True)
    opt.backward(losses, **through)
    if mode != "per_example":  # which keeps the graph as long as the losses live
        with pytest.raises(RuntimeError, match="(?s)second time.*Compute the losses again"):
            opt.backward(losses, **through)
    z = plain(batch(0)).sum(1)
    (0.6 * z.square().mean() + 0.4 * z.sin().sum()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 3 * q.grad)


def test_retain_graph_after_accumulation():
    x = nn.Parameter(torch.ones(2))
    losses = [x.exp().sum(), x.sin().sum()]
    opt = CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5], c=0.0)
    opt.backward(losses, accumulate=True, retain_graph=True)
    opt.backward(losses)
    torch.testing.assert_close(x.grad, (x.exp() + x.cos()).detach())
    with pytest.raises(RuntimeError, match="second time"):
        opt.backward(losses)
