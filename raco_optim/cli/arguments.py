"""The command line of a training run as dataclasses, with the parser of transformers."""

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
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from raco_optim.cli.errors import OneLineErrors, UsageError, refusals
from raco_optim.distributed.group import launched_world_size

if TYPE_CHECKING:
    from trl import ModelConfig

    from raco_optim.integrations.trl import MultiObjectiveDPOConfig

# Settings that do not affect the result.
_WITHOUT_EFFECT = (
    "disable_tqdm",
    "model_name_or_path",
    "output_dir",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_total_limit",
)

# The options that `--help` shows besides `AlignArguments`.
_MAIN = {
    "weights": "objectives and their weights, as helpful=0.7,harmless=0.3; they sum to 1",
    "output_dir": "folder for the result; the same command again resumes there",
    "method": "how to combine the objectives: raco, cagrad, mgda, linear, amopo or modpo",
    "c": "radius of the correction of raco and cagrad",
    "beta": "strength of the pull towards the reference model",
    "loss_type": "loss of each objective: sigmoid (DPO), sigmoid_norm, ipo, simpo, kto_pair, ...",
    "learning_rate": "learning rate",
    "num_train_epochs": "passes over the data",
    "max_steps": "number of updates, instead of passes over the data",
    "per_device_train_batch_size": "pairs in a batch",
    "gradient_accumulation_steps": "batches in an update",
    "max_length": "maximal length of prompt and answer together, in tokens",
    "seed": "random seed",
    "use_peft": "train LoRA adapters instead of the whole model",
    "lora_r": "rank of the adapters",
    "lora_target_modules": "layers that get adapters, such as all-linear",
    "save_steps": "updates between checkpoints",
    "save_total_limit": "number of checkpoints to keep",
    "dtype": "number format of the model, such as bfloat16",
    "report_to": "where to log, such as tensorboard or wandb",
}

# Option -> least value.
_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("gradient_accumulation_steps", "max_length", "lora_r"), 1),
    **dict.fromkeys(("save_total_limit", "save_steps", "logging_steps", "eval_steps"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"), 0),
    **dict.fromkeys(("seed", "data_seed", "lora_dropout", "dataloader_num_workers"), 0),
}


@dataclass
class AlignArguments:
    """The model to train and its data: options that TRL does not have."""

    model: str = field(
        metadata={"help": "A folder with a model and its tokenizer, a .gguf file, or a hub name."}
    )
    data: list[str] = field(
        metadata={
            "help": "Pairs to train on: .jsonl, .json, .csv or .parquet files, folders or hub "
            "names (a=0.7 b=0.3 mixes two), with the columns chosen, rejected, optionally prompt, "
            "and pref_<objective> in [-1, 1] or null. `raco-optim data` makes such files."
        }
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Pairs to evaluate on after the training."}
    )


@dataclass(frozen=True)
class Parsed:
    """A parsed command line.

    Attributes:
        align: Model and data.
        config: Fields of `MultiObjectiveDPOConfig`.
        model: Fields of TRL's `ModelConfig`.
        silenced: Given options without effect -> the settings that they need.
    """

    align: AlignArguments
    config: MultiObjectiveDPOConfig
    model: ModelConfig
    silenced: dict[str, str]

    def settings(self, hashes: dict[str, str | None]) -> dict[str, Any]:
        """Returns all settings that affect the result, as JSON values; `hashes` are the data's."""
        training = json.loads(self.config.to_json_string())
        model = dataclasses.asdict(self.model)
        both = {"model": self.align.model, **hashes, **model, **training}
        if launched_world_size() > 1:  # the batch size is per process
            both["processes"] = launched_world_size()
        return {name: value for name, value in both.items() if name not in _WITHOUT_EFFECT}


def parse(arguments: Sequence[str], command: str) -> Parsed:
    """Parses a command line of `raco-optim align`; ``--config`` names a YAML file with options.

    Three defaults differ from TRL's: bfloat16 on a GPU that supports it, gradient checkpointing
    and pinned memory on a GPU only, and two checkpoints instead of all.
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
    hints = get_type_hints(MultiObjectiveDPOConfig)
    for action in parser._actions:
        kinds = get_args(hints.get(action.dest))
        if action.dest in MultiObjectiveDPOConfig._VALID_DICT_FIELDS:
            action.type = _mapping
        elif str in kinds and (bool in kinds or Literal[False] in kinds or action.const is True):
            action.type = _switch_or_text
        elif str in kinds and list[str] in kinds:
            action.nargs = "+"
    with refusals("the arguments"):
        align, config, model, unknown = parser.parse_args_into_dataclasses(
            given, return_remaining_strings=True, look_for_args_file=False
        )
    if unknown:
        parser.error(f"there is no {unknown[0]}")
    if isinstance(config.optim_target_modules, list) and len(config.optim_target_modules) == 1:
        [config.optim_target_modules] = config.optim_target_modules  # a pattern, or all-linear
    if model.model_name_or_path is not None:
        raise UsageError("`--model_name_or_path` must be left out. Use `--model`.")
    if config.resume_from_checkpoint is not None or config.save_only_model:
        raise UsageError(
            "`--resume_from_checkpoint` and `--save_only_model` must be left out. Run the same "
            "command again to resume from its last complete checkpoint."
        )
    _check_numbers({**vars(model), **vars(config)})
    names = {option_name(argument) for argument in given if argument.startswith("--")}
    return Parsed(align, config, model, _silenced(names, align, config, model))


class _ShortHelp(argparse.Action):
    """Prints the most important options."""

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
        lines += [f"  --{'config':29} a YAML file with options, one `name: value` per line"]
        lines += ["", "`--help-all` lists all options, including those of TRL and transformers."]
        parser._print_message("\n".join(lines) + "\n", sys.stdout)
        parser.exit()


def _from_yaml(path: str | None) -> list[str]:
    """Returns the options of a YAML file as arguments, so the parser checks them all."""
    if path is None:
        return []
    import yaml

    with refusals("`--config` must be a readable YAML file"):
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
    """Checks a value that transformers parses as a mapping, or as a file with one."""
    try:
        if Path(text).is_file() or isinstance(json.loads(text), dict):
            return text
    except (ValueError, OSError, RecursionError):
        pass
    raise argparse.ArgumentTypeError(f"must be a mapping, such as '{{\"a\": 1}}'; got {text!r:.60}")


def _switch_or_text(text: str) -> bool | str:
    """Returns True or False for the words for them, as for options that are nothing else."""
    from transformers.hf_argparser import string_to_bool

    try:
        return bool(string_to_bool(text))
    except argparse.ArgumentTypeError:
        return text


def option_name(argument: str) -> str:
    """Returns the field that an option sets: ``--no_some-field=x`` -> ``some_field``."""
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
    """Returns the given options without effect, with the settings that they need."""
    best = config.load_best_model_at_end or config.save_strategy == "best"
    plateau = config.lr_scheduler_type == "reduce_lr_on_plateau"
    # Options (* stands for any ending), the setting that they need, and whether it is given.
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
    """Raises `UsageError` for a given option that has no effect in any run."""
    first, *others = (parsed.silenced for parsed in all_parsed)
    for name, needed in first.items():
        if all(name in other for other in others):
            raise UsageError(f"`--{name}` has no effect here: it needs {needed}. Leave it out.")
