"""Approximations: the Gram matrix of surrogates, then one backward pass of sum_i alpha_i L_i."""

import copy
import math
from dataclasses import replace
from functools import partial
from operator import attrgetter

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.utils.checkpoint import checkpoint

import raco_optim
from raco_optim import (
    MGDA,
    CAGrad,
    CAGradClip,
    MultiObjectiveOptimizer,
    Outcome,
    mixing_coefficients,
)
from tests.problems_nn import (
    NAMES,
    Buffered,
    batch,
    bits,
    everything,
    flat_grad,
    inverse_norms,
    jacobian,
    network,
    said,
    two_losses,
)

DOUBLE = torch.float64
WEIGHTS = {1: [1.0], 2: [0.6, 0.4], 3: [0.5, 0.2, 0.3], 5: [0.1, 0.3, 0.25, 0.15, 0.2]}


class Net(nn.Module):
    """A trunk that m losses at odds share, one head each, and a layer that none of them uses."""

    def __init__(self, m=2, dtype=DOUBLE):
        super().__init__()
        torch.manual_seed(1)
        self.trunk, self.heads = nn.Linear(4, 5), nn.Linear(5, m)
        self.spare = nn.Linear(1, 1)
        self.to(dtype)

    def represent(self, x):
        return self.trunk(x).tanh()

    def losses(self, z):
        out = self.heads(z)
        targets = [(-1) ** i * (i + 1) for i in range(out.shape[1])]
        return [(out[:, i] - t).square().mean() + 0.1 * i * z.sum() for i, t in enumerate(targets)]

    def forward(self, x):
        z = self.represent(x)
        return z, self.losses(z)


# name -> what is passed as `gradients`
MODES = {
    "dense": lambda model: "dense",
    "ghost": lambda model: "ghost",
    "representation": lambda model: "representation",
    "trunk": lambda model: model.trunk.parameters(),
    "one tensor": lambda model: [model.trunk.bias],
    "parts of both": lambda model: (p for p in (model.heads.weight, model.trunk.bias)),
}
ALL_MODES = pytest.mark.parametrize("mode", list(MODES)[2:])
TWO_MODES = pytest.mark.parametrize("mode", ["representation", "trunk"])
HEADS = pytest.mark.parametrize("heads", [False, True], ids=["all", "heads"])
METHODS = {
    "CAGradClip": CAGradClip,
    "soft": lambda inner, w, **kw: CAGradClip(inner, w, 0.7, clip="soft", **kw),
    "CAGrad": lambda inner, w, **kw: CAGrad(inner, w, 1.5, **kw),
    "MGDA": MGDA,
    "rule": lambda inner, w, **kw: MultiObjectiveOptimizer(inner, inverse_norms, weights=w, **kw),
}


def wrapped(model, mode, make=CAGradClip, weights=None, *, heads=False, **kwargs):
    """An optimizer of the model, whose trunk alone is shared if it has heads."""
    inner = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    if heads:
        kwargs["shared_parameters"] = model.trunk.parameters()
    weights = WEIGHTS[model.heads.out_features] if weights is None else weights
    return make(inner, weights, gradients=MODES[mode](model), **kwargs)


def given(mode, z):
    return {"representation": z} if mode == "representation" else {}


def combine(opt, mode, model, x, absent=()):
    z, losses = model(x)
    losses = [None if i in absent else loss for i, loss in enumerate(losses)]
    opt.backward(losses, **given(mode, z))


def x_of(step):
    return batch(step, dtype=DOUBLE)


def surrogate_jacobian(mode, model, x, absent=()):
    """Surrogates as rows: one forward pass and one call of autograd each."""
    rows = []
    for i in range(model.heads.out_features):
        z, losses = model(x)
        inputs = {"representation": [z], "dense": model.parameters(), "ghost": model.parameters()}
        inputs = [p for p in inputs.get(mode) or MODES[mode](model) if p.requires_grad]
        found = torch.autograd.grad(losses[i], inputs, allow_unused=True, materialize_grads=True)
        row = torch.cat([g.reshape(-1) for g in found])
        rows.append(row * 0 if i in absent else row)
    return torch.stack(rows)


def in_trunk(model):
    """Which entries of a flat gradient belong to the trunk."""
    return torch.cat(
        [torch.full([p.numel()], name.startswith("trunk")) for name, p in model.named_parameters()]
    )


