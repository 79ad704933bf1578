"""Arguments that are refused: what the message says, and that nothing happened."""

import math
from contextlib import nullcontext

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
from tests.problems_nn import INNER, bits, network


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
    "frozen set": (frozenset({0.5}), ["sequence of numbers"]),
    "keys": ({"a": 1}.keys(), ["sequence of numbers"]),
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


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights(case):
    weights, fragments = BAD_WEIGHTS[case]
    for method in TAKES_WEIGHTS.values():
        with pytest.raises(ValueError) as caught:
            method(inner(), weights)
        assert missing(["`weights`", "got", *fragments], caught) == []


@pytest.mark.parametrize("method", [CAGradClip, CAGrad, LinearScalarization])
def test_methods_that_need_weights_do_not_take_none(method):
    with pytest.raises(ValueError, match=r"`weights` must .*got None"):
        method(inner(), None)


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


CHOICES = {
    "clip": ("hard", "soft", "none"),
    "solver": ("exact", "pgd", "slsqp"),
    "nonfinite": ("raise", "skip", "propagate"),
}


@pytest.mark.parametrize("argument", CHOICES)
def test_unknown_choice(argument):
    for value in ("Hard", "", None, 0, ["hard"]):
        with pytest.raises(ValueError) as caught:
            CAGradClip(inner(), [0.5, 0.5], **{argument: value})
        choices = map(repr, CHOICES[argument])
        assert missing([f"`{argument}`", repr(value), *choices], caught) == []


@pytest.mark.parametrize(
    "given",
    [None, network().parameters(), network(), torch.optim.SGD],
    ids=["None", "parameters", "model", "class"],
)
def test_inner_is_not_an_optimizer(given):
    for method in TAKES_WEIGHTS.values():
        with pytest.raises(TypeError) as caught:
            method(given, [1.0])
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
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(exception) as caught:
        CAGradClip(sgd, [0.5, 0.5], shared_parameters=shared(model))
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


# Free functions


class NoOptimizer:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)


@pytest.mark.parametrize(
    "given", [NoOptimizer.optimizer, NoOptimizer(), None], ids=["SGD", "no optimizer", "None"]
)
def test_backward_of_something_else(given):
    with pytest.raises(TypeError) as caught:
        raco_optim.backward(given, [])
    assert missing(["`optimizer`", "CAGradClip", type(given).__name__], caught) == []


TWO = torch.ones(2)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "`gradients` must hold at least one gradient; got none"),
        ([[TWO], [TWO, None]], ValueError, r"one tensor .*per parameter.*rows of \[1, 2\] entries"),
        ([[TWO], [torch.ones(3)]], ValueError, r"agree in shape.*\(2,\), \(3,\).*parameter 0"),
        ([[TWO.cfloat()]], ValueError, "`gradients` must be real; got complex"),
        ([1, 2], TypeError, "`gradients` must be rows of tensors.*with int"),
        ([[1.0], [TWO]], TypeError, "`gradients` must be rows of tensors.*with float"),
    ],
)
def test_bad_gradients(rows, error, message):
    with pytest.raises(error, match=message):
        gram_matrix(rows)


X = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("losses", "parameters", "error", "message"),
    [
        (X.sum(), [X], TypeError, r"`losses` must be a sequence.*Pass \[loss\]"),
        ([], [X], ValueError, "`losses` must hold at least one loss; got none"),
        ([None], [X], ValueError, "`losses` must hold at least one loss; got None for all"),
        ([X.sum()], [nn.Parameter(TWO)], ValueError, "loss '0' must depend on .*reaches none"),
        ([X.sum()], [], ValueError, "at least one parameter must require gradients; got 0 that"),
        ([X.sum()], [TWO], ValueError, "at least one parameter must require gradients; got 1 that"),
    ],
)
def test_bad_losses_of_the_function(losses, parameters, error, message):
    with pytest.raises(error, match=message):
        per_loss_gradients(losses, parameters)


def test_a_gram_matrix_may_be_off_by_rounding_of_float32_and_no_more():
    for error, refused in ((5e-5, False), (2e-4, True)):
        for gram in ([[1.0, 0.5 + error], [0.5, 1.0]], [[1.0, 1 + error], [1 + error, 1.0]]):
            with pytest.raises(ValueError, match="`gram` must") if refused else nullcontext():
                mixing_coefficients(gram, [0.5, 0.5], 0.4)
