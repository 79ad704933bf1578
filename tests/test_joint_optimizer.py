"""Several inner optimizers step together as each would alone, and are one torch optimizer.

The witnesses are the stock optimizers, driven by hand along the combined gradient, and the single
optimizer that holds the same groups.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, RMSprop, lr_scheduler

from raco_optim import MGDA, CAGradClip, LinearScalarization, MultiObjectiveOptimizer
from tests.problems_nn import (
    batch,
    bits,
    clipped_alpha,
    flat_grad,
    jacobian,
    network,
    said,
    through_a_file,
    two_losses,
)
from tests.test_schedulers import SCHEDULERS

WEIGHTS = [0.6, 0.4]
SETS = {
    "Muon+AdamW": (lambda p: Muon(p, lr=0.02), lambda p: AdamW(p, lr=0.03, weight_decay=0.1)),
    "AdamW+SGD": (lambda p: AdamW(p, lr=0.02), lambda p: SGD(p, lr=0.1, momentum=0.9)),
    "RMSprop+Adam": (lambda p: RMSprop(p, lr=0.01, momentum=0.5), lambda p: Adam(p, lr=0.01)),
    "SGD+AdamW+RMSprop": (
        lambda p: SGD(p, lr=0.1),
        lambda p: AdamW(p, lr=0.01),
        lambda p: RMSprop(p, lr=0.01),
    ),
}
PAIR = SETS["AdamW+SGD"]
ALL_SETS = pytest.mark.parametrize("makers", SETS.values(), ids=SETS)


def split(model, n=2):
    """Matrices for the first optimizer and the rest for the others."""
    parameters = list(model.parameters())
    matrices, *vectors = ([p for p in parameters if (p.dim() == 2) == here] for here in (1, 0))
    return [matrices, *vectors] if n == 2 else [matrices, *([p] for p in vectors[0])]


def singles(model, makers=PAIR):
    return [make(p) for make, p in zip(makers, split(model, len(makers)), strict=True)]


def joint(model, makers=PAIR, **options):
    return CAGradClip(singles(model, makers), WEIGHTS, **options)


def step(opt, model, t):
    opt.zero_grad()
    opt.backward(two_losses(model, batch(t)))
    opt.step()


def trained(makers=PAIR):
    model = network()
    opt = joint(model, makers)
    for t in range(2):
        step(opt, model, t)
    return model, opt


def of_groups(optimizer):
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def same_run(model, opt, twin, other, steps=(2, 3)):
    """Both take the same steps from here, bit for bit."""
    for t in steps:
        step(opt, model, t)
        step(other, twin, t)
    return bits([model.state_dict(), opt.state_dict()]) == bits(
        [twin.state_dict(), other.state_dict()]
    )


@ALL_SETS
def test_steps_are_those_of_the_single_optimizers(makers):
    """Algorithm 1 by hand, with p from the oracle, and a step of each stock optimizer."""
    model, twin = network(torch.float64), network(torch.float64)
    opt, stock = joint(model, makers), singles(twin, makers)
    for t in range(4):
        x = batch(t, dtype=torch.float64)
        opt.zero_grad()
        opt.backward(two_losses(model, x))
        opt.step()
        J = jacobian(twin, lambda x=x: two_losses(twin, x))
        combined = clipped_alpha(J, WEIGHTS, 0.4, "hard") @ J
        parts = combined.split([p.numel() for p in twin.parameters()])
        for p, g in zip(twin.parameters(), parts, strict=True):
            p.grad = g.view_as(p).clone()
        for optimizer in stock:
            optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def copied_step(opt, model, twin, stock, t):
    """A step, and one of the stock optimizers with the same bits in ``.grad``."""
    opt.zero_grad()
    opt.backward(two_losses(model, batch(t)))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    opt.step()
    for optimizer in stock:
        optimizer.step()


def check_same(model, twin, opt, stock):
    assert bits(model.state_dict()) == bits(twin.state_dict())
    assert bits([o.state_dict() for o in opt.optimizers]) == bits([o.state_dict() for o in stock])


@ALL_SETS
def test_bit_for_bit(makers):
    """With a scheduler on each inner optimizer."""
    model, twin = network(), network()
    opt, stock = joint(model, makers), singles(twin, makers)
    schedules = [
        lr_scheduler.ExponentialLR(o, 0.5 + 0.2 * k)
        for optimizers in (opt.optimizers, stock)
        for k, o in enumerate(optimizers)
    ]
    for t in range(4):
        copied_step(opt, model, twin, stock, t)
        for schedule in schedules:
            schedule.step()
    check_same(model, twin, opt, stock)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler):
    """As a scheduler on each of the stock optimizers."""
    makers = list(SETS.values())[list(SCHEDULERS).index(scheduler) % len(SETS)]
    model, twin = network(), network()
    opt, stock = joint(model, makers), singles(twin, makers)
    make = SCHEDULERS[scheduler]
    if scheduler in ("CyclicLR", "OneCycleLR"):  # momentum means another thing in each
        arguments = {"CyclicLR": (0.01, 0.1, 2), "OneCycleLR": (0.1, 6)}[scheduler]

        def make(o):
            return getattr(lr_scheduler, scheduler)(o, *arguments, cycle_momentum=False)

    schedule, others = make(opt), [make(o) for o in stock]
    metric = (1.0,) if scheduler == "ReduceLROnPlateau" else ()
    for t in range(5):
        copied_step(opt, model, twin, stock, t)
        for each in (schedule, *others):
            each.step(*metric)
    check_same(model, twin, opt, stock)
    assert schedule.get_last_lr() == [lr for other in others for lr in other.get_last_lr()]


def test_cycling_momentum_needs_one_that_all_have():
    model = network()
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        lr_scheduler.CyclicLR(joint(model), 0.01, 0.1)
    opt = joint(model, (lambda p: Adam(p, lr=0.1), lambda p: AdamW(p, lr=0.1)))
    lr_scheduler.CyclicLR(opt, 0.01, 0.1)
    assert [group["betas"][0] for group in opt.param_groups] == [0.9, 0.9]


@pytest.mark.parametrize("form", [list, tuple])
def test_a_list_of_one_optimizer_is_that_optimizer(form):
    inner = AdamW(network().parameters())
    opt = CAGradClip(form([inner]), WEIGHTS)
    assert opt.optimizer is inner
    assert opt.optimizers == (inner,)
    assert opt.param_groups is inner.param_groups


def test_closure():
    model, twin = network(), network()
    opt, other = joint(model), joint(twin)
    calls = []

    def closure():
        calls.append(1)
        opt.zero_grad()
        return two_losses(model, batch(0))

    first, second = (loss.item() for loss in two_losses(network(), batch(0)))
    assert float(opt.step(closure)) == pytest.approx(0.6 * first + 0.4 * second, rel=1e-6)
    assert calls == [1]
    step(other, twin, 0)
    assert same_run(model, opt, twin, other, steps=())


def test_a_skipped_step_moves_no_parameter():
    model = network()
    opt = joint(model, nonfinite="skip")
    step(opt, model, 0)
    before = bits([model.state_dict(), opt.state_dict()["state"]])
    opt.zero_grad()
    a, b = two_losses(model, batch(1))
    opt.backward([a, b * torch.nan])
    opt.step()
    assert bits([model.state_dict(), opt.state_dict()["state"]]) == before


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model = network()
    opt = joint(model)
    opt.backward(two_losses(model, batch(0)))
    assert flat_grad(model).norm() > 0
    opt.zero_grad(set_to_none=set_to_none)
    assert [p.grad is None for p in model.parameters()] == [set_to_none] * 4
    assert flat_grad(model).norm() == 0


@ALL_SETS
def test_grad_scaler(makers):
    """Gradients are unscaled once, and an overflow skips the step of all."""
    model, twin = network(), network()
    opt, stock = joint(model, makers, nonfinite="propagate"), singles(twin, makers)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for t in range(3):
        opt.zero_grad()
        a, b = (scaler.scale(loss) for loss in two_losses(model, batch(t)))
        opt.backward([a, b * torch.inf if t == 1 else b])
        scaler.unscale_(opt)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        scaler.step(opt)
        scaler.update()
        if t != 1:
            found = flat_grad(twin)
            J = jacobian(twin, lambda t=t: two_losses(twin, batch(t)))
            expected = clipped_alpha(J, WEIGHTS, 0.4, "hard") @ J
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            for optimizer in stock:
                optimizer.step()
        check_same(model, twin, opt, stock)
        assert scaler.get_scale() == (2.0**9 if t else 2.0**10)


def test_fused_optimizers_are_unscaled_once():
    """They unscale by themselves if a GradScaler asks them to."""
    found = []
    for fused in (True, False):
        model = network()
        makers = (
            lambda p, fused=fused: AdamW(p, lr=0.1, eps=1.0, fused=fused),
            lambda p, fused=fused: SGD(p, lr=0.1, fused=fused),
        )
        opt = joint(model, makers, nonfinite="propagate")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for t in range(2):
            opt.zero_grad()
            opt.backward([scaler.scale(loss) for loss in two_losses(model, batch(t))])
            scaler.step(opt)
            scaler.update()
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_micro_batches():
    model, twin = network(), network()
    opt, other = joint(model), joint(twin)
    opt.backward(two_losses(model, batch(0)), accumulate=True)
    with pytest.raises(RuntimeError, match="accumulated but not combined"):
        opt.step()
    opt.backward(two_losses(model, batch(1)))
    pairs = zip(*(two_losses(twin, batch(t)) for t in range(2)), strict=True)
    other.backward([a + b for a, b in pairs])
    torch.testing.assert_close(flat_grad(model), flat_grad(twin))


def test_every_method_takes_several():
    model = network()
    for opt in (
        MultiObjectiveOptimizer(singles(model), lambda gram: gram[0] * 0 + 1),
        MGDA(singles(model)),
        LinearScalarization(singles(model), WEIGHTS),
    ):
        step(opt, model, 0)


def four_groups():
    model = network()
    first = SGD([{"params": [model[0].weight]}, {"params": [model[2].weight]}], lr=0.1)
    second = AdamW([{"params": [model[0].bias]}, {"params": [model[2].bias]}], lr=0.1)
    return model, CAGradClip([first, second], WEIGHTS)


def test_groups_are_all_groups_in_order():
    _, opt = four_groups()
    first, second = opt.optimizers
    both = [*first.param_groups, *second.param_groups]
    assert [id(g) for g in opt.param_groups] == [id(g) for g in both]
    assert opt.param_groups is opt.param_groups
    opt.param_groups[2]["lr"] = 0.5
    assert second.param_groups[0]["lr"] == 0.5


REMOVALS = {
    "del": lambda groups: groups.__delitem__(1),
    "negative": lambda groups: groups.__delitem__(-3),
    "pop": lambda groups: groups.pop(1),
    "slice": lambda groups: groups.__setitem__(slice(1, 2), []),
}


@pytest.mark.parametrize("remove", REMOVALS.values(), ids=REMOVALS)
@pytest.mark.filterwarnings("ignore:the losses depend on")
def test_removing_a_group(remove):
    model, opt = four_groups()
    step(opt, model, 0)
    remove(opt.param_groups)
    before = model[2].weight.detach().clone()
    kept = [[id(p)] for p in (model[0].weight, model[0].bias, model[2].bias)]
    step(opt, model, 1)
    assert torch.equal(model[2].weight, before)
    assert of_groups(opt) == kept
    assert [of_groups(o) for o in opt.optimizers] == [kept[:1], kept[1:]]


def test_lists_of_groups_stay_the_same_lists():
    """A user may hold one; pytorch_optimizer's SAM shares one, for instance."""
    model, opt = four_groups()
    opt.backward(two_losses(model, batch(0)))
    groups, parts = opt.param_groups, [x.param_groups for x in opt.optimizers]
    del groups[0]
    opt.zero_grad()  # leaves the gradients of a removed group alone, as torch does
    assert [p.grad is None for p in model.parameters()] == [False, True, True, True]
    opt.param_groups = groups[::-1]
    assert opt.param_groups is groups
    assert all(x.param_groups is part for x, part in zip(opt.optimizers, parts, strict=True))
    assert [len(part) for part in parts] == [1, 2]
    groups.clear()
    assert opt.param_groups == []
    assert all(x.param_groups == [] for x in opt.optimizers)


