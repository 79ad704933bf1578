"""Models of which every process holds a part: the steps of one process on the joint batch.

FSDP2, HSDP, tensor and sequence parallelism, and FSDP2 with tensor parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from raco_optim import CAGradClip
from tests.ranks import Ranks, slices

STEPS, FEW = 20, 6
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
WIDTH, HIDDEN, TOKENS, ROWS = 6, 16, 4, 8


class Block(nn.Module):
    """What is cut between the processes by tensor parallelism, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Head(nn.Module):
    """A part that one loss alone reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Model(nn.Module):
    """Two blocks and three heads, and what no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.heads = nn.ModuleDict({name: Head() for name in WEIGHTS})
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor, names: tuple[str, ...] = tuple(WEIGHTS)) -> dict[str, Tensor]:
        z = self.blocks(x)
        return {name: self.heads[name](z) for name in names}


def model_of(kind: str, number: int) -> tuple[Model, int, int]:
    """Returns a model, and which of how many parts of the batch this process takes."""
    torch.manual_seed(0)
    model, rank = Model(), dist.get_rank()
    if kind in ("fsdp", "fsdp kept"):
        mesh = init_device_mesh("cpu", (number,))
        shard(model, mesh, reshard_after_forward=kind == "fsdp")
    elif kind.startswith("hsdp"):
        replicas = int(kind[-1])
        names = ("replicate", "shard")
        shard(model, init_device_mesh("cpu", (replicas, number // replicas), mesh_dim_names=names))
    elif kind in ("tensor", "sequence"):
        cut_tensors(model, init_device_mesh("cpu", (number,)), sequence=kind == "sequence")
        return model, 0, 1
    else:
        mesh = init_device_mesh("cpu", (2, number // 2), mesh_dim_names=("data", "tensor"))
        cut_tensors(model, mesh["tensor"], sequence=kind == "fsdp, sequence")
        shard(model, mesh["data"])
        return model, mesh.get_local_rank("data"), 2
    return model, rank, number


def shard(model: Model, mesh: DeviceMesh, **settings: Any) -> None:
    for part in (*model.blocks, *model.heads.values(), model):
        fully_shard(part, mesh=mesh, **settings)


def cut_tensors(model: Model, mesh: DeviceMesh, *, sequence: bool = False) -> None:
    for block in model.blocks:
        if not sequence:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh, plan)
            continue
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(block, mesh, plan)
        prepared = PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True
        )
        parallelize_module(block, mesh, prepared)
        gathered = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
        parallelize_module(block, mesh, gathered)


def losses_of(outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    scales = {"a": 1.0, "b": 3.0, "c": -2.0}
    return {name: (out - scales[name] * targets).square().mean() for name, out in outputs.items()}


def batch(step: int, part: int = 0, parts: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, TOKENS, WIDTH, generator=generator)
    y = torch.randn(ROWS, TOKENS, 2, generator=generator)
    return slices([x, y], part, parts)


def optimizer(model: nn.Module, c: float = 0.4, **settings: Any) -> CAGradClip:
    return CAGradClip(torch.optim.AdamW(model.parameters(), lr=1e-2), WEIGHTS, c=c, **settings)


def together(model: Model, opt: CAGradClip, x: Tensor, y: Tensor, step: int) -> None:
    opt.backward(losses_of(model(x), y))


def one_by_one(model: Model, opt: CAGradClip, x: Tensor, y: Tensor, step: int) -> None:
    opt.backward({name: lambda n=name: losses_of(model(x, (n,)), y)[n] for name in WEIGHTS})


def in_micro_batches(model: Model, opt: CAGradClip, x: Tensor, y: Tensor, step: int) -> None:
    for i, (some_x, some_y) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
        losses = {name: loss / 2 for name, loss in losses_of(model(some_x), some_y).items()}
        opt.backward(losses, accumulate=i == 0)


def with_an_absent_one(model: Model, opt: CAGradClip, x: Tensor, y: Tensor, step: int) -> None:
    opt.backward(losses_of(model(x), y) | {"abc"[step % 3]: None})


def with_one_absent_from_a_part(
    model: Model, opt: CAGradClip, x: Tensor, y: Tensor, step: int
) -> None:
    outputs = model(x)
    losses = losses_of(outputs, y)
    if len(x) == ROWS:  # the joint batch, of which the second half has no label of "b"
        losses["b"] = losses_of({"b": outputs["b"][: ROWS // 2]}, y[: ROWS // 2])["b"] / 2
    elif dist.get_rank() == 1:
        losses["b"] = 0 * outputs["b"].sum()  # not None: its backward pass has messages
    opt.backward(losses)


def onto_a_gradient(model: Model, opt: CAGradClip, x: Tensor, y: Tensor, step: int) -> None:
    sum(losses_of(model(x), y).values()).backward()
    opt.backward(losses_of(model(x), y))


def with_a_penalty(model: Model, opt: CAGradClip, x: Tensor, y: Tensor, step: int) -> None:
    penalty, *rest = (p.square().sum() for p in model.parameters())
    for other in rest:
        penalty = penalty + other  # a DTensor of which every process holds a part of the sum
    opt.backward(losses_of(model(x), y) | {"c": penalty})


Backward = Callable[[Model, CAGradClip, Tensor, Tensor, int], None]
Result = tuple[list[Tensor], list[Any]]


def run(
    model: Model,
    part: int,
    parts: int,
    backward: Backward,
    opt: CAGradClip | None = None,
    steps: int = FEW,
) -> Result:
    opt = opt or optimizer(model)
    reports = []
    for step in range(steps):
        opt.zero_grad()
        backward(model, opt, *batch(step, part, parts), step)
        opt.step()
        reports.append(opt.report)
    return whole(model.parameters()), reports


def whole(tensors: Any) -> list[Tensor]:
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in tensors]


def alone(
    backward: Backward = together, heads: bool = False, trained: str = "", steps: int = FEW
) -> Result:
    """One process without torch.distributed, on the joint batch."""
    torch.manual_seed(0)
    model = Model()
    with told(trained):
        return run(model, 0, 1, backward, chosen(model, heads, trained), steps)


def told(trained: str) -> contextlib.AbstractContextManager[Any]:
    """All but a block is held by nobody: another block, and three heads."""
    if not trained:
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match="depend on 12 parameters, with 268 numbers, that no")


def chosen(model: Model, heads: bool, trained: str = "", **settings: Any) -> CAGradClip:
    shared = model.blocks.parameters() if heads else None
    part = model.get_submodule(trained)
    return optimizer(part, shared_parameters=shared, **settings)


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    difference = sum(float((x - y).square().sum()) for x, y in zip(found, expected, strict=True))
    return (difference / sum(float(y.square().sum()) for y in expected)) ** 0.5


def check_same_steps(results: list[Result], expected: Result) -> None:
    """Of one process to rounding, and of each other to the last bit."""
    for parameters, reports in results:
        assert relative(parameters, expected[0]) < 1e-5
        assert all(map(torch.equal, parameters, results[0][0]))
        for report, first, other in zip(reports, results[0][1], expected[1], strict=True):
            assert torch.equal(report.gram, first.gram)
            assert torch.equal(report.gram, report.gram.T)
            assert torch.equal(report.p.nan_to_num(7.0), first.p.nan_to_num(7.0))
            assert report.absent == other.absent
            assert torch.allclose(report.gram, other.gram, rtol=1e-3, atol=1e-6)
            assert torch.allclose(report.losses, other.losses, rtol=1e-4, equal_nan=True)


def train(rank: int, number: int, kind: str) -> tuple[list[Tensor], list[Any], set[str]]:
    model, part, parts = model_of(kind, number)
    cuts = {str(p.placements) for p in model.parameters() if isinstance(p, DTensor)}
    return *run(model, part, parts, together, steps=STEPS), cuts


@pytest.mark.parametrize("kind", ["fsdp", "fsdp kept", "hsdp 1", "hsdp 2", "tensor", "sequence"])
def test_two_processes_do_the_steps_of_one(two_ranks: Ranks, kind: str) -> None:
    results = two_ranks.run(train, 2, kind)
    check_same_steps([result[:2] for result in results], alone(steps=STEPS))


@pytest.mark.parametrize("kind", ["fsdp", "hsdp 2", "fsdp, sequence"])
def test_four_processes_do_the_steps_of_one(four_ranks: Ranks, kind: str) -> None:
    results = four_ranks.run(train, 4, kind)
    check_same_steps([result[:2] for result in results], alone(steps=STEPS))
    assert ("_StridedShard" in str(results[0][2])) == ("," in kind)


def train_in_a_way(
    rank: int, kind: str, backward: Backward, heads: bool, trained: str, gram: str
) -> Result:
    model, part, parts = model_of(kind, 2)
    with told(trained):
        return run(model, part, parts, backward, chosen(model, heads, trained, gradients=gram))


WAYS: list[tuple[str, Backward, dict[str, Any]]] = [
    ("fsdp", one_by_one, {}),
    ("fsdp kept", one_by_one, {}),
    ("fsdp", in_micro_batches, {}),
    ("fsdp", with_an_absent_one, {}),
    ("fsdp kept", with_an_absent_one, {}),
    ("fsdp", with_one_absent_from_a_part, {}),
    ("fsdp", onto_a_gradient, {}),
    ("sequence", onto_a_gradient, {}),
    ("fsdp", with_a_penalty, {}),
    ("fsdp", together, {"heads": True}),
    ("tensor", together, {"heads": True}),
    ("fsdp", together, {"gradients": "ghost"}),
    ("fsdp", together, {"trained": "blocks.1"}),
]


@pytest.mark.parametrize(
    ("kind", "backward", "settings"),
    WAYS,
    ids=[f"{kind} {backward.__name__} {settings or ''}" for kind, backward, settings in WAYS],
)
def test_however_the_losses_come(
    two_ranks: Ranks, kind: str, backward: Backward, settings: dict[str, Any]
) -> None:
    settings = {"heads": False, "trained": "", "gradients": "dense"} | settings
    results = two_ranks.run(train_in_a_way, kind, backward, *settings.values())
    way = together if backward in (one_by_one, in_micro_batches) else backward
    check_same_steps(results, alone(way, settings["heads"], settings["trained"]))


def wrapped(block: Block, how: str) -> nn.Module:
    if how == "composable":
        return composable_checkpoint(block)
    if how == "selective":
        products = [torch.ops.aten.addmm.default]
        return checkpoint_wrapper(
            block, context_fn=lambda: create_selective_checkpoint_contexts(products)
        )
    return checkpoint_wrapper(block)


def train_with_checkpoints(rank: int, how: str, backward: Backward) -> Result:
    torch.manual_seed(0)
    model = Model()
    model.blocks = nn.Sequential(*(wrapped(block, how) for block in model.blocks))
    shard(model, init_device_mesh("cpu", (2,)))
    return run(model, rank, 2, backward)


@pytest.mark.parametrize(
    ("how", "backward"),
    [("whole", together), ("selective", one_by_one), ("composable", one_by_one)],
)
def test_activation_checkpoints(two_ranks: Ranks, how: str, backward: Backward) -> None:
    check_same_steps(two_ranks.run(train_with_checkpoints, how, backward), alone())


@pytest.mark.parametrize("how", ["selective", "composable"])
def test_checkpoint_that_serves_one_loss_only_says_so(two_ranks: Ranks, how: str) -> None:
    for outcome in two_ranks.outcomes(train_with_checkpoints, how, together):
        # As torch raises it.
        assert type(outcome.error) is (RuntimeError if how == "selective" else AttributeError)
        notes = " ".join(outcome.error.__notes__)
        assert "The backward pass of loss 'b' raised this." in notes
        assert "pass the losses as callables" in notes
        assert "start again from the last checkpoint" in notes


def train_with_losses_in_parts(rank: int) -> tuple[list[Tensor], list[Any], str]:
    model, *_ = model_of("tensor", 2)
    mesh = init_device_mesh("cpu", (2,))
    for head in model.heads.values():
        parallelize_module(head, mesh, {"linear": ColwiseParallel(use_local_output=False)})
    found = []

    def backward(model: Model, opt: CAGradClip, x: Tensor, y: Tensor, step: int) -> None:
        losses = losses_of(model(x), distribute_tensor(y, mesh, [Shard(2)]))
        found.append(str(losses["a"].placements))
        opt.backward(losses)

    return *run(model, 0, 1, backward), found[0]


def test_losses_of_which_a_process_holds_a_part(two_ranks: Ranks) -> None:
    results = two_ranks.run(train_with_losses_in_parts)
    assert "Partial" in results[0][2]
    check_same_steps([result[:2] for result in results], alone())


def gradients_and_hooks(rank: int, kind: str) -> tuple[list[Tensor], list[Tensor], int]:
    """The combined gradient, and what hooks see that run after a gradient was accumulated."""
    model, part, parts = model_of(kind, 2)
    opt = optimizer(model)
    seen: list[Tensor] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(whole([p.grad])[0]))
    x, y = batch(0, part, parts)
    losses = losses_of(model(x), y)
    opt.backward({name: loss / 2 for name, loss in losses.items()}, accumulate=True)
    during_accumulation = len(seen)
    losses = losses_of(model(x), y)
    opt.backward({name: loss / 2 for name, loss in losses.items()})
    return (
        whole(p.grad for p in model.parameters() if p.grad is not None),
        seen,
        during_accumulation,
    )


@pytest.mark.parametrize("kind", ["fsdp", "tensor"])
def test_hooks_run_once_on_the_combined_gradient(two_ranks: Ranks, kind: str) -> None:
    torch.manual_seed(0)
    model = Model()
    opt = optimizer(model)
    opt.backward(losses_of(model(batch(0)[0]), batch(0)[1]))
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    for found, seen, during_accumulation in two_ranks.run(gradients_and_hooks, kind):
        assert during_accumulation == 0
        assert relative(found, expected) < 1e-5
        assert len(seen) == len(found)
        assert all(map(torch.equal, seen, found))


class OneBuffer(torch.autograd.Function):
    """Returns, as a gradient, memory that it fills anew in every backward pass."""

    memory = torch.zeros(WIDTH)

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return x @ row

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return OneBuffer.memory.copy_(grad * ctx.saved_tensors[0]), None


class Linear(nn.Module):
    """One vector, whose gradient a custom function returns in its own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(WIDTH))

    def forward(self, row: Tensor) -> Tensor:
        return OneBuffer.apply(self.x, row)


def from_one_buffer(rank: int, plain: bool, callables: bool) -> list[Tensor]:
    """A sharded vector, or a plain one beside a sharded module; three micro-batches."""
    model = nn.ModuleList([Linear(), nn.Linear(2, 1)])
    fully_shard(model[1 if plain else 0], mesh=init_device_mesh("cpu", (2,)))
    opt = optimizer(model, c=0.0)
    for k in range(3):
        rows = [(k + i + 1) * torch.arange(1.0, 1.0 + WIDTH) for i in range(3)]

        def loss(row: Tensor) -> Tensor:
            return model[0](row) + 0 * model[1](torch.zeros(1, 2)).sum()

        losses = [(lambda row=row: loss(row)) if callables else loss(row) for row in rows]
        opt.backward(dict(zip(WEIGHTS, losses, strict=True)), accumulate=k < 2)
    return whole([model[0].x.grad])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("callables", [False, True])
def test_kept_gradients_are_not_the_users_memory(
    two_ranks: Ranks, plain: bool, callables: bool
) -> None:
    factor = sum(w * (k + i + 1) for k in range(3) for i, w in enumerate(WEIGHTS.values()))
    for (found,) in two_ranks.run(from_one_buffer, plain, callables):
        assert torch.allclose(found, factor * torch.arange(1.0, 1.0 + WIDTH), rtol=1e-5)


def train_replaced(rank: int, loads: bool) -> Result:
    """As Accelerate's FSDP2 does it: the groups get other tensors after the optimizer is built."""
    torch.manual_seed(0)
    model = Model()
    opt = chosen(model, heads=True)
    if loads:  # as AcceleratedOptimizer does; it makes new groups
        opt.load_state_dict(opt.state_dict())
    shard(model, init_device_mesh("cpu", (2,)))
    opt.param_groups[0]["params"] = list(model.parameters())
    return run(model, rank, 2, together, opt)


@pytest.mark.parametrize("loads", [False, True])
def test_shared_parameters_survive_new_tensors_in_the_groups(two_ranks: Ranks, loads: bool) -> None:
    check_same_steps(two_ranks.run(train_replaced, loads), alone(heads=True))


def two_inner(model: Model) -> CAGradClip:
    blocks = torch.optim.SGD(model.blocks.parameters(), lr=0.05, momentum=0.9)
    heads = torch.optim.AdamW(model.heads.parameters(), lr=1e-2)
    return CAGradClip([blocks, heads], WEIGHTS, shared_parameters=model.blocks.parameters())


def train_two_inner(rank: int) -> Result:
    model, part, parts = model_of("fsdp", 2)
    return run(model, part, parts, together, two_inner(model))


def test_several_inner_optimizers(two_ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = Model()
    expected = run(model, 0, 1, together, two_inner(model))
    check_same_steps(two_ranks.run(train_two_inner), expected)


def train_in_low_precision(rank: int) -> tuple[list[Tensor], set[torch.dtype]]:
    torch.manual_seed(0)
    model = Model()
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, init_device_mesh("cpu", (2,)), mp_policy=low)
    found, _ = run(model, rank, 2, together)
    return found, {p.grad.dtype for p in model.blocks.parameters()}


def test_low_precision_with_gradients_summed_in_float32(two_ranks: Ranks) -> None:
    expected, _ = alone()
    results = two_ranks.run(train_in_low_precision)
    for found, dtypes in results:
        assert dtypes == {torch.float32}
        assert all(map(torch.equal, found, results[0][0]))
        assert 1e-5 < relative(found, expected) < 2e-2


def train_scaled(rank: int) -> tuple[list[Tensor], list[float], int]:
    """In one step more, a gradient overflows where this process has its part of a bias."""
    model, part, parts = model_of("fsdp", 2)
    opt = optimizer(model, nonfinite="propagate")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scales, overflown = [], 0
    for i, step in enumerate([0, 1, 2, *range(2, FEW)]):
        x, y = batch(step, part, parts)
        opt.zero_grad()
        losses = losses_of(model(x), y)
        if i == 2:
            bias = model.heads["a"].linear.bias.to_local()
            losses["a"] = losses["a"] + 1e38 * rank * (bias - bias.detach()).sum()
        opt.backward({name: scaler.scale(loss) for name, loss in losses.items()})
        grads = [p.grad.to_local() for p in model.heads.parameters()]
        overflown += sum(int((~g.isfinite()).sum()) for g in grads)
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
    return whole(model.parameters()), scales, overflown


def test_overflow_in_one_part_of_a_gradient_makes_all_skip(two_ranks: Ranks) -> None:
    expected, _ = alone()
    results = two_ranks.run(train_scaled)
    assert [overflown for *_, overflown in results] == [0, 1]
    for found, scales, _ in results:
        assert relative(found, expected) < 1e-5
        assert scales == [2.0**12] * 2 + [2.0**11] * (FEW - 1)


def clipped(rank: int, number: int) -> tuple[list[float], list[float], list[Tensor]]:
    torch.manual_seed(0)
    model = model_of("fsdp", 2)[0] if number > 1 else Model()
    opt = optimizer(model)
    norms, expected = [], []
    for step in range(FEW):
        x, y = batch(step, rank, number)
        opt.zero_grad()
        opt.backward(losses_of(model(x), y))
        (norm,) = whole([nn.utils.clip_grad_norm_(model.parameters(), 0.5)])
        opt.step()
        alpha, gram = opt.report.coefficients, opt.report.gram
        norms.append(norm.item())
        expected.append((alpha @ gram @ alpha).sqrt().item())
    return norms, expected, whole(model.parameters())


def test_clipping_sees_the_norm_of_the_combined_gradient(two_ranks: Ranks) -> None:
    *_, parameters = clipped(0, 1)
    for norms, expected, found in two_ranks.run(clipped, 2):
        assert norms == pytest.approx(expected, rel=1e-5)
        assert max(norms) > 0.5
        assert relative(found, parameters) < 1e-5


def step_with_nan(rank: int, policy: str) -> tuple[str, list[Any], list[Tensor]]:
    """A step in which a loss is NaN on rank 1, and one of ordinary losses."""
    model, part, parts = model_of("fsdp", 2)
    opt = optimizer(model, nonfinite=policy)
    x, y = batch(0, part, parts)
    losses = losses_of(model(x), y)
    losses["b"] = losses["b"] * (torch.nan if rank else 1.0)
    message = ""
    try:
        opt.backward(losses)
        opt.step()
    except FloatingPointError as error:
        message = str(error)
    grads = [None if p.grad is None else p.grad.to_local() for p in model.parameters()]
    bad = [None if g is None else bool(g.isnan().all()) for g in grads]
    if policy == "propagate":
        return message, bad, []
    opt.zero_grad()
    opt.backward(losses_of(model(x), y))
    opt.step()
    return message, bad, whole(model.parameters())


@pytest.mark.parametrize("policy", ["raise", "skip", "propagate"])
def test_nan_in_one_process_is_met_by_all(two_ranks: Ranks, policy: str) -> None:
    torch.manual_seed(0)
    model = Model()
    opt = optimizer(model)
    opt.backward(losses_of(model(batch(0)[0]), batch(0)[1]))
    opt.step()
    for message, bad, parameters in two_ranks.run(step_with_nan, policy):
        assert ("loss 'b' is NaN or Inf on rank 1" in message) == (policy == "raise")
        if policy == "propagate":  # in a head, that of its own loss alone
            blocks, heads = [True] * 12, [False, False, True, True, False, False]
            assert bad == [*blocks, *heads, None, None]
        else:
            assert bad == [None] * 20
            assert relative(parameters, whole(model.parameters())) < 1e-5


SHARDED = (
    *("absent", "all absent", "micro", "accumulate", "representation", "gram", "gram_every"),
    "group",
)


def unfit(what: str) -> tuple[Model, CAGradClip]:
    """Returns a model and an optimizer that do not fit each other, or what is done with them."""
    number = dist.get_world_size()
    if what in SHARDED:
        model, *_ = model_of("fsdp", number)
        settings: dict[str, Callable[[], dict[str, Any]]] = {
            "absent": dict,
            "all absent": dict,
            "micro": dict,
            "accumulate": dict,
            "representation": lambda: {"gradients": "representation"},
            "gram": lambda: {"gradients": model.blocks.parameters()},
            "gram_every": lambda: {"gram_every": 2},
            "group": lambda: {"process_group": dist.new_subgroups(group_size=number // 2)[0]},
        }
        return model, optimizer(model, **settings[what]())
    torch.manual_seed(0)
    model = Model()
    if what == "built before":
        opt = optimizer(model)
        shard(model, init_device_mesh("cpu", (number,)))
        return model, opt
    if what == "data":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        cut_tensors(model, mesh["tensor"])
        return model, optimizer(model)
    for block in model.blocks:
        fully_shard(block, mesh=init_device_mesh("cpu", (number,)))
    return model, chosen(model, heads=what == "plain heads")


def refused(rank: int, what: str) -> str:
    """Returns the message of the error, to which every process must come."""
    model, opt = unfit(what)
    x, y = batch(0, rank, dist.get_world_size())
    losses: dict[str, Tensor | None] = {**losses_of(model(x), y)}
    if what == "all absent":
        losses = dict.fromkeys(losses)
    if what in ("absent", "micro") and rank:
        losses["b"] = None
    accumulate = what == "micro" or (what == "accumulate" and rank == 1)
    representation = x if what == "representation" else None
    with pytest.raises(ValueError) as found:
        opt.backward(losses, accumulate=accumulate, representation=representation)
    assert all(p.grad is None for p in model.parameters())
    return str(found.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("absent", "['a', None, 'c'] on rank 1"),
        ("all absent", "`losses` must hold at least one loss; got None for all of them."),
        ("micro", "['a', None, 'c'] on rank 1"),
        ("accumulate", "got False on rank 0, True on rank 1"),
        ("built before", "Was the optimizer built from this model's parameters?"),
        ("plain", "those of loss 'a' have norms from"),
        ("plain heads", "those of loss 'a' have norms from"),
        ("representation", "must be exact for DTensor parameters"),
        ("gram", "must be exact for DTensor parameters"),
        ("gram_every", "must be exact for DTensor parameters"),
    ],
)
def test_what_can_not_be_right_is_refused_by_all(two_ranks: Ranks, what: str, message: str) -> None:
    for found in two_ranks.run(refused, what):
        assert message in found


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("data", "those of loss 'a' have norms from"),
        ("group", "`process_group` must hold all processes of the mesh"),
    ],
)
def test_meshes_that_miss_processes_are_refused_by_all(
    four_ranks: Ranks, what: str, message: str
) -> None:
    for found in four_ranks.run(refused, what):
        assert message in found


def fail_on_one(rank: int) -> None:
    model, part, parts = model_of("fsdp", 2)
    opt = optimizer(model)
    x, y = batch(0, part, parts)

    def loss() -> Tensor:
        found = losses_of(model(x), y)["a"]
        if rank:
            raise LookupError("no such label")
        return found

    try:
        opt.backward({"a": loss, "b": loss, "c": None})
    finally:
        assert all(p.grad is None for p in model.parameters())


def test_callable_that_fails_in_one_process_fails_in_all(two_ranks: Ranks) -> None:
    first, second = two_ranks.outcomes(fail_on_one)
    assert isinstance(second.error, LookupError)
    assert "rank 1: LookupError: no such label" in str(first.error)
    # And they are in step.
    results = two_ranks.run(train_in_a_way, "fsdp", together, False, "", "dense")
    check_same_steps(results, alone())
