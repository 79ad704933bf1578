"""The folder of a run: whose it is, where it stands, and from where it goes on."""

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
    """Starts a run in an empty folder, or recognises it; another run's folder is not touched.

    Args:
        folder: A folder that holds nothing, a run with the same settings, or one that never got as
            far as training.
        settings: All that decides what the run learns, as JSON holds it.
        about: What else to write down about a new run.

    Returns:
        What is known of the run: ``status`` ("prepared", "training" or "finished"), ``settings``,
        what `about` says and, when it is finished, ``result``.

    Raises:
        UsageError: The folder holds another run or other files.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.cli.runs import open_run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     open_run(pathlib.Path(folder), {"seed": 0}, {"data": "pairs.jsonl"})
        {'status': 'prepared', 'data': 'pairs.jsonl', 'settings': {'seed': 0}}
    """
    choose = "Choose another `--output_dir`."
    present = {path.name for path in folder.iterdir()} - {f".{RUN_FILE}.part"}
    if present and RUN_FILE not in present:
        some = ", ".join(sorted(present)[:3])
        raise UsageError(f"{folder} holds files of something else ({some}). {choose}")
    if present:
        run = _read(folder / RUN_FILE, choose)
        found = run["settings"]
        differing = [n for n in {**found, **settings} if found.get(n) != settings.get(n)]
        if not differing:
            return run
        if run["status"] != "prepared":
            what = ", ".join(
                f"{name} is {found.get(name)!r} there and {settings.get(name)!r} here"
                for name in differing
            )
            raise UsageError(f"{folder} holds another run: {what}. {choose}")
    return save_run(folder, {"status": "prepared", **about, "settings": dict(settings)})


def save_run(folder: Path, run: Mapping[str, Any], **changes: object) -> dict[str, Any]:
    """Writes down where a run stands.

    Args:
        folder: The folder of the run.
        run: What `open_run` returned.
        **changes: Entries of it that are new.

    Returns:
        The run with the changes.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.cli.runs import open_run, save_run
        >>> result = {"evaluation": {}, "training": {"steps": 4}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = open_run(pathlib.Path(folder), {}, {})
        ...     _ = save_run(pathlib.Path(folder), run, status="finished", result=result)
        ...     open_run(pathlib.Path(folder), {}, {})["result"] == result
        True
    """
    changed = {**run, **changes}
    write_atomically(folder / RUN_FILE, json.dumps(changed, indent=1) + "\n")
    return changed


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the last whole checkpoint of a run, or None.

    One that lacks a file, or has a file that was cut short, is renamed, and that is said, so that
    nobody resumes from it and nothing is lost.

    Args:
        folder: The folder of the run.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.cli.runs import last_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     last_checkpoint(pathlib.Path(folder)) is None
        True
    """
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
        sys.stderr.write(f"{path} is not whole: passed over, and kept as {aside.name}.\n")
    return None


def _read(path: Path, choose: str) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({one_line(error)}). {choose}") from error
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
                with safe_open(path, "pt"):  # compares the size with the header
                    pass
            elif path.suffix in (".bin", ".pt", ".pth") and zipfile.ZipFile(path).testzip():
                return False
    except Exception:  # every reader has its own kinds
        return False
    # Without them the Trainer would go on, from an optimizer that knows nothing.
    has_weights = any(name.endswith(".safetensors") for name in names)
    return {"optimizer.pt", "scheduler.pt"} <= names and has_weights


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"incomplete-{i}-{path.name}") for i in range(1, sys.maxsize))
    return next(name for name in names if not name.exists())
