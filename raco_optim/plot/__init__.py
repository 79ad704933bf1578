"""Pictures of gradient surgery, from the reports of the steps or from a log of them.

    log (a file of `StepLogger`, a `StepLog`, a sequence of `StepReport`s)
      |  series.py      checked, and gathered into arrays
      |  moving.py      moving means and bands
      |  panels.py      one picture on one pair of axes (heat_map.py: of many pairs)
      |  over_time.py   cosines, solution, clip_angle, conflict_rate, overview
      |  trade_off.py   front
      v
    canvas.py           axes, colours, legends, files

Each function draws into the given matplotlib axes or a new figure, and returns the axes.
matplotlib comes with ``pip install "raco_optim[plot]"``.
"""

from raco_optim.plot.canvas import save
from raco_optim.plot.over_time import clip_angle, conflict_rate, cosines, overview, solution
from raco_optim.plot.trade_off import front

__all__ = ["clip_angle", "conflict_rate", "cosines", "front", "overview", "save", "solution"]
