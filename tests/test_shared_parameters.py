"""Heads, parameters that some or all losses miss, frozen and tied ones."""

import pytest
import torch
from torch import nn

from raco_optim import MGDA, CAGradClip
from tests.problems_nn import bits, clipped_alpha

DOUBLE = torch.float64
WEIGHTS = [0.3, 0.7]


class Heads(nn.Module):
    """A trunk, one head per loss and a module that nothing uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 5, dtype=DOUBLE)
        self.first = nn.Linear(5, 1, dtype=DOUBLE)
        self.second = nn.Linear(5, 1, dtype=DOUBLE)
        self.spare = nn.Linear(2, 2, dtype=DOUBLE)

    def losses(self):
        h = self.trunk(torch.linspace(-1, 1, 32, dtype=DOUBLE).view(8, 4)).tanh()
        return [(self.first(h) - 3).square().mean(), (self.second(h) + 3).exp().mean()]

    def rows(self, *modules):
        """Per-loss gradients of the modules' parameters, by ordinary backward passes."""
        rows = []
        for i in range(2):
            self.zero_grad()
            self.losses()[i].backward()
            rows.append(grads(*modules))
        self.zero_grad()
        return torch.stack(rows)


def grads(*modules):
    parameters = [p for module in modules for p in module.parameters()]
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
    )


def wrapped(model, inner=torch.optim.AdamW, **kwargs):
    return CAGradClip(inner(model.parameters(), lr=0.1), WEIGHTS, c=0.4, **kwargs)


@pytest.mark.parametrize("solver", ["exact", "pgd"])
def test_heads_get_the_weighted_sum_and_stay_out_of_the_gram(solver):
    model = Heads()
    trunk = model.rows(model.trunk)
    heads = model.rows(model.first, model.second)
    alpha = clipped_alpha(trunk, WEIGHTS, 0.4, "hard")
    opt = wrapped(model, solver=solver, shared_parameters=model.trunk.parameters())
    opt.backward(model.losses())
    torch.testing.assert_close(opt.report.gram, trunk @ trunk.T)
    torch.testing.assert_close(grads(model.trunk), alpha @ trunk, rtol=1e-8, atol=1e-10)
    weighted = torch.tensor(WEIGHTS, dtype=DOUBLE) @ heads
    torch.testing.assert_close(grads(model.first, model.second), weighted)


def test_by_default_all_parameters_are_shared():
    model = Heads()
    J = model.rows(model)
    opt = wrapped(model)
    opt.backward(model.losses())
    torch.testing.assert_close(opt.report.gram, J @ J.T)
    torch.testing.assert_close(grads(model), clipped_alpha(J, WEIGHTS, 0.4, "hard") @ J)


def test_mgda_weighs_the_heads_by_its_weights():
    model = Heads()
    heads = model.rows(model.first, model.second)
    opt = MGDA(
        torch.optim.SGD(model.parameters(), 0.1),
        WEIGHTS,
        shared_parameters=model.trunk.parameters(),
    )
    opt.backward(model.losses())
    weighted = torch.tensor(WEIGHTS, dtype=DOUBLE) @ heads
    torch.testing.assert_close(grads(model.first, model.second), weighted)


@pytest.mark.parametrize("shared", [False, True], ids=["all shared", "trunk shared"])
def test_unused_parameter_is_not_decayed(shared):
    model = Heads()
    before = bits(model.spare.state_dict())
    opt = wrapped(model, shared_parameters=model.trunk.parameters() if shared else None)
    for _ in range(2):
        opt.zero_grad()
        opt.backward(model.losses())
        assert all(p.grad is None for p in model.spare.parameters())
        opt.step()
    assert bits(model.spare.state_dict()) == before
    assert all(p not in opt.state for p in model.spare.parameters())


@pytest.mark.parametrize("shared", [False, True], ids=["all shared", "trunk shared"])
def test_frozen_parameters_are_left_alone(shared):
    model = Heads()
    model.trunk.weight.requires_grad_(False)
    held = torch.ones_like(model.first.bias)
    model.first.bias.requires_grad_(False).grad = held  # left from before it was frozen
    before = bits([model.trunk.weight, held])
    opt = wrapped(
        model, torch.optim.SGD, shared_parameters=model.trunk.parameters() if shared else None
    )
    opt.backward(model.losses())
    assert model.trunk.weight.grad is None
    assert model.first.bias.grad is held
    assert bits([model.trunk.weight, held]) == before
    row = torch.autograd.grad(model.losses()[0], model.trunk.bias)[0]
    assert float(opt.report.gram[0, 0]) >= float(row @ row) * (1 - 1e-12)


def test_tied_weights_count_once():
    """As one parameter with the summed gradient, where a sum over modules would count two."""
    embedding, head = nn.Embedding(5, 3, dtype=DOUBLE), nn.Linear(3, 5, bias=False, dtype=DOUBLE)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)

    def losses():
        logits = model(torch.arange(5))
        return [logits[:, 0].square().mean(), -logits.logsumexp(-1).mean()]

    rows = [torch.autograd.grad(losses()[i], embedding.weight)[0].reshape(-1) for i in range(2)]
    J = torch.stack(rows)
    opt = wrapped(model)
    opt.backward(losses())
    torch.testing.assert_close(opt.report.gram, J @ J.T)
    expected = clipped_alpha(J, WEIGHTS, 0.4, "hard") @ J
    torch.testing.assert_close(embedding.weight.grad.reshape(-1), expected)


def test_loss_that_reaches_only_a_head_is_zero_in_the_gram():
    model = Heads()
    opt = wrapped(model, shared_parameters=model.trunk.parameters())
    constant = torch.ones(3, 5, dtype=DOUBLE)
    opt.backward([model.losses()[0], model.second(constant).square().mean()])
    assert opt.report.gram[1].tolist() == [0, 0]
    assert opt.report.absent == ()
    assert bool(grads(model.second).any())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
def test_gradient_of_a_head_alone_is_not_finite(bad, nonfinite):
    """The Gram of the trunk does not see it; the check must, and so must a GradScaler."""
    model = Heads()
    opt = wrapped(
        model, torch.optim.SGD, shared_parameters=model.trunk.parameters(), nonfinite=nonfinite
    )

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.full_like(grad, bad)

    first, second = model.losses()
    losses = [first, second + Bad.apply(model.second.bias).sum() * 0 + 0 * first]
    before = bits(model.state_dict())
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="the gradient of loss '1'"):
            opt.backward(losses)
        assert all(p.grad is None for p in model.parameters())
    else:
        opt.backward(losses)
        if nonfinite == "skip":
            assert all(p.grad is None for p in model.parameters())
        else:
            assert not model.second.bias.grad.isfinite().all()
            assert grads(model.trunk).isfinite().all()
            return
    opt.zero_grad()
    assert bits(model.state_dict()) == before
