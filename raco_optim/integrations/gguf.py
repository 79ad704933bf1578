"""A .gguf file -> a model that can be trained."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["unpack_gguf"]


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
        OSError, ValueError: transformers cannot read the file.

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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    # The weights are dequantized by now, but what is marked as quantized is not trained or saved.
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)
