"""One Gram matrix for several steps: when it is computed anew, and what is new in each step."""

import copy
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
    as_asked,
    batch,
    bits,
    everything,
    flat_grad,
    inverse_norms,
    jacobian,
    network,
    through_a_file,
    train_step,
    two_losses,
)
from tests.test_approximate import (
    UNFIT,
    WEIGHTS,
    Net,
    Untouched,
    assert_combined,
    combine,
    given,
    in_trunk,
    surrogate_jacobian,
    wrapped,
    x_of,
)

DOUBLE = torch.float64
MODES = ("dense", "ghost", "representation", "trunk")
ALL_MODES = pytest.mark.parametrize("mode", MODES)
STEPS = pytest.mark.parametrize("steps", [0, 1, 3], ids=["first", "between", "due"])
METHODS = {
    "CAGradClip": CAGradClip,
    "MGDA": MGDA,
    "rule": lambda inner, _, **kw: MultiObjectiveOptimizer(inner, inverse_norms, **kw),
}


def every(k, model, mode="dense", method="CAGradClip", **kwargs):
    return wrapped(model, mode, METHODS[method], gram_every=k, **kwargs)


def train(opt, mode, model, steps):
    for t in steps:
        opt.zero_grad()
        combine(opt, mode, model, x_of(t))
        opt.step()


def gram_of(mode, model, x, absent=()):
    S = surrogate_jacobian(mode, model, x, absent)
    return S @ S.T


@pytest.mark.parametrize(
    ("inner", "make"),
    [
        ("AdamW", lambda inner, **kw: CAGradClip(inner, [0.6, 0.4], **kw)),
        ("LBFGS", lambda inner, **kw: CAGradClip(inner, dict.fromkeys(NAMES, 0.5), **kw)),
        ("Adafactor", MGDA),
        ("SGD", lambda inner, **kw: MultiObjectiveOptimizer(inner, inverse_norms, **kw)),
    ],
)
def test_every_step_is_the_default_in_every_bit(inner, make):
    model, plain = network(), network()
    opt = make(INNER[inner](model.parameters()), gram_every=1)
    default = make(INNER[inner](plain.parameters()))
    for t in range(3):
        train_step(opt, model, batch(t))
        train_step(default, plain, batch(t))
        assert opt.report.gram_age == 0
    assert everything(model, opt) == everything(plain, default)