@pytest.mark.parametrize("copies", [False, True], ids=["same dicts", "new dicts"])
def test_assigning_groups(copies):
    """In another order and one less; each stays with the optimizer that holds its parameters."""
    model, opt = four_groups()
    groups = [opt.param_groups[k] for k in (3, 0, 2)]
    opt.param_groups = [dict(group) for group in groups] if copies else groups
    ids = [[id(p)] for p in (model[2].bias, model[0].weight, model[0].bias)]
    assert of_groups(opt) == ids
    assert [of_groups(o) for o in opt.optimizers] == [[ids[1]], [ids[0], ids[2]]]
    opt.param_groups.reverse()
    assert of_groups(opt) == ids[::-1]
    assert sorted(of_groups(opt.optimizers[1])) == sorted([ids[0], ids[2]])


def test_groups_of_no_optimizer_or_of_two_are_refused():
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


def test_groups_changed_on_an_inner_optimizer():
    """Lightning's callback does this, for instance."""
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
    def make(net):
        return [SGD([net[0].weight], lr=0.1, momentum=0.9), AdamW([net[0].bias], lr=0.05)]

    model, twin = network(), network()
    opt, stock = CAGradClip(make(model), WEIGHTS), make(twin)
    with pytest.warns(UserWarning, match="the losses depend on 2 parameters"):
        opt.backward(two_losses(model, batch(0)))
    late = [model[2].weight, model[2].bias]
    opt.add_param_group({"params": params(late), "optimizer": 0, "lr": 0.2})
    stock[0].add_param_group({"params": [twin[2].weight, twin[2].bias], "lr": 0.2})
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.05, 0.2], "at the end"
    for t in range(3):
        copied_step(opt, model, twin, stock, t)
    assert bits(model.state_dict()) == bits(twin.state_dict())


