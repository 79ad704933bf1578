"""The rules: absent losses, critical points and state."""

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchjd.aggregation import GradVacWeighting

from raco_optim import (
    MixingCoefficients,
    MultiObjectiveOptimizer,
    min_norm_point,
    mixing_coefficients,
)
from raco_optim.rules import CAGradRule, FunctionRule, LinearRule, MinNormRule, Rule
from tests.oracles import exact_minimum
from tests.problems_nn import through_a_file
from tests.samplers import SAMPLERS, problem, simplex_point

KINDS = sorted(SAMPLERS)
CLIPS = ("hard", "soft", "none")
SOLVERS = ("exact", "pgd", "slsqp")
DOUBLE = torch.float64


def random_gram(m: int, seed: int = 0) -> torch.Tensor:
    g = torch.randn(m, 2 * m, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return g @ g.T


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("m", [1, 2, 3])
def test_absent_losses_leave_the_others_their_correction(m, solver):
    """Section 2: p and p~ for w / W, and alpha = W alpha(H, w / W), from the definition."""
    for seed in range(3):
        gram = random_gram(m, seed)
        w = np.random.default_rng(seed).dirichlet(np.ones(m + 1))[:m]  # the last loss is absent
        total = w.sum()
        share, H = w / total, gram.numpy()
        p = exact_minimum(H, simplex_point(share), 0.4).p
        clipped = np.minimum(p, share)
        length = 0.4 * np.sqrt(share @ H @ share) / np.sqrt(clipped @ H @ clipped)
        mixing = CAGradRule(0.4, solver=solver)(gram, w.tolist())
        np.testing.assert_allclose(mixing.p, p, atol=1e-6)
        np.testing.assert_allclose(mixing.p_clipped, clipped, atol=1e-6)
        alpha = total * (share + length * clipped)
        np.testing.assert_allclose(mixing.coefficients, alpha, rtol=1e-5)
        # The combined gradient is c W |g0'| from the weighted one: c times |g0| of those present.
        step = mixing.coefficients.numpy() - w
        assert np.sqrt(step @ H @ step) == pytest.approx(0.4 * np.sqrt(w @ H @ w))


@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(0, 2**32), st.floats(0.01, 1))
def test_without_a_radius_the_weights_stay_to_the_bit(kind, m, seed, total):
    case = problem(kind, m, seed)
    w = (case.weights * total).tolist()
    for solver in SOLVERS:
        mixing = CAGradRule(0, solver=solver)(torch.from_numpy(case.gram), w)
        assert mixing.coefficients.tolist() == w


def test_only_losses_without_a_weight_are_present():
    for solver, m in itertools.product(SOLVERS, (1, 2, 4)):
        mixing = CAGradRule(0.4, solver=solver)(random_gram(m), [0.0] * m)
        assert mixing.coefficients.tolist() == mixing.p_clipped.tolist() == [0.0] * m
        assert mixing.p.tolist() == [1 / m] * m
        assert float(mixing.gap) == 0


