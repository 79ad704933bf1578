"""Mode "per_example": one backward pass for all losses, against a plain one for each."""

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.step_cost_memory import measure_memory
from raco_optim import CAGradClip
from tests.ghost_models import Net
from tests.problems_nn import OwnBackward
from tests.tiny_language_models import FAMILIES, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of transformers, about itself
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

DOUBLE, SINGLE, HALF = torch.float64, torch.float32, torch.bfloat16
RAN, CALLABLES = "per_example", "dense: callables"
PARTLY = "per_example; one pass for each loss where "
UNKNOWN = "a parameter is in no known layer"
OTHER_SHAPE = "a layer's output is not [N, ..., features]"
OUTSIDE = "a parameter is used outside its layer, or has a hook"
INTERACT = "dense: examples interact, or a hook changes gradients"
HOOKED = "dense: a hook may change gradients"
MORE = "dense: a loss depends on more than the scalars"


# Models, inputs and losses


def mlp():
    torch.manual_seed(1)
    layers = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 1)
    return nn.Sequential(*layers).double()


def rows(step, n=6):
    return torch.randn(n, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(step))


def tokens(step, t=5):
    """``[6, t, 4]``, every token another."""
    return (rows(step)[:, None] * torch.arange(1, t + 1, dtype=DOUBLE)[:, None]).sin()


def ids(step):
    return torch.randint(0, 9, (6, 7), generator=torch.Generator().manual_seed(step))


def flat(model, x):
    return model(x.to(next(model.parameters()).dtype)).squeeze(-1).double()


def summed(model, x):
    return model(x.to(next(model.parameters()).dtype)).flatten(1).double().sum(1)


def whole(model, x):
    return model(x).flatten(1).sum(1)


def three(z):
    """Curved, so that the sensitivities differ from example to example."""
    return [z.square().mean(), z.sin().sum(), (z[:2] * z[-2:]).sum()]


def six(z):
    return [*three(z), *(z.cos().mean() * k + z[k] for k in range(3))]


# The mode, and plain backward passes


def optimizer(model, mode=RAN, m=3, **options):
    inner = torch.optim.SGD(options.pop("parameters", model.parameters()), 0.05)
    options |= {"model": model} if mode == RAN else {}
    weights = [0.5, 0.2, 0.3] if m == 3 else [1 / m] * m
    return CAGradClip(inner, weights, gradients=mode, **options)


def plain(losses, model):
    """Per-loss gradients as lists, by a plain backward pass for each."""
    found = []
    for loss in losses:
        model.zero_grad()
        if loss is not None:
            loss.backward(retain_graph=True)
        found.append([p.grad for p in model.parameters()])
    model.zero_grad()
    return found


def joined(grads):
    return torch.cat([g.double().flatten() for g in grads if g is not None])


def assert_near(grads, expected, tolerance):
    """Relative to the norm of the whole."""
    assert [g is None for g in grads] == [g is None for g in expected]
    assert (joined(grads) - joined(expected)).norm() <= tolerance * joined(expected).norm()


def assert_combined(opt, model, gradients, tolerance, shared=None):
    """``.grad`` and the Gram matrix follow from these per-loss gradients."""
    parameters = list(model.parameters())
    chosen = {id(p) for p in shared or parameters}
    jacobian, expected = [], []
    for p, *column in zip(parameters, *gradients, strict=True):
        there = [torch.zeros_like(p) if g is None else g for g in column]
        block = torch.stack([g.double().flatten() for g in there])
        jacobian += [block] if id(p) in chosen else []
        scales = opt.report.coefficients if id(p) in chosen else opt.report.weights
        reached = any(g is not None for g in column)
        expected.append((scales @ block).view_as(p) if reached else None)
        assert p.grad is None or p.grad.dtype == p.dtype
    J = torch.cat(jacobian, 1)
    assert (opt.report.gram - J @ J.T).norm() <= 10 * tolerance * (J @ J.T).norm()
    assert_near([p.grad for p in parameters], expected, tolerance)