@pytest.mark.parametrize("position", ["missing", 2, -1, True, "0", 0.0])
def test_add_param_group_refuses_a_group_without_its_optimizer(position):
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
    inner = [AdamW(model[0].parameters()), SGD(model[2].parameters(), lr=0.1)]
    opt = CAGradClip(inner, WEIGHTS, shared_parameters=model[0].parameters())
    x = batch(0, dtype=torch.float64)
    trunk, heads = jacobian(model, lambda: two_losses(model, x)).split([30, 14], dim=1)
    alpha = clipped_alpha(trunk, WEIGHTS, 0.4, "hard")
    opt.backward(two_losses(model, x))
    expected = [alpha @ trunk, torch.tensor(WEIGHTS, dtype=torch.float64) @ heads]
    torch.testing.assert_close(flat_grad(model), torch.cat(expected))


def from_a_checkpoint(model, opt, makers):
    twin = copy.deepcopy(model)
    other = joint(twin, makers)
    other.load_state_dict(through_a_file(opt.state_dict()))
    return twin, other


def from_single_states(model, opt, makers, form=list):
    """The states of the inner optimizers, one by one; the stock optimizers load them, too."""
    alone = [through_a_file(optimizer.state_dict()) for optimizer in opt.optimizers]
    twin = copy.deepcopy(model)
    other, stock = joint(twin, makers), singles(copy.deepcopy(model), makers)
    other.load_state_dict(form(alone))
    for optimizer, state in zip(stock, alone, strict=True):
        optimizer.load_state_dict(state)
    check_same(model, twin, opt, stock)
    check_same(model, twin, other, stock)
    return twin, other


