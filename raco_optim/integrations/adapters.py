"""Adapters that were trained before -> a model that is trained further."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl.trainer.utils import create_model_from_path

from raco_optim.integrations.gguf import find_base

if TYPE_CHECKING:
    from trl import DPOConfig


def load(
    name: str,
    args: DPOConfig,
    quantization: Any,  # noqa: ANN401  # here and below: whatever TRL takes
    tokenizer: Any,  # noqa: ANN401
) -> tuple[Any, Any]:
    """Loads the model that adapters belong to, with them, as TRL loads models.

    Args:
        name: A folder of adapters, as peft saves them, or their name on the hub.
        args: Settings of TRL, with those for the model.
        quantization: How to quantize the model, or None.
        tokenizer: That of the user; None for the one beside the adapters, if there is one.

    Returns:
        The model with trainable adapters, and the tokenizer.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    options = dict(args.model_init_kwargs or {})
    revision = options.pop("revision", None)  # that of the adapters
    if quantization is not None:
        options["quantization_config"] = quantization
    if args.distributed_state.distributed_type == "MULTI_GPU":
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    config = PeftConfig.from_pretrained(name, revision=revision)
    path = find_base(name) if Path(name).is_dir() else config.base_model_name_or_path
    base = create_model_from_path(path, revision=config.revision or "main", **options)
    if quantization is not None:
        from peft import prepare_model_for_kbit_training

        base = prepare_model_for_kbit_training(base)
    model = PeftModel.from_pretrained(
        base, name, is_trainable=True, revision=revision, config=config
    )
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        except (OSError, ValueError):  # there is none: TRL takes that of the model
            tokenizer = None
    return model, tokenizer


def is_folder_of_adapters(name: Any, revision: str | None = None) -> bool:  # noqa: ANN401
    """Whether a model is named by adapters that peft saved."""
    from transformers.utils.peft_utils import find_adapter_config_file

    return isinstance(name, str) and find_adapter_config_file(name, revision=revision) is not None
