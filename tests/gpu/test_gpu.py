"""The checks of `make gpu`, on a GPU where there is one, on the CPU and on a simulated device.

The simulated device has the rules of a GPU and the values of a CPU: placement, and what makes the
host wait, are tested without a GPU. It is for a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.harness import Died
from benchmarks.step_cost_cases import Case, make
from tests.gpu import checks

ROOT = Path(__file__).parents[2]
SIMULATED = """
import json, torch
torch.set_num_threads(1)
from tests.gpu import checks, simulated
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
HERE = [(g, n) for g in checks.CHECKS for n in checks.CHECKS[g] if g != "distributed"]
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
    found = {part.name for part in gpu.parts("cuda", quick=False)}
    assert found >= {f"checks: {group}" for group in checks.CHECKS} | {"one pass"}
    assert {f"cost: {n} M, {d}" for n in ("10", "100", "1,000") for d in gpu.DTYPES} <= found
    for name, width in gpu.WIDTHS.items():
        with torch.device("meta"):
            model, _ = make(Case("MLP", width, 10, 4), 2, 0, "meta")
        n = sum(p.numel() for p in model.parameters())
        assert n / 1e6 == pytest.approx(float(name.split()[0].replace(",", "")), rel=0.1)
