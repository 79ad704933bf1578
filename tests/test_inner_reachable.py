"""The wrapper hides nothing of the inner optimizer, and other libraries hide nothing of it.

The witnesses are the same optimizers of torch, transformers and pytorch_optimizer without the
wrapper. With one loss and c = 0 the combined gradient equals the gradient of the loss, bit for bit.
"""

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR

import raco_optim
from raco_optim import CAGradClip, MultiObjectiveOptimizer, StepLogger
from tests.problems_nn import batch, bits, clipped_alpha, flat_grad, jacobian, network, two_losses

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning")
WEIGHTS = [0.6, 0.4]


def loss_of(model, t):
    return two_losses(model, batch(t))[0]


def alone(inner):
    return CAGradClip(inner, [1.0], c=0.0)


def quietly(name):
    """Imports an optional package that warns at import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def backward(opt, loss):
    if isinstance(opt, CAGradClip):
        opt.backward([loss])
    else:
        loss.backward()


def assert_equals_plain(make, train):
    """`train(opt, model)` gives the same bits with the wrapper around `make(model)` as without."""
    runs = []
    for wrap in (alone, lambda inner: inner):
        model = network()
        opt = wrap(make(model))
        seen = train(opt, model)
        runs.append(bits([seen, model.state_dict(), opt.state_dict()["state"]]))
    assert runs[0] == runs[1]


def test_schedule_free_switches_between_training_and_evaluation():
    """With pytorch_optimizer's ScheduleFreeAdamW; `hasattr` is how loops for both kinds ask."""

    def train(opt, model):
        assert hasattr(opt, "train")
        assert hasattr(opt, "eval")
        opt.train()
        for t in range(5):
            opt.zero_grad()
            backward(opt, loss_of(model, t))
            opt.step()
        trained = bits(model.state_dict())
        opt.eval()
        averaged = bits(model.state_dict())
        assert averaged != trained
        opt.train()
        return [trained, averaged]

    po = quietly("pytorch_optimizer")
    assert_equals_plain(lambda model: po.ScheduleFreeAdamW(model.parameters(), lr=0.05), train)


def test_schedule_free_among_several():
    po = quietly("pytorch_optimizer")
    model = network()
    opt = CAGradClip(
        [po.ScheduleFreeAdamW(model[0].parameters()), AdamW(model[2].parameters())], WEIGHTS
    )
    opt.train()
    for t in range(2):
        opt.zero_grad()
        opt.backward(two_losses(model, batch(t)))
        opt.step()
    before = bits(model.state_dict())
    opt.eval()
    changed = [k for k, v in bits(model.state_dict()).items() if v != before[k]]
    assert changed == ["0.weight", "0.bias"]
    both = CAGradClip([po.ScheduleFreeAdamW([p], lr=0.1) for p in network().parameters()], WEIGHTS)
    both.eval()
    assert [group["train_mode"] for group in both.param_groups] == [False] * 4


def sam_in_two_steps(opt, model):
    for t in range(3):
        for name in ("first_step", "second_step"):
            backward(opt, loss_of(model, t))
            getattr(opt, name)(zero_grad=True)


def sam_with_a_closure(opt, model):
    def closure(t):
        opt.zero_grad()
        loss = loss_of(model, t)
        if isinstance(opt, CAGradClip):
            return [loss]
        loss.backward()
        return loss

    for t in range(3):
        found = closure(t)
        if isinstance(opt, CAGradClip):
            opt.backward(found)
        opt.step(lambda t=t: closure(t))


@pytest.mark.parametrize("train", [sam_in_two_steps, sam_with_a_closure])
def test_sam(train):
    po = quietly("pytorch_optimizer")
    assert_equals_plain(lambda model: po.SAM(model.parameters(), AdamW, rho=0.1, lr=0.05), train)


def test_learning_rate_that_adafactor_computes():
    """Transformers' AdafactorSchedule asks the optimizer for its `_get_lr`."""
    transformers = pytest.importorskip("transformers.optimization")

    def train(opt, model):
        schedule = transformers.AdafactorSchedule(opt)
        for t in range(3):
            opt.zero_grad()
            backward(opt, loss_of(model, t))
            opt.step()
        return schedule.get_lr()

    def adafactor(model):
        return transformers.Adafactor(model.parameters(), lr=None, warmup_init=True)

    assert_equals_plain(adafactor, train)


