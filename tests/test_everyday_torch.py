"""Habits of everyday torch: each has its effect, or an error or a warning in words."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from raco_optim import (
    MGDA,
    CAGradClip,
    LinearScalarization,
    add_combined_gradient,
    per_loss_gradients,
)
from raco_optim.rules import CAGradRule, LinearRule, MinNormRule


def model_and_losses():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, list(model(torch.ones(3)).square())


def clip():
    return CAGradClip(SGD(model_and_losses()[0].parameters(), lr=0.1), [0.7, 0.3])


class Own(CAGradClip):
    def __init__(self, inner):
        self.before = 1
        super().__init__(inner, [0.7, 0.3])
        self.weight = 2


class Imitation(CAGradClip):  # a class without methods, as Lightning and Fabric derive it
    pass


@pytest.mark.parametrize(
    ("make", "name", "remedy"),
    [
        (clip, "weight", "Did you mean 'weights'?"),
        (clip, "C", "Did you mean 'c'?"),
        (clip, "non_finite", "Did you mean 'nonfinite'?"),
        (clip, "gradient", "Did you mean 'gradients'?"),
        (clip, "lr", "Set it in `param_groups`, as in group['lr']"),
        (lambda: MGDA(clip().optimizer), "c", "It has defaults, nonfinite"),
        (lambda: LinearScalarization(clip().optimizer, [1.0]), "solver", "It has defaults"),
        (lambda: Imitation(clip().optimizer, [1.0]), "weight", "Did you mean 'weights'?"),
        (MinNormRule, "c", "It has no settings"),
        (LinearRule, "weights", "It has no settings"),
        (lambda: CAGradRule(0.4), "weights", "It has c, clip, solver."),
    ],
)
def test_an_attribute_without_effect_is_refused(make, name, remedy):
    obj = make()
    with pytest.raises(AttributeError) as caught:
        setattr(obj, name, 0.3)
    assert f"object has no attribute {name!r}, so setting it would have no effect" in str(
        caught.value
    )
    assert remedy in str(caught.value)
    assert name not in vars(obj)


@pytest.mark.parametrize("make", [clip, lambda: CAGradRule(0.4)])
def test_a_note_is_kept(make):
    obj = make()
    obj.note = "of a user or a framework"
    assert obj.note == "of a user or a framework"


def test_the_radius_of_a_rule_that_has_none():
    opt = clip()
    opt.rule = MinNormRule()
    with pytest.raises(AttributeError, match="'MinNormRule' object has no attribute 'c'"):
        opt.c = 0.3


def test_the_users_own_class_has_attributes_of_its_own():
    opt = Own(clip().optimizer)
    assert (opt.before, opt.weight, opt.weights) == (1, 2, (0.7, 0.3))


def test_the_inner_optimizer_is_not_replaced():
    opt = clip()
    with pytest.raises(AttributeError, match="`optimizer` can't be changed after"):
        opt.optimizer = SGD([nn.Parameter(torch.ones(2))], lr=1.0)


@pytest.mark.parametrize("given", [[torch.ones(())], torch.ones(()), {"a": 1}], ids=["l", "t", "d"])
def test_losses_given_to_step(given):
    with pytest.raises(TypeError, match=r"`closure` must be a function.*call `backward\(losses\)`"):
        clip().step(given)


def test_gradients_of_another_backward_pass():
    model, losses = model_and_losses()
    opt = CAGradClip(SGD(model.parameters(), lr=0.1), [0.7, 0.3])
    opt.step()  # nothing to use
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # as torch.distributed.checkpoint does
    opt.step()
    sum(losses).backward()
    with pytest.warns(UserWarning, match=r"the rule of this optimizer have no effect"):
        opt.step()
    opt.zero_grad()
    opt.backward(list(model(torch.ones(3)).square()))
    sum(model(torch.ones(3))).backward()  # such as a penalty, in addition
    opt.step()


def test_ghost_in_inference_mode():
    model, losses = model_and_losses()
    expected = [torch.autograd.grad(x, model.weight, retain_graph=True)[0] for x in losses]
    opt = CAGradClip(SGD(model.parameters(), lr=0.1), [0.7, 0.3], c=0.0, gradients="ghost")
    with torch.inference_mode():
        opt.backward(losses)
    torch.testing.assert_close(model.weight.grad, 0.7 * expected[0] + 0.3 * expected[1])


def test_arguments_of_the_functions():
    model, losses = model_and_losses()
    for bad in (model, None, ["weight"], model.named_parameters()):
        with pytest.raises(TypeError, match="`parameters` must be tensors; got"):
            per_loss_gradients(losses, bad)
    parameters = list(model.parameters())
    rows = per_loss_gradients({"a": losses[0], "b": losses[1]}, parameters)
    alpha = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="`gradients` must have one tensor"):
        add_combined_gradient(parameters[:1], rows, alpha)
    with pytest.raises(ValueError, match="`gradients` must agree in shape"):
        add_combined_gradient(parameters[::-1], rows, alpha)
    for bad in ([0.5, 0.5], alpha[:1], torch.ones(3)):
        with pytest.raises(ValueError, match="`coefficients` must be a tensor of shape"):
            add_combined_gradient(parameters, rows, bad)
    with pytest.raises(ValueError, match="`gradients` must hold at least one gradient; got none"):
        add_combined_gradient(parameters, [], torch.ones(0))
    assert all(p.grad is None for p in parameters)
    expected = [sum(0.5 * row[j] for row in rows) for j in range(2)]
    add_combined_gradient(iter(parameters), [tuple(row) for row in rows], alpha)
    torch.testing.assert_close([p.grad for p in parameters], expected)


@pytest.mark.parametrize("group", [[nn.Parameter(torch.ones(2))], {"lr": 1.0}], ids=["list", "no"])
def test_a_bad_parameter_group_is_refused_as_by_torch(group):
    with pytest.raises((TypeError, KeyError)) as torchs:
        SGD([nn.Parameter(torch.ones(2))], lr=1.0).add_param_group(group)
    with pytest.raises(type(torchs.value)) as caught:
        clip().add_param_group(group)
    assert str(caught.value) == str(torchs.value)
