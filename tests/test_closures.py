"""Closures: they return the losses here, and whoever returns something else is told so."""

import copy
import logging
import warnings

import lightning
import pytest
import torch
from torch import nn

from raco_optim import MGDA, CAGradClip, LinearScalarization
from tests.problems_nn import INNER, batch, bits, network, two_losses

TOLD = (
    r"`closure` must return the losses, one per weight, as a list or mapping, without calling "
    r"`backward` .*; it {}\. .*`self\.automatic_optimization = False`"
)
WEIGHTS = [0.7, 0.3]


def values(opt):
    """What a failed step must leave as it was; `.grad` is what the closure itself made it."""
    inner = opt.state_dict()
    if "LBFGS" in repr(opt.optimizer):  # it counts evaluations before it calls the closure
        inner = {**inner, "state": None}
    return bits([[p.data for p in opt.param_groups[0]["params"]], inner])


@pytest.fixture(params=["SGD", "AdamW", "LBFGS"])
def inner(request):
    return INNER[request.param]


@pytest.mark.parametrize(
    ("result", "ran_backward", "got"),
    [
        (lambda a, b: [a, b], True, "called `backward` and returned losses"),
        (lambda a, b: 0.7 * a + 0.3 * b, True, "called `backward` and returned losses"),
        (lambda a, b: (0.7 * a + 0.3 * b).item(), True, "called `backward` and returned losses"),
        (lambda a, b: 0.7 * a + 0.3 * b, False, "returned a single Tensor"),
        (lambda a, b: a, False, "returned a single Tensor"),
        (lambda a, b: a.item(), False, "returned a single float"),
        (lambda a, b: True, False, "returned a single bool"),
        (lambda a, b: None, False, "returned None without calling `backward`"),
    ],
    ids=[
        *("backward, losses", "backward, weighted loss", "backward, number"),
        *("weighted loss", "one loss", "number", "bool", "nothing"),
    ],
)
def test_a_closure_that_does_something_else_is_told_what_it_does(inner, result, ran_backward, got):
    model = network()
    opt = CAGradClip(inner(model.parameters()), WEIGHTS)
    before = values(opt)

    def closure():
        opt.zero_grad()
        a, b = two_losses(model, batch(0))
        if ran_backward:
            opt.backward([a, b])
        return result(a, b)

    with pytest.raises(TypeError, match=TOLD.format(got)):
        opt.step(closure)
    assert values(opt) == before

    # The next step is one as if nothing had been: the moments of the inner optimizer too.
    fresh = network()
    other = CAGradClip(inner(fresh.parameters()), WEIGHTS)
    for each, m in ((opt, model), (other, fresh)):

        def right(each=each, m=m):
            each.zero_grad()
            return two_losses(m, batch(0))

        each.step(right)
    assert bits(list(model.parameters())) == bits(list(fresh.parameters()))


def test_torchs_closure_as_its_documentation_has_it(inner):
    """Zero, backward of the loss, return it: `backward` of a tensor is none of ours."""
    model = network()
    opt = CAGradClip(inner(model.parameters()), WEIGHTS)
    before = values(opt)

    def closure():
        opt.zero_grad()
        loss = sum(two_losses(model, batch(0)))
        loss.backward()
        return loss

    with pytest.raises(TypeError, match=TOLD.format("returned a single Tensor")):
        opt.step(closure)
    assert values(opt) == before


@pytest.mark.parametrize("form", ["list", "tuple", "iterator", "callables", "mapping", "generator"])
def test_losses_in_every_form_are_taken(inner, form):
    weights = dict(zip("ab", WEIGHTS, strict=True)) if form == "mapping" else WEIGHTS
    models = [network(), network()]
    opts = [CAGradClip(inner(models[0].parameters()), weights)]
    opts.append(CAGradClip(inner(models[1].parameters()), WEIGHTS))

    def given():
        opts[0].zero_grad()
        losses = two_losses(models[0], batch(0))
        return {
            "list": lambda: losses,
            "tuple": lambda: tuple(losses),
            "iterator": lambda: iter(losses),
            "callables": lambda: [lambda i=i: two_losses(models[0], batch(0))[i] for i in range(2)],
            "mapping": lambda: dict(zip("ba", reversed(losses), strict=True)),
            "generator": lambda: (loss for loss in losses),
        }[form]()

    def witness():
        opts[1].zero_grad()
        return two_losses(models[1], batch(0))

    opts[0].step(given)
    opts[1].step(witness)
    assert bits(list(models[0].parameters())) == bits(list(models[1].parameters()))


