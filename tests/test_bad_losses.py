"""Losses that `backward` refuses: each with its own message, and nothing has happened."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raco_optim import CAGradClip, MultiObjectiveOptimizer, Outcome
from tests.problems_nn import (
    NAMES,
    OwnBackward,
    as_asked,
    batch,
    bits,
    breaks,
    everything,
    inverse_norms,
    network,
    said,
    train_step,
    two_losses,
)


class Net(nn.Module):
    """A network with everything that can go wrong attached to it, unused unless asked for."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.body = network(dtype)
        self.sparse = nn.Embedding(3, 2, sparse=True)
        self.foreign = [nn.Parameter(torch.ones(2))]  # in a list, hence not registered

    def forward(self, x):
        return self.body(x)


def good(model):
    return two_losses(model, batch(0))


def nan_gradient(model):
    """The root of zero: a value of 0 with an infinite gradient, and 0 * Inf = NaN behind it."""
    return (model(batch(0)) * 0).abs().sum().sqrt()


def freed(model):
    loss = good(model)[0]
    torch.autograd.grad(loss, list(model.body.parameters()), allow_unused=True)
    return loss


def overwritten(model):
    h = model.body[0](batch(0)).exp()
    loss = h.sum()
    h.add_(1)  # exp needs its result in the backward pass
    return loss


def reentrant(model):
    return checkpoint(model.body[2], model.body[0](batch(0)), use_reentrant=True).sum()


def without_grad(model):
    with torch.no_grad():
        return good(model)[0]


def other_device(model):
    return model.foreign[0].to("meta").sum()


def sparse(model):
    return model.sparse(torch.tensor([0, 2])).sum()


# name -> (a loss for a model, exception, what its message must say); it stands in second place
BAD_LOSS = {
    "number": (lambda m: 1.0, TypeError, ["scalar tensor", "got float"]),
    "text": (lambda m: "loss", TypeError, ["scalar tensor", "got str"]),
    "list": (lambda m: good(m), TypeError, ["scalar tensor", "got list"]),
    "vector": (lambda m: m(batch(0))[:, 0], ValueError, ["scalar", "shape [8]", ".mean()"]),
    "matrix": (lambda m: m(batch(0)), ValueError, ["scalar", "shape [8, 2]", ".mean()"]),
    "empty": (lambda m: m(batch(0))[:0, 0], ValueError, ["scalar", "shape [0]"]),
    "complex": (lambda m: good(m)[0] * 1j, ValueError, ["real", "torch.complex64"]),
    "no graph": (without_grad, ValueError, ["graph", "torch.no_grad()", "None"]),
    "detached": (lambda m: good(m)[0].detach(), ValueError, ["graph", "detached"]),
    "constant": (lambda m: torch.tensor(1.0), ValueError, ["graph"]),
    "foreign": (lambda m: m.foreign[0].sum(), ValueError, ["reaches none", "None"]),
    "other device": (other_device, ValueError, ["device", "cpu", "meta", ".to()"]),
    "freed graph": (freed, RuntimeError, ["second time", "Compute the losses again"]),
    "overwritten": (overwritten, RuntimeError, ["modified by an inplace operation"]),
    "failing": (lambda m: breaks(good(m)[0]), RuntimeError, ["no way back"]),
    "sparse": (sparse, ValueError, ["sparse", "[3, 2]", "sparse=False"]),
    "reentrant": (reentrant, RuntimeError, ["checkpoint", "use_reentrant=False"]),
    "NaN": (lambda m: good(m)[0] * math.nan, FloatingPointError, ["NaN", "nonfinite"]),
    "Inf": (lambda m: good(m)[0] / 0, FloatingPointError, ["Inf", "nonfinite"]),
    "NaN gradient": (nan_gradient, FloatingPointError, ["the gradient of", "nonfinite"]),
}
BAD_CALLABLE = {
    "returns a number": (lambda: 1.0, TypeError, ["scalar tensor", "callable returned float"]),
    "returns None": (lambda: None, TypeError, ["scalar tensor", "callable returned NoneType"]),
    "fails": (lambda: 1 / 0, ZeroDivisionError, ["division by zero"]),
    "takes arguments": (lambda x: x, TypeError, ["required positional argument"]),
}


