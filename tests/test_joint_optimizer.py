"""Several inner optimizers step together as each would alone, and are one torch optimizer.

The witnesses are the stock optimizers, driven by hand along the combined gradient, and the single
optimizer that holds the same groups.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, RMSprop

import raco_optim
from raco_optim import CAGradClip, MultiObjectiveOptimizer
from tests.problems_nn import batch, bits, clipped_alpha, flat_grad, jacobian, network, two_losses
from tests.test_schedulers import SCHEDULERS

WEIGHTS = [0.6, 0.4]
PAIRS = {
    "Muon+AdamW": (
        lambda p: Muon(p, lr=0.02),
        lambda p: AdamW(p, lr=0.03, weight_decay=0.1),
    ),
    "AdamW+SGD": (lambda p: AdamW(p, lr=0.02), lambda p: SGD(p, lr=0.1, momentum=0.9)),
    "RMSprop+Adam": (lambda p: RMSprop(p, lr=0.01, momentum=0.5), lambda p: Adam(p, lr=0.01)),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def split(model):
    """Matrices for the first optimizer, and the rest for the second."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() != 2]


def singles(model, pair):
    return [make(p) for make, p in zip(pair, split(model), strict=True)]


def joint(model, pair, **options):
    return CAGradClip(singles(model, pair), WEIGHTS, **options)


def step(opt, model, t):
    opt.zero_grad()
    opt.backward(two_losses(model, batch(t)))
    opt.step()


def by_hand(model, optimizers, x):
    """One step of Algorithm 1 with stock optimizers; p is that of the oracle."""
    J = jacobian(model, lambda: two_losses(model, x))
    combined, start = clipped_alpha(J, WEIGHTS, 0.4, "hard") @ J, 0
    for p in model.parameters():
        p.grad = combined[start : start + p.numel()].view_as(p).clone()
        start += p.numel()
    for optimizer in optimizers:
        optimizer.step()


def states(optimizers):
    return bits([optimizer.state_dict() for optimizer in optimizers])


def resave(state):
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- Steps ---------------------------------------------------------------------------------------


def test_steps_are_those_of_the_single_optimizers(pair):
    model, twin = network(torch.float64), network(torch.float64)
    opt, stock = joint(model, pair), singles(twin, pair)
    for t in range(4):
        x = batch(t, dtype=torch.float64)
        opt.zero_grad()
        opt.backward(two_losses(model, x))
        opt.step()
        by_hand(twin, stock, x)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def copied_step(opt, model, twin, stock, t):
    """The same gradient, bit for bit, for the stock optimizers."""
    opt.zero_grad()
    opt.backward(two_losses(model, batch(t)))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    opt.step()
    for optimizer in stock:
        optimizer.step()


def same(model, twin, opt, stock):
    assert bits(model.state_dict()) == bits(twin.state_dict())
    assert states(opt.optimizers) == states(stock)


def test_bit_for_bit(pair):
    model, twin = network(), network()
    opt, stock = joint(model, pair), singles(twin, pair)
    for t in range(4):
        copied_step(opt, model, twin, stock, t)
    same(model, twin, opt, stock)


@pytest.mark.parametrize("form", [list, tuple])
def test_one_of_them_is_that_one(form):
    model = network()
    inner = AdamW(model.parameters())
    opt = CAGradClip(form([inner]), WEIGHTS)
    assert opt.optimizer is inner
    assert opt.optimizers == (inner,)
    assert opt.param_groups is inner.param_groups


def test_three_optimizers():
    model, twin = network(), network()
    make = [lambda p: SGD(p, lr=0.1), lambda p: AdamW(p, lr=0.01), lambda p: RMSprop(p, lr=0.01)]

    def three(model):
        parts = (model[0].parameters(), [model[2].weight], [model[2].bias])
        return [m(p) for m, p in zip(make, parts, strict=True)]

    opt, stock = CAGradClip(three(model), WEIGHTS), three(twin)
    for t in range(3):
        copied_step(opt, model, twin, stock, t)
    same(model, twin, opt, stock)


