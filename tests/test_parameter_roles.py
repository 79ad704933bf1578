"""Which parameters are trained and shared belongs to tensors and groups, not to positions.

The witness is Algorithm 1 by hand: per-loss gradients of the tensors that must be shared by plain
backward passes, and p from the 60-digit oracle.
"""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from raco_optim import CAGradClip
from tests.problems_nn import clipped_alpha

DOUBLE = torch.float64
WEIGHTS = [0.7, 0.3]
C = 0.4


class Net(nn.Module):
    """A trunk of two layers and a head per loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8, dtype=DOUBLE)
        self.b = nn.Linear(8, 8, dtype=DOUBLE)
        self.h = nn.Linear(8, 2, dtype=DOUBLE)
        self.x, self.y = torch.randn(64, 8, dtype=DOUBLE), torch.randn(64, 2, dtype=DOUBLE)
        self.y[:, 1] = 0.3 * self.y[:, 1] - self.y[:, 0]

    def losses(self):
        out = self.h(self.b(self.a(self.x).tanh()).tanh())
        return list((out - self.y).square().mean(0))


def of(*modules):
    return [p for module in modules for p in module.parameters()]


def rows(model, parameters):
    """Per-loss gradients, ``[2, n]``, by ordinary backward passes; ``.grad`` stays as it is."""
    found = [
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        for loss in model.losses()
    ]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in found])


def flat(parameters):
    return torch.cat([p.grad.reshape(-1) for p in parameters])


def check(opt, model, *, shared, heads, gram_from=None):
    """One step: `shared` get the corrected gradient, `heads` the weighted one, others none."""
    model.zero_grad()
    opt.backward(model.losses())
    check_gradients(model, shared, heads, gram_from)


def check_gradients(model, shared, heads, gram_from=None):
    w = torch.tensor(WEIGHTS, dtype=DOUBLE)
    if shared:
        J = rows(model, shared)
        H_from = J if gram_from is None else rows(model, gram_from)
        alpha = clipped_alpha(H_from, WEIGHTS, C, "hard")
        assert (alpha - w).abs().max() > 0.05, "else nothing would tell shared from not"
        torch.testing.assert_close(flat(shared), alpha @ J, rtol=1e-8, atol=1e-10)
    if heads:
        torch.testing.assert_close(flat(heads), w @ rows(model, heads), rtol=1e-8, atol=1e-10)
    reached = {id(p) for p in [*shared, *heads]}
    assert all(p.grad is None for p in model.parameters() if id(p) not in reached)


def wrapped(groups, shared=None, **options):
    return CAGradClip(SGD(groups, lr=0.0), WEIGHTS, C, shared_parameters=shared, **options)


def per_module(*modules, **keys):
    return [{"params": list(module.parameters()), **keys} for module in modules]


def three_groups(**options):
    """A model, and an optimizer with a group for each layer, whose trunk is listed as shared."""
    model = Net()
    groups = per_module(model.a, model.b, model.h)
    return model, wrapped(groups, of(model.a, model.b), **options)


def whole_trunk(opt, model):
    """One step in which all of the trunk is shared."""
    check(opt, model, shared=of(model.a, model.b), heads=of(model.h))


def replace(model, name, opt):
    """Puts a new tensor in the place of another one, in the module and in its group."""
    module, attribute = model.get_submodule(name.split(".")[0]), name.split(".")[1]
    old = getattr(module, attribute)
    new = nn.Parameter(old.detach().clone())
    setattr(module, attribute, new)
    for group in opt.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    return weakref.ref(old)


UNHELD = pytest.mark.filterwarnings("ignore:the losses depend on")


@UNHELD
@pytest.mark.parametrize("with_subset", [False, True])
def test_roles_through_every_change(with_subset):
    """Those of `gradients=<parameters>`, too: H is that of the same tensors, wherever they are."""
    model = Net()
    groups, listed = per_module(model.a, model.b, model.h), of(model.a, model.b)
    subset = {"gradients": [model.b.weight, model.h.bias]} if with_subset else {}
    opt = wrapped(groups, listed, **subset)

    def checked(trunk="ab", head=("weight", "bias")):
        shared = of(*(model.get_submodule(name) for name in trunk))
        heads = [getattr(model.h, name) for name in head]
        subset = [model.b.weight, *([model.h.bias] if "bias" in head else [])]
        check(opt, model, shared=shared, heads=heads, gram_from=subset if with_subset else None)

    checked()
    model.a.requires_grad_(False)
    checked("b")
    del opt.param_groups[0]
    checked("b")
    opt.param_groups.reverse()
    checked("b")
    opt.add_param_group({"params": model.a.requires_grad_(True).parameters()})
    checked()
    for group in opt.param_groups:
        group["params"] = group["params"][::-1]
    checked()
    for name in ("b.weight", "a.weight"):
        replace(model, name, opt)
        checked()
    opt.load_state_dict(opt.state_dict())
    checked()
    model.h.bias.requires_grad_(False)
    checked(head=["weight"])
    model.h.bias.requires_grad_(True)
    model, opt = copy.deepcopy((model, opt))
    checked()
    model, opt = pickle.loads(pickle.dumps((model, opt)))
    checked()
    (k,) = (k for k, g in enumerate(opt.param_groups) if g["params"][-1] is model.h.weight)
    gone = opt.param_groups.pop(k)
    if not with_subset:
        checked(head=())
    opt.add_param_group({"params": gone["params"]})
    checked()


@pytest.mark.parametrize("come_back", [False, True])
def test_groups_that_leave_before_the_first_step(come_back):
    model, opt = three_groups()
    gone, gone_head = opt.param_groups[::2]
    model.a.requires_grad_(come_back)
    del opt.param_groups[0]
    if come_back:
        del opt.param_groups[1]
        opt.add_param_group({"params": gone_head["params"]})
        opt.add_param_group({"params": gone["params"]})
    check(opt, model, shared=of(model.a, model.b) if come_back else of(model.b), heads=of(model.h))
    assert opt.report.cosines is not None


def test_tensors_that_change_places_between_groups():
    """Each of the same shape as the one whose place it takes."""
    model = Net()
    model.h = nn.Linear(8, 8, dtype=DOUBLE)
    model.y = torch.cat([model.y, torch.zeros(64, 6, dtype=DOUBLE)], dim=1)
    losses = model.losses
    model.losses = lambda: losses()[:2]
    opt = wrapped(per_module(model.a, model.b, model.h), of(model.a, model.b))
    whole_trunk(opt, model)
    _, first, second = opt.param_groups
    first["params"], second["params"] = second["params"], first["params"]
    whole_trunk(opt, model)


@UNHELD
def test_a_list_of_the_groups_parameters_is_assigned():
    model = Net()
    opt = wrapped([{"params": of(model)}], of(model.a, model.b))
    opt.param_groups[0]["params"] = [model.h.weight, model.h.bias, model.b.weight]
    check(opt, model, shared=[model.b.weight], heads=of(model.h))


def test_groups_assigned_as_a_whole():
    """As Lightning's fine-tuning callback does on resumption: new dicts, the same tensors."""
    model = Net()
    opt = wrapped(per_module(model.b, model.h), of(model.b, model.a.requires_grad_(False)))
    model.a.requires_grad_(True)
    rest = {key: x for key, x in opt.param_groups[0].items() if key != "params"}
    opt.param_groups = [{**rest, "params": of(module)} for module in (model.h, model.a, model.b)]
    whole_trunk(opt, model)


