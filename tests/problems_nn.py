"""Small networks with losses in conflict, inner optimizers, and witnesses for a whole step."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Optimizer, RMSprop

from raco_optim import CAGradClip, MultiObjectiveOptimizer
from tests.oracles import exact_minimum

NAMES = ("quality", "length")

INNER: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "Nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda p: AdamW(p, lr=0.02, weight_decay=0.1),
    "Adafactor": lambda p: Adafactor(p, lr=0.05),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "LBFGS": lambda p: LBFGS(p, lr=0.2, max_iter=3, history_size=4),
}


def inverse_norms(gram: Tensor) -> Tensor:
    """A rule that needs no solver; at module level, so that it can be pickled."""
    return gram.diagonal().rsqrt()


WRAPPERS: dict[str, Callable[[Optimizer], MultiObjectiveOptimizer]] = {
    "CAGradClip": lambda inner: CAGradClip(inner, [0.6, 0.4], c=0.4),
    "named": lambda inner: CAGradClip(inner, dict(zip(NAMES, [0.6, 0.4], strict=True)), c=0.7),
    "rule": lambda inner: MultiObjectiveOptimizer(inner, inverse_norms),
}


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def batch(seed: int, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def two_losses(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Means over the batch that pull the first output in opposite directions."""
    out = model(x)
    first = ((out[:, 0] - 1) ** 2).mean()
    second = ((out[:, 0] + 2) ** 2).mean() + (out[:, 1] - x[:, 0]).pow(2).mean()
    return [first, second]


def three_losses(model: nn.Module, x: Tensor) -> list[Tensor]:
    """A third one that is at odds with the second about the other output."""
    return [*two_losses(model, x), ((model(x)[:, 1] - 2) ** 2).mean()]


def as_asked(opt: MultiObjectiveOptimizer, losses: Sequence) -> Sequence | Mapping:
    """The losses in the form that the optimizer's weights ask for."""
    return dict(zip(opt.weights, losses, strict=True)) if isinstance(opt.weights, dict) else losses


def train_step(opt: MultiObjectiveOptimizer, model: nn.Module, x: Tensor) -> None:
    """One step as a user writes it: with a closure for LBFGS, in three lines otherwise."""
    if isinstance(opt.optimizer, LBFGS):

        def closure() -> Sequence | Mapping:
            opt.zero_grad()
            return as_asked(opt, two_losses(model, x))

        opt.step(closure)
    else:
        opt.zero_grad()
        opt.backward(as_asked(opt, two_losses(model, x)))
        opt.step()


def bits(value: object) -> object:
    """Any nest of containers and tensors as plain data that is equal if all bits are."""
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        content = None if value.is_meta else flat.numpy().tobytes()
        return (value.dtype, value.device, tuple(value.shape), content)
    if isinstance(value, Mapping):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [bits(entry) for entry in value]
    return value


def everything(model: nn.Module, opt: Optimizer) -> object:
    """All that a failed call must leave alone and that a resumed run must share."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    return bits([model.state_dict(), grads, opt.state_dict()])


def through_a_file(state: object) -> Any:
    """Saved and loaded as a checkpoint is."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def said(error: BaseException) -> str:
    """The message of an exception, and its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def jacobian(model: nn.Module, losses: Callable[[], Sequence[Tensor]]) -> Tensor:
    """Per-loss gradients as rows, ``[m, n]`` float64: one plain backward per forward pass."""
    grads = [p.grad for p in model.parameters()]
    rows = []
    for i in range(len(losses())):
        model.zero_grad()
        losses()[i].backward()
        rows.append(flat_grad(model))
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    return torch.stack(rows)


def flat_grad(model: nn.Module) -> Tensor:
    """``.grad`` of all parameters as one float64 vector, zeros where it is None."""
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).double().reshape(-1)
            for p in model.parameters()
        ]
    )


def clipped_alpha(
    jacobian: Tensor,
    weights: Sequence[float],
    c: float,
    clip: str,
    present: Sequence[bool] | None = None,
) -> Tensor:
    """alpha of Algorithm 1 from the Jacobian, with p from the 60-digit oracle.

    Of the losses that are there: W alpha(H, w / W), W the sum of their weights (spec, section 2).
    """
    if present is not None and not all(present):
        here = [i for i, x in enumerate(present) if x]
        total = sum(weights[i] for i in here)
        alpha = torch.zeros(len(weights), dtype=torch.float64)
        if total > 0:
            shares = [weights[i] / total for i in here]
            alpha[here] = total * clipped_alpha(jacobian[here], shares, c, clip)
        return alpha
    J, w = jacobian.double().numpy(), np.asarray(weights, float)
    p = exact_minimum(J @ J.T, w, c).p
    p = np.where(p > 1e-15, p, 0)  # 60 digits rounded: 1e-31 is zero, and clipping must see that
    both = np.where(p + w > 0, p + w, 1)
    p_clipped = {"hard": np.minimum(p, w), "soft": p * w / both, "none": p}[clip]
    length, size = np.linalg.norm(p_clipped @ J), p_clipped @ np.linalg.norm(J, axis=1)
    scale = c * np.linalg.norm(w @ J) / length if length > 1e-12 * size else 0.0
    return torch.from_numpy(w + scale * p_clipped)


class Buffered(torch.autograd.Function):
    """Returns the user's own tensor as the gradient."""

    @staticmethod
    def forward(ctx, x, buffer):
        ctx.save_for_backward(buffer)
        return (x * buffer).sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0], None


class OwnBackward(torch.autograd.Function):
    """The identity; its backward pass gives ``change(gradient)``, or raises."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def breaks(x):
    def no_way_back(_):
        raise RuntimeError("no way back")

    return OwnBackward.apply(x, no_way_back)


def infinite(x):
    """An infinite gradient."""
    return OwnBackward.apply(x, lambda grad: grad * math.inf)
