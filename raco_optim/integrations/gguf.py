"""Makes a .gguf file trainable, and adapters that can move together with their base model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

__all__ = ["find_base", "name_base", "unpack_gguf"]


def unpack_gguf(file: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Converts a .gguf file to a model folder in float32 that can be trained and saved.

    transformers reads .gguf files too, but slowly, and marks the model as quantized, which can
    be neither trained nor saved.

    Args:
        file: The .gguf file of a language model and its tokenizer.
        folder: The folder to write, for ``from_pretrained``. It must not exist. An error leaves no
            partial folder.

    Raises:
        FileNotFoundError: `file` does not exist.
        ValueError: transformers can't read the file, for example because it is truncated or
            transformers does not know the model.
        OSError: The folder can't be written.

    Example:
        >>> from raco_optim.integrations.gguf import unpack_gguf
        >>> unpack_gguf("missing.gguf", "unpacked")
        Traceback (most recent call last):
        FileNotFoundError: `file` must be a .gguf file; got 'missing.gguf', which does not exist.
    """
    file, folder = Path(file), Path(folder)
    if not file.is_file():
        raise FileNotFoundError(
            f"`file` must be a .gguf file; got {str(file)!r}, which does not exist."
        )
    import gguf  # noqa: F401  # transformers reports it in many lines
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    except Exception as error:  # the reader has many kinds
        raise ValueError(
            f"`file` must be a complete .gguf file of a language model; got {str(file)!r}, which "
            f"can't be read ({type(error).__name__}: {error})."
        ) from error
    # The weights are dequantized by now; transformers refuses to save while these marks remain.
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def name_base(adapters: str | os.PathLike[str], base: str | os.PathLike[str]) -> None:
    """Rewrites the base model's path in saved adapters so that both can be moved together.

    peft saves the path that it loaded the base model from, which is wrong after a move. This
    function replaces it with a path relative to the adapters if the base model is in or beside
    their folder, and with an absolute path otherwise. `find_base` resolves it; peft itself
    resolves relative paths from the working directory.

    Args:
        adapters: A folder with adapters saved by peft.
        base: The folder of the base model.

    Raises:
        FileNotFoundError: `adapters` holds no ``adapter_config.json``.

    Example:
        >>> import json, pathlib, tempfile
        >>> from raco_optim.integrations.gguf import name_base
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = pathlib.Path(folder, "adapter_config.json")
        ...     _ = config.write_text('{"base_model_name_or_path": "runs/3/base_model"}')
        ...     name_base(folder, pathlib.Path(folder, "base_model"))
        ...     config.read_text()
        '{"base_model_name_or_path": "./base_model"}'
    """
    config = Path(adapters, "adapter_config.json")
    entries = json.loads(config.read_text(encoding="utf-8"))
    folder, base = Path(adapters).resolve(), Path(base).resolve()
    name = base.as_posix()
    if base.is_relative_to(folder.parent):
        name = Path(os.path.relpath(base, folder)).as_posix()
        # The leading dot tells a path from a name on the hub.
        name = name if name.startswith(".") else f"./{name}"
    entries["base_model_name_or_path"] = name
    config.write_text(json.dumps(entries, indent=2 if len(entries) > 1 else None), encoding="utf-8")


def find_base(adapters: str | os.PathLike[str]) -> str:
    """Returns the base model of saved adapters, as a path valid in any working directory.

    Args:
        adapters: A folder with adapters saved by peft, with or without `name_base`.

    Returns:
        An absolute path, or a name on the model hub.

    Raises:
        FileNotFoundError: `adapters` holds no ``adapter_config.json``.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.integrations.gguf import find_base
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = pathlib.Path(folder, "adapter_config.json")
        ...     _ = config.write_text('{"base_model_name_or_path": "a/model"}')
        ...     find_base(folder)
        'a/model'
    """
    entries = json.loads(Path(adapters, "adapter_config.json").read_text(encoding="utf-8"))
    name = str(entries["base_model_name_or_path"])
    beside = Path(adapters, name).resolve()
    return str(beside) if beside.is_dir() else name