def assert_combined(opt, model, J, *, heads=False):
    """``.grad`` has the reported coefficients, and the weights in heads."""
    expected = opt.report.coefficients @ J
    if heads:
        expected = torch.where(in_trunk(model), expected, opt.report.weights @ J)
    torch.testing.assert_close(flat_grad(model), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "m", "heads", "absent"),
    [
        ("CAGradClip", 1, False, ()),
        ("CAGradClip", 2, True, ()),
        ("CAGradClip", 3, False, (0, 2)),
        ("CAGradClip", 3, True, (1,)),
        ("CAGradClip", 5, False, ()),
        ("soft", 3, True, ()),
        ("CAGrad", 3, False, (2,)),
        ("MGDA", 3, True, ()),
        ("rule", 3, False, (0,)),
    ],
)
@ALL_MODES
def test_gram_of_the_surrogates_and_combination_of_the_gradients(mode, method, m, heads, absent):
    model = Net(m)
    opt = wrapped(model, mode, METHODS[method], heads=heads)
    for t in range(2):
        opt.zero_grad()
        x = x_of(t)
        J, S = jacobian(model, lambda x=x: model(x)[1]), surrogate_jacobian(mode, model, x, absent)
        J[list(absent)] = 0
        values = torch.stack([loss.detach() for loss in model(x)[1]])
        values[list(absent)] = torch.nan
        combine(opt, mode, model, x, absent)
        report = opt.report
        torch.testing.assert_close(report.gram, S @ S.T, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(report.losses, values, equal_nan=True)
        assert report.absent == tuple(map(str, absent))
        assert report.gram_age == 0
        if method == "CAGradClip" and not absent:
            found = mixing_coefficients(report.gram, WEIGHTS[m], 0.4)
            assert torch.equal(report.coefficients, found.coefficients)
        assert_combined(opt, model, J, heads=heads)
        assert model.spare.weight.grad is None
        opt.step()


@TWO_MODES
def test_a_head_without_a_loss_in_the_batch_keeps_none(mode):
    class Apart(Net):
        def losses(self, z):
            return [self.heads(z).square().mean(), self.spare(z[:, :1]).square().mean()]

    model = Apart()
    combine(wrapped(model, mode, heads=True), mode, model, X, absent=[1])
    assert model.heads.weight.grad is not None
    assert model.spare.weight.grad is None


@TWO_MODES
def test_weights_as_a_mapping_and_losses_in_any_order(mode):
    plain = Net()
    combine(wrapped(plain, mode, weights=[0.7, 0.3]), mode, plain, X)
    for flip in (False, True):
        model = Net()
        opt = wrapped(model, mode, weights=dict(zip(NAMES, [0.7, 0.3], strict=True)))
        z, losses = model(X)
        named = dict(zip(NAMES, losses, strict=True))
        opt.backward(dict(reversed(named.items())) if flip else named, **given(mode, z))
        assert opt.report.names == NAMES
        assert torch.equal(flat_grad(model), flat_grad(plain))


@ALL_MODES
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_radius_zero_is_the_weighted_sum(mode, dtype):
    model, plain, x = Net(3, dtype), Net(3, dtype), batch(0, dtype=dtype)
    combine(wrapped(model, mode, c=0.0), mode, model, x)
    sum(w * loss for w, loss in zip(WEIGHTS[3], plain(x)[1], strict=True)).backward()
    tolerance = 4 * torch.finfo(dtype).eps
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)


@HEADS
def test_the_subset_of_all_shared_parameters_is_exact(heads):
    model, plain = Net(3), Net(3)
    combine(wrapped(plain, "dense", heads=heads), "dense", plain, X)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    shared = (model.trunk if heads else model).parameters
    opt = CAGradClip(inner, WEIGHTS[3], gradients=shared(), shared_parameters=shared())
    combine(opt, "subset", model, X)
    torch.testing.assert_close(flat_grad(model), flat_grad(plain), rtol=1e-12, atol=1e-14)


