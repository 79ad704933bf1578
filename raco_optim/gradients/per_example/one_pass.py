"""One backward pass for all losses where the layers allow it, and the checks that they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from raco_optim.gradients.combine import grad_dtype
from raco_optim.gradients.dense import iterate_gradients
from raco_optim.gradients.explain import explain
from raco_optim.gradients.per_example.layers import Part, Sensitivities, norm
from raco_optim.gradients.per_example.watch import ANCHOR, HIDDEN, Uses, find_uses, fits, watch
from raco_optim.objectives import Gradient

_NOT_REACHED = "no parameter is reached"
_UNKNOWN = "a parameter is in no layer that is known and was watched"
_OTHER_SHAPE = "a layer's output is not [N, ..., features]"
_USED_OTHERWISE = "a parameter is used outside its layer, or has a hook"
_INTERACT = "examples interact, or a hook changes gradients"
_NEW_GRAPH = "the graph is a new one, as in many calls before, and is checked when it comes again"
_SCALARS = (
    "`scalars`; it does not. Pass the tensor itself that all losses are computed from, or None for "
    "a loss that is absent from this batch."
)
# A gradient from the layers and one from autograd differ by rounding, by less than this. In every
# step this share of the weights, or one of them from time to time, is compared.
_TOLERANCE, _SHARE = 0.01, 0.02
# So many graphs are checked when they come first, and others when they come again; so many of the
# latest ones are remembered.
_CHECKED_AT_ONCE, _REMEMBERED = 8, 1000


@dataclass
class Plan:
    """What the graph of the scalars says."""

    scalars: Tensor
    name: str  # of the losses, for errors
    uses: Uses
    marks: list[Any] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    """The id of a leaf of the graph -> the position of its parameter."""
    covered: list[Tensor] = field(default_factory=list)
    others: list[tuple[Tensor, str]] = field(default_factory=list)
    """Trained leaves that the layers do not cover, and why."""


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
        named = {id(p): name for name, p in model.named_parameters()}
        self._names = [named.get(id(p), "one of another model") for p in parameters]
        # Graph and layers -> whether the numeric check held; None for one that it did not try.
        self._known: dict[int, bool | None] = {}
        self._turn, self._credit = 0, 0.0
        watch(self, model, parameters)

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
            m lists, which nothing else holds, and, in words, which parameters are not covered; or
            None and the reason, with the graph intact.

        Raises:
            ValueError: A loss does not depend on `scalars`.
            RuntimeError: What a layer does has changed between steps.
        """
        plan = self._plan(scalars, " + ".join(names))
        there, why = self._agreed(plan, losses)
        why = why or self._check(plan)
        if why:
            return None, why
        rows: list[Gradient] = [[None] * len(self._parameters) for _ in losses]
        others, to_scalars = [p for p, _ in plan.others], [get_gradient_edge(scalars)]
        u, present = [], []
        for row, is_there, (_, found) in zip(
            rows,
            there,
            iterate_gradients(losses, others, names, to_scalars, keep_graph=True, needed=_SCALARS),
            strict=True,
        ):
            *of_others, sensitivity = found
            for p, g in zip(others, of_others, strict=True):
                row[plan.places[id(p)]] = None if g is None else g.clone()  # user code may hold it
            if is_there:
                u.append(torch.zeros_like(scalars) if sensitivity is None else sensitivity)
                present.append(row)
        main = self._totals(torch.stack(u).detach(), plan)
        self._checked_pass(plan, main, keep_graph=keep_graph)
        for p in plan.covered:
            j = plan.places[id(p)]
            for row, g in zip(present, main.of[id(p)], strict=True):
                row[j] = self._gradient(g, self._parameters[j])
        return rows, self._described(plan) if others else ""

    # What differs where each process holds a part of the model.

    def _leaves(self) -> Sequence[Tensor | None]:
        """Returns the tensor in the graph that each parameter is."""
        return self._parameters

    def _agreed(self, plan: Plan, losses: Sequence[Tensor | None]) -> tuple[list[bool], str]:
        """Returns which losses are there, and why there is to be one pass for each loss, or ""."""
        present = [loss is not None for loss in losses]
        return present, self._refusal(plan, [x for x in losses if x is not None])

    def _totals(self, u: Tensor, plan: Plan, *, compared: bool = False) -> Totals:
        return Totals(Sensitivities(u), plan.covered, compared=compared)

    def _gradient(self, total: Tensor, _: Tensor) -> Tensor:
        return total

    def _autograds(self, plan: Plan, v: Tensor) -> Sequence[Tensor | None]:
        return _grad(plan, plan.covered, v)

    def _anywhere(self, *, failed: bool) -> bool:
        return failed

    # And what does not.

    def _plan(self, scalars: Tensor, name: str) -> Plan:
        """Looks which parameters the layers cover.

        The structural check: as many operations of the graph use a parameter as there are marks.
        """
        uses = find_uses(scalars.grad_fn)
        fitting = [mark for mark in uses.marks if fits(mark, scalars)]
        plan = Plan(scalars, name, uses)
        marks, good = count(uses.marks), count(fitting)
        for j, p in enumerate(self._leaves()):
            key, number = id(p), uses.of[id(p)]
            if p is None or not p.requires_grad or number == 0:
                continue
            plan.places[key] = j
            if good[key] == number and not p._backward_hooks:
                plan.covered.append(p)
            elif not marks[key]:
                plan.others.append((p, _UNKNOWN))
            else:
                is_shape = good[key] < marks[key] == number
                plan.others.append((p, _OTHER_SHAPE if is_shape else _USED_OTHERWISE))
        covered = {id(p) for p in plan.covered}
        plan.marks = [x for x in fitting if covered & count([x]).keys()]
        return plan

    def _refusal(self, plan: Plan, losses: Sequence[Tensor]) -> str:
        """Says why there is to be one pass for each loss; "" if there is not."""
        if "CheckpointFunctionBackward" in plan.uses.nodes:
            return "a reentrant checkpoint hides parameters"
        if any(_depends_on_more(loss, plan.scalars) for loss in losses):
            return "a loss depends on more than the scalars"
        # One pass for each loss costs the input gradients and those of covered weights m times; one
        # for all, and m for the others, costs the first m + 1 times. Both are about as dear.
        saved = (len(losses) - 1) * sum(p.numel() for p in plan.covered)
        if plan.others and saved <= sum(p.numel() for p in self._model.parameters()):
            return self._described(plan)
        return "" if plan.covered else _NOT_REACHED

    def _described(self, plan: Plan) -> str:
        p, why = plan.others[0]
        number, of = len(plan.others), len(plan.others) + len(plan.covered)
        name = self._names[plan.places[id(p)]]
        return f"{why} ({number} of {of} parameters: {name}{', ...' if number > 1 else ''})"

    def _check(self, plan: Plan) -> str:
        """Runs the numeric check once for a graph and a set of layers; says why if it fails."""
        known, key = self._known, self._key(plan)
        is_new = key not in known and len(known) >= _CHECKED_AT_ONCE
        held = known.pop(key, None)
        if held is None and not is_new:
            held = self._agrees(plan)
        known[key] = held
        if len(known) > _REMEMBERED:
            del known[next(iter(known))]  # the one that was not seen for the longest time
        return _NEW_GRAPH if is_new else "" if held else _INTERACT

    def _key(self, plan: Plan) -> int:
        layers = [(id(x), x.training, _number_of_hooks(x)) for x in self._model.modules()]
        return hash((*layers, frozenset(plan.uses.nodes.items()), *map(id, plan.covered)))

    def _agrees(self, plan: Plan) -> bool | None:
        """The numeric check of all parameters; None if it says nothing, because of NaN or Inf."""
        z = plan.scalars
        # Uneven, so that neither examples that change places nor a clamped gradient go unseen.
        v = torch.arange(1.0, len(z) + 1, device=z.device).cos().to(z.dtype)
        found = self._totals(v[None], plan, compared=True)
        _run(plan, [found])
        errors, norms, rounding = found.compare(self._autograds(plan, v))
        if not norms.isfinite().all():
            return None
        # Two passes, parts of which (norms, softmax) may be of float32 whatever the layers are.
        tolerance = max(2 * found.eps**0.5, 2**-11.5)
        fine = (errors <= tolerance * norms + rounding).all()
        return bool(fine & (errors.norm() <= tolerance * norms.norm()))

    def _checked_pass(self, plan: Plan, main: Totals, *, keep_graph: bool) -> None:
        """Runs the pass, and compares autograd's gradient of sum z with ours, if one is due.

        Autograd computes it in the same pass. One parameter is compared after the other, each as
        soon as the shares of the steps since the last one allow it.
        """
        hidden = count(mark for mark in plan.marks if mark._forward_cls in HIDDEN)
        seen = [p for p in plan.covered if id(p) not in hidden]
        p = seen[self._turn % len(seen)] if seen else None
        self._credit += _SHARE * sum(q.numel() for q in plan.covered)
        if p is None or self._credit < p.numel():
            _run(plan, [main], keep_graph=keep_graph)
            return
        self._turn, self._credit = self._turn + 1, 0.0
        ones = torch.ones_like(plan.scalars)
        check = Totals(Sensitivities(ones[None]), [p], compared=True)
        true = _run(plan, [main, check], [p], keep_graph=keep_graph)
        errors, norms, rounding = check.compare(true)
        if self._anywhere(failed=bool((errors > _TOLERANCE * norms + 4 * rounding).any())):
            self._known.clear()
            raise RuntimeError(
                f"the layers of {self._names[plan.places[id(p)]]!r} must do in every step what they did in "
                f"the first; its gradient is no longer that of autograd. Compute the losses anew "
                f"and call `backward` again, which checks all layers."
            )


