"""The pictures of one step (docs/algorithm.md) and of the way of a run (docs/gallery.md).

python -m benchmarks.theory_figures docs/images
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from benchmarks.harness import Parser, make_folder, refusals_of
from benchmarks.problems import convex_quadratics
from benchmarks.style import GREY, INK, METHODS, STYLE
from raco_optim import CAGrad, CAGradClip, LinearScalarization, mixing_coefficients

GRADIENTS = torch.tensor([[1.0, -4.0], [-1.0, 1.0]], dtype=torch.float64)  # of tests/test_theory.py
C = 0.5
SUM, CAGRAD, CLIP = (METHODS[name]["color"] for name in ("linear", "cagrad", "raco"))
RC = {**STYLE, "lines.linewidth": 1.6, "savefig.dpi": 160}


def geometry(path: Path) -> None:
    """Draws the trust region with its three candidates, and what clipping does to p."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _trust_region(left, torch.tensor([0.2, 0.8], dtype=torch.float64))
        _shares(right)
        figure.savefig(path)


def _trust_region(axes: Axes, weights: Tensor) -> None:
    g0 = weights @ GRADIENTS
    gram = GRADIENTS @ GRADIENTS.T
    axes.set_aspect("equal")
    axes.set(xlim=(-1.15, 0.35), ylim=(-0.8, 0.6), xticks=[], yticks=[])
    x, y = np.meshgrid(np.linspace(-1.2, 0.4, 400), np.linspace(-0.9, 0.7, 400))
    serves = [g[0].item() * x + g[1].item() * y >= 0 for g in GRADIENTS]
    axes.contourf(x, y, serves[0] & serves[1], levels=[0.5, 1.5], colors=["#eef3ee"])
    axes.text(-1.12, -0.74, "no loss rises", color=GREY)
    axes.spines[:].set_visible(False)
    axes.add_patch(Circle(g0.tolist(), C * g0.norm().item(), fill=False, ls="--", ec=GREY))
    for i, (g, at) in enumerate(zip(GRADIENTS, [(0.16, -0.66), (-0.48, 0.46)], strict=True), 1):
        unit = 0.6 * g / g.norm()
        axes.annotate("", unit.tolist(), (0, 0), arrowprops={"arrowstyle": "->", "color": GREY})
        axes.text(*at, f"$g_{i}$, shortened", color=GREY, ha="center")
    steps = {"$g_0$": (g0, SUM, (-0.56, 0.05))}
    for clip, label, color, at in (
        ("none", "CAGrad", CAGRAD, (-0.9, -0.36)),
        ("hard", "CAGrad-Clip", CLIP, (-1.13, -0.17)),
    ):
        alpha = mixing_coefficients(gram, weights.tolist(), C, clip=clip).coefficients
        steps[label] = (alpha @ GRADIENTS, color, at)
    for label, (step, color, at) in steps.items():
        arrow = {"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", step.tolist(), (0, 0), arrowprops=arrow)
        axes.text(*at, label, color=color)
    axes.plot(0, 0, "o", color=INK, ms=4)
    axes.set_title(r"w = (0.2, 0.8), c = 0.5: the circle has radius $c|g_0|$", loc="left")


def _shares(axes: Axes) -> None:
    gram = GRADIENTS @ GRADIENTS.T
    first = np.linspace(0.002, 0.998, 499)
    mixings = [mixing_coefficients(gram, [w, 1 - w], C) for w in first]
    p = [mixing.p for mixing in mixings]
    clipped = [mixing.p_clipped for mixing in mixings]
    axes.plot(first, first, color=SUM, label="$w_1$, in $g_0$")
    axes.plot(first, [float(x[0]) for x in p], color=CAGRAD, label="$p^*_1$, CAGrad")
    share = [float(x[0] / x.sum()) for x in clipped]
    label = r"$\tilde{p}_1 / (\tilde{p}_1 + \tilde{p}_2)$, CAGrad-Clip"
    axes.plot(first, share, color=CLIP, ls="--", label=label)
    axes.set(xlabel="weight $w_1$ of the first loss", ylabel="share of $g_1$ in the correction")
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02))
    axes.legend(frameon=False)
    axes.set_title("the same gradients, all weights", loc="left")


def paths(path: Path, steps: int = 300) -> None:
    """Draws how gradient descent reaches the weighted optimum, by three rules."""
    problem = convex_quadratics([[0.0, 0.0], [1.0, 1.0]], [[1.0, 10.0], [10.0, 1.0]])
    weights, c = [0.8, 0.2], 0.6
    rules: dict[str, tuple[Any, str, str]] = {
        "weighted sum": (LinearScalarization, SUM, "-"),
        "CAGrad, c = 0.6": (partial(CAGrad, c=c), CAGRAD, "-"),
        "CAGrad-Clip, c = 0.6": (partial(CAGradClip, c=c), CLIP, "--"),
    }
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(5.6, 4.2), layout="constrained")
        axes = figure.subplots()
        front = problem.front(200)
        axes.plot(front[:, 0], front[:, 1], color=GREY, lw=1, label="Pareto front")
        for label, (wrap, color, line) in rules.items():
            theta = torch.nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
            optimizer = wrap(torch.optim.SGD([theta], lr=0.03), weights)
            losses = []
            for _ in range(steps):
                optimizer.zero_grad()
                optimizer.backward(problem.losses(theta))
                optimizer.step()
                losses.append(optimizer.report.losses.tolist())
            x, y = zip(*losses, strict=True)
            axes.plot(x, y, color=color, ls=line, label=label)
            marked = [0, 10, 30, 100]
            axes.plot([x[k] for k in marked], [y[k] for k in marked], "o", color=color, ms=4)
        axes.plot(x[-1], y[-1], "*", color=INK, ms=11, label="optimum of $0.8 L_1 + 0.2 L_2$")
        axes.set(xlabel="$L_1$", ylabel="$L_2$", xlim=(0.22, 0.53), ylim=(0.4, 1.0))
        axes.legend(frameon=False)
        axes.set_title("Dots: after 0, 10, 30 and 100 steps", loc="left")
        figure.savefig(path)


@refusals_of("theory_figures")
def main(arguments: Sequence[str] | None = None) -> None:
    """Draws both."""
    parser = Parser(prog="python -m benchmarks.theory_figures")
    parser.add_argument("folder", type=Path, help="where the pictures go, such as docs/images")
    folder = parser.parse_args(arguments).folder
    make_folder(folder, "folder")
    geometry(folder / "theory-geometry.png")
    paths(folder / "theory-paths.png")


if __name__ == "__main__":
    main()