class Untouched:
    """A model and its optimizer in the middle of everything, with a twin that nothing happens to.

    Moments, a `.grad` to be added to, and a pending micro-batch: after the failed call, both must
    finish the step alike in every bit.
    """

    def __init__(self, make):
        self.model = Net()
        self.opt = make(torch.optim.AdamW(self.model.parameters(), lr=0.1))
        for t in range(2):
            train_step(self.opt, self.model, batch(t))
        self.opt.backward(as_asked(self.opt, good(self.model)))
        self.opt.backward(as_asked(self.opt, good(self.model)), accumulate=True)
        self.twin, self.twin_opt = copy.deepcopy((self.model, self.opt))
        for p, q in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            q.grad = copy.deepcopy(p.grad)  # which torch leaves out of a parameter's copy

    def check(self):
        before = everything(self.twin, self.twin_opt)
        assert everything(self.model, self.opt) == before
        for model, opt in ((self.model, self.opt), (self.twin, self.twin_opt)):
            opt.backward(as_asked(opt, two_losses(model, batch(3))))
            opt.step()
        finished = everything(self.model, self.opt)
        assert finished == everything(self.twin, self.twin_opt) != before


MAKE = {
    "list": lambda inner: CAGradClip(inner, [0.6, 0.4]),
    "mapping": lambda inner: CAGradClip(inner, dict(zip(NAMES, [0.6, 0.4], strict=True))),
}


def refused(state, losses, exception, fragments, **options):
    """Asserts that `backward` raises this, says this, and changes nothing."""
    with pytest.raises(exception) as caught:
        state.opt.backward(losses, **options)
    assert [f for f in fragments if f not in said(caught.value)] == []
    state.check()


@pytest.mark.parametrize(
    ("as_callable", "form", "accumulate"),
    [
        (False, "list", False),
        (False, "mapping", True),
        (True, "mapping", False),
        (True, "list", True),
    ],
)
@pytest.mark.parametrize("case", BAD_LOSS)
def test_bad_loss(case, form, accumulate, as_callable):
    make, exception, fragments = BAD_LOSS[case]
    if exception is FloatingPointError:  # noticed when the step is combined, not before
        accumulate = False
    if as_callable and case in ("number", "text", "list"):
        exception, fragments = TypeError, ["scalar tensor", "callable returned"]
    state = Untouched(MAKE[form])
    bad = (lambda: make(state.model)) if as_callable else make(state.model)
    losses = as_asked(state.opt, [good(state.model)[0], bad])
    name = "1" if form == "list" else NAMES[1]
    refused(state, losses, exception, [f"loss {name!r}", *fragments], accumulate=accumulate)


@pytest.mark.parametrize("case", BAD_CALLABLE)
def test_bad_callable(case):
    bad, exception, fragments = BAD_CALLABLE[case]
    state = Untouched(MAKE["list"])
    refused(state, [lambda: good(state.model)[0], bad], exception, fragments)


# name -> (losses for two good ones, exception, what its message must say)
BAD_SEQUENCE = {
    "single tensor": (lambda a, b: a + b, TypeError, ["single Tensor", "[loss]"]),
    "single callable": (lambda a, b: lambda: a, TypeError, ["got a single", "[loss]"]),
    "None": (lambda a, b: None, TypeError, ["NoneType"]),
    "too few": (lambda a, b: [a], ValueError, ["2; got 1. Pass None"]),
    "too many": (lambda a, b: [a, b, a], ValueError, ["2; got 3. Give each"]),
    "empty": (lambda a, b: [], ValueError, ["one loss per weight", "got 0"]),
    "mapping": (lambda a, b: {"x": a, "y": b}, ValueError, ["sequence", "'x', 'y'"]),
}
Q, L = NAMES
BAD_MAPPING = {
    "sequence": (lambda a, b: [a, b], ValueError, ["mapping", Q, L, "list"]),
    "other name": (lambda a, b: {Q: a, "x": b}, ValueError, ["names", Q, L, "'x'"]),
    "a name too few": (lambda a, b: {Q: a}, ValueError, ["names", L]),
    "a name too many": (lambda a, b: {Q: a, L: b, "x": a}, ValueError, ["names", Q, L, "'x'"]),
}


