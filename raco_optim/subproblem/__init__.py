"""The subproblem of CAGrad and the min-norm point: Gram matrix -> p on the simplex.

`solve.py` is the entrance. Two losses have a closed form, `two_losses.py`. `few_losses.py` solves
ordinary problems of up to ten. `several_losses.py` prepares the others for `active_set.py` or
`slsqp.py`. All of these run on the host; `projected_gradient.py` runs on the device of the Gram
matrix. `certificate.py` turns what a solver on the host found into the minimiser closest to the
weights, and proves how good it is. `min_norm.py` is the subproblem of MGDA.
"""

from raco_optim.subproblem.min_norm import MinNormPoint as MinNormPoint
from raco_optim.subproblem.min_norm import min_norm_point as min_norm_point
from raco_optim.subproblem.solve import SOLVERS as SOLVERS
from raco_optim.subproblem.solve import Solver as Solver
from raco_optim.subproblem.solve import SubproblemSolution as SubproblemSolution
from raco_optim.subproblem.solve import solve_subproblem as solve_subproblem
