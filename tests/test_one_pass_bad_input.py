"""Models that one pass for all losses does not fit: exact and said, or an error.

Each is compared with a plain backward pass for each loss, in float64.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from raco_optim import CAGradClip
from tests.problems_nn import OwnBackward

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about its old functions

N, DOUBLE = 6, torch.float64
ONE = "per_example"
PARTLY = "per_example; one pass for each loss where "
SHAPE = "a layer's output is not [N, ..., features]"
UNKNOWN = "a parameter is in no known layer"
HOOKED = "dense: a hook may change gradients"
REORDERED = "dense: the examples are reordered"
INTERACT = "dense: examples interact, or a hook changes gradients"


def rows(step):
    return torch.randn(N, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(step))


def sorted_at_first(step):
    """By the first feature, which is the key in `reordered`."""
    x = rows(step)
    return x if step > 1 else x[x[:, 0].argsort()]


def ids(step):
    return torch.randint(10, (N, 5), generator=torch.Generator().manual_seed(step))


def three(z):
    return [z.square().mean(), z.sin().sum(), (z[:2] * z[-2:]).sum()]


def mlp():
    torch.manual_seed(1)
    layers = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 1)
    return nn.Sequential(*layers).double()


def flat(model, x):
    return model(x).flatten(1).sum(1)


def steps(model, forward, x, change, number=6):
    """Yields what each step says after comparing its gradient with that of plain passes."""
    parameters = list(model.parameters())
    opt = CAGradClip(torch.optim.SGD(parameters, 0.02), [0.5, 0.2, 0.3], gradients=ONE, model=model)
    for step in range(number):
        change(model, step)
        inputs = x(step)
        state = {name: p.clone() for name, p in model.state_dict().items()}  # buffers too
        torch.manual_seed(step)  # for dropout
        gradients = [
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for loss in three(forward(model, inputs))
        ]
        model.load_state_dict(state)
        torch.manual_seed(step)
        z = forward(model, inputs)
        opt.zero_grad()
        try:
            opt.backward(three(z), scalars=z)
        except RuntimeError as error:
            yield str(error)
            continue
        jacobian = torch.stack(
            [
                torch.cat(
                    [
                        (p * 0 if g is None else g).flatten()
                        for p, g in zip(parameters, row, strict=True)
                    ]
                )
                for row in gradients
            ]
        )
        gram, expected = jacobian @ jacobian.T, opt.report.coefficients @ jacobian
        got = torch.cat([(p * 0 if p.grad is None else p.grad).flatten() for p in parameters])
        assert (got - expected).norm() <= 1e-10 * expected.norm()
        assert (opt.report.gram - gram).norm() <= 1e-10 * gram.norm()
        yield opt.report.gradients
        opt.step()


def nothing(model, step):
    """Changes no model."""


def check(make, forward, before, after, x=rows, change=nothing):
    """Runs some steps, of which the first two say `before` and the others `after`."""
    said = list(steps(make(), forward, x, change))
    for text, start in zip(said, [before] * 2 + [after] * 4, strict=True):
        assert (
            text == start
            or (start.endswith("where ") and text.startswith(start))
            or ("(" not in start and text.startswith(f"{start} ("))
        ), said


# --- Layers that are unknown, or whose outputs are not one row an example ---


class Lookups(nn.Module):
    """A table and a layer."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(10, 4, **options), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.table(x).tanh())


class Experts(nn.Module):
    """Each example is sent to one of two layers, or weighs both."""

    def __init__(self, sent):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.out, self.sent = nn.Linear(4, 2), nn.Linear(4, 1), sent
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        share = self.router(x).softmax(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if self.sent:
                there = (share.argmax(-1) == i).nonzero()[:, 0]
                y = y.index_add(0, there, expert(x[there]) * share[there, i, None])
            else:
                y = y + expert(x) * share[:, i, None]
        return self.out(y.tanh())


def layers(*middle, width=8):
    def make():
        torch.manual_seed(0)
        made = [layer() for layer in middle]
        return nn.Sequential(nn.Linear(4, 8), *made, nn.Tanh(), nn.Linear(width, 1)).double()

    return make


def tables(**options):
    return lambda: Lookups(**options).double()


def parametrized(by):
    def make():
        model = mlp()
        by(model[2])
        return model

    return make


def in_halves(model, x):
    h = torch.cat([model[:2](x[:3]), model[:2](x[3:])])
    return flat(model[2:], h)


def partly_without_gradients(model, x):
    with torch.no_grad():
        first = model[:2](x[:3])
    return flat(model[2:], torch.cat([first, model[:2](x[3:])]))


def recurrent(cls):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.out = cls(4, 5, batch_first=True), nn.Linear(5, 1)

        def forward(self, x):
            return self.out(self.cell(torch.stack([x, x.sin()], 1))[0])

    return lambda: Recurrent().double()


def attention():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.1)
    return nn.Sequential(layer, nn.Linear(4, 1)).double()