def call(opt, model, forward=flat, x=None, losses=three, tolerance=1e-12):
    """One call, against plain backward passes; returns what the report says about the mode."""
    x = rows(0) if x is None else x
    torch.manual_seed(0)
    gradients = plain(losses(forward(model, x)), model)
    torch.manual_seed(0)
    z = forward(model, x)
    opt.backward(losses(z), scalars=z)
    assert_combined(opt, model, gradients, tolerance)
    return opt.report.gradients


def check(
    make, forward=flat, expected=RAN, *, x=rows, losses=three, dtype=DOUBLE, exact=1e-12, heads=None
):
    """Three steps of the mode; `expected` is a part of what the report says about it."""
    tolerance = {DOUBLE: exact, SINGLE: 1e-6, HALF: 0.02}[dtype]
    torch.manual_seed(0)
    model = make().to(dtype)
    torch.manual_seed(0)
    twin = make().to(dtype)
    shared = None if heads is None else list(model[:heads].parameters())
    opt = optimizer(model, m=len(losses(torch.ones(6))), shared_parameters=shared)
    for step in range(3):
        z = forward(twin, x(step))
        terms = losses(z)
        gradients = plain(terms, twin)
        found = forward(model, x(step))
        assert torch.equal(found, z), "the model computes the same as without the optimizer"
        opt.zero_grad()
        opt.backward(losses(found), scalars=found)
        report = opt.report
        assert expected in report.gradients
        assert (report.gradients == RAN) == (expected == RAN)
        assert report.absent == tuple(str(i) for i, loss in enumerate(terms) if loss is None)
        values = [torch.full((), torch.nan) if t is None else t.detach().double() for t in terms]
        torch.testing.assert_close(report.losses, torch.stack(values), equal_nan=True)
        assert_combined(opt, model, gradients, tolerance, shared)
        opt.step()
        twin.load_state_dict(model.state_dict())
    return opt.report.gradients


# Models for which one pass serves all parameters


def adapters():
    """A frozen layer with a low-rank correction, as LoRA adds it."""
    base, out = (nn.Linear(*x).requires_grad_(False) for x in ((4, 8), (8, 1)))
    down, up = nn.Linear(4, 2, bias=False), nn.Linear(2, 8, bias=False)
    parts = {"base": base, "down": down, "up": up, "out": out}
    return Net(lambda m, x: m.out((m.base(x) + m.up(m.down(x))).tanh()), **parts)


def attention():
    """The bias of the keys, by which softmax does not change, has a gradient of rounding errors."""

    def forward(m, x):
        return m.o((m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x)).tanh()

    return Net(forward, **{name: nn.Linear(4, 4) for name in "qkvo"})


def repeated():
    """A layer that is used twice, one that is not used, and a frozen weight and norm."""
    first, second, unused = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
    first.weight.requires_grad_(False)
    parts = {"first": first, "second": second, "unused": unused}
    return Net(
        lambda m, x: m.norm(m.second(m.second(m.first(x).tanh()).tanh())).square(),
        **parts,
        norm=nn.LayerNorm(6).requires_grad_(False),
    )


def in_place():
    """A hook that the model has, and outputs that change in place."""

    def forward(m, x):
        h = m.second(torch.relu_(m.first(x)))
        h += 1
        h *= 2
        return h.tanh()

    model = Net(forward, first=nn.Linear(4, 6), second=nn.Linear(6, 6, bias=False))
    model.first.register_forward_hook(lambda _, __, output: output * 3)
    return model


def tied():
    """A table of embeddings, with a padding index, that is also the last layer."""
    table, head = nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 9)
    head.weight = table.weight
    return Net(lambda m, x: m.head(m.table(x)).tanh(), table=table, head=head)


def evaluated(model, x):
    with torch.no_grad():
        model(x[:2])
    model(x[:3])  # with a graph, and of another size
    return flat(model, x)


def in_a_checkpoint(model, x):
    return checkpoint(model, x, use_reentrant=False).squeeze(-1)


def partly_in_a_checkpoint(model, x):
    return checkpoint(model[2:], model[:2](x), use_reentrant=False).squeeze(-1)