@TWO_MODES
@HEADS
def test_existing_gradients_are_added_to(mode, heads):
    model, fresh = Net(), Net()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = {name: (p.grad, p.grad.data_ptr()) for name, p in model.named_parameters()}
    for m in (model, fresh):
        combine(wrapped(m, mode, heads=heads), mode, m, X)
    torch.testing.assert_close(flat_grad(model), flat_grad(fresh) + 3)
    assert model.spare.weight.grad.tolist() == [[3]]
    assert before == {name: (p.grad, p.grad.data_ptr()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["representation", "subset"])
def test_users_memory_is_neither_kept_nor_written_to(mode):
    x, y = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    buffer, surrogate = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 5.0, 0.0])
    kept = buffer.tolist(), surrogate.tolist()
    gradients = mode if mode == "representation" else [y]
    opt = CAGradClip(torch.optim.SGD([x, y], 0.1), [0.5, 0.5], gradients=gradients)
    for t in range(1, 3):
        z = y if mode == "subset" else y * 1
        losses = [Buffered.apply(x, buffer) + z.sum(), Buffered.apply(z, surrogate)]
        opt.backward(losses, **given(mode, z))
        assert opt.report.gram.tolist() == [[3, 5], [5, 25]]
        assert x.grad.tolist() == [t, 2 * t, 3 * t]
    assert (buffer.tolist(), surrogate.tolist()) == kept
    assert len({t.untyped_storage().data_ptr() for t in (x.grad, y.grad, buffer, surrogate)}) == 4


@pytest.mark.parametrize("mode", ["representation", "subset"])
def test_an_expanded_gradient_becomes_a_tensor_of_its_own(mode):
    x, y = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.ones(3, 2))
    gradients = mode if mode == "representation" else [x]
    opt = CAGradClip(torch.optim.SGD([x, y], 0.1), [0.5, 0.5], c=0.0, gradients=gradients)
    z = x if mode == "subset" else x.view(6)
    opt.backward([z.sum(), z.sum() + y.sum()], **given(mode, z))
    for p in (x, y):
        assert p.grad.is_contiguous()
        p.grad[0, 0] += 7
        assert p.grad.sum().item() == (13 if p is x else 10)


def test_one_gradient_for_two_parameters_is_not_shared_by_them():
    x, y = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    opt = CAGradClip(torch.optim.SGD([x, y], 0.1), [0.5, 0.5], c=0.0, gradients="representation")
    z = x + y
    opt.backward([z.sum(), 3 * z.sum()], representation=z)
    x.grad.zero_()
    assert y.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize(("m", "heads"), [(1, True), (2, False), (3, True), (5, False)])
def test_the_trunk_is_passed_through_once(m, heads):
    model = Net(m)
    h = model.trunk(X)
    passes = []
    h.register_hook(lambda grad: passes.append(1))
    z = h.tanh()
    wrapped(model, "representation", heads=heads).backward(model.losses(z), representation=z)
    assert len(passes) == 1


@pytest.mark.parametrize("kind", ["view", "leaf", "parameter", "activated in place"])
def test_representations_of_every_kind(kind):
    model = Net(3)
    model.scale = nn.Parameter(torch.ones(5, dtype=DOUBLE))

    def forward():
        z = model.represent(X)
        if kind == "view":
            z = z.view(2, 4, 5)
            return z, model.losses(z.flatten(0, 1))
        if kind == "leaf":  # the trunk is frozen, and the heads alone are trained
            z = z.detach().requires_grad_()
        if kind == "parameter":
            return model.scale, model.losses(z * model.scale)
        if kind == "activated in place":
            z = z * 2
            z.relu_()
        return z, model.losses(z)

    J, rows = jacobian(model, lambda: forward()[1]), []
    for i in range(3):
        z, losses = forward()
        rows.append(torch.autograd.grad(losses[i], z)[0].flatten())
    S = torch.stack(rows)
    opt = wrapped(model, "representation")
    z, losses = forward()
    opt.backward(losses, representation=z)
    torch.testing.assert_close(opt.report.gram, S @ S.T)
    assert_combined(opt, model, J)
    assert (model.trunk.weight.grad is None) == (kind == "leaf")


