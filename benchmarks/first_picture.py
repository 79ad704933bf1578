"""The first picture of README and docs: the weights asked for, and the trade-off reached.

python -m benchmarks.first_picture docs/images

Two losses on twenty parameters, with gradients as noisy as those of small batches. What was reached
is measured by the weights for which the end point would be the best one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.harness import Parser, make_folder, refusals_of
from benchmarks.problems import Problem, convex_quadratics
from benchmarks.style import GREY, METHODS, STYLE
from raco_optim import CAGrad, CAGradClip, LinearScalarization, MultiObjectiveOptimizer

IMAGE = "overview.png"
DIMENSION, STEPS, NOISE, C = 20, 400, 0.3, 0.8
Wrap = Callable[..., MultiObjectiveOptimizer]
COMPARED: dict[str, tuple[str, Wrap, str]] = {
    "linear": ("weighted sum", LinearScalarization, "-"),
    "cagrad": ("CAGrad", partial(CAGrad, c=C), "-"),
    "raco": ("CAGrad-Clip", partial(CAGradClip, c=C), "--"),
}


class Run(NamedTuple):
    """The losses along a run, and the share of its steps that raised one to first order."""

    losses: Tensor  # [steps, 2]
    hurting: float


def bowls() -> Problem:
    """Returns two quadratic bowls with random curvatures."""
    generator = torch.Generator().manual_seed(0)
    curvatures = (0.7 * torch.randn(2, DIMENSION, generator=generator)).exp()
    return convex_quadratics([[0.0] * DIMENSION, [1.0] * DIMENSION], curvatures.tolist())


def train(problem: Problem, wrap: Wrap, first: float, steps: int) -> Run:
    """Trains with the weights (first, 1 - first)."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.nn.Parameter(torch.full((DIMENSION,), 0.8, dtype=torch.float64))
    optimizer = wrap(torch.optim.SGD([theta], lr=0.05), [first, 1 - first])
    losses, hurting = [], 0
    for _ in range(steps):
        noise = NOISE * torch.randn(2, DIMENSION, dtype=torch.float64, generator=generator)
        exact = problem.losses(theta)
        optimizer.zero_grad()
        optimizer.backward([L + n @ theta for L, n in zip(exact, noise, strict=True)])
        optimizer.step()
        losses.append(torch.stack(exact).detach())
        hurting += bool(optimizer.report.hurting)
    return Run(torch.stack(losses), hurting / steps)


def reached(problem: Problem, run: Run) -> float:
    """Returns the first weight for which the end of the run (its last half) is the optimum."""
    front = problem.front(1001)
    nearest = (front - run.losses[len(run.losses) // 2 :].mean(0)).norm(dim=-1).argmin()
    return nearest.item() / 1000


def draw(path: Path, steps: int = STEPS) -> None:
    """Trains and draws both panels."""
    problem = bowls()
    asked = [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95]
    with matplotlib.rc_context({**STYLE, "font.size": 11, "lines.linewidth": 2}):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        for method, (name, wrap, line) in COMPARED.items():
            color, marker = METHODS[method]["color"], METHODS[method]["marker"]
            runs = [train(problem, wrap, first, steps) for first in asked]
            ends = [reached(problem, run) for run in runs]
            left.plot(asked, ends, line, color=color, marker=marker, ms=8, label=name)
            hurting = sum(run.hurting for run in runs) / len(runs)
            bar = right.barh(name, hurting, color=color, height=0.6)
            right.bar_label(bar, [f"{hurting:.0%}"], padding=4)
        left.plot([0, 1], [0, 1], color=GREY, lw=1, zorder=0)
        left.text(0.86, 0.96, "as asked", color=GREY, ha="right")
        left.set(xlabel="weight of loss A that was asked for", ylabel="weight that was reached")
        left.set_title("Where seven runs end", loc="left")
        left.legend(frameon=False, loc="lower right")
        right.set_title("Steps that raise one of the losses", loc="left")
        right.set(xticks=[], xlim=(0, 0.6))
        right.invert_yaxis()
        right.spines[:].set_visible(False)
        right.tick_params(length=0)
        figure.savefig(path, dpi=160)


@refusals_of("first_picture")
def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the picture."""
    parser = Parser(prog="python -m benchmarks.first_picture")
    parser.add_argument("folder", type=Path, help="where it goes, such as docs/images")
    folder = parser.parse_args(arguments).folder
    make_folder(folder, "folder")
    draw(folder / IMAGE)


if __name__ == "__main__":
    main()
