"""The log of a training's steps: `StepLogger` writes it, `read_steps` reads it.

log.py      a report <-> a line of JSON
logger.py   the writer, which does not wait for the device
jsonl.py    JSON lines that survive a kill, for the whole package
"""

from raco_optim.step_log.log import StepLog, read_steps
from raco_optim.step_log.logger import StepLogger

__all__ = ["StepLog", "StepLogger", "read_steps"]