def outside(model, x):
    h = F.linear(model[:2](x), model[2].weight).tanh()
    return flat(model, x) + flat(model[4:], h)


# name -> (model, forward pass, inputs, what the report says)
LAYERS = {
    "table": (tables(), flat, ids, ONE),
    "table with padding": (tables(padding_idx=3), flat, ids, ONE),
    "table with the last row as padding": (tables(padding_idx=-1), flat, ids, ONE),
    "table by frequency": (tables(scale_grad_by_freq=True), flat, ids, f"dense: {UNKNOWN}"),
    "table of bounded norm": (tables(max_norm=0.5), flat, ids, f"dense: {UNKNOWN}"),
    "bag of rows": (
        lambda: nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 1)).double(),
        flat,
        ids,
        f"dense: {UNKNOWN}",
    ),
    "rows of all examples": (
        tables(),
        lambda m, x: m.out((m.table(x) + m.table(torch.arange(5))).tanh()).sum((1, 2)),
        ids,
        f"dense: {SHAPE}",
    ),
    "rows expanded": (
        tables(),
        lambda m, x: m.out(m.table(x) + m.table(torch.arange(5).expand(N, 5))).sin().sum((1, 2)),
        ids,
        ONE,
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 2), nn.Flatten(), nn.Linear(9, 1)).double(),
        lambda m, x: flat(m, x[:, None]),
        rows,
        PARTLY,
    ),
    "batch norm": (layers(lambda: nn.BatchNorm1d(8)), flat, rows, INTERACT),
    "group norm": (layers(lambda: nn.GroupNorm(2, 8)), flat, rows, PARTLY),
    "gates": (layers(lambda: nn.PReLU(8)), flat, rows, PARTLY),
    "dropout": (layers(lambda: nn.Dropout(0.5)), flat, rows, ONE),
    "LSTM": (recurrent(nn.LSTM), flat, rows, f"dense: {UNKNOWN}"),
    "attention": (attention, lambda m, x: flat(m, torch.stack([x, x.cos()], 1)), rows, PARTLY),
    "experts, sent": (lambda: Experts(True).double(), flat, rows, f"dense: {SHAPE}"),
    "experts, weighed": (lambda: Experts(False).double(), flat, rows, ONE),
    "weight norm": (parametrized(nn.utils.parametrizations.weight_norm), flat, rows, None),
    "orthogonal": (parametrized(nn.utils.parametrizations.orthogonal), flat, rows, None),
    "old weight norm": (parametrized(nn.utils.weight_norm), flat, rows, None),
    "used outside too": (mlp, outside, rows, None),
    "used twice": (mlp, lambda m, x: flat(m, x) * flat(m, -x), rows, ONE),
    "in halves": (mlp, in_halves, rows, PARTLY),
    "partly without gradients": (mlp, partly_without_gradients, rows, PARTLY),
    "one example for all": (
        mlp,
        lambda m, x: flat(m, x) + m(torch.ones(1, 4, dtype=DOUBLE)).squeeze(),
        rows,
        f"dense: {SHAPE}",
    ),
    "expanded": (mlp, lambda m, x: flat(m, x[:1].expand(N, 4)) * x[:, 0], rows, ONE),
    "examples in the second dimension": (
        mlp,
        lambda m, x: m(torch.stack([x * k for k in range(N)])).sum((0, 2)),
        rows,
        INTERACT,
    ),
    "other weights": (
        mlp,
        lambda m, x: torch.func.functional_call(
            m, {name: 1.5 * p for name, p in m.named_parameters()}, (x,)
        ).squeeze(-1),
        rows,
        f"dense: {UNKNOWN}",
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case):
    make, forward, x, said = LAYERS[case]
    if said is not None:
        check(make, forward, said, said, x)
        return
    for text in steps(make(), forward, x, nothing):
        assert text.startswith("dense: a parameter is")


# --- What changes between steps ---


def clamp(g):
    return g.clamp(-0.02, 0.02)


def from_step_two(change):
    return lambda model, step: change(model) if step == 2 else None


def doubled(model):
    """Nothing in the graph shows that the inputs, which need no gradient, are another."""
    weight, bias = model[0].weight, model[0].bias
    model[0].forward = lambda x: F.linear(2 * x, weight, bias)


def another_class(model):
    class Tripled(nn.Linear):
        def forward(self, x):
            return super().forward(3 * x)

    model[0].__class__ = Tripled


