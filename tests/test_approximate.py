"""Approximations: the Gram matrix of surrogates, then one backward pass of sum_i alpha_i L_i."""

import copy
import math
from dataclasses import replace

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
    "representation": lambda model: "representation",
    "trunk": lambda model: model.trunk.parameters(),
    "one tensor": lambda model: [model.trunk.bias],
    "parts of both": lambda model: (p for p in (model.heads.weight, model.trunk.bias)),
}
ALL_MODES = pytest.mark.parametrize("mode", MODES)
TWO_MODES = pytest.mark.parametrize("mode", ["representation", "trunk"])
METHODS = {
    "CAGradClip": CAGradClip,
    "soft": lambda inner, w, **kw: CAGradClip(inner, w, 0.7, clip="soft", **kw),
    "CAGrad": lambda inner, w, **kw: CAGrad(inner, w, 1.5, **kw),
    "MGDA": MGDA,
    "rule": lambda inner, w, **kw: MultiObjectiveOptimizer(inner, inverse_norms, weights=w, **kw),
}


def wrapped(model, mode, make=CAGradClip, weights=None, **kwargs):
    weights = WEIGHTS[model.heads.out_features] if weights is None else weights
    inner = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return make(inner, weights, gradients=MODES[mode](model), **kwargs)


def given(mode, z):
    return {"representation": z} if mode == "representation" else {}


def combine(opt, mode, model, x):
    z, losses = model(x)
    opt.backward(losses, **given(mode, z))


