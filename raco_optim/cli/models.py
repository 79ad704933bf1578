"""The model that `--model` names, as something that TRL can load."""

from __future__ import annotations

from pathlib import Path

from raco_optim.cli.errors import UsageError, needs_extra, refusals
from raco_optim.cli.files import sha256
from raco_optim.integrations.gguf import unpack_gguf


def loadable_model(name: str, folder: Path) -> str:
    """Returns a folder or a name that ``from_pretrained`` takes.

    A .gguf file is unpacked to float32, once: it takes a while to read, and what was read from one
    can be neither trained nor saved as it is.

    Args:
        name: A folder with a model and its tokenizer, a .gguf file, or a name on the model hub.
        folder: Where to unpack a .gguf file.

    Returns:
        `name`, or the folder in `folder`.

    Raises:
        UsageError: There is no such file, or it cannot be read.

    Example:
        >>> from pathlib import Path
        >>> from raco_optim.cli.models import loadable_model
        >>> loadable_model("missing.gguf", Path("unpacked"))
        Traceback (most recent call last):
        raco_optim.cli.errors.UsageError: `--model` must be a model; got missing.gguf, which is no \
file.
    """
    file = Path(name)
    if file.suffix == ".gguf" and not file.is_file():
        raise UsageError(f"`--model` must be a model; got {name}, which is no file.")
    if (file.is_absolute() or name.startswith(".")) and not file.exists():
        raise UsageError(f"`--model` must be a model; got {name}, which is no folder.")
    if file.suffix != ".gguf":
        return name
    unpacked = folder / f"base_model-{sha256(file)[:12]}"
    if not unpacked.is_dir():
        with needs_extra("align", "gguf"):
            import gguf  # noqa: F401  # transformers would report it in many lines
        with refusals(f"`--model` {name} cannot be read", OSError, ValueError):
            unpack_gguf(file, unpacked)
    return str(unpacked)
