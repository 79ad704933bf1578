"""The command line of a training run -> dataclasses, by the parser of transformers."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raco_optim.cli.errors import OneLineErrors, UsageError, refusals
from raco_optim.distributed.group import launched_world_size

if TYPE_CHECKING:
    from trl import ModelConfig

    from raco_optim.integrations.trl import MultiObjectiveDPOConfig

# What a run learns does not depend on these.
_WITHOUT_EFFECT = (
    "disable_tqdm",
    "model_name_or_path",
    "output_dir",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_total_limit",
)

# The options that `--help` shows, beside those of `AlignArguments`.
_MAIN = {
    "weights": "objectives and their weights, as helpful=0.7,harmless=0.3; they sum to 1",
    "output_dir": "the folder for the result; the same command again goes on there",
    "method": "how the objectives become one update",
    "c": "radius of the correction of raco and cagrad",
    "beta": "strength of the pull towards the reference model",
    "loss_type": "loss of each objective: sigmoid (DPO), sigmoid_norm, ipo, simpo, kto_pair, ...",
    "learning_rate": "learning rate",
    "num_train_epochs": "passes over the data",
    "max_steps": "number of updates, instead of passes",
    "per_device_train_batch_size": "pairs in a batch",
    "gradient_accumulation_steps": "batches in an update",
    "max_length": "longest prompt and answer, in tokens",
    "seed": "seed of the run",
    "use_peft": "train LoRA adapters instead of the whole model",
    "lora_r": "rank of the adapters",
    "lora_target_modules": "layers that get adapters, such as all-linear",
    "save_steps": "updates between checkpoints",
    "save_total_limit": "checkpoints that are kept",
    "dtype": "number format of the model, such as bfloat16",
    "report_to": "where to log, such as tensorboard or wandb",
}

# Option -> least value. What is not listed is checked where it is used.
_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("gradient_accumulation_steps", "max_length", "lora_r"), 1),
    **dict.fromkeys(("save_total_limit", "save_steps", "logging_steps", "eval_steps"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"), 0),
    **dict.fromkeys(("seed", "data_seed", "lora_dropout", "dataloader_num_workers"), 0),
}


@dataclass
class AlignArguments:
    """What to train, and on what.

    Attributes:
        model: A folder with a model and its tokenizer, a .gguf file, or a name on the model hub.
        data: Preference pairs to train on.
        eval_data: Preference pairs to evaluate on, or None.

    Example:
        >>> from raco_optim.cli.arguments import AlignArguments
        >>> AlignArguments("model", ["pairs.jsonl"]).eval_data is None
        True
    """

    model: str = field(
        metadata={"help": "A folder with a model and its tokenizer, a .gguf file, or a hub name."}
    )
    data: list[str] = field(
        metadata={
            "help": "Pairs to train on with the columns prompt, if there is one, chosen, rejected "
            "and pref_<objective>, in [-1, 1] or null: .jsonl, .json, .csv and .parquet files, "
            "folders, hub names; a=0.7 b=0.3 mixes two. `raco-optim data` makes such files."
        }
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Pairs to evaluate on when the training is over."}
    )


@dataclass(frozen=True)
class Parsed:
    """A parsed command line.

    Attributes:
        align: Model and data.
        config: Fields of `MultiObjectiveDPOConfig`.
        model: Fields of TRL's `ModelConfig`.
        silenced: Options that were given and have no effect, with what would give them one.
    """

    align: AlignArguments
    config: MultiObjectiveDPOConfig
    model: ModelConfig
    silenced: dict[str, str]

    def settings(self, hashes: dict[str, str | None]) -> dict[str, Any]:
        """All that decides what the run learns, as JSON holds it.

        Args:
            hashes: SHA-256 of the data files.
        """
        training = json.loads(self.config.to_json_string())
        model = dataclasses.asdict(self.model)
        both = {"model": self.align.model, **hashes, **model, **training}
        if launched_world_size() > 1:  # each takes a batch of its own
            both["processes"] = launched_world_size()
        return {name: value for name, value in both.items() if name not in _WITHOUT_EFFECT}


def parse(arguments: Sequence[str], command: str) -> Parsed:
    """Parses a command line of `raco-optim align`; ``--config`` names a YAML file with options.

    Where neither says otherwise, bfloat16 is used on a GPU that has it, gradient checkpointing
    and pinned memory on a GPU, and two checkpoints are kept; TRL's defaults are all three,
    everywhere, and any number.

    Args:
        arguments: What follows the command.
        command: The command, for its help.

    Raises:
        UsageError: An argument is unknown, missing or out of its range, or the YAML file cannot be
            read.

    Example:
        >>> from raco_optim.cli.arguments import parse
        >>> parse(["--model", "model", "--data", "pairs.jsonl"], "raco-optim align")
        Traceback (most recent call last):
        raco_optim.cli.errors.UsageError: the arguments: `weights` must be a mapping ...
    """
    import torch
    from transformers import HfArgumentParser
    from trl import ModelConfig

    from raco_optim.integrations.trl import MultiObjectiveDPOConfig

    class Parser(HfArgumentParser):  # type: ignore[misc]  # transformers is not type-checked
        error = OneLineErrors.error

    of_file = OneLineErrors(prog=command, add_help=False, allow_abbrev=False)
    of_file.add_argument("--config")
    options, given = of_file.parse_known_args(arguments)
    given = [*_from_yaml(options.config), *given]
    parser = Parser(
        (AlignArguments, MultiObjectiveDPOConfig, ModelConfig),
        prog=command,
        allow_abbrev=False,
        add_help=False,
    )
    absent = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument("--config", **absent, help="a YAML file with options, as `name: value`")
    parser.add_argument("-h", "--help", **absent, action=_ShortHelp, nargs=0, help="this text")
    parser.add_argument("--help-all", **absent, action="help", help="all options")
    gpu = torch.cuda.is_available()
    parser.set_defaults(
        bf16=gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        gradient_checkpointing=gpu or None,
        dataloader_pin_memory=gpu,
        save_total_limit=2,
    )
    for action in parser._actions:
        if action.dest in MultiObjectiveDPOConfig._VALID_DICT_FIELDS:
            action.type = _mapping
    with refusals("the arguments"):
        align, config, model, unknown = parser.parse_args_into_dataclasses(
            given, return_remaining_strings=True, look_for_args_file=False
        )
    if unknown:
        parser.error(f"there is no {unknown[0]}")
    if model.model_name_or_path is not None:
        raise UsageError("`--model_name_or_path` is called `--model` here.")
    if config.resume_from_checkpoint is not None or config.save_only_model:
        raise UsageError(
            "`--resume_from_checkpoint` and `--save_only_model` must be left out: the same command "
            "again resumes by itself, from whole checkpoints."
        )
    _check_numbers({**vars(model), **vars(config)})
    names = {option_name(argument) for argument in given if argument.startswith("--")}
    return Parsed(align, config, model, _silenced(names, align, config, model))


class _ShortHelp(argparse.Action):
    """Prints the options that matter to most."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        own = {x.name: x.metadata["help"] for x in dataclasses.fields(AlignArguments)}
        named = {action.dest: action for action in parser._actions if action.option_strings}
        lines = [f"usage: {parser.prog} --model MODEL --data FILE --weights A=X,B=Y [options]", ""]
        for name, text in {**own, **_MAIN}.items():
            default = named[name].default
            if isinstance(default, list):
                default = " ".join(default)
            known = "" if default is None or default == -1 else f" (default: {default})"
            body = textwrap.wrap(f"{text}{known}", 64)
            lines += [f"  --{name:29} {body[0]}", *(f"{'':34}{line}" for line in body[1:])]
        lines += [f"  --{'config':29} a YAML file with such options, one `name: value` a line"]
        lines += ["", "`--help-all` lists all options, those of TRL and transformers among them."]
        parser._print_message("\n".join(lines) + "\n", sys.stdout)
        parser.exit()


