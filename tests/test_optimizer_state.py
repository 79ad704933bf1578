"""Checkpoints, copies and the state hooks of the wrapper: nothing is lost, nothing is shared."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from raco_optim import CAGradClip
from tests.problems_nn import (
    INNER,
    WRAPPERS,
    as_asked,
    batch,
    bits,
    everything,
    network,
    through_a_file,
    train_step,
    two_losses,
)

DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}
COPIES = pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
# Every inner optimizer and every wrapper, in pairs.
PAIRS = list(zip(INNER, itertools.cycle(WRAPPERS)))


def run(model, opt, schedule, steps):
    for t in steps:
        train_step(opt, model, batch(t))
        schedule.step()


def start(inner, wrap):
    model = network()
    opt = WRAPPERS[wrap](INNER[inner](model.parameters()))
    return model, opt, lr_scheduler.ExponentialLR(opt, 0.9)


def started(inner, wrap, steps=2):
    parts = start(inner, wrap)
    run(*parts, range(steps))
    return parts


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_resumed_run_is_equal_in_every_bit(inner, wrap):
    whole, resumed = started(inner, wrap, 3), start(inner, wrap)
    checkpoint = through_a_file([part.state_dict() for part in whole])
    run(*whole, range(3, 6))
    for part, state in zip(resumed, checkpoint, strict=True):
        part.load_state_dict(state)
    assert bits(resumed[1].state_dict()) == bits(checkpoint[1])
    run(*resumed, range(3, 6))
    resumed[0].zero_grad()
    whole[0].zero_grad()
    assert everything(*resumed[:2]) == everything(*whole[:2])
    assert resumed[2].get_last_lr() == whole[2].get_last_lr()


@pytest.mark.parametrize("inner", INNER)
def test_state_holds_the_inner_moments_and_the_wrappers_settings(inner):
    _, opt, _ = started(inner, "CAGradClip")
    opt.weights, opt.c = [0.1, 0.9], 0.25
    state, plain = opt.state_dict(), opt.optimizer.state_dict()
    assert bits(state["state"]) == bits(plain["state"]) != {}
    assert bits(state["param_groups"]) == bits(plain["param_groups"])
    _, other, _ = start(inner, "CAGradClip")
    other.load_state_dict(through_a_file(state))
    assert (other.weights, other.c) == ((0.1, 0.9), 0.25)


@pytest.mark.parametrize(("inner", "wrap"), PAIRS)
def test_settings_after_loading_reach_the_inner_optimizer(inner, wrap):
    """Loading rebinds the parameter groups: a wrapper that kept the old list steers a dead copy."""
    _, opt, schedule = started(inner, wrap)
    opt.load_state_dict(opt.state_dict())
    for group in opt.param_groups:
        group["lr"] = 0.5
    schedule.step()
    assert opt.optimizer.param_groups[0]["lr"] == pytest.approx(0.45)


@pytest.mark.parametrize(("inner", "wrap"), PAIRS)
def test_checkpoints_go_to_a_plain_optimizer_and_come_from_one(inner, wrap):
    _, opt, _ = started(inner, wrap)
    saved = through_a_file(opt.optimizer.state_dict())
    _, fresh, _ = start(inner, wrap)
    settings = fresh.weights
    fresh.load_state_dict(saved)
    assert fresh.weights == settings
    plain = INNER[inner](network().parameters())
    plain.load_state_dict(through_a_file(opt.state_dict()))
    expected = bits(opt.optimizer.state_dict())
    assert bits(fresh.optimizer.state_dict()) == bits(plain.state_dict()) == expected


@COPIES
@pytest.mark.parametrize(
    ("inner", "wrap"),
    # Torch's copy of LBFGS cannot step.
    [pair for pair in [*PAIRS, ("SGD", "rule"), ("AdamW", "rule")] if pair[0] != "LBFGS"],
)
def test_copies_go_on_alike_and_apart(inner, wrap, duplicate):
    """Model, optimizer and scheduler are copied together, in the middle of an accumulation."""
    original = started(inner, wrap)
    model, opt, _ = original
    opt.register_step_post_hook(lambda *_: None)  # cannot be pickled, and is not, as in torch
    opt.zero_grad()
    opt.backward(as_asked(opt, two_losses(model, batch(2))), accumulate=True)
    twin = duplicate(original)
    before = everything(*twin[:2])
    assert before == everything(model, opt)

    for model, opt, schedule in (original, twin):
        opt.backward(as_asked(opt, two_losses(model, batch(3))))
        opt.step()
        run(model, opt, schedule, range(4, 6))
    assert everything(*original[:2]) == everything(*twin[:2]) != before
    run(*twin, range(6, 7))
    assert everything(*original[:2]) != everything(*twin[:2])


@COPIES
def test_copies_know_their_shared_parameters(duplicate):
    """A set of `id`s would name the parameters of the original."""
    model = network()
    inner, shared = INNER["AdamW"](model.parameters()), model[0].parameters()
    opt = CAGradClip(inner, [0.6, 0.4], shared_parameters=shared)
    twin, twin_opt = duplicate((model, opt))
    train_step(opt, model, batch(0))
    train_step(twin_opt, twin, batch(0))
    assert opt.report.gram.trace() > 0
    assert bits(twin_opt.report.gram) == bits(opt.report.gram)
    assert everything(twin, twin_opt) == everything(model, opt)


def test_state_hooks_fire_with_the_wrapper():
    model = network()
    opt = WRAPPERS["CAGradClip"](INNER["AdamW"](model.parameters()))
    calls = []

    def migrate(o, state):
        calls.append((state["tokens"], o))
        return {**state, "param_groups": [{**state["param_groups"][0], "lr": 0.5}]}

    opt.register_state_dict_pre_hook(lambda o: calls.append(("save", o)))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "tokens": 17})
    opt.register_load_state_dict_pre_hook(lambda o, state: None)
    opt.register_load_state_dict_pre_hook(migrate)
    opt.register_load_state_dict_post_hook(lambda o: calls.append(("loaded", o)))
    state = opt.state_dict()
    assert state["tokens"] == 17
    opt.load_state_dict(state)
    assert calls == [("save", opt), (17, opt), ("loaded", opt)]
    assert opt.optimizer.param_groups[0]["lr"] == 0.5
    assert state["param_groups"][0]["lr"] == 0.02, "the caller's dictionary is not touched"


@pytest.mark.parametrize(("inner", "wrap"), PAIRS[:-1])  # LBFGS's state is not per parameter
def test_distributed_checkpoint_functions(inner, wrap):
    """They call step(closure=None) before any backward, with zero gradients and lr = 0."""
    model, opt, _ = started(inner, wrap)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    other, fresh, _ = start(inner, wrap)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, fresh, saved)
    moments = [list(state.values()) for state in opt.state.values()]
    assert bits([list(state.values()) for state in fresh.state.values()]) == bits(moments)
    train_step(opt, model, batch(3))
    train_step(fresh, other, batch(3))
    assert bits(list(other.parameters())) == bits(list(model.parameters()))


def test_named_parameters_are_saved_by_name():
    """Torch keeps the names of `named_parameters` in the groups, where checkpoints use them."""
    model = network()
    opt = CAGradClip(torch.optim.AdamW(model.named_parameters()), [0.6, 0.4])
    train_step(opt, model, batch(0))
    names = [name for name, _ in model.named_parameters()]
    assert opt.state_dict()["param_groups"][0]["param_names"] == names


def test_number_of_skipped_steps_is_part_of_the_state():
    x = nn.Parameter(torch.ones(2))
    opt, other = (
        CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5], nonfinite="skip") for _ in range(2)
    )
    opt.backward([x.sum() * torch.nan, x.prod()])
    other.load_state_dict(opt.state_dict())
    other.backward([x.sum(), x.prod()])
    assert other.report.skipped == 1