def late(key=None, params=list, shared="listed"):
    """A layer that is frozen at first and joins in a new group."""
    model = Net()
    model.a.requires_grad_(False)
    listed = of(model.a, model.b) if shared == "listed" else of(model.b)
    opt = wrapped(of(model.b, model.h), listed)
    check(opt, model, shared=of(model.b), heads=of(model.h))
    model.a.requires_grad_(True)
    group = {"params": params(model.a.parameters())}
    if key is not None:
        group["shared"] = key
    opt.add_param_group(group)
    return model, opt


@pytest.mark.parametrize("params", [list, iter, tuple], ids=["list", "generator", "tuple"])
def test_frozen_ones_that_were_listed_join_later(params):
    model, opt = late(params=params)
    whole_trunk(opt, model)


@pytest.mark.parametrize("key", [True, False])
def test_a_new_group_says_whether_it_is_shared(key):
    model, opt = late(key, shared="not listed")
    if key:
        whole_trunk(opt, model)
    else:
        check(opt, model, shared=of(model.b), heads=of(model.a, model.h))


def test_where_nothing_says_it_is_an_error_and_nothing_changes():
    model = Net()
    model.a.requires_grad_(False)
    opt = wrapped(of(model.b, model.h), of(model.b))
    model.a.requires_grad_(True)
    for params in (model.a.parameters(), of(model.a), model.a.weight):
        with pytest.raises(ValueError, match=r'"shared": True.*False, for a head'):
            opt.add_param_group({"params": params})
        assert len(opt.param_groups) == 1
    opt.optimizer.add_param_group({"params": of(model.a)})  # behind the wrapper's back
    with pytest.raises(ValueError, match="got a new parameter"):
        opt.backward(model.losses())
    assert all(p.grad is None for p in model.parameters())
    opt.param_groups[1]["shared"] = True  # the remedy
    whole_trunk(opt, model)