class Tuned(SGD):
    """With a number that its step reads, as research optimizers have."""

    def __init__(self, params, factor=1.0):
        super().__init__(params, lr=0.1)
        self.factor = factor

    def __getstate__(self):  # torch's keeps nothing but groups, state and defaults
        return super().__getstate__() | {"factor": self.factor}

    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(self.factor)
        super().step()


def test_attributes_that_are_set_reach_the_inner_optimizer():
    def train(opt, model):
        opt.factor = 3.0
        inner = getattr(opt, "optimizer", opt)
        assert opt.factor == inner.factor == 3.0
        assert opt is inner or "factor" not in vars(opt)
        backward(opt, loss_of(model, 0))
        opt.step()

    assert_equals_plain(lambda model: Tuned(model.parameters()), train)


def test_attributes_of_several():
    model = network()
    opt = CAGradClip([Tuned(model[0].parameters()), SGD(model[2].parameters(), lr=0.1)], WEIGHTS)
    opt.factor = 3.0
    assert opt.factor == opt.optimizers[0].factor == 3.0
    assert not hasattr(opt.optimizers[1], "factor")
    opt = CAGradClip([Tuned([p], k) for k, p in enumerate(network().parameters())], WEIGHTS)
    with pytest.raises(AttributeError, match="4 inner optimizers have it. Read it from one of"):
        _ = opt.factor
    assert [x.factor for x in opt.optimizers] == [0, 1, 2, 3]
    opt.factor = 5.0  # of all that have it, as a method is called on all
    assert [x.factor for x in opt.optimizers] == [5.0] * 4
    assert "factor" not in vars(opt)


def test_attributes_of_the_wrapper_stay_its_own():
    inner = Tuned(network().parameters())
    inner.weights = inner.c = inner.report = inner.last_step = "mine"
    opt = alone(inner)
    assert (opt.weights, opt.c) == ((1.0,), 0.0)
    opt.c = 0.25
    assert (inner.c, opt.c) == ("mine", 0.25)
    opt.note = "new"
    assert vars(opt)["note"] == "new"
    assert not hasattr(inner, "note")


class WithOwn(CAGradClip):
    """A user's class; its attributes are its own."""

    def __init__(self, inner):
        self.before = 1
        super().__init__(inner, WEIGHTS)
        self.after = 2


def test_subclasses_with_attributes():
    opt = WithOwn(Tuned(network().parameters()))
    assert vars(opt).keys() >= {"before", "after"}
    opt.optimizer.after = "the inner one's"
    opt.after = 2  # its own as before, though the inner optimizer has one now
    assert opt.optimizer.after == "the inner one's"
    again = pickle.loads(pickle.dumps(opt))
    assert (again.before, again.after, again.factor) == (1, 2, 1.0)


def test_attributes_that_nobody_has():
    opt = alone(SGD(network().parameters(), lr=0.1))
    assert not hasattr(opt, "train")
    assert getattr(opt, "eval", None) is None
    for name in ("train", "no_such", "__array__", "__len__", "__torch_function__"):
        with pytest.raises(AttributeError, match=f"'CAGradClip' object has no attribute '{name}'"):
            getattr(opt, name)
    empty = CAGradClip.__new__(CAGradClip)  # as pickle makes it
    for name in ("optimizer", "param_groups", "anything"):
        assert not hasattr(empty, name)


class CopiesItself(SGD):
    """Says how it is copied; `copy` asks an object for that as for any attribute."""

    def __deepcopy__(self, memo):
        return CopiesItself(copy.deepcopy(self.param_groups, memo))


def test_a_copy_is_one_of_the_wrapper():
    model = network()
    twin, other = copy.deepcopy((model, CAGradClip(CopiesItself(model.parameters()), WEIGHTS)))
    assert type(other) is CAGradClip
    assert type(other.optimizer) is CopiesItself
    assert other.param_groups[0]["params"][0] is next(twin.parameters())


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "copy": lambda pair: (pair[0], copy.copy(pair[1])),
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("how", DUPLICATES)
def test_copies_reach_their_own_inner_optimizer(how, several):
    model = network()
    inner = Tuned(model.parameters())
    if several:
        inner = [Tuned(model[0].parameters()), SGD(model[2].parameters(), lr=0.1)]
    opt = CAGradClip(inner, WEIGHTS)
    schedule = ExponentialLR(opt, 0.5)  # it patches `step`
    twin, other = DUPLICATES[how]((model, opt))
    other.factor = 7.0
    assert other.optimizers[0].factor == 7.0
    assert opt.factor == (7.0 if how == "copy" else 1.0)
    before = bits(twin.state_dict())
    other.zero_grad()
    other.backward(two_losses(twin, batch(0)))
    other.step()
    assert bits(twin.state_dict()) != before
    assert schedule.get_last_lr()[0] == 0.1


