"""The wrapper is a torch optimizer: whatever takes one takes it, and changes the inner one."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, update_bn

import raco_optim
from raco_optim import MGDA, CAGradClip, LinearScalarization, MultiObjectiveOptimizer
from tests.problems_nn import (
    INNER,
    WRAPPERS,
    batch,
    everything,
    flat_grad,
    network,
    train_step,
    two_losses,
)


@pytest.fixture(params=INNER)
def inner(request):
    return INNER[request.param]


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    return WRAPPERS[request.param]


def test_is_an_optimizer_that_reads_through_to_the_inner_one(inner, wrap):
    model = network()
    opt = wrap(inner(model.parameters()))
    train_step(opt, model, batch(0))
    assert isinstance(opt, Optimizer)
    for name in ("param_groups", "state", "defaults"):
        assert getattr(opt, name) is getattr(opt.optimizer, name)
    opt.param_groups[0]["lr"] = 0.125
    assert opt.optimizer.param_groups[0]["lr"] == 0.125
    # A fused inner optimizer divides by the scale itself; through the wrapper the scaler must.
    assert not getattr(opt, "_step_supports_amp_scaling", False)


class OwnMethod(MultiObjectiveOptimizer):
    def __init__(self, inner, weights):
        super().__init__(inner, self.mix, weights=weights)

    def mix(self, gram):
        return gram.new_ones(len(gram))


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        (CAGradClip, ""),
        (MGDA, ""),
        (LinearScalarization, ""),
        (OwnMethod, "rule=<bound method OwnMethod.mix of "),
    ],
)
def test_repr_shows_the_settings_the_inner_optimizer_and_a_rule_of_the_users_own(method, rule):
    shown = repr(method(torch.optim.SGD(network().parameters()), [0.25, 0.75]))
    assert shown.startswith(f"{method.__name__}(\n  {rule}")
    assert "weights=(0.25, 0.75)" in shown
    assert "SGD" in shown
    assert bool(rule) == ("rule=" in shown)
    assert (method is CAGradClip) == ("c=0.4" in shown)


def test_averaged_model_and_its_batch_norm(wrap):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    opt = wrap(INNER["AdamW"](model.parameters()))
    average, weights = AveragedModel(model), []
    for t in range(3):
        train_step(opt, model, batch(t))
        average.update_parameters(model)
        weights.append(model[0].weight.detach().clone())
    update_bn([batch(7, 64)], average)
    torch.testing.assert_close(average.module[0].weight, sum(weights) / 3)
    expected = average.module[0](batch(7, 64)).mean(dim=0)
    torch.testing.assert_close(average.module[1].running_mean, expected)


def test_step_hooks_fire_once_with_the_wrapper(inner, wrap):
    """Hooks of the inner optimizer fire with the inner optimizer."""
    model, calls = network(), []
    opt = wrap(inner(model.parameters()))
    before = opt.register_step_pre_hook(lambda o, args, kwargs: calls.append(("before", o)))
    opt.register_step_post_hook(lambda o, args, kwargs: calls.append(("after", o)))
    opt.optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("inner", o)))
    train_step(opt, model, batch(0))
    expected = [("inner", opt.optimizer), ("after", opt)]
    assert calls == [("before", opt), *expected]
    before.remove()
    train_step(opt, model, batch(1))
    assert calls == [("before", opt), *expected, *expected]


def test_lbfgs_needs_a_closure_and_may_not_search():
    """The closure returns the weighted sum, along which the combined gradient need not descend."""
    opt = CAGradClip(INNER["LBFGS"](network().parameters()), [0.5, 0.5])
    with pytest.raises(TypeError, match="closure"):
        opt.step()
    inner = LBFGS(network().parameters(), line_search_fn="strong_wolfe")
    with pytest.raises(ValueError, match=r"`inner` must not search.*'strong_wolfe'.*=None"):
        CAGradClip(inner, [0.5, 0.5])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(inner, set_to_none):
    model = network()
    opt = CAGradClip(inner(model.parameters()), [0.6, 0.4])
    opt.backward(two_losses(model, batch(0)))
    expected = flat_grad(model)
    assert expected.norm() > 0
    opt.zero_grad(set_to_none=set_to_none)
    assert [p.grad is None for p in model.parameters()] == [set_to_none] * 4
    assert flat_grad(model).norm() == 0
    opt.backward(two_losses(model, batch(0)))
    assert torch.equal(flat_grad(model), expected)


@pytest.mark.parametrize("name", sorted(INNER.keys() - {"LBFGS"}))  # which takes one group
def test_parameter_group_added_mid_run(name, wrap):
    """The new parameters enter the Gram, and the scheduler that was there before goes on."""
    model = network()
    opt = wrap(INNER[name](model[0].parameters()))
    schedule = lr_scheduler.ExponentialLR(opt, 0.5)
    with pytest.warns(UserWarning, match="2 parameters, with 14 numbers, that no inner optimizer"):
        train_step(opt, model, batch(0))
    small = opt.report.gram
    old = model[2].weight.clone()
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.25})
    assert len(opt.optimizer.param_groups) == 2
    train_step(opt, model, batch(0))
    assert opt.report.gram.trace() > small.trace()
    assert not torch.equal(model[2].weight, old)
    schedule.step()
    assert [group["lr"] for group in opt.param_groups][1] == 0.125


class Hiding:
    """Like Accelerate's AcceleratedOptimizer: forwards only the methods of torch."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=None):
        self.optimizer.zero_grad()


def test_free_function_reaches_through_wrappers():
    results = []
    for layers in range(3):
        model = network()
        opt = outer = CAGradClip(INNER["SGD"](model.parameters()), [0.6, 0.4])
        for _ in range(layers):
            outer = Hiding(outer)
        backward = functools.partial(raco_optim.backward, outer) if layers else opt.backward
        outer.zero_grad()
        backward(two_losses(model, batch(0)), accumulate=True)
        backward(two_losses(model, batch(1)))
        outer.step()
        results.append(everything(model, opt))
    assert results[0] == results[1] == results[2]


def test_two_wrappers_do_not_share_what_they_hook():
    """Torch patches `step` of classes: in whatever order they come, a step is hooked once."""
    for name in (*WRAPPERS, *reversed(WRAPPERS)):
        model, calls = network(), []
        opt = WRAPPERS[name](INNER["SGD"](model.parameters()))
        opt.register_step_pre_hook(lambda *args, calls=calls: calls.append(1))
        twin, twin_opt = copy.deepcopy((model, opt))
        train_step(twin_opt, twin, batch(0))
        assert calls == []  # a copy has no hooks, as in torch
        train_step(opt, model, batch(0))
        assert calls == [1]


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own imports
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_step(backend):
    torch.compiler.reset()
    runs = []
    for make in (lambda step: step, lambda step: torch.compile(step, backend=backend)):
        model = network()
        opt = CAGradClip(INNER["AdamW"](model.parameters()), [0.6, 0.4])
        step = make(opt.step)
        for t in range(3):
            opt.zero_grad()
            opt.backward(two_losses(model, batch(t)))
            step()
        runs.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)