RESUMED = {
    "checkpoint": from_a_checkpoint,
    "list of states": from_single_states,
    "tuple of states": lambda *a: from_single_states(*a, form=tuple),
    "deepcopy": lambda model, opt, _: copy.deepcopy((model, opt)),
    "pickle": lambda model, opt, _: pickle.loads(pickle.dumps((model, opt))),
}


@ALL_SETS
@pytest.mark.parametrize("resume", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_goes_on_bit_for_bit(makers, resume):
    model, opt = trained(makers)
    twin, other = resume(model, opt, makers)
    assert all(p is not q for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    other.param_groups[0]["lr"] = 0.5
    assert other.optimizers[0].param_groups[0]["lr"] == 0.5
    assert opt.param_groups[0]["lr"] != 0.5
    opt.param_groups[0]["lr"] = 0.5
    assert same_run(model, opt, twin, other)


def test_from_one_optimizer_with_the_same_groups_and_to_it():
    def make(p):
        return AdamW(p, lr=0.02)

    def one_of(net):
        return CAGradClip(make([{"params": part} for part in split(net)]), WEIGHTS)

    model = network()
    twin = copy.deepcopy(model)
    opt, one = joint(model, (make, make)), one_of(twin)
    assert same_run(model, opt, twin, one)
    stock = make([{"params": part} for part in split(model)])
    stock.load_state_dict({k: v for k, v in opt.state_dict().items() if k != "raco_optim"})
    assert bits(list(stock.state.values())) == bits(list(opt.state.values()))
    for source, new in ((one, joint(model, (make, make))), (opt, one_of(twin))):
        new.load_state_dict(through_a_file(source.state_dict()))
        assert bits(new.state_dict()) == bits(source.state_dict())


def with_late_groups(model):
    first, second = SGD([model[0].weight], lr=0.1, momentum=0.9), AdamW([model[0].bias], lr=0.1)
    opt = CAGradClip([first, second], WEIGHTS)
    opt.add_param_group({"params": [model[2].weight], "optimizer": 0})
    opt.add_param_group({"params": [model[2].bias], "optimizer": 1})
    return opt


def test_checkpoint_after_groups_were_added():
    """The numbers in the state follow `param_groups`, as torch.distributed.checkpoint expects."""
    model = network()
    opt = with_late_groups(model)
    for t in range(2):
        step(opt, model, t)
    state = opt.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0], [1], [2], [3]]
    order = [p for group in opt.param_groups for p in group["params"]]
    for number, p in enumerate(order):
        assert bits(state["state"][number]) == bits(dict(opt.state[p]))
    twin = copy.deepcopy(model)
    other = with_late_groups(twin)
    other.load_state_dict(through_a_file(state))
    assert same_run(model, opt, twin, other)


