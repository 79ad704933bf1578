"""The command line of a training run -> dataclasses, by the parser that TRL's own commands use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raco_optim.cli.errors import OneLineErrors, UsageError, needs_extra, refusals
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
)


@dataclass
class AlignArguments:
    """What to train, and on what.

    Attributes:
        model: A folder with a model and its tokenizer, a .gguf file, or a name on the model hub.
        data: Preference pairs to train on.
        eval_data: Preference pairs to evaluate on, or None.

    Example:
        >>> from raco_optim.cli.arguments import AlignArguments
        >>> AlignArguments("model", "pairs.jsonl").eval_data is None
        True
    """

    model: str = field(
        metadata={"help": "A folder with a model and its tokenizer, a .gguf file, or a hub name."}
    )
    data: str = field(
        metadata={
            "help": "Pairs to train on (.jsonl, .json, .csv, .parquet) with the columns prompt, if "
            "there is one, chosen, rejected and pref_<objective>, which holds +1, -1, 0 or null."
        }
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Pairs to evaluate on when the training is over."}
    )


@dataclass(frozen=True)
class Parsed:
    """A parsed command line.

    Attributes:
        align: Model and data.
        config: Fields of `MultiObjectiveDPOConfig`.
        model: Fields of TRL's `ModelConfig`.
    """

    align: AlignArguments
    config: MultiObjectiveDPOConfig
    model: ModelConfig

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
    """Parses a command line of `raco-optim align`, with a YAML file by ``--config`` as TRL has it.

    Where neither says otherwise, bfloat16 is used on a GPU that has it and gradient checkpointing
    and pinned memory on a GPU; TRL's defaults are all three, everywhere.

    Args:
        arguments: What follows the command.
        command: The command, for its help.

    Raises:
        UsageError: An argument is unknown, missing or out of its range, the YAML file cannot be
            read, or TRL is not installed.

    Example:
        >>> from raco_optim.cli.arguments import parse
        >>> parse(["--model", "model", "--data", "pairs.jsonl"], "raco-optim align")
        Traceback (most recent call last):
        raco_optim.cli.errors.UsageError: the arguments: `weights` must be a mapping ...
    """
    with needs_extra("align", "trl", "transformers", "datasets", "peft", "accelerate"):
        import torch
        import yaml
        from trl import ModelConfig, TrlParser

        from raco_optim.integrations.trl import MultiObjectiveDPOConfig

    class Parser(TrlParser):  # type: ignore[misc]  # TRL is not type-checked
        error = OneLineErrors.error

    parser = Parser(
        (AlignArguments, MultiObjectiveDPOConfig, ModelConfig), prog=command, allow_abbrev=False
    )
    gpu = torch.cuda.is_available()
    parser.set_defaults(
        bf16=gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        gradient_checkpointing=gpu or None,
        dataloader_pin_memory=gpu,
    )
    with (
        refusals("the arguments", ValueError),
        refusals("`--config` must be a YAML file that can be read", OSError, yaml.YAMLError),
    ):
        align, config, model, unknown = parser.parse_args_and_config(
            list(arguments), return_remaining_strings=True
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
    return Parsed(align, config, model)
