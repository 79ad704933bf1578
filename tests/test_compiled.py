"""A whole train step under `torch.compile`: `backward` and its solver stay outside the graphs.

Dynamo would specialise on the values of the Gram matrix, and compile anew in every step.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from raco_optim import MGDA, CAGradClip

ROOT = Path(__file__).parents[1]
SCALES = (1e-2, 1, 1e2)  # of the data: other Gram matrices, p inside the simplex and at its corners
CASES = {
    "CAGradClip, m = 2": (2, {}),
    "CAGradClip, m = 3, AdamW": (3, {}),
    "named, m = 2": (2, {"c": 0.7}),
    "MGDA, m = 3": (3, {}),
    "ghost, m = 2": (2, {"gradients": "ghost"}),
    "outside, m = 3": (3, {}),
}


def run(case, compiled):
    """How many graphs there are after each step, the coefficients, and the parameters."""
    from torch._dynamo.backends.registry import lookup_backend

    torch._dynamo.reset()
    torch.manual_seed(0)
    m, options = CASES[case]
    names = [f"loss_{i}" for i in range(m)]
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, m))
    kind = torch.optim.AdamW if "AdamW" in case else torch.optim.SGD  # its momentum adds a graph
    inner = kind(model.parameters(), lr=0.01)
    weights = dict.fromkeys(names, 1 / m) if "named" in case else [1 / m] * m
    opt = MGDA(inner) if "MGDA" in case else CAGradClip(inner, weights, **options)
    graphs = 0

    def backend(module, inputs):
        nonlocal graphs
        graphs += 1
        return lookup_backend("aot_eager")(module, inputs)

    def train_step(x):
        opt.zero_grad()
        out = model(x)
        losses = [(out[:, i] - i).square().mean() for i in range(m)]
        opt.backward(dict(zip(names, losses, strict=True)) if "named" in case else losses)
        if "outside" not in case:
            opt.step()

    step = torch.compile(train_step, backend=backend) if compiled else train_step
    counts, alphas = [], []
    for k, scale in enumerate(SCALES):
        step(torch.randn(8, 4, generator=torch.Generator().manual_seed(k)) * scale)
        if "outside" in case:
            opt.step()
        counts.append(graphs)
        alphas.append(opt.report.coefficients.tolist())
    return counts, alphas, torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def in_a_fresh_process(code):
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


@pytest.fixture(scope="module")
def found():
    """In a fresh process: Dynamo's caches and warnings are those of a process."""
    code = (
        "import json; from tests.test_compiled import *\n"
        "print(json.dumps({case: run(case, True) for case in CASES}))"
    )
    return json.loads(in_a_fresh_process(code))


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_is_the_step_and_is_compiled_once(found, case):
    """One graph for the forward pass, one for the inner step; none is added by later data."""
    counts, alphas, weights = found[case]
    assert counts == [1 if "outside" in case else 2] * len(SCALES)
    _, expected_alphas, expected = run(case, False)
    for alpha, witness in zip(alphas, expected_alphas, strict=True):
        assert alpha == pytest.approx(witness, rel=1e-3, abs=1e-5)
    assert weights == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert len({tuple(alpha) for alpha in alphas}) > 1, "steps differ"


# --- Donated buffers -----------------------------------------------------------------------------

WHERE = ["docs/recipes.md", "raco_optim/gradients/explain.py"]


def test_the_remedy_for_donated_buffers_is_complete_wherever_it_stands():
    found = []
    for folder in ("docs", "raco_optim", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in (".py", ".md", ".rst") or "_build" in path.parts:
                continue
            text = " ".join(path.read_text().replace('"', " ").split())
            places = [m.start() for m in re.finditer(r"donated_buffer = False", text)]
            found += [str(path.relative_to(ROOT))] * bool(places)
            for place in places:
                assert "`import torch._functorch.config`" in text[max(0, place - 120) : place]
    assert sorted(found) == WHERE


def test_the_remedy_for_donated_buffers_runs_where_nothing_else_was_imported():
    in_a_fresh_process(
        "import torch\n"
        "import torch._functorch.config\n"
        "torch._functorch.config.donated_buffer = False\n"
    )
