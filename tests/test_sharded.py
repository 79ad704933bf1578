"""Models of which every process holds a part: the steps of one process on the joint batch.

FSDP2, HSDP, tensor and sequence parallelism, and FSDP2 with tensor parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache, partial
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
from tests.ranks import WEIGHTS, OneBuffer, Ranks, copies, equal, losses_of, relative, slices

STEPS = 4
WIDTH, HIDDEN, TOKENS, ROWS = 6, 16, 4, 8


class Block(nn.Module):
    """Tensor parallelism cuts its matrices."""

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
    """Two blocks, three heads, and a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block())
        self.heads = nn.ModuleDict({name: Head() for name in WEIGHTS})
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor, names: tuple[str, ...] = tuple(WEIGHTS)) -> dict[str, Tensor]:
        z = self.blocks(x)
        return {name: self.heads[name](z) for name in names}


@cache
def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def model_of(kind: str, number: int) -> tuple[Model, int, int]:
    """Returns a model, and which of how many parts of the batch this process takes."""
    model, rank = Model(), dist.get_rank()
    if kind.startswith("hsdp"):
        replicas = int(kind[-1])
        names = ("replicate", "shard")
        shard(model, mesh_of(replicas, number // replicas, names=names))
    elif kind in ("tensor", "sequence"):
        cut_tensors(model, mesh_of(number), sequence=kind == "sequence")
        return model, 0, 1
    elif kind == "fsdp, sequence":
        mesh = mesh_of(2, number // 2, names=("data", "tensor"))
        cut_tensors(model, mesh["tensor"], sequence=True)
        shard(model, mesh["data"])
        return model, mesh.get_local_rank("data"), 2
    else:
        if "checkpoints" in kind:
            model.blocks = nn.Sequential(*(checkpointed(block, kind) for block in model.blocks))
        shard(model, mesh_of(number), reshard_after_forward=kind != "fsdp kept")
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


def checkpointed(block: Block, kind: str) -> nn.Module:
    if "composable" in kind:
        return composable_checkpoint(block)
    if "selective" in kind:
        products = [torch.ops.aten.addmm.default]
        return checkpoint_wrapper(
            block, context_fn=lambda: create_selective_checkpoint_contexts(products)
        )
    return checkpoint_wrapper(block)


def batch(step: int, part: int = 0, parts: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, TOKENS, WIDTH, generator=generator)
    y = torch.randn(ROWS, TOKENS, 2, generator=generator)
    return slices([x, y], part, parts)


# --- Optimizers ----------------------------------------------------------------------------------


def optimizer(model: nn.Module, c: float = 0.4, **settings: Any) -> CAGradClip:
    return CAGradClip(torch.optim.AdamW(model.parameters(), lr=1e-2), WEIGHTS, c=c, **settings)


def with_heads(model: Model) -> CAGradClip:
    return optimizer(model, shared_parameters=model.blocks.parameters())


def of_a_block(model: Model) -> CAGradClip:
    """No optimizer holds the other block and the heads."""
    return optimizer(model.blocks[1])


def two_inner(model: Model) -> CAGradClip:
    blocks = torch.optim.SGD(model.blocks.parameters(), lr=0.05, momentum=0.9)
    heads = torch.optim.AdamW(model.heads.parameters(), lr=1e-2)
    return CAGradClip([blocks, heads], WEIGHTS, shared_parameters=model.blocks.parameters())


# --- Backward passes -----------------------------------------------------------------------------


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
    if len(x) == ROWS:  # the joint batch, whose second half has no label of "b"
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
        penalty = penalty + other  # a DTensor: every process holds a part of the sum
    opt.backward(losses_of(model(x), y) | {"c": penalty})


def with_losses_in_parts(model: Model, opt: CAGradClip, x: Tensor, y: Tensor, step: int) -> None:
    """Every process holds a part of each loss."""
    mesh = mesh_of(2)
    if step == 0:
        for head in model.heads.values():
            parallelize_module(head, mesh, {"linear": ColwiseParallel(use_local_output=False)})
        opt.param_groups[0]["params"] = list(model.parameters())
    losses = losses_of(model(x), distribute_tensor(y, mesh, [Shard(2)]))
    assert "Partial" in str(losses["a"].placements)
    opt.backward(losses)


Backward = Callable[[Model, CAGradClip, Tensor, Tensor, int], None]
Result = tuple[list[Tensor], list[Any], set[str]]


def run(model: Model, part: int, parts: int, backward: Backward, opt: CAGradClip) -> Result:
    """Trains; returns the parameters, the reports and how the parameters are cut."""
    reports = []
    for step in range(STEPS):
        opt.zero_grad()
        backward(model, opt, *batch(step, part, parts), step)
        opt.step()
        reports.append(opt.report)
    cuts = {str(p.placements) for p in model.parameters() if isinstance(p, DTensor)}
    return copies(model.parameters()), reports, cuts


def warned(make: Any) -> contextlib.AbstractContextManager[Any]:
    if make is not of_a_block:
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match="depend on 12 parameters, with 268 numbers, that no")


def train(
    rank: int, number: int, kind: str, backward: Backward = together, make: Any = optimizer
) -> Result:
    model, part, parts = model_of(kind, number)
    with warned(make):
        return run(model, part, parts, backward, make(model))


@cache
def alone(backward: Backward = together, make: Any = optimizer) -> Result:
    """One process without torch.distributed, on the joint batch."""
    model = Model()
    with warned(make):
        return run(model, 0, 1, backward, make(model))


def check_same_steps(results: list[Result], expected: Result) -> None:
    """All processes have the same bits; they differ from one process by rounding alone."""
    for parameters, reports, _ in results:
        assert relative(parameters, expected[0]) < 1e-5
        assert equal(parameters, results[0][0])
        for report, first, other in zip(reports, results[0][1], expected[1], strict=True):
            assert torch.equal(report.gram, first.gram)
            assert torch.equal(report.gram, report.gram.T)
            assert torch.equal(report.p.nan_to_num(7.0), first.p.nan_to_num(7.0))
            assert report.absent == other.absent
            assert torch.allclose(report.gram, other.gram, rtol=1e-3, atol=1e-6)
            assert torch.allclose(report.losses, other.losses, rtol=1e-4, equal_nan=True)


WAYS: list[tuple[str, Backward, Any]] = [
    ("fsdp", together, optimizer),
    ("fsdp kept", together, optimizer),
    ("hsdp 1", together, optimizer),
    ("hsdp 2", together, optimizer),
    ("tensor", together, optimizer),
    ("sequence", together, optimizer),
    ("fsdp", one_by_one, optimizer),
    ("fsdp kept", one_by_one, optimizer),
    ("fsdp", in_micro_batches, optimizer),
    ("fsdp", with_an_absent_one, optimizer),
    ("fsdp kept", with_an_absent_one, optimizer),
    ("fsdp", with_one_absent_from_a_part, optimizer),
    ("fsdp", onto_a_gradient, optimizer),
    ("sequence", onto_a_gradient, optimizer),
    ("fsdp", with_a_penalty, optimizer),
    ("tensor", with_losses_in_parts, optimizer),
    ("fsdp", together, with_heads),
    ("tensor", together, with_heads),
    ("fsdp", together, partial(optimizer, gradients="ghost")),
    ("fsdp", together, of_a_block),
    ("fsdp", together, two_inner),
    ("fsdp, whole checkpoints", together, optimizer),
    ("fsdp, selective checkpoints", one_by_one, optimizer),
    ("fsdp, composable checkpoints", one_by_one, optimizer),
]


@pytest.mark.parametrize(("kind", "backward", "make"), WAYS)
def test_two_processes_do_the_steps_of_one(two_ranks: Ranks, kind, backward, make) -> None:
    same = (one_by_one, in_micro_batches, with_losses_in_parts)
    expected = alone(together if backward in same else backward, getattr(make, "func", make))
    check_same_steps(two_ranks.run(train, 2, kind, backward, make), expected)


@pytest.mark.parametrize("kind", ["fsdp", "hsdp 2", "fsdp, sequence"])
def test_four_processes_do_the_steps_of_one(four_ranks: Ranks, kind: str) -> None:
    results = four_ranks.run(train, 4, kind)
    check_same_steps(results, alone())
    assert ("_StridedShard" in str(results[0][2])) == ("," in kind)


@pytest.mark.parametrize("how", ["selective", "composable"])
def test_checkpoint_that_serves_one_loss_only_says_so(two_ranks: Ranks, how: str) -> None:
    for outcome in two_ranks.outcomes(train, 2, f"fsdp, {how} checkpoints"):
        # As torch raises it.
        assert type(outcome.error) is (RuntimeError if how == "selective" else AttributeError)
        notes = " ".join(outcome.error.__notes__)
        assert "The backward pass of loss 'b' raised this." in notes
        assert "pass the losses as callables" in notes
        assert "start again from the last checkpoint" in notes


def train_replaced(rank: int, loads: bool) -> Result:
    """As Accelerate's FSDP2 does it: the groups get other tensors after the optimizer is built."""
    model = Model()
    opt = with_heads(model)
    if loads:  # as AcceleratedOptimizer does; it makes new groups
        opt.load_state_dict(opt.state_dict())
    shard(model, mesh_of(2))
    opt.param_groups[0]["params"] = list(model.parameters())
    return run(model, rank, 2, together, opt)


@pytest.mark.parametrize("loads", [False, True])
def test_shared_parameters_survive_new_tensors_in_the_groups(two_ranks: Ranks, loads: bool) -> None:
    check_same_steps(two_ranks.run(train_replaced, loads), alone(together, with_heads))


# --- Gradients -----------------------------------------------------------------------------------


@cache
def gradients_alone() -> list[Tensor]:
    model = Model()
    together(model, optimizer(model), *batch(0), 0)
    return [p.grad for p in model.parameters() if p.grad is not None]


def gradients_and_hooks(rank: int, kind: str) -> tuple[list[Tensor], list[Tensor], int]:
    """The combined gradient, and the gradients that hooks on its accumulation see."""
    model, part, parts = model_of(kind, 2)
    opt = optimizer(model)
    seen: list[Tensor] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.extend(copies([p.grad])))
    x, y = batch(0, part, parts)
    for accumulate in (True, False):
        early = len(seen)
        losses = losses_of(model(x), y)
        opt.backward({name: loss / 2 for name, loss in losses.items()}, accumulate=accumulate)
    return copies(p.grad for p in model.parameters() if p.grad is not None), seen, early


@pytest.mark.parametrize("kind", ["fsdp", "tensor"])
def test_hooks_run_once_on_the_combined_gradient(two_ranks: Ranks, kind: str) -> None:
    for found, seen, during_accumulation in two_ranks.run(gradients_and_hooks, kind):
        assert during_accumulation == 0
        assert relative(found, gradients_alone()) < 1e-5
        assert len(seen) == len(found)
        assert equal(seen, found)


class Vector(nn.Module):
    """A vector whose gradient lies in the memory of a custom function."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(5, dtype=torch.float64))

    def forward(self, row: Tensor) -> Tensor:
        return OneBuffer.apply(self.x, row)


def from_one_buffer(rank: int, plain: bool, callables: bool) -> list[Tensor]:
    """A sharded vector, or a plain one beside a sharded module; three micro-batches."""
    model = nn.ModuleList([Vector(), nn.Linear(2, 1)]).double()
    fully_shard(model[1 if plain else 0], mesh=mesh_of(2))
    opt = optimizer(model, c=0.0)
    for k in range(3):
        rows = [(k + i + 1) * torch.arange(1.0, 6.0).double() for i in range(3)]

        def loss(row: Tensor) -> Tensor:
            return model[0](row) + 0 * model[1](torch.zeros(1, 2).double()).sum()

        losses = [(lambda row=row: loss(row)) if callables else loss(row) for row in rows]
        opt.backward(dict(zip(WEIGHTS, losses, strict=True)), accumulate=k < 2)
    return copies([model[0].x.grad])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("callables", [False, True])
def test_kept_gradients_are_not_the_users_memory(two_ranks: Ranks, plain, callables) -> None:
    factor = sum(w * (k + i + 1) for k in range(3) for i, w in enumerate(WEIGHTS.values()))
    for (found,) in two_ranks.run(from_one_buffer, plain, callables):
        assert torch.allclose(found, factor * torch.arange(1.0, 6.0).double(), rtol=1e-5)


def train_in_low_precision(rank: int) -> tuple[list[Tensor], set[torch.dtype]]:
    model = Model()
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mesh_of(2), mp_policy=low)
    found, *_ = run(model, rank, 2, together, optimizer(model))
    return found, {p.grad.dtype for p in model.blocks.parameters()}


def test_low_precision_with_gradients_summed_in_float32(two_ranks: Ranks) -> None:
    results = two_ranks.run(train_in_low_precision)
    for found, dtypes in results:
        assert dtypes == {torch.float32}
        assert equal(found, results[0][0])
        assert 1e-5 < relative(found, alone()[0]) < 2e-2


def train_scaled(rank: int) -> tuple[list[Tensor], list[float], int]:
    """In an extra step, a gradient overflows where this process has its part of a bias."""
    model, part, parts = model_of("fsdp", 2)
    opt = optimizer(model, nonfinite="propagate")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scales, overflown = [], 0
    for i, step in enumerate([0, 1, 2, *range(2, STEPS)]):
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
    return copies(model.parameters()), scales, overflown


def test_overflow_in_one_part_of_a_gradient_makes_all_skip(two_ranks: Ranks) -> None:
    results = two_ranks.run(train_scaled)
    assert [overflown for *_, overflown in results] == [0, 1]
    for found, scales, _ in results:
        assert relative(found, alone()[0]) < 1e-5
        assert scales == [2.0**12] * 2 + [2.0**11] * (STEPS - 1)


def clipped(rank: int, number: int) -> tuple[list[float], list[float], list[Tensor]]:
    model = model_of("fsdp", 2)[0] if number > 1 else Model()
    opt = optimizer(model)
    norms, expected = [], []
    for step in range(STEPS):
        opt.zero_grad()
        together(model, opt, *batch(step, rank, number), step)
        norms += copies([nn.utils.clip_grad_norm_(model.parameters(), 0.5)])
        opt.step()
        alpha, gram = opt.report.coefficients, opt.report.gram
        expected.append((alpha @ gram @ alpha).sqrt().item())
    return [norm.item() for norm in norms], expected, copies(model.parameters())


def test_clipping_sees_the_norm_of_the_combined_gradient(two_ranks: Ranks) -> None:
    *_, parameters = clipped(0, 1)
    for norms, expected, found in two_ranks.run(clipped, 2):
        assert norms == pytest.approx(expected, rel=1e-5)
        assert max(norms) > 0.5
        assert relative(found, parameters) < 1e-5


# --- Faults --------------------------------------------------------------------------------------


def step_with_nan(rank: int, policy: str) -> tuple[str, list[Any], list[Tensor]]:
    """A backward in which a loss is NaN on rank 1, and one of ordinary losses."""
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
    return message, bad, copies(p.grad for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("policy", ["raise", "skip", "propagate"])
def test_nan_in_one_process_is_met_by_all(two_ranks: Ranks, policy: str) -> None:
    for message, bad, grads in two_ranks.run(step_with_nan, policy):
        assert ("loss 'b' is NaN or Inf on rank 1" in message) == (policy == "raise")
        if policy == "propagate":  # into a head from its own loss alone
            blocks, heads = [True] * 12, [False, False, True, True, False, False]
            assert bad == [*blocks, *heads, None, None]
        else:
            assert bad == [None] * 20
            assert relative(grads, gradients_alone()) < 1e-5


def mismatched(what: str, number: int) -> tuple[Model, CAGradClip]:
    """Returns a model and an optimizer that do not fit each other."""
    model = Model()
    if what == "built before":
        opt = optimizer(model)
        shard(model, mesh_of(number))
        return model, opt
    if what == "data":
        cut_tensors(model, mesh_of(2, 2, names=("data", "tensor"))["tensor"])
    elif what.startswith("plain"):
        for block in model.blocks:
            fully_shard(block, mesh=mesh_of(number))
        return model, with_heads(model) if what == "plain heads" else optimizer(model)
    else:
        shard(model, mesh_of(number))
    settings: dict[str, Callable[[], Any]] = {
        "gram_every": lambda: 2,
        "process_group": lambda: dist.new_subgroups(group_size=number // 2)[0],
        "gradients": lambda: "representation",
        "gradients of a layer": model.blocks.parameters,
    }
    name = what.split()[0]
    return model, optimizer(model, **({name: settings[what]()} if what in settings else {}))


def refused(rank: int, number: int, what: str) -> str:
    """Returns the message of the error, which every process must raise."""
    model, opt = mismatched(what, number)
    x, y = batch(0, rank, number)
    losses: dict[str, Tensor | None] = {**losses_of(model(x), y)}
    if what == "all absent":
        losses = dict.fromkeys(losses)
    if what in ("absent", "micro") and rank:
        losses["b"] = None
    accumulate = what == "micro" or (what == "accumulate" and rank == 1)
    representation = x if what == "gradients" else None
    with pytest.raises(ValueError) as found:
        opt.backward(losses, accumulate=accumulate, representation=representation)
    assert all(p.grad is None for p in model.parameters())
    return str(found.value)


@pytest.mark.parametrize(
    ("number", "what", "message"),
    [
        (2, "absent", "['a', None, 'c'] on rank 1"),
        (2, "all absent", "`losses` must hold at least one loss; got None for all of them."),
        (2, "micro", "['a', None, 'c'] on rank 1"),
        (2, "accumulate", "got False on rank 0, True on rank 1"),
        (2, "built before", "Was the optimizer built from this model's parameters?"),
        (2, "plain", "those of loss 'a' have norms from"),
        (2, "plain heads", "those of loss 'a' have norms from"),
        (2, "gradients", "must be exact for DTensor parameters"),
        (2, "gradients of a layer", "must be exact for DTensor parameters"),
        (2, "gram_every", "must be exact for DTensor parameters"),
        (4, "data", "those of loss 'a' have norms from"),
        (4, "process_group", "`process_group` must hold all processes of the mesh"),
    ],
)
def test_all_processes_refuse_a_mismatch(two_ranks, four_ranks, number, what, message) -> None:
    ranks = {2: two_ranks, 4: four_ranks}[number]
    for found in ranks.run(refused, number, what):
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
    # And the processes are in step.
    check_same_steps(two_ranks.run(train, 2, "fsdp"), alone())