@pytest.mark.parametrize(
    ("method", "k", "heads"),
    [("CAGradClip", 3, False), ("CAGradClip", 2, True), ("MGDA", 3, True), ("rule", 2, False)],
)
@ALL_MODES
def test_gram_is_computed_every_k_steps_and_all_else_in_each(mode, method, k, heads):
    model = Net(3)
    opt = every(k, model, mode, method, heads=heads and method != "rule")
    for t in range(2 * k + 1):
        x = x_of(t)
        J, values = jacobian(model, lambda x=x: model(x)[1]), model(x)[1]
        newer = gram_of(mode, model, x)
        if heads and mode in ("dense", "ghost"):
            newer = J * in_trunk(model) @ J.T
        if t % k == 0:
            expected = newer
        else:
            assert (newer - expected).norm() > 1e-3 * expected.norm(), "the test sees a difference"
        opt.zero_grad()
        combine(opt, mode, model, x)
        report = opt.report
        assert report.gram_age == t % k
        torch.testing.assert_close(report.gram, expected, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(report.losses, torch.stack(values).detach())
        assert_combined(opt, model, J, heads=heads and method != "rule")
        opt.step()


@pytest.mark.parametrize("mode", ["dense", "ghost", "trunk"])
def test_between_there_is_one_backward_pass(mode):
    model, counts = Net(3), []
    opt = every(3, model, mode)
    for t in range(4):
        passes = []
        h = model.trunk(x_of(t))
        h.register_hook(lambda grad, passes=passes: passes.append(1))
        opt.backward(model.losses(h.tanh()))
        counts.append(len(passes))
    due = 4 if mode == "trunk" else 3
    assert counts == [due, 1, 1, due]


def test_radius_and_weights_take_effect_at_once():
    model = Net(3)
    opt = every(5, model)
    train(opt, "dense", model, [0])
    H = opt.report.gram
    for t, (weights, c) in enumerate([([0.1, 0.1, 0.8], 0.2), ([0.3, 0.4, 0.3], 0.9)], start=1):
        opt.weights, opt.c = weights, c
        J = jacobian(model, lambda t=t: model(x_of(t))[1])
        opt.zero_grad()
        combine(opt, "dense", model, x_of(t))
        assert torch.equal(opt.report.gram, H)
        expected = mixing_coefficients(H, weights, c)
        assert torch.equal(opt.report.coefficients, expected.coefficients)
        assert torch.equal(opt.report.p, expected.p)
        assert_combined(opt, model, J)
        assert opt.report.gram_age == t
    opt.c = 0.0
    train(opt, "dense", model, [0])
    assert opt.report.outcome is Outcome.WEIGHTED_SUM


# When it is computed anew


@ALL_MODES
def test_other_absent_losses_ask_for_a_new_gram(mode):
    model, ages = Net(3), []
    opt = every(3, model, mode)
    for t, absent in enumerate([(), (), (1,), (1,), (0,), (), (), (), ()]):
        H = gram_of(mode, model, x_of(t), absent)
        J = jacobian(model, lambda t=t: model(x_of(t))[1])
        J[list(absent)] = 0
        opt.zero_grad()
        combine(opt, mode, model, x_of(t), absent)
        ages.append(opt.report.gram_age)
        if ages[-1] == 0:
            torch.testing.assert_close(opt.report.gram, H)
        assert opt.report.absent == tuple(map(str, absent))
        assert_combined(opt, model, J)
        opt.step()
    assert ages == [0, 1, 0, 1, 0, 0, 1, 2, 0]


def test_another_number_of_losses_asks_for_a_new_gram():
    x, ages = nn.Parameter(torch.tensor([1.0, 2.0])), []
    opt = MGDA(torch.optim.SGD([x], 0.0), gram_every=3)
    for m in (2, 2, 3, 3, 2):
        opt.backward([x[0], x.prod(), x[1] ** 2][:m])
        ages.append(opt.report.gram_age)
    assert ages == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("others", ["ba", "cd"], ids=["order", "names"])
def test_losses_that_name_themselves_are_matched(others):
    """Without weights, each mapping brings its own names, in any order."""
    x = nn.Parameter(torch.tensor([1.0, 1.0]))
    opt = MGDA(torch.optim.SGD([x], 0.1), gram_every=2)
    found = []
    for names in ("ab", others):
        values = {"a": x[0], "b": 3 * x[1], "c": 5 * x[0], "d": x[1]}
        opt.backward({name: values[name] for name in names})
        alpha = opt.report.coefficients.tolist()
        found.append(dict(zip(opt.report.names, alpha, strict=True)))
    assert opt.report.gram_age == 0
    if others == "ba":
        assert found[1] == pytest.approx(found[0])


@pytest.mark.parametrize("form", [list, dict])
def test_named_losses_may_come_in_any_order(form):
    x = nn.Parameter(torch.tensor([1.0, 1.0]))
    weights = dict(zip(NAMES, [0.6, 0.4], strict=True))
    opt = MGDA(torch.optim.SGD([x], 0.1), weights if form is dict else [0.6, 0.4], gram_every=3)
    for t in range(3):
        losses = {NAMES[0]: x[0], NAMES[1]: 3 * x[1]}
        if t == 1:
            losses = dict(reversed(losses.items()))
        opt.zero_grad()
        opt.backward(losses if form is dict else [losses[name] for name in NAMES])
        assert (opt.report.gram_age, x.grad.tolist()) == (t, pytest.approx([0.9, 0.3]))


@pytest.mark.parametrize("set_to_none", [True, False, None])
def test_zero_grad_and_step_do_not_matter(set_to_none):
    """Gradients of all steps are added to existing ones."""
    model, fresh, total, ages = Net(3), Net(3), 0, []
    opt, other = every(3, model), every(3, fresh)
    for t in range(5):
        if set_to_none is not None:
            opt.zero_grad(set_to_none=set_to_none)
        other.zero_grad()
        for o, m in ((opt, model), (other, fresh)):
            combine(o, "dense", m, x_of(t))
        total = flat_grad(fresh) + (total if set_to_none is None else 0)
        torch.testing.assert_close(flat_grad(model), total)
        ages.append(opt.report.gram_age)
    assert ages == [0, 1, 2, 0, 1]


def test_closures_count_their_evaluations():
    """LBFGS evaluates its closure up to `max_iter` times per step, and each is a `backward`."""
    model, ages = network(DOUBLE), []
    inner = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)
    opt = CAGradClip(inner, [0.6, 0.4], gram_every=3)

    def closure():
        opt.zero_grad()
        if opt.last_step is not None:
            ages.append(opt.report.gram_age)
        return as_asked(opt, two_losses(model, x_of(0)))

    for _ in range(2):
        opt.step(closure)
    assert ages == [t % 3 for t in range(len(ages))]
    assert len(ages) > 5