def surrogate_jacobian(mode, model, x):
    """Surrogates as rows: one forward pass and one call of autograd each."""
    rows = []
    for i in range(model.heads.out_features):
        z, losses = model(x)
        inputs = [z] if mode == "representation" else list(MODES[mode](model))
        found = torch.autograd.grad(losses[i], inputs, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


def in_trunk(model):
    """Which entries of a flat gradient belong to the trunk."""
    return torch.cat(
        [torch.full([p.numel()], name.startswith("trunk")) for name, p in model.named_parameters()]
    )


@ALL_MODES
@pytest.mark.parametrize("m", WEIGHTS)
def test_gram_is_that_of_the_surrogates(mode, m):
    model, x = Net(m), batch(0, dtype=DOUBLE)
    opt = wrapped(model, mode)
    combine(opt, mode, model, x)
    J = surrogate_jacobian(mode, model, x)
    torch.testing.assert_close(opt.report.gram, J @ J.T, rtol=1e-12, atol=1e-14)
    found = mixing_coefficients(opt.report.gram, WEIGHTS[m], 0.4)
    assert torch.equal(opt.report.coefficients, found.coefficients)
    assert opt.report.gram_age == 0
    expected = torch.stack([loss.detach() for loss in model(x)[1]])
    torch.testing.assert_close(opt.report.losses, expected)


@ALL_MODES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("with_heads", [False, True], ids=["all", "heads"])
def test_grad_is_the_combination_with_the_reported_coefficients(mode, method, with_heads):
    model, x = Net(3), batch(0, dtype=DOUBLE)
    shared = model.trunk.parameters() if with_heads else None
    opt = wrapped(model, mode, METHODS[method], shared_parameters=shared)
    for t in range(2):
        opt.zero_grad()
        x = batch(t, dtype=DOUBLE)
        J, H = jacobian(model, lambda x=x: model(x)[1]), surrogate_jacobian(mode, model, x)
        combine(opt, mode, model, x)
        torch.testing.assert_close(opt.report.gram, H @ H.T, rtol=1e-12, atol=1e-14)
        expected = opt.report.coefficients @ J
        if with_heads:
            weighted = torch.tensor(WEIGHTS[3], dtype=DOUBLE) @ J
            expected = torch.where(in_trunk(model), expected, weighted)
        torch.testing.assert_close(flat_grad(model), expected, rtol=1e-10, atol=1e-12)
        assert model.spare.weight.grad is None
        opt.step()


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
@TWO_MODES
def test_what_is_not_finite_is_watched_for_at_no_cost_in_bits(mode, nonfinite):
    model, twin, x = Net(3), Net(3), batch(0, dtype=DOUBLE)
    combine(wrapped(model, mode, nonfinite=nonfinite), mode, model, x)
    combine(wrapped(twin, mode), mode, twin, x)
    assert torch.equal(flat_grad(model), flat_grad(twin))


@TWO_MODES
@pytest.mark.parametrize("absent", [[0], [1], [2], [0, 2]], ids=str)
def test_absent_losses_contribute_nothing(mode, absent):
    model, x = Net(3), batch(0, dtype=DOUBLE)
    opt = wrapped(model, mode)
    J, H = jacobian(model, lambda: model(x)[1]), surrogate_jacobian(mode, model, x)
    J[absent], H[absent] = 0, 0
    z, losses = model(x)
    opt.backward([None if i in absent else loss for i, loss in enumerate(losses)], **given(mode, z))
    torch.testing.assert_close(opt.report.gram, H @ H.T, rtol=1e-12, atol=1e-14)
    assert opt.report.absent == tuple(map(str, absent))
    assert opt.report.losses.isnan().nonzero().flatten().tolist() == absent
    expected = opt.report.coefficients @ J
    torch.testing.assert_close(flat_grad(model), expected, rtol=1e-10, atol=1e-12)


@TWO_MODES
def test_a_head_without_a_loss_in_the_batch_keeps_none(mode):
    class Apart(Net):
        def losses(self, z):
            return [self.heads(z).square().mean(), self.spare(z[:, :1]).square().mean()]

    model = Apart()
    opt = wrapped(model, mode, shared_parameters=model.trunk.parameters())
    z, (first, _) = model(batch(0, dtype=DOUBLE))
    opt.backward([first, None], **given(mode, z))
    assert model.heads.weight.grad is not None
    assert model.spare.weight.grad is None


@TWO_MODES
def test_weights_as_a_mapping_and_losses_in_any_order(mode):
    grads = []
    for flip in (False, True):
        model = Net()
        opt = wrapped(model, mode, weights=dict(zip(NAMES, [0.7, 0.3], strict=True)))
        z, losses = model(batch(0, dtype=DOUBLE))
        named = dict(zip(NAMES, losses, strict=True))
        opt.backward(dict(reversed(named.items())) if flip else named, **given(mode, z))
        assert opt.report.names == NAMES
        grads.append(flat_grad(model))
    assert torch.equal(*grads)
    plain = Net()
    combine(wrapped(plain, mode, weights=[0.7, 0.3]), mode, plain, batch(0, dtype=DOUBLE))
    assert torch.equal(flat_grad(plain), grads[0])


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


@pytest.mark.parametrize("method", ["CAGradClip", "soft", "CAGrad", "MGDA"])
@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_an_isometry_between_parameters_and_representation_changes_nothing(method, factor):
    """z = s Q theta with Q orthogonal: all gradients are s Q^T dL/dz, and H is s^2 times theirs."""
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE)).Q
    A = torch.randn(3, 6, 6, dtype=DOUBLE)
    found = {}
    for mode in ("dense", "representation"):
        theta = nn.Parameter(torch.arange(6, dtype=DOUBLE) / 6)
        opt = METHODS[method](torch.optim.SGD([theta], 0.1), WEIGHTS[3], gradients=mode)
        z = factor * (Q @ theta)
        losses = [(A[i] @ z - i).square().sum() for i in range(3)]
        opt.backward(losses, **given(mode, z))
        found[mode] = (opt.report.gram / opt.report.gram[0, 0], opt.report.coefficients, theta.grad)
    torch.testing.assert_close(found["representation"], found["dense"])


