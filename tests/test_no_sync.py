"""A step waits for no device unless it is asked to.

On the meta device tensors have no values: whatever would wait for one (`.item()`, `.tolist()`, a
copy to the host, a branch on a comparison) raises. A step that runs there waits for nothing.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from raco_optim import MGDA, CAGrad, CAGradClip, LinearScalarization, MultiObjectiveOptimizer
from tests.problems_nn import batch, inverse_norms, network, two_losses

NO_VALUE = (NotImplementedError, RuntimeError)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.heads, self.spare = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(1, 1)

    def losses(self, m):
        x = torch.ones(3, device="meta")
        return list(self.heads(self.trunk(x).tanh()).square())[:m]


def on_meta(make, m=3, **kwargs):
    with torch.device("meta"):
        model = Net()
    return model, make(torch.optim.AdamW(model.parameters()), [1 / m] * m, **kwargs)


PROPAGATE = {"nonfinite": "propagate"}
WAIT_FOR_NOTHING = {
    "one loss": (CAGradClip, 1, {"solver": "pgd"}),
    "CAGradClip": (CAGradClip, 3, {"solver": "pgd"}),
    "soft": (CAGradClip, 2, {"solver": "pgd", "clip": "soft"}),
    "CAGrad": (CAGrad, 2, {"solver": "pgd"}),
    "LinearScalarization": (LinearScalarization, 3, {}),
    "rule": (lambda o, w, **kw: MultiObjectiveOptimizer(o, inverse_norms, weights=w, **kw), 3, {}),
}


@pytest.mark.parametrize("name", WAIT_FOR_NOTHING)
def test_step_waits_for_nothing(name):
    make, m, kwargs = WAIT_FOR_NOTHING[name]
    model, opt = on_meta(make, m, **kwargs, **PROPAGATE)
    opt.backward(model.losses(m), accumulate=True)
    opt.backward([lambda i=i: model.losses(m)[i] for i in range(m)])
    opt.step()
    opt.zero_grad(set_to_none=False)
    assert model.trunk.weight.grad.is_meta
    assert model.spare.weight.grad is None
    with pytest.raises(NO_VALUE):
        _ = opt.report


@pytest.mark.parametrize("losses", ["both parts", "heads only"])
def test_neither_does_one_with_heads(losses):
    with torch.device("meta"):
        model = Net()
    inner, shared = torch.optim.AdamW(model.parameters()), model.trunk.parameters()
    opt = CAGradClip(inner, [0.5, 0.5], solver="pgd", shared_parameters=shared, **PROPAGATE)
    if losses == "both parts":
        opt.backward(model.losses(2))
    else:
        opt.backward(list(model.heads(torch.ones(3, device="meta")))[:2])
    opt.step()
    assert model.heads.weight.grad.is_meta


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (CAGradClip, {"solver": "exact"} | PROPAGATE),
        (CAGradClip, {"solver": "slsqp"} | PROPAGATE),
        (CAGradClip, {"solver": "pgd", "nonfinite": "raise"}),
        (CAGradClip, {"solver": "pgd", "nonfinite": "skip"}),
        (MGDA, PROPAGATE),
    ],
    ids=["exact", "slsqp", "raise", "skip", "MGDA"],
)
def test_it_waits_where_the_documentation_says_so(make, kwargs):
    """So that the test above would notice."""
    model, opt = on_meta(make, **kwargs)
    with pytest.raises(NO_VALUE):
        opt.backward(model.losses(3))


class Copies(TorchDispatchMode):
    """Counts operations that would fetch a value from a device; here the CPU plays the device."""

    def __init__(self):
        super().__init__()
        self.scalars = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.scalars += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", ["exact", "pgd", "slsqp"])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
def test_no_number_is_fetched_alone(solver, nonfinite):
    """One copy of a small matrix where a host needs it, and never one number after the other."""
    model = network()
    inner = torch.optim.AdamW(model.parameters(), foreach=True)
    opt = CAGradClip(inner, [0.6, 0.4], solver=solver, nonfinite=nonfinite)
    losses = two_losses(model, batch(0))
    with Copies() as copies:
        opt.backward(losses)
    assert copies.scalars == 0


# name -> (mode, steps that one Gram matrix serves)
APPROXIMATIONS = {
    "representation": ("representation", 1),
    "subset": ("subset", 1),
    "gram_every": ("dense", 2),
    "representation, gram_every": ("representation", 2),
    "subset, gram_every": ("subset", 2),
}


def approximate(model, gram, every, **kwargs):
    gram = model.trunk.parameters() if gram == "subset" else gram
    inner = torch.optim.AdamW(model.parameters(), foreach=True)
    return CAGradClip(inner, [0.5, 0.2, 0.3], gradients=gram, gram_every=every, **kwargs)


def backward_of(model, opt, gram, x):
    z = model.trunk(x).tanh()
    losses = list(model.heads(z).square().mean(0))
    opt.backward(losses, **({"representation": z} if gram == "representation" else {}))


@pytest.mark.parametrize(
    ("name", "steps", "with_heads", "rule"),
    # The solver's fixed number of iterations takes a second of a step on the meta device.
    [
        ("subset", 1, False, None),
        ("gram_every", 2, True, None),
        *[(name, 5, k % 2 == 0, inverse_norms) for k, name in enumerate(APPROXIMATIONS)],
    ],
)
def test_neither_does_an_approximation(name, steps, with_heads, rule):
    gram, every = APPROXIMATIONS[name]
    with torch.device("meta"):
        model = Net()
    shared = {"shared_parameters": model.trunk.parameters()} if with_heads else {}
    opt = approximate(model, gram, every, solver="pgd", **shared, **PROPAGATE)
    opt.rule = opt.rule if rule is None else rule
    for t in range(steps):
        opt.zero_grad(set_to_none=t % 2 == 0)
        opt.weights = [0.5, 0.3, 0.2] if t > 2 else [0.5, 0.2, 0.3]
        backward_of(model, opt, gram, torch.ones(2, 3, device="meta"))
        opt.step()
    assert opt.last_step.gram_age == (steps - 1) % every
    assert model.trunk.weight.grad.is_meta
    assert model.heads.weight.grad.is_meta
    assert model.spare.weight.grad is None
    with pytest.raises(NO_VALUE):
        _ = opt.report


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_an_approximation_waits_where_the_documentation_says_so(name, nonfinite):
    gram, every = APPROXIMATIONS[name]
    with torch.device("meta"):
        model = Net()
    opt = approximate(model, gram, every, solver="pgd", nonfinite=nonfinite)
    with pytest.raises(NO_VALUE):
        backward_of(model, opt, gram, torch.ones(2, 3, device="meta"))


@pytest.mark.parametrize("with_heads", [False, True], ids=["all", "heads"])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_one_number_is_fetched_alone_where_the_combination_is_checked(name, nonfinite, with_heads):
    """Where a Gram matrix says nothing of the combined gradient: whether that is finite."""
    gram, every = APPROXIMATIONS[name]
    model = Net()
    shared = {"shared_parameters": model.trunk.parameters()} if with_heads else {}
    opt = approximate(model, gram, every, nonfinite=nonfinite, **shared)
    found, expected = [], []
    for t in range(4):
        opt.zero_grad()
        with Copies() as copies:
            backward_of(model, opt, gram, batch(t)[:, :3])
        found.append(copies.scalars)
        exact = gram == "dense" and t % every == 0
        expected.append(0 if exact or nonfinite == "propagate" else 1)
        opt.step()
    assert found == expected
