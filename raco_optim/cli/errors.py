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
# Package -> the extra that installs it, if not "align".
_EXTRAS = {"matplotlib": "plot", "moocore": "pareto"}
# Errors that this package raises on purpose, for wrong arguments or lacking resources.
_ON_PURPOSE = (ValueError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError)
_LONGEST = 600  # a message, in characters


class UsageError(ValueError):
    """A request that can't be fulfilled; the message says what to change.

    `raco-optim` prints the message on stderr and exits with code 2. Any other exception is a bug
    and keeps its traceback.

    Example:
        >>> from raco_optim.cli import UsageError
        >>> issubclass(UsageError, ValueError)
        True
    """


class OneLineErrors(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raises `UsageError` with the message and a hint at the help."""
        raise UsageError(f"{' '.join(message.split())}. See `{self.prog} --help`.")


@contextlib.contextmanager
def refusals(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns errors of other packages, and errors about wrong arguments, into a `UsageError`.

    Errors that this package makes by mistake (`TypeError`, `KeyError`, ...) are bugs and pass.

    Args:
        what: The action that failed, to begin the message with.
        errors: The kinds of errors; all if none is given.
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
    """Returns the message of an error on one line, with its type if that helps."""
    text = " ".join(str(error).split())
    if not text or not isinstance(error, _ON_PURPOSE):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def missing_package(error: BaseException) -> str | None:
    """Returns how to install the package that an import lacks; None for other errors."""
    cause: BaseException | None = error
    while cause is not None:
        name = (cause.name or "").partition(".")[0] if isinstance(cause, ImportError) else ""
        if name and name != _PACKAGE.name and importlib.util.find_spec(name) is None:
            extra = _EXTRAS.get(name, "align")
            return f'{name} is not installed. Run `pip install "{_PACKAGE.name}[{extra}]"`.'
        cause = cause.__cause__ or cause.__context__
    return None