def test_closure(pair):
    model, twin = network(), network()
    opt, other = joint(model, pair), joint(twin, pair)
    calls = []

    def closure():
        calls.append(1)
        opt.zero_grad()
        return two_losses(model, batch(0))

    value = opt.step(closure)
    first = [loss.item() for loss in two_losses(network(), batch(0))]
    assert float(value) == pytest.approx(0.6 * first[0] + 0.4 * first[1], rel=1e-6)
    assert calls == [1]
    step(other, twin, 0)
    assert bits(model.state_dict()) == bits(twin.state_dict())
    assert bits(opt.state_dict()) == bits(other.state_dict())


def test_skipped_step_moves_neither(pair):
    model = network()
    opt = joint(model, pair, nonfinite="skip")
    step(opt, model, 0)
    before = bits([model.state_dict(), opt.state_dict()["state"]])
    opt.zero_grad()
    a, b = two_losses(model, batch(1))
    opt.backward([a, b * torch.nan])
    opt.step()
    assert bits([model.state_dict(), opt.state_dict()["state"]]) == before


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(pair, set_to_none):
    model = network()
    opt = joint(model, pair)
    opt.backward(two_losses(model, batch(0)))
    assert flat_grad(model).norm() > 0
    opt.zero_grad(set_to_none=set_to_none)
    assert [p.grad is None for p in model.parameters()] == [set_to_none] * 4
    assert flat_grad(model).norm() == 0


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(pair, overflow):
    """As with one optimizer that holds all: unscaled once, and skipped as a whole."""
    model, twin = network(), network()
    opt, stock = joint(model, pair, nonfinite="propagate"), singles(twin, pair)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for t in range(3):
        opt.zero_grad()
        bad = overflow and t == 1
        losses = [scaler.scale(loss) for loss in two_losses(model, batch(t))]
        opt.backward([losses[0], losses[1] * torch.inf] if bad else losses)
        scaler.unscale_(opt)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        scaler.step(opt)
        scaler.update()
        if not bad:
            by_plain = flat_grad(twin)
            J = jacobian(twin, lambda t=t: two_losses(twin, batch(t)))
            expected = clipped_alpha(J, WEIGHTS, 0.4, "hard") @ J
            torch.testing.assert_close(by_plain, expected, rtol=1e-4, atol=1e-6)
            for optimizer in stock:
                optimizer.step()
        same(model, twin, opt, stock)
    assert scaler.get_scale() == (2.0**9 if overflow else 2.0**10)


def test_fused_ones_among_them_are_unscaled_once():
    """Fused optimizers unscale by themselves if a GradScaler asks them to."""
    steps = []
    for fused in (True, False):
        model = network()
        weights, rest = split(model)
        opt = CAGradClip(
            [AdamW(weights, lr=0.1, eps=1.0, fused=fused), SGD(rest, lr=0.1, fused=fused)],
            WEIGHTS,
            nonfinite="propagate",
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for t in range(2):
            opt.zero_grad()
            opt.backward([scaler.scale(loss) for loss in two_losses(model, batch(t))])
            scaler.step(opt)
            scaler.update()
        steps.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*steps, rtol=1e-5, atol=1e-6)


def test_micro_batches(pair):
    model, twin = network(), network()
    opt, other = joint(model, pair), joint(twin, pair)
    opt.backward(two_losses(model, batch(0)), accumulate=True)
    with pytest.raises(RuntimeError, match="accumulated but not combined"):
        opt.step()
    opt.backward(two_losses(model, batch(1)))
    other.backward(
        [a + b for a, b in zip(two_losses(twin, batch(0)), two_losses(twin, batch(1)), strict=True)]
    )
    torch.testing.assert_close(flat_grad(model), flat_grad(twin))


# --- Groups --------------------------------------------------------------------------------------


def test_groups_are_all_groups_in_order(pair):
    model = network()
    opt = joint(model, pair)
    first, second = opt.optimizers
    assert [id(g) for g in opt.param_groups] == [
        id(g) for g in [*first.param_groups, *second.param_groups]
    ]
    assert opt.param_groups is opt.param_groups
    opt.param_groups[1]["lr"] = 0.5
    assert second.param_groups[0]["lr"] == 0.5


def of_groups(optimizer):
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def four_groups():
    model = network()
    first = SGD([{"params": [model[0].weight]}, {"params": [model[2].weight]}], lr=0.1)
    second = AdamW([{"params": [model[0].bias]}, {"params": [model[2].bias]}], lr=0.1)
    return model, CAGradClip([first, second], WEIGHTS)


