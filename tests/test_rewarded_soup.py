"""Rewarded soups: the average of models, bad input."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from raco_optim.alignment import rewarded_soup
from tests.preference_pairs import refused


def network(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))
    model[1].running_mean.normal_()
    return model.to(dtype)


def states(n=3, dtype=torch.float32):
    return {f"model {i}": network(i, dtype).state_dict() for i in range(n)}


WEIGHTS = {"model 0": 0.5, "model 1": 0.3, "model 2": 0.2}


def test_soup_by_its_definition():
    soup = rewarded_soup(states(), WEIGHTS)
    assert list(soup) == list(states()["model 0"])
    for key, value in soup.items():
        parts = [w * states()[name][key].numpy().astype(np.float64) for name, w in WEIGHTS.items()]
        if value.is_floating_point():
            np.testing.assert_array_equal(value.numpy(), sum(parts).astype(np.float32))
        else:
            assert torch.equal(value, states()["model 0"][key])


def test_soup_of_linear_models_predicts_the_average_of_their_predictions():
    models = {name: nn.Linear(5, 3, dtype=torch.float64) for name in ("a", "b")}
    weights = {"b": 0.25, "a": 0.75}
    soup = nn.Linear(5, 3, dtype=torch.float64)
    soup.load_state_dict(
        rewarded_soup({name: m.state_dict() for name, m in models.items()}, weights)
    )
    x = torch.randn(7, 5, dtype=torch.float64)
    expected = sum(weights[name] * model(x) for name, model in models.items())
    torch.testing.assert_close(soup(x), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_soup_of_one_model_is_that_model(dtype):
    given = states(3, dtype)
    given["model 1"]["0.weight"].fill_(torch.nan)  # a weight of 0 leaves it out
    for weights in (
        {"model 0": 0.0, "model 1": 0.0, "model 2": 1.0},
        {"model 2": 1.0, "model 1": 0.0, "model 0": 0.0},
    ):
        soup = rewarded_soup(given, weights)
        assert all(torch.equal(soup[key], x) for key, x in given["model 2"].items())
        assert {x.dtype for x in soup.values()} == {dtype, torch.int64}


def test_soup_of_equal_models_is_that_model():
    """Whatever the weights, thirds among them: float64 keeps the digits until one rounding."""
    one = network(0).state_dict()
    for n in (2, 3, 7):
        names = [str(i) for i in range(n)]
        soup = rewarded_soup(dict.fromkeys(names, one), dict.fromkeys(names, 1 / n))
        assert all(torch.equal(soup[key], x) for key, x in one.items())


def test_half_precision_is_rounded_once():
    """In bfloat16 itself 1 + 2^-8 is 1, and the sum of the products would be rounded each time."""
    given = {
        "a": {"x": torch.tensor([1.0, 256.0], dtype=torch.bfloat16)},
        "b": {"x": torch.tensor([1.0078125, 258.0], dtype=torch.bfloat16)},
    }
    [soup] = rewarded_soup(given, {"a": 0.1, "b": 0.9}).values()
    exact = torch.tensor([0.1 + 0.9 * 1.0078125, 25.6 + 0.9 * 258.0], dtype=torch.float64)
    assert torch.equal(soup, exact.to(torch.bfloat16))


def test_soup_shares_no_memory_and_no_graph_and_changes_nothing():
    given = {name: network(i).state_dict(keep_vars=True) for i, name in enumerate("ab")}
    before = copy.deepcopy(given)
    soup = rewarded_soup(given, {"a": 1.0, "b": 0.0})
    for x in soup.values():
        assert not x.requires_grad
        x.fill_(7)
    for name, state in given.items():
        assert all(torch.equal(x, before[name][key]) for key, x in state.items())


def test_averaging_lora_factors_is_not_averaging_lora_models():
    """(sum w B)(sum w A) contains products of different models; merging first does not."""
    w_a, w_b = 0.6, 0.4
    (a, b), weights = torch.randn(2, 2, 6, 6, dtype=torch.float64), {"a": w_a, "b": w_b}
    factors = rewarded_soup({"a": {"A": a[0], "B": a[1]}, "b": {"A": b[0], "B": b[1]}}, weights)
    merged = rewarded_soup({"a": {"W": a[1] @ a[0]}, "b": {"W": b[1] @ b[0]}}, weights)["W"]
    average = w_a * a[1] @ a[0] + w_b * b[1] @ b[0]
    torch.testing.assert_close(merged, average, rtol=1e-13, atol=1e-14)
    error = factors["B"] @ factors["A"] - average
    expected = -w_a * w_b * (a[1] - b[1]) @ (a[0] - b[0])  # by expansion
    torch.testing.assert_close(error, expected, rtol=1e-12, atol=1e-13)
    assert error.norm() > 0.2 * average.norm()


def altered(key, change):
    given = states(2)
    given["model 1"] = dict(given["model 1"])
    change(given["model 1"], key)
    return given


HALVES = {"model 0": 0.5, "model 1": 0.5}


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        (altered("0.bias", dict.pop), ["equal keys", "'0.bias'", "architecture"]),
        (
            altered("new", lambda d, k: d.update({k: torch.ones(1)})),
            ["equal keys", "'new'", "'model 0' and 'model 1'"],
        ),
        (
            altered("0.bias", lambda d, k: d.update({k: torch.ones(5)})),
            ["shapes", "[6]", "[5]", "'0.bias'"],
        ),
        (
            altered("0.bias", lambda d, k: d.update({k: d[k].half()})),
            ["dtypes", "torch.float32", "torch.float16", "'0.bias'"],
        ),
        (
            altered("1.num_batches_tracked", lambda d, k: d.update({k: d[k] + 1})),
            ["'1.num_batches_tracked'", "torch.int64"],
        ),
        (
            {f"model {i}": {"q.lora_A.weight": torch.ones(2)} for i in range(2)},
            ["merged models", "'q.lora_A.weight'", "merge_and_unload"],
        ),
    ],
    ids=["missing key", "extra key", "shape", "dtype", "integers", "factors"],
)
def test_models_that_do_not_match(given, fragments):
    refused(["`state_dicts`", *fragments], rewarded_soup, given, HALVES)


@pytest.mark.parametrize(
    ("weights", "fragments"),
    [
        ({"model 0": 0.5, "model 1": 0.6}, ["sum to 1", "1.1"]),
        ({"model 0": 1.5, "model 1": -0.5}, ["non-negative"]),
        ({"model 0": 1.0}, ["the names of `state_dicts`", "['model 0', 'model 1']"]),
        ({"model 0": 0.5, "model 2": 0.5}, ["'model 1'", "'model 2'"]),
        ({}, ["at least one"]),
    ],
    ids=str,
)
def test_bad_weights(weights, fragments):
    refused(["`weights`", *fragments], rewarded_soup, states(2), weights)


def test_lists_are_refused():
    given, wrong = states(2), {"exception": TypeError}
    refused(["`weights` must be a mapping", "list"], rewarded_soup, given, [0.5, 0.5], **wrong)
    models = list(given.values())
    refused(["`state_dicts` must be a mapping", "list"], rewarded_soup, models, HALVES, **wrong)
