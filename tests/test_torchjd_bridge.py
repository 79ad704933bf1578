"""TorchJD's weightings as rules, and TorchJD as a witness of our CAGrad and MGDA."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
import torchjd.aggregation as jd
from scipy.optimize import nnls
from torch import nn
from torchjd import Stateful
from torchjd.aggregation import Weighting
from torchjd.linalg import DualConeProjector

from raco_optim import MGDA, CAGrad, MultiObjectiveOptimizer
from raco_optim.rules import FunctionRule
from tests.problems_nn import (
    batch,
    bits,
    flat_grad,
    jacobian,
    network,
    three_losses,
    through_a_file,
    two_losses,
)

DOUBLE = torch.float64


class Projector(DualConeProjector):
    """Minimises v.Gv over v >= u. TorchJD's own needs two more packages for it."""

    def __call__(self, U, G):
        L = torch.linalg.cholesky(G).numpy()
        steps = [nnls(L.T, -L.T @ u.numpy())[0] for u in U.reshape(-1, len(G))]
        return U + torch.tensor(np.array(steps)).reshape(U.shape)


# name -> arguments; the aggregator has the weighting's name without "Weighting".
OF_A_GRAM = {
    "AlignedMTLWeighting": {},
    "CAGradWeighting": {"c": 0.4},
    "DualProjWeighting": {"projector": Projector()},
    "FairGradWeighting": {"alpha": 1.0},
    "GradVacWeighting": {},
    "IMTLGWeighting": {},
    "KrumWeighting": {"n_byzantine": 0, "n_selected": 2},
    "MGDAWeighting": {},
    "PCDWeighting": {},
    "PCGradWeighting": {},
    "UPGradWeighting": {"projector": Projector()},
}
# These use only the number of rows, which the Jacobian and the Gram matrix share.
OF_A_SHAPE = {"MeanWeighting": {}, "SumWeighting": {}, "RandomWeighting": {}}
# These need the Jacobian itself, which is never formed here.
OF_A_JACOBIAN = {"ExcessMTLWeighting", "MoDoWeighting", "SDMGradWeighting"}
# These need an argument that the others do not.
OTHERS = {"ConstantWeighting", "CRMOGMWeighting"}


def test_every_weighting_of_torchjd_is_accounted_for():
    found = {name for name in jd.__all__ if name.endswith("Weighting")} - {"Weighting"}
    assert found == OF_A_GRAM.keys() | OF_A_SHAPE.keys() | OF_A_JACOBIAN | OTHERS


def assert_steps_equal(weighting, aggregator, losses, *, steps=2):
    """Steps of SGD, as some weightings have a state; both sides draw the same random numbers."""
    model, x = network(DOUBLE), batch(0, dtype=DOUBLE)
    opt = MultiObjectiveOptimizer(torch.optim.SGD(model.parameters(), 0.1), weighting)
    for t in range(steps):
        J = jacobian(model, lambda: losses(model, x))
        torch.manual_seed(t)
        expected = aggregator(J)
        torch.manual_seed(t)
        opt.zero_grad()
        opt.backward(losses(model, x))
        torch.testing.assert_close(flat_grad(model), expected, rtol=1e-6, atol=1e-8)
        opt.step()


@pytest.mark.parametrize("losses", [two_losses, three_losses])
@pytest.mark.parametrize("name", OF_A_GRAM | OF_A_SHAPE)
def test_step_equals_the_aggregator_on_the_jacobian(name, losses):
    arguments = (OF_A_GRAM | OF_A_SHAPE)[name]
    if name == "KrumWeighting":
        losses = three_losses  # it asks for three rows
    weighting = getattr(jd, name)(**arguments)
    aggregator = getattr(jd, name.removesuffix("Weighting"))(**arguments)
    assert_steps_equal(weighting, aggregator, losses)


def test_constant_and_smoothed_weightings():
    weights = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    assert_steps_equal(jd.ConstantWeighting(weights), jd.Constant(weights), two_losses)
    smoothed = jd.CRMOGMWeighting(jd.PCGradWeighting())
    witness = jd.WeightedAggregator(
        jd.CRMOGMWeighting(jd.PCGradWeighting()) << (lambda J: J @ J.T)  # its state is its own
    )
    assert_steps_equal(smoothed, witness, two_losses, steps=3)


def test_optimizer_with_a_weighting_is_copied_saved_and_shown():
    """A weighting is a module; its state moves with the copies."""
    model = network(DOUBLE)
    adam, weighting = (
        torch.optim.AdamW(model.parameters()),
        jd.UPGradWeighting(projector=Projector()),
    )
    opt = MultiObjectiveOptimizer(adam, weighting, weights=[0.5, 0.5])
    opt.backward(two_losses(model, batch(0, dtype=DOUBLE)))
    opt.step()
    assert "UPGradWeighting" in repr(opt)
    for copied in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert isinstance(copied.rule, Weighting)
    opt.load_state_dict(through_a_file(opt.state_dict()))


