"""Heads, parameters that some or all losses miss, frozen and tied ones.

`test_random_steps` holds the gradients of all of these to formulas.
"""

import pytest
import torch
from torch import nn

from raco_optim import MGDA, CAGradClip
from tests.problems_nn import OwnBackward, bits, clipped_alpha, flat_grad, jacobian

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


def wrapped(model, inner=torch.optim.AdamW, **kwargs):
    return CAGradClip(inner(model.parameters(), lr=0.1), WEIGHTS, c=0.4, **kwargs)


@pytest.mark.parametrize("method", ["exact", "pgd", "MGDA"])
def test_heads_get_the_weighted_sum_and_stay_out_of_the_gram(method):
    model = Heads()
    J = jacobian(model, model.losses)
    size = len(flat_grad(model.trunk))
    trunk, heads = J[:, :size], J[:, size:]
    shared = {"shared_parameters": model.trunk.parameters()}
    if method == "MGDA":
        opt = MGDA(torch.optim.SGD(model.parameters(), 0.1), WEIGHTS, **shared)
    else:
        opt = wrapped(model, solver=method, **shared)
    opt.backward(model.losses())
    torch.testing.assert_close(opt.report.gram, trunk @ trunk.T)
    if method != "MGDA":
        alpha = clipped_alpha(trunk, WEIGHTS, 0.4, "hard")
        torch.testing.assert_close(flat_grad(model.trunk), alpha @ trunk, rtol=1e-8, atol=1e-10)
    weighted = torch.tensor(WEIGHTS, dtype=DOUBLE) @ heads
    torch.testing.assert_close(flat_grad(model)[size:], weighted)


@pytest.mark.parametrize("shared", [False, True], ids=["all shared", "trunk shared"])
def test_unused_and_frozen_parameters_are_left_alone(shared):
    """No weight decay, no state, and `.grad` is the tensor that was there."""
    model = Heads()
    model.trunk.weight.requires_grad_(False)
    held = torch.ones_like(model.first.bias)
    model.first.bias.requires_grad_(False).grad = held  # left from before it was frozen
    before = bits([model.spare.state_dict(), model.trunk.weight, held])
    opt = wrapped(model, shared_parameters=model.trunk.parameters() if shared else None)
    for _ in range(2):
        opt.backward(model.losses())
        assert all(p.grad is None for p in (*model.spare.parameters(), model.trunk.weight))
        assert model.first.bias.grad is held
        assert bits(held) == before[2]
        model.first.bias.grad = None  # AdamW itself would step a frozen parameter that has one
        opt.step()
        model.first.bias.grad = held
    assert bits([model.spare.state_dict(), model.trunk.weight, held]) == before
    assert all(p not in opt.state for p in model.spare.parameters())


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
    torch.testing.assert_close(flat_grad(model), clipped_alpha(J, WEIGHTS, 0.4, "hard") @ J)


def test_loss_that_reaches_only_a_head_is_zero_in_the_gram():
    model = Heads()
    opt = wrapped(model, shared_parameters=model.trunk.parameters())
    constant = torch.ones(3, 5, dtype=DOUBLE)
    opt.backward([model.losses()[0], model.second(constant).square().mean()])
    assert opt.report.gram[1].tolist() == [0, 0]
    assert opt.report.absent == ()
    assert bool(flat_grad(model.second).any())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
def test_gradient_of_a_head_alone_is_not_finite(bad, nonfinite):
    """The Gram of the trunk does not see it; the check must, and so must a GradScaler."""
    model = Heads()
    shared = model.trunk.parameters()
    opt = wrapped(model, torch.optim.SGD, shared_parameters=shared, nonfinite=nonfinite)
    first, second = model.losses()
    bias = OwnBackward.apply(model.second.bias, lambda grad: torch.full_like(grad, bad))
    losses = [first, second + bias.sum() * 0 + 0 * first]
    before = bits(model.state_dict())
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="the gradient of loss '1'"):
            opt.backward(losses)
    else:
        opt.backward(losses)
    if nonfinite == "propagate":
        assert not model.second.bias.grad.isfinite().all()
        assert flat_grad(model.trunk).isfinite().all()
    else:
        assert all(p.grad is None for p in model.parameters())
    assert bits(model.state_dict()) == before
