"""`load_state_dict` loads all of a state, by the names of the losses, or nothing."""

import copy
import math

import pytest
import torch
from torch import nn

from raco_optim import MGDA, CAGrad, CAGradClip, LinearScalarization, MultiObjectiveOptimizer
from tests.problems_nn import bits, everything, network, three_losses

NAMES = ("a", "b", "c")
WEIGHTS = dict(zip(NAMES, (0.5, 0.3, 0.2), strict=True))


class Counting:
    """A rule with a state that it checks itself."""

    def __init__(self):
        self.calls = 0

    def __call__(self, gram):
        self.calls += 1
        return gram.new_full((len(gram),), 1 / self.calls)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        if state["calls"] < 0:
            raise RuntimeError("calls are counted from 0")
        self.calls = state["calls"]


class Momentum:
    """A rule whose attributes are its state."""

    def __init__(self):
        self.mean = None

    def __call__(self, gram):
        self.mean = gram if self.mean is None else (self.mean + gram) / 2
        return self.mean.diagonal().rsqrt()


MAKE = {
    "CAGradClip": lambda inner: CAGradClip(inner, WEIGHTS, c=0.5, gram_every=3),
    "CAGrad": lambda inner: CAGrad(inner, WEIGHTS, c=1.5, gram_every=3),
    "MGDA": lambda inner: MGDA(inner, WEIGHTS, gram_every=3),
    "LinearScalarization": lambda inner: LinearScalarization(inner, WEIGHTS, gram_every=3),
    "own state": lambda inner: MultiObjectiveOptimizer(inner, Counting(), weights=WEIGHTS),
    "attributes": lambda inner: MultiObjectiveOptimizer(inner, Momentum(), weights=WEIGHTS),
}


def batch(k):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(k))


def losses(model, k, names=NAMES):
    return dict(zip(names, three_losses(model, batch(k)), strict=True))


def trained(method, steps=2, seed=0):
    model = network(seed=seed)
    opt = MAKE[method](torch.optim.AdamW(model.parameters(), lr=0.05, amsgrad=True))
    for k in range(steps):
        opt.zero_grad()
        opt.backward(losses(model, k))
        opt.step()
    return model, opt


def own(state, **changes):
    return {**state, "raco_optim": {**state["raco_optim"], **changes}}


def without(state, *keys):
    return {**state, "raco_optim": {k: v for k, v in state["raco_optim"].items() if k not in keys}}


def kept(state, **changes):
    return own(state, kept_gram={**state["raco_optim"]["kept_gram"], **changes})


def kept_of(s, gram, *names):
    return kept(s, gram=gram, losses=list(names))


