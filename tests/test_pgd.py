"""The projected-gradient solver: batches and devices; `test_simplex` tests its solutions."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from raco_optim import solve_subproblem
from raco_optim.rules import CAGradRule
from raco_optim.subproblem.projected_gradient import projected_gradient
from tests.oracles import certificate, excess_gap, phi
from tests.samplers import SAMPLERS, problem

KINDS = sorted(SAMPLERS)
ORDINARY = ("random", "conflicting", "aligned", "vertex", "interior")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pgd(gram, weights, c):
    return solve_subproblem(gram, weights, c, solver="pgd")


def batch(m: int, size: int = 2) -> torch.Tensor:
    """Gram matrices of all kinds."""
    grams = [problem(kind, m, seed).gram for seed in range(size) for kind in KINDS]
    return torch.from_numpy(np.stack(grams))


def even(m: int) -> list[float]:
    return [1 / m] * m


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_a_batch_is_solved_one_by_one(m):
    grams = batch(m)
    together = pgd(grams, even(m), 0.4)
    assert together.p.shape == (len(grams), m)
    assert together.value.shape == together.gap.shape == (len(grams),)
    assert float(together.gap.max()) <= 1e-9
    for gram, value in zip(grams, together.value, strict=True):
        alone = pgd(gram, even(m), 0.4)
        # A batched product may sum in another order, which p forgives where it is unique.
        assert float(alone.gap) <= 1e-9
        assert float(value - alone.value) == pytest.approx(0, abs=1e-8 * float(gram.max()))


def test_a_batch_may_have_any_shape():
    grams = batch(3)[:12]
    solution, flat = (pgd(x, [0.2, 0.3, 0.5], 0.4) for x in (grams.view(2, 3, 2, 3, 3), grams))
    assert solution.p.shape == (2, 3, 2, 3)
    assert solution.value.shape == solution.gap.shape == (2, 3, 2)
    assert torch.equal(solution.p.reshape(12, 3), flat.p)
    empty = pgd(torch.zeros(0, 3, 3), [0.2, 0.3, 0.5], 0.4)
    assert empty.p.shape == (0, 3)
    assert empty.gap.shape == (0,)
    for solver in ("exact", "slsqp"):
        with pytest.raises(ValueError, match=r"`gram` must have shape \[m, m\]"):
            solve_subproblem(torch.zeros(2, 3, 3), [0.2, 0.3, 0.5], 0.4, solver=solver)


def test_one_bad_matrix_leaves_the_others_alone():
    """The values are not checked, because that would wait for the device."""
    grams = batch(3)[:4].clone()
    clean = pgd(grams, [0.2, 0.3, 0.5], 0.4)
    grams[1, 0, 0] = float("nan")
    spoilt = pgd(grams, [0.2, 0.3, 0.5], 0.4)
    others = [0, 2, 3]
    assert torch.equal(spoilt.p[others], clean.p[others])
    assert not spoilt.gap[1] <= 1e-9  # NaN has no certificate


@given(st.sampled_from(KINDS), st.integers(1, 8), st.integers(0, 2**32))
def test_any_problem(kind, m, seed):
    case = problem(kind, m, seed)
    solution = pgd(torch.from_numpy(case.gram), case.weights, case.c)
    p = solution.p.numpy()
    assert (p >= 0).all()
    assert p.sum() == pytest.approx(1, abs=1e-14)
    assert float(solution.gap) <= 1e-9
    rounding = max(case.rounding, 2.0**-52)
    assert excess_gap(case.gram, case.weights, case.c, p, rounding=rounding) <= 1e-9


@pytest.mark.parametrize("m", [10, 20, 64])
def test_many_losses(m):
    for kind in ORDINARY:
        grams = torch.from_numpy(np.stack([problem(kind, m, seed).gram for seed in range(2)]))
        solution = pgd(grams, even(m), 0.4)
        assert float(solution.gap.max()) <= 1e-9
        for gram, p in zip(grams, solution.p, strict=True):
            exact = solve_subproblem(gram, even(m), 0.4)
            np.testing.assert_allclose(p, exact.p, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_device_and_type_of_the_result(device, dtype):
    gram = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=dtype, device=device, requires_grad=True)
    solution = pgd(gram, [0.5, 0.5], 0.4)
    for tensor in (solution.p, solution.value, solution.gap):
        assert tensor.device.type == device
        assert tensor.dtype == torch.float64
        assert not tensor.requires_grad


class Syncs(torch.overrides.TorchFunctionMode):
    """Fails on operations that wait for an accelerator: numbers and control flow from tensors."""

    WAITING = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"}
    WAITING |= {"nonzero", "equal", "allclose", "unique", "masked_select"}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        waits = name in self.WAITING or (name == "to" and "cpu" in map(str, args))
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            waits = any(getattr(part, "dtype", None) == torch.bool for part in index)
        assert not waits, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    grams = batch(4)
    w = torch.tensor(even(4), dtype=torch.float64)
    for c in (0.0, 0.4, 1.5):
        with Syncs():  # here a CPU plays the device
            projected_gradient(grams[0], w, c)
        on_device = grams[0].to("meta")  # which raises where a value is needed
        assert pgd(on_device, even(4), c).p.is_meta
        assert CAGradRule(c, solver="pgd", below_one=False)(on_device, even(4)).coefficients.is_meta
    assert pgd(grams.to("meta"), even(4), 0.4).p.shape == (len(grams), 4)
    for solver in ("exact", "slsqp"):
        with pytest.raises((RuntimeError, NotImplementedError)):
            solve_subproblem(on_device, even(4), 0.4, solver=solver)


class Count(TorchDispatchMode):
    """Counts the operations that reach the dispatcher."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("m", [1, 2, 3, 10])
