"""One backward pass for all losses where the layers allow it, and the checks that they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raco_optim.gradients.combine import grad_dtype
from raco_optim.gradients.explain import explain
from raco_optim.gradients.per_example.layers import Part, Sensitivities, norm
from raco_optim.gradients.per_example.watch import ANCHOR, HIDDEN, Watch, find_uses, fits
from raco_optim.objectives import Gradient

_NOT_REACHED = "no parameter is reached"
_UNKNOWN = "a parameter is in no layer that is known and was watched"
_OTHER_SHAPE = "a layer's output is not [N, ..., features]"
_USED_OTHERWISE = "a parameter is used outside its layer, or has a hook"
_INTERACT = "examples interact, or a hook changes gradients"
# A gradient from the layers and one from autograd differ by rounding, by less than this. In every
# step this share of the weights, or one of them from time to time, is compared.
_TOLERANCE, _SHARE = 0.01, 0.02


@dataclass
class _Plan:
    """What the graph of the scalars says."""

    scalars: Tensor
    marks: list[Any]
    nodes: Counter[str]
    covered: list[Tensor] = field(default_factory=list)
    others: list[tuple[Tensor, str]] = field(default_factory=list)
    """Trained parameters that the layers do not cover, and why."""


class LayerGradients:
    """Gradients of several losses from the inputs and output gradients of a model's layers.

    Args:
        model: The model; its first dimension is that of the examples. It gets forward hooks, which
            stay while this object lives.
        parameters: The parameters, in the order of the gradients.

    Example:
        >>> import torch
        >>> from raco_optim.gradients.per_example import LayerGradients
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layers = LayerGradients(layer, [layer.weight])
        >>> z = layer(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])).sum((1, 2))
        >>> layers.gradients(z, [z[0], z.mean()], ["a", "b"])[0]
        [[tensor([[1., 0.]])], [tensor([[0.5000, 1.0000]])]]
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        self._model, self._parameters = model, list(parameters)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._watch = Watch(model, parameters)
        self._known: dict[int, bool] = {}  # graph and layers -> whether the numeric check held
        self._turn, self._credit = 0, 0.0

    def gradients(
        self,
        scalars: Tensor,
        losses: Sequence[Tensor | None],
        names: Sequence[str],
        *,
        keep_graph: bool = True,
    ) -> tuple[list[Gradient] | None, str]:
        r"""Returns one gradient per loss, by one backward pass.

        A parameter is covered if known layers are all that uses it: the graph says so in every
        call. Others have one backward pass for each loss. At first, and whenever the graph or the
        layers change, two more passes compare :math:`\nabla \sum_n v_n z_n` with autograd's, which
        tells whether examples interact. In other calls the sum of one parameter is compared.

        Args:
            scalars: z, ``[N]``, with the graph of the forward pass.
            losses: m losses with the graph of `scalars` behind them; None for an absent one.
            names: Names of the losses.
            keep_graph: Whether the graph is needed after the call.

        Returns:
            m lists, as `raco_optim.per_loss_gradients` does, and, in words, which parameters are
            not covered; or None and the reason, with the graph intact.

        Raises:
            ValueError: A loss does not depend on `scalars`.
            RuntimeError: What a layer does has changed between steps.
        """
        there = [i for i, loss in enumerate(losses) if loss is not None]
        present = [loss for loss in losses if loss is not None]
        plan = self._plan(scalars)
        why = self._refusal(plan, present)
        if not why and not self._holds(plan, " + ".join(names)):
            why = _INTERACT
        if why:
            return None, why
        u = [_sensitivity(names[i], loss, scalars) for i, loss in zip(there, present, strict=True)]
        others = [p for p, _ in plan.others]
        main = _Totals(Sensitivities(torch.stack(u)), plan.covered)
        keep = keep_graph or bool(others)
        self._checked_pass(plan, main, " + ".join(names), keep_graph=keep)
        rows: list[Gradient] = [[None] * len(self._parameters) for _ in losses]
        for j, p in enumerate(self._parameters):
            for i, g in zip(there, main.of.get(id(p), ()), strict=False):
                rows[i][j] = g
        places = {id(p): j for j, p in enumerate(self._parameters)}
        for i, loss in zip(there, present, strict=True) if others else ():
            keep = keep_graph or i != there[-1]
            found = _grad(names[i], loss, others, keep_graph=keep)
            for p, g in zip(others, found, strict=True):
                rows[i][places[id(p)]] = g
        return rows, self._described(plan) if others else ""

    def _plan(self, scalars: Tensor) -> _Plan:
        """Looks which parameters the layers cover.

        The structural check: as many operations of the graph use a parameter as there are marks.
        """
        uses = find_uses(scalars.grad_fn)
        plan = _Plan(scalars, [mark for mark in uses.marks if fits(mark, scalars)], uses.nodes)
        marked, fitting = _count(uses.marks), _count(plan.marks)
        for p in self._parameters:
            key, number = id(p), uses.of[id(p)]
            if not p.requires_grad or number == 0:
                continue
            if fitting[key] == number and not p._backward_hooks:
                plan.covered.append(p)
            elif not marked[key]:
                plan.others.append((p, _UNKNOWN))
            else:
                is_shape = fitting[key] < marked[key] == number
                plan.others.append((p, _OTHER_SHAPE if is_shape else _USED_OTHERWISE))
        covered = {id(p) for p in plan.covered}
        plan.marks = [x for x in plan.marks if covered & _count([x]).keys()]
        return plan

    def _refusal(self, plan: _Plan, losses: Sequence[Tensor]) -> str:
        """Says why there is to be one pass for each loss; "" if there is not."""
        if "CheckpointFunctionBackward" in plan.nodes:
            return "a reentrant checkpoint hides parameters"
        if any(_depends_on_more(loss, plan.scalars) for loss in losses):
            return "a loss depends on more than the scalars"
        # One pass for each loss costs the input gradients and those of covered weights m times; one
        # for all, and m for the others, costs the first m + 1 times. Both are about as dear.
        saved = (len(losses) - 1) * sum(p.numel() for p in plan.covered)
        if plan.others and saved <= sum(p.numel() for p in self._model.parameters()):
            return self._described(plan)
        return "" if plan.covered else _NOT_REACHED

    def _described(self, plan: _Plan) -> str:
        p, why = plan.others[0]
        number, of = len(plan.others), len(plan.others) + len(plan.covered)
        name = self._names.get(id(p), "one of another model")
        return f"{why} ({number} of {of} parameters: {name}{', ...' if number > 1 else ''})"

    def _holds(self, plan: _Plan, name: str) -> bool:
        """The numeric check of all parameters, once for a graph and a set of layers."""
        layers = [(id(x), x.training, _number_of_hooks(x)) for x in self._model.modules()]
        known = hash((*layers, frozenset(plan.nodes.items()), *map(id, plan.covered)))
        if known not in self._known:
            z = plan.scalars
            # Uneven, so that neither examples that change places nor a clamped gradient go unseen.
            v = torch.arange(1.0, len(z) + 1, device=z.device).cos().to(z.dtype)
            found = _Totals(Sensitivities(v[None]), plan.covered, compared=True)
            _run(plan, [found], name)
            errors, norms, rounding = found.compare(_grad(name, z, plan.covered, v))
            # Two passes, parts of which (norms, softmax) may be of float32 whatever the layers are.
            tolerance = max(2 * found.eps**0.5, 2**-11.5)
            if not norms.isfinite().all():
                return False
            fine = (errors <= tolerance * norms + rounding).all()
            self._known[known] = bool(fine & (errors.norm() <= tolerance * norms.norm()))
        return self._known[known]

    def _checked_pass(self, plan: _Plan, main: _Totals, name: str, *, keep_graph: bool) -> None:
        """Runs the pass, and compares autograd's gradient of sum z with ours, if one is due.

        Autograd computes it in the same pass. One parameter is compared after the other, each as
        soon as the shares of the steps since the last one allow it.
        """
        hidden = _count(mark for mark in plan.marks if mark._forward_cls in HIDDEN)
        seen = [p for p in plan.covered if id(p) not in hidden]
        p = seen[self._turn % len(seen)] if seen else None
        self._credit += _SHARE * sum(q.numel() for q in plan.covered)
        if p is None or self._credit < p.numel():
            _run(plan, [main], name, keep_graph=keep_graph)
            return
        self._turn, self._credit = self._turn + 1, 0.0
        ones = torch.ones_like(plan.scalars)
        check = _Totals(Sensitivities(ones[None]), [p], compared=True)
        true = _run(plan, [main, check], name, [p], keep_graph=keep_graph)
        errors, norms, rounding = check.compare(true)
        if bool((errors > _TOLERANCE * norms + 4 * rounding).any()):
            self._known.clear()
            raise RuntimeError(
                f"the layers of {self._names.get(id(p))!r} must do in every step what they did in "
                f"the first; its gradient is no longer that of autograd. Compute the losses anew "
                f"and call `backward` again, which checks all layers."
            )


