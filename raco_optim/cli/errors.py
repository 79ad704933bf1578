"""The one kind of error that the command line prints as a single line."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import NoReturn


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
        raise UsageError(f"{message}. See `{self.prog} --help`.")


@contextlib.contextmanager
def needs_extra(extra: str, *packages: str) -> Iterator[None]:
    """Turns the failed import of an optional package into the line that installs it.

    Args:
        extra: The extra of `raco_optim` that brings the packages.
        packages: What may be missing.

    Raises:
        UsageError: One of the packages is not installed.

    Example:
        >>> from raco_optim.cli.errors import needs_extra
        >>> with needs_extra("plot", "no_such_package"):
        ...     import no_such_package
        Traceback (most recent call last):
        raco_optim.cli.errors.UsageError: no_such_package is not installed. Run `pip install \
"raco_optim[plot]"`.
    """
    try:
        yield
    except ImportError as error:
        causes = [error, error.__cause__]
        missing = [e.name for e in causes if isinstance(e, ImportError) and e.name in packages]
        if not missing:
            raise
        raise UsageError(
            f'{missing[0]} is not installed. Run `pip install "raco_optim[{extra}]"`.'
        ) from error


@contextlib.contextmanager
def refusals(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns errors that name a wrong argument into `UsageError`, with their text on one line.

    Args:
        what: What was being done; it opens the message.
        errors: Kinds of errors that mean a wrong argument here.

    Raises:
        UsageError: One of them was raised.

    Example:
        >>> from raco_optim.cli.errors import refusals
        >>> with refusals("reading 3", ValueError):
        ...     int("three")
        Traceback (most recent call last):
        raco_optim.cli.errors.UsageError: reading 3: invalid literal for int() with base 10: 'three'
    """
    try:
        yield
    except UsageError:
        raise
    except errors as error:
        raise UsageError(f"{what}: {' '.join(str(error).split())}") from error