@pytest.mark.parametrize(
    ("frozen", "mode"),
    [
        ("trunk.bias", "representation"),
        ("trunk.bias", "trunk"),
        ("heads", "representation"),
        ("heads", "trunk"),
        ("trunk", "representation"),
    ],
)
def test_frozen_parameters_are_passed_over(frozen, mode):
    model = Net(3)
    attrgetter(frozen)(model).requires_grad_(False)
    opt = wrapped(model, mode, heads=True)
    J = jacobian(model, lambda: model(X)[1])
    z = model.represent(X)
    z = z.requires_grad_() if frozen == "trunk" else z
    opt.backward(model.losses(z), **given(mode, z))
    if frozen != "trunk":
        S = surrogate_jacobian(mode, model, X)
        torch.testing.assert_close(opt.report.gram, S @ S.T)
    assert_combined(opt, model, J, heads=True)
    assert all((p.grad is None) or p.requires_grad for p in model.parameters())


# Errors


class Untouched:
    """An optimizer in the middle of everything, and a twin that no failed call happens to."""

    def __init__(self, mode, model=None, *, steps=2, **kwargs):
        self.mode, self.model = mode, model or Net()
        self.opt = wrapped(self.model, mode, **kwargs)
        for t in range(steps):
            combine(self.opt, mode, self.model, x_of(t))
            self.opt.step()
        self.twin, self.twin_opt = copy.deepcopy((self.model, self.opt))
        for p, q in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            q.grad = copy.deepcopy(p.grad)  # which torch leaves out of a parameter's copy

    def check(self, steps=1):
        pairs = (self.model, self.opt), (self.twin, self.twin_opt)
        assert everything(*pairs[0]) == everything(*pairs[1])
        for t in range(10, 10 + steps):
            for model, opt in pairs:
                combine(opt, self.mode, model, x_of(t))
                opt.step()
            assert self.opt.report.gram_age == self.twin_opt.report.gram_age
            assert torch.equal(self.opt.report.gram, self.twin_opt.report.gram)
        assert everything(*pairs[0]) == everything(*pairs[1])

    def skipped(self, times):
        """Lets the twin count steps that were skipped."""
        core = self.twin_opt._core
        core.progress = replace(core.progress, skipped=times)

    def refuses(self, exception, fragments, losses, *, steps=1, **kwargs):
        with pytest.raises(exception) as caught:
            self.opt.backward(losses, **kwargs)
        assert [f for f in fragments if f not in said(caught.value)] == []
        self.check(steps)


X = x_of(0)
# name -> (z and a model -> the representation passed, exception, fragments)
BAD_REPRESENTATION = {
    "none": (lambda z, model: None, TypeError, ['gradients="representation"', "NoneType"]),
    "list": (lambda z, model: z.tolist(), TypeError, ["got list"]),
    "several tensors": (lambda z, model: (z, z), TypeError, ["the tensor", "got tuple"]),
    "text": (lambda z, model: "z", TypeError, ["got str"]),
    "another graph": (lambda z, model: model.represent(X), ValueError, ["loss '0'", "itself"]),
    "not used": (lambda z, model: z * 2, ValueError, ["loss '0'", "itself", "None"]),
    "parameter in no loss": (lambda z, model: model.spare.weight, ValueError, ["loss '0'"]),
    "detached": (lambda z, model: z.detach(), ValueError, ["graph"]),
    "constant": (lambda z, model: torch.ones(3, dtype=DOUBLE), ValueError, ["graph"]),
    "integers": (lambda z, model: torch.ones(3, dtype=torch.int64), ValueError, ["graph"]),
    "complex": (lambda z, model: z * 1j, ValueError, ["real"]),
    "another device": (lambda z, model: z.to("meta"), ValueError, ["meta"]),
}


@pytest.mark.parametrize("case", BAD_REPRESENTATION)
def test_bad_representation(case):
    change, exception, fragments = BAD_REPRESENTATION[case]
    state = Untouched("representation")
    z, losses = state.model(X)
    bad = change(z, state.model)
    state.refuses(exception, ["`representation`", *fragments], losses, representation=bad)


@pytest.mark.parametrize("i", range(3))
def test_a_loss_that_the_representation_is_not_in_is_named(i):
    state = Untouched("representation", Net(3))
    z, losses = state.model(X)
    losses[i] = state.model(X)[1][i]
    state.refuses(ValueError, [f"loss '{i}'", "`representation`"], losses, representation=z)


