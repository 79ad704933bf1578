"""The baselines against what characterises them, and rules of one's own."""

import copy

import pytest
import torch
from torch import nn

from raco_optim import MGDA, CAGrad, CAGradClip, MultiObjectiveOptimizer
from tests.problems_nn import batch, flat_grad, jacobian, network, three_losses, two_losses

DOUBLE = torch.float64


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_mgda_is_the_point_of_smallest_norm():
    """For two gradients: p = clamp((|g2|^2 - <g1, g2>) / |g1 - g2|^2, 0, 1), Desideri 2012."""
    model, x = network(DOUBLE), batch(0, dtype=DOUBLE)
    g1, g2 = jacobian(model, lambda: two_losses(model, x))
    p = float(((g2 @ g2 - g1 @ g2) / (g1 - g2).square().sum()).clamp(0, 1))
    MGDA(sgd(model)).backward(two_losses(model, x))
    torch.testing.assert_close(flat_grad(model), p * g1 + (1 - p) * g2, rtol=1e-10, atol=1e-12)


def test_mgda_hurts_no_loss():
    """<g_i, d> >= |d|^2 for all i characterises the projection of zero on the convex hull."""
    model, x = network(DOUBLE), batch(0, dtype=DOUBLE)
    J = jacobian(model, lambda: three_losses(model, x))
    MGDA(sgd(model)).backward(three_losses(model, x))
    d = flat_grad(model)
    assert bool((J @ d >= (d @ d) * (1 - 1e-9)).all())


@pytest.mark.parametrize("c", [1.0, 1.7, 12.0])
def test_cagrad_with_a_large_radius_conflicts_with_no_loss(c):
    model, x = network(DOUBLE), batch(0, dtype=DOUBLE)
    J = jacobian(model, lambda: two_losses(model, x))
    assert (J @ J.T)[0, 1] < 0
    CAGrad(sgd(model), [0.9, 0.1], c=c).backward(two_losses(model, x))
    G = flat_grad(model)
    assert bool((J @ G / J.norm(dim=1) / G.norm() >= -1e-9).all())


@pytest.mark.parametrize("method", [CAGradClip, CAGrad])
def test_correction_has_the_length_of_the_radius(method):
    model, x = network(DOUBLE), batch(0, dtype=DOUBLE)
    J = jacobian(model, lambda: three_losses(model, x))
    g0 = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE) @ J
    method(sgd(model), [0.2, 0.5, 0.3], c=0.3).backward(three_losses(model, x))
    assert float((flat_grad(model) - g0).norm() / g0.norm()) == pytest.approx(0.3, rel=1e-9)


def test_number_of_losses_may_change_where_there_are_no_weights():
    model, x = network(DOUBLE), batch(0, dtype=DOUBLE)
    opt = MGDA(sgd(model))
    for losses in (two_losses, three_losses, two_losses):
        J = jacobian(model, lambda losses=losses: losses(model, x))
        opt.zero_grad()
        opt.backward(losses(model, x))
        assert opt.report.gram.shape == (len(J), len(J))
        assert bool((J @ flat_grad(model) > 0).all())


class Learnable(nn.Module):
    """A rule with parameters, as one that is trained itself has."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, gram):
        return self.logits.softmax(0)


def test_rule_with_parameters_leaves_no_graph_behind():
    model, x = network(DOUBLE), batch(0, dtype=DOUBLE)
    J = jacobian(model, lambda: two_losses(model, x))
    opt = MultiObjectiveOptimizer(sgd(model), Learnable())
    opt.backward(two_losses(model, x))
    alpha = torch.tensor([1.0, 2.0]).softmax(0).double()
    torch.testing.assert_close(flat_grad(model), alpha @ J)
    assert not any(p.grad.requires_grad for p in model.parameters())
    copy.deepcopy(opt)  # which torch refuses for tensors with a history
