"""Does a solver ever fail? Random Gram matrices of every kind, checked from outside.

    python -m benchmarks.fuzz_subproblem                            # all of it, several minutes
    python -m benchmarks.fuzz_subproblem --only kink:7:12345        # one problem, kind:m:seed

Every solution is checked without the library, by `tests.oracles`:

* finite and on the simplex;
* certified by us: Phi(p) exceeds its minimum by no more than 1e-9 |g0| max_i |g_i|, beside what
  the rounding of H leaves open (`resolution`, which matters only next to G_p = 0 and g0 = 0). How
  often that was needed is counted as `within_resolution`;
* with a certificate that is not false: where the library's own gap is above 1e-9, that is counted
  as `unproved`, and p may be as far off as it says, but no farther;
* on a share: the same bits when the gradients are scaled by a power of two, H by 1e-16 to 1e16,
  the same solution when H is scaled by any other factor, and when the losses are permuted;
* on a share: the exact solution where m <= 4, and on exact Grams of any size the optimality
  conditions of "closest to w among the minimisers";
* on a smaller share, the solvers `pgd` and `slsqp`: feasible, certified by themselves and by us.
"""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.harness import (
    Parser,
    UsageError,
    environment,
    markdown_table,
    refusals_of,
    write_results,
)
from raco_optim import solve_subproblem
from tests.oracles import EPS, certificate, distance_to_closest, exact_minimum, excess_gap
from tests.samplers import SAMPLERS, Problem, problem

Solver = Literal["exact", "pgd", "slsqp"]

COUNT, SEED = 108_000, 0
DEEP_EVERY, OTHERS_EVERY = 10, 100  # shares of the symmetry checks, and of the other solvers
GAP = 1e-9
SAME = 1e-6  # two p that should be equal, where p is well determined
WELL_CONDITIONED = {"random", "conflicting", "aligned", "vertex", "interior"}
# How many losses, and how often of 64: mostly few, as in practice.
SIZES = {1: 1, 2: 16, 3: 14, 4: 8, 5: 6, 6: 4, 8: 4, 10: 3, 13: 2, 20: 2, 32: 2, 47: 1, 64: 1}
KINDS = sorted(SAMPLERS)


def cases(count: int, seed: int) -> Iterator[tuple[str, int, int]]:
    """Yields `count` names of problems, the kinds in turn."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice(list(SIZES), size=count, p=np.array(list(SIZES.values())) / 64)
    for i in range(count):
        yield KINDS[i % len(KINDS)], int(sizes[i]), seed * 1_000_000_007 + i


def solve(
    gram: np.ndarray, weights: np.ndarray, c: float, solver: Solver = "exact"
) -> tuple[np.ndarray, float]:
    """Solves with the library; returns p and its own gap."""
    solution = solve_subproblem(torch.from_numpy(gram), weights, c, solver=solver)
    return solution.p.numpy(), float(solution.gap)


def check(
    kind: str, m: int, seed: int, *, deep: bool = False, solver: Solver = "exact"
) -> tuple[list[str], dict[str, float]]:
    """Returns which checks fail, and the gaps; `deep` checks symmetries and exact solution too."""
    case = problem(kind, m, seed)
    try:
        p, own = solve(case.gram, case.weights, case.c, solver)
    except Exception as error:  # whatever it is, it is a failure with a seed
        return [f"raised {type(error).__name__}"], {}
    if not (np.isfinite(p).all() and np.isfinite(own)):
        return ["not finite"], {}
    failures = []
    if (p < 0).any() or abs(p.sum() - 1) > 1e-14 * m:
        failures.append("off the simplex")
    figures = {"own_gap": own, "unproved": int(own > GAP)}
    H, w, c = case.gram, case.weights, case.c
    strict = certificate(H, w, c, p)
    if strict > GAP:
        figures["within_resolution"] = 1
        # The exact solver has to be right whatever it can prove of it.
        allowed = GAP if solver == "exact" else max(GAP, own)
        if excess_gap(H, w, c, p, rounding=max(case.rounding, EPS)) > allowed:
            failures.append("gap")
    else:
        figures["strict_gap"] = strict
    if deep:
        failures += _deep_failures(case, p, kind, seed)
    return failures, figures


def _deep_failures(case: Problem, p: np.ndarray, kind: str, seed: int) -> list[str]:
    H, w, c = case.gram, case.weights, case.c
    m, rng = len(w), np.random.default_rng(seed)
    determined = kind in WELL_CONDITIONED or case.rounding == 0
    failures = []

    doubled, _ = solve(H * 4.0 ** int(rng.integers(-26, 27)), w, c)
    if not np.array_equal(doubled, p):
        failures.append("scaling by a power of two")

    def same(other: np.ndarray) -> bool:
        if determined:
            return float(np.abs(other - p).max()) <= SAME
        return excess_gap(H, w, c, other, rounding=max(case.rounding, EPS)) <= GAP

    # Only a power of two keeps what is exact in an exact Gram.
    if case.rounding and not same(solve(H * 10.0 ** rng.uniform(-16, 16), w, c)[0]):
        failures.append("scaling")
    order = rng.permutation(m)
    permuted, _ = solve(H[np.ix_(order, order)], w[order], c)
    if not same(permuted[np.argsort(order)]):
        failures.append("permutation")
    if determined and m <= 4 and np.abs(exact_minimum(H, w, c).p - p).max() > SAME:
        failures.append("not the exact solution")
    if case.rounding == 0 and distance_to_closest(H, w, c, p) > SAME:
        failures.append("not the minimiser closest to w")
    return failures


class Tally:
    """Counts the failures and the largest gaps by kind."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {
            kind: {"grams": 0, "failures": 0, "within_resolution": 0, "unproved": 0}
            | {"largest_strict_gap": 0.0, "largest_own_gap": 0.0, "failed_checks": {}, "failed": []}
            for kind in KINDS
        }

    def add(self, name: tuple[str, int, int], failures: list[str], figures: dict) -> None:
        """Counts one problem, and keeps the names of the first that fail."""
        row = self.rows[name[0]]
        row["grams"] += 1
        row["failures"] += bool(failures)
        for count in ("within_resolution", "unproved"):
            row[count] += int(figures.get(count, 0))
        for gap in ("strict_gap", "own_gap"):
            row[f"largest_{gap}"] = max(row[f"largest_{gap}"], figures.get(gap, 0.0))
        for failure in failures:
            row["failed_checks"][failure] = row["failed_checks"].get(failure, 0) + 1
        if failures and len(row["failed"]) < 20:
            row["failed"].append(":".join(map(str, name)))

    def summary(self) -> dict[str, Any]:
        """Returns the totals and the counts by kind."""
        totals = {
            name: sum(row[name] for row in self.rows.values())
            for name in ("grams", "failures", "unproved")
        }
        return {**totals, "kinds": self.rows}