@pytest.mark.parametrize("mode", ["dense", "ghost", "trunk"])
def test_representation_in_another_mode(mode):
    state = Untouched(mode)
    z, losses = state.model(X)
    for bad in (z, "z", (z, z)):
        with pytest.raises(ValueError, match='unless gradients="representation"'):
            state.opt.backward(losses, representation=bad)
    state.check()


@TWO_MODES
def test_a_subset_that_a_loss_does_not_reach_is_named(mode):
    state = Untouched(mode)
    z, losses = state.model(X)
    losses[1] = state.model.spare(X[:, :1]).sum()
    named = "`gradients`" if mode == "trunk" else "`representation`"
    state.refuses(ValueError, ["loss '1'", named, "None"], losses, **given(mode, z))


UNFIT = {
    "callable": (lambda a, b: [a, lambda: b], TypeError, ["callable", "dense", "gram_every=1"]),
    "number": (lambda a, b: [a, 1.0], TypeError, ["`losses` must hold only tensors"]),
    "vector": (lambda a, b: [a, b.expand(2)], ValueError, ["loss '1'", "scalar", "[2]"]),
    "empty": (lambda a, b: [a, b.expand(0)], ValueError, ["loss '1'", "scalar", "[0]"]),
    "complex": (lambda a, b: [a, b * 1j], ValueError, ["loss '1'", "real"]),
    "no graph": (lambda a, b: [a, b.detach()], ValueError, ["loss '1'", "graph"]),
    "constant": (lambda a, b: [a, torch.tensor(1.0)], ValueError, ["loss '1'", "graph"]),
    "another device": (lambda a, b: [a, b.to("meta")], ValueError, ["loss '1'", "device", "meta"]),
    "foreign": (lambda a, b: [a, nn.Parameter(torch.ones(())) * 2], ValueError, ["loss '1'"]),
    "all absent": (lambda a, b: [None, None], ValueError, ["`losses`", "None for all"]),
    "too few": (lambda a, b: [a], ValueError, ["`losses`", "got 1"]),
    "mapping": (lambda a, b: {"a": a, "b": b}, ValueError, ["`losses`", "'a', 'b'"]),
    "single": (lambda a, b: a, TypeError, ["`losses`", "[loss]"]),
    "NaN": (lambda a, b: [a, b * math.nan], FloatingPointError, ["loss '1' is NaN", "nonfinite"]),
    "Inf": (lambda a, b: [a / 0, b], FloatingPointError, ["loss '0'", "nonfinite"]),
    "NaN gradient": (
        lambda a, b: [a, (b * 0).abs().sqrt()],
        FloatingPointError,
        ["gradient", "NaN", "nonfinite"],
    ),
}


@TWO_MODES
@pytest.mark.parametrize("case", UNFIT)
def test_losses_that_do_not_fit(mode, case):
    change, exception, fragments = UNFIT[case]
    if case == "NaN gradient":
        fragments = ["the gradient of loss '1'", *fragments]
    state = Untouched(mode)
    z, losses = state.model(X)
    state.refuses(exception, fragments, change(*losses), **given(mode, z))


BAD_GRADIENTS = {
    "another name": ("wrong", ValueError, ["'ghost'", "'wrong'"]),
    "another case": ("Ghost", ValueError, ["'ghost'", "'Ghost'"]),
    "number": (3, TypeError, ["an iterable of parameters", "got 3"]),
    "None": (None, TypeError, ["'dense'", "got None"]),
    "empty": ([], ValueError, ["at least one", "got none"]),
    "exhausted": (iter(()), ValueError, ["got none"]),
    "not tensors": ([1, 2], TypeError, ["tensors", "got int"]),
    "names": (["trunk.weight"], TypeError, ["tensors", "got str"]),
    "another model": (list(Net().parameters()), ValueError, ["of `inner`", "[5, 4]"]),
    "representation itself": ([Net()(X)[0]], ValueError, ["of `inner`", "[8, 5]"]),
    "named parameters": (list(Net().named_parameters()), TypeError, ["got tuple"]),
    # Not torch's "iteration over a 0-d tensor", nor "parameters of `inner`; got another tensor".
    "number of torch": (nn.Parameter(torch.ones([])), TypeError, ["got a single tensor"]),
    "one parameter": (nn.Parameter(torch.ones(3)), TypeError, ["got a single tensor"]),
}


