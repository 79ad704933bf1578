"""Gradient surgery for several losses, as a wrapper of any torch optimizer.

A step, in the order of `MultiObjectiveOptimizer.backward` (optimizer/):

    losses
      |  objectives.py       names, weights, and the losses that are present
      |  gradients/          g_i in one of the modes: dense, ghost, per_example, approximate
      |  gradients/gram.py   H_ij = <g_i, g_j>, float64, over the shared parameters
      |  rules/              H -> coefficients alpha; CAGrad gets p from subproblem/
      |  gradients/combine.py   .grad += sum_i alpha_i g_i
      v  report.py           the report of the step
    step of the inner optimizer   (wrapper/ has the interface of torch.optim.Optimizer)

`optimizers.py` has an optimizer per rule: CAGradClip, CAGrad, MGDA, LinearScalarization.
`distributed/` averages gradients over processes before the Gram matrix. `step_log/` writes reports
to a file, `plot/` draws them, and `pareto.py` measures trade-offs.
"""

from raco_optim.gradients.functions import (
    add_combined_gradient,
    gram_matrix,
    per_loss_gradients,
)
from raco_optim.optimizer import MultiObjectiveOptimizer, backward, unwrap
from raco_optim.optimizers import MGDA, CAGrad, CAGradClip, LinearScalarization
from raco_optim.report import Outcome, StepReport
from raco_optim.rules import MixingCoefficients, Rule, mixing_coefficients
from raco_optim.step_log import StepLogger, read_steps
from raco_optim.subproblem import (
    MinNormPoint,
    SubproblemSolution,
    min_norm_point,
    solve_subproblem,
)

__all__ = [
    "MGDA",
    "CAGrad",
    "CAGradClip",
    "LinearScalarization",
    "MinNormPoint",
    "MixingCoefficients",
    "MultiObjectiveOptimizer",
    "Outcome",
    "Rule",
    "StepLogger",
    "StepReport",
    "SubproblemSolution",
    "add_combined_gradient",
    "backward",
    "gram_matrix",
    "min_norm_point",
    "mixing_coefficients",
    "per_loss_gradients",
    "read_steps",
    "solve_subproblem",
    "unwrap",
]
