"""Gradient surgery for several losses, as a wrapper of any torch optimizer.

A step, one stage a module, each a pure function that is usable alone:

    losses
      |  gradients.py      per_loss_gradients      g_i, one list of tensors per loss
      |  gram.py           gram_matrix             H_ij = <g_i, g_j>, float64
      |  simplex.py        solve_subproblem        p on the simplex, by one of three solvers
      |  coefficients.py   mixing_coefficients     clipped p and alpha
      |  combine.py        add_combined_gradient   .grad += sum_i alpha_i g_i
      v
    inner optimizer's step

Behind `simplex.py` are the solvers, `active_set.py` (exact), `pgd.py` and `slsqp.py`, with
`optimality.py`, which certifies a point and finds the one closest to the weights.
Gradients, Gram matrix and combination belong together, and there are three ways to have them, a
module each: `materialized.py` (all m gradients, the default), `ghost.py` (the same result without
those of large layers, found by `graph.py`) and `surrogate.py` (approximations).
`step.py` runs the stages in a row, `optimizer.py` holds the state and is an optimizer like any
other, `methods.py` names the rules (CAGradClip, CAGrad, MGDA, LinearScalarization), `report.py`
says what a step did, `step_logger.py` keeps it in a file (`step_log.py`), `plot` draws that, and
`pareto.py` measures what came of it.
"""

from raco_optim.coefficients import (
    MixingCoefficients,
    min_norm_coefficients,
    mixing_coefficients,
)
from raco_optim.combine import add_combined_gradient
from raco_optim.gradients import per_loss_gradients
from raco_optim.gram import gram_matrix
from raco_optim.methods import MGDA, CAGrad, CAGradClip, LinearScalarization
from raco_optim.optimizer import MultiObjectiveOptimizer
from raco_optim.report import Outcome, StepReport
from raco_optim.simplex import SubproblemSolution, min_norm_point, solve_subproblem
from raco_optim.step_log import read_steps
from raco_optim.step_logger import StepLogger
from raco_optim.unwrap import backward

__all__ = [
    "MGDA",
    "CAGrad",
    "CAGradClip",
    "LinearScalarization",
    "MixingCoefficients",
    "MultiObjectiveOptimizer",
    "Outcome",
    "StepLogger",
    "StepReport",
    "SubproblemSolution",
    "add_combined_gradient",
    "backward",
    "gram_matrix",
    "min_norm_coefficients",
    "min_norm_point",
    "mixing_coefficients",
    "per_loss_gradients",
    "read_steps",
    "solve_subproblem",
]