@pytest.mark.parametrize("accumulate", [False, True], ids=["combine", "accumulate"])
@pytest.mark.parametrize("case", [*BAD_SEQUENCE, *BAD_MAPPING])
def test_wrong_number_names_or_container(case, accumulate):
    make, exception, fragments = (BAD_SEQUENCE | BAD_MAPPING)[case]
    state = Untouched(MAKE["list" if case in BAD_SEQUENCE else "mapping"])
    losses = make(*good(state.model))
    refused(state, losses, exception, ["`losses`", *fragments], accumulate=accumulate)


def test_none_for_all_losses():
    opt = MAKE["list"](torch.optim.SGD(network().parameters(), 0.1))
    with pytest.raises(ValueError, match="`losses` must hold at least one loss; got None for all"):
        opt.backward([None, None])


def raise_key_error(gram):
    raise KeyError("a rule's own error")


BAD_RULE = {
    "shape": (lambda gram: gram, ValueError, ["`rule`", "[2]", "[2, 2]"]),
    "number": (lambda gram: gram.sum(), ValueError, ["`rule`", "[2]", "shape []"]),
    "list": (lambda gram: [0.5, 0.5], TypeError, ["`rule`", "got list"]),
    "complex": (lambda gram: gram[0] * 1j, ValueError, ["`rule`", "complex"]),
    "error": (raise_key_error, KeyError, ["a rule's own error"]),
    "NaN": (lambda gram: gram[0] * math.nan, FloatingPointError, ["`rule`", "nan", "nonfinite"]),
    "Inf": (lambda gram: gram[0] / 0, FloatingPointError, ["`rule`", "finite", "inf"]),
}


@pytest.mark.parametrize("case", BAD_RULE)
def test_bad_rule(case):
    rule, exception, fragments = BAD_RULE[case]
    state = Untouched(lambda inner: MultiObjectiveOptimizer(inner, inverse_norms))
    state.opt.rule = rule
    with pytest.raises(exception) as caught:
        state.opt.backward(good(state.model))
    assert [f for f in fragments if f not in str(caught.value)] == []
    state.opt.rule = inverse_norms
    state.check()


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_rule_that_returns_nan_without_an_exception(nonfinite):
    model = network()
    opt = MultiObjectiveOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), lambda gram: gram[0] * 0, nonfinite=nonfinite
    )
    opt.backward(good(model))
    opt.rule = lambda gram: gram[0] * math.nan
    before = bits([p.grad for p in model.parameters()])
    opt.backward(good(model))
    if nonfinite == "skip":
        assert bits([p.grad for p in model.parameters()]) == before
        assert (opt.report.outcome, opt.report.skipped) == (Outcome.SKIPPED, 1)
    else:  # where a GradScaler sees it
        assert all(p.grad.isnan().all() for p in model.parameters() if p.grad is not None)
        assert opt.report.coefficients.isnan().all()


COMPLEX, META = torch.ones(3, dtype=torch.complex64), torch.ones(3, device="meta")