def test_a_closure_may_run_backward_itself_and_return_nothing(inner):
    """It equals one that returns the losses, LBFGS's many evaluations and the result included."""
    models = [network(), network()]
    opts = [CAGradClip(inner(m.parameters()), WEIGHTS, c=0.0) for m in models]

    def returns():
        opts[0].zero_grad()
        return two_losses(models[0], batch(0))

    def runs():
        opts[1].zero_grad()
        opts[1].backward(two_losses(models[1], batch(0)))

    found = opts[0].step(returns), opts[1].step(runs)
    assert bits(list(models[0].parameters())) == bits(list(models[1].parameters()))
    a, b = two_losses(network(), batch(0))
    torch.testing.assert_close(found[0], (0.7 * a + 0.3 * b).double().detach())
    assert torch.equal(*found)


def test_micro_batches_in_a_closure(inner):
    models = [network(torch.float64), network(torch.float64)]
    opts = [CAGradClip(inner(m.parameters()), WEIGHTS) for m in models]
    first, second = batch(0, dtype=torch.float64).chunk(2)

    def in_parts():
        opts[0].zero_grad()
        opts[0].backward([x / 2 for x in two_losses(models[0], first)], accumulate=True)
        return [x / 2 for x in two_losses(models[0], second)]

    def whole():
        opts[1].zero_grad()
        return two_losses(models[1], torch.cat([first, second]))

    opts[0].step(in_parts)
    opts[1].step(whole)
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()))


def test_an_error_in_the_closure_keeps_its_class(inner):
    model = network()
    opt = CAGradClip(inner(model.parameters()), WEIGHTS)
    before = values(opt)

    def closure():
        raise KeyError("batch")

    with pytest.raises(KeyError, match="batch"):
        opt.step(closure)
    assert values(opt) == before


@pytest.mark.parametrize("method", [CAGradClip, MGDA, LinearScalarization])
def test_every_optimizer_tells_it(method):
    x = nn.Parameter(torch.ones(2))
    opt = method(torch.optim.SGD([x], lr=0.1), WEIGHTS)
    with pytest.raises(TypeError, match=TOLD.format("returned a single Tensor")):
        opt.step(lambda: x.sum())
    assert x.tolist() == [1, 1]


# --- Lightning -----------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    """Two losses; `training_step` does what `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.automatic_optimization = how != "manual"
        self.model = network()

    def training_step(self, _batch, _index):
        opt = self.optimizers()
        losses = two_losses(self.model, batch(0))
        if self.how == "sum":
            return sum(losses)
        if self.how == "dict":
            return {"loss": sum(losses), "parts": [x.detach() for x in losses]}
        if self.how == "losses":
            return {"loss": losses}
        opt.zero_grad()
        opt.optimizer.backward(losses)
        opt.step()
        return None

    def configure_optimizers(self):
        return CAGradClip(torch.optim.AdamW(self.parameters(), lr=0.05), WEIGHTS)


def fit(module):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, about workers and its own dependencies
        trainer.fit(module, torch.utils.data.DataLoader(range(4)))


@pytest.mark.parametrize("how", ["sum", "dict"])
def test_lightnings_automatic_optimization_is_told_to_be_switched_off(how):
    module = Module(how)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(TypeError, match=TOLD.format("returned a single Tensor")):
        fit(module)
    assert bits(module.state_dict()) == bits(before)


def test_lightnings_manual_optimization_as_the_message_says():
    module, witness = Module("manual"), network()
    fit(module)
    opt = CAGradClip(torch.optim.AdamW(witness.parameters(), lr=0.05), WEIGHTS)
    for _ in range(2):
        opt.zero_grad()
        opt.backward(two_losses(witness, batch(0)))
        opt.step()
    assert bits(module.model.state_dict()) == bits(witness.state_dict())
