"""On a CPU, memory of the size of large gradients is kept from step to step.

Nobody may notice: not in the bits of a result, in a pickle, nor in a tensor that was handed out.
"""

import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
from torch import nn

from benchmarks.step_cost_memory import measure_memory
from raco_optim import (
    MGDA,
    CAGradClip,
    MultiObjectiveOptimizer,
    add_combined_gradient,
    gram_matrix,
    min_norm_point,
    mixing_coefficients,
    per_loss_gradients,
)
from tests.problems_nn import Buffered, bits, inverse_norms

WEIGHTS = {1: [1.0], 2: [0.6, 0.4], 3: [0.5, 0.2, 0.3]}
SIDE = 512  # 512 * 512 * 4 bytes are a megabyte
FORMS = pytest.mark.parametrize("as_callables", [False, True], ids=["tensors", "callables"])


class Wide(nn.Module):
    """A weight of exactly a megabyte, one of a row less, and a small one."""

    def __init__(self, side=SIDE):
        super().__init__()
        generator = torch.Generator().manual_seed(side)
        self.weight, self.shorter, self.small = (
            nn.Parameter(torch.randn(n, side, generator=generator) / 30)
            for n in (side, side - 1, 2)
        )

    def losses(self, t, m):
        x = torch.randn(1, self.weight.shape[1], generator=torch.Generator().manual_seed(t))
        x = x.to(self.weight.dtype)
        h = (x @ self.weight.mT).tanh()
        y = (h[:, 1:] @ self.shorter) * 0.1 + x
        out = y @ self.small.mT
        signs = [(-1) ** i * (1 + i) for i in range(m)]
        return [(out[0, i % 2] - s).square() + 0.01 * i * h.sum() for i, s in enumerate(signs)]


def wrapped(model, m=3, **kwargs):
    return CAGradClip(torch.optim.SGD(model.parameters(), 0.05), WEIGHTS[m], **kwargs)


def in_form(model, t, m, as_callables):
    if as_callables:
        return [lambda i=i: model.losses(t, m)[i] for i in range(m)]
    return model.losses(t, m)


def grads(model):
    return bits([p.grad for p in model.parameters()])


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None}


def buffers(opt):
    """What is kept in place of gradients, and the scratch memory."""
    memory = getattr(opt._core.mode, "_memory", None)
    if memory is None:
        return []
    scratch = [x for pair in getattr(memory.workspace, "_scratch", {}).values() for x in pair]
    return [*(b for row in memory.blanks for b in row), *scratch]


def kept(opt):
    """Bytes of what is kept in place of each gradient."""
    return [[b.nbytes for b in row] for row in opt._core.mode._memory.blanks]


def stages_by_hand(model, losses, weights):
    """A step without any memory."""
    parameters = list(model.parameters())
    rows = per_loss_gradients(losses, parameters)
    gram = gram_matrix(rows)
    alpha = torch.zeros(len(rows), dtype=torch.float64)
    here = [i for i, row in enumerate(rows) if any(g is not None for g in row)]
    total = math.fsum(weights[i] for i in here)
    shares = [weights[i] / total for i in here] if len(here) < len(rows) else weights
    alpha[here] = total * mixing_coefficients(gram[here][:, here], shares, 0.4).coefficients
    add_combined_gradient(parameters, rows, alpha)
    return gram, alpha


@FORMS
@pytest.mark.parametrize("m", [2, 3])
def test_large_tensors_of_all_gradients_but_one_are_kept(m, as_callables):
    """The small one of 4 KB is not; what was kept is free again while gradients are computed."""
    model = Wide()
    opt = wrapped(model, m)
    expected = [[4 * SIDE * SIDE, 4 * SIDE * (SIDE - 1)]] * (m - 1)
    left = []
    for p in model.parameters():
        p.register_hook(lambda _: left.append(sum(len(row) for row in old if row)))
    for t in range(3):
        old = getattr(opt._core.mode._memory, "blanks", [])
        opt.zero_grad()
        opt.backward(in_form(model, t, m, as_callables))
        opt.step()
        assert kept(opt) == [[], *expected]
    # Three hooks a pass; before pass i the rows up to i are free.
    assert left[6 * m :] == [2 * (m - 1 - i) for i in range(m) for _ in range(3)]