def test_groups_in_another_order_are_not_loaded():
    """The same groups, of the same sizes: torch would load them by their positions."""
    model = network()
    opt = with_late_groups(model)
    step(opt, model, 0)
    _, other = four_groups()
    with pytest.raises(ValueError, match=r"inner optimizers \[0, 0, 1, 1\]; got 4, of \[0"):
        other.load_state_dict(opt.state_dict())


def snapshot(opt):
    """Values, and the identities of all groups and states, which a user may hold."""
    return (
        bits(opt.state_dict()),
        [id(group) for group in opt.param_groups],
        [id(entry) for entry in opt.state.values()],
        [id(o.state) for o in opt.optimizers],
    )


def with_other_sizes(good, parts):
    first, second = good["param_groups"]
    return good | {"param_groups": [first, second | {"params": [2]}]}


BAD_STATES = {
    "too few": lambda good, parts: parts[:1],
    "too many": lambda good, parts: [*parts, parts[0]],
    "second is of other groups": lambda good, parts: [parts[0], parts[0] | {"param_groups": []}],
    "second lacks its groups": lambda good, parts: [parts[0], {"state": {}}],
    "second is None": lambda good, parts: [parts[0], None],
    "a group less": lambda good, parts: good | {"param_groups": good["param_groups"][:1]},
    "other sizes": with_other_sizes,
    "no groups": lambda good, parts: {"state": good["state"]},
    "no mapping": lambda good, parts: 5,
    "a string": lambda good, parts: "ab",
}


@pytest.mark.parametrize("bad", BAD_STATES.values(), ids=BAD_STATES)
def test_a_failed_load_changes_nothing(bad):
    model, opt = trained()
    state = bad(*copy.deepcopy((opt.state_dict(), [o.state_dict() for o in opt.optimizers])))
    step(opt, model, 2)
    before = snapshot(opt)
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
    opt = joint(model, (AdamW, lambda p: Half(p, lr=0.1, momentum=0.9)))
    step(opt, model, 0)
    state = copy.deepcopy(opt.state_dict())
    step(opt, model, 1)
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="a file was closed") as caught:
        opt.load_state_dict(state)
    assert "Nothing was loaded" in said(caught.value)
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
def test_states_that_cannot_be_joined_are_refused(kind):
    opt = joint(network(), (AdamW, lambda p: kind(p, lr=0.1)))
    with pytest.raises(ValueError, match=f"{kind.__name__} with .*'extra'.*each of `optimizers`"):
        opt.state_dict()


def test_step_hooks_run_once_on_each():
    model, calls = network(), []
    opt = joint(model)
    for name, target in (("wrapper", opt), ("joint", opt.optimizer)):
        target.register_step_pre_hook(lambda o, *_, n=name, t=target: calls.append((n, o is t)))
    for k, inner in enumerate(opt.optimizers):
        inner.register_step_post_hook(lambda o, *_, n=k, t=inner: calls.append((n, o is t)))
    step(opt, model, 0)
    assert calls == [("wrapper", True), ("joint", True), (0, True), (1, True)]


def test_state_hooks():
    calls = []
    opt = joint(network())
    for name, target in (("wrapper", opt), ("joint", opt.optimizer), ("inner", opt.optimizers[1])):
        target.register_state_dict_pre_hook(lambda o, n=name: calls.append(f"save {n}"))
        target.register_load_state_dict_post_hook(lambda o, n=name: calls.append(f"load {n}"))
    opt.optimizer.register_state_dict_post_hook(lambda o, state: state | {"note": "mine"})
    state = opt.state_dict()
    assert state.pop("note") == "mine"
    opt.load_state_dict(state)
    saved, loaded = ("wrapper", "joint", "inner"), ("inner", "joint", "wrapper")
    assert calls == [*(f"save {n}" for n in saved), *(f"load {n}" for n in loaded)]