def test_a_single_tensor_and_named_parameters():
    model = Net()
    model.a.requires_grad_(False)
    opt = wrapped([("b." + n, p) for n, p in model.b.named_parameters()], model.b.parameters())
    opt.add_param_group({"params": list(model.h.named_parameters(prefix="h")), "shared": False})
    check(opt, model, shared=of(model.b), heads=of(model.h))
    model.a.requires_grad_(True)
    opt.add_param_group({"params": model.a.named_parameters(prefix="a"), "shared": True})
    whole_trunk(opt, model)
    assert opt.param_groups[2]["param_names"] == ["a.weight", "a.bias"]

    model = Net()
    opt = wrapped(of(model.b, model.h), of(model.b, model.a.requires_grad_(False)))
    opt.add_param_group({"params": model.a.weight.requires_grad_(True)})
    check(opt, model, shared=[model.a.weight, *of(model.b)], heads=of(model.h))


def test_what_torch_refuses_is_refused_as_by_torch():
    model = Net()
    plain, opt = SGD(of(model.b), lr=0.1), wrapped(of(model.b), of(model.b))
    for group in ({"params": set(of(model.a)), "shared": True}, {"params": of(model.b)}, []):
        with pytest.raises(Exception) as expected:
            plain.add_param_group(copy.copy(group))
        with pytest.raises(expected.type):
            opt.add_param_group(copy.copy(group))
        assert len(opt.param_groups) == 1


def test_the_group_that_was_passed_is_the_group():
    """As in torch: who keeps the dict may change it."""
    model = Net()
    opt = wrapped(of(model.b), of(model.b))
    group = {"params": model.h.parameters(), "shared": False}
    opt.add_param_group(group)
    group["lr"] = 0.25
    assert opt.param_groups[1]["lr"] == 0.25


def test_all_frozen_at_first():
    """A backbone that is frozen as a whole: only heads are trained, with the weighted gradient."""
    model = Net()
    trunk = nn.ModuleList([model.a, model.b]).requires_grad_(False)
    opt = wrapped(of(model.h), trunk.parameters())
    check(opt, model, shared=[], heads=of(model.h))
    trunk.requires_grad_(True)
    opt.add_param_group({"params": trunk.parameters()})
    check(opt, model, shared=of(trunk), heads=of(model.h))


def test_the_key_is_set_later_and_taken_away():
    model = Net()
    opt = wrapped([*per_module(model.a, model.b), *per_module(model.h, shared=False)])
    whole_trunk(opt, model)
    opt = wrapped(per_module(model.a, model.b, model.h))
    check(opt, model, shared=of(model), heads=[])
    opt.param_groups[2]["shared"] = False
    whole_trunk(opt, model)
    del opt.param_groups[2]["shared"]  # a parameter keeps the role that it was given
    whole_trunk(opt, model)
    opt.param_groups[2]["shared"] = True
    check(opt, model, shared=of(model), heads=[])


def test_a_parameter_moves_into_a_group_with_another_key():
    """The order of all parameters and the keys of all groups stay as they are."""
    model = Net()
    trunk = {"params": of(model.a, model.b), "shared": True}
    opt = wrapped([trunk, *per_module(model.h, shared=False)])
    whole_trunk(opt, model)
    first, second = opt.param_groups
    second["params"] = [*first["params"][2:], *second["params"]]
    first["params"] = first["params"][:2]
    check(opt, model, shared=of(model.a), heads=of(model.b, model.h))


