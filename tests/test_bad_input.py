"""Arguments and checkpoints that are refused: what the message says, and that nothing happened."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

import raco_optim
from raco_optim import (
    MGDA,
    CAGrad,
    CAGradClip,
    LinearScalarization,
    MultiObjectiveOptimizer,
    gram_matrix,
    mixing_coefficients,
    per_loss_gradients,
)
from tests.problems_nn import INNER, NAMES, batch, bits, everything, network, train_step


def inner():
    return INNER["AdamW"](network().parameters())


def missing(fragments, caught):
    """Fragments that the message lacks; every message names its argument and what it got."""
    return [f for f in fragments if f not in str(caught.value)]


BAD_WEIGHTS = {
    "negative": ([1.5, -0.5], ["non-negative", "-0.5"]),
    "NaN": ([math.nan, 1.0], ["finite", "nan"]),
    "Inf": ([math.inf, 0.0], ["finite", "inf"]),
    "sum above 1": ([0.7, 0.4], ["sum to 1", "1.1", "Divide each weight by the sum"]),
    "sum below 1": ([0.5, 0.499998], ["sum to 1", "0.999998"]),
    "all zero": ([0.0, 0.0], ["sum to 1"]),
    "empty": ([], ["at least one", "none"]),
    "empty mapping": ({}, ["at least one", "none"]),
    "text": ("10", ["sequence of numbers", "'10'"]),
    "texts": (["0.5", "0.5"], ["sequence of numbers", "'0.5'"]),
    "mapping to texts": ({"a": "0.5", "b": "0.5"}, ["sequence of numbers", "'0.5'"]),
    "set": ({0.25, 0.75}, ["sequence of numbers"]),
    "number": (1.0, ["sequence of numbers", "1.0"]),
    "matrix": (torch.ones(2, 2) / 4, ["sequence of numbers", "tensor"]),
    "complex": ([0.5j, 0.5], ["sequence of numbers", "0.5j"]),
    "None inside": ([None, 1.0], ["sequence of numbers", "None"]),
}
TAKES_WEIGHTS = {
    "CAGradClip": CAGradClip,
    "CAGrad": CAGrad,
    "LinearScalarization": LinearScalarization,
    "MGDA": MGDA,
    "rule": lambda o, w: MultiObjectiveOptimizer(o, lambda gram: gram[0], weights=w),
}


@pytest.mark.parametrize("method", TAKES_WEIGHTS)
@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights(method, case):
    weights, fragments = BAD_WEIGHTS[case]
    with pytest.raises(ValueError) as caught:
        TAKES_WEIGHTS[method](inner(), weights)
    assert missing(["`weights`", "got", *fragments], caught) == []


@pytest.mark.parametrize("method", [CAGradClip, CAGrad, LinearScalarization])
def test_methods_that_need_weights_do_not_take_none(method):
    with pytest.raises(ValueError, match=r"`weights` must .*got None"):
        method(inner(), None)


@pytest.mark.parametrize(
    "weights",
    [
        (0.25, 0.75),
        torch.tensor([0.25, 0.75]),
        np.array([0.25, 0.75]),
        {"a": 0.25, "b": 0.75}.values(),
        [0.25 + 2e-7, 0.75 + 2e-7],
        [np.float32(0.25), torch.tensor(0.75)],
    ],
    ids=["tuple", "tensor", "array", "values", "nearly 1", "mixed"],
)
def test_good_weights_sum_to_one_exactly(weights):
    opt = CAGradClip(inner(), weights)
    assert math.fsum(opt.weights) == pytest.approx(1, abs=1e-16)
    assert opt.weights == pytest.approx((0.25, 0.75), abs=1e-6)
    again = opt.weights
    opt.weights = again
    assert opt.weights == again, "what is normalised stays as it is"


@pytest.mark.parametrize("c", [-0.1, 1.0, 1.5, math.nan, math.inf, "0.4", None, [0.4]], ids=str)
def test_bad_radius(c):
    with pytest.raises(ValueError) as caught:
        CAGradClip(inner(), [0.5, 0.5], c)
    assert missing(["`c` must be", repr(c)], caught) == []
    if isinstance(c, float):
        assert missing(["[0, 1)", "`CAGrad` accepts larger values"], caught) == []
    opt = CAGradClip(inner(), [0.5, 0.5], 0.25)
    with pytest.raises(ValueError, match="`c` must be"):
        opt.c = c
    assert opt.c == 0.25


def test_cagrad_alone_takes_a_radius_of_one_and_more():
    assert CAGrad(inner(), [0.5, 0.5], c=1.5).c == 1.5
    for c in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="`c` must be finite and non-negative; got"):
            CAGrad(inner(), [0.5, 0.5], c=c)


@pytest.mark.parametrize("argument", ["clip", "solver", "nonfinite"])
@pytest.mark.parametrize("value", ["Hard", "", None, 0, ["hard"]], ids=repr)
def test_unknown_choice(argument, value):
    with pytest.raises(ValueError) as caught:
        CAGradClip(inner(), [0.5, 0.5], **{argument: value})
    choices = {
        "clip": ("hard", "soft", "none"),
        "solver": ("exact", "pgd", "slsqp"),
        "nonfinite": ("raise", "skip", "propagate"),
    }[argument]
    assert missing([f"`{argument}`", repr(value), *map(repr, choices)], caught) == []


@pytest.mark.parametrize(
    "given",
    [None, network().parameters(), network(), torch.optim.SGD],
    ids=["None", "parameters", "model", "class"],
)
@pytest.mark.parametrize("method", TAKES_WEIGHTS)
def test_inner_is_not_an_optimizer(method, given):
    with pytest.raises(TypeError) as caught:
        TAKES_WEIGHTS[method](given, [1.0])
    assert missing(["`inner`", type(given).__name__, "AdamW(model.parameters())"], caught) == []


def test_inner_is_a_wrapper():
    with pytest.raises(TypeError, match="got CAGradClip, which .* Pass its `optimizer`"):
        CAGradClip(CAGradClip(inner(), [1.0]), [1.0])


def test_rule_is_not_callable():
    with pytest.raises(TypeError, match=r"`rule` must be a callable.*got \[0.5, 0.5\]"):
        MultiObjectiveOptimizer(inner(), [0.5, 0.5])


@pytest.mark.parametrize(
    ("shared", "exception", "fragments"),
    [
        (lambda m: network().parameters(), ValueError, ["of `inner`", "shape [6, 4]"]),
        (lambda m: [*m.parameters(), torch.ones(3)], ValueError, ["of `inner`", "shape [3]"]),
        (lambda m: [], ValueError, ["none"]),
        (lambda m: m[0], TypeError, ["Linear"]),
        (lambda m: m.named_parameters(), TypeError, ["tuple"]),
        (lambda m: ["0.weight"], TypeError, ["str"]),
    ],
    ids=["another model's", "one too many", "none", "model", "named", "names"],
)
def test_bad_shared_parameters(shared, exception, fragments):
    model = network()
    with pytest.raises(exception) as caught:
        CAGradClip(
            torch.optim.SGD(model.parameters(), 0.1), [0.5, 0.5], shared_parameters=shared(model)
        )
    assert missing(["`shared_parameters`", "model.trunk.parameters()", *fragments], caught) == []


# Setting weights between steps


@pytest.mark.parametrize(
    ("given", "then", "fragments"),
    [
        ([0.5, 0.5], [0.2, 0.3, 0.5], ["a sequence of 2; got [0.2, 0.3, 0.5]"]),
        ([0.5, 0.5], {"a": 0.5, "b": 0.5}, ["sequence", "'a'"]),
        ([0.5, 0.5], None, ["got None"]),
        ([0.5, 0.5], [0.5, 0.6], ["sum to 1"]),
        ({"a": 0.5, "b": 0.5}, [0.5, 0.5], ["mapping", "'a'", "'b'", "[0.5, 0.5]"]),
        ({"a": 0.5, "b": 0.5}, {"a": 0.5, "c": 0.5}, ["mapping", "'b'", "'c'"]),
        ({"a": 0.5, "b": 0.5}, {"a": 1.0}, ["mapping", "'b'"]),
        ({"a": 0.5, "b": 0.5}, {"a": -0.5, "b": 1.5}, ["non-negative"]),
    ],
)
def test_weights_cannot_be_set_to(given, then, fragments):
    opt = CAGradClip(inner(), given)
    before = bits([opt.weights, opt.state_dict()])
    with pytest.raises(ValueError) as caught:
        opt.weights = then
    assert missing(["`weights`", *fragments], caught) == []
    assert bits([opt.weights, opt.state_dict()]) == before


def test_weights_by_name_may_be_set_in_any_order():
    opt = CAGradClip(inner(), {"a": 0.5, "b": 0.5})
    opt.weights = {"b": 0.75, "a": 0.25}
    assert opt.weights == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize(
    "argument", ["shared_parameters", "gradients", "gram_every", "model", "process_group"]
)
def test_what_is_chosen_at_construction_can_not_be_set_later(argument):
    opt = CAGradClip(inner(), [0.5, 0.5])
    with pytest.raises(
        AttributeError, match=f"`{argument}` can't be changed after the optimizer is built"
    ):
        setattr(opt, argument, 3)
    opt.optimizer.model = 1  # of an inner optimizer that has one
    opt.model = 2
    assert opt.optimizer.model == 2


def test_a_group_chooses_between_several_inner_optimizers_only():
    opt = CAGradClip(inner(), [0.5, 0.5])
    group = {"params": [nn.Parameter(torch.ones(1))], "optimizer": 0}
    with pytest.raises(ValueError, match=r'the key "optimizer".*must be left out'):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1


# Checkpoints


def named(weights=(0.6, 0.4), names=NAMES):
    return lambda o: CAGradClip(o, dict(zip(names, weights, strict=True)))


def edited(make, **own):
    """A checkpoint with other entries of the wrapper's own."""

    def state(o):
        found = make(o).state_dict()
        found["raco_optim"] = {**found["raco_optim"], **own}
        return found

    return state