def test_output_of_one_linear_layer_for_one_input_is_exact_up_to_a_factor():
    """g_i = delta_i x^T, hence H is |x|^2 + 1 (the bias) times that of the delta_i."""
    x = batch(0, size=1, dtype=DOUBLE)
    found = {}
    for mode in ("dense", "representation"):
        model = Net(3)
        model.heads.requires_grad_(False)
        inner = torch.optim.SGD(model.trunk.parameters(), 0.1)
        opt = CAGradClip(inner, WEIGHTS[3], gradients=mode)
        z = model.trunk(x)
        opt.backward(model.losses(z.tanh()), **given(mode, z))
        found[mode] = opt.report.gram, opt.report.coefficients, model.trunk.weight.grad
    gram, *rest = found["representation"]
    factor = x.square().sum() + 1
    torch.testing.assert_close([gram * factor, *rest], list(found["dense"]))


@pytest.mark.parametrize("method", METHODS)
def test_the_subset_of_all_parameters_is_exact(method):
    model, plain, x = Net(3), Net(3), batch(0, dtype=DOUBLE)
    opts = [
        METHODS[method](torch.optim.SGD(m.parameters(), 0.1), WEIGHTS[3], gradients=gram)
        for m, gram in ((model, model.parameters()), (plain, "dense"))
    ]
    for m, opt in zip((model, plain), opts, strict=True):
        opt.backward(m(x)[1])
    assert torch.equal(opts[0].report.gram, opts[1].report.gram)
    torch.testing.assert_close(flat_grad(model), flat_grad(plain), rtol=1e-12, atol=1e-14)


def test_the_subset_of_the_shared_parameters_is_exact():
    model, plain, x = Net(3), Net(3), batch(0, dtype=DOUBLE)
    for m, kwargs in ((model, {"gradients": model.trunk.parameters()}), (plain, {})):
        inner = torch.optim.SGD(m.parameters(), 0.1)
        CAGradClip(inner, WEIGHTS[3], shared_parameters=m.trunk.parameters(), **kwargs).backward(
            m(x)[1]
        )
    torch.testing.assert_close(flat_grad(model), flat_grad(plain), rtol=1e-12, atol=1e-14)


@TWO_MODES
@pytest.mark.parametrize("with_heads", [False, True], ids=["all", "heads"])
def test_existing_gradients_are_added_to(mode, with_heads):
    model = Net()
    opt = wrapped(model, mode, shared_parameters=model.trunk.parameters() if with_heads else None)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = {name: (p.grad, p.grad.data_ptr()) for name, p in model.named_parameters()}
    combine(opt, mode, model, batch(0, dtype=DOUBLE))
    fresh = Net()
    shared = fresh.trunk.parameters() if with_heads else None
    combine(wrapped(fresh, mode, shared_parameters=shared), mode, fresh, batch(0, dtype=DOUBLE))
    torch.testing.assert_close(flat_grad(model), flat_grad(fresh) + 3)
    assert model.spare.weight.grad.tolist() == [[3]]
    assert before == {name: (p.grad, p.grad.data_ptr()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["representation", "subset"])
def test_users_memory_is_neither_kept_nor_written_to(mode):
    x, y = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    buffer, surrogate = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 5.0, 0.0])
    kept = buffer.clone(), surrogate.clone()
    gram = "representation" if mode == "representation" else [y]
    opt = CAGradClip(torch.optim.SGD([x, y], 0.1), [0.5, 0.5], gradients=gram)
    for t in range(1, 3):
        z = y if mode == "subset" else y * 1
        losses = [Buffered.apply(x, buffer) + z.sum(), Buffered.apply(z, surrogate)]
        opt.backward(losses, **given(mode, z))
        assert opt.report.gram.tolist() == [[3, 5], [5, 25]]
        assert x.grad.tolist() == [t, 2 * t, 3 * t]
    assert (buffer.tolist(), surrogate.tolist()) == (kept[0].tolist(), kept[1].tolist())
    pointers = {p.grad.untyped_storage().data_ptr() for p in (x, y)}
    assert len(pointers | {t.untyped_storage().data_ptr() for t in (buffer, surrogate)}) == 4