# name -> (model, forward pass, inputs of a step, more of `check`)
EXACT = {
    "[N, F]": (mlp, flat, rows, {}),
    "[N, T, F]": (mlp, summed, tokens, {}),
    "[N, T, S, F]": (mlp, summed, lambda step: tokens(step, 6).unflatten(1, (2, 3)), {}),
    "not contiguous": (mlp, summed, lambda step: tokens(step).mT.contiguous().mT, {}),
    "[N, F], float32": (mlp, flat, rows, {"dtype": SINGLE}),
    "[N, T, F], float32": (mlp, summed, tokens, {"dtype": SINGLE}),
    "[N, F], bfloat16": (mlp, flat, rows, {"dtype": HALF}),
    "[N, T, F], bfloat16": (mlp, summed, tokens, {"dtype": HALF}),
    "several sizes": (mlp, flat, lambda step: rows(step, (6, 4, 5)[step]), {}),
    "adapters": (adapters, summed, tokens, {}),
    "zero but for rounding": (attention, summed, tokens, {}),
    "zero but for rounding, float32": (attention, summed, tokens, {"dtype": SINGLE}),
    "repeated, unused and frozen layers": (repeated, summed, tokens, {}),
    "changed in place": (in_place, summed, tokens, {}),
    "tied": (tied, whole, ids, {}),
    "evaluation between": (mlp, evaluated, rows, {}),
    "checkpoint": (mlp, in_a_checkpoint, rows, {}),
    "checkpoint of a part": (mlp, partly_in_a_checkpoint, rows, {}),
    "one loss absent": (mlp, flat, rows, {"losses": lambda z: [None, *three(z)[1:]]}),
    "two losses absent": (mlp, flat, rows, {"losses": lambda z: [three(z)[0], None, None]}),
    "heads": (mlp, flat, rows, {"heads": 3}),
    "six losses": (mlp, flat, rows, {"losses": six}),
}


@pytest.mark.parametrize("case", EXACT)
def test_one_pass_is_exact(case):
    make, forward, x, options = EXACT[case]
    check(make, forward, x=x, **options)


# Models with other layers, and other uses of layers


def with_outside(*, inside):
    """The last weight is used by its layer (or not), and by an operation of its own."""

    def forward(m, x):
        x = m.b(m.a(x).tanh()).tanh()
        return ((m.c(x) if inside else x) @ m.c.weight.T).tanh()

    return Net(forward, **{name: nn.Linear(4, 4) for name in "abc"})


class Shifted(nn.Module):
    """A norm with weights 1 + w, by its behaviour alone."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, n))

    def forward(self, x):
        return (1 + self.weight) * x / x.norm(dim=-1, keepdim=True)


def norms():
    """Two, and a module that no kind of layer is like."""
    return Net(
        lambda m, x: m.gate(m.w(m.norm(m.linear(x).tanh())).sin()).square(),
        linear=nn.Linear(4, 9),
        norm=nn.LayerNorm(9),
        w=Shifted(9),
        gate=nn.PReLU(1),
    )


def hooked(change):
    """Three layers of one size, after a change."""

    def make():
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        change(model)
        return model

    return make


def curved(model, x):
    return model[2](model[1](model[0](x).tanh()).tanh()).sin().sum((1, 2))


def functional(model, x):
    """Other weights in place of a layer's, whose gradients reach the parameter."""
    h = model[0](x).tanh()
    h = torch.func.functional_call(model[1], {"weight": 2 * model[1].weight}, (h,))
    return model[2](h.tanh()).sin().sum((1, 2))


def flattened(model, x):
    """Tokens of all examples in one dimension, in one of the layers."""
    return model[1](model[0](x).flatten(0, 1)).tanh().sum(-1).view(*x.shape[:2]).sum(1)


def replaced(model):
    """A forward pass of its own, as other libraries give a layer."""
    model[0].forward = lambda x: 3 * x @ model[0].weight.T


def wide():
    return nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2))


