"""A whole train step under `torch.compile`: `backward` and its solver stay outside the graphs.

Dynamo would specialise on the values of the Gram matrix, and compile anew in every step.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A fresh process: Dynamo's caches and warnings are those of a process. It takes 10 to 20 seconds.
STEPS = """
import json, sys, torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from raco_optim import MGDA, CAGradClip

SGD = lambda p: torch.optim.SGD(p, lr=0.01)  # momentum would add a graph, of torch's own
AdamW = lambda p: torch.optim.AdamW(p, lr=0.01)

def clip(inner, m, **options):
    return CAGradClip(inner, [1 / m] * m, **options)

def named(inner, m):
    return CAGradClip(inner, {f"loss_{i}": 1 / m for i in range(m)}, c=0.7)

def mgda(inner, m):
    return MGDA(inner)

CASES = {
    "CAGradClip, m = 2": (2, clip, SGD),
    "CAGradClip, m = 3": (3, clip, SGD),
    "CAGradClip, m = 3, AdamW": (3, clip, AdamW),
    "named, m = 2": (2, named, SGD),
    "MGDA, m = 3": (3, mgda, SGD),
    "ghost, m = 2": (2, lambda inner, m: clip(inner, m, gradients="ghost"), SGD),
    "outside, m = 3": (3, clip, SGD),
}

def run(case, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    m, method, inner = CASES[case]
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, m))
    opt = method(inner(model.parameters()), m)
    graphs = 0

    def backend(module, inputs):
        nonlocal graphs
        graphs += 1
        return lookup_backend("aot_eager")(module, inputs)

    def train_step(x):
        opt.zero_grad()
        out = model(x)
        losses = [(out[:, i] - i).square().mean() for i in range(m)]
        opt.backward({f"loss_{i}": x for i, x in enumerate(losses)} if method is named else losses)
        if not case.startswith("outside"):
            opt.step()

    step = torch.compile(train_step, backend=backend) if compiled else train_step
    counts, alphas = [], []
    for k in range(6):
        # Data of other scales: other Gram matrices, p inside the simplex and at its corners.
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k)) * 10 ** (k - 2)
        step(x)
        if case.startswith("outside"):
            opt.step()
        counts.append(graphs)
        alphas.append(opt.report.coefficients.tolist())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return counts, alphas, weights.tolist()

print(json.dumps({case: [run(case, True), run(case, False)] for case in CASES}))
"""


def in_a_fresh_process(code):
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


@pytest.fixture(scope="module")
def found():
    return json.loads(in_a_fresh_process(STEPS))


CASES = re.findall(r'^    "(.*)": \(\d', STEPS, re.MULTILINE)


@pytest.mark.parametrize("case", CASES)
def test_a_step_has_two_graphs_and_is_compiled_once(found, case):
    """One graph for the forward pass, one for the inner step; none is added by later data."""
    counts, *_ = found[case][0]
    assert counts == [1 if case.startswith("outside") else 2] * 6


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_is_the_step(found, case):
    (_, alphas, weights), (graphs, expected_alphas, expected) = found[case]
    assert graphs == [0] * 6
    for alpha, witness in zip(alphas, expected_alphas, strict=True):
        assert alpha == pytest.approx(witness, rel=1e-3, abs=1e-5)
    assert weights == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert len({tuple(alpha) for alpha in alphas}) > 1, "steps differ"


# --- Donated buffers -----------------------------------------------------------------------------

WHERE = ["docs/recipes.md", "raco_optim/gradients/explain.py"]


@pytest.mark.parametrize("path", WHERE)
def test_the_remedy_for_donated_buffers_is_complete_wherever_it_stands(path):
    text = " ".join((ROOT / path).read_text().replace('"', " ").split())
    places = [m.start() for m in re.finditer(r"donated_buffer = False", text)]
    assert places
    for place in places:
        assert "`import torch._functorch.config`" in text[max(0, place - 120) : place]


def test_no_other_place_gives_that_remedy():
    found = [
        str(path.relative_to(ROOT))
        for folder in ("docs", "raco_optim", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".rst")
        and "donated_buffer = False" in path.read_text()
        and "_build" not in path.parts
    ]
    assert sorted(found) == WHERE


def test_the_remedy_for_donated_buffers_runs_where_nothing_else_was_imported():
    in_a_fresh_process(
        "import torch\n"
        "import torch._functorch.config\n"
        "torch._functorch.config.donated_buffer = False\n"
    )
