"""`raco-optim soup`: the weighted average of models trained on one objective each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raco_optim.alignment import rewarded_soup
from raco_optim.cli.errors import OneLineErrors, UsageError, refusals
from raco_optim.cli.files import held, make_folder
from raco_optim.cli.models import load


def main(arguments: Sequence[str]) -> int:
    """Runs `raco-optim soup`."""
    parser = OneLineErrors(
        prog="raco-optim soup",
        description="Averages models that were trained from the same model (rewarded soups). "
        "Adapters are merged into their model first.",
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", help="folders with models or adapters")
    parser.add_argument(
        "--weights", nargs="+", type=float, required=True, help="one per model; they sum to 1"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder for the model")
    options = parser.parse_args(arguments)
    count = len(options.weights)
    if count != len(options.models) or count != len(set(options.models)):
        raise UsageError(
            f"`--weights` must have one number per model, and the models must differ; got {count} "
            f"for {' '.join(options.models)}."
        )
    make_folder(options.output_dir, "--output_dir")
    if any(options.output_dir.iterdir()):
        raise UsageError(
            f"`--output_dir` must be a new or an empty folder; got {options.output_dir}."
        )
    with held(options.output_dir, "--output_dir"):
        _save(options.models, options.weights, options.output_dir)
    sys.stdout.write(f"model and tokenizer: {options.output_dir}\n")
    return 0


def _save(names: Sequence[str], weights: Sequence[float], folder: Path) -> None:
    states: dict[str, Any] = {}
    starts: dict[str, None] = {}
    for name in names:
        loaded = load(name)
        starts |= {loaded.start: None} if loaded.start else {}
        if len(starts) > 1:
            raise UsageError(
                f"the models must be trained from the same model; got {' and '.join(starts)}."
            )
        with refusals(f"merging the adapters of {name}"):
            dtype, model = loaded.model.dtype, loaded.model.float()
            if hasattr(model, "merge_and_unload"):
                model = model.merge_and_unload()
        states[name] = model.state_dict()
    with refusals(f"the average of {' '.join(names)}"):
        model.load_state_dict(rewarded_soup(states, dict(zip(names, weights, strict=True))))
    with refusals(f"{folder} can't be written"):
        model.to(dtype).save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