def table(kinds: dict[str, dict[str, Any]]) -> str:
    """Renders the counts of a solver as a markdown table."""
    counts = ("grams", "failures", "unproved", "within_resolution")
    gaps = ("largest_strict_gap", "largest_own_gap")
    lines = [
        [kind, *(f"{row[x]}" for x in counts), *(f"{row[x]:.0e}" for x in gaps)]
        for kind, row in kinds.items()
    ]
    return markdown_table(["kind", *counts, *gaps], lines)


def named(text: str) -> tuple[str, int, int]:
    """Kind, number of losses and seed of a problem, from a list of failures."""
    found = re.fullmatch(rf"({'|'.join(KINDS)}):([1-9]\d*):(\d+)", text)
    if found is None:
        raise UsageError(
            f"`--only` must be KIND:M:SEED, of the kinds {', '.join(KINDS)}; got {text!r}."
        )
    return found[1], int(found[2]), int(found[3])


@refusals_of("fuzz_subproblem")
def main(arguments: Sequence[str] | None = None) -> None:
    """Checks all problems, writes the JSON and prints what failed."""
    parser = Parser(prog="python -m benchmarks.fuzz_subproblem")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--quick", action="store_true", help="216 Gram matrices, not written")
    either.add_argument("--only", metavar="KIND:M:SEED", help="one problem, of a list of failures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.only:
        name = named(options.only)
        print(problem(*name))
        for solver in get_args(Solver):
            print(solver, *check(*name, deep=solver == "exact", solver=solver))
        return

    tallies = {solver: Tally() for solver in get_args(Solver)}
    sizes: collections.Counter[int] = collections.Counter()
    started, deep_checks = time.perf_counter(), 0
    count = 216 if options.quick else COUNT
    for i, name in enumerate(tqdm(cases(count, SEED), total=count, smoothing=0)):
        round_ = i // len(KINDS)  # every kind in turn gets the rarer checks
        deep = round_ % DEEP_EVERY == 0
        deep_checks += deep
        sizes[name[1]] += 1
        tallies["exact"].add(name, *check(*name, deep=deep))
        if round_ % OTHERS_EVERY == 0:
            for solver in ("pgd", "slsqp"):
                tallies[solver].add(name, *check(*name, solver=solver))
    results = {
        "question": __doc__.splitlines()[0],
        "environment": environment(seed=SEED, packages=("mpmath",)),
        "seconds": round(time.perf_counter() - started, 1),
        "required_gap": GAP,
        "deep_checks": deep_checks,
        "grams_by_losses": dict(sorted(sizes.items())),
        "solvers": {solver: tally.summary() for solver, tally in tallies.items()},
    }
    for solver, found in results["solvers"].items():
        failed = {k: row["failed_checks"] for k, row in found["kinds"].items() if row["failures"]}
        print(f"{solver}: {found['failures']} failures {failed or ''}\n{table(found['kinds'])}")
    if not options.quick:
        print(f"Written to {write_results('fuzz_subproblem', results)}.")


if __name__ == "__main__":
    main()
