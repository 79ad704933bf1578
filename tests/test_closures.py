"""Closures return the losses; an error explains this to a closure that does something else."""

import copy
import logging
import warnings

import lightning
import pytest
import torch
from torch import nn
from torch.optim import LBFGS

from raco_optim import MGDA, CAGradClip, LinearScalarization
from tests.problems_nn import INNER, batch, bits, network, two_losses

TOLD = (
    r"`closure` must return the losses, one per weight, as a list or mapping, without calling "
    r"`backward` .*; it {}\. .*`self\.automatic_optimization = False`"
)
WEIGHTS = [0.7, 0.3]


def values(opt):
    """All that a failed step must not change; the closure itself changes `.grad`."""
    state = opt.state_dict()
    if isinstance(opt.optimizer, LBFGS):  # it counts evaluations before it calls the closure
        state = {**state, "state": None}
    return bits([[p.data for p in opt.param_groups[0]["params"]], state])


@pytest.fixture(params=["SGD", "AdamW", "LBFGS"])
def inner(request):
    return INNER[request.param]


def step(opt, model, closure):
    """The parameters after one step with `closure(opt, model)`, and the result of `step`."""

    def zero_and_run():
        opt.zero_grad()
        return closure(opt, model)

    value = opt.step(zero_and_run)
    return bits(list(model.parameters())), value


def fresh(inner, weights=WEIGHTS, **options):
    model = network()
    return CAGradClip(inner(model.parameters()), weights, **options), model


def returns(opt, model):
    return two_losses(model, batch(0))


def torchs_own(opt, model):
    loss = sum(two_losses(model, batch(0)))
    loss.backward()
    return loss


def after_backward(result):
    def closure(opt, model):
        a, b = two_losses(model, batch(0))
        opt.backward([a, b])
        return result(a, b)

    return closure


