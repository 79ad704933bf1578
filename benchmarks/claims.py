"""The claims of the paper's summary that need no language model, measured on toys and small sets.

Parts, each written to the result when it is done; what is there is not run again:

- ``speed``: steps to 1 % of the start's distance to the Pareto front, two losses, known fronts;
- ``radius``: c on the digits, one learning rate, hard, soft and no clipping;
- ``objectives``: 5, 10 and 20 losses, quadratic bowls and yes-or-no tasks on the digits;
- ``noise``: gradients with noise, quadratic bowls and batches of the digits;
- ``longer``: speed of the weighted sum with steps as long as those of CAGrad.

``python -m benchmarks.claims`` runs what is left and fills the tables of docs/claims.md; what it
says about clipping on real sets it reads from the summaries of ``benchmarks.multitask``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, UsageError, environment, make_folder, write_whole
from benchmarks.multitask import many
from benchmarks.multitask.claims_tables import fill_page
from benchmarks.multitask.toys import descend, grid, random_quadratics, steps_to
from benchmarks.multitask.training import Recipe
from benchmarks.problems import Problem, cagrad_toy, convex_quadratics, fonseca_fleming
from raco_optim import Rule
from raco_optim.rules import CAGradRule, Clip, LinearRule

SEEDS = (0, 1, 2, 3, 4)
RADII = (0.4, 0.8)
TWO = ((0.2, 0.8), (0.5, 0.5), (0.8, 0.2))
CLIPS: dict[str, Clip] = {"cagrad": "none", "raco": "hard", "soft": "soft"}
STARTS = 8
_DAMAGED = (OSError, ValueError, TypeError)  # what is no file, no JSON, or no object of it


def rules(
    radii: Sequence[float] = RADII, *, soft: bool = False
) -> Iterator[tuple[str, float, Rule]]:
    """Names, radii and rules: the weighted sum, and the others at every radius."""
    yield "linear", 0.0, LinearRule()
    for c in radii:
        for name in ("cagrad", "raco", *(["soft"] if soft else [])):
            yield name, c, CAGradRule(c, CLIPS[name])


def normal_starts(problem: Problem, spread: float) -> Tensor:
    """Random starts, the same ones at every call."""
    generator = torch.Generator().manual_seed(1)
    shape = (STARTS, problem.dimension)
    return spread * torch.randn(shape, generator=generator, dtype=torch.float64)


def cases() -> Iterator[tuple[str, Problem, Tensor, float, int, bool]]:
    """Name, problem, starts, learning rate, steps, and whether it takes Adam."""
    quadratics, wide = convex_quadratics(), random_quadratics(2, 20, 0)
    ff, toy = fonseca_fleming(), cagrad_toy()
    yield "quadratics, 2-d", quadratics, normal_starts(quadratics, 3), 0.02, 400, False
    yield "quadratics, 20-d", wide, normal_starts(wide, 2), 0.02, 400, False
    yield "Fonseca-Fleming", ff, normal_starts(ff, 0.6), 0.02, 800, False
    yield "toy of CAGrad (Adam)", toy, toy.starts, 0.05, 2500, True


def speed() -> Iterator[dict[str, Any]]:
    """Steps to the front, and how far the weighted loss still is from its minimum."""
    for name, problem, starts, lr, steps, adam in cases():
        theta, weights = grid(starts, TWO)
        for rule_name, c, rule in rules():
            found = descend(problem, theta, weights, rule, steps=steps, lr=lr, adam=adam)
            distance = torch.stack([problem.distance(row) for row in found.losses])
            yield {
                "problem": name,
                "rule": rule_name,
                "c": c,
                "units": len(starts),
                "steps": _list(steps_to(distance, 0.01 * distance[0])),
                "distance": _list(distance[-1] / distance[0]),
                "excess": _list(_excess(problem, found.losses, weights)[-1]),
                "clip_changed": _list(found.clip_changed),
            }


def longer() -> Iterator[dict[str, Any]]:
    """The weighted sum with a learning rate 1 + c times as large: as long as CAGrad's steps can be.

    Adam does not see the length of a gradient, so its problem is left out.
    """
    for name, problem, starts, lr, steps, adam in cases():
        theta, weights = grid(starts, TWO)
        for c in RADII if not adam else ():
            rate = lr * (1 + c)
            found = descend(problem, theta, weights, LinearRule(), steps=steps, lr=rate)
            distance = torch.stack([problem.distance(row) for row in found.losses])
            yield {"problem": name, "c": c, "steps": _list(steps_to(distance, 0.01 * distance[0]))}


def radius() -> Iterator[dict[str, Any]]:
    """The radius on the digits."""
    return many.radius(SEEDS, (0.2, 0.4, 0.6, 0.8, 0.95), Recipe())


def objectives() -> Iterator[dict[str, Any]]:
    """Many losses: bowls in 40 dimensions, then the digits."""
    for m in (5, 10, 20):
        heavy = [0.5, *[0.5 / (m - 1)] * (m - 1)]
        kinds = {"equal": [1 / m] * m, "half on one": heavy}
        for seed in SEEDS:
            problem = random_quadratics(m, 40, seed)
            generator = torch.Generator().manual_seed(seed)
            start = 2 * torch.randn(1, 40, generator=generator, dtype=torch.float64)
            theta, weights = grid(start, list(kinds.values()))
            for name, c, rule in rules(soft=True):
                found = descend(problem, theta, weights, rule, steps=300, lr=0.02)
                excess = _excess(problem, found.losses, weights)
                reached = steps_to(excess, torch.full((len(weights),), 0.01))
                for i, kind in enumerate(kinds):
                    yield {
                        "on": "quadratics",
                        "seed": seed,
                        "m": m,
                        "weights": kind,
                        "rule": name,
                        "c": c,
                        "steps": float(reached[i]) if reached[i].isfinite() else None,
                        "excess": float(excess[-1, i]),
                        "clip_changed": float(found.clip_changed[i]),
                    }
    for row in many.objectives(SEEDS, (5, 10, 20), RADII, steps=200):
        yield {"on": "digits", **row}


def noise() -> Iterator[dict[str, Any]]:
    """Noise: bowls, then p from batches of the digits."""
    for name, problem, spread in (
        ("quadratics, 2-d", convex_quadratics(), 3),
        ("quadratics, 20-d", random_quadratics(2, 20, 0), 2),
    ):
        theta, weights = grid(normal_starts(problem, spread), TWO)
        for size in (0.0, 0.3, 1.0, 3.0):
            for rule_name, c, rule in rules():
                found = descend(problem, theta, weights, rule, steps=400, lr=0.02, noise=size)
                last = _excess(problem, found.losses[-100:], weights, found.losses[0])
                distance = torch.stack([problem.distance(row) for row in found.losses[-100:]])
                yield {
                    "on": name,
                    "noise": size,
                    "rule": rule_name,
                    "c": c,
                    "excess": _list(last.mean(0)),
                    "distance": _list(distance.mean(0) / problem.distance(found.losses[0])),
                }
    for row in many.noise(SEEDS, (16, 64, 256, 1024), RADII, draws=40):
        yield {"on": "digits", **row}


PARTS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "speed": speed,
    "radius": radius,
    "objectives": objectives,
    "noise": noise,
    "longer": longer,
}


def _excess(
    problem: Problem, losses: Tensor, weights: Tensor, first: Tensor | None = None
) -> Tensor:
    """What is left of the weighted loss above its minimum, 1 at the start, ``[T + 1, B]``."""
    if problem.weighted_solution is None:
        return losses.new_full(losses.shape[:2], math.nan)
    least = torch.stack(problem.losses(problem.weighted_solution(weights)), dim=-1)
    minimum = (weights * least).sum(-1)
    start = (weights * (losses[0] if first is None else first)).sum(-1)
    return ((losses * weights).sum(-1) - minimum) / (start - minimum)


def _list(values: Tensor) -> list[float | None]:
    return [float(f"{x:.6g}") if math.isfinite(x) else None for x in values.tolist()]


def run(path: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Runs the parts that the file lacks; a part is on the disk before the next one starts."""
    make_folder(path.parent, "--output")
    try:
        found = dict(json.loads(path.read_text())) if path.exists() else {}
    except _DAMAGED as error:
        raise UsageError(
            f"`--output` must hold what this program wrote; got {path} ({error})."
        ) from error
    for name in parts:
        if name not in found:
            print(name, flush=True)
            found[name] = many.all_rows(PARTS[name]())
            found["environment"] = environment(packages=["scikit-learn"])
            write_whole(path, json.dumps(found) + "\n")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS / "claims.json")
    options = parser.parse_args(arguments)
    try:
        run(options.output, options.parts)
    except UsageError as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    if options.output == RESULTS / "claims.json":
        fill_page()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