REMOVALS = {
    "del": lambda groups: groups.__delitem__(1),
    "negative": lambda groups: groups.__delitem__(-3),
    "pop": lambda groups: groups.pop(1),
    "slice": lambda groups: groups.__setitem__(slice(1, 2), []),
}


@pytest.mark.parametrize("remove", REMOVALS)
@pytest.mark.filterwarnings("ignore:the losses depend on")
def test_removing_a_group(remove):
    model, opt = four_groups()
    step(opt, model, 0)
    REMOVALS[remove](opt.param_groups)
    before = model[2].weight.detach().clone()
    kept = [model[0].weight, model[0].bias, model[2].bias]
    step(opt, model, 1)
    assert torch.equal(model[2].weight, before)
    assert of_groups(opt) == [[id(p)] for p in kept]
    assert of_groups(opt.optimizers[0]) == [[id(kept[0])]]
    assert of_groups(opt.optimizers[1]) == [[id(kept[1])], [id(kept[2])]]


def test_gradients_of_a_removed_group_are_left_alone():
    """`zero_grad` resets those of the groups that are there, as in torch."""
    model, opt = four_groups()
    opt.backward(two_losses(model, batch(0)))
    del opt.param_groups[0]
    opt.zero_grad()
    assert [p.grad is None for p in model.parameters()] == [False, True, True, True]


def test_lists_of_groups_stay_the_same_lists():
    """Who keeps one sees what becomes of it; pytorch_optimizer's SAM shares one, for instance."""
    _, opt = four_groups()
    joint, alone = opt.param_groups, [x.param_groups for x in opt.optimizers]
    del joint[0]
    opt.zero_grad()
    opt.param_groups = joint[::-1]
    assert opt.param_groups is joint
    assert all(x.param_groups is kept for x, kept in zip(opt.optimizers, alone, strict=True))
    assert [len(kept) for kept in alone] == [1, 2]


def test_clearing_all_groups():
    _, opt = four_groups()
    opt.param_groups.clear()
    assert opt.param_groups == opt.optimizers[0].param_groups == []
    assert opt.optimizers[1].param_groups == []


@pytest.mark.parametrize("copies", [False, True], ids=["same dicts", "new dicts"])
def test_assigning_groups(copies):
    """In another order, and one less; each stays with the optimizer that holds its parameters."""
    model, opt = four_groups()
    groups = [opt.param_groups[k] for k in (3, 0, 2)]
    opt.param_groups = [dict(group) for group in groups] if copies else groups
    ids = [[id(p)] for p in (model[2].bias, model[0].weight, model[0].bias)]
    assert of_groups(opt) == ids
    assert of_groups(opt.optimizers[0]) == [ids[1]]
    assert of_groups(opt.optimizers[1]) == [ids[0], ids[2]]
    opt.param_groups.reverse()
    assert of_groups(opt) == ids[::-1]
    assert of_groups(opt.optimizers[1]) == [ids[0], ids[2]] or of_groups(opt.optimizers[1]) == [
        ids[2],
        ids[0],
    ]


def test_groups_that_belong_nowhere_are_refused():
    model, opt = four_groups()
    before = of_groups(opt)
    stranger = {"params": [nn.Parameter(torch.zeros(2))], "lr": 0.1}
    both = {"params": [model[0].weight, model[0].bias], "lr": 0.1}
    for group in (stranger, both):
        with pytest.raises(ValueError, match='the key "optimizer" .* of one of the 2 inner'):
            opt.param_groups = [group]
        assert of_groups(opt) == before
        opt.param_groups.append(group)
        with pytest.raises(ValueError, match='the key "optimizer" .* of one of the 2 inner'):
            opt.step()
        assert of_groups(opt) == before


