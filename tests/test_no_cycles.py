"""`del opt` frees the optimizer, and with the model its parameters, without the garbage collector.

A reference cycle would keep them until the collector runs, which on an accelerator may be never:
it counts Python objects, not the memory that they hold.
"""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from raco_optim import (
    MGDA,
    CAGrad,
    CAGradClip,
    LinearScalarization,
    MultiObjectiveOptimizer,
    unwrap,
)
from tests.problems_nn import inverse_norms

ROOT = Path(__file__).parents[1]
WEIGHTS = [0.6, 0.4]
METHODS = {
    "CAGradClip": lambda inner, **k: CAGradClip(inner, WEIGHTS, **k),
    "CAGrad": lambda inner, **k: CAGrad(inner, WEIGHTS, **k),
    "MGDA": MGDA,
    "LinearScalarization": lambda inner, **k: LinearScalarization(inner, WEIGHTS, **k),
    "function": lambda inner, **k: MultiObjectiveOptimizer(inner, inverse_norms, **k),
}
MODES = ["ghost", "per_example", "representation", "subset", "gram_every", "shared"]
INNER = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=2),
    "two": lambda model: [
        torch.optim.SGD(model[0].parameters(), lr=0.1),
        torch.optim.AdamW(model[2].parameters()),
    ],
}


@pytest.fixture(autouse=True, scope="module")
def _no_collector():
    parts = [*build()]
    with_states(*parts)  # torch's own first step leaves an optimizer in a cycle
    del parts
    gc.disable()
    yield
    gc.enable()


def build(method="CAGradClip", mode="dense", inner="AdamW"):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    options = {
        "subset": {"gradients": [model[0].weight]},
        "gram_every": {"gram_every": 2},
        "shared": {"shared_parameters": model[0].parameters()},
        "per_example": {"gradients": mode, "model": model},
    }.get(mode, {"gradients": mode})
    return model, METHODS[method](INNER[inner](model), **options)


def losses(model):
    scalars = model(torch.randn(8, 4)).squeeze(1)
    return [scalars.square().mean(), (scalars - 1).square().mean()], scalars


def train(model, opt, mode="dense", steps=2):
    for _ in range(steps):
        opt.zero_grad()
        found, scalars = losses(model)
        name = {"representation": "representation", "per_example": "scalars"}.get(mode)
        opt.backward(found, **({name: scalars} if name else {}))
        opt.step()


def check_freed(parts):
    """Takes the only list that holds model and optimizer, and empties it."""
    model, opt = parts
    wrapper, inner = weakref.ref(opt), weakref.ref(opt.optimizer)
    tensors = [weakref.ref(p) for p in model.parameters()]
    moments = [
        weakref.ref(x)
        for state in opt.state.values()
        for x in state.values()
        if isinstance(x, torch.Tensor)
    ]
    parts.clear()
    del opt
    assert wrapper() is None, "the model is still there, and does not hold the optimizer"
    assert inner() is None
    assert all(x() is None for x in moments)
    assert all(not layer._forward_hooks for layer in model.modules())
    del model
    assert all(p() is None for p in tensors)


@pytest.mark.parametrize(
    ("method", "mode"), [*((m, "dense") for m in METHODS), *(("CAGradClip", m) for m in MODES)]
)
def test_after_training(method, mode):
    parts = [*build(method, mode)]
    train(*parts, mode)
    check_freed(parts)


def with_a_failure(model, opt):
    found, _ = losses(model)
    with pytest.raises(FloatingPointError):
        opt.backward([found[0], found[1] * torch.nan])


def with_a_failing_backward_pass(model, opt):
    def fails():
        raise KeyError("batch")

    with pytest.raises(KeyError):
        opt.backward([fails, fails])


def with_gradients_pending(model, opt):
    opt.backward(losses(model)[0], accumulate=True)


def with_gradients_not_stepped(model, opt):
    opt.backward(losses(model)[0])


