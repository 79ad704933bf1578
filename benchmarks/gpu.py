"""Does every path of the library run on a GPU, and what does a step cost there?

    make gpu            # or: python3 -m benchmarks.gpu

Takes the PyTorch that it finds, installs nothing, and needs NumPy and SciPy besides. It runs the
checks of `tests/gpu`, times a step against the floor and against TorchJD (where that is installed)
for 10 M, 100 M and 1,000 M parameters, and one pass for all weights. Each part has a process of its
own, and its result is in `benchmarks/results/gpu.json` as soon as it is there. The call ends after
8 minutes; another one goes on with the parts that did not run, or failed, or whose code changed.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
# Read when CUDA starts; cuBLAS needs it for deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

try:
    import torch

    from benchmarks.harness import (
        RESULTS,
        Died,
        Parser,
        UsageError,
        apart,
        environment,
        markdown_table,
        refusals_of,
        write_json,
    )
    from benchmarks.step_cost_cases import DENSE, FLOOR, GHOST, TORCHJD, WEIGHTED_SUM, Case
    from benchmarks.step_cost_measure import measure
    from tests.gpu import checks
except ImportError as error:
    sys.exit(
        f"benchmarks.gpu: {sys.executable} lacks what the library needs ({error}). Install it "
        f"there, or name another Python: make gpu PYTHON=..."
    )

OPTIONAL = {
    "torchjd": "TorchJD's two engines in the costs",
    "transformers": "one pass for all weights of a language model",
}
CANDIDATES = (FLOOR, WEIGHTED_SUM, DENSE, GHOST, "representation", *TORCHJD)
WIDTHS = {"10 M": 1024, "100 M": 3200, "1,000 M": 10240}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LOSSES = (2, 4, 8)
MINUTES = 8.0


class Part(NamedTuple):
    """A piece of work that has a process of its own."""

    name: str
    work: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    seconds: float
    """After which it is killed."""


def parts(device: str, *, quick: bool) -> list[Part]:
    """Returns all parts, the most important ones first."""
    found = [Part(f"checks: {g}", run_checks, (g, device), 150.0) for g in checks.CHECKS]
    for size, width in WIDTHS.items():
        for name in DTYPES:
            case = Case("MLP", 16 if quick else width, 10, 4 if quick else 512)
            arguments = (case, name, device, 0.0 if quick else 5.0)
            found.append(Part(f"cost: {size}, {name}", costs, arguments, 180.0))
    found.insert(len(checks.CHECKS) + 1, Part("one pass", one_pass, (device, quick), 120.0))
    return found


def run_checks(group: str, device: str) -> dict[str, Any]:
    """Runs a group of checks, each of which passes, fails or says why it is left out."""
    results = checks.run_group(group, device)
    failed = [n for n, x in results.items() if x != "passed" and not x.startswith("left out")]
    return {"failed": failed, "results": results}


def costs(case: Case, dtype: str, device: str, seconds: float) -> dict[str, Any]:
    """Measures a step for one size and precision; what does not fit is listed as left out."""
    rows = []
    for m in LOSSES:
        try:
            rows.append(measure(case, m, CANDIDATES, 0, seconds, device, DTYPES[dtype]))
        except torch.OutOfMemoryError as error:
            rows.append({"m": m, "candidates": {}, "left_out": {"all": str(error)[:300]}})
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"failed": [], "rows": rows}


def one_pass(device: str, quick: bool) -> dict[str, Any]:
    """Runs `benchmarks.one_pass`, which prints its figures; in full it writes its own JSON."""
    command = [sys.executable, "-m", "benchmarks.one_pass", "--device", device]
    done = subprocess.run(
        command + ["--quick"] * quick, cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    text = (done.stdout if done.returncode == 0 else done.stderr)[-6000:]
    return {"failed": ["one pass"] if done.returncode else [], "results": {"one pass": text}}


def code() -> str:
    """Names the state of the code that the results depend on."""
    folders = ("raco_optim/**", "tests/gpu", "benchmarks")
    files = [path for folder in folders for path in ROOT.glob(f"{folder}/*.py")]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(files))).hexdigest()[:12]


def machine(device: str) -> dict[str, Any]:
    """Describes machine and versions."""
    installed = [name for name in OPTIONAL if importlib.util.find_spec(name) is not None]
    found = environment(seed=0, packages=installed)
    del found["load"]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{torch.cuda.device_count()} x {properties.name}"
        found["gpu_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
    return found


def table(results: dict[str, Any]) -> str:
    """Renders what there is as markdown tables."""
    states, cost = [], []
    for name, part in results["parts"].items():
        shown = "; ".join(part.get("failed", [])) or str(part.get("why", ""))[-200:]
        states.append([name, part["status"], f"{part['seconds']:.0f}", " ".join(shown.split())])
        for row in part.get("rows", []):
            for candidate, x in row["candidates"].items():
                over = x.get("over_floor", {}).get("median")
                numbers = (1000 * x["seconds"]["median"], over, x["peak_gradients"])
                shown_numbers = ["" if n is None else f"{n:.2f}" for n in numbers]
                cost.append([name.removeprefix("cost: "), f"{row['m']}", candidate, *shown_numbers])
            for candidate, why in row["left_out"].items():
                cost.append([name.removeprefix("cost: "), f"{row['m']}", candidate, why, "", ""])
    head = ["parameters", "m", "candidate", "ms", "over floor", "peak, gradients"]
    return markdown_table(["part", "state", "s", ""], states) + "\n\n" + markdown_table(head, cost)


@refusals_of("gpu")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is left to run, writes the JSON after each part, and prints the tables."""
    started = time.monotonic()
    parser = Parser(prog="python -m benchmarks.gpu")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier calls")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args(arguments)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"PyTorch {torch.__version__} finds no GPU here. On the CPU: --device cpu --quick."
        )
    if options.output == RESULTS / "gpu.json" and (device == "cpu" or options.quick):
        raise UsageError("`--output` must be named with --device cpu or --quick.")
    for name, what in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            print(f"No {name} here: left out is what needs it, {what}.")
    here, now = machine(device), code()
    results: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "environment": here,
        "parts": {},
    }
    if options.output.exists() and not options.fresh:
        earlier = json.loads(options.output.read_text())
        same = ("gpu", "versions", "python")
        if all(earlier["environment"].get(key) == here.get(key) for key in same):
            results["parts"] = earlier["parts"]
    kept = {n: p for n, p in results["parts"].items() if p["status"] == "passed"}
    todo = [
        part
        for part in parts(device, quick=options.quick)
        if part.name not in kept or kept[part.name]["code"] != now
    ]
    before = {name: part["status"] for name, part in results["parts"].items()}
    todo.sort(key=lambda part: before.get(part.name) in ("failed", "died"))  # these come last
    for part in todo:
        begun = time.monotonic()
        left = 60 * options.minutes - (begun - started)
        if left < 15:
            why = "no time was left; another call goes on here"
            not_run = {"status": "not run", "seconds": 0.0, "why": why}
            results["parts"].setdefault(part.name, not_run)
            continue
        print(f"{part.name} ...", flush=True)
        try:
            found = apart(part.work, *part.arguments, seconds=min(part.seconds, left))
            found["status"] = "failed" if found["failed"] else "passed"
        except Died as error:
            found = {"status": "died", "why": str(error)}
        found |= {"seconds": time.monotonic() - begun, "code": now}
        results["parts"][part.name] = found
        print(f"  {found['status']} after {found['seconds']:.0f} s", flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, results)
    write_json(options.output, results)
    print(table(results))
    print(f"Written to {options.output}.")
    if any(part["status"] != "passed" for part in results["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