def test_groups_changed_on_the_inner_optimizers():
    """By Lightning's callback, say, which is given one of them."""
    model, opt = four_groups()
    a, b, c, d = opt.param_groups
    extra = nn.Parameter(torch.zeros(2))
    opt.optimizers[0].add_param_group({"params": [extra]})
    assert [id(g) for g in opt.param_groups[:4]] == [id(g) for g in (a, b, c, d)]
    assert of_groups(opt)[4] == [id(extra)]
    del opt.optimizers[0].param_groups[0]
    assert [id(g) for g in opt.param_groups[:3]] == [id(g) for g in (b, c, d)]
    opt.optimizers[0].load_state_dict(opt.optimizers[0].state_dict())  # makes new dicts
    assert of_groups(opt) == [*([id(p) for p in g["params"]] for g in (b, c, d)), [id(extra)]]
    assert opt.param_groups[0] is opt.optimizers[0].param_groups[0]
    assert opt.param_groups[3] is opt.optimizers[0].param_groups[1]


@pytest.mark.parametrize("params", [list, iter], ids=["list", "generator"])
def test_add_param_group(params):
    model, twin = network(), network()

    def make(net):
        return [SGD([net[0].weight], lr=0.1, momentum=0.9), AdamW([net[0].bias], lr=0.05)]

    opt, stock = CAGradClip(make(model), WEIGHTS), make(twin)
    with pytest.warns(UserWarning, match="the losses depend on 2 parameters"):
        opt.backward(two_losses(model, batch(0)))
    opt.add_param_group(
        {"params": params([model[2].weight, model[2].bias]), "optimizer": 0, "lr": 0.2}
    )
    stock[0].add_param_group({"params": [twin[2].weight, twin[2].bias], "lr": 0.2})
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.05, 0.2], (
        "at the end, as in torch"
    )
    for t in range(3):
        copied_step(opt, model, twin, stock, t)
    assert bits(model.state_dict()) == bits(twin.state_dict())


@pytest.mark.parametrize("position", ["missing", 2, -1, True, "0", 0.0])
def test_add_param_group_says_to_which(position):
    model, opt = four_groups()
    before = of_groups(opt)
    group = {"params": [nn.Parameter(torch.zeros(2))]}
    if position != "missing":
        group["optimizer"] = position
    with pytest.raises(ValueError, match='the key "optimizer" .* of one of the 2 inner optimizers'):
        opt.add_param_group(group)
    for held in (model[0].weight, model[2].bias):
        with pytest.raises(ValueError, match="more than one parameter group"):
            opt.add_param_group({"params": [held], "optimizer": 0})
    assert of_groups(opt) == before


def test_roles_of_heads_under_their_own_optimizer():
    model = network(torch.float64)
    opt = CAGradClip(
        [AdamW(model[0].parameters()), SGD(model[2].parameters(), lr=0.1)],
        WEIGHTS,
        shared_parameters=model[0].parameters(),
    )
    x = batch(0, dtype=torch.float64)
    J = jacobian(model, lambda: two_losses(model, x))
    n = sum(p.numel() for p in model[0].parameters())
    alpha = clipped_alpha(J[:, :n], WEIGHTS, 0.4, "hard")
    opt.backward(two_losses(model, x))
    torch.testing.assert_close(flat_grad(model)[:n], alpha @ J[:, :n])
    torch.testing.assert_close(
        flat_grad(model)[n:], torch.tensor(WEIGHTS, dtype=torch.float64) @ J[:, n:]
    )


# --- Schedulers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", PAIRS)
def test_schedulers(name, scheduler):
    """As a scheduler on each of the stock ones."""
    model, twin = network(), network()
    opt, stock = joint(model, PAIRS[name]), singles(twin, PAIRS[name])
    if scheduler in ("CyclicLR", "OneCycleLR"):  # momentum means another thing in each
        torch_class = getattr(torch.optim.lr_scheduler, scheduler)
        arguments = {"CyclicLR": (0.01, 0.1, 2), "OneCycleLR": (0.1, 6)}[scheduler]
        make = lambda o: torch_class(o, *arguments, cycle_momentum=False)  # noqa: E731
    else:
        make = SCHEDULERS[scheduler]
    schedule, others = make(opt), [make(o) for o in stock]
    for t in range(5):
        copied_step(opt, model, twin, stock, t)
        metric = (1.0,) if scheduler == "ReduceLROnPlateau" else ()
        schedule.step(*metric)
        for other in others:
            other.step(*metric)
    same(model, twin, opt, stock)
    assert schedule.get_last_lr() == [lr for other in others for lr in other.get_last_lr()]