# name -> (change of three layers, what is not covered, or the report)
HOOKS = {
    "of a parameter": (lambda m: m[0].weight.register_hook(lambda g: 2 * g), "or has a hook"),
    "before": (lambda m: m[0].register_forward_pre_hook(lambda _, x: (2 * x[0],)), RAN),
    "after": (lambda m: m[0].register_forward_hook(lambda _, __, y: 2 * y), RAN),
    "backward": (lambda m: m[1].register_full_backward_hook(lambda _, g, __: (2 * g[0],)), HOOKED),
    "forward pass of its own": (replaced, UNKNOWN),
}
# name -> (model, forward pass, what is not covered, or the report)
KINDS = {
    "norms": (norms, whole, UNKNOWN),
    "outside too": (lambda: with_outside(inside=True), whole, OUTSIDE),
    "outside alone": (lambda: with_outside(inside=False), whole, UNKNOWN),
    "tokens of all examples": (wide, flattened, OTHER_SHAPE),
    "functional": (hooked(lambda _: None), functional, UNKNOWN),
    **{f"hook {name}": (hooked(change), curved, why) for name, (change, why) in HOOKS.items()},
}


@pytest.mark.parametrize("case", KINDS)
def test_kinds_of_layers(case):
    """Exact, whether one pass serves all parameters, some or none."""
    make, forward, why = KINDS[case]
    check(make, forward, why, x=tokens)
    report = check(make, forward, why, x=tokens, losses=six)
    assert report.startswith(RAN) or why == HOOKED, "with more losses it pays"


def outside(share):
    """Uses the first weight beside its layer, for that share of its gradient."""

    def forward(model, x):
        x = x.to(model[0].weight.dtype)
        layer = torch.autograd.grad(model(x).sum(), model[0].weight)[0].norm()
        alone = x.sum(0).norm() * len(model[0].weight) ** 0.5
        beside = (x @ model[0].weight.mT).sum(1)
        return (model(x).squeeze(-1) + (share * layer / alone).detach() * beside).double()

    return forward


def batch_normalized():
    torch.manual_seed(1)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 1)
    return nn.Sequential(*layers).double()


def clamped(model, x):
    h = model[1](model[0](x))
    h.register_hook(lambda g: g.clamp(-0.05, 0.05))
    return model[2:](h).squeeze(-1)


def tokens_first(model, x):
    """``[T, N, F]`` with as many tokens as examples."""
    return model(tokens(int(x[0, 0] * 1000) % 7, 6).transpose(0, 1)).sum((0, 2))


def packed_tokens(model, x):
    return model(torch.stack([x, -x, x * x]).reshape(1, 18, 4)).view(3, 6).sum(0)


ALL_SHAPES = f"dense: {OTHER_SHAPE} (5 of 5 parameters: 0.weight, ...)"
SOME_SHAPES = f"{PARTLY}{OTHER_SHAPE} (2 of 5 parameters: 0.weight, ...)"
FIRST_OUTSIDE = f"{PARTLY}{OUTSIDE} (1 of 5 parameters: 0.weight)"
# name -> (model, forward pass, what the report says, dtype)
FALLS_BACK = {
    "packed": (mlp, lambda m, x: m(x.view(1, 6, 4)).view(6), ALL_SHAPES, DOUBLE),
    "packed tokens": (mlp, packed_tokens, ALL_SHAPES, DOUBLE),
    "one layer packed": (
        mlp,
        lambda m, x: m[2:](m[:2](x.view(1, 6, 4)).view(6, 8)).squeeze(-1),
        SOME_SHAPES,
        DOUBLE,
    ),
    "tokens first": (mlp, tokens_first, INTERACT, DOUBLE),
    "outside for 1 %": (mlp, outside(0.01), FIRST_OUTSIDE, DOUBLE),
    "outside for 1 %, float32": (mlp, outside(0.01), FIRST_OUTSIDE, SINGLE),
    "outside for 3 %, bfloat16": (mlp, outside(0.03), FIRST_OUTSIDE, HALF),
    "batch normalization": (batch_normalized, flat, INTERACT, DOUBLE),
    "clamped activations": (mlp, clamped, HOOKED, DOUBLE),
    "centred": (mlp, lambda m, x: flat(m, x) * flat(m, x).mean(), INTERACT, DOUBLE),
}