def test_names_that_are_shown():
    inner = Tuned(network().parameters())
    name = inner._zero_grad_profile_name  # torch keeps the profiler's name on the optimizer
    opt = CAGradClip(inner, WEIGHTS)
    assert {"backward", "report", "param_groups", "optimizers"} <= set(dir(opt))
    assert "Tuned" in repr(opt)
    assert "CAGradClip" in repr(copy.copy(opt))
    assert inner._zero_grad_profile_name == name
    assert "CAGradClip" in opt._zero_grad_profile_name


def test_hooks_that_the_inner_optimizer_had_run():
    model, calls = network(), []
    inner = SGD(model.parameters(), lr=0.1)
    inner.register_step_pre_hook(lambda *args: calls.append("step"))
    inner.register_state_dict_pre_hook(lambda *args: calls.append("save"))
    opt = alone(inner)
    opt.backward([loss_of(model, 0)])
    opt.step()
    opt.state_dict()
    assert calls == ["step", "save"]


@pytest.mark.parametrize("unscale", [False, True])
def test_fused_optimizers_under_a_grad_scaler(unscale):
    """They unscale by themselves if they are told the scale, which a wrapper cannot hand on."""
    runs = []
    for wrapped in (True, False):
        model = network()
        inner = AdamW(model.parameters(), lr=0.1, eps=1.0, fused=True)
        assert inner._step_supports_amp_scaling
        opt = CAGradClip(inner, [1.0], c=0.0, nonfinite="propagate") if wrapped else inner
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        for t in range(4):
            opt.zero_grad()
            backward(opt, scaler.scale(loss_of(model, t)) * (torch.inf if t == 2 else 1))
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        runs.append((nn.utils.parameters_to_vector(model.parameters()).detach(), scaler))
    torch.testing.assert_close(runs[0][0], runs[1][0])
    assert runs[0][1].get_scale() == runs[1][1].get_scale()