def test_a_schedule_per_optimizer():
    """A scheduler may also be given one of them."""
    model, twin = network(), network()
    pair = PAIRS["Muon+AdamW"]
    opt, stock = joint(model, pair), singles(twin, pair)
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(o, gamma)
        for optimizers in (opt.optimizers, stock)
        for o, gamma in zip(optimizers, (0.5, 0.9), strict=True)
    ]
    for t in range(3):
        copied_step(opt, model, twin, stock, t)
        for schedule in schedules:
            schedule.step()
    same(model, twin, opt, stock)


def test_cycling_momentum_needs_one_that_all_have():
    model = network()
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        torch.optim.lr_scheduler.CyclicLR(joint(model, PAIRS["AdamW+SGD"]), 0.01, 0.1)
    opt = joint(model, (lambda p: Adam(p, lr=0.1), lambda p: AdamW(p, lr=0.1)))
    torch.optim.lr_scheduler.CyclicLR(opt, 0.01, 0.1)
    assert [group["betas"][0] for group in opt.param_groups] == [0.9, 0.9]


# --- Checkpoints ---------------------------------------------------------------------------------


def trained(pair, steps=2):
    model = network()
    opt = joint(model, pair)
    for t in range(steps):
        step(opt, model, t)
    return model, opt


def test_checkpoint(pair):
    model, opt = trained(pair)
    twin = copy.deepcopy(model)
    other = joint(twin, pair)
    other.load_state_dict(resave(opt.state_dict()))
    for t in range(2, 4):
        step(opt, model, t)
        step(other, twin, t)
    assert bits(model.state_dict()) == bits(twin.state_dict())
    assert bits(opt.state_dict()) == bits(other.state_dict())


@pytest.mark.parametrize("form", [list, tuple])
def test_from_the_single_states_and_to_them(pair, form):
    model, opt = trained(pair)
    alone = [resave(optimizer.state_dict()) for optimizer in opt.optimizers]
    twin = copy.deepcopy(model)
    other = joint(twin, pair)
    other.load_state_dict(form(alone))
    stock = singles(copy.deepcopy(model), pair)
    for optimizer, state in zip(stock, alone, strict=True):
        optimizer.load_state_dict(state)
    assert states(stock) == states(opt.optimizers) == states(other.optimizers)
    step(opt, model, 2)
    step(other, twin, 2)
    assert bits(model.state_dict()) == bits(twin.state_dict())


def test_from_one_optimizer_with_the_same_groups_and_to_it():
    model = network()
    weights, rest = split(model)
    make = lambda p: AdamW(p, lr=0.02)  # noqa: E731
    opt = joint(model, (make, make))
    twin = copy.deepcopy(model)
    one = CAGradClip(make([{"params": part} for part in split(twin)]), WEIGHTS)
    for t in range(2):
        step(opt, model, t)
        step(one, twin, t)
    assert bits(opt.state_dict()) == bits(one.state_dict())
    stock = make([{"params": weights}, {"params": rest}])
    stock.load_state_dict({k: v for k, v in opt.state_dict().items() if k != "raco_optim"})
    assert bits(list(stock.state.values())) == bits(list(opt.state.values()))
    for source, target, net in ((one, joint, model), (opt, None, twin)):
        new = (
            joint(net, (make, make))
            if target
            else CAGradClip(make([{"params": part} for part in split(net)]), WEIGHTS)
        )
        new.load_state_dict(resave(source.state_dict()))
        assert bits(new.state_dict()) == bits(source.state_dict())


def with_late_group(model):
    first, second = SGD([model[0].weight], lr=0.1, momentum=0.9), AdamW([model[0].bias], lr=0.1)
    opt = CAGradClip([first, second], WEIGHTS)
    opt.add_param_group({"params": [model[2].weight], "optimizer": 0})
    opt.add_param_group({"params": [model[2].bias], "optimizer": 1})
    return opt