# Errors


def state_at(steps, mode="dense", **kwargs):
    """An optimizer in mid-schedule, without gradients, and a twin."""
    state = Untouched(mode, steps=steps, gram_every=3, **kwargs)
    for opt in (state.opt, state.twin_opt):
        opt.zero_grad()
    return state


def wrong(model, case):
    z, losses = model(x_of(7))
    return z, UNFIT[case][0](*losses)


@pytest.mark.parametrize(
    ("case", "mode", "steps"),
    [
        (case, mode, steps)
        for case in UNFIT
        for mode, steps in (("dense", 1), ("representation", 2), ("dense", 3))
        # The sum of all losses reaches parameters.
        if case != "foreign" or steps == 3
    ],
)
def test_a_failed_call_changes_nothing(case, mode, steps):
    """Between, as in a step that computes the Gram matrix."""
    _, exception, fragments = UNFIT[case]
    state = state_at(steps, mode)
    z, losses = wrong(state.model, case)
    state.refuses(exception, fragments, losses, steps=4, **given(mode, z))


@STEPS
@ALL_MODES
def test_a_second_call_for_the_same_graph(mode, steps):
    state = state_at(steps, mode)
    z, losses = state.model(x_of(7))
    z.sum().backward(inputs=list(state.model.trunk.parameters()))
    state.opt.zero_grad()
    fragments = ["second time", "Compute the losses again"]
    state.refuses(RuntimeError, fragments, losses, steps=4, **given(mode, z))


@STEPS
def test_representation_is_asked_for_in_every_step(steps):
    state = state_at(steps, "representation")
    state.refuses(TypeError, ["`representation`"], state.model(x_of(7))[1])


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("mode", ["dense", "ghost"])
def test_accumulation_is_refused_in_every_step(mode, steps):
    state = state_at(steps, mode)
    with pytest.raises(ValueError, match=r"`accumulate`.*gram_every=1"):
        state.opt.backward(state.model(x_of(7))[1], accumulate=True)
    state.check()


@pytest.mark.parametrize("k", [0, -1, 1.5, 2.0, True, "2", None, math.nan, [2]])
def test_gram_every_must_be_a_count(k):
    with pytest.raises(ValueError, match="`gram_every` must be an integer of at least 1; got"):
        every(k, Net(3))


# Numbers that are not finite


@pytest.mark.parametrize(
    ("case", "steps"), [("NaN", 1), ("NaN gradient", 0), ("NaN gradient", 2), ("NaN gradient", 3)]
)
@ALL_MODES
def test_a_skipped_step_does_not_count(mode, case, steps):
    state = state_at(steps, mode, nonfinite="skip")
    for k in range(1, 3):
        before = bits([state.model.state_dict(), vars(state.opt._core.progress.kept)])
        z, losses = wrong(state.model, case)
        state.opt.backward(losses, **given(mode, z))
        state.opt.step()
        assert (state.opt.report.outcome, state.opt.report.skipped) == (Outcome.SKIPPED, k)
        assert state.opt.report.coefficients.tolist() == [0, 0]
        assert bits([state.model.state_dict(), vars(state.opt._core.progress.kept)]) == before
    state.skipped(2)
    state.opt.zero_grad()
    state.check(5)


