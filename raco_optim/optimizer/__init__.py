"""`MultiObjectiveOptimizer`: ``backward`` takes several losses, ``step`` runs the inner optimizer.

`multi_objective` runs a step; `core` holds its state and chooses the mode.
"""

from raco_optim.optimizer.core import Mode as Mode
from raco_optim.optimizer.core import Options as Options
from raco_optim.optimizer.multi_objective import MultiObjectiveOptimizer as MultiObjectiveOptimizer
from raco_optim.optimizer.unwrapping import backward as backward
from raco_optim.optimizer.unwrapping import unwrap as unwrap
