"""What a step must do on a device: bodies that run on a GPU, on a CPU and on a simulated device.

`CHECKS` holds them by group; each takes the device's name and raises `AssertionError`, or `LeftOut`
with the reason where the statement makes no sense there. They need the library, torch and what the
library needs, so that `make gpu` runs them on a machine that has no more than that.

The truth is computed on the CPU, in float64, without the library: gradients by one backward pass
per loss, their Gram matrix, and the conditions that p, the clipped p and alpha have to fulfil.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raco_optim import (
    MGDA,
    CAGrad,
    CAGradClip,
    LinearScalarization,
    StepLogger,
    add_combined_gradient,
    gram_matrix,
    min_norm_point,
    mixing_coefficients,
    per_loss_gradients,
    read_steps,
    solve_subproblem,
)

WEIGHTS = [0.5, 0.3, 0.2]
C = 0.5
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
CHECKS: dict[str, dict[str, Callable[[str], object]]] = {}


class LeftOut(Exception):
    """The statement makes no sense on this device; the message says why."""


def check(group: str, name: str = "", **settings: Any) -> Callable[[Any], Any]:
    """Registers a body, with settings if it has some, under a group and a name."""

    def register(body: Any) -> Any:
        key = name or body.__name__
        CHECKS.setdefault(group, {})[key] = lambda device: body(device, **settings)
        return body

    return register


class Net(nn.Module):
    """A trunk wide enough for "ghost" and a head; scalars, one per example."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 64), nn.Tanh())
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.trunk(x)
        return z, self.head(z).sum(1)


def network(device: str, dtype: torch.dtype = torch.float32, width: int = 256) -> Net:
    torch.manual_seed(0)
    return Net(width).to(dtype).to(device)


