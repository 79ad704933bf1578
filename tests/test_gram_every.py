"""One Gram matrix for several steps: when it is computed anew, and what is new in each step."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from raco_optim import MGDA, CAGradClip, MultiObjectiveOptimizer, Outcome, mixing_coefficients
from tests.problems_nn import (
    INNER,
    NAMES,
    WRAPPERS,
    as_asked,
    batch,
    bits,
    everything,
    flat_grad,
    inverse_norms,
    jacobian,
    network,
    three_losses,
    through_a_file,
    train_step,
    two_losses,
)

DOUBLE = torch.float64
WEIGHTS = [0.5, 0.2, 0.3]
# name -> what is passed as `gram`
MODES = {
    "dense": lambda model: "dense",
    "ghost": lambda model: "ghost",
    "representation": lambda model: "representation",
    "subset": lambda model: model[0].parameters(),
}
ALL_MODES = pytest.mark.parametrize("mode", MODES)
EXACT_MODES = pytest.mark.parametrize("mode", ["dense", "ghost"])
METHODS = {
    "CAGradClip": lambda inner, **kw: CAGradClip(inner, WEIGHTS, 0.6, **kw),
    "MGDA": MGDA,
    "rule": lambda inner, **kw: MultiObjectiveOptimizer(inner, inverse_norms, **kw),
}


def wrapped(model, every, mode="dense", make=METHODS["CAGradClip"], **kwargs):
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    return make(inner, gradients=MODES[mode](model), gram_every=every, **kwargs)


def forward(model, x):
    """The representation and three losses that are computed from it."""
    z = model[1](model[0](x))
    return z, three_losses(lambda _: model[2](z), x)


def combine(opt, mode, model, x, absent=()):
    z, losses = forward(model, x)
    losses = [None if i in absent else loss for i, loss in enumerate(losses)]
    opt.backward(losses, **({"representation": z} if mode == "representation" else {}))


def train(opt, mode, model, steps, absent=()):
    for t in steps:
        opt.zero_grad()
        combine(opt, mode, model, batch(t, dtype=DOUBLE), absent)
        opt.step()


def gram_of(mode, model, x, absent=()):
    """H by one forward pass and one call of autograd per loss."""
    rows = []
    for i in range(3):
        z, losses = forward(model, x)
        inputs = {"representation": [z], "subset": list(model[0].parameters())}
        inputs = inputs.get(mode, list(model.parameters()))
        row = torch.cat([g.flatten() for g in torch.autograd.grad(losses[i], inputs)])
        rows.append(row * 0 if i in absent else row)
    J = torch.stack(rows)
    return J @ J.T


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("method", ["CAGradClip", "named", "MGDA", "rule"])
def test_every_step_is_the_default_in_every_bit(inner, method):
    makes = {
        **{name: lambda i, name=name, **kw: same(WRAPPERS[name](i), **kw) for name in WRAPPERS},
        "MGDA": MGDA,
    }

    def same(opt, **kwargs):
        kind = type(opt)
        if kind is CAGradClip:
            return kind(opt.optimizer, opt.weights, opt.c, **kwargs)
        return kind(opt.optimizer, opt.rule, **kwargs)

    model, plain = network(), network()
    opt = makes[method](INNER[inner](model.parameters()), gram_every=1)
    default = makes[method](INNER[inner](plain.parameters()))
    for t in range(3):
        train_step(opt, model, batch(t))
        train_step(default, plain, batch(t))
        assert opt.report.gram_age == 0
    assert everything(model, opt) == everything(plain, default)


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("method", METHODS)
@ALL_MODES
def test_gram_is_computed_every_k_steps_and_all_else_in_each(mode, method, every):
    model = network(DOUBLE)
    opt = wrapped(model, every, mode, METHODS[method])
    expected = None
    for t in range(2 * every + 1):
        x = batch(t, dtype=DOUBLE)
        if t % every == 0:
            expected = gram_of(mode, model, x)
        J, values = jacobian(model, lambda x=x: forward(model, x)[1]), forward(model, x)[1]
        opt.zero_grad()
        combine(opt, mode, model, x)
        report = opt.report
        assert report.gram_age == t % every
        torch.testing.assert_close(report.gram, expected, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(report.losses, torch.stack(values).detach())
        combined = report.coefficients @ J
        torch.testing.assert_close(flat_grad(model), combined, rtol=1e-9, atol=1e-11)
        if t % every:
            newer = gram_of(mode, model, x)
            assert (newer - expected).norm() > 1e-3 * expected.norm(), "the test sees a difference"
        opt.step()


@ALL_MODES
def test_heads_get_the_weighted_sum_between_too(mode):
    model = network(DOUBLE)
    opt = wrapped(model, 3, mode, shared_parameters=model[0].parameters())
    part = torch.cat([torch.full([p.numel()], k < 2) for k, p in enumerate(model.parameters())])
    for t in range(4):
        x = batch(t, dtype=DOUBLE)
        J = jacobian(model, lambda x=x: forward(model, x)[1])
        if t % 3 == 0:
            H = gram_of(mode, model, x) if mode == "representation" else J * part @ J.T
        opt.zero_grad()
        combine(opt, mode, model, x)
        torch.testing.assert_close(opt.report.gram, H)
        weighted = torch.tensor(WEIGHTS, dtype=DOUBLE) @ J
        expected = torch.where(part, opt.report.coefficients @ J, weighted)
        torch.testing.assert_close(flat_grad(model), expected)
        opt.step()


@pytest.mark.parametrize("mode", ["dense", "ghost", "subset"])
def test_between_there_is_one_backward_pass(mode):
    model = network(DOUBLE)
    opt = wrapped(model, 3, mode)
    counts = []
    for t in range(4):
        passes = []
        h = model[0](batch(t, dtype=DOUBLE))
        h.register_hook(lambda grad, passes=passes: passes.append(1))
        out = model[2](model[1](h))
        opt.backward([out[:, 0].square().mean(), (out[:, 1] - 1).square().mean(), out.exp().mean()])
        counts.append(len(passes))
    due = 4 if mode == "subset" else 3
    assert counts == [due, 1, 1, due]


def test_radius_and_weights_take_effect_at_once():
    model = network(DOUBLE)
    opt = wrapped(model, 5)
    train(opt, "dense", model, range(1))
    H = opt.report.gram
    for t, (weights, c) in enumerate([([0.1, 0.1, 0.8], 0.2), ([0.3, 0.4, 0.3], 0.9)], start=1):
        opt.weights, opt.c = weights, c
        x = batch(t, dtype=DOUBLE)
        J = jacobian(model, lambda x=x: forward(model, x)[1])
        opt.zero_grad()
        combine(opt, "dense", model, x)
        assert torch.equal(opt.report.gram, H)
        expected = mixing_coefficients(H, weights, c)
        assert torch.equal(opt.report.coefficients, expected.coefficients)
        assert torch.equal(opt.report.p, expected.p)
        torch.testing.assert_close(flat_grad(model), expected.coefficients @ J)
        assert opt.report.gram_age == t
    opt.c = 0.0
    train(opt, "dense", model, range(1))
    assert opt.report.outcome is Outcome.WEIGHTED_SUM


@ALL_MODES
def test_other_absent_losses_ask_for_a_new_gram(mode):
    model = network(DOUBLE)
    opt = wrapped(model, 3, mode)
    ages = []
    for t, absent in enumerate([(), (), (1,), (1,), (0,), (), (), (), ()]):
        x = batch(t, dtype=DOUBLE)
        H = gram_of(mode, model, x, absent)
        J = jacobian(model, lambda x=x: forward(model, x)[1])
        J[list(absent)] = 0
        opt.zero_grad()
        combine(opt, mode, model, x, absent)
        ages.append(opt.report.gram_age)
        if ages[-1] == 0:
            torch.testing.assert_close(opt.report.gram, H)
        assert opt.report.absent == tuple(map(str, absent))
        torch.testing.assert_close(flat_grad(model), opt.report.coefficients @ J)
        opt.step()
    assert ages == [0, 1, 0, 1, 0, 0, 1, 2, 0]


def test_another_number_of_losses_asks_for_a_new_gram():
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = MGDA(torch.optim.SGD([x], 0.0), gram_every=3)
    ages = []
    for m in (2, 2, 3, 3, 2):
        opt.backward([x[0], x.prod(), x[1] ** 2][:m])
        ages.append(opt.report.gram_age)
    assert ages == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("method", ["MGDA", "rule"])
@pytest.mark.parametrize("others", [("b", "a"), ("c", "d")], ids=["order", "names"])
def test_losses_that_name_themselves_are_matched(method, others):
    """Without weights, each mapping brings its own names, in any order."""
    x = nn.Parameter(torch.tensor([1.0, 1.0]))
    opt = METHODS[method](torch.optim.SGD([x], 0.1), gram_every=2)
    opt.backward({"a": x[0], "b": 3 * x[1]})
    first = dict(zip(opt.report.names, opt.report.coefficients.tolist(), strict=True))
    values = {"a": x[0], "b": 3 * x[1], "c": 5 * x[0], "d": x[1]}
    opt.backward({name: values[name] for name in others})
    second = dict(zip(opt.report.names, opt.report.coefficients.tolist(), strict=True))
    if others == ("c", "d"):
        assert opt.report.gram_age == 0
    else:
        assert second == pytest.approx(first)


@pytest.mark.parametrize("form", ["list", "mapping"])
def test_named_losses_may_come_in_any_order(form):
    x = nn.Parameter(torch.tensor([1.0, 1.0]))
    weights = dict(zip(NAMES, [0.6, 0.4], strict=True))
    opt = MGDA(
        torch.optim.SGD([x], 0.1), weights if form == "mapping" else [0.6, 0.4], gram_every=3
    )
    for t in range(3):
        losses = {NAMES[0]: x[0], NAMES[1]: 3 * x[1]}
        if t == 1:
            losses = dict(reversed(losses.items()))
        opt.zero_grad()
        opt.backward(losses if form == "mapping" else [losses[name] for name in NAMES])
        assert (opt.report.gram_age, x.grad.tolist()) == (t, pytest.approx([0.9, 0.3]))


class Untouched:
    """An optimizer in mid-schedule, and a twin that no failed call happens to."""

    def __init__(self, steps, mode="dense", every=3, **kwargs):
        self.mode, self.model = mode, network(DOUBLE)
        self.opt = wrapped(self.model, every, mode, **kwargs)
        train(self.opt, mode, self.model, range(steps))
        self.opt.zero_grad()
        self.twin, self.twin_opt = copy.deepcopy((self.model, self.opt))

    def check(self, steps=5):
        assert everything(self.model, self.opt) == everything(self.twin, self.twin_opt)
        for t in range(10, 10 + steps):
            train(self.opt, self.mode, self.model, [t])
            train(self.twin_opt, self.mode, self.twin, [t])
            assert self.opt.report.gram_age == self.twin_opt.report.gram_age
            assert torch.equal(self.opt.report.gram, self.twin_opt.report.gram)
        assert everything(self.model, self.opt) == everything(self.twin, self.twin_opt)


def wrong(model, case):
    z, losses = forward(model, batch(7, dtype=DOUBLE))
    losses[1] = {
        "callable": lambda: losses[0],
        "number": 1.0,
        "NaN": losses[1] * math.nan,
        "NaN gradient": (losses[1] * 0).abs().sqrt(),
        "vector": losses[1].expand(2),
        "empty": losses[1].expand(0),
        "no graph": losses[1].detach(),
        "constant": torch.tensor(1.0),
        "complex": losses[1] * 1j,
        "foreign": nn.Parameter(torch.ones(())) * 2,
        "another device": torch.ones((), device="meta", requires_grad=True) * 2,
    }[case]
    return z, losses


@pytest.mark.parametrize("steps", range(4), ids=["first", "between", "last between", "due"])
@pytest.mark.parametrize(
    ("case", "exception", "fragments"),
    [
        ("callable", TypeError, ["callable", "gram_every=1"]),
        ("number", TypeError, ["`losses` must hold only tensors"]),
        ("NaN", FloatingPointError, ["loss '1' is NaN", "nonfinite"]),
        ("NaN gradient", FloatingPointError, ["gradient", "NaN", "nonfinite"]),
    ],
)
def test_a_failed_call_changes_nothing(case, exception, fragments, steps):
    state = Untouched(steps)
    with pytest.raises(exception) as caught:
        state.opt.backward(wrong(state.model, case)[1])
    assert [f for f in fragments if f not in str(caught.value)] == []
    state.check()


@pytest.mark.parametrize("mode", ["dense", "representation"])
@pytest.mark.parametrize(
    ("case", "fragments"),
    [
        ("vector", ["scalar", "shape [2]"]),
        ("empty", ["scalar", "shape [0]"]),
        ("no graph", ["graph"]),
        ("constant", ["graph"]),
        ("complex", ["real"]),
        ("another device", ["device", "meta"]),
    ],
)
def test_a_bad_loss_between_is_named(case, fragments, mode):
    """As in a step that computes the Gram matrix; without a graph it went missing in silence."""
    state = Untouched(1, mode)
    z, losses = wrong(state.model, case)
    with pytest.raises(ValueError) as caught:
        state.opt.backward(losses, **({"representation": z} if mode == "representation" else {}))
    assert [f for f in ("loss '1'", *fragments) if f not in str(caught.value)] == []
    state.check()


@pytest.mark.parametrize("case", ["vector", "empty", "no graph", "complex", "foreign"])
def test_a_bad_loss_is_named_when_the_gram_is_due(case):
    state = Untouched(3)
    with pytest.raises(ValueError, match="loss '1'"):
        state.opt.backward(wrong(state.model, case)[1])
    state.check()


@pytest.mark.parametrize("steps", range(4), ids=["first", "between", "last between", "due"])
@ALL_MODES
def test_a_second_call_for_the_same_graph(mode, steps):
    state = Untouched(steps, mode)
    z, losses = forward(state.model, batch(7, dtype=DOUBLE))
    z.sum().backward(inputs=list(state.model[0].parameters()))
    state.opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"(?s)second time.*Compute the losses again"):
        state.opt.backward(losses, **({"representation": z} if mode == "representation" else {}))
    state.check()


@pytest.mark.parametrize("steps", range(3))
def test_representation_is_asked_for_in_every_step(steps):
    state = Untouched(steps, "representation")
    losses = forward(state.model, batch(7, dtype=DOUBLE))[1]
    with pytest.raises(TypeError, match="`representation`"):
        state.opt.backward(losses)
    state.check()


@EXACT_MODES
def test_accumulation_and_callables_are_refused_in_every_step(mode):
    for steps in range(2):
        state = Untouched(steps, mode)
        losses = forward(state.model, batch(7, dtype=DOUBLE))[1]
        with pytest.raises(ValueError, match=r"`accumulate`.*gram_every=1"):
            state.opt.backward(losses, accumulate=True)
        with pytest.raises(TypeError, match=r"callable.*gram_every=1"):
            state.opt.backward([*losses[:2], lambda losses=losses: losses[2]])
        state.check()


@pytest.mark.parametrize("every", [0, -1, 1.5, 2.0, True, "2", None, math.nan, [2]])
@pytest.mark.parametrize("method", METHODS)
def test_gram_every_must_be_a_count(every, method):
    with pytest.raises(ValueError, match="`gram_every` must be an integer of at least 1; got"):
        wrapped(network(), every, make=METHODS[method])


@pytest.mark.parametrize("steps", range(4), ids=["first", "between", "last between", "due"])
@pytest.mark.parametrize("case", ["NaN", "NaN gradient"])
@ALL_MODES
def test_a_skipped_step_does_not_count(mode, case, steps):
    state = Untouched(steps, mode, nonfinite="skip")
    for k in range(1, 3):
        before = bits([state.model.state_dict(), vars(state.opt._core.progress.kept)])
        z, losses = wrong(state.model, case)
        state.opt.backward(losses, **({"representation": z} if mode == "representation" else {}))
        state.opt.step()
        assert state.opt.report.outcome is Outcome.SKIPPED
        assert state.opt.report.skipped == k
        assert bits([state.model.state_dict(), vars(state.opt._core.progress.kept)]) == before
    core = state.twin_opt._core
    core.progress = dataclasses.replace(core.progress, skipped=2)
    state.opt.zero_grad()
    state.check()


def test_age_of_a_skipped_step_is_that_of_its_own_gram():
    state = Untouched(3, nonfinite="skip")
    state.opt.backward(wrong(state.model, "NaN gradient")[1])
    assert not state.opt.report.gram.isfinite().all(), "it is not the one that was kept"
    assert state.opt.report.gram_age == 0


def test_coefficients_of_a_skipped_step_are_zero_whatever_was_not_finite():
    found = []
    for case in ("NaN", "NaN gradient"):
        state = Untouched(1, nonfinite="skip")
        state.opt.backward(wrong(state.model, case)[1])
        found.append(state.opt.report.coefficients.tolist())
    assert found == [[0, 0, 0]] * 2


def test_what_was_not_finite_is_gone_after_k_steps():
    model, every = network(DOUBLE), 3
    opt = wrapped(model, every, nonfinite="propagate")
    for t in range(7):
        opt.zero_grad()
        losses = forward(model, batch(t, dtype=DOUBLE))[1]
        losses[0] = losses[0] * (math.nan if t == every else 1)
        opt.backward(losses)
        poisoned = every <= t < 2 * every
        assert bool(opt.report.gram.isfinite().all()) != poisoned
        assert (opt.report.outcome is Outcome.NONFINITE) == poisoned
        assert (opt.report.coefficients.tolist() == WEIGHTS) == poisoned
        assert bool(flat_grad(model).isfinite().all()) == (t != every)
        if t != every:
            opt.step()
    assert opt.report.gram_age == 0


def test_report_says_that_a_loss_between_is_not_finite():
    model = network(DOUBLE)
    opt = wrapped(model, 3, nonfinite="propagate")
    train(opt, "dense", model, range(1))
    opt.backward(wrong(model, "NaN")[1])
    assert flat_grad(model).isnan().any()
    assert opt.report.outcome is Outcome.NONFINITE


def test_a_scaler_finds_its_scale():
    """The first steps overflow; the steps go on with the weighted sum until H is due again."""
    model = network()
    inner = torch.optim.SGD(model.parameters(), 0.05)
    opt = CAGradClip(inner, WEIGHTS, nonfinite="propagate", gram_every=2)
    scaler = GradScaler("cpu", init_scale=2.0**126, growth_interval=1000)
    start, outcomes = bits(model.state_dict()), []
    for t in range(24):
        opt.zero_grad()
        opt.backward([scaler.scale(loss) for loss in three_losses(model, batch(t))])
        outcomes.append(opt.report.outcome)
        scaler.step(opt)
        scaler.update()
    assert outcomes[0] is Outcome.NONFINITE
    assert outcomes[-4:] == [Outcome.CORRECTED] * 4
    assert bits(model.state_dict()) != start
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("steps", [3, 4, 5, 6])
@pytest.mark.parametrize("method", METHODS)
@ALL_MODES
def test_resumed_run_is_equal_in_every_bit(mode, method, steps):
    whole = network(DOUBLE)
    opt = wrapped(whole, 3, mode, METHODS[method])
    train(opt, mode, whole, range(steps))
    checkpoint = through_a_file([whole.state_dict(), opt.state_dict()])
    train(opt, mode, whole, range(steps, steps + 4))

    resumed = network(DOUBLE, seed=9)
    resumed_opt = wrapped(resumed, 3, mode, METHODS[method])
    train(resumed_opt, mode, resumed, range(20, 22))  # a Gram matrix of its own, to be dropped
    resumed.load_state_dict(checkpoint[0])
    resumed_opt.load_state_dict(checkpoint[1])
    assert bits(resumed_opt.state_dict()) == bits(checkpoint[1])
    train(resumed_opt, mode, resumed, range(steps, steps + 4))
    assert resumed_opt.report.gram_age == opt.report.gram_age
    assert torch.equal(resumed_opt.report.gram, opt.report.gram)
    assert everything(resumed, resumed_opt) == everything(whole, opt)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("method", METHODS)
@ALL_MODES
def test_copies_go_on_alike_and_apart(mode, method, duplicate):
    model = network(DOUBLE)
    opt = wrapped(model, 3, mode, METHODS[method])
    train(opt, mode, model, range(4))
    twin, twin_opt = duplicate((model, opt))
    train(opt, mode, model, range(4, 7))
    train(twin_opt, mode, twin, range(4, 7))
    assert twin_opt.report.gram_age == opt.report.gram_age == 0
    assert everything(twin, twin_opt) == everything(model, opt)
    train(twin_opt, mode, twin, range(7, 8))
    assert opt.report.gram_age == 0
    assert everything(twin, twin_opt) != everything(model, opt)


def test_a_saved_state_does_not_change_with_further_steps():
    model = network(DOUBLE)
    opt = wrapped(model, 2)
    train(opt, "dense", model, range(1))
    state = opt.state_dict()["raco_optim"]
    before = bits(state)
    train(opt, "dense", model, range(1, 4))
    assert bits(state) == before


def test_checkpoint_without_the_key_of_the_kept_gram_is_refused():
    model = network(DOUBLE)
    opt = wrapped(model, 3)
    train(opt, "dense", model, range(2))
    state = through_a_file(opt.state_dict())
    del state["raco_optim"]["kept_gram"]
    for every in (1, 3):
        fresh_opt = wrapped(network(DOUBLE), every)
        before = bits(fresh_opt.state_dict())
        with pytest.raises(ValueError, match="kept_gram"):
            fresh_opt.load_state_dict(state)
        assert bits(fresh_opt.state_dict()) == before


def test_a_gram_of_before_loading_is_dropped():
    """What was loaded is another point, of which that matrix knows nothing."""
    model = network(DOUBLE)
    opt = wrapped(model, 3)
    train(opt, "dense", model, range(1))
    opt.load_state_dict(through_a_file(opt.optimizer.state_dict()))
    combine(opt, "dense", model, batch(2, dtype=DOUBLE))
    assert opt.report.gram_age == 0


@pytest.mark.parametrize(
    ("saved", "loaded", "steps", "ages"),
    [
        (4, 2, 3, [0, 1, 0, 1]),  # at age 2, beyond what the other allows
        (4, 3, 2, [2, 0, 1, 2]),
        (2, 4, 2, [2, 3, 0, 1]),
        (1, 3, 2, [0, 1, 2, 0]),
        (3, 1, 2, [0, 0, 0, 0]),
    ],
)
@ALL_MODES
def test_checkpoint_of_another_schedule(mode, saved, loaded, steps, ages):
    model = network(DOUBLE)
    opt = wrapped(model, saved, mode)
    train(opt, mode, model, range(steps))
    other = wrapped(model, loaded, mode)
    other.load_state_dict(through_a_file(opt.state_dict()))
    found = []
    for t in range(steps, steps + 4):
        x = batch(t, dtype=DOUBLE)
        H = gram_of(mode, model, x)
        train(other, mode, model, [t])
        found.append(other.report.gram_age)
        if found[-1] == 0:
            torch.testing.assert_close(other.report.gram, H)
    assert found == ages


def test_an_old_gram_does_not_outlive_a_run_without_a_schedule():
    model, state = network(DOUBLE), None
    for every, steps in ((3, range(1)), (1, range(1, 6)), (3, [6])):
        opt = wrapped(model, every)
        if state is not None:
            opt.load_state_dict(state)
        train(opt, "dense", model, steps)
        state = through_a_file(opt.state_dict())
    assert opt.report.gram_age == 0


def test_checkpoint_of_another_mode():
    model = network(DOUBLE)
    opt = wrapped(model, 3, "ghost")
    train(opt, "ghost", model, range(1))
    other = wrapped(model, 3, "subset")
    other.load_state_dict(opt.state_dict())
    train(other, "subset", model, range(1, 4))
    assert other.report.gram_age == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_and_step_do_not_matter(set_to_none):
    model, plain = network(DOUBLE), network(DOUBLE)
    opts = [wrapped(m, 3) for m in (model, plain)]
    ages = []
    for t in range(5):
        for m, opt in zip((model, plain), opts, strict=True):
            combine(opt, "dense", m, batch(t, dtype=DOUBLE))
        opts[0].zero_grad(set_to_none=set_to_none)
        assert torch.equal(opts[0].report.gram, opts[1].report.gram)
        ages.append(opts[0].report.gram_age)
    assert ages == [0, 1, 2, 0, 1]


def test_gradients_between_are_added_to_existing_ones():
    model, fresh = network(DOUBLE), network(DOUBLE)
    opt, other = wrapped(model, 2), wrapped(fresh, 2)
    sums = 0
    for t in range(4):
        combine(opt, "dense", model, batch(t, dtype=DOUBLE))
        other.zero_grad()
        combine(other, "dense", fresh, batch(t, dtype=DOUBLE))
        sums = sums + flat_grad(fresh)
    torch.testing.assert_close(flat_grad(model), sums)


def test_a_report_keeps_what_it_said():
    model = network(DOUBLE)
    opt = wrapped(model, 3)
    train(opt, "dense", model, range(1))
    reports = [opt.report]
    before = bits([reports[0].gram, reports[0].coefficients, reports[0].losses])
    reports[0].gram.zero_()  # a copy: the kept matrix is another
    train(opt, "dense", model, range(1, 3))
    assert bits([opt.report.gram]) == [before[0]]
    assert bits([reports[0].coefficients, reports[0].losses]) == before[1:]


def test_a_rule_may_write_to_its_matrix():
    def halved(gram):
        return gram.mul_(0.5).diagonal().rsqrt()

    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = MultiObjectiveOptimizer(torch.optim.SGD([x], 0.0), halved, gram_every=3)
    found = []
    for _ in range(3):
        opt.backward([x[0], x.prod()])
        found.append(opt.report.coefficients.tolist())
    assert found == [found[0]] * 3


def test_closures_count_their_evaluations():
    """LBFGS evaluates its closure up to `max_iter` times per step, and each is a `backward`."""
    model = network(DOUBLE)
    opt = CAGradClip(
        torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4), [0.6, 0.4], gram_every=3
    )
    ages = []

    def closure():
        opt.zero_grad()
        if opt.last_step is not None:
            ages.append(opt.report.gram_age)
        return as_asked(opt, two_losses(model, batch(0, dtype=DOUBLE)))

    for _ in range(2):
        opt.step(closure)
    assert ages == [t % 3 for t in range(len(ages))]
    assert len(ages) > 5
