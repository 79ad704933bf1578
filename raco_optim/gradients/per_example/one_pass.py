"""One backward pass for all losses if the layers allow it, and the checks that they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from raco_optim.gradients.combine import grad_dtype
from raco_optim.gradients.dense import iterate_gradients
from raco_optim.gradients.explain import explain
from raco_optim.gradients.per_example.layers import Part, Sensitivities, norm
from raco_optim.gradients.per_example.watch import (
    ANCHOR,
    HIDDEN,
    Uses,
    find_uses,
    fits,
    reorders,
    watch,
)
from raco_optim.objectives import Gradient

_NOT_REACHED = "no parameter is reached"
_UNKNOWN = "a parameter is in no known layer"
_OTHER_SHAPE = "a layer's output is not [N, ..., features]"
_USED_OTHERWISE = "a parameter is used outside its layer, or has a hook"
_INTERACT = "examples interact, or a hook changes gradients"
_REORDERED = "the examples are reordered"
_HOOKED = "a hook may change gradients"
_NEW_GRAPH = "the graph is new, as in many calls before, and will be checked if it comes again"
_SCALARS = (
    "`scalars`; it does not. Pass the tensor from which all losses are computed, or None for a "
    "loss that is absent from this batch."
)
# Gradients from the layers and from autograd differ by less than this, by rounding. Each step
# compares this share of the weights on average.
_TOLERANCE, _SHARE = 0.01, 0.02
# So many graphs are checked when they first occur, and others when they occur again; so many of
# the latest ones are remembered.
_CHECKED_AT_ONCE, _REMEMBERED = 8, 1000
# After so many steps of a graph, and every so many, it is checked again.
_AGAIN, _EVERY = (4, 20), 100


@dataclass
class Plan:
    """The use of parameters in the graph of the scalars."""

    scalars: Tensor
    name: str  # of the losses, for errors
    uses: Uses
    marks: list[Any] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    """The id of a leaf of the graph -> the position of its parameter."""
    covered: list[Tensor] = field(default_factory=list)
    others: list[tuple[Tensor, str]] = field(default_factory=list)
    """Trained leaves that the layers do not cover, with the reason."""
    hooks: int = 0  # of tensors and nodes, newer than the first layer's output


class LayerGradients:
    """Gradients of several losses from inputs and output gradients of a model's layers."""

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        self._model, self._parameters = model, list(parameters)
        both = [
            (p, p if leaf is None else leaf)
            for p, leaf in zip(parameters, self._leaves(), strict=True)
        ]
        named = {id(p): name for name, p in model.named_parameters()}
        self._names = [named.get(id(p), named.get(id(q), "one of another model")) for p, q in both]
        # Graph and layers -> steps since the numeric check first passed; -1 if it failed.
        self._known: dict[int, int] = {}
        self._turn, self._credit = 0, 0.0
        watch(self, model, [p for pair in both for p in pair])

    def gradients(
        self,
        scalars: Tensor,
        losses: Sequence[Tensor | None],
        names: Sequence[str],
        *,
        keep_graph: bool = True,
    ) -> tuple[list[Gradient] | None, str]:
        r"""Returns one gradient per loss, by one backward pass.

        A parameter is covered if only known layers use it, which the graph shows in every call.
        Other parameters get one backward pass per loss. At first, and whenever the graph or the
        layers change, two more passes compare :math:`\nabla \sum_n v_n z_n` with autograd's, to
        detect interacting examples. Other calls compare the sum for one parameter.

        Returns m lists, which nothing else holds, and a text about parameters that are not covered;
        or None and the reason, with the graph intact. Raises ValueError if a loss does not depend
        on the scalars z, ``[N]``, and RuntimeError if a layer computes something else than before.
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

    # These differ if each process holds a part of the model.

    def _leaves(self) -> Sequence[Tensor | None]:
        """Returns the tensor that represents each parameter in the graph."""
        return self._parameters

    def _agreed(self, plan: Plan, losses: Sequence[Tensor | None]) -> tuple[list[bool], str]:
        """Returns which losses are present, and the reason for one pass per loss, or ""."""
        present = [loss is not None for loss in losses]
        return present, self._refusal(plan, [x for x in losses if x is not None])

    def _totals(self, u: Tensor, plan: Plan, *, compared: bool = False) -> Totals:
        return Totals(Sensitivities(u), plan.covered, compared=compared)

    def _gradient(self, total: Tensor, _: Tensor) -> Tensor:
        return total

    def _autograds(self, plan: Plan, v: Tensor) -> Sequence[Tensor | None]:
        return _grad(plan, plan.covered, v)

    def _anywhere(self, *flags: bool) -> Sequence[bool]:
        return flags

    def _plan(self, scalars: Tensor, name: str) -> Plan:
        """Finds covered parameters: the graph uses each as often as there are marks."""
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
        plan.hooks = self._number_of_hooks(plan.marks)
        return plan

    def _refusal(self, plan: Plan, losses: Sequence[Tensor]) -> str:
        """Returns the reason for one pass per loss; "" if one pass for all is possible."""
        if "CheckpointFunctionBackward" in plan.uses.nodes:
            return "a reentrant checkpoint hides parameters"
        if any(_depends_on_more(loss, plan.scalars) for loss in losses):
            return "a loss depends on more than the scalars"
        if any(reorders(node, len(plan.scalars)) for node in plan.uses.picks):
            return _REORDERED
        if self._hooked(plan):
            return _HOOKED
        # One pass per loss computes the gradients of inputs and of covered weights m times. One
        # pass for all, and m for the others, computes those of inputs m + 1 times. Both cost about
        # the same.
        saved = (len(losses) - 1) * sum(p.numel() for p in plan.covered)
        if plan.others and saved <= sum(p.numel() for p in self._model.parameters()):
            return self._described(plan)
        return "" if plan.covered else _NOT_REACHED

    def _hooked(self, plan: Plan) -> bool:
        return plan.hooks > 0

    def _number_of_hooks(self, marks: Sequence[Any]) -> int:
        newest: int = RemovableHandle.next_id
        first = min((m.hook for m in marks if m._forward_cls not in HIDDEN), default=newest)
        if first == newest:
            return 0
        kinds = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
        hooks = [n for x in self._model.modules() for kind in kinds for n in getattr(x, kind)]
        return int(newest - first - sum(n >= first for n in hooks))

    def _described(self, plan: Plan) -> str:
        p, why = plan.others[0]
        number, of = len(plan.others), len(plan.others) + len(plan.covered)
        name = self._names[plan.places[id(p)]]
        return f"{why} ({number} of {of} parameters: {name}{', ...' if number > 1 else ''})"

    def _check(self, plan: Plan) -> str:
        """Runs the numeric check where it is due; returns why one pass is impossible, or ""."""
        known, key = self._known, self._key(plan)
        is_new = key not in known and len(known) >= _CHECKED_AT_ONCE
        steps = known.pop(key, 0)
        is_due = not is_new and (steps in _AGAIN or steps % _EVERY == 0)
        new, due, failed, again = self._anywhere(is_new, is_due, steps < 0, steps > 0)
        held = self._agrees(plan) if due and not (new or failed) else True
        if held is False and again:
            known.clear()
            raise RuntimeError(
                "examples must not interact in any step; they did not in earlier steps, and do now "
                "(or a hook or a layer changes gradients that it did not). Gradients since the "
                f"last check, up to {_EVERY} steps with this graph, may be wrong: go back to a "
                'checkpoint from before them, and use gradients="dense".'
            )
        known[key] = steps if new or failed or held is None else steps + 1 if held else -1
        if len(known) > _REMEMBERED:
            del known[next(iter(known))]  # the least recently used one
        return _NEW_GRAPH if new else "" if held and not failed else _INTERACT

    def _key(self, plan: Plan) -> int:
        layers = [(id(x), x.training) for x in self._model.modules()]
        nodes = frozenset(plan.uses.nodes.items())
        return hash((*layers, nodes, plan.hooks, *map(id, plan.covered)))

    def _agrees(self, plan: Plan) -> bool | None:
        """Runs the numeric check of all parameters; None if NaN or Inf make it void."""
        z = plan.scalars
        # Uneven, to notice exchanged examples and clamped gradients.
        v = torch.arange(1.0, len(z) + 1, device=z.device).cos().to(z.dtype)
        found = self._totals(v[None], plan, compared=True)
        _run(plan, [found])
        errors, norms, rounding = found.compare(self._autograds(plan, v))
        if not norms.isfinite().all():
            return None
        # Parts of both passes (norms, softmax) may be in float32, whatever the layers are in.
        tolerance = max(2 * found.eps**0.5, 2**-11.5)
        fine = (errors <= tolerance * norms + rounding).all()
        return bool(fine & (errors.norm() <= tolerance * norms.norm()))

    def _checked_pass(self, plan: Plan, main: Totals, *, keep_graph: bool) -> None:
        """Runs the pass; if a check is due, compares autograd's gradient of sum z."""
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
        differs = bool((errors > _TOLERANCE * norms + 4 * rounding).any())
        if any(self._anywhere(differs)):
            self._known.clear()
            name = self._names[plan.places[id(p)]]
            raise RuntimeError(
                f"the layers of {name!r} must compute the same in every step; the gradient of "
                f"{name!r} no longer equals autograd's. Compute the losses again and call "
                f"`backward`, which then checks all layers."
            )


class Totals:
    """Gradients of parameters, ``[m, *shape]``, summed layer by layer."""

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
        """Returns norms of errors and of true gradients, and bounds of their rounding errors."""
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
    """Runs the backward pass from the sum of z to all marks; returns the gradients of `inputs`."""
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
        # Autocast would round the products here once more. Entered only if needed, because Ctrl-C
        # right after that would corrupt autocast's count of contexts and its cache.
        device = z.device.type
        rounds = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if rounds else nullcontext():
            wanted = [ANCHOR, *inputs]
            found = _grad(plan, wanted, torch.ones_like(z), keep_graph=keep_graph)[1:]
    finally:
        for mark in plan.marks:
            mark.run = None
            vars(mark).pop("_forward_cls", None)
    assert calls == sum(len(mark.parameters) for mark in plan.marks), "a mark was not run"
    return found


def _grad(
    plan: Plan, inputs: Sequence[Tensor], v: Tensor, *, keep_graph: bool = True
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the sum of v z."""
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


def _depends_on_more(loss: Tensor, scalars: Tensor) -> bool:
    """Returns whether the loss reaches a leaf on a path around the scalars."""
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