@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_bad_gradients(case):
    gradients, exception, fragments = BAD_GRADIENTS[case]
    inner = torch.optim.SGD(Net().parameters(), 0.1)
    with pytest.raises(exception) as caught:
        CAGradClip(inner, [0.5, 0.5], gradients=gradients)
    assert [f for f in ("`gradients`", *fragments) if f not in str(caught.value)] == []


def test_a_subset_of_frozen_parameters():
    model = Net()
    model.trunk.requires_grad_(False)
    opt = wrapped(model, "trunk")
    with pytest.raises(ValueError, match="`gradients`"):
        opt.backward(model(X)[1])
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_named_twice_counts_once():
    x, y = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = CAGradClip(torch.optim.SGD([x, y], 0.1), [0.5, 0.5], gradients=[x, y, x])
    opt.backward([x.sum(), y.sum()])
    assert opt.report.gram.tolist() == [[2, 0], [0, 2]]


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
def test_losses_that_reach_no_parameter_behind_the_representation(nonfinite):
    """The trunk's output was detached, and the optimizer holds parameters of the trunk alone."""
    model = Net()
    inner = torch.optim.SGD(model.trunk.parameters(), 0.1)
    opt = CAGradClip(inner, [0.5, 0.5], gradients="representation", nonfinite=nonfinite)
    z = model.represent(X).detach().requires_grad_()
    with pytest.raises(ValueError, match="must depend on a parameter of the optimizer"):
        opt.backward(model.losses(z), representation=z)


@TWO_MODES
@pytest.mark.parametrize("where", ["trunk", "heads"])
def test_reentrant_checkpoint_is_refused(mode, where):
    state, x = Untouched(mode), X.clone().requires_grad_()
    model, again = state.model, partial(checkpoint, use_reentrant=True)
    z = (again(model.trunk, x) if where == "trunk" else model.trunk(x)).tanh()
    losses = model.losses(z)
    if where == "heads":
        losses = [again(model.heads, z)[:, i].mean() for i in range(2)]
    state.refuses(RuntimeError, ["use_reentrant=False"], losses, **given(mode, z))


@pytest.mark.parametrize("case", ["trunk", "heads", "in the subset"])
def test_sparse_gradients_are_refused(case):
    table, model = nn.Embedding(3, 4, sparse=True).double(), Net()
    parameters = [*table.parameters(), *model.parameters()]
    gradients = table.parameters() if case == "in the subset" else "representation"
    opt = CAGradClip(torch.optim.SGD(parameters, 0.1), [0.6, 0.4], gradients=gradients)
    looked_up = table(torch.tensor([0, 2]))
    z = model.represent(looked_up if case != "heads" else X[:2])
    losses = [loss + (looked_up.sum() if case == "heads" else 0) for loss in model.losses(z)]
    before = everything(model, opt)
    with pytest.raises(ValueError, match=r"sparse.*\[3, 4\].*sparse=False"):
        opt.backward(losses, **({} if case == "in the subset" else {"representation": z}))
    assert everything(model, opt) == before
    assert table.weight.grad is None


@ALL_MODES
@HEADS
def test_the_graph_is_freed(mode, heads):
    """The losses of a training loop outlive the step, and must not keep the activations."""
    model = Net()
    opt = wrapped(model, mode, heads=heads)
    z, losses = model(X)
    opt.backward(losses, **given(mode, z))
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match=r"(?s)second time.*Compute the losses again"):
        opt.backward(losses, **given(mode, z))
    assert everything(model, opt) == before
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


# Numbers that are not finite


def nan_in_the_trunk(model, x):
    """A representation of zeros whose gradient is finite, and NaN in all that is behind it."""
    z = (model.trunk(x) * 0).abs().sqrt()
    return z, model.losses(z)


def nan_in_a_head(model, x):
    """The representation's gradient is finite, that of one head is not: sqrt at 0 times z = 0."""
    z, losses = model(x)
    losses[1] = losses[1] + (model.heads.bias[0] * 0).abs().sqrt()
    return z, losses


