"""Errors that the command line prints as a single line."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

_PACKAGE = Path(__file__).parent.parent
# Package -> the extra that brings it, where that is not "align".
_EXTRAS = {"matplotlib": "plot", "moocore": "pareto"}
# What the code of this package raises on purpose, for wrong arguments or what the machine lacks.
_ON_PURPOSE = (ValueError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError)
_LONGEST = 600  # a message, in characters


class UsageError(ValueError):
    """What was asked cannot be done, and the message says what to change.

    `raco-optim` prints the message on stderr and exits with code 2; any other exception is a bug
    and keeps its traceback.

    Example:
        >>> from raco_optim.cli.errors import UsageError
        >>> issubclass(UsageError, ValueError)
        True
    """


class OneLineErrors(argparse.ArgumentParser):
    """A parser whose errors are `UsageError`, without the usage that argparse prints before them.

    Example:
        >>> from raco_optim.cli.errors import OneLineErrors
        >>> OneLineErrors(prog="raco-optim").parse_args(["--speed"])
        Traceback (most recent call last):
        raco_optim.cli.errors.UsageError: unrecognized arguments: --speed. See `raco-optim --help`.
    """

    def error(self, message: str) -> NoReturn:
        """Raises `UsageError` with the message and where to read on."""
        raise UsageError(f"{' '.join(message.split())}. See `{self.prog} --help`.")


@contextlib.contextmanager
def refusals(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns errors of other packages, and of wrong arguments, into a `UsageError` of one line.

    Errors that this package makes by mistake (`TypeError`, `KeyError`, ...) are bugs and pass.

    Args:
        what: What was being done; it opens the message.
        errors: The kinds of errors, if not all of them.

    Raises:
        UsageError: There was such an error.

    Example:
        >>> from raco_optim.cli.errors import refusals
        >>> with refusals("reading 3"):
        ...     int("three")
        Traceback (most recent call last):
        raco_optim.cli.errors.UsageError: reading 3: invalid literal for int() with base 10: 'three'
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        missing = missing_package(error)
        if missing is not None:
            raise UsageError(missing) from error
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        own = Path(frame.f_code.co_filename).is_relative_to(_PACKAGE)
        if not isinstance(error, errors or (_ON_PURPOSE if own else Exception)):
            raise
        raise UsageError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Returns the message of an error on one line, with its type where that says more.

    Args:
        error: The error.

    Example:
        >>> from raco_optim.cli.errors import one_line
        >>> one_line(KeyError("loss")), one_line(OSError(28, "No space left on device"))
        ("KeyError: 'loss'", '[Errno 28] No space left on device')
    """
    text = " ".join(str(error).split())
    if not text or not isinstance(error, _ON_PURPOSE):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def missing_package(error: BaseException) -> str | None:
    """Returns how to install what an import did not find; None for any other error.

    Args:
        error: The error.

    Example:
        >>> from raco_optim.cli.errors import missing_package
        >>> missing_package(ModuleNotFoundError(name="peftt"))
        'peftt is not installed. Run `pip install "raco_optim[align]"`.'
        >>> missing_package(ValueError("no import")) is None
        True
    """
    cause: BaseException | None = error
    while cause is not None:
        name = (cause.name or "").partition(".")[0] if isinstance(cause, ImportError) else ""
        if name and name != _PACKAGE.name and importlib.util.find_spec(name) is None:
            extra = _EXTRAS.get(name, "align")
            return f'{name} is not installed. Run `pip install "{_PACKAGE.name}[{extra}]"`.'
        cause = cause.__cause__ or cause.__context__
    return None