@pytest.mark.parametrize("mode", ["representation", "subset"])
def test_an_expanded_gradient_becomes_a_tensor_of_its_own(mode):
    x, y = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.ones(3, 2))
    gram = "representation" if mode == "representation" else [x]
    opt = CAGradClip(torch.optim.SGD([x, y], 0.1), [0.5, 0.5], c=0.0, gradients=gram)
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


@pytest.mark.parametrize("with_heads", [False, True], ids=["all", "heads"])
@pytest.mark.parametrize("m", WEIGHTS)
def test_the_trunk_is_passed_through_once(m, with_heads):
    model = Net(m)
    shared = model.trunk.parameters() if with_heads else None
    opt = wrapped(model, "representation", shared_parameters=shared)
    h = model.trunk(batch(0, dtype=DOUBLE))
    passes = []
    h.register_hook(lambda grad: passes.append(1))
    z = h.tanh()
    opt.backward(model.losses(z), representation=z)
    assert len(passes) == 1


@pytest.mark.parametrize("kind", ["view", "leaf", "parameter", "activated in place"])
def test_representations_of_every_kind(kind):
    model, x = Net(3), batch(0, dtype=DOUBLE)
    model.scale = nn.Parameter(torch.ones(5, dtype=DOUBLE))

    def forward():
        z = model.represent(x)
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

    J = jacobian(model, lambda: forward()[1])
    rows = []
    for i in range(3):
        z, losses = forward()
        rows.append(torch.autograd.grad(losses[i], z)[0].flatten())
    S = torch.stack(rows)
    opt = wrapped(model, "representation")
    z, losses = forward()
    opt.backward(losses, representation=z)
    torch.testing.assert_close(opt.report.gram, S @ S.T)
    torch.testing.assert_close(flat_grad(model), opt.report.coefficients @ J)
    assert (model.trunk.weight.grad is None) == (kind == "leaf")


@TWO_MODES
def test_frozen_parameters_are_passed_over(mode):
    model, x = Net(3), batch(0, dtype=DOUBLE)
    model.trunk.bias.requires_grad_(False)
    opt = wrapped(model, mode)
    J, S = jacobian(model, lambda: model(x)[1]), []
    for i in range(3):
        z, losses = model(x)
        inputs = z if mode == "representation" else model.trunk.weight
        S.append(torch.autograd.grad(losses[i], inputs)[0].flatten())
    combine(opt, mode, model, x)
    assert model.trunk.bias.grad is None
    torch.testing.assert_close(opt.report.gram, torch.stack(S) @ torch.stack(S).T)
    torch.testing.assert_close(flat_grad(model), opt.report.coefficients @ J)


@pytest.mark.parametrize(
    ("frozen", "mode"),
    [("heads", "representation"), ("heads", "trunk"), ("trunk", "representation")],
)
def test_all_heads_or_all_of_the_trunk_may_be_frozen(frozen, mode):
    model, x = Net(3), batch(0, dtype=DOUBLE)
    getattr(model, frozen).requires_grad_(False)
    model.spare.requires_grad_(False)
    shared = model.trunk.parameters()
    opt = wrapped(model, mode, shared_parameters=shared)
    z = model.represent(x)
    z = z.requires_grad_() if frozen == "trunk" else z
    J = jacobian(model, lambda: model(x)[1])
    opt.backward(model.losses(z), **given(mode, z))
    alpha = opt.report.coefficients
    alpha = alpha if frozen == "heads" else alpha.new_tensor(WEIGHTS[3])
    torch.testing.assert_close(flat_grad(model), alpha @ J)