def test_age_of_a_skipped_step_is_that_of_its_own_gram():
    state = state_at(3, nonfinite="skip")
    state.opt.backward(wrong(state.model, "NaN gradient")[1])
    assert not state.opt.report.gram.isfinite().all(), "it is not the one that was kept"
    assert state.opt.report.gram_age == 0


def test_what_was_not_finite_is_gone_after_k_steps():
    model, k = Net(3), 3
    opt = every(k, model, nonfinite="propagate")
    for t in range(7):
        opt.zero_grad()
        losses = model(x_of(t))[1]
        losses[0] = losses[0] * (math.nan if t == k else 1)
        opt.backward(losses)
        poisoned = k <= t < 2 * k
        assert bool(opt.report.gram.isfinite().all()) != poisoned
        assert (opt.report.outcome is Outcome.NONFINITE) == poisoned
        assert (opt.report.coefficients.tolist() == WEIGHTS[3]) == poisoned
        assert bool(flat_grad(model).isfinite().all()) == (t != k)
        if t != k:
            opt.step()
    assert opt.report.gram_age == 0


def test_report_says_that_a_loss_between_is_not_finite():
    model = Net()
    opt = every(3, model, nonfinite="propagate")
    train(opt, "dense", model, [0])
    opt.backward(wrong(model, "NaN")[1])
    assert flat_grad(model).isnan().any()
    assert opt.report.outcome is Outcome.NONFINITE


def test_a_scaler_finds_its_scale():
    """The first steps overflow; the steps go on with the weighted sum until H is due again."""
    model = Net(3, torch.float32)
    opt = every(2, model, nonfinite="propagate")
    scaler = GradScaler("cpu", init_scale=2.0**126, growth_interval=1000)
    start, outcomes = bits(model.state_dict()), []
    for t in range(24):
        opt.zero_grad()
        opt.backward([scaler.scale(loss) for loss in model(batch(t))[1]])
        outcomes.append(opt.report.outcome)
        scaler.step(opt)
        scaler.update()
    assert outcomes[0] is Outcome.NONFINITE
    assert outcomes[-4:] == [Outcome.CORRECTED] * 4
    assert bits(model.state_dict()) != start
    assert all(p.isfinite().all() for p in model.parameters())


# Checkpoints and copies


@pytest.mark.parametrize(("method", "steps"), [("CAGradClip", 3), ("MGDA", 4), ("rule", 5)])
@ALL_MODES
def test_resumed_run_is_equal_in_every_bit(mode, method, steps):
    whole, resumed = Net(3), Net(3)
    opt, resumed_opt = (every(3, m, mode, method) for m in (whole, resumed))
    train(opt, mode, whole, range(steps))
    saved = through_a_file([whole.state_dict(), opt.state_dict()])
    train(opt, mode, whole, range(steps, steps + 4))

    train(resumed_opt, mode, resumed, range(20, 22))  # a Gram matrix of its own, to be dropped
    resumed.load_state_dict(saved[0])
    resumed_opt.load_state_dict(saved[1])
    assert bits(resumed_opt.state_dict()) == bits(saved[1])
    train(resumed_opt, mode, resumed, range(steps, steps + 4))
    assert resumed_opt.report.gram_age == opt.report.gram_age
    assert torch.equal(resumed_opt.report.gram, opt.report.gram)
    assert everything(resumed, resumed_opt) == everything(whole, opt)


DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


@pytest.mark.parametrize(("method", "how"), [("CAGradClip", "deepcopy"), ("rule", "pickle")])
@ALL_MODES
def test_copies_go_on_alike_and_apart(mode, method, how):
    model = Net(3)
    opt = every(3, model, mode, method)
    train(opt, mode, model, range(4))
    twin, twin_opt = DUPLICATES[how]((model, opt))
    train(opt, mode, model, range(4, 7))
    train(twin_opt, mode, twin, range(4, 7))
    assert twin_opt.report.gram_age == opt.report.gram_age == 0
    assert everything(twin, twin_opt) == everything(model, opt)
    train(twin_opt, mode, twin, range(7, 8))
    assert opt.report.gram_age == 0
    assert everything(twin, twin_opt) != everything(model, opt)