EYE, EYE2, EYE4 = (torch.eye(m, dtype=torch.float64) for m in (3, 2, 4))
# How a state is spoilt, and what the message must say.
BAD = {
    "no mapping": (lambda s: s | {"raco_optim": [1, 2]}, ["is a list"]),
    "nothing": (lambda s: s | {"raco_optim": {}}, ["lacks", "version"]),
    "none": (lambda s: s | {"raco_optim": 3}, ["is a int"]),
    "no version": (lambda s: without(s, "version"), ["lacks ['version']"]),
    "future": (lambda s: own(s, version=99), ["version 1 or older", "99", "Update"]),
    "text as version": (lambda s: own(s, version="1"), ["version '1'"]),
    "no weights": (lambda s: without(s, "weights"), ["lacks ['weights']"]),
    "no names": (lambda s: without(s, "names"), ["lacks ['names']"]),
    "no count": (lambda s: without(s, "skipped"), ["lacks ['skipped']"]),
    "no Gram": (lambda s: without(s, "kept_gram"), ["lacks ['kept_gram']"]),
    "other names": (lambda s: own(s, names=["a", "b", "d"]), ["('a', 'b', 'c')", "'d'"]),
    "one name twice": (lambda s: own(s, names=["a", "b", "b"]), ["same losses"]),
    "names of no losses": (lambda s: own(s, names=None), ["('a', 'b', 'c')", "got 3"]),
    "names and a number": (lambda s: own(s, names=["a", "b", 3]), ["same losses"]),
    "names as a number": (lambda s: own(s, names=3), ["same losses"]),
    "two weights": (lambda s: own(s, weights=[0.5, 0.5]), ["same losses"]),
    "text as weights": (lambda s: own(s, weights="abc"), ["`weights`"]),
    "sum of weights": (lambda s: own(s, weights=[0.5, 0.5, 0.5]), ["`weights`"]),
    "negative weight": (lambda s: own(s, weights=[1.5, 0.5, -1.0]), ["`weights`", "-1.0"]),
    "weight that is NaN": (lambda s: own(s, weights=[0.5, 0.5, math.nan]), ["`weights`"]),
    "nothing for weights": (lambda s: own(s, weights=None), ["same losses"]),
    "negative count": (lambda s: own(s, skipped=-1), ["'skipped'"]),
    "broken count": (lambda s: own(s, skipped=1.5), ["'skipped'"]),
    "text as count": (lambda s: own(s, skipped="1"), ["'skipped'"]),
    "truth as count": (lambda s: own(s, skipped=True), ["'skipped'"]),
    "no kept mapping": (lambda s: own(s, kept_gram=EYE), ["'kept_gram'"]),
    "nothing kept": (lambda s: own(s, kept_gram=None), ["'kept_gram'"]),
    "no age": (lambda s: own(s, kept_gram={"gram": None, "losses": []}), ["'kept_gram'"]),
    "list as Gram": (lambda s: kept_of(s, [[1.0] * 3] * 3, *NAMES), ["'kept_gram'"]),
    "Gram of two": (lambda s: kept_of(s, EYE2, "a", "b"), ["'kept_gram'"]),
    "Gram of four": (lambda s: kept_of(s, EYE4, *NAMES, "d"), ["'kept_gram'"]),
    "Gram of others": (lambda s: kept_of(s, EYE, "a", "b", "d"), ["'kept_gram'"]),
    "Gram not square": (lambda s: kept_of(s, EYE[:, :2], *NAMES), ["'kept_gram'"]),
    "Gram of integers": (lambda s: kept_of(s, EYE.long(), *NAMES), ["'kept_gram'"]),
    "complex Gram": (lambda s: kept_of(s, EYE.cfloat(), *NAMES), ["'kept_gram'"]),
    "another order": (lambda s: kept_of(s, EYE.float(), "b", "a", "c"), ["'kept_gram'"]),
    "Gram and numbers": (lambda s: kept_of(s, EYE, 0, 1, 2), ["'kept_gram'"]),
    "negative age": (lambda s: kept(s, age=-1), ["'kept_gram'"]),
    "broken age": (lambda s: kept(s, age=0.5), ["'kept_gram'"]),
    "truth as age": (lambda s: kept(s, age=True), ["'kept_gram'"]),
    "inner: no groups": (
        lambda s: {k: v for k, v in s.items() if k != "param_groups"},
        ["`state_dict`", "without 'param_groups'"],
    ),
    "inner: no state": (
        lambda s: {k: v for k, v in s.items() if k != "state"},
        ["`state_dict`", "without 'state'"],
    ),
    "inner: two groups": (
        lambda s: s | {"param_groups": s["param_groups"] * 2},
        ["different number of parameter groups"],
    ),
    "inner: other sizes": (
        lambda s: s | {"param_groups": [{**s["param_groups"][0], "params": [0]}]},
        ["doesn't match the size"],
    ),
    "inner: groups are None": (lambda s: s | {"param_groups": None}, ["`state_dict`", "another"]),
}
OF_CAGRAD = {
    "negative c": (lambda s: own(s, c=-0.5), ["`c`", "-0.5"]),
    "c that is NaN": (lambda s: own(s, c=math.nan), ["`c`", "nan"]),
    "text as c": (lambda s: own(s, c="0.5"), ["`c`", "'0.5'"]),
    "no c": (lambda s: without(s, "c"), ["CAGrad", "lacks ['c']"]),
}
OF_A_RULE = {
    "no rule": (lambda s: without(s, "rule"), ["lacks ['rule']"]),
    "rule is None": (lambda s: own(s, rule=None), ["`state` of the rule"]),
    "rule of another": (lambda s: own(s, rule={"nothing": 1}), ["`state` of the rule"]),
}
CASES = [
    *((m, case, *BAD[case]) for m in ("CAGradClip", "own state") for case in BAD),
    *((m, case, *OF_CAGRAD[case]) for m in ("CAGradClip", "CAGrad") for case in OF_CAGRAD),
    *((m, case, *OF_A_RULE[case]) for m in ("own state", "attributes") for case in OF_A_RULE),
    ("own state", "calls", lambda s: own(s, rule={"function": {"calls": -1}}), ["counted from 0"]),
    ("CAGradClip", "c of one", lambda s: own(s, c=1.0), ["`c`", "1.0"]),
]