@pytest.mark.parametrize("case", FALLS_BACK)
def test_what_falls_back_is_right_and_says_why(case):
    make, forward, why, dtype = FALLS_BACK[case]
    check(make, forward, why, dtype=dtype, exact=1e-14)


# Language models


def scores(model, ids):
    log_probs = model(input_ids=ids).logits.log_softmax(-1)
    return log_probs[:, :-1].gather(2, ids[:, 1:, None]).sum((1, 2))


def adapted(family, **options):
    """A language model with adapters that do something, in float64."""
    config = LoraConfig(r=3, target_modules="all-linear", **options)
    model = get_peft_model(tiny_model(family), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model.double().train()


# Language models normalise in float32, whatever their dtype.
LANGUAGE_MODELS = 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_language_models(family, checkpointing):
    """Layers are recomputed once, not once for every loss."""
    model, passes, x = adapted(family), [], torch.randint(3, 20, (5, 7))
    block = model.get_base_model().model.layers[0].self_attn
    block.register_forward_hook(lambda *_: passes.append(1))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    opt = optimizer(model)
    counts = []
    for _ in range(2):
        gradients = plain(three(scores(model, x)), model)
        passes.clear()
        z = scores(model, x)
        opt.backward(three(z), scalars=z)
        counts.append(len(passes))
        assert opt.report.gradients == RAN
        assert_combined(opt, model, gradients, LANGUAGE_MODELS)
    # The first time two more passes are compared.
    assert counts == ([4, 2] if checkpointing else [1, 1])


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"use_dora": True},
        {"use_dora": True, "lora_dropout": 0.5},
    ],
    ids=str,
)
def test_variants_of_adapters(options):
    model, x = adapted("llama", **options), torch.randint(3, 20, (5, 7))
    assert call(optimizer(model), model, scores, x, tolerance=LANGUAGE_MODELS) == RAN


# Changes between steps


@pytest.mark.parametrize("late", [False, True])
def test_a_hook_before_ours(late):
    """It changes the output before it is marked, unless it is seen."""
    model = hooked(lambda _: None)().double()
    opt = optimizer(model)
    for step in range(3):
        if step == late:
            model[0].register_forward_hook(lambda _, __, y: 3 * y, prepend=True)
        ran = call(opt, model, curved, tokens(0))
        assert (ran == RAN) == (step < late)


def test_a_layer_that_changes_what_it_does(monkeypatch):
    """Nothing but the numbers shows it: an error, then a pass for each loss."""
    linear = nn.functional.linear

    def doubled(x, *others):  # inputs of the first layer, which are not in the graph
        return linear(x if x.requires_grad else 2 * x, *others)

    model = hooked(lambda _: None)().double()
    opt = optimizer(model)
    said = []
    for step in range(200):
        if step == 1:
            monkeypatch.setattr(nn.functional, "linear", doubled)
        z = curved(model, tokens(0))
        try:
            opt.backward(three(z), scalars=z)
        except RuntimeError as error:
            assert re.search("must .* in (any|every) step", str(error))
            said.append("error")
        else:
            said.append(opt.report.gradients)
        if said[-1] == INTERACT:
            break
    assert said[-2:] == ["error", INTERACT]
    assert set(said[:-2]) == {RAN}


def test_freezing_and_unfreezing_between_steps():
    model = mlp()
    opt = optimizer(model)

    def forward(model, x):
        z = flat(model.requires_grad_(True), x)
        model[2].requires_grad_(False)
        return z

    for step in range(5):
        model.requires_grad_(True)
        model[0].weight.requires_grad_(step not in (1, 2))
        model[4].requires_grad_(step not in (2, 3))
        assert call(opt, model, x=rows(step)) == RAN
        opt.step()
    assert call(opt, model, forward) == RAN, "frozen after the forward pass"