# name -> (change, what the report says then)
CHANGES = {
    "table of bounded norm": (lambda m: setattr(m.table, "max_norm", 0.5), f"dense: {UNKNOWN}"),
    "table by frequency": (
        lambda m: setattr(m.table, "scale_grad_by_freq", True),
        f"dense: {UNKNOWN}",
    ),
    "padding": (lambda m: setattr(m.table, "padding_idx", 3), ONE),
    "forward pass of a layer": (doubled, PARTLY),
    "class of a layer": (another_class, PARTLY),
    "weight norm": (lambda m: nn.utils.parametrizations.weight_norm(m[2]), ONE),
    "weight replaced": (lambda m: setattr(m[2], "weight", nn.Parameter(2 * m[2].weight)), ONE),
    "layer replaced": (lambda m: m.__setitem__(2, nn.Linear(8, 8, dtype=DOUBLE)), ONE),
    "layer compiled": (lambda m: m[2].compile(backend="eager"), f"dense: {UNKNOWN}"),
    "hook of a parameter": (lambda m: m[2].weight.register_hook(lambda g: 2 * g), None),
    "backward hook": (
        lambda m: m[2].register_full_backward_hook(lambda _, g, __: (clamp(g[0]),)),
        HOOKED,
    ),
    "backward hook before": (
        lambda m: m[2].register_full_backward_pre_hook(lambda _, g: (clamp(g[0]),)),
        HOOKED,
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changes_between_steps(case):
    change, after = CHANGES[case]
    is_table = case.startswith(("table", "padding"))
    make, x = (tables(), ids) if is_table else (mlp, rows)
    if after is not None:
        check(make, flat, ONE, after, x, from_step_two(change))
        return
    said = list(steps(make(), flat, x, from_step_two(change)))
    assert said[:2] == [ONE, ONE]
    assert all(text.startswith("dense: a parameter is") for text in said[2:])


@pytest.mark.parametrize("where", ["module", "global"])
def test_global_hooks(where):
    handles = []

    def change(model, step):
        if step == 2:
            register = getattr(nn.modules.module, f"register_module_{kind}")
            handles.append(register(hook))

    kind, hook, said = {
        "module": ("forward_hook", lambda m, _, y: 2 * y if type(m) is nn.Linear else y, INTERACT),
        "global": ("full_backward_hook", lambda *_: None, HOOKED),
    }[where]
    try:
        check(mlp, flat, ONE, said, change=change)
    finally:
        for handle in handles:
            handle.remove()


def with_tensor_hook(h):
    h.register_hook(clamp)


def with_node_hook(h):
    h.grad_fn.register_hook(lambda g, _: (clamp(g[0]),))


def with_node_hook_before(h):
    h.grad_fn.register_prehook(lambda g: (clamp(g[0]),))


@pytest.mark.parametrize("hook", [with_tensor_hook, with_node_hook, with_node_hook_before])
def test_hooks_in_the_graph(hook):
    """They may change gradients in any way, which no check foresees."""
    step = 0

    def change(_, number):
        nonlocal step
        step = number

    def forward(model, x):
        h = model[:2](x)
        if step >= 2:
            hook(h)
        return flat(model[2:], h)

    check(mlp, forward, ONE, HOOKED, change=change)


def reordered(model, x):
    order = x[:, 0].argsort()
    return flat(model, x[order])[order.argsort()]


def reordered_inside(model, x):
    order = x[:, 0].argsort()
    h = model[:2](x).index_select(0, order)
    return flat(model[2:], h)[order.argsort()]


@pytest.mark.parametrize("forward", [reordered, reordered_inside])
def test_examples_in_another_order(forward):
    """As for recurrent networks, sorted by length: the first batches may be in order."""
    check(mlp, forward, ONE, REORDERED, sorted_at_first)


def clamped(h, begins):
    """Its backward pass begins to clamp, which nothing shows before."""
    return OwnBackward.apply(h, clamp if begins else torch.clone)


def mixed(h, begins):
    mean = torch.full((N, N), 1 / N, dtype=DOUBLE)
    return (mean if begins else torch.eye(N, dtype=DOUBLE)) @ h


@pytest.mark.parametrize("what", [clamped, mixed], ids=["function", "product"])
def test_examples_that_interact_by_values_alone(what):
    """The next full check finds it; then it is an error, and later steps are exact."""
    begins, said = False, []
    model = mlp()
    opt = CAGradClip(
        torch.optim.SGD(model.parameters(), 0.02), [0.5, 0.2, 0.3], gradients=ONE, model=model
    )
    for step in range(7):
        begins = step >= 3
        opt.zero_grad()
        z = flat(model[2:], what(model[:2](rows(step)), begins))
        try:
            opt.backward(three(z), scalars=z)
            said.append(opt.report.gradients)
        except RuntimeError as error:
            assert "examples must not interact in any step" in str(error)
            assert all(p.grad is None for p in model.parameters())
            said.append("error")
    assert said == [ONE] * 4 + ["error", INTERACT, INTERACT]


# --- Changes before the backward pass, and other uses of the model ---


class Biases(nn.Module):
    """Trains biases, and changes inputs of layers in place, as autograd allows then."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.norm = nn.LayerNorm(4)
        for layer in (self.first, self.second):
            layer.weight.requires_grad_(False)

    def forward(self, x):
        h = self.first(x := x.clone())
        x.zero_()
        h += self.second(h)
        return self.out(self.norm(h).tanh())


def test_inputs_of_biases_may_change_in_place():
    model = Biases().double()
    opt = CAGradClip(
        torch.optim.SGD(model.parameters(), 0.02), [0.5, 0.2, 0.3], gradients=ONE, model=model
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    true = [torch.autograd.grad(loss, trained) for loss in three(flat(model, rows(0)))[:1]]
    z = flat(model, rows(0))
    opt.backward([three(z)[0], None, None], scalars=z)
    assert opt.report.gradients == ONE
    for p, g in zip(trained, true[0], strict=True):
        torch.testing.assert_close(p.grad, opt.report.coefficients[0] * g)


@pytest.mark.parametrize("change", ["copy_", "data"])
def test_weights_that_change_before_the_backward_pass(change):
    """As autograd does: an error by `copy_`, and the new weights by `data`."""
    found = []
    for mode in (ONE, "dense"):
        model = mlp()
        options = {"model": model} if mode == ONE else {}
        opt = CAGradClip(
            torch.optim.SGD(model.parameters(), 0.1), [0.5, 0.2, 0.3], gradients=mode, **options
        )
        z = flat(model, rows(0))
        losses, scalars = three(z), {"scalars": z} if mode == ONE else {}
        for p in model.parameters():
            if change == "data":
                p.data = 2 * p.data
            else:
                with torch.no_grad():
                    p.copy_(2 * p)
        if change == "copy_":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                opt.backward(losses, **scalars)
        else:
            opt.backward(losses, **scalars)
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    if found:
        torch.testing.assert_close(*found)


TRANSFORMATIONS = {
    "jacrev": torch.func.jacrev,
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum()),
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
    "vmap": torch.func.vmap,
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
    "trace": lambda f: torch.jit.trace(f, (rows(0),)),
}


def dual(f):
    """Forward-mode differentiation."""
    from torch.autograd import forward_ad

    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent

    return tangent


@pytest.mark.parametrize("name", [*TRANSFORMATIONS, "dual numbers"])
def test_other_uses_of_the_model(name):
    """They see the model as it is without the optimizer."""
    transformed = TRANSFORMATIONS.get(name, dual)
    model = mlp()
    true = transformed(model)(rows(0))
    opt = CAGradClip(
        torch.optim.SGD(model.parameters(), 0.1), [0.5, 0.2, 0.3], gradients=ONE, model=model
    )
    torch.testing.assert_close(transformed(model)(rows(0)), true)
    z = flat(model, rows(0))
    opt.backward(three(z), scalars=z)
    assert opt.report.gradients == ONE


# --- A process without data ---


def without_data_in_one(rank, kind, mode):
    """Returns what three steps say, and the gradient of the second, without data on rank 1."""
    model = mlp()
    if kind == "fsdp":
        for layer in (model[0], model[2], model[4], model):
            fully_shard(layer)
    options = {"model": model} if mode == ONE else {}
    opt = CAGradClip(
        torch.optim.SGD(model.parameters(), 0.0), [0.5, 0.2, 0.3], gradients=mode, **options
    )
    said, grads = [], []
    for step in range(3):
        opt.zero_grad()
        z = flat(model, rows(10 * rank + step))
        losses = [None] * 3 if step == 1 and rank == 1 else three(z)
        try:
            opt.backward(losses, **({"scalars": z} if mode == ONE else {}))
            said.append(opt.report.gradients)
        except ValueError as error:
            said.append(str(error))
        if step == 1 and kind == "ddp":
            grads = [p.grad for p in model.parameters()], opt.report.coefficients
    return said, grads


@pytest.mark.parametrize("mode", [ONE, "dense"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_process_without_data_takes_part_or_all_raise(two_ranks, kind, mode):
    found = two_ranks.run(without_data_in_one, kind, mode)
    for rank, (said, grads) in enumerate(found):
        assert said[0] == said[2] == mode
        if kind == "fsdp":  # all would wait for its backward passes
            assert "on rank 0, [None, None, None] on rank 1" in said[1]
            assert "0 * outputs.sum()" in said[1]
            continue
        assert said[1] == (mode if rank == 0 or mode == "dense" else "dense: all losses are absent")
        model = mlp()  # the mean with zeros
        jacobian = [
            torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
            for loss in three(flat(model, rows(1)))
        ]
        for g, *column in zip(grads[0], *jacobian, strict=True):
            expected = sum(a * x for a, x in zip(grads[1], column, strict=True)) / 2
            torch.testing.assert_close(g, expected)