@pytest.mark.parametrize(
    ("forward", "heads"),
    [(nan_in_the_trunk, False), (nan_in_the_trunk, True), (nan_in_a_head, True)],
)
def test_the_combined_gradient_itself_is_looked_at(forward, heads):
    """The Gram matrix says nothing of what is not finite behind the surrogates."""
    state = Untouched("representation", heads=heads)
    z, losses = forward(state.model, X)
    fragments = ["the combined gradient is NaN or Inf", 'nonfinite="skip"']
    state.refuses(FloatingPointError, fragments, losses, representation=z)

    state = Untouched("representation", heads=heads, nonfinite="skip")
    for k in range(1, 3):
        before = bits([state.model.state_dict(), flat_grad(state.model)])
        z, losses = forward(state.model, X)
        state.opt.backward(losses, representation=z)
        state.opt.step()
        assert (state.opt.report.skipped, state.opt.report.outcome) == (k, Outcome.SKIPPED)
        assert bits([state.model.state_dict(), flat_grad(state.model)]) == before
    state.skipped(2)
    state.check()
    assert state.opt.report.skipped == 2
    assert state.opt.report.outcome is not Outcome.SKIPPED

    model = Net()
    z, losses = forward(model, X)
    opt = wrapped(model, "representation", heads=heads, nonfinite="propagate")
    opt.backward(losses, representation=z)
    bad, good = ("trunk", "heads") if forward is nan_in_the_trunk else ("heads", "trunk")
    assert not getattr(model, bad).bias.grad.isfinite().all()
    assert getattr(model, good).weight.grad.isfinite().all()


@TWO_MODES
def test_propagate_of_a_loss_that_is_not_finite_is_the_weighted_sum(mode):
    model, plain = Net(), Net()
    opt = wrapped(model, mode, nonfinite="propagate")
    z, (a, b) = model(X)
    opt.backward([a, b * math.nan], **given(mode, z))
    assert opt.report.outcome is Outcome.NONFINITE
    assert opt.report.coefficients.tolist() == [0.6, 0.4]
    a, b = plain(X)[1]
    (0.6 * a + 0.4 * b * math.nan).backward()
    found, expected = (
        [None if p.grad is None else p.grad.isnan().tolist() for p in m.parameters()]
        for m in (model, plain)
    )
    assert found == expected


# Ways to call


