"""How long does one solution of the subproblem take, beside TorchJD's CAGrad, and how exact is it?

    python -m benchmarks.solver_speed

All candidates see the same Gram matrices in one process on one thread, in turn. Every call is the
public one, from a Gram tensor to a tensor, with its checks. It is timed twice: in bursts of 5 ms,
as a loop over nothing else would see it, and "cold", as one call between those of the others, which
is nearer to one call per training step.

TorchJD returns the coefficients of the gradients and not p, so `coefficients` (ours, from the same
Gram to the same coefficients) is its like-for-like counterpart; `exact`, `pgd` and `slsqp` stop at
p. TorchJD has uniform weights only, so those are used. An error is
(Phi(p) - best known Phi) / (|g0| max_i |g_i|), in 60 digits.
"""

from __future__ import annotations

import collections
import gc
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

# Before torch and numpy read them: threads cost more than they bring at this size.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from torchjd.aggregation import CAGradWeighting
from tqdm import tqdm

from benchmarks.harness import (
    Parser,
    environment,
    interleaved,
    markdown_table,
    refusals_of,
    spread,
    write_results,
)
from raco_optim import SubproblemSolution, mixing_coefficients, solve_subproblem
from tests import samplers
from tests.oracles import phi

C, SEED = 0.4, 0
SIZES = (2, 3, 10, 40)
BURST = 0.005  # seconds
# At least so many times faster than TorchJD, in a loop and as one call among others.
TARGETS = {
    "in_a_loop": {2: 100, 3: 40, 10: 20, 40: 8},
    "one_call": {2: 40, 3: 18, 10: 14, 40: 8},
}
COMPETITOR = "torchjd"


def random(rng: np.random.Generator, m: int) -> np.ndarray:
    """Gaussian gradients in 2 m dimensions with at least one conflicting pair."""
    while True:
        gradients = rng.standard_normal((m, 2 * m))
        gram = gradients @ gradients.T
        if gram.min() < 0:
            return gram


FAMILIES = {"random": random, "all_conflicting": lambda rng, m: samplers.conflicting(rng, m).gram}


def candidates(gram: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Returns one call per candidate."""
    m = len(gram)
    weights = [1 / m] * m
    solve = partial(solve_subproblem, gram, weights, C)
    return {
        "exact": solve,
        "coefficients": partial(mixing_coefficients, gram, weights, C, clip="none"),
        "pgd": partial(solve, solver="pgd"),
        "slsqp": partial(solve, solver="slsqp"),
        COMPETITOR: partial(CAGradWeighting(C), gram),
    }


def solution(result: SubproblemSolution | torch.Tensor, m: int) -> np.ndarray:
    """Returns the p behind the result of a candidate."""
    if not isinstance(result, torch.Tensor):
        return result.p.numpy()
    # alpha = w + (a positive number) p, and p sums to 1.
    p = (result.numpy() - 1 / m).clip(0)
    return p / p.sum() if p.sum() > 0 else np.full(m, 1 / m)


def measure(family: str, m: int, problems: int, rounds: int) -> dict[str, Any]:
    """Times and checks every candidate on the same Gram matrices."""
    rng = np.random.default_rng([SEED, m])
    warm: dict[str, list[float]] = collections.defaultdict(list)
    cold: dict[str, list[float]] = collections.defaultdict(list)
    errors: dict[str, list[float]] = collections.defaultdict(list)
    supports = []
    for _ in tqdm(range(problems), desc=f"{family}, m = {m}", leave=False):
        gram = FAMILIES[family](rng, m)
        weights = np.full(m, 1 / m)
        calls = candidates(torch.from_numpy(gram))
        points = {name: solution(call(), m) for name, call in calls.items()}
        values = {name: phi(gram, weights, C, p) for name, p in points.items()}
        scale = np.sqrt(weights @ gram @ weights * gram.diagonal().max())
        for name, value in values.items():
            errors[name].append((value - min(values.values())) / scale)
        supports.append(int((points["exact"] > 0).sum()))
        for timed, burst in ((warm, BURST), (cold, 0.0)):
            for name, seconds in interleaved(calls, repeats=rounds, burst=burst).items():
                timed[name] += [1e6 * t for t in seconds]

    def faster(timed: dict[str, list[float]], name: str) -> float:
        return float(np.median(timed[COMPETITOR]) / np.median(timed[name]))

    factors = {"in_a_loop": faster(warm, "exact"), "one_call": faster(cold, "exact")}
    return {
        "family": family,
        "met": {name: factor >= TARGETS[name][m] for name, factor in factors.items()},
        "m": m,
        "problems": problems,
        "rounds": rounds,
        "mean_support": float(np.mean(supports)),
        "candidates": {
            name: {
                "microseconds": spread(warm[name]),
                "times_faster_than_torchjd": faster(warm, name),
                "microseconds_cold": spread(cold[name]),
                "times_faster_than_torchjd_cold": faster(cold, name),
                "median_error": float(np.median(errors[name])),
                "largest_error": float(np.max(errors[name])),
            }
            for name in warm
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Renders the results as a markdown table."""
    lines = []
    for row in rows:
        target = " / ".join(str(sizes[row["m"]]) for sizes in TARGETS.values())
        for name, found in row["candidates"].items():
            us, cold = found["microseconds"], found["microseconds_cold"]
            lines.append(
                [
                    f"{row['family']}, m = {row['m']}, {name}",
                    f"{us['median']:,.0f}",
                    f"{us['lower_quartile']:,.0f} to {us['upper_quartile']:,.0f}",
                    f"{found['times_faster_than_torchjd']:.1f}",
                    f"{cold['median']:,.0f}",
                    f"{found['times_faster_than_torchjd_cold']:.1f}",
                    target if name == "exact" else "",
                    f"{found['largest_error']:.0e}",
                ]
            )
    head = ["", "us", "quartiles", "x faster", "us, cold", "x faster, cold", "targets", "error"]
    return markdown_table(head, lines)


@refusals_of("solver_speed")
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all families and sizes, writes the JSON and prints the table."""
    parser = Parser(prog="python -m benchmarks.solver_speed")
    parser.add_argument("--quick", action="store_true", help="few matrices, to try the program")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    gc.freeze()  # what was imported makes every collection between timings take 0.2 s
    size = (1, 2) if options.quick else (10, 3)
    rows = [measure(family, m, *size) for family in FAMILIES for m in SIZES]
    packages = ("torchjd", "cvxpy", "clarabel")
    results = {
        "question": __doc__.splitlines()[0],
        "environment": environment(seed=SEED, packages=packages),
        "c": C,
        "weights": "uniform",
        "targets_times_faster": TARGETS,
        "rows": rows,
    }
    print(table(rows))
    if not options.quick:
        print(f"Written to {write_results('solver_speed', results)}.")


if __name__ == "__main__":
    main()