def test_batch_normalization_that_begins_after_some_steps():
    """In evaluation it is a constant scale, and examples do not interact."""
    model = batch_normalized()
    opt = optimizer(model)
    for training in (False, False, True, False):
        model.train(training)
        assert call(opt, model) == (INTERACT if training else RAN)


def test_a_graph_that_differs_from_step_to_step():
    """Some graphs are checked at once, others when they come again; few are remembered."""
    model, ran = mlp(), []
    opt = optimizer(model)
    for length in [*range(12), *range(12)]:

        def forward(model, x, length=length):
            z = flat(model, x)
            for _ in range(length):
                z = z.sin() + 1
            return z

        ran.append(call(opt, model, forward))
    assert ran[:8] + ran[12:] == [RAN] * 20
    assert all(x.startswith("dense: the graph is new") for x in ran[8:12])


def test_one_backward_pass_of_the_layers():
    """For any number of losses, once it is known that examples do not interact."""
    model, counts = mlp(), []
    opt = optimizer(model)
    for step in range(3):
        passes = []

        def counted(grad, passes=passes):
            passes.append(1)
            return grad

        z = model[2:](OwnBackward.apply(model[:2](rows(step)), counted)).squeeze(-1)
        opt.backward(three(z), scalars=z)
        counts.append(len(passes))
    assert counts == [3, 1, 1]


# Precision


def test_autocast_is_as_exact_as_autograd():
    torch.manual_seed(0)
    model = repeated().double()
    nn.init.normal_(model.norm.weight)  # or the squares of the output have a constant sum
    truth = plain(three(whole(model, tokens(0))), model)
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        gradients = plain(three(whole(model, tokens(0).float()).float()), model)
        opt = optimizer(model)
        z = whole(model, tokens(0).float()).float()
        opt.backward(three(z), scalars=z)
    assert opt.report.gradients == RAN
    alpha = opt.report.coefficients
    exact, ordinary = (
        sum(a * joined(row) for a, row in zip(alpha, x, strict=True)) for x in (truth, gradients)
    )
    found = joined([p.grad for p in model.parameters()])
    assert (found - exact).norm() < 1.5 * (ordinary - exact).norm()


@pytest.mark.parametrize("scale", [1e-6, 2.0**16, 1e30])
def test_scaled_losses_of_half_precision_layers(scale):
    """Sensitivities leave the range of float16, and their products with what follows do not."""
    model = mlp().float()
    opt = optimizer(model)
    with torch.autocast("cpu", torch.float16):
        z = model(rows(0).float()).squeeze(-1).double() / 16
    opt.backward([scale * loss for loss in three(z)], scalars=z)
    assert opt.report.gradients == RAN
    true = mlp()
    losses = [scale * loss for loss in three(flat(true, rows(0)) / 16)]
    assert_combined(opt, model, plain(losses, true), 0.01)


# Micro-batches, callables and other forms of a call


def test_micro_batches():
    """All forward passes come first, and one of evaluation between."""
    model, sizes = mlp(), ((0, 6), (1, 3), (2, 6))
    parts = [three(flat(model, rows(*size))) for size in sizes]
    totals = [sum(part[i] for k, part in enumerate(parts) if k != i) for i in range(3)]
    gradients = plain(totals, model)
    opt = optimizer(model)
    scalars = [flat(model, rows(*size)) for size in sizes]
    flat(model, rows(9, 2))
    for k, z in enumerate(scalars):
        losses = three(z)
        losses[k] = None
        opt.backward(losses, scalars=z, accumulate=k < 2)
        assert opt._core.mode.ran == RAN
    assert opt.report.absent == ()
    assert_combined(opt, model, gradients, 1e-12)


def test_the_sum_over_micro_batches_leaves_the_earlier_ones_alone():
    model = mlp()
    opt = optimizer(model)
    opt.backward(three(z := flat(model, rows(0))), scalars=z, accumulate=True)
    pending = opt._core.progress.pending
    before = copy.deepcopy(pending.rows)
    opt.backward(three(z := flat(model, rows(1))), scalars=z, accumulate=True)
    z = flat(model, rows(2))
    with pytest.raises(FloatingPointError):
        opt.backward([z.sum() * torch.inf] * 3, scalars=z)
    for row, row_before in zip(pending.rows, before, strict=True):
        assert all(torch.equal(g, h) for g, h in zip(row, row_before, strict=True))


