"""The projected-gradient solver: what it adds to the contract that `test_simplex` holds it to."""

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
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pgd(gram, weights, c):
    return solve_subproblem(gram, weights, c, solver="pgd")


def batch(m: int, size: int = 2) -> torch.Tensor:
    """Gram matrices of all kinds."""
    grams = [problem(kind, m, seed).gram for seed in range(size) for kind in KINDS]
    return torch.from_numpy(np.stack(grams))


def even(m: int) -> list[float]:
    return [1 / m] * m


# --- Batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_a_batch_is_solved_one_by_one(m):
    grams = batch(m)
    together = pgd(grams, even(m), 0.4)
    assert together.p.shape == (len(grams), m)
    assert together.value.shape == together.gap.shape == (len(grams),)
    assert float(together.gap.max()) <= 1e-9
    for i, gram in enumerate(grams):
        alone = pgd(gram, even(m), 0.4)
        # A batched product may sum in another order, which p forgives where it is unique.
        assert float(alone.gap) <= 1e-9
        assert float(together.value[i]) == pytest.approx(
            float(alone.value), abs=1e-8 * float(gram.diagonal().max())
        )


def test_a_batch_may_have_any_shape():
    grams = batch(3)[:12].reshape(2, 3, 2, 3, 3)
    solution = pgd(grams, [0.2, 0.3, 0.5], 0.4)
    assert solution.p.shape == (2, 3, 2, 3)
    assert solution.value.shape == solution.gap.shape == (2, 3, 2)
    flat = pgd(grams.reshape(12, 3, 3), [0.2, 0.3, 0.5], 0.4)
    assert torch.equal(solution.p.reshape(12, 3), flat.p)


def test_an_empty_batch_is_empty():
    solution = pgd(torch.zeros(0, 3, 3), [0.2, 0.3, 0.5], 0.4)
    assert solution.p.shape == (0, 3)
    assert solution.gap.shape == (0,)


def test_one_bad_matrix_leaves_the_others_alone():
    """The values are not checked, because that would wait for the device."""
    grams = batch(3)[:4].clone()
    clean = pgd(grams, [0.2, 0.3, 0.5], 0.4)
    grams[1, 0, 0] = float("nan")
    spoilt = pgd(grams, [0.2, 0.3, 0.5], 0.4)
    others = [0, 2, 3]
    assert torch.equal(spoilt.p[others], clean.p[others])
    assert not spoilt.gap[1] <= 1e-9  # no certificate for what is no number


@pytest.mark.parametrize("solver", ["exact", "slsqp"])
def test_the_other_solvers_refuse_a_batch(solver):
    with pytest.raises(ValueError, match=r"`gram` must have shape \[m, m\]"):
        solve_subproblem(torch.zeros(2, 3, 3), [0.2, 0.3, 0.5], 0.4, solver=solver)


# --- Accuracy ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("m", [10, 20, 40, 64])
def test_many_losses(m):
    for kind in ("random", "conflicting", "aligned", "vertex", "interior"):
        grams = torch.from_numpy(np.stack([problem(kind, m, seed).gram for seed in range(4)]))
        solution = pgd(grams, even(m), 0.4)
        assert float(solution.gap.max()) <= 1e-9
        for gram, p in zip(grams, solution.p, strict=True):
            exact = solve_subproblem(gram, even(m), 0.4)
            np.testing.assert_allclose(p, exact.p, atol=1e-6)


# --- On the device of the Gram matrix ------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_device_and_type_of_the_result(device, dtype):
    gram = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=dtype, device=device)
    solution = pgd(gram, [0.5, 0.5], 0.4)
    for tensor in (solution.p, solution.value, solution.gap):
        assert tensor.device.type == device
        assert tensor.dtype == torch.float64


class Syncs(torch.overrides.TorchFunctionMode):
    """Fails on what would wait for an accelerator: numbers and control flow taken from tensors."""

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
    gram = batch(4)[0]
    w = torch.tensor(even(4), dtype=torch.float64)
    for c in (0.0, 0.4, 1.5):
        with Syncs():  # here a CPU plays the device
            projected_gradient(gram, w, c)
        on_device = gram.to("meta")  # which raises where a value is needed
        assert pgd(on_device, even(4), c).p.is_meta
        assert CAGradRule(c, solver="pgd", below_one=False)(on_device, even(4)).coefficients.is_meta


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


@pytest.mark.parametrize("m", [3, 10, 20, 40])
def test_ordinary_problems_are_certified_without_the_host(m):
    for kind in ("random", "conflicting", "aligned", "vertex", "interior"):
        for seed in range(4):
            case = problem(kind, m, seed)
            p, _, gap = projected_gradient(
                *map(torch.from_numpy, (case.gram, case.weights)), case.c
            )
            assert float(gap) <= 1e-9
            assert certificate(case.gram, case.weights, case.c, p.numpy()) <= 1e-9


@given(st.sampled_from(KINDS), st.integers(1, 20), st.integers(0, 2**32))
def test_the_certificate_is_never_false(kind, m, seed):
    """On a device a degenerate Gram may have a larger gap: p is no farther off than it says."""
    case = problem(kind, m, seed)
    p, _, gap = projected_gradient(*map(torch.from_numpy, (case.gram, case.weights)), case.c)
    rounding = max(case.rounding, 2.0**-52)
    if excess_gap(case.gram, case.weights, case.c, p.numpy(), rounding=rounding) <= 1e-9:
        return
    least = solve_subproblem(case.gram, case.weights, case.c).p.numpy()
    found, best = (phi(case.gram, case.weights, case.c, x) for x in (p.numpy(), least))
    scale = np.sqrt(case.weights @ case.gram @ case.weights * case.gram.diagonal().max())
    assert (found - best) / scale <= float(gap) + 1e-9


@pytest.mark.parametrize(
    "look",
    [
        lambda gram: solve_subproblem(gram, even(4), 0.4),
        lambda gram: gram[0, 0].item(),
        lambda gram: gram.tolist(),
        lambda gram: bool(gram.sum() > 0),
        lambda gram: float(gram.sum()),
        lambda gram: int(gram.sum()),
        lambda gram: gram[gram > 0],
        lambda gram: gram.nonzero(),
        lambda gram: gram.numpy(),
        lambda gram: gram.cpu(),
        lambda gram: gram.to("cpu"),
        lambda gram: torch.equal(gram, gram),
    ],
)
def test_what_waits_is_seen(look):
    """The control of the tests around it: the exact solver, and what else looks at values."""
    with Syncs(), pytest.raises(AssertionError, match="waits for the device"):
        look(batch(4)[0])


def test_nothing_needs_data():
    """On the meta device there is none: any look at a value raises."""
    gram = torch.empty(5, 4, 4, device="meta")
    solution = pgd(gram, even(4), 0.4)
    assert solution.p.shape == (5, 4)
    assert solution.p.device.type == "meta"
    assert CAGradRule(0.4, solver="pgd")(gram[0], even(4)).coefficients.device.type == "meta"
    for solver in ("exact", "slsqp"):
        with pytest.raises((RuntimeError, NotImplementedError)):
            solve_subproblem(gram[0], even(4), 0.4, solver=solver)


def test_no_gradient_is_recorded():
    gram = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], requires_grad=True)
    assert not pgd(gram, [0.5, 0.5], 0.4).p.requires_grad