def test_checkpoint_after_groups_were_added():
    """The numbers in the state follow `param_groups`, as torch.distributed.checkpoint expects."""
    model = network()
    opt = with_late_group(model)
    for t in range(2):
        step(opt, model, t)
    state = opt.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0], [1], [2], [3]]
    order = [p for group in opt.param_groups for p in group["params"]]
    for number, p in enumerate(order):
        assert bits(state["state"][number]) == bits(dict(opt.state[p]))
    twin = copy.deepcopy(model)
    other = with_late_group(twin)
    other.load_state_dict(resave(state))
    step(opt, model, 2)
    step(other, twin, 2)
    assert bits(model.state_dict()) == bits(twin.state_dict())
    assert bits(opt.state_dict()) == bits(other.state_dict())


def test_groups_in_another_order_are_not_loaded():
    """The same groups, of the same sizes: torch would load them by their positions."""
    model = network()
    opt = with_late_group(model)
    step(opt, model, 0)
    square = copy.deepcopy(model)
    other = CAGradClip(
        [
            SGD([{"params": [square[0].weight]}, {"params": [square[2].weight]}], lr=0.1),
            AdamW([{"params": [square[0].bias]}, {"params": [square[2].bias]}], lr=0.1),
        ],
        WEIGHTS,
    )
    with pytest.raises(ValueError, match=r"inner optimizers \[0, 0, 1, 1\]; got 4, of \[0"):
        other.load_state_dict(opt.state_dict())


def snapshot(opt):
    """Values, and the very objects: who holds a group or a state must not be left behind."""
    return (
        bits(opt.state_dict()),
        [id(group) for group in opt.param_groups],
        [id(entry) for entry in opt.state.values()],
        [id(o.state) for o in opt.optimizers],
    )


BAD_STATES = {
    "too few": lambda good, parts: parts[:1],
    "too many": lambda good, parts: [*parts, parts[0]],
    "second is of other groups": lambda good, parts: [parts[0], parts[0] | {"param_groups": []}],
    "second lacks its groups": lambda good, parts: [parts[0], {"state": {}}],
    "second is None": lambda good, parts: [parts[0], None],
    "a group less": lambda good, parts: good | {"param_groups": good["param_groups"][:1]},
    "other sizes": lambda good, parts: (
        good
        | {"param_groups": [good["param_groups"][0], {**good["param_groups"][1], "params": [2]}]}
    ),
    "no groups": lambda good, parts: {"state": good["state"]},
    "no mapping": lambda good, parts: 5,
    "a string": lambda good, parts: "ab",
}


@pytest.mark.parametrize("bad", BAD_STATES)
def test_a_failed_load_changes_nothing(pair, bad):
    model, opt = trained(pair)
    good = copy.deepcopy(opt.state_dict())
    parts = copy.deepcopy([o.state_dict() for o in opt.optimizers])
    step(opt, model, 2)
    before = snapshot(opt)
    state = BAD_STATES[bad](good, parts)
    with pytest.raises((ValueError, TypeError)):
        opt.load_state_dict(state)
    assert snapshot(opt) == before


class Half(SGD):
    """Loads, and fails then."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        raise RuntimeError("a file was closed")


def test_a_load_that_fails_in_the_middle_changes_nothing():
    model = network()
    weights, rest = split(model)
    opt = CAGradClip([AdamW(weights), Half(rest, lr=0.1, momentum=0.9)], WEIGHTS)
    step(opt, model, 0)
    state = copy.deepcopy(opt.state_dict())
    step(opt, model, 1)
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="a file was closed") as caught:
        opt.load_state_dict(state)
    assert "Nothing was loaded" in "".join(caught.value.__notes__)
    assert snapshot(opt) == before


class WithExtra(SGD):
    def state_dict(self):
        return super().state_dict() | {"extra": 1}


class WithGlobal(SGD):
    """Keeps an entry that belongs to no parameter."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.state["extra"] = {"t": 0}


@pytest.mark.parametrize("kind", [WithExtra, WithGlobal])
def test_states_that_can_not_be_joined_say_so(kind):
    model = network()
    weights, rest = split(model)
    opt = CAGradClip([AdamW(weights), kind(rest, lr=0.1)], WEIGHTS)
    with pytest.raises(ValueError, match=f"{kind.__name__} with .*'extra'.*each of `optimizers`"):
        opt.state_dict()