@pytest.mark.parametrize(
    ("method", "spoil", "fragments"),
    [(method, *rest) for method, _, *rest in CASES],
    ids=[f"{method}-{case}" for method, case, *_ in CASES],
)
def test_a_state_that_does_not_fit_changes_nothing(method, spoil, fragments):
    """In the middle of a step that is accumulated, where the method allows that."""
    model, opt = trained(method)
    _, other = trained(method, steps=4, seed=1)
    twin, twin_opt = copy.deepcopy((model, opt))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()  # a copied parameter has none
    state = copy.deepcopy(other.state_dict())
    pending = method in ("own state", "attributes")
    if pending:
        opt.backward(losses(model, 7), accumulate=True)
    before, report = everything(model, opt), bits(list(vars(opt.report).values()))
    bad = spoil(state)
    found = bits(bad)
    with pytest.raises(ValueError) as caught:
        opt.load_state_dict(bad)
    assert [x for x in fragments if x not in str(caught.value)] == []
    assert everything(model, opt) == before
    assert bits(list(vars(opt.report).values())) == report
    assert bits(bad) == found

    # Accumulated gradients and the kept Gram matrix cannot be seen, but they have an effect.
    if pending:
        twin_opt.backward(losses(twin, 7), accumulate=True)
    for each, each_opt in ((model, opt), (twin, twin_opt)):
        each_opt.backward(losses(each, 8))
        each_opt.step()
    assert everything(model, opt) == everything(twin, twin_opt)

    opt.load_state_dict(state)
    assert bits(opt.state_dict()) == bits(other.state_dict())


def test_a_state_of_another_method():
    """MGDA has no radius."""
    with pytest.raises(ValueError, match=r"must come from a CAGradClip.*lacks \['c'\]"):
        trained("CAGradClip")[1].load_state_dict(trained("MGDA")[1].state_dict())


class Fussy(torch.optim.SGD):
    """Fails after it has loaded."""

    def load_state_dict(self, state_dict):
        if state_dict["param_groups"][0]["lr"] > 1:
            raise RuntimeError("too fast")
        super().load_state_dict(state_dict)


def test_an_inner_optimizer_that_fails_keeps_its_error_and_nothing_of_ours_changes():
    model = network()
    opt = CAGradClip(Fussy(model.parameters(), lr=0.1), WEIGHTS, c=0.5)
    state = opt.state_dict()
    state["param_groups"][0]["lr"] = 5.0
    opt.weights, opt.c = dict(zip(NAMES, (0.1, 0.1, 0.8), strict=True)), 0.25
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match="too fast"):
        opt.load_state_dict(state)
    assert everything(model, opt) == before


@pytest.mark.parametrize("state", [None, 3, "state", [("state", {})]], ids=repr)
def test_a_state_that_is_no_mapping(state):
    model, opt = trained("CAGradClip")
    before = everything(model, opt)
    with pytest.raises((TypeError, ValueError), match="`state_dict` must be a mapping"):
        opt.load_state_dict(state)
    assert everything(model, opt) == before


# --- By name -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (1, 2, 0)], ids=str)
# The state of "attributes" is that of positions, which only the rule itself could reorder.
@pytest.mark.parametrize("method", sorted(MAKE.keys() - {"attributes"}))
def test_losses_are_matched_by_name_whatever_their_order(method, order):
    """A run resumed with the losses in another order goes on as the one that was not stopped."""
    model, opt = trained(method)
    names = [NAMES[i] for i in order]
    other = network()
    inner = torch.optim.AdamW(other.parameters(), lr=0.05, amsgrad=True)
    weights = dict.fromkeys(names, 1 / 3)  # other weights in another order
    if isinstance(opt, CAGradClip | CAGrad | MGDA | LinearScalarization):
        resumed = type(opt)(inner, weights, gram_every=3)
    else:
        resumed = type(opt)(inner, Counting(), weights=weights)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert dict(resumed.weights) == WEIGHTS
    assert list(resumed.weights) == names
    for k in range(2, 6):
        for each, each_opt in ((model, opt), (other, resumed)):
            each_opt.zero_grad()
            each_opt.backward(losses(each, k))
            each_opt.step()
        assert opt.report.gram_age == resumed.report.gram_age
        alphas = [
            dict(zip(x.report.names, x.report.coefficients.tolist(), strict=True))
            for x in (opt, resumed)
        ]
        assert alphas[1] == pytest.approx(alphas[0], rel=1e-9)
    used = 0 if method == "own state" else 2
    assert opt.report.gram_age == used, "the kept Gram matrix was in use"
    found, expected = (nn.utils.parameters_to_vector(x.parameters()) for x in (other, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_kept_gram_matrix_with_absent_losses_is_matched_by_name():
    x = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

    def optimizer(names):
        weights = dict.fromkeys(names, 1 / 3)
        return CAGradClip(torch.optim.SGD([x], lr=0.1), weights, c=0.5, gram_every=2)

    opt, other, late = optimizer("abc"), optimizer("cba"), optimizer("cba")
    opt.backward({"a": x[0] * 3, "b": None, "c": x[2] * 5})
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    other.backward({"a": x[0] * 3, "b": None, "c": x[2] * 5})
    assert other.report.gram_age == 1
    assert other.report.gram.diagonal().tolist() == [25, 0, 9]
    assert other.report.absent == ("b",)
    late.load_state_dict(copy.deepcopy(opt.state_dict()))
    late.backward({"a": x[0] * 3, "b": x[1], "c": None})
    assert late.report.gram_age == 0, "other losses are absent"