def _from_yaml(path: str | None) -> list[str]:
    """The options of a YAML file as arguments, so that all of them are checked alike."""
    if path is None:
        return []
    import yaml

    with refusals("`--config` must be a YAML file that can be read"):
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UsageError(f"`--config` must be a YAML file with `name: value` lines; got {path}.")
    arguments = []
    for name, value in found.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif name == "weights" and isinstance(value, dict):
            arguments.append("--weights=" + ",".join(f"{o}={w}" for o, w in value.items()))
        elif value is not None:
            text = json.dumps(value, default=str) if isinstance(value, dict) else str(value)
            arguments.append(f"--{name}={text}")
    return arguments


def _mapping(text: str) -> str:
    """Checks what transformers would take for a mapping, or for a file with one."""
    try:
        if Path(text).is_file() or isinstance(json.loads(text), dict):
            return text
    except (ValueError, OSError, RecursionError):
        pass
    raise argparse.ArgumentTypeError(f"must be a mapping, such as '{{\"a\": 1}}'; got {text!r:.60}")


def option_name(argument: str) -> str:
    """Returns the name of the field that an option sets.

    Args:
        argument: The option as it was given.

    Example:
        >>> from raco_optim.cli.arguments import option_name
        >>> option_name("--learning-rate=0.1"), option_name("--no_dataloader_pin_memory")
        ('learning_rate', 'dataloader_pin_memory')
    """
    return argument.partition("=")[0].lstrip("-").replace("-", "_").removeprefix("no_")


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"`--{name}` must be a finite number; got {value}.")
        if isinstance(value, int | float) and value < _LEAST.get(name, -math.inf):
            raise UsageError(f"`--{name}` must be at least {_LEAST[name]}; got {value}.")
    if values["max_steps"] < 1 and values["max_steps"] != -1:
        raise UsageError(f"`--max_steps` must be at least 1; got {values['max_steps']}.")
    if values["max_steps"] == -1 and values["num_train_epochs"] <= 0:
        raise UsageError(
            f"`--num_train_epochs` must be positive; got {values['num_train_epochs']}."
        )