# --- Copies, hooks and the rest of the contract --------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how):
    model, opt = trained(PAIRS["AdamW+SGD"])
    twin, other = (
        copy.deepcopy((model, opt))
        if how == "deepcopy"
        else pickle.loads(pickle.dumps((model, opt)))
    )
    assert all(p is not q for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    other.param_groups[0]["lr"] = 0.5
    assert other.optimizers[0].param_groups[0]["lr"] == 0.5
    assert opt.param_groups[0]["lr"] != 0.5
    opt.param_groups[0]["lr"] = 0.5
    for t in range(2, 4):
        step(opt, model, t)
        step(other, twin, t)
    assert bits(model.state_dict()) == bits(twin.state_dict())
    assert bits(opt.state_dict()) == bits(other.state_dict())


def test_hooks_fire_once_and_on_each(pair):
    model, calls = network(), []
    opt = joint(model, pair)
    opt.register_step_pre_hook(lambda o, args, kwargs: calls.append(("wrapper", o is opt)))
    opt.optimizer.register_step_pre_hook(
        lambda o, args, kwargs: calls.append(("joint", o is opt.optimizer))
    )
    for k, inner in enumerate(opt.optimizers):
        inner.register_step_post_hook(
            lambda o, args, kwargs, k=k: calls.append((k, o is opt.optimizers[k]))
        )
    step(opt, model, 0)
    assert calls == [("wrapper", True), ("joint", True), (0, True), (1, True)]


def test_state_hooks(pair):
    model, calls = network(), []
    opt = joint(model, pair)
    for name, target in (("wrapper", opt), ("joint", opt.optimizer), ("inner", opt.optimizers[1])):
        target.register_state_dict_pre_hook(lambda o, n=name: calls.append(f"save {n}"))
        target.register_load_state_dict_post_hook(lambda o, n=name: calls.append(f"load {n}"))
    opt.optimizer.register_state_dict_post_hook(lambda o, state: state | {"note": "mine"})
    state = opt.state_dict()
    assert state["note"] == "mine"
    del state["note"]
    opt.load_state_dict(state)
    assert calls == [
        *(f"save {n}" for n in ("wrapper", "joint", "inner")),
        *(f"load {n}" for n in ("inner", "joint", "wrapper")),
    ]


def test_state_is_that_of_all(pair):
    model, opt = trained(pair)
    assert set(map(id, opt.state)) == set(map(id, model.parameters()))
    assert len(opt.state) == 4
    for optimizer in opt.optimizers:
        for p, entry in optimizer.state.items():
            assert opt.state[p] is entry
            assert p in opt.state
    p = split(model)[1][0]
    opt.state[p] = {"mine": 1}
    assert opt.optimizers[1].state[p] == {"mine": 1}
    del opt.state[p]
    assert p not in opt.optimizers[1].state
    assert p not in opt.state, "asking does not make an entry"
    assert opt.state[p] == {}, "as the defaultdict of torch"
    stranger = nn.Parameter(torch.zeros(2))
    assert stranger not in opt.state
    with pytest.raises(KeyError):
        opt.state[stranger]
    opt.state.clear()
    assert all(not o.state for o in opt.optimizers)
    with pytest.raises(AttributeError):
        opt.state = {}  # of which one?


def test_defaults():
    model = network()
    opt = joint(model, PAIRS["AdamW+SGD"])
    first, second = (o.defaults for o in opt.optimizers)
    assert dict(opt.defaults) == {k: v for k, v in first.items() if k in second}
    with pytest.raises(TypeError):
        opt.defaults["lr"] = 1.0  # of which one?


def test_repr_shows_all(pair):
    opt = joint(network(), pair)
    shown = repr(opt)
    assert shown.startswith("CAGradClip(")
    assert all(type(o).__name__ in shown for o in opt.optimizers)


def test_every_rule_takes_several():
    model = network()
    for opt in (
        MultiObjectiveOptimizer(singles(model, PAIRS["AdamW+SGD"]), lambda gram: gram[0] * 0 + 1),
        raco_optim.MGDA(singles(model, PAIRS["AdamW+SGD"])),
        raco_optim.LinearScalarization(singles(model, PAIRS["AdamW+SGD"]), WEIGHTS),
    ):
        step(opt, model, 0)


# --- What is refused -----------------------------------------------------------------------------


def test_an_optimizer_given_twice():
    inner = SGD(network().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="different parameters; got SGD, which shares 4 with"):
        CAGradClip([inner, inner], WEIGHTS)


def test_a_parameter_held_twice():
    model = network()
    with pytest.raises(ValueError, match="of different parameters; got AdamW, which shares 1"):
        CAGradClip([SGD(model.parameters(), lr=0.1), AdamW([model[0].bias])], WEIGHTS)


def optimizers_of_no_use(model):
    p = model.parameters()
    return {
        "[]": [],
        "()": (),
        "generator": (SGD([q], lr=0.1) for q in p),
        "CAGradClip": [CAGradClip(SGD(p, lr=0.1), WEIGHTS)],
        "Linear": [SGD(model.parameters(), lr=0.1), nn.Linear(1, 1)],
        "type": [SGD],
        "NoneType": None,
    }


@pytest.mark.parametrize("given", optimizers_of_no_use(network()))
def test_no_optimizer(given):
    inner = optimizers_of_no_use(network())[given]
    name = {"()": r"\[\]|\(\)|tuple", "[]": r"\[\]"}.get(given, given)
    with pytest.raises(TypeError, match=rf"`inner` must be an optimizer.*; got ({name})"):
        CAGradClip(inner, WEIGHTS)


def test_those_that_need_a_closure_stand_alone():
    po = pytest.importorskip("pytorch_optimizer")
    model = network()
    weights, rest = split(model)
    for inner in (torch.optim.LBFGS(weights), po.SAM(weights, torch.optim.SGD, lr=0.1)):
        with pytest.raises(ValueError, match=f"without a closure; got {type(inner).__name__}"):
            CAGradClip([inner, SGD(rest, lr=0.1)], WEIGHTS)


# --- Parameters that nobody holds ----------------------------------------------------------------


def unheld(found):
    return [str(w.message) for w in found if "no inner optimizer holds" in str(w.message)]


@pytest.mark.parametrize("form", ["tensors", "callables"])
def test_one_warning_for_parameters_that_nobody_holds(form):
    model = network()
    opt = CAGradClip(AdamW(model[0].parameters()), WEIGHTS)

    def losses():
        if form == "callables":
            return [lambda i=i: two_losses(model, batch(0))[i] for i in range(2)]
        return two_losses(model, batch(0))

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        opt.backward(losses())
        opt.backward(losses())
    (message,) = unheld(found)
    assert "depend on 2 parameters, with 14 numbers," in message
    assert "CAGradClip([trunk_optimizer, head_optimizer], ...)" in message
    where = [w.filename for w in found if "no inner optimizer holds" in str(w.message)]
    assert where == [__file__], "it points to the caller"


def test_no_warning_for_what_is_held_or_no_parameter():
    model = network()
    x = batch(0).requires_grad_(True)  # an input, as for a gradient penalty
    opt = CAGradClip([SGD(model[0].parameters(), lr=0.1), AdamW(model[2].parameters())], WEIGHTS)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        opt.backward(two_losses(model, x))
    assert unheld(found) == []
    frozen = network()
    frozen[2].requires_grad_(False)
    opt = CAGradClip(SGD(frozen[0].parameters(), lr=0.1), WEIGHTS)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        opt.backward(two_losses(frozen, x))
    assert unheld(found) == []


def test_the_warning_waits_for_the_first_combination():
    """A failed call and micro-batches count as one with the call that combines."""
    model = network()
    opt = CAGradClip(SGD(model[0].parameters(), lr=0.1), WEIGHTS)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with pytest.raises(FloatingPointError):
            opt.backward([loss * torch.nan for loss in two_losses(model, batch(0))])
        opt.backward(two_losses(model, batch(0)), accumulate=True)
        opt.backward([loss * 1 for loss in two_losses(model, batch(1))])
    assert len(unheld(found)) == 1


def test_heads_under_an_optimizer_of_their_own_move():
    """The case that was reported: with both optimizers together, the heads are trained."""
    model = network()
    opt = CAGradClip([AdamW(model[0].parameters()), SGD(model[2].parameters(), lr=0.1)], WEIGHTS)
    before = model[2].weight.detach().clone()
    step(opt, model, 0)
    assert not torch.equal(model[2].weight, before)