@pytest.mark.parametrize("key", ["yes", 1, [True]])
def test_the_key_must_be_true_or_false(key):
    model = Net()
    with pytest.raises(ValueError, match='the key "shared".*must be True or False; got'):
        wrapped(per_module(model.a, shared=key))
    opt = wrapped(per_module(model.a, model.b))
    with pytest.raises(ValueError, match='the key "shared".*must be True or False; got'):
        opt.add_param_group({"params": model.h.parameters(), "shared": key})
    assert len(opt.param_groups) == 2
    opt.param_groups[0]["shared"] = key
    with pytest.raises(ValueError, match='the key "shared".*must be True or False; got'):
        opt.backward(model.losses())


def test_key_and_list_must_agree():
    model = Net()
    with pytest.raises(ValueError, match="`shared_parameters` must agree with the key"):
        wrapped([*per_module(model.a, shared=False), *per_module(model.h)], [model.a.weight])
    opt = wrapped([*per_module(model.a, model.b), *per_module(model.h, shared=True)], of(model.a))
    check(opt, model, shared=of(model.a, model.h), heads=of(model.b))  # the key adds


@pytest.mark.parametrize("one_group", [True, False])
def test_replaced_tensors_take_over_the_role(one_group):
    model = Net()
    groups = of(model) if one_group else per_module(model.a, model.b, model.h)
    opt = wrapped(groups, of(model.a, model.b))
    for name in ("a.weight", "h.bias", "b.weight", "h.weight", "a.weight"):
        replace(model, name, opt)
        whole_trunk(opt, model)


def test_old_tensors_are_freed_and_their_ids_mean_nothing():
    model, opt = three_groups()
    gone = []
    for _ in range(5):
        gone.append(replace(model, "a.weight", opt))
        whole_trunk(opt, model)
    last = [weakref.ref(p) for p in opt.param_groups[0]["params"]]
    del opt.param_groups[0]
    model.a = nn.Identity()
    check(opt, model, shared=of(model.b), heads=of(model.h))
    gc.collect()
    assert all(ref() is None for ref in [*gone, *last])
    # New parameters, at whatever addresses, are unknown.
    for _ in range(20):
        layer = nn.Linear(8, 8, dtype=DOUBLE)
        with pytest.raises(ValueError, match="got a new parameter"):
            opt.add_param_group({"params": layer.parameters()})


def test_a_new_tensor_beside_the_old_one_is_no_replacement():
    """A new tensor takes the place of one that is still in the group."""
    model = Net()
    trunk = {"params": [model.a.weight, model.b.weight]}
    opt = wrapped([trunk, *per_module(model.h)], [model.a.weight])
    new = nn.Parameter(torch.zeros(8, 8, dtype=DOUBLE))
    opt.param_groups[0]["params"] = [new, model.a.weight]
    with pytest.raises(ValueError, match=r"shape \[8, 8\]. Add .shared."):
        opt.backward(model.losses())


@pytest.mark.parametrize(("size", "bias"), [(3, True), (2, False)])
def test_another_shape_or_number_of_tensors_is_no_replacement(size, bias):
    """An embedding that was resized, say: nothing tells it from another parameter."""
    model, opt = three_groups()
    model.h = nn.Linear(8, size, bias=bias, dtype=DOUBLE)
    model.y = torch.randn(64, size, dtype=DOUBLE)
    model.y[:, 1] = 0.3 * model.y[:, 1] - model.y[:, 0]
    losses = model.losses
    model.losses = lambda: losses()[:2]
    opt.param_groups[2]["params"] = of(model.h)
    with pytest.raises(ValueError, match=rf"shape \[{size}, 8\]. Add .shared."):
        opt.backward(model.losses())
    opt.param_groups[2]["shared"] = False
    whole_trunk(opt, model)