class Untouched:
    """An optimizer in the middle of everything, and a twin that no failed call happens to."""

    def __init__(self, mode, model=None, **kwargs):
        self.mode, self.model = mode, model or Net()
        self.opt = wrapped(self.model, mode, **kwargs)
        for t in range(2):
            combine(self.opt, mode, self.model, batch(t, dtype=DOUBLE))
            self.opt.step()
        self.twin, self.twin_opt = copy.deepcopy((self.model, self.opt))
        for p, q in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            q.grad = copy.deepcopy(p.grad)  # which torch leaves out of a parameter's copy

    def check(self):
        assert everything(self.model, self.opt) == everything(self.twin, self.twin_opt)
        for model, opt in ((self.model, self.opt), (self.twin, self.twin_opt)):
            combine(opt, self.mode, model, batch(3, dtype=DOUBLE))
            opt.step()
        assert everything(self.model, self.opt) == everything(self.twin, self.twin_opt)

    def refuses(self, exception, fragments, losses, **kwargs):
        with pytest.raises(exception) as caught:
            self.opt.backward(losses, **kwargs)
        assert [f for f in fragments if f not in str(caught.value)] == []
        self.check()


X = batch(0, dtype=DOUBLE)
# name -> (z and losses of a model -> the representation passed, exception, fragments)
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


@pytest.mark.parametrize(
    ("change", "exception", "fragments"),
    [pytest.param(*case, id=name) for name, case in BAD_REPRESENTATION.items()],
)
def test_bad_representation(change, exception, fragments):
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


@pytest.mark.parametrize("gram", ["dense", "ghost", "subset"])
def test_representation_in_another_mode(gram):
    model = Net()
    chosen = model.trunk.parameters() if gram == "subset" else gram
    opt = CAGradClip(torch.optim.SGD(model.parameters(), 0.1), [0.5, 0.5], gradients=chosen)
    z, losses = model(X)
    before = everything(model, opt)
    for bad in (z, "z", (z, z)):
        with pytest.raises(ValueError, match='unless gradients="representation"'):
            opt.backward(losses, representation=bad)
        assert everything(model, opt) == before
    opt.backward(losses)


@TWO_MODES
def test_a_subset_that_a_loss_does_not_reach_is_named(mode):
    state = Untouched(mode)
    z, losses = state.model(X)
    losses[1] = state.model.spare(X[:, :1]).sum()
    named = "`gradients`" if mode == "trunk" else "`representation`"
    state.refuses(ValueError, ["loss '1'", named, "None"], losses, **given(mode, z))


UNFIT = {
    "callable": (lambda a, b: [a, lambda: b], {}, TypeError, ["callable", "dense"]),
    "number": (lambda a, b: [a, 1.0], {}, TypeError, ["`losses` must hold only tensors"]),
    "accumulated": (lambda a, b: [a, b], {"accumulate": True}, ValueError, ["`accumulate`"]),
    "vector": (lambda a, b: [a, b.expand(2)], {}, ValueError, ["loss '1'", "scalar", "[2]"]),
    "complex": (lambda a, b: [a, b * 1j], {}, ValueError, ["loss '1'", "real"]),
    "no graph": (lambda a, b: [a, b.detach()], {}, ValueError, ["loss '1'", "graph"]),
    "all absent": (lambda a, b: [None, None], {}, ValueError, ["`losses`", "None for all"]),
    "too few": (lambda a, b: [a], {}, ValueError, ["`losses`", "got 1"]),
    "mapping": (lambda a, b: {"a": a, "b": b}, {}, ValueError, ["`losses`", "'a', 'b'"]),
    "single": (lambda a, b: a, {}, TypeError, ["`losses`", "[loss]"]),
    "NaN": (lambda a, b: [a, b * math.nan], {}, FloatingPointError, ["loss '1'", "nonfinite"]),
    "Inf": (lambda a, b: [a / 0, b], {}, FloatingPointError, ["loss '0'", "nonfinite"]),
    "NaN surrogate": (
        lambda a, b: [a, (b * 0).abs().sqrt()],
        {},
        FloatingPointError,
        ["the gradient of loss '1'", "nonfinite"],
    ),
}


@TWO_MODES
@pytest.mark.parametrize("case", UNFIT)
def test_losses_that_do_not_fit(mode, case):
    change, kwargs, exception, fragments = UNFIT[case]
    state = Untouched(mode)
    z, losses = state.model(X)
    state.refuses(exception, fragments, change(*losses), **kwargs, **given(mode, z))


