"""A .gguf file -> a model that can be trained, and adapters that can be moved together with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

__all__ = ["find_base", "name_base", "unpack_gguf"]


def unpack_gguf(file: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Writes the model and the tokenizer of a .gguf file as float32 that can be trained and saved.

    transformers reads a .gguf file too, but it takes a while each time, and the result is marked as
    quantized: it can be neither trained nor saved. The folder is written once and loads fast.

    Args:
        file: The .gguf file.
        folder: The folder to write, for ``from_pretrained``. It must not exist; it is written whole
            or not at all.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: transformers cannot read the file: it is cut short, say, or of a model that
            transformers does not know.
        OSError: The folder cannot be written; nothing of it is left.

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
            f"`file` must be a whole .gguf file of a language model; got {str(file)!r}, which "
            f"can't be read ({type(error).__name__}: {error})."
        ) from error
    # The weights are dequantized by now, but what is marked as quantized is not trained or saved.
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
    """Lets adapters name a base model in or beside their folder by its path from there.

    peft saves the path that the base model was loaded from, which is wrong once both are moved.
    peft's loaders take a path as one from the working directory: `find_base` joins it to the
    folder. A base model elsewhere is named by its absolute path.

    Args:
        adapters: A folder with adapters, as peft saves them.
        base: The folder of the base model.

    Raises:
        FileNotFoundError: `adapters` holds none.

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
        # With a dot in front it can't be taken for a name on the hub.
        name = name if name.startswith(".") else f"./{name}"
    entries["base_model_name_or_path"] = name
    config.write_text(json.dumps(entries, indent=2 if len(entries) > 1 else None), encoding="utf-8")


def find_base(adapters: str | os.PathLike[str]) -> str:
    """Returns the base model that adapters name, by a path that is right in any working directory.

    Args:
        adapters: A folder with adapters, as peft or `name_base` left them.

    Returns:
        A path, or a name on the model hub.

    Raises:
        FileNotFoundError: `adapters` holds none.

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