def data(device: str, dtype: torch.dtype = torch.float32, step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, t = torch.randn(6, 32, generator=generator), torch.randn(3, 6, generator=generator)
    # At odds about the mean of the scalars, so that p is neither a vertex nor w.
    t += torch.tensor([[2.0], [-2.0], [0.5]])
    return x.to(dtype).to(device), t.to(dtype).to(device)


def losses_of(scalars: Tensor, t: Tensor) -> list[Tensor]:
    return [(scalars - target).square().mean() for target in t]


def gradients_of(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Gradients of the losses, ``[m, n]``, in float64 on the CPU, without the library."""
    model = copy.deepcopy(model).cpu().double()
    with _as_on_a_host():
        losses = losses_of(model(x.cpu().double())[1], t.cpu().double())
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


@contextlib.contextmanager
def _as_on_a_host() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False):
        yield


def flat(model: nn.Module) -> Tensor:
    """``.grad``, ``[n]``, in float64 on the CPU."""
    assert all(p.grad is not None and p.grad.device == p.device for p in model.parameters())
    return torch.cat([p.grad.detach().cpu().double().flatten() for p in model.parameters()])


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error <= tolerance, f"{what} is off by {error:.1e}, more than {tolerance:.1e}"


def assert_is_a_step_of_cagrad_clip(report: Any) -> None:
    """The conditions on p, the clipped p and alpha, from the report's own Gram matrix."""
    H, w, p = report.gram, report.weights, report.p
    norm = lambda q: float((q @ H @ q).clamp(min=0).sqrt())  # noqa: E731
    slope = H @ w + C * norm(w) * (H @ p) / norm(p)
    gap = float(p @ slope - slope.min()) / float(abs(p @ slope))
    assert float(p.min()) >= 0 and abs(float(p.sum()) - 1) < 1e-9
    assert gap < 1e-6, f"p has a gap of {gap:.1e}"
    clipped = torch.minimum(p, w)
    close(report.coefficients, w + C * norm(w) / norm(clipped) * clipped, 1e-8, "alpha")


def wrap(model: Net, **settings: Any) -> CAGradClip:
    mode = settings.get("gradients", "dense")
    if mode == "per_example":
        settings["model"] = model
    elif mode == "parameters":
        settings["gradients"] = list(model.trunk[2].parameters())
    return CAGradClip(torch.optim.AdamW(model.parameters(), lr=1e-3), WEIGHTS, c=C, **settings)


def backward(opt: CAGradClip, model: Net, x: Tensor, t: Tensor, scale: Any = None) -> None:
    """One `backward`, with what the mode asks for."""
    z, scalars = model(x)
    losses = losses_of(scalars.float() if scale is not None else scalars, t)
    if scale is not None:
        losses = [scale(loss) for loss in losses]
    asked = opt._core.asked
    through = {"representation": z, "per_example": scalars}.get(asked)
    name = {"representation": "representation", "per_example": "scalars"}.get(asked, "")
    opt.backward(losses, **({name: through} if through is not None else {}))


MODES = {
    "dense": {},
    "ghost": {"gradients": "ghost"},
    "per_example": {"gradients": "per_example"},
    "representation": {"gradients": "representation"},
    "parameters": {"gradients": "parameters"},
    "gram_every": {"gram_every": 2},
}
EXACT = ("dense", "ghost", "per_example")
SOLVERS = {"exact": {}, "pgd": {"solver": "pgd", "nonfinite": "propagate"}}


def _each_mode(device: str, mode: str, dtype: torch.dtype, solver: str) -> None:
    model = network(device, dtype)
    opt = wrap(model, **MODES[mode], **SOLVERS[solver])
    for step in range(3):
        x, t = data(device, dtype, step)
        truth, tolerance = gradients_of(model, x, t), TOLERANCE[dtype]
        opt.zero_grad()
        backward(opt, model, x, t)
        report = opt.report
        assert report.gradients in (opt._core.asked, "earlier step"), report.gradients
        assert_is_a_step_of_cagrad_clip(report)
        close(flat(model), report.coefficients @ truth, tolerance, f"step {step}: .grad")
        if mode in EXACT:
            close(report.gram, truth @ truth.T, 2 * tolerance, f"step {step}: the Gram matrix")
        opt.step()
    assert all(p.isfinite().all() for p in model.cpu().parameters())


for _mode in MODES:
    check("modes", _mode, mode=_mode, dtype=torch.float32, solver="exact")(_each_mode)
check("modes", "dense, pgd", mode="dense", dtype=torch.float32, solver="pgd")(_each_mode)
for _mode in MODES:
    check("precision", f"{_mode}, bfloat16", mode=_mode, dtype=torch.bfloat16, solver="exact")(
        _each_mode
    )


# -- What a loop does beside a plain step ---------------------------------------------------------


@check("modes")
def accumulation_callables_and_absent_losses(device: str) -> None:
    model = network(device)
    opt = wrap(model)
    first, second = (data(device, step=k) for k in (0, 1))
    opt.zero_grad()
    opt.backward(losses_of(model(first[0])[1], first[1]), accumulate=True)
    opt.backward(
        [lambda i=i: losses_of(model(second[0])[1], second[1])[i] for i in range(len(WEIGHTS))]
    )
    truth = gradients_of(model, *first) + gradients_of(model, *second)
    close(flat(model), opt.report.coefficients @ truth, 1e-4, ".grad")
    opt.zero_grad()
    losses: list[Any] = losses_of(model(first[0])[1], first[1])
    losses[1] = None
    opt.backward(losses)
    assert opt.report.absent == ("1",)
    print(opt.report, file=io.StringIO())


@check("modes")
def heads_and_other_rules(device: str) -> None:
    x, t = data(device)
    for make in (CAGradClip, CAGrad, MGDA, LinearScalarization):
        model = network(device)
        settings: dict[str, Any] = {} if make is MGDA else {"weights": WEIGHTS}
        adamw = torch.optim.AdamW(model.parameters())
        opt = make(adamw, shared_parameters=model.trunk.parameters(), **settings)
        opt.backward(losses_of(model(x)[1], t))
        truth = gradients_of(model, x, t)
        n = sum(p.numel() for p in model.trunk.parameters())
        alpha, w = opt.report.coefficients, opt.report.weights
        wanted = torch.cat([alpha @ truth[:, :n], w @ truth[:, n:]])
        close(flat(model), wanted, 1e-4, f".grad of {make.__name__}")
        opt.step()


@check("modes")
def functions_of_the_parts(device: str) -> None:
    model = network(device)
    x, t = data(device)
    truth = gradients_of(model, x, t)
    rows = per_loss_gradients(losses_of(model(x)[1], t), list(model.parameters()))
    gram = gram_matrix(rows)
    assert gram.device == x.device
    close(gram.cpu(), truth @ truth.T, 1e-5, "the Gram matrix")
    for solver in ("exact", "pgd", "slsqp"):
        p = solve_subproblem(gram, WEIGHTS, C, solver=solver).p
        mixing = mixing_coefficients(gram, WEIGHTS, C, solver=solver)
        assert p.device == mixing.coefficients.device == gram.device
    assert min_norm_point(gram).p.device == gram.device
    batched = solve_subproblem(gram.expand(5, 3, 3), WEIGHTS, C, solver="pgd")
    close(batched.p[3].cpu(), p.cpu(), 1e-3, "p of a batch")
    add_combined_gradient(list(model.parameters()), rows, mixing.coefficients)
    close(flat(model), mixing.coefficients.cpu() @ truth, 1e-4, ".grad")


@check("modes")
def a_loaded_state_goes_on(device: str) -> None:
    """Also where the file was written on the device and is read on a host."""

    def run(resume_at: int | None) -> Tensor:
        model = network(device)
        opt = wrap(model, gram_every=3, nonfinite="propagate")
        for step in range(5):
            if step == resume_at:
                file = io.BytesIO()
                host = {k: v.cpu() for k, v in model.state_dict().items()}
                torch.save([host, _to_host(opt.state_dict())], file)
                file.seek(0)
                of_model, of_opt = torch.load(file, map_location="cpu", weights_only=True)
                model = network(device)
                model.load_state_dict(of_model)
                opt = wrap(model, gram_every=3, nonfinite="propagate")
                opt.load_state_dict(of_opt)
            opt.zero_grad()
            backward(opt, model, *data(device, step=step))
            opt.step()
        return torch.cat([p.detach().cpu().flatten() for p in model.parameters()]).double()

    close(run(2), run(None), 1e-6, "a resumed run")


def _to_host(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: _to_host(value) for key, value in state.items()}
    return [_to_host(value) for value in state] if isinstance(state, list | tuple) else state


@check("modes")
def step_logger(device: str) -> None:
    model = network(device)
    opt = wrap(model, nonfinite="propagate")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "steps.jsonl")
        with StepLogger(path) as logger:
            for step in range(3):
                opt.zero_grad()
                backward(opt, model, *data(device, step=step))
                opt.step()
                logger.log(opt)
        assert len(read_steps(path).reports) == 3


@check("modes")
def nonfinite_values(device: str) -> None:
    for what, expected in (("raise", FloatingPointError), ("skip", None), ("propagate", None)):
        model = network(device)
        opt = wrap(model, nonfinite=what)
        x, t = data(device)
        losses = losses_of(model(x)[1], t)
        losses[1] = losses[1] * torch.inf
        try:
            opt.backward(losses)
        except FloatingPointError as error:
            assert expected is FloatingPointError and "loss '1'" in str(error)
            assert all(p.grad is None for p in model.parameters())
        else:
            assert expected is None
            assert (opt.report.outcome.name == "SKIPPED") == (what == "skip")
            if what == "propagate":
                assert not flat(model).isfinite().all()


@check("modes")
def mixed_devices(device: str) -> None:
    other = "meta" if device == "cpu" else "cpu"
    x, t = data(device)
    model = network(device)
    model.head.to(other)
    _raises(lambda: wrap(model).backward([model.trunk(x).sum()] * 3), "on one device")
    model = network(device)
    losses = losses_of(model(x)[1], t)
    losses[2] = torch.ones((), device=other, requires_grad=True) * 2
    _raises(lambda: wrap(model).backward(losses), "loss '2' must be on the device")
    assert all(p.grad is None for p in model.parameters())


def _raises(call: Callable[[], object], message: str) -> None:
    try:
        call()
    except ValueError as error:
        assert message in str(error), f"the message is {error}"
    else:
        raise AssertionError(f"no error with {message!r}")


# -- Precision ------------------------------------------------------------------------------------


def kind_of(device: str) -> str:
    return torch.device(device).type


@check("precision")
def autocast(device: str) -> None:
    if kind_of(device) not in ("cpu", "cuda"):
        raise LeftOut("autocast is torch's, for devices that it knows")
    for mode in MODES:
        model = network(device)
        opt = wrap(model, **MODES[mode])
        x, t = data(device)
        with torch.autocast(kind_of(device), torch.bfloat16):
            backward(opt, model, x, t)
        truth = gradients_of(model, x, t)
        close(flat(model), opt.report.coefficients @ truth, 0.05, f".grad of {mode}")
        opt.step()


@check("precision")
def float16_with_a_scaler(device: str) -> None:
    """The scaled step is the step; an overflow is skipped and halves the scale."""
    if kind_of(device) not in ("cpu", "cuda"):
        raise LeftOut("the scaler is torch's, for devices that it knows")
    for mode in ("dense", "per_example", "representation", "parameters", "ghost"):
        model = network(device)
        opt = wrap(model, **MODES[mode], nonfinite="propagate")
        scaler = torch.amp.GradScaler(kind_of(device), init_scale=2.0**10)
        for overflow in (False, True):
            x, t = data(device)
            before = [p.detach().clone() for p in model.parameters()]
            truth = gradients_of(model, x, t)
            opt.zero_grad()
            with torch.autocast(kind_of(device), torch.float16):
                factor = torch.inf if overflow else 1.0
                backward(opt, model, x, t, lambda x, s=scaler, by=factor: s.scale(x) * by)
            alpha = opt.report.coefficients
            scaler.unscale_(opt)
            if not overflow:
                close(flat(model), alpha @ truth, 0.02, f".grad of {mode}")
            scaler.step(opt)
            scaler.update()
            same = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
            assert all(same) if overflow else not any(same), f"{mode}, overflow: {overflow}"
        assert scaler.get_scale() == 2.0**9


# -- Waiting --------------------------------------------------------------------------------------


@contextlib.contextmanager
def waits_on(device: str) -> Iterator[list[str]]:
    """Collects what makes the host wait for the device, each with the line of the library."""
    found: list[str] = []
    if kind_of(device) == "cuda":

        def note(message: Any, *_: object) -> None:
            frames = [f for f in traceback.extract_stack() if "/raco_optim/" in f.filename]
            at = f" ({Path(frames[-1].filename).name}: {frames[-1].line})" if frames else ""
            if "called a synchronizing" in str(message):
                found.append(f"{str(message).splitlines()[0]}{at}")

        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
    elif kind_of(device) in ("fakegpu", "privateuseone"):
        from tests.gpu import simulated

        before = len(simulated.waits)
        yield found
        found += simulated.waits[before:]
    else:
        raise LeftOut("a CPU waits for nothing")


def _no_wait(device: str, mode: str) -> None:
    model = network(device)
    opt = wrap(model, **MODES[mode], **SOLVERS["pgd"])
    # The first step may initialise; in the last, the Gram matrix of `gram_every` is an old one.
    batches = [data(device, step=step) for step in range(4 if mode == "gram_every" else 2)]
    for step, (x, t) in enumerate(batches):
        opt.zero_grad()
        with waits_on(device) as found:
            backward(opt, model, x, t)
            opt.step()
        assert step == 0 or not found, f"{len(found)} waits: {'; '.join(dict.fromkeys(found))}"
    assert_is_a_step_of_cagrad_clip(opt.report)


for _mode in MODES:
    if _mode != "per_example":  # it compares itself with autograd
        check("waiting", f"no wait, {_mode}", mode=_mode)(_no_wait)


def _one_copy(device: str, mode: str) -> None:
    """By default the host reads one small matrix a step, and one bit with an approximation."""
    model = network(device)
    opt = wrap(model, **MODES[mode])
    allowed = 1 if mode in ("dense", "ghost") else 2
    for step in range(4):
        x, t = data(device, step=step)
        opt.zero_grad()
        with waits_on(device) as found:
            backward(opt, model, x, t)
        assert step == 0 or len(found) <= allowed, (
            f"{len(found)} waits, more than {allowed}: {'; '.join(found)}"
        )
        opt.step()


for _mode in MODES:
    if _mode != "per_example":
        check("waiting", f"one copy, {_mode}", mode=_mode)(_one_copy)


@check("waiting")
def deterministic_algorithms(device: str) -> None:
    """Every mode runs under torch's deterministic algorithms, and twice gives the same bits."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for mode in MODES:
            found = []
            for _ in range(2):
                model = network(device)
                backward(wrap(model, **MODES[mode]), model, *data(device))
                found.append(flat(model))
            assert torch.equal(*found), mode
        model = network(device)
        backward(wrap(model, **SOLVERS["pgd"]), model, *data(device))
    finally:
        torch.use_deterministic_algorithms(before)


# -- Compiled models and captured graphs ----------------------------------------------------------


def _compiled(device: str, backend: str) -> None:
    if kind_of(device) not in ("cpu", "cuda"):
        raise LeftOut("Dynamo knows no simulated device")
    if device == "cpu":
        raise LeftOut("tests/test_compiled.py does it")
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    model = network(device)
    opt = wrap(model, **SOLVERS["pgd"])
    compiled = torch.compile(model, backend=backend)
    for step in range(3):
        x, t = data(device, step=step)
        truth = gradients_of(model, x, t)
        opt.zero_grad()
        opt.backward(losses_of(compiled(x)[1], t))
        close(flat(model), opt.report.coefficients @ truth, 1e-3, ".grad")
        opt.step()


for _backend in ("aot_eager", "inductor"):
    check("compiled", _backend, backend=_backend)(_compiled)


@check("compiled")
def gradients_stay_where_they_are(device: str) -> None:
    """So that a captured inner step reads them; ``zero_grad(set_to_none=False)`` keeps them."""
    model = network(device)
    opt = wrap(model)
    places = []
    for step in range(3):
        opt.zero_grad(set_to_none=False)
        backward(opt, model, *data(device, step=step))
        places.append([p.grad for p in model.parameters()])
    assert all(a is b for a, b in zip(places[0], places[2], strict=True))


@check("compiled")
def captured_inner_step(device: str) -> None:
    """A CUDA graph of a capturable AdamW's step, replayed after each `backward`."""
    if kind_of(device) != "cuda":
        raise LeftOut("CUDA graphs are CUDA's")
    model, plain = network(device), network(device)
    inner, eager = (
        torch.optim.AdamW(m.parameters(), lr=1e-3, capturable=True) for m in (model, plain)
    )
    opt = CAGradClip(inner, WEIGHTS, c=C, **SOLVERS["pgd"])
    reference = CAGradClip(eager, WEIGHTS, c=C, **SOLVERS["pgd"])
    graph = torch.cuda.CUDAGraph()
    for step in range(6):
        x, t = data(device, step=step)
        for each, net in ((opt, model), (reference, plain)):
            each.zero_grad(set_to_none=False)
            backward(each, net, x, t)
        reference.step()
        if step < 2:  # on a stream of its own, as capturing asks for
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                opt.step()
            torch.cuda.current_stream().wait_stream(stream)
            continue
        if step == 2:
            with torch.cuda.graph(graph):
                inner.step()
        graph.replay()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        close(p.detach().cpu().double(), q.detach().cpu().double(), 1e-5, "a captured step")


# -- Memory ---------------------------------------------------------------------------------------


def _memory(device: str, m: int) -> None:
    """The peak of `backward` is m gradients, two parameters and the Gram matrix's scratch more."""
    if kind_of(device) not in ("cpu", "cuda"):
        raise LeftOut("the simulated device counts no memory")
    if device == "cpu" and m != 4:
        raise LeftOut("one m will do on a CPU")
    width = 1024 if device == "cpu" else 8192
    torch.manual_seed(0)
    sizes = [(width, width // 8), (width // 8, width)] * 4
    model = nn.Sequential(*(nn.Linear(*size) for size in sizes), nn.Linear(width, m)).to(device)
    inner = torch.optim.SGD(model.parameters(), lr=1e-4)
    opt = CAGradClip(inner, [1 / m] * m, nonfinite="propagate")
    x = torch.randn(2, width, device=device)
    n = sum(p.numel() for p in model.parameters())

    def step() -> None:
        inner.zero_grad()
        opt.backward(list((model(x) - 1).square().mean(0)))

    step()
    if device == "cpu":
        from benchmarks.step_cost_memory import measure_memory

        found = sum(measure_memory(step, inner.zero_grad))
    else:
        inner.zero_grad()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated() - before
    scratch = 8 * m * 65536
    over = found / (4 * n)
    bound = m + 2 * width * (width // 8) / n + scratch / (4 * n) + 0.1
    assert over <= bound, f"a peak of {over:.2f} gradients for m = {m}, more than {bound:.2f}"


for _m in (2, 4, 8):
    check("memory", f"m = {_m}", m=_m)(_memory)


# -- Several processes ----------------------------------------------------------------------------


def train_together(rank: int, device: str, sharded: bool) -> list[Any]:
    """Trains in one of the processes of a group; returns parameters and coefficients.

    With FSDP2 if `sharded`, else with DDP. Every process has its part of the joint batch.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    number = dist.get_world_size()
    device = f"cuda:{rank}" if kind_of(device) == "cuda" else device
    model = network(device)
    if sharded:
        mesh = init_device_mesh(kind_of(device), (number,))
        for layer in (model.trunk[0], model.trunk[2], model.head):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    wrapped: Any = model
    if not sharded:
        ids = [rank] if kind_of(device) == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids)
    opt = wrap(model)
    alphas = []
    for step in range(3):
        x, t = _joint(device, number, step)
        x, t = x.chunk(number)[rank], t.chunk(number, dim=1)[rank]
        opt.zero_grad()
        opt.backward(losses_of(wrapped(x)[1], t))
        alphas.append(opt.report.coefficients)
        opt.step()
    parameters = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
    return [torch.cat([p.cpu().flatten() for p in parameters]), torch.stack(alphas)]


def _joint(device: str, number: int, step: int) -> tuple[Tensor, Tensor]:
    parts = [data(device, step=10 * step + rank) for rank in range(number)]
    return torch.cat([x for x, _ in parts]), torch.cat([t for _, t in parts], dim=1)


def assert_together_is_alone(results: list[list[Any]], device: str) -> None:
    """Two ranks and more train as one process does on the joint batch, equal to the bit."""
    model = network(device)
    opt = wrap(model)
    for step in range(3):
        opt.zero_grad()
        x, t = _joint(device, len(results), step)
        opt.backward(losses_of(model(x)[1], t))
        close(results[0][1][step], opt.report.coefficients, 1e-4, f"step {step}: alpha")
        opt.step()
    alone = torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
    close(results[0][0].double(), alone.double(), 1e-4, "the parameters")
    for parameters, alphas in results[1:]:
        assert torch.equal(parameters, results[0][0]) and torch.equal(alphas, results[0][1])


def _process(rank: int, number: int, device: str, sharded: bool, folder: str) -> None:
    backend = "gloo"
    if kind_of(device) == "cuda":
        backend = "nccl"
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", number)
    dist.init_process_group(backend, store=store, rank=rank, world_size=number)
    torch.save(train_together(rank, device, sharded), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def _distributed(device: str, sharded: bool, several: bool) -> None:
    number = torch.cuda.device_count() if kind_of(device) == "cuda" else 2
    if kind_of(device) not in ("cpu", "cuda"):
        raise LeftOut("torch.distributed knows no simulated device")
    if several and number < 2:
        raise LeftOut("there is one GPU")
    number = number if several else 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = (number, device, sharded, folder)
        torch.multiprocessing.spawn(_process, arguments, number)
        results = [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(number)]
    assert_together_is_alone(results, device)


for _several, _sharded in itertools.product((False, True), (False, True)):
    _name = f"{'FSDP2' if _sharded else 'DDP'}, {'all GPUs' if _several else 'one rank'}"
    check("distributed", _name, sharded=_sharded, several=_several)(_distributed)


def run_group(group: str, device: str) -> dict[str, str]:
    """Runs the checks of a group; returns per name "passed", "left out: ..." or a traceback."""
    found = {}
    for name, body in CHECKS[group].items():
        try:
            body(device)
            found[name] = "passed"
        except LeftOut as why:
            found[name] = f"left out: {why}"
        except Exception:
            found[name] = traceback.format_exc(limit=-4)
    return found