def after_an_empty_one(opt, model, z):
    opt.backward([None, None, None], accumulate=True)  # which needs no scalars
    opt.backward(three(z), scalars=z)


def one_callable(opt, model, z):
    first, *others = three(z)
    opt.backward([lambda: first * 1, *others], scalars=z, retain_graph=True)


def callables(opt, model, z):
    """Each may have a forward pass of its own, and there are no scalars."""
    opt.backward([lambda i=i: three(flat(model, rows(0)))[i] for i in range(3)])


def without_gradients(opt, model, z):
    losses = three(z)
    with torch.no_grad():
        opt.backward(losses, scalars=z)


def compiled(opt, model, z):
    with torch._functorch.config.patch(donated_buffer=False):
        z = torch.compile(model, backend="aot_eager")(rows(0)).squeeze(-1)
        opt.backward(three(z), scalars=z)


# name -> (a call with the losses of z, what the report says)
CALLS = {
    "tensors": (lambda opt, _, z: opt.backward(three(z), scalars=z, retain_graph=True), RAN),
    "micro-batch after one without losses": (after_an_empty_one, RAN),
    "no_grad": (without_gradients, RAN),
    "one callable": (one_callable, CALLABLES),
    "callables": (callables, CALLABLES),
    "a copy of the scalars": (lambda opt, _, z: opt.backward(three(z), scalars=z * 1), MORE),
    "compiled model": (compiled, f"dense: {UNKNOWN} (5 of 5 parameters: 0.weight, ...)"),
}


@pytest.mark.filterwarnings("ignore")  # of torch, about its compiler's options
@pytest.mark.parametrize("case", CALLS)
def test_calls(case):
    make_call, ran = CALLS[case]
    model = mlp()
    gradients = plain(three(flat(model, rows(0))), model)
    opt = optimizer(model)
    make_call(opt, model, flat(model, rows(0)))
    assert opt.report.gradients == ran
    assert_combined(opt, model, gradients, 1e-12)


@pytest.mark.parametrize("index", range(3))
def test_a_loss_with_parameters_beside_the_scalars_falls_back(index):
    def losses(z):
        found = three(z)
        found[index] = found[index] + 0.1 * model[0].weight.square().sum()
        return found

    model = mlp()
    assert call(optimizer(model), model, losses=losses, tolerance=1e-14) == MORE


def test_parameter_of_another_model():
    model = mlp()
    other = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    opt = optimizer(model, parameters=[*model.parameters(), other])
    assert call(opt, model) == RAN
    assert other.grad is None


def test_a_step_that_is_not_finite_is_skipped():
    opt = optimizer(model := mlp(), nonfinite="skip")
    z = flat(model, rows(1))
    opt.backward([three(z)[0] * torch.nan, *three(z)[1:]], scalars=z)
    assert (opt.report.gradients, opt.report.skipped) == (RAN, 1)


def test_a_reentrant_checkpoint_is_an_error():
    model = mlp()
    z = checkpoint(model, rows(0).requires_grad_(), use_reentrant=True).squeeze(-1)
    with pytest.raises(RuntimeError, match="reentrant"):
        optimizer(model).backward(three(z), scalars=z)


# Memory and copies