class Holder:
    """What Accelerate does to an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def through_a_wrapper(opt, mode, model):
    z, losses = model(X)
    raco_optim.backward(Holder(Holder(opt)), losses, **given(mode, z))
    with pytest.raises(TypeError, match="`optimizer`"):
        raco_optim.backward(Holder(None), losses, **given(mode, z))


def without_gradients(opt, mode, model):
    z, losses = model(X)
    with torch.no_grad():
        opt.backward(losses, **given(mode, z))
    assert not any(p.grad is not None and p.grad.requires_grad for p in model.parameters())


def with_checkpoints(opt, mode, model):
    z = checkpoint(model.represent, X, use_reentrant=False)
    opt.backward(checkpoint(model.losses, z, use_reentrant=False), **given(mode, z))


def as_usual(opt, mode, model):
    combine(opt, mode, model, X)


# name -> (a call, how the optimizer is made)
WAYS = {
    "through a wrapper": (through_a_wrapper, {}),
    "without gradients": (without_gradients, {}),
    "with checkpoints": (with_checkpoints, {}),
    "skip": (as_usual, {"nonfinite": "skip"}),
    "propagate": (as_usual, {"nonfinite": "propagate"}),
}


@ALL_MODES
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_a_call_do_not_change_a_bit(way, mode):
    call, options = WAYS[way]
    model, plain = Net(3), Net(3)
    as_usual(wrapped(plain, mode), mode, plain)
    call(wrapped(model, mode, **options), mode, model)
    assert torch.equal(flat_grad(model), flat_grad(plain))


@TWO_MODES
def test_scaled_run_equals_the_unscaled_one_bit_for_bit(mode):
    model, plain = Net(3, torch.float32), Net(3, torch.float32)
    opts = [wrapped(m, mode, nonfinite="propagate") for m in (model, plain)]
    scaler = GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for t in range(4):
        z, losses = model(batch(t))
        opts[0].zero_grad()
        opts[0].backward([scaler.scale(loss) for loss in losses], **given(mode, z))
        scaler.step(opts[0])
        scaler.update()
        opts[1].zero_grad()
        combine(opts[1], mode, plain, batch(t))
        opts[1].step()
    assert bits(model.state_dict()) == bits(plain.state_dict())
    assert scaler.get_scale() == 2.0**14


def test_scaler_sees_what_is_not_finite_behind_the_representation():
    model = Net()
    opt = wrapped(model, "representation", nonfinite="propagate")
    scaler = GradScaler("cpu", init_scale=4.0)
    before = bits(model.state_dict())
    z, losses = nan_in_the_trunk(model, X)
    opt.backward([scaler.scale(loss) for loss in losses], representation=z)
    scaler.step(opt)
    scaler.update()
    assert bits(model.state_dict()) == before
    assert scaler.get_scale() == 2.0


@TWO_MODES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["autocast", "autocast around backward", "parameters"])
def test_low_precision(mode, dtype, form):
    """One is not to call `backward` under autocast, but many do."""
    own = dtype if form == "parameters" else torch.float32
    model, x = Net(3, own), batch(0, dtype=own)
    opt = wrapped(model, mode)

    def forward():
        with torch.autocast("cpu", dtype, enabled=form != "parameters"):
            return model(x)

    J = jacobian(model, lambda: forward()[1])
    z, losses = forward()
    assert z.dtype == dtype
    with torch.autocast("cpu", dtype, enabled=form == "autocast around backward"):
        opt.backward(losses, **given(mode, z))
    expected = opt.report.coefficients @ J
    error = (flat_grad(model) - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps
    assert {p.grad.dtype for p in model.trunk.parameters()} == {own}


@pytest.mark.parametrize("gradients", ["ghost", "all parameters", "a part of them"])
def test_closures(gradients):
    """LBFGS calls its closure several times per step."""
    model, plain = network(DOUBLE), network(DOUBLE)
    subsets = {"all parameters": model.parameters(), "a part of them": [model[0].weight]}
    chosen = subsets.get(gradients, gradients)
    opts = [
        CAGradClip(torch.optim.LBFGS(m.parameters(), lr=0.2, max_iter=3), [0.6, 0.4], gradients=g)
        for m, g in ((model, chosen), (plain, "dense"))
    ]
    calls = []
    for t in range(3):
        for m, opt in zip((model, plain), opts, strict=True):

            def closure(m=m, opt=opt, t=t):
                calls.append(opt)
                opt.zero_grad()
                return two_losses(m, x_of(t))

            assert opt.step(closure).isfinite()
    assert calls.count(opts[0]) == calls.count(opts[1]) > 3
    found, expected = (list(m.parameters()) for m in (model, plain))
    if gradients == "a part of them":
        assert max((p - q).abs().max() for p, q in zip(found, expected, strict=True)) > 1e-6
    else:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_closure_cannot_pass_a_representation():
    state = Untouched("representation")
    with pytest.raises(TypeError, match="`representation`"):
        state.opt.step(lambda: state.model(X)[1])
    state.check()


@TWO_MODES
def test_coefficients_that_are_parameters_get_no_gradient(mode):
    model = Net()
    model.alpha = nn.Parameter(torch.tensor([0.5, 0.5], dtype=DOUBLE))
    inner = torch.optim.SGD(model.parameters(), 0.1)
    opt = MultiObjectiveOptimizer(inner, lambda gram: model.alpha, gradients=MODES[mode](model))
    combine(opt, mode, model, X)
    assert model.alpha.grad is None


def test_copies_know_their_subset():
    model, fresh = Net(), Net()
    twin, twin_opt = copy.deepcopy((model, wrapped(model, "trunk")))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    combine(twin_opt, "trunk", twin, X)
    combine(wrapped(fresh, "trunk"), "trunk", fresh, X)
    assert torch.equal(flat_grad(twin), flat_grad(fresh))


def test_parameter_group_added_later_is_combined_but_not_in_the_subset():
    model = Net()
    inner = torch.optim.SGD(model.trunk.parameters(), 0.1)
    opt = CAGradClip(inner, [0.6, 0.4], gradients=model.trunk.parameters())
    opt.add_param_group({"params": list(model.heads.parameters())})
    J, S = jacobian(model, lambda: model(X)[1]), surrogate_jacobian("trunk", model, X)
    combine(opt, "trunk", model, X)
    torch.testing.assert_close(opt.report.gram, S @ S.T)
    assert_combined(opt, model, J)