# Optimizers that can't work are refused by name: spellings of timm, lomo_optim, transformers.
REFUSED = {
    **dict.fromkeys(["AdaHessian", "Adahessian", "SophiaH"], "create_graph"),
    **dict.fromkeys(
        ["LOMO", "AdaLOMO", "Lomo", "AdaLomo", "LayerWiseDummyOptimizer"], "after the backward pass"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    p, words = nn.Parameter(torch.zeros(2)), REFUSED[name]
    named = type(name, (SGD,), {})
    inner = named([p], lr=0.1)
    for given in (inner, [inner, SGD([nn.Parameter(torch.zeros(2))], lr=0.1)]):
        with pytest.raises(ValueError, match=rf"`inner` must .*{words}.*got {name}\. Choose"):
            CAGradClip(given, WEIGHTS)
    with pytest.raises(ValueError, match=r"got Mine\. Choose"):
        CAGradClip(type("Mine", (named,), {})([p], lr=0.1), WEIGHTS)


def test_the_real_ones_are_refused():
    po = quietly("pytorch_optimizer")
    real = [make(network().parameters()) for make in (po.AdaHessian, po.SophiaH)]
    real += [make(network()) for make in (po.LOMO, po.AdaLOMO)]
    trainer_utils = pytest.importorskip("transformers.trainer_pt_utils")
    for inner in [*real, trainer_utils.LayerWiseDummyOptimizer({})]:
        name = type(inner).__name__
        with pytest.raises(ValueError, match=f"{REFUSED[name]}.*got {name}"):
            CAGradClip(inner, WEIGHTS)


# Wrappers of the wrapper
def accelerate_setup(model, opt):
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(model, opt)


def fabric_setup(model, opt):
    return quietly("lightning.fabric").Fabric(accelerator="cpu", devices=1).setup(model, opt)


def lightning_setup(model, opt):
    """What `self.optimizers()` returns in a LightningModule; the real Trainer is below."""

    class Strategy:
        def optimizer_step(self, optimizer, closure, **kwargs):
            return optimizer.step(**kwargs)

    wrapped = quietly("lightning.pytorch.core.optimizer").LightningOptimizer(opt)
    wrapped._strategy = Strategy()
    return model, wrapped


@pytest.fixture(params=[accelerate_setup, fabric_setup, lightning_setup])
def setup(request):
    return request.param


def reaching(outer, name):
    """The method of `outer`, or of the optimizer inside if `outer` lacks it, as a user calls it."""
    return getattr(outer if hasattr(outer, name) else raco_optim.unwrap(outer), name)


def test_steps_schedules_logs_and_checkpoints_through_a_wrapper(setup, tmp_path):
    model, twin = network(), network()
    opt = CAGradClip(AdamW(model.parameters(), lr=0.1), WEIGHTS)
    stock = AdamW(twin.parameters(), lr=0.1)
    inside, outer = setup(model, opt)
    assert raco_optim.unwrap(outer) is opt
    schedules = [ExponentialLR(opt, 0.5), ExponentialLR(stock, 0.5)]
    with StepLogger(tmp_path / "steps.jsonl") as logger:
        for t in range(3):
            outer.zero_grad()
            J = jacobian(twin, lambda t=t: two_losses(twin, batch(t)))
            raco_optim.backward(outer, two_losses(inside, batch(t)))
            alpha = clipped_alpha(J, WEIGHTS, 0.4, "hard")
            torch.testing.assert_close(flat_grad(model), alpha @ J, rtol=1e-4, atol=1e-6)
            found = raco_optim.unwrap(outer).report.coefficients
            torch.testing.assert_close(found, alpha, rtol=1e-4, atol=1e-6)
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.grad = p.grad.clone()
            outer.step()
            stock.step()
            logger.log(outer)
            for schedule in schedules:
                schedule.step()
            assert outer.param_groups[0]["lr"] == stock.param_groups[0]["lr"] == 0.1 / 2 ** (t + 1)
            assert bits(model.state_dict()) == bits(twin.state_dict())
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    other = CAGradClip(AdamW(twin.parameters(), lr=0.1), [0.5, 0.5], c=0.1)
    _, other_outer = setup(twin, other)
    other_outer.load_state_dict(copy.deepcopy(outer.state_dict()))
    assert bits(other.state_dict()) == bits(opt.state_dict())
    assert other.c == 0.4


def test_settings_micro_batches_and_skipped_steps_through_a_wrapper(setup):
    model = network()
    opt = CAGradClip(AdamW(model.parameters(), lr=0.1), WEIGHTS)
    inside, outer = setup(model, opt)
    target = outer if hasattr(outer, "c") else raco_optim.unwrap(outer)
    target.c, target.weights, target.nonfinite = 0.1, [0.2, 0.8], "skip"
    assert (opt.c, opt.weights, opt.nonfinite) == (0.1, (0.2, 0.8), "skip")
    saved = outer.state_dict()["raco_optim"]
    assert (saved["c"], saved["weights"]) == (0.1, [0.2, 0.8])
    J = sum(jacobian(model, lambda t=t: two_losses(model, batch(t))) for t in range(2))
    reaching(outer, "backward")(two_losses(inside, batch(0)), accumulate=True)
    with pytest.raises(RuntimeError, match="accumulated but not combined"):
        outer.step()
    reaching(outer, "backward")(two_losses(inside, batch(1)))
    expected = clipped_alpha(J, [0.2, 0.8], 0.1, "hard") @ J
    torch.testing.assert_close(flat_grad(model), expected, rtol=1e-4, atol=1e-6)
    outer.step()
    before = bits(model.state_dict())
    outer.zero_grad()
    a, b = two_losses(inside, batch(1))
    reaching(outer, "backward")([a, b * torch.nan])
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # so that a step would move
    outer.step()
    assert bits(model.state_dict()) == before
    assert opt.report.skipped == 1


def test_groups_and_inner_attributes_through_a_wrapper(setup):
    model = network()
    opt = CAGradClip(Tuned(model[0].parameters()), WEIGHTS, shared_parameters=model[0].parameters())
    _, outer = setup(model, opt)
    outer.add_param_group({"params": model[2].parameters(), "shared": False})
    assert len(opt.param_groups) == len(opt.optimizer.param_groups) == 2
    with pytest.raises(ValueError, match="got a new parameter"):
        outer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    if hasattr(outer, "factor"):  # Accelerate's hides it
        outer.factor = 2.0
        assert opt.optimizer.factor == 2.0
    assert raco_optim.unwrap(outer).factor == opt.optimizer.factor


def test_schedule_free_through_accelerate():
    po = quietly("pytorch_optimizer")
    model = network()
    opt = CAGradClip(po.ScheduleFreeAdamW(model.parameters()), WEIGHTS)
    _, outer = accelerate_setup(model, opt)
    for name in ("eval", "train"):
        getattr(outer, name)()
        assert opt.param_groups[0]["train_mode"] is (name == "train")


def test_nothing_to_unwrap():
    for given in (SGD(network().parameters(), lr=0.1), None, 5):
        with pytest.raises(TypeError, match="`optimizer` must be a MultiObjectiveOptimizer"):
            raco_optim.unwrap(given)


def test_fabric_in_mixed_precision():
    """Fabric wants its own `backward`, for one loss, where its module ran the forward pass.

    It takes one loss only; the remedy is Fabric's precision without its module.
    """

    def losses(outputs):
        return [outputs[:, 0].square().mean(), (outputs[:, 1] - 2).square().mean()]

    fabric = quietly("lightning.fabric").Fabric(
        accelerator="cpu", devices=1, precision="bf16-mixed"
    )
    model, twin = network(), network()
    wrapped, opt = fabric.setup(model, CAGradClip(AdamW(model.parameters(), lr=0.1), WEIGHTS))
    with pytest.raises(RuntimeError, match="fabric.backward") as caught:
        opt.backward(two_losses(wrapped, batch(0)))
    notes = "".join(caught.value.__notes__)
    assert "with fabric.autocast(): outputs = model.module(inputs)" in notes
    assert all(p.grad is None for p in model.parameters())

    with fabric.autocast():  # the remedy
        outputs = wrapped.module(batch(0))
    assert outputs.dtype == torch.bfloat16
    opt.backward(losses(outputs))

    def witness():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = twin(batch(0))
        return losses(outputs)

    J = jacobian(twin, witness)
    expected = clipped_alpha(J, WEIGHTS, 0.4, "hard") @ J
    torch.testing.assert_close(flat_grad(model), expected, rtol=1e-4, atol=1e-6)
    before = bits(model.state_dict())
    opt.step()
    assert bits(model.state_dict()) != before


@pytest.mark.parametrize("through", ["optimizer", "imitation", "function"])
def test_lightning_trainer(tmp_path, through):
    """All three ways to call `backward` are one: settings, skips and micro-batches included."""
    lightning = quietly("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.automatic_optimization = False
            self.refused = 0

        def training_step(self, x, i):
            outer = self.optimizers()
            call = {
                "optimizer": outer.optimizer.backward,
                "imitation": outer.backward,
                "function": lambda *args, **kwargs: raco_optim.backward(outer, *args, **kwargs),
            }[through]
            outer.zero_grad()
            first, second = two_losses(self.net, x)
            if i == 1:
                outer.c = 0.2
            if i == 2:
                second = second * torch.nan
            if i == 3:
                call(two_losses(self.net, x), accumulate=True)
                with pytest.raises(RuntimeError, match="accumulated but not combined"):
                    outer.step()
                self.refused += 1
            call([first, second])
            outer.step()

        def configure_optimizers(self):
            inner = AdamW(self.parameters(), lr=0.05)
            return CAGradClip(inner, WEIGHTS, nonfinite="skip")

        def train_dataloader(self):
            return torch.utils.data.DataLoader([batch(t) for t in range(5)], batch_size=None)

    module = Module()
    silent = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **silent
    )
    trainer.fit(module)
    opt = raco_optim.unwrap(module.optimizers())
    assert type(opt) is CAGradClip
    assert isinstance(opt, MultiObjectiveOptimizer)
    assert (opt.c, opt.report.skipped, module.refused) == (0.2, 1, 1)

    model = network()
    other = CAGradClip(AdamW(model.parameters(), lr=0.05), WEIGHTS)
    for t in (0, 1, 3, 4):
        if t == 1:
            other.c = 0.2
        other.zero_grad()
        if t == 3:
            other.backward(two_losses(model, batch(t)), accumulate=True)
        other.backward(two_losses(model, batch(t)))
        other.step()
    assert bits(module.net.state_dict()) == bits(model.state_dict())