@pytest.mark.parametrize(
    ("parameter", "fragments"),
    [
        (COMPLEX, ["real", "complex64", "[3]", "view_as_real"]),
        (META, ["one device", "cpu", "meta", "Move the model"]),
    ],
    ids=["complex", "another device"],
)
def test_parameters_that_cannot_share_a_gram(parameter, fragments):
    model = network()
    model.register_parameter("odd", nn.Parameter(parameter))
    opt = MAKE["list"](torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError) as caught:
        opt.backward(two_losses(model, batch(0)))
    assert [f for f in ("parameters", *fragments) if f not in str(caught.value)] == []
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_reentrant_checkpoint_that_hides_from_one_loss_what_another_reaches(order):
    """Two forward passes, of which one is in training mode: no parameter is missed by both."""
    model = network()
    opt = MAKE["list"](torch.optim.SGD(model.parameters(), 0.1))
    x = batch(0).requires_grad_()  # what a model does to its input when it checkpoints all layers
    losses = [model[2](checkpoint(model[0], x, use_reentrant=True)).sum(), model(x).sum()]
    with pytest.raises(RuntimeError, match=f"loss '{order.index(0)}'.*use_reentrant=False"):
        opt.backward([losses[i] for i in order])
    assert all(p.grad is None for p in model.parameters())


# Errors keep their class and arguments; the loss and the remedy are a note


class OwnError(Exception):
    """Can only be made with all of its arguments, as some of the user's can."""

    def __init__(self, code, *, detail):
        super().__init__(code)
        self.code, self.detail = code, detail


ERRORS = {
    "out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    "KeyError": lambda: KeyError("key"),
    "RuntimeError": lambda: RuntimeError("some message"),
    "own": lambda: OwnError(7, detail="all"),
    "AssertionError": lambda: AssertionError(),
}


def raises_in_backward(x, error):
    def change(_):
        raise error

    return OwnBackward.apply(x, change)


MODES = ["dense", "ghost", "per_example", "representation", "subset", "gram_every"]
# Every kind of error in the plainest mode; in the others, the one with a remedy and the user's own.
RAISED = [
    *(("dense", source, case) for source in ("backward pass", "callable") for case in ERRORS),
    *((mode, "backward pass", case) for mode in MODES[1:] for case in ("out of memory", "own")),
    *((mode, "callable", case) for mode in MODES[1:3] for case in ("out of memory", "own")),
]


@pytest.mark.parametrize(("mode", "source", "case"), RAISED)
def test_errors_keep_their_class_and_arguments(mode, source, case):
    model = network()
    kind = {"gram_every": "dense", "subset": list(model[2].parameters())}.get(mode, mode)
    options = {"model": model} if mode == "per_example" else {}
    sgd, weights = torch.optim.SGD(model.parameters(), 0.1), {"good": 0.6, "bad": 0.4}
    every = 2 if mode == "gram_every" else 1
    opt = CAGradClip(sgd, weights, gradients=kind, gram_every=every, **options)
    error = ERRORS[case]()
    z = model(batch(0)).sum(1)

    def fail():
        raise error

    losses = {"good": z.square().mean(), "bad": raises_in_backward(z.sin().sum(), error)}
    if source == "callable":
        losses["bad"] = fail
    through = {"per_example": {"scalars": z}, "representation": {"representation": z}}.get(mode, {})
    before = everything(model, opt)
    with pytest.raises(type(error)) as caught:
        opt.backward(losses, **through)
    assert caught.value is error
    assert type(caught.value) is type(error)
    assert caught.value.args == ERRORS[case]().args
    assert vars(error).get("detail") == ("all" if case == "own" else None)
    (note,) = error.__notes__
    assert f"{source} of loss" in note
    assert "'bad'" in note
    remedy = "Use smaller micro-batches" in note
    assert remedy == (case == "out of memory" and source == "backward pass")
    assert everything(model, opt) == before
    with pytest.raises(RuntimeError, match="no report yet"):
        _ = opt.report


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_the_last_pass_of_an_approximation(case):
    """That of the combined loss, between the parameters and what H was computed from."""
    model, error = network(), ERRORS[case]()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    opt = CAGradClip(sgd, [0.5, 0.5], gradients="representation")
    z = raises_in_backward(model[0](batch(0)), error).tanh()
    out = model[2](z)
    with pytest.raises(type(error)) as caught:
        opt.backward([out[:, 0].sum(), out[:, 1].sum()], representation=z)
    assert caught.value is error
    assert "loss '0 + 1'" in error.__notes__[0]
    assert all(p.grad is None for p in model.parameters())
