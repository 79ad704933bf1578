"""`raco-optim sweep`: runs of all weights, methods and seeds in one JSONL file; it resumes."""

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

# The names of the folders of runs.
_RUN = re.compile(r"[0-9a-f]{16}")

# Settings that the grid varies.
_OF_A_POINT = ("weights", "method", "c", "seed")
_SET_HERE = {"--method": "--methods", "--seed": "--seeds", "--output_dir": "--output"}


def main(arguments: Sequence[str]) -> int:
    """Runs `raco-optim sweep`."""
    options, training = _parser().parse_known_args(arguments)
    for argument in training:
        name = f"--{option_name(argument)}"
        if argument.startswith("--") and name in _SET_HERE:
            raise UsageError(f"`{name}` must be left out. Use `{_SET_HERE[name]}`.")
    check_writable(options.output, "--output")
    weights = _weights(training, options.weights)
    _check_methods(options.methods)
    points = grid_points(options.methods, weights, options.seeds, options.c)
    # Check all runs before the first one starts.
    parsed = {point.method: _parsed(training, vars(point), Path("none")) for point in points}
    check_silenced(list(parsed.values()))
    for of_method in parsed.values():
        if of_method.align.eval_data is None:
            raise UsageError("`--eval_data` must be given, because a sweep compares results on it.")
        load_data(of_method)
    models = options.output.with_name(f"{options.output.name}.models")
    records = sweep(options.output, points, training, models if options.keep_models else None)
    kept = sum("model" in record["extra"] for record in records)
    if options.keep_models and kept < len(records):
        sys.stderr.write(
            f"{len(records) - kept} of {len(records)} runs finished before `--keep_models` was "
            f"given, so their models are gone. The report lists the commands to train them again.\n"
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
    """Runs the points that the file has no record of, each in a folder next to the file.

    A folder remains until its record is on the disk, so an interrupted run resumes.

    Args:
        path: The JSONL file; the folders are in ``<path>.runs``.
        points: The runs.
        training: Options of `raco-optim align` that all runs share.
        models: Folder for the models; None to keep none.
    """
    work = path.with_name(f"{path.name}.runs")

    def run(point: Point) -> dict[str, Any]:
        folder = work / hashlib.sha256(point_key(vars(point)).encode()).hexdigest()[:16]
        for other in work.glob("*"):
            if _RUN.fullmatch(other.name) and other != folder:
                shutil.rmtree(other)
        # Frees the model of the previous Trainer, which is in a reference cycle.
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

    # The method "linear" has no settings.
    common = _parsed(training, {**vars(points[0]), "method": "linear", "c": None}, work)
    settings = common.settings(data_hashes(common))
    records = run_grid(
        path, points, {n: v for n, v in settings.items() if n not in _OF_A_POINT}, run
    )
    for own in work.glob("*"):
        if _RUN.fullmatch(own.name) or own.name.startswith("base_model-"):
            shutil.rmtree(own)
    with contextlib.suppress(OSError):  # missing, or not empty
        work.rmdir()
    return records


def _keep(folder: Path, models: Path, point: Point, parsed: Parsed) -> Path:
    """Copies the result of a run, without its checkpoints, to a folder named after the run."""
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"{folder} is finished but has no model. Remove it and start again.")
    kept, partial = models / _name(point), models / f".{_name(point)}.part"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial, ignore=shutil.ignore_patterns("*checkpoint-*"))
    for base in folder.parent.glob("base_model-*"):  # shared by all runs, from a .gguf file
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
    """Removes options and their values from arguments."""
    found, wanted = [], True
    for argument in arguments:
        if argument.startswith("--"):
            wanted = option_name(argument) not in names
        found += [argument] if wanted else []
    return found


def _parser() -> argparse.ArgumentParser:
    parser = OneLineErrors(
        prog=COMMAND,
        description="Trains and evaluates with all combinations of weights, methods and seeds, and "
        "writes one line of JSON per run. Run the same command again to resume.",
        epilog="All other options go to every run: --model, --data and --eval_data, which are "
        "required, and the options that `raco-optim align --help-all` lists.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        required=True,
        metavar="A=X,B=Y",
        help="one or more trade-offs: helpful=0.8,harmless=0.2 helpful=0.5,harmless=0.5",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        required=True,
        help="raco, cagrad, linear, mgda, amopo, modpo; mgda ignores weights and runs once",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds (default: 0)")
    parser.add_argument(
        "--c", nargs="+", type=float, default=[0.4], help="radii of raco and cagrad (default: 0.4)"
    )
    parser.add_argument("--output", type=Path, required=True, help="the JSONL file of results")
    parser.add_argument(
        "--keep_models",
        action="store_true",
        help="keep the model of each run in a folder next to the results",
    )
    return parser


def _weights(training: Sequence[str], given: Sequence[str]) -> list[dict[str, float]]:
    """Returns the trade-offs by objective, all in the order of the first."""
    point = {"method": "linear", "seed": 0, "c": None}
    found = [
        _parsed(training, {**point, "weights": weights}, Path("none")).config.objective_weights
        for weights in given
    ]
    first = found[0]
    for weights in found:
        if set(weights) != set(first):
            raise UsageError(
                f"`--weights` must name the same objectives in all trade-offs; got "
                f"{', '.join(first)} and {', '.join(weights)}."
            )
    return [{name: weights[name] for name in first} for weights in found]


def _check_methods(given: Sequence[str]) -> None:
    """Checks `--methods` here, because `raco-optim align` would refer to `--method`."""
    from raco_optim.integrations.trl_config import METHODS

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