def test_what_was_handed_out_does_not_change_with_further_steps():
    model = Net(3)
    opt = every(3, model)
    train(opt, "dense", model, [0])
    state, report = opt.state_dict()["raco_optim"], opt.report
    before = bits([state, report.coefficients, report.losses]), bits(report.gram)
    report.gram.zero_()  # a copy: the kept matrix is another
    train(opt, "dense", model, range(1, 3))
    assert bits(opt.report.gram) == before[1]
    train(opt, "dense", model, range(3, 5))
    assert bits([state, report.coefficients, report.losses]) == before[0]


def test_a_rule_may_write_to_its_matrix():
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    inner = torch.optim.SGD([x], 0.0)
    opt = MultiObjectiveOptimizer(inner, lambda H: H.mul_(0.5).diagonal().rsqrt(), gram_every=3)
    found = []
    for _ in range(3):
        opt.backward([x[0], x.prod()])
        found.append(opt.report.coefficients.tolist())
    assert found == [found[0]] * 3


def test_checkpoint_without_the_key_of_the_kept_gram_is_refused():
    model = Net(3)
    opt = every(3, model)
    train(opt, "dense", model, range(2))
    state = through_a_file(opt.state_dict())
    del state["raco_optim"]["kept_gram"]
    for k in (1, 3):
        fresh_opt = every(k, Net(3))
        before = bits(fresh_opt.state_dict())
        with pytest.raises(ValueError, match="kept_gram"):
            fresh_opt.load_state_dict(state)
        assert bits(fresh_opt.state_dict()) == before


def test_a_gram_of_before_loading_is_dropped():
    """What was loaded is another point, of which that matrix knows nothing."""
    model = Net(3)
    opt = every(3, model)
    train(opt, "dense", model, [0])
    opt.load_state_dict(through_a_file(opt.optimizer.state_dict()))
    combine(opt, "dense", model, x_of(2))
    assert opt.report.gram_age == 0


@pytest.mark.parametrize(
    ("saved", "loaded", "steps", "mode", "ages"),
    [
        (4, 2, 3, "dense", [0, 1, 0, 1]),  # at age 2, beyond what the other allows
        (4, 3, 2, "ghost", [2, 0, 1, 2]),
        (2, 4, 2, "representation", [2, 3, 0, 1]),
        (1, 3, 2, "trunk", [0, 1, 2, 0]),
        (3, 1, 2, "dense", [0, 0, 0, 0]),
    ],
)
def test_checkpoint_of_another_schedule(saved, loaded, steps, mode, ages):
    model, found = Net(3), []
    opt, other = every(saved, model, mode), every(loaded, model, mode)
    train(opt, mode, model, range(steps))
    other.load_state_dict(through_a_file(opt.state_dict()))
    for t in range(steps, steps + 4):
        H = gram_of(mode, model, x_of(t))
        train(other, mode, model, [t])
        found.append(other.report.gram_age)
        if found[-1] == 0:
            torch.testing.assert_close(other.report.gram, H)
    assert found == ages


def test_an_old_gram_does_not_outlive_a_run_without_a_schedule():
    model, state = Net(3), None
    for k, steps in ((3, range(1)), (1, range(1, 6)), (3, [6])):
        opt = every(k, model)
        if state is not None:
            opt.load_state_dict(state)
        train(opt, "dense", model, steps)
        state = through_a_file(opt.state_dict())
    assert opt.report.gram_age == 0


def test_checkpoint_of_another_mode():
    model = Net(3)
    opt, other = every(3, model, "ghost"), every(3, model, "trunk")
    train(opt, "ghost", model, [0])
    other.load_state_dict(opt.state_dict())
    train(other, "trunk", model, range(1, 4))
    assert other.report.gram_age == 0