def with_a_report(model, opt):
    train(model, opt)
    str(opt), repr(opt), str(opt.report), opt.last_step, opt.weights, opt.rule


def with_states(model, opt):
    train(model, opt)
    opt.load_state_dict(opt.state_dict())


def with_copies(model, opt):
    train(model, opt)
    copy.deepcopy((model, opt))
    pickle.loads(pickle.dumps((model, opt)))


def with_a_scheduler(model, opt):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5)
    train(model, opt)
    schedule.step()
    schedule.state_dict()


def with_a_closure(model, opt):
    def closure():
        opt.zero_grad()
        return losses(model)[0]

    opt.step(closure)


def with_hooks(model, opt):
    opt.register_step_pre_hook(lambda *_: None)
    opt.register_state_dict_post_hook(lambda _, state: state)
    train(model, opt)
    opt.state_dict()


def with_another_group(model, opt):
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    train(model, opt)


def with_other_settings(model, opt):
    opt.weights, opt.c, opt.clip, opt.nonfinite = [0.5, 0.5], 0.3, "soft", "skip"
    train(model, opt)
    found, _ = losses(model)
    opt.backward([found[0], found[1] * torch.nan])
    opt.step()


def with_unwrap(model, opt):
    unwrap(opt).backward(losses(model)[0], retain_graph=True)
    opt.lr_that_is_not_there = None
    hasattr(opt, "train")


def with_a_scaler(model, opt):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    opt.nonfinite = "propagate"
    opt.backward([scaler.scale(loss) for loss in losses(model)[0]])
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()


USES = [use for name, use in globals().items() if name.startswith("with_")]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_after_every_use(use):
    parts = [*build()]
    use(*parts)
    check_freed(parts)


@pytest.mark.parametrize("inner", ["LBFGS", "two"])
def test_other_inner_optimizers(inner):
    parts = [*build(inner=inner)]
    with_a_closure(*parts)
    with_states(*parts) if inner == "two" else None
    check_freed(parts)


class Bound(MultiObjectiveOptimizer):
    """Its rule is a method of its own, which is a cycle of the user's making."""

    def __init__(self, inner):
        super().__init__(inner, self.mix)

    def mix(self, gram):
        return inverse_norms(gram)


def test_the_test_sees_a_cycle():
    model = nn.Linear(2, 1)
    parts = [model, Bound(torch.optim.AdamW(model.parameters()))]
    del model
    with pytest.raises(AssertionError):
        check_freed(parts)


# --- Memory --------------------------------------------------------------------------------------

RUNS = """
import ctypes, gc, os, torch
from raco_optim import CAGradClip
gc.disable()
torch.set_num_threads(1)

def run(cycle, width=1000):
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4)))  # 15 MiB
    opt = CAGradClip(torch.optim.Adam(model.parameters(), foreach=False), [0.5, 0.5])
    if cycle:
        opt.itself = opt
    for _ in range(2):
        opt.zero_grad()
        out = model(torch.ones(2, width)).mean(1)
        opt.backward([out[0], out[1].square()])
        opt.step()
    opt.zero_grad()

run(False, width=2)  # the first step of any optimizer of torch leaves it in a cycle
for cycle in (False, True):
    held = []
    for _ in range(7):
        run(cycle)
        ctypes.CDLL(None).malloc_trim(0)  # what the heap has free varies by 80 MiB
        # Not the peak, which a process inherits from the one that started it.
        pages = int(open("/proc/self/statm").read().split()[1])
        held.append(pages * os.sysconf("SC_PAGE_SIZE") // 2**20)
    print(held[-1] - held[0])
"""


def test_short_runs_keep_no_memory():
    """In MiB, by how much the memory of a process grows in six runs after the first."""
    command = [sys.executable, "-c", RUNS]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    freed, kept = map(int, out.stdout.split())
    assert freed < 10  # model, moments, gradients: 90 MiB a run
    assert kept > 250, "the measurement sees a cycle"