@pytest.mark.parametrize("m", [2, 4])
def test_the_peak_is_m_gradients(m):
    """And two columns: the one that is formed, and the block that keeps the heap in one piece."""
    parameters = [nn.Parameter(torch.randn(SIDE, SIDE) / SIDE) for _ in range(16)]
    opt = CAGradClip(torch.optim.SGD(parameters, 0.01), [1 / m] * m)

    def step():
        opt.zero_grad()
        h = torch.ones(2, SIDE)
        for p in parameters:
            h = (h @ p).tanh()
        opt.backward([(h[0, i] - i).square() for i in range(m)])

    found = measure_memory(step, opt.zero_grad)
    gradient = sum(p.nbytes for p in parameters)
    assert found.held <= (m - 1) * gradient + 2**21 * m
    assert found.held + found.peak <= (m + 2 / 16) * gradient + 2**21 * m  # m rows of scratch


def test_an_accelerator_keeps_its_own():
    weight = nn.Parameter(torch.ones(SIDE, SIDE, device="meta"))
    inner = torch.optim.SGD([weight], 0.1)
    opt = MultiObjectiveOptimizer(inner, inverse_norms, nonfinite="propagate")
    opt.backward([weight.sum(), weight.square().sum()])
    assert weight.grad.is_meta
    assert not buffers(opt)


@pytest.mark.parametrize("gradients", ["representation", "subset"])
def test_an_approximation_needs_none(gradients):
    weight = nn.Parameter(torch.ones(SIDE, SIDE))
    subset = gradients == "subset"
    inner = torch.optim.SGD([weight], 0.1)
    opt = CAGradClip(inner, [0.5, 0.5], gradients=[weight] if subset else gradients)
    z = weight.mean(0)
    opt.backward([z.sum(), z.square().sum()], representation=None if subset else z)
    assert not buffers(opt)


@pytest.mark.parametrize(
    ("m", "dtype", "as_callables"),
    [
        (1, torch.float32, False),
        (2, torch.float32, True),
        (3, torch.float32, False),
        (3, torch.float32, True),
        (2, torch.float64, False),
        (3, torch.float64, True),
        (3, torch.bfloat16, False),
        (2, torch.bfloat16, True),
        (1, torch.bfloat16, True),
    ],
)
def test_results_are_those_of_the_stages_in_every_bit(m, dtype, as_callables):
    side = 2 * SIDE if dtype == torch.bfloat16 else SIDE
    model, plain = Wide(side).to(dtype), Wide(side).to(dtype)
    opt, plain_opt = wrapped(model, m), torch.optim.SGD(plain.parameters(), 0.05)
    for t in range(3):
        if t != 1:  # once, gradients are added to
            opt.zero_grad()
            plain_opt.zero_grad()
        opt.backward(in_form(model, t, m, as_callables))
        gram, alpha = stages_by_hand(plain, in_form(plain, t, m, as_callables), WEIGHTS[m])
        assert torch.equal(opt.report.gram, gram)
        assert torch.equal(opt.report.coefficients, alpha)
        assert grads(model) == grads(plain)
        opt.step()
        plain_opt.step()
    assert bits(model.state_dict()) == bits(plain.state_dict())
    assert any(kept(opt)) == (m > 1)


@pytest.mark.parametrize("absent", [[0], [1], [2], [0, 1], [1, 2]], ids=str)
def test_absent_losses(absent):
    model, plain = Wide(), Wide()
    opt = wrapped(model)
    for missing in ([], absent, []):
        losses, plain_losses = (
            [None if i in missing else loss for i, loss in enumerate(net.losses(1, 3))]
            for net in (model, plain)
        )
        opt.zero_grad()
        plain.zero_grad()
        opt.backward(losses)
        stages_by_hand(plain, plain_losses, WEIGHTS[3])
        assert grads(model) == grads(plain)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_do_without_it(duplicate):
    model = Wide()
    opt = wrapped(model)
    sizes = []
    for t in range(2):
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        sizes.append((len(pickle.dumps(opt)), file.tell()))
        opt.zero_grad()
        opt.backward(model.losses(t, 3))
    opt._core.progress = dataclasses.replace(opt._core.progress, report=None)  # of some bytes
    assert abs(len(pickle.dumps(opt)) - sizes[0][0]) < 2000
    assert sizes[1][1] - sizes[0][1] < 2000
    twin, twin_opt = duplicate((model, opt))
    assert buffers(opt)
    assert not buffers(twin_opt)
    for net, o in ((model, opt), (twin, twin_opt)):
        o.zero_grad()
        o.backward(net.losses(5, 3))
    assert grads(model) == grads(twin)
    assert not storages(buffers(opt)) & storages(buffers(twin_opt))


