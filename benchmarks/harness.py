"""What the benchmarks share: command lines, timing, processes, tables, results as JSON.

Candidates are timed in turn, in an order that changes from round to round: a noisy machine then
disturbs all of them alike, and their ratio outlives what a second run would change. What counts
is the CPU time of the process, which other processes don't share.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch

from raco_optim.cli import UsageError

RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).parent.parent


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `UsageError`, which `refusals_of` prints as one line."""

    def error(self, message: str) -> NoReturn:
        """Raises `UsageError` with the message and where to read on."""
        raise UsageError(f"{message}. See `{self.prog} --help`.")


@contextlib.contextmanager
def refusals_of(program: str) -> Iterator[None]:
    """Ends the program with one line and exit code 2 where what was asked cannot be done."""
    try:
        yield
    except UsageError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def environment(*, seed: int | None = None, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Describes what a result depends on beside the code: versions, commit, machine, seed."""
    names = ("torch", "numpy", "scipy", *packages)
    return {
        "commit": commit(),
        "seed": seed,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """Names the commit that is checked out, with `-dirty` where a tracked file differs from it."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True)
        except FileNotFoundError:  # no git here
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "--short=12", "HEAD")
    # A result that this run overwrites is no change of what was measured.
    changed = git("status", "--porcelain", "--", ".", f":!{RESULTS.relative_to(_ROOT)}")
    return f"{name}-dirty" if name and changed else name or "unknown"


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    burst: float = 0.0,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Times the candidates in turn; returns `repeats` values of seconds per call for each.

    With a `burst`, a candidate is called again and again for so many seconds when its turn comes,
    as in a loop that does nothing else; the value is the mean. With 0 it is called once, and finds
    the caches as the others left them, as a call does that has its turn once in a training step.
    """
    names = list(candidates)
    calls = {}
    for name in names:
        candidates[name]()
        calls[name] = max(1, round(burst / max(_time(candidates[name], 1, clock), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()  # never within a call
    try:
        for round_ in range(repeats):
            shift = round_ % len(names)
            for name in names[shift:] + names[:shift]:
                seconds[name].append(_time(candidates[name], calls[name], clock))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return seconds


def clock_of(device: str) -> Callable[[], float]:
    """Returns a clock: CPU time of this process, or the time once the accelerator has finished."""
    if device == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def _time(call: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


class Died(RuntimeError):
    """Work in another process gave no result; the message says why."""


def apart(work: Callable[..., Any], *args: Any, seconds: float) -> Any:  # noqa: ANN401
    """Returns ``work(*args)``, called in a new process, which ends with all that it started.

    `Died` is raised if it is killed (for memory, say), takes longer than `seconds`, or raises.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, work, args))
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            raise Died(f"it took longer than {seconds:.0f} s")
        ok, result = here.recv()
    except EOFError:
        process.join()
        raise Died(f"its process ended with code {process.exitcode}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):  # before it has a group of its own
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    if not ok:
        raise Died(result)
    return result


def _send(pipe: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.setsid()
    try:
        pipe.send((True, work(*args)))
    except Exception:
        pipe.send((False, traceback.format_exc(limit=-3)))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns the median, the quartiles and the number of the values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower_quartile": low, "upper_quartile": high, "n": len(values)}


def check_device(device: str) -> None:
    """Raises `UsageError` if ``"cuda"`` is asked for and there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"PyTorch {torch.__version__} finds no GPU here. On the CPU: --device cpu --quick."
        )


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder and those above it; `UsageError` names the option if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"`{option}` must be a folder to write to; got {folder} ({error.strerror})."
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file: a process that is killed leaves the old text or the new one."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Writes results, whole."""
    write_whole(path, json.dumps(results, indent=1) + "\n")


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Writes `benchmarks/results/<name>.json` and returns its path."""
    path = RESULTS / f"{name}.json"
    write_json(path, results)
    return path


def filled(page: str, blocks: Iterable[tuple[str, str]]) -> str:
    """The page with the text between `<!-- table NAME -->` and `<!-- end -->` made anew."""
    for name, block in blocks:
        pattern = rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)"
        page = re.sub(pattern, lambda m, text=block: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.S)
    return page


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """Returns a table; the first `text` columns to the left, numbers to the right."""
    lines = [head, [*["---"] * text, *["---:"] * (len(head) - text)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