def test_state_is_that_of_all():
    model, opt = trained()
    assert set(map(id, opt.state)) == set(map(id, model.parameters()))
    assert len(opt.state) == 4
    for optimizer in opt.optimizers:
        for p, entry in optimizer.state.items():
            assert opt.state[p] is entry
            assert p in opt.state
    p = model[0].bias
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


def test_defaults_and_repr():
    opt = joint(network())
    first, second = (o.defaults for o in opt.optimizers)
    assert dict(opt.defaults) == {k: v for k, v in first.items() if k in second}
    with pytest.raises(TypeError):
        opt.defaults["lr"] = 1.0  # of which one?
    shown = repr(opt)
    assert shown.startswith("CAGradClip(")
    assert all(name in shown for name in ("AdamW", "SGD"))


def test_optimizers_that_share_parameters():
    model = network()
    inner = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="different parameters; got SGD, which shares 4 with"):
        CAGradClip([inner, inner], WEIGHTS)
    with pytest.raises(ValueError, match="of different parameters; got AdamW, which shares 1"):
        CAGradClip([inner, AdamW([model[0].bias])], WEIGHTS)


NOT_OPTIMIZERS = {
    r"\[\]": lambda p: [],
    r"(\[\]|\(\)|tuple)": lambda p: (),
    "generator": lambda p: (SGD([q], lr=0.1) for q in p),
    "CAGradClip": lambda p: [CAGradClip(SGD(p, lr=0.1), WEIGHTS)],
    "Linear": lambda p: [SGD(p, lr=0.1), nn.Linear(1, 1)],
    "type": lambda p: [SGD],
    "NoneType": lambda p: None,
}


@pytest.mark.parametrize("got", NOT_OPTIMIZERS)
def test_no_optimizer(got):
    inner = NOT_OPTIMIZERS[got](network().parameters())
    with pytest.raises(TypeError, match=rf"`inner` must be an optimizer.*; got {got}"):
        CAGradClip(inner, WEIGHTS)


def test_an_optimizer_that_needs_a_closure_stands_alone():
    po = pytest.importorskip("pytorch_optimizer")
    weights, rest = split(network())
    for inner in (torch.optim.LBFGS(weights), po.SAM(weights, SGD, lr=0.1)):
        with pytest.raises(ValueError, match=f"without a closure; got {type(inner).__name__}"):
            CAGradClip([inner, SGD(rest, lr=0.1)], WEIGHTS)


def unheld(run):
    """The warnings about such parameters."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [w for w in found if "no inner optimizer holds" in str(w.message)]


@pytest.mark.parametrize("form", ["tensors", "callables"])
def test_one_warning_for_parameters_that_no_optimizer_holds(form):
    model = network()
    opt = CAGradClip(AdamW(model[0].parameters()), WEIGHTS)

    def run():
        for _ in range(2):
            losses = two_losses(model, batch(0))
            if form == "callables":
                losses = [lambda i=i: two_losses(model, batch(0))[i] for i in range(2)]
            opt.backward(losses)

    (warning,) = unheld(run)
    assert "depend on 2 parameters, with 14 numbers," in str(warning.message)
    assert "CAGradClip([trunk_optimizer, head_optimizer], ...)" in str(warning.message)
    assert warning.filename == __file__, "it points to the caller"


def test_no_warning_for_inputs_and_frozen_parameters():
    model, frozen = network(), network()
    x = batch(0).requires_grad_(True)  # an input, as for a gradient penalty
    opt = CAGradClip([SGD(model[0].parameters(), lr=0.1), AdamW(model[2].parameters())], WEIGHTS)
    assert unheld(lambda: opt.backward(two_losses(model, x))) == []
    frozen[2].requires_grad_(False)
    opt = CAGradClip(SGD(frozen[0].parameters(), lr=0.1), WEIGHTS)
    assert unheld(lambda: opt.backward(two_losses(frozen, x))) == []


def test_the_warning_waits_for_the_first_combination():
    """A failed call and micro-batches count as one with the call that combines."""
    model = network()
    opt = CAGradClip(SGD(model[0].parameters(), lr=0.1), WEIGHTS)

    def run():
        with pytest.raises(FloatingPointError):
            opt.backward([loss * torch.nan for loss in two_losses(model, batch(0))])
        opt.backward(two_losses(model, batch(0)), accumulate=True)
        opt.backward([loss * 1 for loss in two_losses(model, batch(1))])

    assert len(unheld(run)) == 1
