"""A wrapped run equals a plain one in every bit, whatever optimizer and scheduler are in it.

With one loss and c = 0 the combined gradient is the gradient itself, bit for bit.
"""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from raco_optim import CAGradClip, MultiObjectiveOptimizer
from tests.problems_nn import INNER, as_asked, batch, bits, network, train_step, two_losses

# With one loss and these, the combined gradient equals the gradient of the loss.
IDENTITIES = {
    "CAGradClip": lambda inner: CAGradClip(inner, [1.0], c=0.0),
    "named": lambda inner: CAGradClip(inner, {"a": 1.0}, c=0.0),
    "rule": lambda inner: MultiObjectiveOptimizer(inner, lambda gram: torch.ones(len(gram))),
}


def cycles_momentum(opt):
    return "momentum" in opt.defaults or "betas" in opt.defaults


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4, 2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, step_size_up=2, cycle_momentum=cycles_momentum(o)
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=6, cycle_momentum=cycles_momentum(o)
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.2, anneal_epochs=3),
}


def plain_step(opt, model, x):
    def closure():
        opt.zero_grad()
        loss = two_losses(model, x)[0]
        loss.backward()
        return loss

    opt.step(closure)


def wrapped_step(opt, model, x):
    def closure():
        opt.zero_grad()
        return as_asked(opt, two_losses(model, x)[:1])

    opt.step(closure)


def test_every_scheduler_of_torch_is_in_the_table():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


# Every scheduler with each optimizer, and with each rule.
COMBINATIONS = [
    (name, list(IDENTITIES)[(i + j) % len(IDENTITIES)], scheduler)
    for i, name in enumerate(INNER)
    for j, scheduler in enumerate(SCHEDULERS)
]


@pytest.mark.parametrize(("name", "identity", "scheduler"), COMBINATIONS)
def test_scheduled_run_equals_the_plain_one_bit_for_bit(name, identity, scheduler):
    trajectories = []
    for make, step in ((lambda opt: opt, plain_step), (IDENTITIES[identity], wrapped_step)):
        model = network()
        opt = make(INNER[name](model.parameters()))
        schedule = SCHEDULERS[scheduler](opt)
        trajectory = []
        for t in range(5):
            step(opt, model, batch(t))
            schedule.step(*((1.0,) if scheduler == "ReduceLROnPlateau" else ()))
            groups = [{**group, "params": None} for group in opt.param_groups]
            trajectory.append(bits([groups, list(model.parameters()), list(opt.state.values())]))
        trajectories.append(trajectory)
    assert trajectories[0] == trajectories[1]


SERVED = sorted(
    cls.__name__
    for cls in vars(torch.optim).values()
    # SparseAdam takes sparse gradients and no others; Muon matrices and no vectors.
    if isinstance(cls, type) and cls.__name__ not in ("Optimizer", "SparseAdam", "Muon")
)


@pytest.mark.parametrize("name", SERVED)
def test_every_optimizer_of_torch(name):
    runs = []
    for make, step in ((lambda opt: opt, plain_step), (IDENTITIES["CAGradClip"], wrapped_step)):
        model = network()
        opt = make(getattr(torch.optim, name)(model.parameters(), lr=0.05))
        for t in range(3):
            step(opt, model, batch(t))
        runs.append(bits([list(model.parameters()), list(opt.state.values())]))
    assert runs[0] == runs[1]


def test_scheduler_sees_that_the_optimizer_stepped():
    """Torch warns if a scheduler steps first; it knows from a wrapper around `step`."""
    model = network()
    opt = CAGradClip(INNER["SGD"](model.parameters()), [0.6, 0.4])
    schedule = lr_scheduler.StepLR(opt, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedule.step()
    schedule = lr_scheduler.StepLR(opt, 1)
    train_step(opt, model, batch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()