STATEFUL = {
    "GradVacWeighting": jd.GradVacWeighting,
    "PCDWeighting": jd.PCDWeighting,
    "CRMOGMWeighting": lambda: jd.CRMOGMWeighting(jd.PCGradWeighting()),
    "CRMOGMWeighting of another": lambda: jd.CRMOGMWeighting(
        jd.GradVacWeighting(), alpha=0.7, initial_weights=torch.ones(3, dtype=DOUBLE)
    ),
}


def test_every_stateful_weighting_is_accounted_for():
    stateful = {
        name
        for name in OF_A_GRAM.keys() | OF_A_SHAPE.keys() | OTHERS
        if issubclass(getattr(jd, name), Stateful)
    }
    assert stateful == {name.partition(" ")[0] for name in STATEFUL}


def run(opt, model, steps):
    """Steps with their own random numbers; returns the Gram matrices and the coefficients."""
    seen = []
    for t in steps:
        torch.manual_seed(t)
        opt.zero_grad()
        opt.backward(three_losses(model, batch(0, dtype=DOUBLE)))
        opt.step()
        seen.append((opt.report.gram, opt.report.coefficients))
    return seen


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL.keys())
def test_resuming_with_a_stateful_weighting_equals_not_stopping(make):
    """To the bit, with TorchJD's own object, which never stops, as the witness."""

    def start():
        model = network(DOUBLE)
        adam = torch.optim.Adam(model.parameters(), 0.01)
        return MultiObjectiveOptimizer(adam, make(), weights=[0.5, 0.25, 0.25]), model

    whole, resumed, anew = start(), start(), start()
    first = run(*whole, range(3))
    state, weights = through_a_file(whole[0].state_dict()), copy.deepcopy(whole[1].state_dict())
    expected = run(*whole, range(3, 6))
    for opt, model in (resumed, anew):
        model.load_state_dict(weights)
        if opt is resumed[0]:
            opt.load_state_dict(state)
    later = run(*resumed, range(3, 6))
    witness = make()
    for t, (gram, alpha) in enumerate([*first, *later]):
        torch.manual_seed(t)
        assert torch.equal(alpha, witness(gram))
    assert bits(later) == bits(expected)
    assert bits(list(resumed[1].parameters())) == bits(list(whole[1].parameters()))
    assert not torch.equal(run(*anew, range(3, 6))[-1][1], expected[-1][1])


def test_a_state_of_another_weighting_is_refused():
    for (name, make), (other_name, other) in itertools.permutations(STATEFUL.items(), 2):
        rule, fresh = FunctionRule(make()), FunctionRule(other())
        torch.manual_seed(0)
        rule(torch.eye(3, dtype=DOUBLE), [1 / 3] * 3)
        state, before = through_a_file(rule.state_dict()), str(fresh.state_dict())
        with pytest.raises(ValueError, match="`state` of the rule must"):
            fresh.load_state_dict(state)
        assert str(fresh.state_dict()) == before, (name, other_name)


def conflicting(m, seed):
    """Rows of moderate norms, where TorchJD is exact: it returns zero for small ones."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(20, generator=generator, dtype=DOUBLE)
    return 0.3 * common + torch.randn(m, 20, generator=generator, dtype=DOUBLE)


def combined(method, J):
    """The combined gradient for losses with these gradients."""
    x = nn.Parameter(torch.zeros(J.shape[1], dtype=DOUBLE))
    method(torch.optim.SGD([x], 0.1)).backward(list(J @ x))
    return x.grad


@pytest.mark.parametrize("m", [2, 3, 6])
@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 2.0])
def test_cagrad_with_uniform_weights_is_torchjds(m, c):
    """Both are g0 + c |g0| G_p / |G_p| with the mean g0, without the factor 1 / (1 + c^2).

    TorchJD's interior-point method is good to about 1e-7 in Phi, hence to its root in p.
    """
    for seed in range(2):
        J = conflicting(m, seed)
        found = combined(lambda inner: CAGrad(inner, [1 / m] * m, c=c), J)
        expected = jd.CAGrad(c=c)(J)
        assert float((found - expected).norm() / expected.norm()) < 1e-3
        # The dual of the subproblem: the step maximises the least improvement within the radius.
        g0 = J.mean(dim=0)
        assert float((found - g0).norm()) <= c * float(g0.norm()) * (1 + 1e-9)
        assert float((J @ found).min()) >= float((J @ expected).min()) - 1e-6 * float(g0.norm())


@pytest.mark.parametrize("m", [2, 3, 6])
def test_mgda_is_torchjds_or_shorter(m):
    """TorchJD stops its Frank-Wolfe iteration at 1e-3; the point sought is the shortest."""
    for seed in range(2):
        J = conflicting(m, seed)
        found = combined(MGDA, J)
        expected = jd.MGDA(epsilon=1e-6, max_iters=20_000)(J)
        assert float(found.norm()) <= float(expected.norm()) * (1 + 1e-12)
        assert float((found - expected).norm()) < 0.02 * float(expected.norm())