def two_groups(o):
    parameters = [p for group in o.param_groups for p in group["params"]]
    split = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    return named()(split).state_dict()


BAD_STATES = {
    "other names": (named(names=("a", "b")), ["'a', 'b'", *NAMES]),
    "no names": (lambda o: CAGradClip(o, [0.6, 0.4]), [*NAMES, "2"]),
    "another number": (named([0.2, 0.3, 0.5], "abc"), ["'c'", *NAMES]),
    "newer version": (edited(named(), version=99), ["version 1 or older", "99", "Update"]),
    "bad weights": (edited(named(), weights=[5.0, -1.0]), ["`weights`", "-1.0"]),
    "bad radius": (edited(named(), c=2.0), ["`c`", "2.0"]),
    "CAGrad's radius": (
        lambda o: CAGrad(o, dict(zip(NAMES, [0.6, 0.4], strict=True)), c=2.0),
        ["`c`", "2.0"],
    ),
    "MGDA": (lambda o: MGDA(o, dict(zip(NAMES, [0.6, 0.4], strict=True))), ["CAGradClip", "'c'"]),
    "nothing of its own": (lambda o: {**o.state_dict(), "raco_optim": {}}, ["lacks", "version"]),
    "something else": (lambda o: {"x": 1}, ["`state_dict`", "without 'param_groups'"]),
    "two groups": (two_groups, ["different number of parameter groups"]),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_checkpoint_that_does_not_fit(case):
    make, fragments = BAD_STATES[case]
    other = INNER["AdamW"](network(seed=1).parameters())
    made = make(other)
    state = made if isinstance(made, dict) else made.state_dict()
    model = network()
    opt = named()(INNER["AdamW"](model.parameters()))
    train_step(opt, model, batch(0))
    before = everything(model, opt)
    given = bits(state)
    with pytest.raises(ValueError) as caught:
        opt.load_state_dict(state)
    assert missing(fragments, caught) == []
    assert everything(model, opt) == before
    assert bits(state) == given
    train_step(opt, model, batch(1))


# Free functions


class NoOptimizer:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)