def test_few_hundred_operations_for_few_losses(m):
    for grams in (batch(m)[0], batch(m)):
        with Count() as count:
            projected_gradient(grams, torch.tensor(even(m), dtype=torch.float64), 0.4)
        assert count.number <= 400


@pytest.mark.parametrize("m", [3, 10, 40])
def test_ordinary_problems_are_certified_without_the_host(m):
    for kind, seed in itertools.product(ORDINARY, range(2)):
        H, w, c = (case := problem(kind, m, seed)).gram, case.weights, case.c
        p, _, gap = projected_gradient(*map(torch.from_numpy, (H, w)), c)
        assert float(gap) <= 1e-9
        assert certificate(H, w, c, p.numpy()) <= 1e-9


@given(st.sampled_from(KINDS), st.integers(1, 20), st.integers(0, 2**32))
def test_the_certificate_is_never_false(kind, m, seed):
    """On a device a degenerate Gram may have a larger gap: p is no farther off than it says."""
    H, w, c = (case := problem(kind, m, seed)).gram, case.weights, case.c
    p, _, gap = projected_gradient(*map(torch.from_numpy, (H, w)), c)
    rounding = max(case.rounding, 2.0**-52)
    if excess_gap(H, w, c, p.numpy(), rounding=rounding) <= 1e-9:
        return
    found, best = (phi(H, w, c, x) for x in (p.numpy(), solve_subproblem(H, w, c).p.numpy()))
    assert (found - best) / np.sqrt(w @ H @ w * H.diagonal().max()) <= float(gap) + 1e-9


@pytest.mark.parametrize(
    "look",
    [
        lambda gram: solve_subproblem(gram, even(4), 0.4),
        lambda gram: gram[0, 0].item(),
        lambda gram: bool(gram.sum() > 0),
        lambda gram: gram[gram > 0],
        lambda gram: gram.nonzero(),
        lambda gram: gram.to("cpu"),
    ],
)
def test_operations_that_wait_are_seen(look):
    """The control of the tests around it: the exact solver, and others that look at values."""
    with Syncs(), pytest.raises(AssertionError, match="waits for the device"):
        look(batch(4)[0])