BAD_GRAM = {
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
}


@pytest.mark.parametrize("make", [CAGradClip, CAGrad, MGDA, METHODS["rule"]])
@pytest.mark.parametrize("case", BAD_GRAM)
def test_bad_gram(case, make):
    gram, exception, fragments = BAD_GRAM[case]
    inner = torch.optim.SGD(Net().parameters(), 0.1)
    with pytest.raises(exception) as caught:
        make(inner, [0.5, 0.5], gradients=gram)
    assert [f for f in ("`gradients`", *fragments) if f not in str(caught.value)] == []


@pytest.mark.parametrize("shape", [[], [3]], ids=str)
def test_a_parameter_instead_of_a_list_of_one(shape):
    """Torch's "iteration over a 0-d tensor", or "parameters of `inner`; got another tensor"."""
    p = nn.Parameter(torch.ones(shape))
    with pytest.raises((TypeError, ValueError), match="`gradients`") as caught:
        CAGradClip(torch.optim.SGD([p], 0.1), [0.5, 0.5], gradients=p)
    assert "another one" not in str(caught.value)


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
    state = Untouched(mode)
    model, x = state.model, X.clone().requires_grad_()
    through = checkpoint(model.trunk, x, use_reentrant=True) if where == "trunk" else model.trunk(x)
    z = through.tanh()
    losses = (
        [checkpoint(model.heads, z, use_reentrant=True)[:, i].mean() for i in range(2)]
        if where == "heads"
        else model.losses(z)
    )
    state.refuses(RuntimeError, ["use_reentrant=False"], losses, **given(mode, z))


@ALL_MODES
def test_checkpoint_without_reentrance_changes_nothing(mode):
    plain, model = Net(3), Net(3)
    combine(wrapped(plain, mode), mode, plain, X)
    z = checkpoint(model.represent, X, use_reentrant=False)
    losses = checkpoint(model.losses, z, use_reentrant=False)
    wrapped(model, mode).backward(losses, **given(mode, z))
    assert torch.equal(flat_grad(model), flat_grad(plain))


@pytest.mark.parametrize("case", ["trunk", "heads", "in the subset"])
def test_sparse_gradients_are_refused(case):
    table, model = nn.Embedding(3, 4, sparse=True).double(), Net()
    parameters = [*table.parameters(), *model.parameters()]
    gram = table.parameters() if case == "in the subset" else "representation"
    opt = CAGradClip(torch.optim.SGD(parameters, 0.1), [0.6, 0.4], gradients=gram)
    looked_up = table(torch.tensor([0, 2]))
    z = model.represent(looked_up if case != "heads" else X[:2])
    losses = [loss + (looked_up.sum() if case == "heads" else 0) for loss in model.losses(z)]
    before = everything(model, opt)
    with pytest.raises(ValueError, match=r"sparse.*\[3, 4\].*sparse=False"):
        opt.backward(losses, **({} if case == "in the subset" else {"representation": z}))
    assert everything(model, opt) == before
    assert table.weight.grad is None


@ALL_MODES
@pytest.mark.parametrize("with_heads", [False, True], ids=["all", "heads"])
def test_a_second_call_for_the_same_graph(mode, with_heads):
    model = Net()
    opt = wrapped(model, mode, shared_parameters=model.trunk.parameters() if with_heads else None)
    z, losses = model(X)
    opt.backward(losses, **given(mode, z))
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match=r"(?s)second time.*Compute the losses again"):
        opt.backward(losses, **given(mode, z))
    assert everything(model, opt) == before


@TWO_MODES
@pytest.mark.parametrize("with_heads", [False, True], ids=["all", "heads"])
def test_the_graph_of_the_trunk_is_freed(mode, with_heads):
    """The losses of a training loop outlive the step, and must not keep the activations."""
    model = Net()
    opt = wrapped(model, mode, shared_parameters=model.trunk.parameters() if with_heads else None)
    z, losses = model(X)
    opt.backward(losses, **given(mode, z))
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