def test_settings_are_checked_when_they_are_set():
    rule = CAGradRule(0.4)
    for name, bad in (("c", 1.0), ("c", -0.1), ("clip", "harder"), ("solver", "newton")):
        with pytest.raises(ValueError, match=f"`{name}` must"):
            setattr(rule, name, bad)
        with pytest.raises(ValueError, match=f"`{name}` must"):
            CAGradRule(**{"c": 0.4, name: bad})
    assert rule.settings() == {"c": 0.4, "clip": "hard", "solver": "exact"}
    assert CAGradRule(1.5, below_one=False).c == 1.5
    gram, w = random_gram(3), [0.5, 0.25, 0.25]
    for rule.clip, rule.solver in itertools.product(CLIPS, SOLVERS):
        rule.c = 0.3
        assert repr(rule) == f"CAGradRule(c=0.3, clip={rule.clip!r}, solver={rule.solver!r})"
        found = rule(gram, w)
        expected = mixing_coefficients(gram, w, 0.3, clip=rule.clip, solver=rule.solver)
        for name in ("coefficients", "p", "p_clipped", "gap"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


def test_the_radius_is_the_state():
    rule, other = CAGradRule(0.3), CAGradRule(0.9)
    other.load_state_dict(through_a_file(rule.state_dict()))
    assert other.c == 0.3
    for bad in ({}, {"c": 1.0}, {"c": "0.3"}, {"c": 0.3, "d": 1}, None, 0.3, {"c": None}):
        for refuse in (rule.check_state, rule.load_state_dict):
            with pytest.raises(ValueError, match="must"):
                refuse(bad)
    assert rule.c == 0.3
    CAGradRule(0.3, below_one=False).load_state_dict({"c": 1.0})


@pytest.mark.parametrize("rule", [CAGradRule(0.4), LinearRule(), MinNormRule()])
def test_rules_of_the_library(rule):
    assert rule.deterministic
    gram = random_gram(3)
    kept = gram.clone()
    first, again = rule(gram, [0.2, 0.3, 0.4]), rule(gram, [0.2, 0.3, 0.4])
    assert torch.equal(first.coefficients, again.coefficients)
    assert torch.equal(gram, kept)
    for copied in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert repr(copied) == repr(rule)
        assert torch.equal(copied(gram, [0.2, 0.3, 0.4]).coefficients, first.coefficients)


def worst_product(gradients: torch.Tensor, weights, mixing: MixingCoefficients) -> float:
    """min_i <g_i, d> / (|g_i| |g_0|), with d summed as a step does, in the gradients' precision."""
    d = torch.zeros_like(gradients[0])
    for gradient, a in zip(gradients, mixing.coefficients.tolist(), strict=True):
        d.add_(gradient, alpha=a)
    g, g0 = gradients.double(), torch.tensor(weights).double() @ gradients.double()
    return float(((g @ d.double()) / (g.norm(dim=1) * g0.norm()).clamp(min=1e-300)).min())


def nearly_critical(m: int, left: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """m gradients with a convex combination that vanishes but for about `left` of its terms."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(m, 200, generator=generator, dtype=DOUBLE)
    v = torch.rand(m, generator=generator, dtype=DOUBLE) + 0.2
    g[-1] = -(v[:-1] @ g[:-1]) / v[-1]
    g[-1] += left * torch.randn(200, generator=generator, dtype=DOUBLE)
    return g.to(dtype)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("c", [1.0, 1.01, 1.5, 2.0])
def test_no_loss_rises_near_a_critical_point(c, solver):
    """<g_i, d> >= 0, whatever is left of the combination: nothing, rounding, little or much."""
    step = 0.5 if solver == "exact" else 1.5
    lefts = (0.0, *10.0 ** np.arange(-9, 0.5, step))
    for dtype, m, (seed, left) in itertools.product(
        (torch.float32, DOUBLE), (2, 3, 5), enumerate(lefts)
    ):
        g = nearly_critical(m, left, seed, dtype)
        w = simplex_point(np.random.default_rng(seed).dirichlet(np.ones(m)) + 0.1).tolist()
        H = g.double() @ g.double().T
        mixing = CAGradRule(c, "none", solver, below_one=False)(H, w)
        allowed = 1e-3 if dtype == torch.float32 else 1e-7
        assert worst_product(g, w, mixing) >= -allowed, (dtype, m, left, seed)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("clip", "c"), [("hard", 1.5), ("hard", 2.0), ("soft", 2.0), ("none", 1.5)]
)
def test_a_critical_point_is_left_alone(clip, c, solver):
    for (m, seed), dtype in itertools.product(
        ((2, 0), (3, 0), (3, 1), (7, 0)), (torch.float32, DOUBLE)
    ):
        g = nearly_critical(m, 0.0, seed, dtype).double()
        weights = [1 / m] * m if dtype == DOUBLE else [0.5] + [0.5 / (m - 1)] * (m - 1)
        mixing = mixing_coefficients(g @ g.T, weights, c, clip=clip, solver=solver)
        assert mixing.coefficients.tolist() == [0.0] * m
        assert float(mixing.p.sum()) == pytest.approx(1)
        # Below 1 nothing is promised of it, and the step is the weighted gradient.
        below = mixing_coefficients(g @ g.T, weights, 0.999, clip=clip, solver=solver)
        assert (below.coefficients >= torch.tensor(weights, dtype=DOUBLE) - 1e-15).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_radius_of_one_leaves_nothing_of_g0_at_a_critical_point(solver):
    """G_p is long there and points against g0: d would be their rounding error, so it is zero.

    Adam would scale a rounding error to a whole step.
    """
    for m, seed in itertools.product((2, 3, 5), range(6)):
        g = nearly_critical(m, 0.0, seed, DOUBLE)
        w = simplex_point(np.random.default_rng(seed).dirichlet(np.ones(m)) + 0.1)
        mixing = mixing_coefficients(g @ g.T, w, 1.0, clip="none", solver=solver)
        assert mixing.coefficients.tolist() == [0.0] * m


@pytest.mark.parametrize("c", [1.0, 1.5, 2.0])
def test_elsewhere_a_large_radius_moves(c):
    """A critical point is no excuse: where a thousandth is left, |d - g0| = c |g0|."""
    for m, seed, left in itertools.product((2, 3, 5), range(3), (1e-3, 1e-2, 0.1, 1.0)):
        g = nearly_critical(m, left, seed, DOUBLE)
        g += left * g.norm(dim=1).mean() * torch.eye(1, 200, dtype=DOUBLE)
        mixing = mixing_coefficients(g @ g.T, [1 / m] * m, c, clip="none")
        d, g0 = mixing.coefficients @ g, g.mean(0)
        assert float((d - g0).norm() / g0.norm()) == pytest.approx(c, rel=1e-6)
        assert (g @ d >= 0).all()


def test_clipping_that_leaves_nothing_is_no_critical_point():
    """p~ = 0 because p and w share no loss; the gradients do not vanish, and g0 stays."""
    for c in (0.4, 1.02):
        mixing = mixing_coefficients([[1.0, -0.45], [-0.45, 0.25]], [1.0, 0.0], c)
        assert mixing.p.tolist() == [0.0, 1.0]
        assert mixing.p_clipped.tolist() == [0.0, 0.0]
        assert mixing.coefficients.tolist() == [1.0, 0.0]


def test_linear_rule_returns_the_weights():
    mixing = LinearRule()(random_gram(3).float(), [0.2, 0.3, 0.1])
    assert mixing.coefficients.tolist() == [0.2, 0.3, 0.1]
    assert mixing.p is None
    with pytest.raises(NotImplementedError):  # the base class computes nothing
        Rule()(torch.eye(2), [0.5, 0.5])


def test_min_norm_rule_is_the_min_norm_point():
    gram = torch.from_numpy(problem("conflicting", 4, 0).gram)
    mixing, point = MinNormRule()(gram, [0.7, 0.1, 0.1, 0.1]), min_norm_point(gram)
    assert torch.equal(mixing.coefficients, point.p)
    assert torch.equal(mixing.p, point.p)
    assert torch.equal(mixing.gap, point.gap)
    norm = float((point.p @ gram @ point.p).sqrt())
    assert float(point.norm) == pytest.approx(norm, abs=1e-7)


@pytest.mark.parametrize("rule", [LinearRule(), MinNormRule(), FunctionRule(lambda gram: gram[0])])
def test_rules_without_a_state(rule):
    assert rule.state_dict() == {}
    rule.load_state_dict({})
    for bad in ({"c": 0.4}, None, [], 1):
        with pytest.raises(ValueError, match="`state` of the rule must"):
            rule.check_state(bad)


def test_a_rule_with_a_memory_warns_when_losses_are_absent():
    """TorchJD's GradVac starts its memory anew when the number of losses changes."""

    def optimizer(function):
        return MultiObjectiveOptimizer(torch.optim.SGD([x], 0.1), function)

    weighting, x = GradVacWeighting(), nn.Parameter(torch.ones(2))
    opt = optimizer(weighting)
    opt.backward([x.sum(), x.prod(), x.square().sum()])
    assert weighting._phi_t.shape == (3, 3)
    with pytest.warns(UserWarning, match="2 losses after 3.*GradVacWeighting"):
        opt.backward([x.sum(), None, x.square().sum()])
    assert weighting._phi_t.shape == (2, 2)
    opt.backward([x.sum(), x.prod(), x.square().sum()])  # once
    plain = optimizer(lambda gram: gram.new_ones(len(gram)))
    plain.backward([x.sum(), x.prod()])
    plain.backward([x.sum(), None])


def test_function_gets_a_copy_and_leaves_no_graph():
    logits = nn.Parameter(torch.zeros(2))

    def spoil(gram):
        gram.fill_(7)
        return logits.softmax(0)

    gram = random_gram(2)
    kept = gram.clone()
    mixing = FunctionRule(spoil)(gram, [0.5, 0.5])
    assert torch.equal(gram, kept)
    assert not mixing.coefficients.requires_grad
    assert not FunctionRule(spoil).deterministic


@pytest.mark.parametrize(
    ("result", "error", "words"),
    [
        ([0.5, 0.5], TypeError, "must return a tensor or MixingCoefficients; got list"),
        (None, TypeError, "got NoneType"),
        (torch.ones(3), ValueError, r"shape \[2\], one coefficient per loss; got shape \[3\]"),
        (torch.ones(2, 1), ValueError, r"got shape \[2, 1\]"),
        (torch.ones(2, dtype=torch.int64), ValueError, "dtype torch.int64"),
        (torch.ones(2, dtype=torch.complex64), ValueError, "dtype torch.complex64"),
        (MixingCoefficients(torch.ones(3)), ValueError, r"got shape \[3\]"),
    ],
)
def test_results_of_a_function_are_checked(result, error, words):
    with pytest.raises(error, match=words):
        FunctionRule(lambda gram: result)(torch.eye(2, dtype=DOUBLE), [0.5, 0.5])


def test_functions_are_checked():
    for function in (None, 0.5, "mean", [0.5, 0.5], nn.Identity, FunctionRule):
        with pytest.raises(TypeError, match="`rule` must be a callable"):
            FunctionRule(function)


class Average:
    """The average Gram matrix decides; an object of a user's own, with attributes of all kinds."""

    def __init__(self, decay=0.5):
        self.decay = decay
        self.total = 0.0
        self.history, self.seen, self.notes = [], {}, None
        self.function = torch.sqrt

    def __call__(self, gram):
        self.total = self.decay * self.total + gram
        self.steps = getattr(self, "steps", 0) + 1  # an attribute made later
        self.history.append((self.steps, gram.trace()))
        self.seen[self.steps] = {"shape": gram.shape, "dtype": gram.dtype, "kinds": {1, "a"}}
        self.notes = "ran"
        return 1 / self.function(self.total.diagonal()) + self.history[0][1] / 1000


class OwnState:
    """An object with its own `state_dict`."""

    def __init__(self):
        self.count, self.unsaved = torch.zeros(()), object()

    def __call__(self, gram):
        self.count += 1
        return gram.diagonal() / self.count

    def state_dict(self):
        return {"count": self.count.clone()}

    def load_state_dict(self, state):
        self.count = state["count"].clone().reshape(())


class Nested(nn.Module):
    """Buffers of all kinds, a parameter and plain attributes, in a submodule."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=DOUBLE))
        self.inner = nn.Module()
        self.inner.register_buffer("mean", None)
        self.inner.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.inner.key = None

    def forward(self, gram):
        self.inner.mean = gram if self.inner.mean is None else 0.9 * self.inner.mean + 0.1 * gram
        self.inner.steps += 1
        self.inner.key = (len(gram), gram.dtype)
        self.scale.mul_(1.1)
        return self.scale * self.inner.mean.diagonal() / self.inner.steps


STATEFUL = {
    "attributes": Average,
    "own state": OwnState,
    "module": Nested,
    "bound method": lambda: Average().__call__,
}


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL.keys())
def test_resuming_equals_not_stopping(make):
    witness, rule, resumed, fresh = make(), FunctionRule(make()), FunctionRule(make()), make()
    w, grams = [0.2, 0.3, 0.5], [random_gram(3, seed) for seed in range(6)]
    parameter = getattr(resumed.function, "scale", None)
    with torch.no_grad():
        for gram in grams[:3]:
            assert torch.equal(rule(gram, w).coefficients, witness(gram.clone()))
        state = through_a_file(rule.state_dict())
        resumed.check_state(state)
        for gram in grams[3:]:  # the state is a copy
            rule(gram, w)
        resumed.load_state_dict(state)
        assert getattr(resumed.function, "scale", None) is parameter, "the same tensor"
        for gram in grams[3:]:
            expected = witness(gram.clone())
            assert torch.equal(resumed(gram, w).coefficients, expected)
            assert not torch.equal(fresh(gram.clone()), expected)


def spoilt(state):
    """States that do not fit the rule."""
    yield from (list(state.items()), None, {}, dict(list(state.items())[1:]))
    if "attributes" not in state:
        yield {"function": {}}
        return
    attributes = state["attributes"]
    first = next(iter(attributes))
    yield {**state, "attributes": 1}
    for bad in (
        {k: v for k, v in attributes.items() if k != first},
        {"no.such.part": 1, **attributes},
        {**attributes, first: object()},
        dict.fromkeys(attributes, "text"),
    ):
        yield {**state, "attributes": bad}


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL.keys())
def test_a_bad_state_changes_nothing(make):
    w, gram = [0.5, 0.5], random_gram(2)
    rule, source = FunctionRule(make()), FunctionRule(make())
    for seed in range(3):
        source(random_gram(2, seed), w)
    rule(gram, w)
    before = copy.deepcopy(rule)
    for bad in spoilt(source.state_dict()):
        for refuse in (rule.check_state, rule.load_state_dict):
            with pytest.raises(ValueError, match="`state` of the rule must"):
                refuse(bad)
        assert str(rule.state_dict()) == str(before.state_dict())
    assert torch.equal(rule(gram, w).coefficients, before(gram, w).coefficients)


def test_entries_that_do_not_fit():
    rule = FunctionRule(Nested())
    rule(random_gram(2), [0.5, 0.5])
    state = rule.state_dict()
    for key, value in (
        ("scale", 1.0),
        ("scale", torch.ones(2, dtype=DOUBLE)),
        ("scale", torch.ones(())),  # float32
        ("inner.mean", "mean"),
        ("inner.steps", 3),
        ("inner._modules", {}),
    ):
        with pytest.raises(ValueError, match=f"`state` of the rule must .*{key}"):
            rule.load_state_dict({**state, "attributes": {**state["attributes"], key: value}})
        assert str(rule.state_dict()) == str(state)


def test_tensors_of_the_host_stay_there(monkeypatch):
    """`map_location` moves every tensor of a checkpoint, but GradVac works on the host."""
    rule = FunctionRule(Nested())
    rule(random_gram(2), [0.5, 0.5])
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    moved = torch.load(file, weights_only=True, map_location="meta")
    assert moved["attributes"]["inner.mean"].device.type == "meta"
    asked = []
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, device: (asked.append(device), to(x, "meta"))[1]
    )
    rule.check_state(moved)
    assert asked == ["cpu"] * 3


def test_attributes_of_a_function():
    def count(gram):
        count.calls += 1
        return gram.diagonal() * count.calls

    count.calls = 0
    rule = FunctionRule(count)
    rule(random_gram(2), [0.5, 0.5])
    state = through_a_file(rule.state_dict())
    count.calls = 7
    rule.load_state_dict(state)
    assert count.calls == 1
    state["attributes"]["other"] = 1
    with pytest.raises(ValueError, match="no attribute 'other'"):
        rule.load_state_dict(state)


@pytest.mark.parametrize("base", [torch.optim.SGD, nn.Linear])
def test_a_method_of_a_model_or_an_optimizer_has_no_state_of_its_own(base):
    """They are in a checkpoint of their own; a method of the wrapper would lead back to it."""

    class Owner(base):
        def weigh(self, gram):
            return gram.new_ones(len(gram))

    owner = Owner(2, 2) if base is nn.Linear else Owner([nn.Parameter(torch.ones(1))], 0.1)
    assert FunctionRule(owner.weigh).state_dict() == {}

    class Bound(MultiObjectiveOptimizer):
        def __init__(self, inner):
            super().__init__(inner, self.weigh)

        weigh = Owner.weigh

    opt = Bound(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1))
    opt.load_state_dict(opt.state_dict())


def test_attributes_that_a_checkpoint_cannot_hold():
    rule = FunctionRule(Average())
    rule.function.history = np.zeros(2)
    with pytest.warns(UserWarning, match="'history' of type ndarray, which a checkpoint can't"):
        state = through_a_file(rule.state_dict())
    fresh = FunctionRule(Average())
    fresh.load_state_dict(state)
    assert fresh.function.history == []
