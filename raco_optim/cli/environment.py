"""Where a run took place: versions and machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any, Literal

PACKAGES = ("raco_optim", "torch", "transformers", "trl", "peft", "datasets")


def version_of(package: str) -> str | None:
    """Returns the version of an installed distribution, or None.

    Args:
        package: Name of the distribution, as for pip.

    Example:
        >>> from raco_optim.cli.environment import version_of
        >>> version_of("no such package") is None
        True
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ask_hub(name: str, kind: Literal["model", "dataset"]) -> None:
    """Raises what the model hub answers if it lacks a repository, or is not to be reached.

    The loaders would try for a minute, and print each failure. Nothing is asked offline, where one
    error says so.

    Args:
        name: Of the repository.
        kind: What it is to hold.
    """
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=10)


def environment() -> dict[str, Any]:
    """Describes what a result depends on beside its settings; nothing is imported for it.

    Returns:
        Versions of Python and of the packages that are installed, platform, cores and, on CUDA,
        the device: what JSON can hold.

    Example:
        >>> from raco_optim.cli.environment import environment
        >>> sorted(environment())
        ['cores', 'device', 'packages', 'platform', 'python']
    """
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