def nan_in_the_trunk(model, x):
    """A representation of zeros whose gradient is finite, and NaN in all that is behind it."""
    z = (model.trunk(x) * 0).abs().sqrt()
    return z, model.losses(z)


@pytest.mark.parametrize("with_heads", [False, True], ids=["all", "heads"])
class TestNotFiniteBehindTheSurrogates:
    """The Gram matrix says nothing of it: the combined gradient itself is looked at."""

    @staticmethod
    def shared(model, with_heads):
        return {"shared_parameters": model.trunk.parameters()} if with_heads else {}

    def test_raise(self, with_heads):
        model = Net()
        state = Untouched("representation", model, **self.shared(model, with_heads))
        z, losses = nan_in_the_trunk(state.model, X)
        fragments = ["the combined gradient is NaN or Inf", 'nonfinite="skip"']
        state.refuses(FloatingPointError, fragments, losses, representation=z)

    def test_skip(self, with_heads):
        model = Net()
        state = Untouched(
            "representation", model, nonfinite="skip", **self.shared(model, with_heads)
        )
        for k in range(1, 3):
            before = bits([model.state_dict(), [p.grad for p in model.parameters()]])
            z, losses = nan_in_the_trunk(model, X)
            state.opt.backward(losses, representation=z)
            state.opt.step()
            assert state.opt.report.skipped == k
            assert state.opt.report.outcome is Outcome.SKIPPED
            assert bits([model.state_dict(), [p.grad for p in model.parameters()]]) == before
        state.twin_opt._core.progress = replace(state.twin_opt._core.progress, skipped=2)
        state.check()
        assert state.opt.report.skipped == 2
        assert state.opt.report.outcome is not Outcome.SKIPPED

    def test_propagate(self, with_heads):
        model = Net()
        opt = wrapped(
            model, "representation", nonfinite="propagate", **self.shared(model, with_heads)
        )
        z, losses = nan_in_the_trunk(model, X)
        opt.backward(losses, representation=z)
        assert model.trunk.weight.grad.isnan().any()
        assert model.heads.weight.grad.isfinite().all()


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_infinite_gradient_of_heads_alone(nonfinite):
    """The representation's gradient is finite, that of one head is not: sqrt at 0 times z = 0."""
    model = Net()
    opt = wrapped(
        model,
        "representation",
        shared_parameters=model.trunk.parameters(),
        nonfinite=nonfinite,
    )
    z, losses = model(X)
    losses[1] = losses[1] + (model.heads.bias[0] * 0).abs().sqrt()
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="the combined gradient"):
            opt.backward(losses, representation=z)
    else:
        opt.backward(losses, representation=z)
        assert opt.report.skipped == 1
    assert all(p.grad is None for p in model.parameters())


@TWO_MODES
def test_skip_of_a_loss_that_is_not_finite(mode):
    state = Untouched(mode, nonfinite="skip")
    z, (a, b) = state.model(X)
    state.opt.backward([a, b * math.nan], **given(mode, z))
    state.opt.step()
    assert state.opt.report.outcome is Outcome.SKIPPED
    assert state.opt.report.losses[1].isnan()
    state.twin_opt._core.progress = replace(state.twin_opt._core.progress, skipped=1)
    state.check()


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
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert bits(None if p.grad is None else p.grad.isnan()) == bits(
            None if q.grad is None else q.grad.isnan()
        )


