"""The subproblem of CAGrad and the min-norm point: Gram matrix -> p on the simplex.

`solve.py` is the entry point. `two_losses.py` has a closed form. `few_losses.py` solves ordinary
problems with up to ten losses. `several_losses.py` prepares all others for `active_set.py` or
`slsqp.py`. These run on the CPU; `projected_gradient.py` runs on the device of the Gram matrix.
`certificate.py` finds the minimiser closest to the weights from a solver's result, and proves its
accuracy. `min_norm.py` is the subproblem of MGDA.
"""

from raco_optim.subproblem.min_norm import MinNormPoint as MinNormPoint
from raco_optim.subproblem.min_norm import min_norm_point as min_norm_point
from raco_optim.subproblem.solve import SOLVERS as SOLVERS
from raco_optim.subproblem.solve import Solver as Solver
from raco_optim.subproblem.solve import SubproblemSolution as SubproblemSolution
from raco_optim.subproblem.solve import solve_subproblem as solve_subproblem
