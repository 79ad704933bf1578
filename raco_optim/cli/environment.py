"""Versions and machine of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any, Literal

PACKAGES = ("raco_optim", "torch", "transformers", "trl", "peft", "datasets")


def version_of(package: str) -> str | None:
    """Returns the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ask_hub(name: str, kind: Literal["model", "dataset"]) -> None:
    """Raises the hub's error if it lacks a repository; the loaders would retry for a minute."""
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=10)


def environment() -> dict[str, Any]:
    """Describes the environment of a result: versions, platform, cores and device."""
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