class Holder:
    """What Accelerate does to an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@TWO_MODES
def test_through_a_wrapper(mode):
    model, plain = Net(), Net()
    combine(wrapped(plain, mode), mode, plain, X)
    opt = Holder(Holder(wrapped(model, mode)))
    z, losses = model(X)
    raco_optim.backward(opt, losses, **given(mode, z))
    assert torch.equal(flat_grad(model), flat_grad(plain))
    with pytest.raises(TypeError, match="`optimizer`"):
        raco_optim.backward(Holder(None), losses, **given(mode, z))


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_autocast(mode, dtype, inside):
    """One is not to call `backward` under autocast, but many do."""
    model, x = Net(3, torch.float32), batch(0)
    opt = wrapped(model, mode)

    def forward():
        with torch.autocast("cpu", dtype):
            return model(x)

    J = jacobian(model, lambda: forward()[1])
    z, losses = forward()
    assert z.dtype == dtype
    with torch.autocast("cpu", dtype, enabled=inside):
        opt.backward(losses, **given(mode, z))
    expected = opt.report.coefficients @ J
    error = (flat_grad(model) - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps
    assert {p.grad.dtype for p in model.trunk.parameters()} == {torch.float32}


@TWO_MODES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_low_precision(mode, dtype):
    model = Net(3, dtype)
    opt = wrapped(model, mode)
    J = jacobian(model, lambda: model(batch(0, dtype=dtype))[1])
    combine(opt, mode, model, batch(0, dtype=dtype))
    expected = opt.report.coefficients @ J
    error = (flat_grad(model) - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps
    assert model.trunk.weight.grad.dtype == dtype


@pytest.mark.parametrize("gram", ["ghost", "all parameters", "a part of them"])
def test_closures(gram):
    """LBFGS calls its closure several times per step."""
    model, plain = network(DOUBLE), network(DOUBLE)
    chosen = {"ghost": "ghost", "all parameters": model.parameters()}.get(gram, [model[0].weight])
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
                return two_losses(m, batch(t, dtype=DOUBLE))

            loss = opt.step(closure)
            assert loss.isfinite()
    assert calls.count(opts[0]) == calls.count(opts[1]) > 3
    found, expected = (list(m.parameters()) for m in (model, plain))
    if gram == "a part of them":
        assert max((p - q).abs().max() for p, q in zip(found, expected, strict=True)) > 1e-6
    else:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_closure_cannot_pass_a_representation():
    state = Untouched("representation")
    with pytest.raises(TypeError, match="`representation`"):
        state.opt.step(lambda: state.model(X)[1])
    state.check()


@TWO_MODES
def test_backward_without_gradients_being_recorded(mode):
    model, plain = Net(), Net()
    combine(wrapped(plain, mode), mode, plain, X)
    z, losses = model(X)
    with torch.no_grad():
        wrapped(model, mode).backward(losses, **given(mode, z))
    assert torch.equal(flat_grad(model), flat_grad(plain))
    assert not any(p.grad is not None and p.grad.requires_grad for p in model.parameters())


@TWO_MODES
def test_coefficients_that_are_parameters_get_no_gradient(mode):
    model = Net()
    model.alpha = nn.Parameter(torch.tensor([0.5, 0.5], dtype=DOUBLE))
    inner = torch.optim.SGD(model.parameters(), 0.1)
    opt = MultiObjectiveOptimizer(inner, lambda gram: model.alpha, gradients=MODES[mode](model))
    combine(opt, mode, model, X)
    assert model.alpha.grad is None


def test_copies_know_their_subset():
    model = Net()
    opt = wrapped(model, "trunk")
    twin, twin_opt = copy.deepcopy((model, opt))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    fresh = Net()
    combine(twin_opt, "trunk", twin, X)
    combine(wrapped(fresh, "trunk"), "trunk", fresh, X)
    assert torch.equal(flat_grad(twin), flat_grad(fresh))


def test_parameter_group_added_later_is_combined_but_not_in_the_subset():
    model = Net()
    opt = CAGradClip(
        torch.optim.SGD(model.trunk.parameters(), 0.1),
        [0.6, 0.4],
        gradients=model.trunk.parameters(),
    )
    opt.add_param_group({"params": list(model.heads.parameters())})
    J, S = jacobian(model, lambda: model(X)[1]), surrogate_jacobian("trunk", model, X)
    combine(opt, "trunk", model, X)
    torch.testing.assert_close(opt.report.gram, S @ S.T)
    torch.testing.assert_close(flat_grad(model), opt.report.coefficients @ J)
