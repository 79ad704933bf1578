"""Weights and names of losses: in whatever form they are given, they have effect or are refused."""

import copy
import enum
import json
import math
import pickle
import re
import warnings
from collections import ChainMap, OrderedDict, UserDict
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from raco_optim import MGDA, CAGrad, CAGradClip, LinearScalarization, MultiObjectiveOptimizer
from tests.problems_nn import through_a_file

# Gradients (3, 0) and (0, 1): with c = 0 the combined gradient is (3 w_a, w_b).
WEIGHTS = {"a": 0.75, "b": 0.25}
GRADIENT = [2.25, 0.25]


class Named(str, enum.Enum):
    A = "a"
    B = "b"


class Loud(str):
    __slots__ = ()

    def __str__(self) -> str:
        return self.upper()


class OwnHash(str):
    """A string with a hash of its own, so that looking up the plain string fails."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 1


class Plain(enum.Enum):
    A = 1
    B = 2


class OnlyMapping(Mapping):
    """A mapping that is no dict."""

    def __init__(self, entries):
        self._entries = dict(entries)

    def __getitem__(self, key):
        return self._entries[key]

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)


class Repeated:
    """As TensorDict, a mapping in ``keys`` and ``[]`` only; and it may hold a key twice."""

    def __init__(self, keys, value):
        self._keys, self._value = keys, value

    def keys(self):
        return self._keys

    def __getitem__(self, key):
        return self._value[key] if isinstance(self._value, dict) else self._value

    def __iter__(self):
        raise TypeError("no batch dimension to iterate over")


def tensor_dict(entries):
    from tensordict import TensorDict

    return TensorDict({key: torch.as_tensor(value) for key, value in entries.items()}, [])


MAPPINGS = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "UserDict": UserDict,
    "ChainMap": ChainMap,
    "MappingProxyType": MappingProxyType,
    "Mapping": OnlyMapping,
    "batched": lambda entries: Repeated(entries.keys(), entries),
    "TensorDict": tensor_dict,
}
# Strings of other classes, which a checkpoint must not hold.
STRINGS = {"numpy": np.str_, "enum": Named, "overridden": Loud, "own hash": OwnHash}
METHODS = {
    "CAGradClip": lambda inner, w: CAGradClip(inner, w, c=0.0),
    "CAGrad": lambda inner, w: CAGrad(inner, w, c=0.0),
    "LinearScalarization": LinearScalarization,
    "MGDA": MGDA,
    "rule": lambda inner, w: MultiObjectiveOptimizer(inner, torch.diag, weights=w),
}


def problem():
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    return x, torch.optim.SGD([x], lr=0.1), {"a": 3 * x[0], "b": x[1]}


# --- The view of the weights is read-only --------------------------------------------------------


def test_changing_an_entry_says_how_weights_are_set():
    x, inner, losses = problem()
    opt = CAGradClip(inner, {"a": 0.5, "b": 0.5}, c=0.0)
    for change in (
        lambda w: w.__setitem__("a", 0.1),
        lambda w: w.__delitem__("a"),
        lambda w: w.update(a=0.1, b=0.9),
        lambda w: w.pop("a"),
        lambda w: w.popitem(),
        lambda w: w.clear(),
        lambda w: w.setdefault("c", 0.1),
        lambda w: w.__ior__({"a": 0.1}),
    ):
        with pytest.raises(
            TypeError, match=r"read-only.*opt\.weights = \{\*\*opt\.weights, \.\.\.\}"
        ):
            change(opt.weights)
        assert opt.weights == {"a": 0.5, "b": 0.5}
    opt.weights = {**opt.weights, "a": 0.75, "b": 0.25}  # the remedy
    assert opt.weights | {"a": 0} == {"a": 0, "b": 0.25}
    opt.backward(losses)
    assert x.grad.tolist() == GRADIENT
    with pytest.raises(TypeError):
        CAGradClip(inner, [0.5, 0.5]).weights[0] = 0.1


def test_copies_of_the_weights_are_equal_and_may_be_changed():
    x, inner, losses = problem()
    given = dict(WEIGHTS)
    opt = CAGradClip(inner, given, c=0.0)
    given["a"] = 0.0
    for duplicate in (
        lambda w: json.loads(json.dumps(w)),
        lambda w: pickle.loads(pickle.dumps(w)),
        copy.copy,
        copy.deepcopy,
        through_a_file,
        dict,
    ):
        found = duplicate(opt.weights)
        assert found == WEIGHTS
        assert list(found) == ["a", "b"]
        found["a"] = 0.1
        assert opt.weights == WEIGHTS
    opt.backward(losses)
    assert x.grad.tolist() == GRADIENT


# --- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("of_weights", [*STRINGS.values(), str], ids=[*STRINGS, "str"])
def test_names_become_plain_strings(of_weights, later):
    for of_losses in (*STRINGS.values(), str):
        x, inner, losses = problem()
        weights = {of_weights(name): w for name, w in WEIGHTS.items()}
        opt = CAGradClip(inner, {"a": 0.5, "b": 0.5} if later else weights, c=0.0)
        if later:
            opt.weights = weights
        opt.backward({of_losses(name): loss for name, loss in losses.items()})
        assert x.grad.tolist() == GRADIENT
        for names in (opt.weights, opt.report.names):
            assert [(type(name), name) for name in names] == [(str, "a"), (str, "b")]
        other = CAGradClip(inner, {"b": 0.5, "a": 0.5})
        other.load_state_dict(through_a_file(opt.state_dict()))
        assert other.weights == WEIGHTS


@pytest.mark.parametrize("make", STRINGS.values(), ids=STRINGS)
def test_names_become_plain_strings_without_weights(make):
    x, inner, losses = problem()
    opt = MGDA(inner, gram_every=3)
    losses = {make(name): loss for name, loss in losses.items()}
    opt.backward(losses, retain_graph=True)
    assert [(type(name), name) for name in opt.report.names] == [(str, "a"), (str, "b")]
    through_a_file(opt.state_dict())
    opt.backward(losses)
    assert opt.report.gram_age == 1


KEYS = [(0, 1), (("a", 1), ("a", 2)), (Plain.A, Plain.B), (None, "b"), (b"a", b"b"), ("a", 1)]


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_other_names_are_refused(keys):
    """At construction, by the setter and, where there are no weights, at the first backward."""
    x, inner, losses = problem()
    got = next(repr(key) for key in keys if not isinstance(key, str))
    message = rf"names of losses must be strings; got {re.escape(got)}, of type.*Pass a sequence"
    for make in METHODS.values():
        with pytest.raises(TypeError, match=message):
            make(inner, dict.fromkeys(keys, 0.5))
    with pytest.raises(TypeError, match=message):
        CAGradClip(inner, WEIGHTS).weights = dict.fromkeys(keys, 0.5)
    opt = MGDA(inner)
    for accumulate in (False, True):
        with pytest.raises(TypeError, match="names of losses must be strings"):
            opt.backward(dict(zip(keys, losses.values(), strict=True)), accumulate=accumulate)
    assert x.grad is None
    opt.backward(losses)
    opt.step()


@pytest.mark.parametrize("second", ["a", Named.A, OwnHash("a")], ids=repr)
def test_one_name_twice(second):
    """As in a pandas Series whose index is not unique, or with keys of unlike hashes."""
    x, inner, losses = problem()
    with pytest.raises(ValueError, match="names of losses must differ; got 'a' twice"):
        CAGradClip(inner, Repeated(["a", second], 0.5))
    with pytest.raises(ValueError, match="names of losses must differ; got 'a' twice"):
        CAGradClip(inner, WEIGHTS).backward(Repeated(["a", "b", second], losses["a"]))
    assert x.grad is None


def test_wrong_names_are_shown_plainly():
    _, inner, losses = problem()
    with pytest.raises(ValueError, match=r"a mapping with \['a', 'b'\].*got the names \['b'\]"):
        CAGradClip(inner, WEIGHTS).backward({Named.B: losses["b"]})


# --- Mappings and sequences ----------------------------------------------------------------------


@pytest.mark.parametrize("of_weights", MAPPINGS)
def test_any_mapping_will_do(of_weights):
    for of_losses in MAPPINGS.values():
        x, inner, losses = problem()
        opt = CAGradClip(inner, MAPPINGS[of_weights]({"b": 0.5, "a": 0.5}), c=0.0)
        opt.weights = MAPPINGS[of_weights](WEIGHTS)
        opt.backward(of_losses(losses))
        assert x.grad.tolist() == GRADIENT
        assert opt.report.names == ("b", "a")


@pytest.mark.parametrize("make", MAPPINGS.values(), ids=MAPPINGS)
def test_any_mapping_names_the_losses_where_there_are_no_weights(make):
    x, inner, losses = problem()
    opt = MGDA(inner)
    opt.backward(make(losses), accumulate=True)
    opt.backward(make({"b": x[1] * 1, "a": x[0] * 3}))
    assert opt.report.names == ("a", "b")
    assert opt.report.losses.tolist() == [6, 2]
    # Gradients (6, 0) and (0, 2): p is inverse to the squared lengths.
    assert opt.report.p.tolist() == pytest.approx([0.1, 0.9])


SEQUENCES = {
    "generator": lambda w: (float(x) for x in w),
    "iterator": iter,
    "map": lambda w: map(float, w),
    "tuple": tuple,
    "array": np.array,
    "tensor": torch.tensor,
    "numbers with a gradient": lambda w: [torch.tensor(x, requires_grad=True) for x in w],
    "tensor with a gradient": lambda w: torch.tensor(w, requires_grad=True),
    "result of a softmax": lambda w: torch.tensor(w, requires_grad=True).log().softmax(0),
    "parameter": lambda w: nn.Parameter(torch.tensor(w)),
    "view": lambda w: dict(enumerate(w)).values(),
    "mixed": lambda w: [np.float32(w[0]), torch.tensor(w[1])],
    "nearly 1": lambda w: [x + 2e-7 for x in w],
}


@pytest.mark.parametrize("form", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("method", METHODS)
def test_weights_in_any_form(method, form):
    """Without a warning, such as torch's about weights that lose their graph."""
    x, inner, losses = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = METHODS[method](inner, form([0.75, 0.25]))
        assert opt.weights == pytest.approx((0.75, 0.25))
        opt.weights = form([0.25, 0.75])
        assert opt.weights == pytest.approx((0.25, 0.75))
        assert {type(w) for w in opt.weights} == {float}
        opt.backward(list(losses.values()))
    if method in ("CAGradClip", "CAGrad", "LinearScalarization"):
        assert x.grad.tolist() == pytest.approx([0.75, 0.75])
    through_a_file(opt.state_dict())
    pickle.dumps(opt.weights)


