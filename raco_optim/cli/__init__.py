"""The command line `raco-optim`; each command is a module, imported when it is called.

raco-optim data     convert.py  data sets -> preference pairs: layouts/, sources.py, readers.py
raco-optim align    align.py    one training run: arguments.py, data.py, columns.py, models.py,
                                processes.py, runs.py
raco-optim sweep    sweep.py    a grid of runs: grid.py, records.py
raco-optim report   report.py   results of a grid: cells.py, statistics.py, tables.py, figures.py,
                                page.py
raco-optim chat     chat.py     chat with a model: models.py
raco-optim compare  compare.py  answers and scores of several models: models.py, scores.py, page.py
raco-optim soup     soup.py     the average of several models: models.py
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence

from raco_optim.cli.environment import version_of
from raco_optim.cli.errors import OneLineErrors, UsageError, missing_package
from raco_optim.cli.processes import is_first
from raco_optim.distributed.group import launched_world_size

__all__ = ["COMMANDS", "UsageError", "main"]

COMMANDS = {
    "data": "convert a data set to preference pairs with labels",
    "align": "train a language model on several preferences at once",
    "sweep": "train with all combinations of weights, methods and seeds",
    "report": "make tables, plots and an HTML page from the results of a sweep",
    "chat": "chat with a model",
    "compare": "compare the answers of several models, with their scores",
    "soup": "average models that were each trained on one objective",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The arguments after ``raco-optim``; None for those of the process.

    Returns:
        The exit code: 0 on success; 2 for a wrong request, with one line on stderr that says why;
        130 after Control-C; 1 if the reader of the output has gone.

    Example:
        >>> from raco_optim.cli import main
        >>> main(["report", "missing.jsonl", "--output", "report.html"])
        2
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may support only ASCII
    try:
        options = _parser().parse_args(arguments)
        if options.command != "align" and launched_world_size() > 1:
            raise UsageError(
                f"`raco-optim {options.command}` must run in one process. Leave out torchrun."
            )
        with warnings.catch_warnings():
            if not sys.warnoptions:  # other packages warn about each other
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
            command = importlib.import_module(f"raco_optim.cli.{options.command}")
            code: int = command.main(options.arguments)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("\nraco-optim: stopped. Run the same command again to resume.\n")
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, ImportError, RuntimeError) as error:  # TRL wraps a failed import
        message = str(error) if isinstance(error, UsageError) else missing_package(error)
        if message is None or sys.flags.dev_mode:
            raise
        if is_first(on_this_machine=True):
            sys.stderr.write(f"raco-optim: {message}\n")
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = OneLineErrors(
        prog="raco-optim",
        description="Multi-objective alignment of language models with CAGrad-Clip.",
        epilog="commands:\n" + "\n".join(f"  {name:8} {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = version_of("raco_optim") or "(not installed, running from source)"
    parser.add_argument("--version", action="version", version=f"raco_optim {version}")
    parser.add_argument("command", choices=COMMANDS, help="see `raco-optim COMMAND --help`")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the command")
    return parser
