"""`raco-optim sweep`: weights x methods x seeds -> one JSONL file; killed, it goes on."""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from raco_optim.cli.align import align, data_hashes, load_data
from raco_optim.cli.arguments import Parsed, check_silenced, option_name, parse
from raco_optim.cli.errors import OneLineErrors, UsageError, refusals
from raco_optim.cli.files import check_writable
from raco_optim.cli.grid import Point, grid_points, run_grid
from raco_optim.cli.records import point_key
from raco_optim.integrations.gguf import name_base

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
        name = f"--{option_name(argument)}"
        if argument.startswith("--") and name in _SET_HERE:
            raise UsageError(f"`{name}` is set for each run: use `{_SET_HERE[name]}`.")
    check_writable(options.output, "--output")
    weights = _weights(training, options.weights)
    _check_methods(options.methods)
    points = grid_points(options.methods, weights, options.seeds, options.c)
    # All of them are checked before the first one takes its time.
    parsed = {point.method: _parsed(training, vars(point), Path("none")) for point in points}
    check_silenced(list(parsed.values()))
    for of_method in parsed.values():
        if of_method.align.eval_data is None:
            raise UsageError("`--eval_data` must be given: a sweep compares held-out results.")
        load_data(of_method)
    models = options.output.with_name(f"{options.output.name}.models")
    records = sweep(options.output, points, training, models if options.keep_models else None)
    kept = sum("model" in record["extra"] for record in records)
    if options.keep_models and kept < len(records):
        sys.stderr.write(
            f"{len(records) - kept} of {len(records)} runs were over before `--keep_models` was "
            f"given, and left no model. The report has the commands that train them again.\n"
        )
    sys.stdout.write(f"\n{len(points)} runs: {options.output}\n")
    if kept:
        sys.stdout.write(f"{kept} models: {models}\n")
    sys.stdout.write(
        f"next: raco-optim report {options.output} --output {options.output.with_suffix('.html')}\n"
    )
    return 0


def sweep(
    path: Path, points: Sequence[Point], training: Sequence[str], models: Path | None
) -> list[dict[str, Any]]:
    """Runs what the file has no record of, each run in a folder of its own.

    A folder stays until the record is on the disk, so that a run which was interrupted resumes.

    Args:
        path: The JSONL file. The runs are in the folder of its name with ``.runs`` behind.
        points: What to run.
        training: The options of `raco-optim align` that all runs share.
        models: The folder for the models, or None to keep none.

    Returns:
        The records of the points, in this order.

    Raises:
        UsageError: See `run_grid` and `raco_optim.cli.align.align`.
    """
    work = path.with_name(f"{path.name}.runs")

    def run(point: Point) -> dict[str, Any]:
        folder = work / hashlib.sha256(point_key(vars(point)).encode()).hexdigest()[:16]
        for other in work.glob("*"):
            if _RUN.fullmatch(other.name) and other != folder:
                shutil.rmtree(other)
        # The Trainer of the run before is in a cycle of references, and so is its model.
        gc.collect()
        parsed = _parsed(training, vars(point), folder)
        result = align(parsed, work, save_model=models is not None)
        given = _without(_arguments(training, vars(point)), parsed.silenced)
        again = ["raco-optim", "align", *given, "--output_dir", _name(point)]
        extra = {"command": shlex.join(again)}
        if models is not None:
            with refusals(f"keeping the model of {point.label}"):
                extra["model"] = str(_keep(folder, models, point, parsed))
        return {**result, "extra": extra}

    # With a method that adds nothing to the settings of its own.
    common = _parsed(training, {**vars(points[0]), "method": "linear", "c": None}, work)
    settings = common.settings(data_hashes(common))
    records = run_grid(
        path, points, {n: v for n, v in settings.items() if n not in _OF_A_POINT}, run
    )
    for own in work.glob("*"):
        if _RUN.fullmatch(own.name) or own.name.startswith("base_model-"):
            shutil.rmtree(own)
    with contextlib.suppress(OSError):  # there is none, or somebody else put something into it
        work.rmdir()
    return records


def _keep(folder: Path, models: Path, point: Point, parsed: Parsed) -> Path:
    """Copies the result of a run, without its checkpoints, to a folder that is named after it."""
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"{folder} is over and kept no model. Remove it, and start again.")
    kept, partial = models / _name(point), models / f".{_name(point)}.part"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial, ignore=shutil.ignore_patterns("*checkpoint-*"))
    for base in folder.parent.glob("base_model-*"):  # of all runs, from a .gguf file
        if not (models / base.name).exists():
            shutil.copytree(base, models / base.name)
        if parsed.model.use_peft:
            name_base(partial, models / base.name)
    shutil.rmtree(kept, ignore_errors=True)
    partial.rename(kept)
    return kept.resolve()


def _name(point: Point) -> str:
    return re.sub(r"[^\w.=,-]+", "_", point.label)


def _without(arguments: Sequence[str], names: Collection[str]) -> list[str]:
    """Leaves out options, with their values."""
    found, wanted = [], True
    for argument in arguments:
        if argument.startswith("--"):
            wanted = option_name(argument) not in names
        found += [argument] if wanted else []
    return found


def _parser() -> argparse.ArgumentParser:
    parser = OneLineErrors(
        prog=COMMAND,
        description="Trains and evaluates at each of weights x methods x seeds; one JSONL line a "
        "run. The same command again goes on where it was stopped.",
        epilog="All other options are those of `raco-optim align`, such as --model, --data and "
        "--eval_data, which are needed, and hold for every run; see `raco-optim align --help-all`.",
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
    parser.add_argument(
        "--keep_models",
        action="store_true",
        help="keep the model of each run in a folder beside the results",
    )
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
    return parse([*_arguments(training, point), "--output_dir", str(folder)], COMMAND)


def _arguments(training: Sequence[str], point: Mapping[str, Any]) -> list[str]:
    weights = point["weights"]
    if isinstance(weights, Mapping):
        weights = ",".join(f"{name}={weight!r}" for name, weight in weights.items())
    radius = [] if point["c"] is None else ["--c", repr(point["c"])]
    own = ["--weights", weights, "--method", point["method"], "--seed", str(point["seed"])]
    return [*training, *own, *radius]