class Totals:
    """Gradients of parameters, ``[m, *shape]``, added up layer by layer."""

    def __init__(
        self, s: Sensitivities, parameters: Sequence[Tensor], *, compared: bool = False
    ) -> None:
        self._s, self._compared = s, compared
        self.parameters = {id(p): p for p in parameters}
        self.of: dict[int, Tensor] = {}
        self.eps = 2.0**-23
        self._sizes: dict[int, Tensor] = {}

    def add(self, p: Tensor, part: Part) -> None:
        """Adds a part of the gradients of a parameter."""
        total, fresh = self.of.get(id(p)), id(p) not in self.of
        if total is None:
            shape = len(self._s.u), *p.shape
            total = self.of[id(p)] = torch.empty(shape, dtype=self.dtype(p), device=p.device)
        part.add_to(total, self._s, fresh=fresh)
        if self._compared:
            size, dtype = part.size()
            self._sizes[id(p)] = self._sizes.get(id(p), 0) + size
            self.eps = max(self.eps, torch.finfo(dtype).eps)

    def dtype(self, p: Tensor) -> torch.dtype:
        """Returns the dtype of the gradients of a parameter."""
        return grad_dtype(p)

    def compare(self, true: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns norms of errors and of true gradients, and bounds of rounding by cancellation."""
        errors, norms = [], []
        for key, g in zip(self.parameters, true, strict=True):
            found = self.of[key][0]
            g = torch.zeros_like(found) if g is None else g
            errors.append(norm(found - g))
            norms.append(norm(g))
        sizes = torch.stack([self._sizes[key] for key in self.parameters])
        return torch.stack(errors), torch.stack(norms), 8 * self.eps * sizes


def _run(
    plan: Plan,
    totals: Sequence[Totals],
    inputs: Sequence[Tensor] = (),
    *,
    keep_graph: bool = True,
) -> tuple[Tensor | None, ...]:
    """Goes back from the sum of z to all marks, and returns the gradients of `inputs` alone."""
    calls = 0

    def add(p: Tensor, part: Callable[[], Part]) -> None:
        nonlocal calls
        calls += 1
        wanted = [total for total in totals if id(p) in total.parameters]
        if wanted:
            found = part()
            for total in wanted:
                total.add(p, found)

    z = plan.scalars
    try:
        for mark in plan.marks:
            mark.run = add
            if mark._forward_cls in HIDDEN:
                mark._forward_cls = HIDDEN[mark._forward_cls]  # that of this one node
        # Under autocast the products here would be rounded once more. Elsewhere it is not entered:
        # Ctrl-C just after that would leave autocast's count of contexts, and its cache, wrong.
        device = z.device.type
        rounds = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if rounds else nullcontext():
            wanted = [ANCHOR, *inputs]
            found = _grad(plan, wanted, torch.ones_like(z), keep_graph=keep_graph)[1:]
    finally:
        for mark in plan.marks:
            mark.run = None
            vars(mark).pop("_forward_cls", None)
    assert calls == sum(len(mark.parameters) for mark in plan.marks), "a mark was left out"
    return found


def _grad(
    plan: Plan, inputs: Sequence[Tensor], v: Tensor, *, keep_graph: bool = True
) -> tuple[Tensor | None, ...]:
    """The gradient of the sum of v z."""
    try:
        return torch.autograd.grad(
            plan.scalars, inputs, v, retain_graph=keep_graph, allow_unused=True
        )
    except Exception as error:
        explain(plan.name, error)
        raise


def count(marks: Iterable[Any]) -> Counter[int]:
    """Counts the marks of each parameter."""
    return Counter(id(p) for mark in marks for p in mark.parameters.values())


def _number_of_hooks(layer: nn.Module) -> int:
    before, after = layer._forward_pre_hooks, layer._forward_hooks
    return len(before) + len(after) + len(layer._backward_pre_hooks) + len(layer._backward_hooks)


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