@pytest.mark.parametrize("given", [NoOptimizer.optimizer, NoOptimizer(), None], ids=repr)
def test_backward_of_something_else(given):
    with pytest.raises(TypeError) as caught:
        raco_optim.backward(given, [])
    assert missing(["`optimizer`", "CAGradClip", type(given).__name__], caught) == []


def test_bad_gradients():
    with pytest.raises(ValueError, match="`gradients` must hold at least one gradient; got none"):
        gram_matrix([])
    with pytest.raises(ValueError, match=r"one tensor .*per parameter.*rows of \[1, 2\] entries"):
        gram_matrix([[torch.ones(2)], [torch.ones(2), None]])
    with pytest.raises(ValueError, match=r"agree in shape.*\(2,\), \(3,\).*parameter 0"):
        gram_matrix([[torch.ones(2)], [torch.ones(3)]])
    with pytest.raises(ValueError, match="`gradients` must be real; got complex"):
        gram_matrix([[torch.ones(2, dtype=torch.complex64)]])
    for rows, kind in [([1, 2], "int"), ([[1.0], [torch.ones(1)]], "float")]:
        with pytest.raises(TypeError, match=f"`gradients` must be rows of tensors.*with {kind}"):
            gram_matrix(rows)


def test_bad_losses_of_the_function():
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"`losses` must be a sequence.*Pass \[loss\]"):
        per_loss_gradients(x.sum(), [x])
    with pytest.raises(ValueError, match="`losses` must hold at least one loss; got none"):
        per_loss_gradients([], [x])
    with pytest.raises(ValueError, match="`losses` must hold at least one loss; got None for all"):
        per_loss_gradients([None], [x])
    with pytest.raises(ValueError, match="loss '0' must depend on a parameter.*reaches none"):
        per_loss_gradients([x.sum()], [nn.Parameter(torch.ones(2))])
    for parameters in ([], [torch.ones(2)]):
        with pytest.raises(
            ValueError, match="at least one parameter must require gradients; got [01] that"
        ):
            per_loss_gradients([x.sum()], parameters)


def test_a_gram_matrix_may_be_off_by_rounding_of_float32_and_no_more():
    for error, refused in ((5e-5, False), (2e-4, True)):
        for gram in ([[1.0, 0.5 + error], [0.5, 1.0]], [[1.0, 1 + error], [1 + error, 1.0]]):
            with pytest.raises(ValueError, match="`gram` must") if refused else nullcontext():
                mixing_coefficients(gram, [0.5, 0.5], 0.4)
