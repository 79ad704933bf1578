"""The folder of a run: its settings, its state, and its checkpoints."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raco_optim.cli.errors import UsageError, one_line
from raco_optim.cli.files import write_atomically

RUN_FILE = "raco_run.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def open_run(folder: Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Starts a run in an empty folder, or recognises a run with the same settings.

    A folder whose run never reached training may be taken over; anything else is refused.

    Args:
        folder: An existing folder.
        settings: All settings that affect the result, as JSON values.
        about: Other entries for a new run.

    Returns:
        The run: ``status`` ("prepared", "training" or "finished"), ``settings``, the entries of
        `about` and, if finished, ``result``.
    """
    choose = "Choose another `--output_dir`."
    present = {path.name for path in folder.iterdir()} - {f".{RUN_FILE}.part"}
    if present and RUN_FILE not in present:
        some = ", ".join(sorted(present)[:3])
        raise UsageError(f"{folder} holds other files ({some}). {choose}")
    if present:
        run = _read(folder / RUN_FILE, choose)
        found = run["settings"]
        differing = [n for n in {**found, **settings} if found.get(n) != settings.get(n)]
        if not differing:
            return run
        if run["status"] != "prepared":
            what = ", ".join(
                f"{name} was {found.get(name)!r} and is now {settings.get(name)!r}"
                for name in differing
            )
            raise UsageError(f"{folder} holds another run: {what}. {choose}")
    return save_run(folder, {"status": "prepared", **about, "settings": dict(settings)})


def save_run(folder: Path, run: Mapping[str, Any], **changes: object) -> dict[str, Any]:
    """Writes the run with the given changes to its folder, and returns it."""
    changed = {**run, **changes}
    write_atomically(folder / RUN_FILE, json.dumps(changed, indent=1) + "\n")
    return changed


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the last complete checkpoint, or None; renames incomplete ones."""
    found = {
        int(number[1]): path
        for path in folder.iterdir()
        if path.is_dir() and (number := _CHECKPOINT.fullmatch(path.name))
    }
    for _, path in sorted(found.items(), reverse=True):
        if _is_whole(path):
            return path
        aside = _free_name(path)
        path.rename(aside)
        sys.stderr.write(f"{path} is incomplete; renamed to {aside.name}.\n")
    return None


def _read(path: Path, choose: str) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} can't be read ({one_line(error)}). {choose}") from error
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict) or not _stands(run):
        raise UsageError(f"{path} does not describe a run. {choose}")
    return run


def _stands(run: dict[str, Any]) -> bool:
    if run.get("status") != "finished":
        return run.get("status") in ("prepared", "training")
    result = run.get("result")
    return isinstance(result, dict) and all(
        isinstance(result.get(part), dict) for part in ("evaluation", "training")
    )


def _is_whole(checkpoint: Path) -> bool:
    from safetensors import safe_open

    try:
        json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        names = {path.name for path in checkpoint.iterdir()}
        for index in checkpoint.glob("*.index.json"):
            if not set(json.loads(index.read_text())["weight_map"].values()) <= names:
                return False
        for path in checkpoint.iterdir():
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # checks the size
                    pass
            elif path.suffix in (".bin", ".pt", ".pth") and zipfile.ZipFile(path).testzip():
                return False
    except Exception:  # the readers raise many kinds
        return False
    # Without these files the Trainer would silently resume with a new optimizer.
    has_weights = any(name.endswith(".safetensors") for name in names)
    return {"optimizer.pt", "scheduler.pt"} <= names and has_weights


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"incomplete-{i}-{path.name}") for i in range(1, sys.maxsize))
    return next(name for name in names if not name.exists())