class _Totals:
    """Gradients of parameters, ``[m, *shape]``, added up layer by layer."""

    def __init__(
        self, s: Sensitivities, parameters: Sequence[Tensor], *, compared: bool = False
    ) -> None:
        self._s, self._compared = s, compared
        self._parameters = {id(p): p for p in parameters}
        self.of: dict[int, Tensor] = {}
        self.eps = 2.0**-23
        self._sizes: dict[int, Tensor] = {}

    def wants(self, p: Tensor) -> bool:
        return id(p) in self._parameters

    def add(self, p: Tensor, part: Part) -> None:
        """Adds a part of the gradients of a parameter."""
        total, fresh = self.of.get(id(p)), id(p) not in self.of
        if total is None:
            shape = len(self._s.u), *p.shape
            total = self.of[id(p)] = torch.empty(shape, dtype=grad_dtype(p), device=p.device)
        part.add_to(total, self._s, fresh=fresh)
        if self._compared:
            size, dtype = part.size()
            self._sizes[id(p)] = self._sizes.get(id(p), 0) + size
            self.eps = max(self.eps, torch.finfo(dtype).eps)

    def compare(self, true: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns norms of errors and of true gradients, and bounds of rounding by cancellation."""
        errors, norms = [], []
        for key, g in zip(self._parameters, true, strict=True):
            found = self.of[key][0]
            g = torch.zeros_like(found) if g is None else g
            errors.append(norm(found - g))
            norms.append(norm(g))
        sizes = torch.stack([self._sizes[key] for key in self._parameters])
        return torch.stack(errors), torch.stack(norms), 8 * self.eps * sizes


class Pass:
    """What marks call while a pass runs."""

    def __init__(self, totals: Sequence[_Totals]) -> None:
        self._totals, self.calls = totals, 0

    def add(self, p: Tensor, part: Callable[[], Part]) -> None:
        """Adds a part of a parameter's gradients where they are wanted."""
        self.calls += 1
        wanted = [total for total in self._totals if total.wants(p)]
        if wanted:
            found = part()
            for total in wanted:
                total.add(p, found)


def _run(
    plan: _Plan,
    totals: Sequence[_Totals],
    name: str,
    inputs: Sequence[Tensor] = (),
    *,
    keep_graph: bool = True,
) -> tuple[Tensor | None, ...]:
    """Goes back from the sum of z to all marks, and returns the gradients of `inputs` alone."""
    running = Pass(totals)
    z = plan.scalars
    try:
        for mark in plan.marks:
            mark.run = running
            if mark._forward_cls in HIDDEN:
                mark._forward_cls = HIDDEN[mark._forward_cls]  # that of this one node
        # Under autocast the products here would be rounded once more.
        with torch.autocast(z.device.type, enabled=False):
            wanted = [ANCHOR, *inputs]
            found = _grad(name, z, wanted, torch.ones_like(z), keep_graph=keep_graph)[1:]
    finally:
        for mark in plan.marks:
            mark.run = None
            vars(mark).pop("_forward_cls", None)
    assert running.calls == sum(len(mark.parameters) for mark in plan.marks), "a mark was left out"
    return found


def _count(marks: Iterable[Any]) -> Counter[int]:
    """Counts the marks of each parameter."""
    return Counter(id(p) for mark in marks for p in mark.parameters.values())


def _number_of_hooks(layer: nn.Module) -> int:
    before, after = layer._forward_pre_hooks, layer._forward_hooks
    return len(before) + len(after) + len(layer._backward_pre_hooks) + len(layer._backward_hooks)


def _sensitivity(name: str, loss: Tensor, scalars: Tensor) -> Tensor:
    (u,) = _grad(name, loss, [scalars])
    if u is None:
        raise ValueError(
            f"loss {name!r} must depend on `scalars`; it does not. Pass the tensor itself that all "
            f"losses are computed from."
        )
    return u


def _grad(
    name: str,
    output: Tensor,
    inputs: Sequence[Tensor],
    weights: Tensor | None = None,
    *,
    keep_graph: bool = True,
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(
            output, inputs, weights, retain_graph=keep_graph, allow_unused=True
        )
    except Exception as error:
        explain(name, error)
        raise


def _depends_on_more(loss: Tensor, scalars: Tensor) -> bool:
    """Whether the loss reaches a leaf by a way that does not lead through the scalars."""
    if loss is scalars:
        return False
    end = (scalars.grad_fn, scalars.output_nr)
    stack, walked = [(loss.grad_fn, loss.output_nr)], set()
    while stack:
        edge = stack.pop()
        node: Any = edge[0]
        if node is None or edge == end or edge in walked:
            continue
        walked.add(edge)
        if hasattr(node, "variable"):
            return True
        stack.extend(node.next_functions)
    return False