def test_named_weights_with_a_gradient():
    x, inner, losses = problem()
    weights = torch.tensor([0.75, 0.25], requires_grad=True)
    CAGradClip(inner, {"a": weights[0], "b": weights[1]}, c=0.0).backward(losses)
    assert x.grad.tolist() == GRADIENT
    assert weights.grad is None


def test_weights_are_normalised_once():
    """Those that sum to 1, to rounding, stay as they are to the bit."""
    _, inner, _ = problem()
    for seed in range(50):
        given = np.random.default_rng(seed).dirichlet(np.ones(7)).tolist()
        opt = CAGradClip(inner, given)
        assert opt.weights == tuple(given)
        opt.weights = opt.weights
        assert opt.weights == tuple(given)
    assert CAGradClip(inner, [0.5, 0.5 + 1e-9]).weights != (0.5, 0.5 + 1e-9)
    opt = CAGradClip(inner, [0.25 + 2e-7, 0.75 + 2e-7])
    once = opt.weights
    assert math.fsum(once) == pytest.approx(1, abs=1e-16)
    opt.weights = once
    assert opt.weights == once


# --- A loss that is NaN --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_asked_first_if_it_has_data(bad):
    """The mean over no labelled example is NaN: the remedy is None, not a search for a cause."""
    x, inner, losses = problem()
    opt = CAGradClip(inner, WEIGHTS)
    losses["b"] = losses["b"] * bad
    with pytest.raises(FloatingPointError, match="loss 'b' is NaN or Inf") as caught:
        opt.backward(losses, retain_graph=True)
    message = str(caught.value)
    assert 0 < message.index("pass None") < message.index("set_detect_anomaly")
    assert x.grad is None
    losses["b"] = None
    opt.backward(losses)


def test_a_gradient_that_is_not_finite_has_data():
    x, inner, losses = problem()
    losses["b"] = (x[1] - 1).sqrt()  # its derivative at 0 is infinite
    with pytest.raises(FloatingPointError, match="the gradient of loss 'b'") as caught:
        CAGradClip(inner, WEIGHTS).backward(losses)
    assert "pass None" not in str(caught.value)
    assert "set_detect_anomaly" in str(caught.value)
