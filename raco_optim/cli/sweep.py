"""`raco-optim sweep`: weights x methods x seeds -> one JSONL file; killed, it goes on."""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raco_optim.cli.align import align, data_hashes, load_data
from raco_optim.cli.arguments import Parsed, parse
from raco_optim.cli.errors import OneLineErrors, UsageError
from raco_optim.cli.files import check_writable
from raco_optim.cli.grid import Point, grid_points, run_grid
from raco_optim.cli.records import point_key

COMMAND = "raco-optim sweep"

# Name of the folder of a run.
_RUN = re.compile(r"[0-9a-f]{16}")

# What the grid sets for each run; the other settings are those of all runs.
_OF_A_POINT = ("weights", "method", "c", "seed")
_SET_HERE = {"--method": "--methods", "--seed": "--seeds", "--output_dir": "--output"}


def main(arguments: Sequence[str]) -> int:
    """Runs `raco-optim sweep`.

    Args:
        arguments: What follows ``raco-optim sweep`` on the command line.

    Returns:
        The exit code.

    Raises:
        UsageError: The arguments, the data, the model or the output are not usable.
    """
    options, training = _parser().parse_known_args(arguments)
    for argument in training:
        name = argument.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        if name in _SET_HERE:
            raise UsageError(f"`{name}` is set for each run: use `{_SET_HERE[name]}`.")
    check_writable(options.output, "--output")
    work = options.output.with_name(f"{options.output.name}.runs")
    weights = _weights(training, options.weights)
    _check_methods(options.methods)
    points = grid_points(options.methods, weights, options.seeds, options.c)
    # All of them are checked before the first one takes its time.
    parsed = {point.method: _parsed(training, vars(point), work) for point in points}
    for of_method in parsed.values():
        if of_method.align.eval_data is None:
            raise UsageError("`--eval_data` must be given: a sweep compares held-out results.")
        load_data(of_method)
    sweep(options.output, points, training, work)
    sys.stdout.write(
        f"\n{len(points)} runs: {options.output}\n"
        f"next: raco-optim report {options.output} --output {options.output.with_suffix('.html')}\n"
    )
    return 0


def sweep(path: Path, points: Sequence[Point], training: Sequence[str], work: Path) -> None:
    """Runs what the file has no record of, each run in a folder of its own.

    A folder stays until the record is on the disk, so that a run which was interrupted resumes.

    Args:
        path: The JSONL file.
        points: What to run.
        training: The options of `raco-optim align` that all runs share.
        work: The folder for the runs.

    Raises:
        UsageError: See `run_grid` and `raco_optim.cli.align.align`.
    """

    def run(point: Point) -> dict[str, Any]:
        folder = work / hashlib.sha256(point_key(vars(point)).encode()).hexdigest()[:16]
        for other in work.glob("*"):
            if _RUN.fullmatch(other.name) and other != folder:
                shutil.rmtree(other)
        # The Trainer of the run before is in a cycle of references, and so is its model.
        gc.collect()
        return align(_parsed(training, vars(point), folder), work, save_model=False)

    # With a method that adds nothing to the settings of its own.
    common = _parsed(training, {**vars(points[0]), "method": "linear", "c": None}, work)
    settings = common.settings(data_hashes(common))
    run_grid(path, points, {n: v for n, v in settings.items() if n not in _OF_A_POINT}, run)
    for own in work.glob("*"):
        if _RUN.fullmatch(own.name) or own.name.startswith("base_model-"):
            shutil.rmtree(own)
        elif own.name.endswith(".lock"):
            own.unlink()
    with contextlib.suppress(OSError):  # there is none, or somebody else put something into it
        work.rmdir()


def _parser() -> argparse.ArgumentParser:
    parser = OneLineErrors(
        prog=COMMAND,
        description="Trains and evaluates at each of weights x methods x seeds; one JSONL line a "
        "run. The same command again goes on where it was stopped.",
        epilog="All other options are those of `raco-optim align`, such as --model, --data and "
        "--eval_data, which are needed, and hold for every run; see `raco-optim align --help`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        required=True,
        metavar="A=X,B=Y",
        help="one trade-off each: helpful=0.8,harmless=0.2 helpful=0.5,harmless=0.5",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        required=True,
        help="raco, cagrad, linear, mgda, amopo, modpo; mgda asks for no weights and runs once",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument(
        "--c", nargs="+", type=float, default=[0.4], help="radii of raco and cagrad (default: 0.4)"
    )
    parser.add_argument("--output", type=Path, required=True, help="the JSONL file of results")
    return parser


def _weights(training: Sequence[str], given: Sequence[str]) -> list[dict[str, float]]:
    """The trade-offs by objective, all in the order of the first."""
    point = {"method": "linear", "seed": 0, "c": None}
    found = [
        _parsed(training, {**point, "weights": weights}, Path("none")).config.objective_weights
        for weights in given
    ]
    first = found[0]
    for weights in found:
        if set(weights) != set(first):
            raise UsageError(
                f"`--weights` must name the same objectives each time; got {', '.join(first)} and "
                f"{', '.join(weights)}."
            )
    return [{name: weights[name] for name in first} for weights in found]


def _check_methods(given: Sequence[str]) -> None:
    """`raco-optim align` would say what is wrong with `--method`, which nobody gave."""
    from raco_optim.integrations.trl_config import METHODS  # needs TRL, which is there by now

    for method in given:
        if method not in METHODS:
            raise UsageError(f"`--methods` must be of {', '.join(METHODS)}; got {method!r}.")


def _parsed(training: Sequence[str], point: Mapping[str, Any], folder: Path) -> Parsed:
    weights = point["weights"]
    if isinstance(weights, Mapping):
        weights = ",".join(f"{name}={weight!r}" for name, weight in weights.items())
    radius = [] if point["c"] is None else ["--c", repr(point["c"])]
    own = ["--weights", weights, "--method", point["method"], "--seed", str(point["seed"])]
    return parse([*training, *own, *radius, "--output_dir", str(folder)], COMMAND)