def _silenced(
    given: set[str], align: AlignArguments, config: MultiObjectiveDPOConfig, model: ModelConfig
) -> dict[str, str]:
    """Which of the given options have no effect, and what they need."""
    best = config.load_best_model_at_end or config.save_strategy == "best"
    plateau = config.lr_scheduler_type == "reduce_lr_on_plateau"
    # The options, what they need, and whether it is there; a trailing * stands for any ending.
    rules: list[tuple[str, str, object]] = [
        ("lora_* use_rslora use_dora", "`--use_peft`", model.use_peft),
        ("bnb_4bit_* use_bnb_nested_quant", "`--load_in_4bit`", model.load_in_4bit),
        ("eval_delay", "`--eval_strategy`", config.eval_strategy != "no"),
        ("eval_* per_device_eval_batch_size", "`--eval_data`", align.eval_data),
        ("save_total_limit", "`--save_strategy`", config.save_strategy != "no"),
        ("logging_steps", "`--logging_strategy` steps", config.logging_strategy == "steps"),
        ("metric_for_best_model greater_is_better", "`--load_best_model_at_end`", best or plateau),
        (
            "gradient_checkpointing_kwargs",
            "`--gradient_checkpointing`",
            config.gradient_checkpointing,
        ),
        ("hub_*", "`--push_to_hub`", config.push_to_hub),
        (
            "optim_target_modules",
            "`--optim` galore or apollo",
            "galore" in config.optim or "apollo" in config.optim,
        ),
        ("trackio_*", "`--report_to` trackio", "trackio" in (config.report_to or ())),
        (
            "dataloader_prefetch_factor dataloader_persistent_workers",
            "`--dataloader_num_workers`",
            config.dataloader_num_workers,
        ),
        (
            "length_column_name",
            "`--train_sampling_strategy` group_by_length",
            config.train_sampling_strategy == "group_by_length",
        ),
        ("do_train do_eval do_predict", "to be left out", False),
        ("f_alpha_divergence_coef discopop_tau label_names", "to be left out", False),
        ("include_for_metrics batch_eval_metrics", "to be left out", False),
    ]
    own = config.without_effect().items()
    found = {name: f"`--{other}` {value}" for name, (other, value) in own if name in given}
    for patterns, needed, there in rules:
        if not there:
            for pattern in patterns.split():
                for name in fnmatch.filter(sorted(given - {"eval_data"}), pattern):
                    found.setdefault(name, needed)
    return found


def check_silenced(all_parsed: Sequence[Parsed]) -> None:
    """Raises `UsageError` for an option that was given and has no effect in any run.

    Args:
        all_parsed: The command lines of the runs.

    Raises:
        UsageError: There is such an option.
    """
    first, *others = (parsed.silenced for parsed in all_parsed)
    for name, needed in first.items():
        if all(name in other for other in others):
            raise UsageError(f"`--{name}` has no effect here: it needs {needed}.")