@pytest.mark.parametrize("swap", [True, False])
def test_modules_are_moved_and_cast_as_with_a_stock_optimizer(swap):
    """`swap_tensors`, which torch uses for sharded tensors, refuses weak references."""
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model = Net()
        opt = wrapped(per_module(model.a, model.b, model.h), of(model.a, model.b))
        whole_trunk(opt, model)
        opt.zero_grad()
        model.float()
        model.double()
        whole_trunk(opt, model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_loaded_checkpoint():
    """Torch makes new group dicts when it loads."""
    model, opt = three_groups()
    state = copy.deepcopy(opt.state_dict())
    model.a.requires_grad_(False)
    opt.param_groups.pop(0)
    with pytest.raises(ValueError):
        opt.load_state_dict(state)
    check(opt, model, shared=of(model.b), heads=of(model.h))
    opt.add_param_group({"params": of(model.a.requires_grad_(True))})
    opt.load_state_dict(state)
    whole_trunk(opt, model)


def test_a_checkpoint_keeps_the_key_of_a_group():
    model, opt = late(True, shared="not listed")
    state = copy.deepcopy(opt.state_dict())
    resumed = Net()
    again = wrapped(of(resumed.b, resumed.h), of(resumed.b))
    again.add_param_group({"params": resumed.a.parameters(), "shared": False})
    again.load_state_dict(state)
    check(again, resumed, shared=of(resumed.a, resumed.b), heads=of(resumed.h))
    assert model is not resumed


def test_replaced_before_loading_is_an_error():
    """New tensors in new groups: nothing says what they are, and no position is asked."""
    model, opt = three_groups()
    state = opt.state_dict()
    replace(model, "a.weight", opt)
    opt.load_state_dict(state)
    with pytest.raises(ValueError, match="got a new parameter"):
        opt.backward(model.losses())


def test_replaced_right_after_loading():
    model, opt = three_groups()
    opt.load_state_dict(opt.state_dict())  # makes new groups
    for name, _ in list(model.named_parameters()):
        replace(model, name, opt)
    whole_trunk(opt, model)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_know_frozen_removed_and_late_parameters(how):
    model = Net()
    opt = wrapped(
        [*per_module(model.b), *per_module(model.h)], of(model.a.requires_grad_(False), model.b)
    )
    removed = opt.param_groups.pop(0)["params"]
    assert removed[0] is model.b.weight
    twin, copied = (
        copy.deepcopy((model, opt))
        if how == "deepcopy"
        else pickle.loads(pickle.dumps((model, opt)))
    )
    twin.a.requires_grad_(True)
    copied.add_param_group({"params": of(twin.b)})
    copied.add_param_group({"params": of(twin.a)})
    check(copied, twin, shared=of(twin.a, twin.b), heads=of(twin.h))
    replace(twin, "b.weight", copied)
    check(copied, twin, shared=of(twin.a, twin.b), heads=of(twin.h))
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="got a new parameter"):
        copied.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=DOUBLE))]})


def test_subset_that_is_gone():
    model = Net()
    groups = per_module(model.a, model.b, model.h)
    opt = wrapped(groups, of(model.a, model.b), gradients=of(model.a))
    model.a.requires_grad_(False)
    for _ in range(2):
        with pytest.raises(ValueError, match="`gradients`"):
            opt.backward(model.losses())
        del opt.param_groups[0]


def test_a_group_that_changes_between_micro_batches():
    model, opt = three_groups()
    opt.backward(model.losses(), accumulate=True)
    replace(model, "a.weight", opt)
    with pytest.raises(RuntimeError, match="parameters must not be frozen, removed or replaced"):
        opt.backward(model.losses())
    opt.zero_grad()
    whole_trunk(opt, model)


@pytest.mark.parametrize("change", ["role", "order"])
def test_roles_and_order_may_change_between_micro_batches(change):
    """The gradients are kept per loss and tensor; roles count when they are combined."""
    model = Net()
    listed = of(model.a, model.b) if change == "order" else None
    opt = wrapped(per_module(model.a, model.b, model.h), listed)
    opt.backward([0.5 * loss for loss in model.losses()], accumulate=True)
    if change == "role":
        opt.param_groups[2]["shared"] = False
    else:
        opt.param_groups.reverse()
    opt.backward([0.5 * loss for loss in model.losses()])
    check_gradients(model, shared=of(model.a, model.b), heads=of(model.h))


@pytest.fixture
def trainer_of():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning about itself
        lightning = pytest.importorskip("lightning.pytorch")

    def make(tmp_path, callbacks, **options):
        return lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=callbacks,
            limit_train_batches=1,
            **options,
        )

    return make