@pytest.mark.parametrize(("m", "parts"), [(2, 1), (4, 3)])
def test_the_peak_is_that_of_a_pass_for_each_loss(m, parts):
    """And of blocks, which take 4 MB for layers of any size; micro-batches add nothing."""
    peaks = []
    for mode in (RAN, "dense"):
        model = nn.Sequential(*(x for _ in range(6) for x in (nn.Linear(512, 512), nn.Tanh())))
        opt = optimizer(model, mode, m)

        def step(model=model, opt=opt, mode=mode):
            for k in range(parts):
                z = model(torch.ones(4, 16, 512)).sum((1, 2))
                losses = [(z * i).sin().sum() for i in range(1, m + 1)]
                scalars = {"scalars": z} if mode == RAN else {}
                opt.backward(losses, **scalars, accumulate=k < parts - 1)

        found = measure_memory(step, opt.zero_grad)
        peaks.append(found.held + found.peak)
        assert opt.report.gradients == mode
    assert peaks[0] <= 1.1 * peaks[1] + 2**22


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer(how):
    model = mlp()
    opt = optimizer(model)
    z = flat(model, rows(0))
    opt.backward(three(z), scalars=z)
    del z
    opt.zero_grad()
    pair = (model, opt)
    twin, twin_opt = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for m, o in ((model, opt), (twin, twin_opt)):
        z = flat(m, rows(1))
        o.backward(three(z), scalars=z)
        assert o.report.gradients == RAN
    assert torch.equal(*(joined([p.grad for p in m.parameters()]) for m in (model, twin)))
    alone = copy.deepcopy(model)
    z = flat(alone, rows(1))
    assert torch.equal(z, flat(model, rows(1)))
    z.sum().backward()  # whose hooks do nothing


def test_the_hooks_go_with_the_optimizer():
    model = mlp()
    opt = optimizer(model)
    z = flat(model, rows(0))
    opt.backward(three(z), scalars=z)
    del z
    assert sum(len(m._forward_hooks) for m in model.modules()) == 3
    reference = weakref.ref(opt)
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        del opt
        assert reference() is None
    finally:
        gc.enable()
    assert not any(m._forward_hooks for m in model.modules())


def test_two_optimizers_of_one_model():
    model = mlp()
    gradients = plain(three(flat(model, rows(0))), model)
    opts = [optimizer(model), optimizer(model)]
    z = flat(model, rows(0))
    for opt, order in zip(opts, (1, -1), strict=True):
        opt.zero_grad()
        opt.backward(three(z)[::order], scalars=z, retain_graph=True)
        assert opt.report.gradients == RAN
        assert_combined(opt, model, gradients[::order], 1e-12)


# Bad input


UNREACHED = "loss '0' must depend on a parameter of the optimizer"
# name -> (z, scalars for it, exception, what its message says)
BAD_SCALARS = {
    "none": (flat, lambda z: None, TypeError, "got NoneType"),
    "matrix": (flat, lambda z: z[:, None], TypeError, r"got shape \[6, 1\]"),
    "sum": (flat, lambda z: z.sum(), TypeError, r"got shape \[\]"),
    "detached": (flat, lambda z: z.detach(), TypeError, "without a graph"),
    "list": (flat, lambda z: list(z), TypeError, "got list"),
    "of another model": (lambda _, x: flat(mlp(), x), lambda z: z, ValueError, UNREACHED),
    "of no layer": (lambda *_: nn.Parameter(torch.ones(6)) * 2, lambda z: z, ValueError, UNREACHED),
}


@pytest.mark.parametrize("case", BAD_SCALARS)
def test_bad_scalars(case):
    """The failed call changes nothing, and the next one succeeds."""
    forward, change, exception, message = BAD_SCALARS[case]
    model = mlp()
    opt = optimizer(model)
    z = forward(model, rows(0))
    with pytest.raises(exception, match=message):
        opt.backward(three(z), scalars=change(z))
    assert all(p.grad is None for p in model.parameters())
    z = flat(model, rows(0))
    opt.backward(three(z), scalars=z)


@pytest.mark.parametrize("mode", ["dense", "ghost"])
def test_scalars_and_model_are_for_this_mode(mode):
    model = mlp()
    z = flat(model, rows(0))
    with pytest.raises(ValueError, match='`scalars`.*gradients="per_example"'):
        optimizer(model, mode).backward(three(z), scalars=z)
    with pytest.raises(TypeError, match="`model`"):
        CAGradClip(torch.optim.SGD(model.parameters(), 0.1), [1.0], gradients=mode, model=model)
    with pytest.raises(TypeError, match="`model`"):
        CAGradClip(torch.optim.SGD(model.parameters(), 0.1), [0.5, 0.5], gradients=RAN)
