"""The folder of a run: whose it is, where it stands, and from where it goes on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raco_optim.cli.errors import UsageError
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
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = open_run(pathlib.Path(folder), {}, {})
        ...     _ = save_run(pathlib.Path(folder), run, status="finished", result={"loss": 0.5})
        ...     open_run(pathlib.Path(folder), {}, {})["result"]
        {'loss': 0.5}
    """
    changed = {**run, **changes}
    write_atomically(folder / RUN_FILE, json.dumps(changed, indent=1) + "\n")
    return changed


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the last complete checkpoint of a run, or None.

    The Trainer writes ``trainer_state.json`` last, so a folder without a readable one was cut
    short. It is renamed, and that is said, so that nobody resumes from it and nothing is lost.

    Args:
        folder: The folder of the run.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.cli.runs import last_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     last_checkpoint(pathlib.Path(folder)) is None
        True
    """
    complete: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        number = path.is_dir() and _CHECKPOINT.fullmatch(path.name)
        if number and _is_complete(path):
            complete[int(number[1])] = path
        elif number:
            aside = _free_name(path)
            path.rename(aside)
            sys.stderr.write(f"{path} was cut short: passed over, and kept as {aside.name}.\n")
    return complete[max(complete)] if complete else None


def _read(path: Path, choose: str) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}). {choose}") from error
    if (
        not isinstance(run, dict)
        or not isinstance(run.get("settings"), dict)
        or "status" not in run
    ):
        raise UsageError(f"{path} does not describe a run. {choose}")
    return run


def _is_complete(checkpoint: Path) -> bool:
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"incomplete-{i}-{path.name}") for i in range(1, sys.maxsize))
    return next(name for name in names if not name.exists())