BOTH = "called `backward` and returned losses"
WRONG = {
    "backward, losses": (after_backward(lambda a, b: [a, b]), BOTH),
    "backward, number": (after_backward(lambda a, b: a.item()), BOTH),
    "backward, weighted loss": (after_backward(lambda a, b: 0.7 * a + 0.3 * b), BOTH),
    "weighted loss": (lambda o, m: sum(returns(o, m)), "returned a single Tensor"),
    "torch's documentation": (torchs_own, "returned a single Tensor"),
    "number": (lambda o, m: returns(o, m)[0].item(), "returned a single float"),
    "bool": (lambda o, m: True, "returned a single bool"),
    "nothing": (lambda o, m: None, "returned None without calling `backward`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_closure_is_refused_and_changes_nothing(inner, case):
    closure, got = WRONG[case]
    opt, model = fresh(inner)
    before = values(opt)
    with pytest.raises(TypeError, match=TOLD.format(got)):
        step(opt, model, closure)
    assert values(opt) == before
    # The failed step leaves no trace in the next one, nor in the moments of the inner optimizer.
    assert step(opt, model, returns)[0] == step(*fresh(inner), returns)[0]


@pytest.mark.parametrize("method", [MGDA, LinearScalarization])
def test_every_optimizer_refuses_it(method):
    x = nn.Parameter(torch.ones(2))
    opt = method(torch.optim.SGD([x], lr=0.1), WEIGHTS)
    with pytest.raises(TypeError, match=TOLD.format("returned a single Tensor")):
        opt.step(lambda: x.sum())
    assert x.tolist() == [1, 1]


def named(opt, model):
    return dict(zip("ba", reversed(two_losses(model, batch(0))), strict=True))


FORMS = {
    "tuple": lambda o, m: tuple(two_losses(m, batch(0))),
    "iterator": lambda o, m: iter(two_losses(m, batch(0))),
    "callables": lambda o, m: [lambda i=i: two_losses(m, batch(0))[i] for i in range(2)],
    "mapping": named,
    "generator": lambda o, m: (loss for loss in two_losses(m, batch(0))),
}


@pytest.mark.parametrize("form", FORMS)
def test_losses_in_every_form_are_taken(inner, form):
    weights = dict(zip("ab", WEIGHTS, strict=True)) if form == "mapping" else WEIGHTS
    expected, _ = step(*fresh(inner), returns)
    assert step(*fresh(inner, weights), FORMS[form])[0] == expected


def test_a_closure_may_run_backward_itself_and_return_nothing(inner):
    """It equals one that returns the losses, LBFGS's many evaluations and the result included.

    And a call of `backward` and a step without closure, where the inner optimizer needs none.
    """

    def runs(opt, model):
        opt.backward(two_losses(model, batch(0)))

    with torch.no_grad():  # as trainers call it; the closure needs a graph all the same
        found, value = step(*fresh(inner, c=0.0), returns)
    expected, other = step(*fresh(inner, c=0.0), runs)
    assert found == expected
    a, b = two_losses(network(), batch(0))
    torch.testing.assert_close(value, (0.7 * a + 0.3 * b).double().detach())
    assert torch.equal(value, other)
    opt, model = fresh(inner, c=0.0)
    if not isinstance(opt.optimizer, LBFGS):
        runs(opt, model)
        opt.step()
        assert bits(list(model.parameters())) == found


def test_micro_batches_in_a_closure(inner):
    x = batch(0, dtype=torch.float64)
    models = [network(torch.float64), network(torch.float64)]

    def in_parts(opt, model):
        first, second = ([loss / 2 for loss in two_losses(model, part)] for part in x.chunk(2))
        opt.backward(first, accumulate=True)
        return second

    for model, closure in zip(models, (in_parts, lambda o, m: two_losses(m, x)), strict=True):
        opt = CAGradClip(inner(model.parameters()), WEIGHTS)
        step(opt, model, closure)
    torch.testing.assert_close(*(list(model.parameters()) for model in models))


def test_an_error_in_the_closure_keeps_its_class(inner):
    opt, model = fresh(inner)
    before = values(opt)

    def closure(opt, model):
        raise KeyError("batch")

    with pytest.raises(KeyError, match="batch"):
        step(opt, model, closure)
    assert values(opt) == before


def test_closure_without_losses_takes_the_step_of_the_backward_before():
    """Lightning's, in manual optimization: it runs hooks, which clip, and returns nothing."""
    x = nn.Parameter(torch.ones(2))
    opt = CAGradClip(torch.optim.SGD([x], lr=1.0), [0.5, 0.5], c=0.0, nonfinite="skip")

    def closure():
        if x.grad is not None:
            x.grad.mul_(0.5)

    opt.backward([x[0], x[1]])
    assert opt.step(closure) is None
    assert x.tolist() == [0.75, 0.75]
    opt.zero_grad()
    opt.backward([x[0] * torch.inf, x[1]])
    x.grad = torch.ones(2)
    opt.step(closure)
    assert x.tolist() == [0.75, 0.75]
    opt.backward([x[0], x[1]], accumulate=True)
    with pytest.raises(RuntimeError, match="accumulated but not combined"):
        opt.step(closure)


class Module(lightning.LightningModule):
    """Returns the sum of two losses, as Lightning's automatic optimization asks."""

    def __init__(self, as_dict):
        super().__init__()
        self.as_dict = as_dict
        self.model = network()

    def training_step(self, _batch, _index):
        losses = two_losses(self.model, batch(0))
        return {"loss": sum(losses), "parts": losses} if self.as_dict else sum(losses)

    def configure_optimizers(self):
        return CAGradClip(torch.optim.AdamW(self.parameters(), lr=0.05), WEIGHTS)


@pytest.mark.parametrize("as_dict", [False, True])
def test_lightnings_automatic_optimization_is_refused(as_dict):
    """`test_inner_reachable` trains with it switched off."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    silent = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    trainer = lightning.Trainer(max_steps=2, accelerator="cpu", **silent)
    module = Module(as_dict)
    before = copy.deepcopy(module.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, about workers and its own dependencies
        with pytest.raises(TypeError, match=TOLD.format("returned a single Tensor")):
            trainer.fit(module, torch.utils.data.DataLoader(range(4)))
    assert bits(module.state_dict()) == bits(before)