def test_the_number_of_losses_may_change():
    model = Wide()
    opt = MGDA(torch.optim.SGD(model.parameters(), 0.05))
    for t, m in enumerate([2, 4, 1, 3, 2]):
        plain = copy.deepcopy(model)
        opt.zero_grad()
        opt.backward(model.losses(t, m))
        rows = per_loss_gradients(plain.losses(t, m), list(plain.parameters()))
        alpha = min_norm_point(gram_matrix(rows)).p
        add_combined_gradient(list(plain.parameters()), rows, alpha)
        assert grads(model) == grads(plain)
        opt.step()


def test_the_shape_of_a_parameter_may_change():
    """As a growing vocabulary does; for other changes see `test_nothing_kept_survives...`."""
    model = Wide()
    model.small.requires_grad_(False)  # the optimizer does not hold it
    opt = CAGradClip(torch.optim.SGD([model.weight, model.shorter], 0.05), WEIGHTS[3])
    opt.backward(model.losses(0, 3))
    model.weight.data = torch.cat([model.weight.data, model.weight.data])[:, : SIDE // 2]
    model.shorter.data = torch.ones(2 * SIDE - 1, SIDE // 2)
    model.small.data = torch.ones(2, SIDE // 2)
    fresh = copy.deepcopy(model)
    fresh_opt = CAGradClip(torch.optim.SGD([fresh.weight, fresh.shorter], 0.05), WEIGHTS[3])
    for t in range(1, 3):
        for net, o in ((model, opt), (fresh, fresh_opt)):
            o.zero_grad()
            o.backward(net.losses(t, 3))
        assert torch.equal(opt.report.gram, fresh_opt.report.gram)
        assert grads(model) == grads(fresh)


@pytest.mark.parametrize(
    ("kind", "as_callables"),
    [
        *((kind, False) for kind in ("CAGradClip", "c = 0", "one loss", "others absent", "MGDA")),
        *((kind, True) for kind in ("CAGradClip", "one loss", "others absent")),
    ],
)
def test_what_was_handed_out_does_not_change(kind, as_callables):
    model = Wide()
    m = 1 if kind == "one loss" else 3
    inner = torch.optim.SGD(model.parameters(), 0.05)
    c = 0.0 if kind == "c = 0" else 0.4
    opt = MGDA(inner) if kind == "MGDA" else CAGradClip(inner, WEIGHTS[m], c)
    handed = []
    for t in range(4):
        opt.zero_grad()
        losses = in_form(model, t, m, as_callables)
        opt.backward([losses[0], None, None] if kind == "others absent" else losses)
        handed_out = [p.grad for p in model.parameters()]
        report = opt.report
        held = [report.gram, report.coefficients, report.losses, report.cosines]
        assert not storages(buffers(opt)) & storages(handed_out)
        handed.append((handed_out, held, bits(handed_out), repr([x.tolist() for x in held])))
        opt.step()
    for handed_out, held, *expected in handed:
        assert [bits(handed_out), repr([x.tolist() for x in held])] == expected
    pointers = [p for handed_out, *_ in handed for p in storages(handed_out)]
    assert len(pointers) == len(set(pointers))


@FORMS
def test_micro_batches_after_plain_steps(as_callables):
    model = Wide()
    opt = wrapped(model)
    for t in range(2):
        opt.backward(in_form(model, t, 3, as_callables))
    opt.zero_grad()
    fresh = copy.deepcopy(model)
    fresh_opt = wrapped(fresh)
    for net, o in ((model, opt), (fresh, fresh_opt)):
        o.backward(in_form(net, 2, 3, as_callables), accumulate=True)
        o.backward(in_form(net, 3, 3, as_callables), accumulate=True)
    pending = [g for row in opt._core.progress.pending.rows for g in row]
    assert not storages(pending) & storages(buffers(opt))
    for net, o in ((model, opt), (fresh, fresh_opt)):
        o.backward(in_form(net, 4, 3, as_callables))
    assert grads(model) == grads(fresh)
    parameters = list(fresh.parameters())
    rows = [per_loss_gradients(fresh.losses(t, 3), parameters) for t in (2, 3, 4)]
    J = [
        torch.cat([sum(g).flatten() for g in zip(*row, strict=True)])
        for row in zip(*rows, strict=True)
    ]
    torch.testing.assert_close(opt.report.gram, gram_matrix(J), rtol=1e-5, atol=1e-8)
    opt.zero_grad()
    fresh_opt.zero_grad()
    opt.backward(in_form(model, 5, 3, as_callables))
    fresh_opt.backward(in_form(fresh, 5, 3, as_callables))
    assert grads(model) == grads(fresh)


def fails():
    raise ZeroDivisionError("in the middle")


@pytest.mark.parametrize("accumulate", [False, True], ids=["combine", "accumulate"])
@pytest.mark.parametrize("pending", [False, True], ids=["none pending", "pending"])
def test_a_failure_in_the_middle(pending, accumulate):
    model = Wide()
    opt = wrapped(model)
    opt.backward(model.losses(0, 3))
    fresh = copy.deepcopy(model)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        q.grad = p.grad.clone()
    fresh_opt = wrapped(fresh)
    for net, o in ((model, opt), (fresh, fresh_opt)):
        if pending:
            o.backward(net.losses(1, 3), accumulate=True)
    before = grads(model)
    with pytest.raises(ZeroDivisionError):
        opt.backward([*in_form(model, 2, 3, True)[:2], fails], accumulate=accumulate)
    if not accumulate:
        with pytest.raises(FloatingPointError):
            opt.backward([loss * math.nan for loss in model.losses(2, 3)])
    assert grads(model) == before
    for t in (3, 4):
        for net, o in ((model, opt), (fresh, fresh_opt)):
            o.backward(in_form(net, t, 3, t == 4))
        assert torch.equal(opt.report.gram, fresh_opt.report.gram)
        assert grads(model) == grads(fresh)


@FORMS
def test_users_memory_is_neither_kept_nor_written_to(as_callables):
    x, buffer = nn.Parameter(torch.zeros(SIDE, SIDE)), torch.zeros(SIDE, SIDE)
    opt = CAGradClip(torch.optim.SGD([x], 0.1), WEIGHTS[3], c=0.0)
    for k in range(1, 4):
        buffer.fill_(float(k))
        calls = [lambda: Buffered.apply(x, buffer) for _ in range(3)]
        opt.zero_grad()
        opt.backward(calls if as_callables else [call() for call in calls])
        torch.testing.assert_close(x.grad, torch.full_like(x, k))
        assert torch.equal(buffer, torch.full_like(buffer, k))
        assert not storages([x.grad, buffer]) & storages(buffers(opt))
        assert len(storages([x.grad, buffer])) == 2


def test_a_buffer_that_each_callable_refills():
    x, buffer = nn.Parameter(torch.zeros(SIDE, SIDE)), torch.zeros(SIDE, SIDE)
    opt = CAGradClip(torch.optim.SGD([x], 0.1), WEIGHTS[3], c=0.0)

    def refilled(k):
        buffer.fill_(float(k))
        return Buffered.apply(x, buffer)

    for t in range(3):
        opt.zero_grad()
        opt.backward([lambda k=k, t=t: refilled(k + t) for k in range(3)])
        torch.testing.assert_close(x.grad, torch.full_like(x, 0.2 + 0.6 + t))


def test_tied_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.embed, self.out = nn.Embedding(SIDE, SIDE), nn.Linear(SIDE, SIDE, bias=False)
            self.out.weight = self.embed.weight

        def losses(self, t, m):
            out = self.out(self.embed(torch.tensor([t, t + 1]))).tanh()
            return [(out[0, i] - i).square() + (out[1, i] + i).square() for i in range(m)]

    model, plain = Tied(), Tied()
    opt = wrapped(model)
    for t in range(3):
        opt.zero_grad()
        plain.zero_grad()
        opt.backward(model.losses(t, 3))
        gram, _ = stages_by_hand(plain, plain.losses(t, 3), WEIGHTS[3])
        assert torch.equal(opt.report.gram, gram)
        assert grads(model) == grads(plain)
    assert [len(row) for row in kept(opt)] == [0, 1, 1]


def test_one_expanded_gradient_for_two_parameters():
    """Autograd returns one number, expanded, for both of them and for two losses."""
    x, y = (nn.Parameter(torch.zeros(SIDE, SIDE)) for _ in range(2))
    opt = CAGradClip(torch.optim.SGD([x, y], 0.1), [0.5, 0.5], c=0.0)
    for _ in range(2):
        opt.zero_grad()
        total = (x + y).sum()
        opt.backward([total, 3 * total])
        assert x.grad.is_contiguous()
        x.grad.zero_()
        assert torch.equal(y.grad, torch.full_like(y, 2))


@pytest.mark.parametrize("channels", [8, 192], ids=["small", "held"])
def test_gradients_have_the_layout_that_autograd_gives_them(channels):
    """That of the parameter: torch's fused optimizers are slow, or refuse, where they differ."""
    model = nn.Conv2d(channels, channels, 3).to(memory_format=torch.channels_last)
    opt = CAGradClip(torch.optim.SGD(model.parameters(), 0.1), [0.5, 0.5])
    x = torch.randn(1, channels, 3, 3).to(memory_format=torch.channels_last)
    out = model(x)
    opt.backward([out[:, 0].sum(), out.square().sum()])
    assert model.weight.grad.stride() == model.weight.stride()
    assert any(kept(opt)) == (channels > 8)


@pytest.mark.filterwarnings("ignore:the losses depend on")
def test_nothing_kept_survives_a_change_of_its_parameters():
    """Each step equals that of an optimizer that was built for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 300), nn.Linear(300, 4))
    model.extra = nn.Linear(5, 2)
    opt = MGDA(torch.optim.SGD(list(model[:3].parameters()), 0.05))

    def losses(net, x, m):
        out, extra = net[:4](x), net.extra(x)
        return [out[:, i].square().mean() + (extra[:, i % 2].mean() if i else 0) for i in range(m)]

    def narrower():
        model[0], model[2] = nn.Linear(5, 200), nn.Linear(200, 300)
        opt.param_groups[0]["params"] = [*model[0].parameters(), *model[2].parameters()]

    changes = [
        lambda: None,
        lambda: opt.add_param_group({"params": list(model.extra.parameters())}),
        lambda: model[0].bias.requires_grad_(False),
        lambda: model.double(),
        lambda: opt.param_groups[1].update(shared=False),
        lambda: model.float(),
        lambda: opt.param_groups[0]["params"].reverse(),
        lambda: model[0].bias.requires_grad_(True),
        narrower,
        lambda: opt.param_groups[1].update(shared=True),
    ]
    for t, change in enumerate(changes):
        change()
        x = torch.randn(3, 5, dtype=model[2].weight.dtype)
        for m in (2, 3, 3, 4):
            opt.zero_grad()
            model.zero_grad()
            opt.backward(losses(model, x, m))
            held = [p for group in opt.param_groups for p in group["params"]]
            found, gram = bits([p.grad for p in held]), opt.report.gram
            groups = [
                {"params": g["params"], "shared": g.get("shared", True)} for g in opt.param_groups
            ]
            model.zero_grad()
            fresh = MGDA(torch.optim.SGD(groups, 0.05))
            fresh.backward(losses(model, x, m))
            assert torch.equal(gram, fresh.report.gram), t
            assert found == bits([p.grad for p in held]), t
    model.to("meta")  # which makes other parameters
    opt.param_groups[0]["params"] = [*model[0].parameters(), *model[2].parameters()]
    opt.param_groups[1]["params"] = list(model.extra.parameters())
    opt.rule, opt.nonfinite = inverse_norms, "propagate"
    opt.backward(losses(model, torch.ones(3, 5, device="meta"), 3))
    held = [p for group in opt.param_groups for p in group["params"]]
    assert all(p.grad.is_meta for p in held if p.grad is not None)