def lightning_module(inner=AdamW, shared="backbone"):
    import lightning.pytorch as lightning

    class Module(lightning.LightningModule):
        """A backbone that is frozen at first, in Lightning's manual optimization."""

        def __init__(self):
            super().__init__()
            self.net = Net()
            self.backbone = nn.ModuleList([self.net.a, self.net.b])
            self.automatic_optimization = False
            self.seen = []

        def on_train_start(self):
            # On resumption Lightning restores the groups, and leaves what is in them frozen.
            if len(self.optimizers().param_groups) > 1:
                self.backbone.requires_grad_(True)

        def training_step(self, batch, i):
            opt = self.optimizers()
            opt.zero_grad()
            opt.optimizer.backward(self.net.losses())
            trained = [p.requires_grad for p in self.backbone.parameters()]
            grads = [None if p.grad is None else p.grad.clone() for p in self.net.parameters()]
            J = rows(self.net, of(self.backbone)) if all(trained) else None
            heads = rows(self.net, of(self.net.h))
            self.seen.append((self.current_epoch, grads, J, heads))
            opt.step()

        def configure_optimizers(self):
            given = self.backbone.parameters() if shared == "backbone" else None
            if shared == "not listed":
                given = [self.net.h.weight]
            trained = [p for p in self.parameters() if p.requires_grad]
            return CAGradClip(inner(trained, lr=0.01), WEIGHTS, C, shared_parameters=given)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(4), batch_size=4)

    return Module()


def checked_epochs(module, frozen_until):
    """Every epoch gave the backbone the corrected gradient, and the head the weighted one."""
    w = torch.tensor(WEIGHTS, dtype=DOUBLE)
    for epoch, grads, J, heads in module.seen:
        assert (J is None) == (epoch < frozen_until)
        torch.testing.assert_close(torch.cat([g.reshape(-1) for g in grads[4:]]), w @ heads)
        if J is not None:
            alpha = clipped_alpha(J, WEIGHTS, C, "hard")
            assert (alpha - w).abs().max() > 0.05
            torch.testing.assert_close(torch.cat([g.reshape(-1) for g in grads[:4]]), alpha @ J)


def backbone_callback():
    from lightning.pytorch.callbacks import BackboneFinetuning

    return BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False, backbone_initial_lr=1e-3)


def base_callback(key=None):
    from lightning.pytorch.callbacks import BaseFinetuning

    class Callback(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.backbone)

        def finetune_function(self, module, epoch, optimizer):
            if epoch != 2:
                return
            if key is None:
                self.unfreeze_and_add_param_group(module.backbone, optimizer)
            else:
                self.make_trainable(module.backbone)
                optimizer.add_param_group(
                    {"params": list(module.backbone.parameters()), "shared": key}
                )

    return Callback()


pytest_lightning = pytest.mark.filterwarnings("ignore::Warning:lightning")


def fitted(trainer_of, tmp_path, callback, epochs, **given):
    module = lightning_module()
    options = {"max_epochs": epochs, "enable_checkpointing": False}
    trainer = trainer_of(tmp_path, [callback], **options)
    trainer.fit(module, **given)
    checked_epochs(module, 2)
    return module, trainer


@pytest_lightning
@pytest.mark.parametrize("callback", [backbone_callback, base_callback])
def test_lightning_unfreezes_the_backbone_and_resumes(trainer_of, tmp_path, callback):
    whole, _ = fitted(trainer_of, tmp_path, callback(), 5)
    assert [epoch for epoch, *_ in whole.seen] == [0, 1, 2, 3, 4]
    file = tmp_path / "middle.ckpt"
    for epochs in (1, 2, 3):  # frozen, about to unfreeze, unfrozen
        _, trainer = fitted(trainer_of, tmp_path, callback(), epochs)
        trainer.save_checkpoint(file)
        given = {"ckpt_path": file, "weights_only": False}
        resumed, _ = fitted(trainer_of, tmp_path, callback(), 5, **given)
        assert [epoch for epoch, *_ in resumed.seen] == list(range(epochs, 5))
        for p, q in zip(whole.net.parameters(), resumed.net.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest_lightning
@pytest.mark.parametrize("callback", [backbone_callback, base_callback])
def test_lightning_where_nothing_says_it(trainer_of, tmp_path, callback):
    module = lightning_module(shared="not listed")
    with pytest.raises(ValueError, match=r'Add "shared": True'):
        trainer_of(tmp_path, [callback()], max_epochs=4, enable_checkpointing=False).fit(module)


@pytest_lightning
def test_lightning_with_the_key(trainer_of, tmp_path):
    fitted(trainer_of, tmp_path, base_callback(key=True), 4)
