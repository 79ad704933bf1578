r"""Approximate modes: the Gram matrix of something smaller than the gradients, or an earlier one.

Surrogates :math:`s_i` replace the gradients :math:`g_i` in the Gram matrix,
:math:`H_{ij} = \langle s_i, s_j \rangle`: gradients with respect to a shared representation,
:math:`s_i = \partial L_i / \partial z`, or to a subset of the parameters; or an earlier step's H
is used again (``gram_every``). The combined gradient is the gradient of
:math:`\sum_i \alpha_i L_i`, in one backward pass for any m. Only :math:`\alpha` is approximate.

References:
    The representation: Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization,
    2018 (MGDA-UB).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from raco_optim.gradients.dense import iterate_gradients
from raco_optim.gradients.functions import gram_matrix
from raco_optim.objectives import Batch, Gradient

# Argument that holds the inputs -> the end of "a loss must depend on", and the remedy.
_NEEDED = {
    "gradients": "a parameter of `gradients`; it reaches none. Pass parameters that all losses "
    "share, or None for a loss that is absent from this batch.",
    "representation": "`representation`; it does not. Pass the tensor itself that all losses are "
    "computed from, or None for a loss that is absent from this batch.",
}


class ApproximateGradients:
    """The losses with their graph, and the Gram matrix of their surrogates."""

    exact = False

    def __init__(self, batch: Batch, gram: Tensor | None) -> None:
        losses = batch.tensors
        assert losses is not None and gram is not None
        self._batch, self._losses, self._gram = batch, losses, gram
        values = [None if loss is None else loss.detach() for loss in losses]
        group = batch.group
        self.values, self.nonfinite_ranks = (values, "") if group is None else group.mean(values)

    def gram(self) -> Tensor:
        """Returns the Gram matrix of the surrogates, ``[m, m]``, float64."""
        return self._gram

    def head_norms(self) -> Tensor:
        """Returns zeros, because the gradients of the losses are unknown."""
        return self._gram.new_zeros(len(self._losses))

    def combine(self, alpha: Tensor, weights: Tensor) -> Gradient:
        """Computes the gradient of the combined losses, in one pass each for heads and trunk."""
        from raco_optim.distributed import agreement, replicated

        with agreement.raise_together(self._batch.group):
            row = self._combined(alpha, weights)
        if self._batch.group is None:
            return row
        one, batch = torch.ones(1, device="cpu"), replace(self._batch, names=("sum",))
        return replicated.gather(batch, [(one, row)]).combine(one, one)

    def _combined(self, alpha: Tensor, weights: Tensor) -> Gradient:
        tensors, shared = self._batch.parameters.tensors, self._batch.parameters.shared
        row: Gradient = [None] * len(tensors)
        trained = [j for j, p in enumerate(tensors) if p.requires_grad]
        heads, trunk = ([j for j in trained if shared[j] == part] for part in (False, True))
        for chosen, coefficients in ((heads, weights), (trunk, alpha)):
            if not chosen:
                continue
            with torch.enable_grad():
                terms = [
                    a * loss.reshape(())
                    for a, loss in zip(coefficients.detach(), self._losses, strict=True)
                    if loss is not None
                ]
                total = torch.stack(terms).sum()
            # The last pass, for the shared part, also frees the graph behind the heads.
            keep = self._batch.retain_graph or (chosen is heads and bool(trunk))
            name = " + ".join(self._batch.names)
            part = [tensors[j] for j in chosen]
            passes = iterate_gradients([total], part, [name], keep_graph=keep, needed=None)
            for j, g in zip(chosen, next(passes)[1], strict=True):
                # Autograd may return a tensor for two parameters, or one that user code holds.
                row[j] = None if g is None else g.clone()
        if all(g is None for g in row):
            raise ValueError(
                "losses must depend on a parameter of the optimizer; they reach none. Was the "
                "optimizer built from this model's parameters?"
            )
        return row


class ApproximateMode:
    """The Gram matrix with respect to a "representation", or to a "subset" of the parameters."""

    def __init__(self, name: str) -> None:
        self.name = self.ran = name
        self._argument = "gradients" if name == "subset" else name

    def check(self, batch: Batch, *, accumulate: bool) -> None:
        """Raises unless the arguments of ``backward`` fit the mode."""
        check_approximation(batch, accumulate=accumulate)
        if self._argument != "representation":
            if not batch.parameters.subset:
                raise ValueError(
                    "`gradients` must hold a trainable parameter of the optimizer; all were frozen "
                    "or removed."
                )
        elif not isinstance(batch.through, Tensor):
            raise TypeError(
                f"`representation` must be the tensor from which all losses are computed, because "
                f'gradients="representation"; got {type(batch.through).__name__}.'
            )

    def collect(self, batch: Batch) -> ApproximateGradients:
        """Computes the Gram matrix of the surrogates."""
        from raco_optim.distributed import agreement, replicated

        group, z = batch.group, batch.through
        inputs = batch.parameters.subset if z is None else [z]
        with agreement.raise_together(group):
            rows = self._rows(batch, inputs)
        if group is None:
            gram = gram_matrix(rows)
        elif z is not None:
            # The representation of the joint batch consists of the representations here and there.
            gram = gram_matrix(rows) / group.world_size**2
            gram = group.sum([gram], inputs[0].device)[0].view_as(gram)
            gram = (gram + gram.T) / 2  # an all-reduce may add each entry in another order
        else:
            subset = replace(batch, parameters=batch.parameters.only_subset())
            gram = replicated.gather(subset, [(None, row) for row in rows]).gram()
        return ApproximateGradients(batch, gram)

    def _rows(self, batch: Batch, inputs: Sequence[Tensor]) -> list[Gradient]:
        losses = batch.tensors
        assert losses is not None
        _check_inputs(losses, inputs, self._argument)
        passes = iterate_gradients(
            losses, inputs, batch.names, keep_graph=True, needed=_NEEDED[self._argument]
        )
        return [row for _, row in passes]


def check_approximation(batch: Batch, *, accumulate: bool) -> None:
    """Raises unless the losses of a call can share one backward pass of their combination."""
    exact = 'Choose gradients="dense" and gram_every=1'
    if batch.parameters.is_sharded:
        raise ValueError(
            f"`gradients` and `gram_every` must be exact for DTensor parameters; got an "
            f"approximation. {exact}."
        )
    if accumulate:
        raise ValueError(
            f"`accumulate` must be False with an approximate Gram matrix; got True. {exact}."
        )
    if batch.tensors is None:
        raise TypeError(
            f"`losses` must hold only tensors with an approximate Gram matrix; got a callable or "
            f"another object. {exact} for callables."
        )


def _check_inputs(losses: Sequence[Tensor | None], inputs: Sequence[Tensor], argument: str) -> None:
    if not any(x.requires_grad for x in inputs):
        raise ValueError(
            f"`{argument}` must require gradients; got frozen parameters, or a tensor without a "
            f"graph (detached, or computed under torch.no_grad())."
        )
    if any(x.is_complex() for x in inputs):
        raise ValueError(f"`{argument}` must be real; got a complex tensor.")
    devices = {x.device for x in (*losses, *inputs) if x is not None}
    if len(devices) > 1:
        found = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(f"`{argument}` must be on the device of the losses; got {found}.")


@dataclass(frozen=True)
class KeptGram:
    """A Gram matrix for several steps of the same losses (``gram_every``), and its age."""

    gram: Tensor | None = None
    losses: list[str | None] = field(default_factory=list)  # their names, None for an absent one
    age: int = 0

    def serves(self, losses: Sequence[str | None], every: int) -> bool:
        """Returns whether the next step can use the Gram matrix."""
        return self.gram is not None and self.losses == losses and self.age + 1 < every

    @classmethod
    def loaded(
        cls,
        state: Any,  # noqa: ANN401  # checked here
        names: Sequence[str] | None,
        places: Sequence[int] | None,
    ) -> KeptGram:
        """Returns a `KeptGram` from its `vars`, losses reordered by `places`, or raises."""
        with suppress(AttributeError, IndexError, KeyError, TypeError, ValueError):
            gram, losses, age = state["gram"], state["losses"], state["age"]
            known = [str(x) for x in losses] if names is None else names
            fits = type(age) is int and age >= 0
            if fits and gram is None:
                return cls(None, [], age)
            fits = fits and gram.is_floating_point() and gram.shape == (len(losses), len(losses))
            if fits and all(x in (None, name) for x, name in zip(losses, known, strict=True)):
                order = list(range(len(losses)) if places is None else places)
                return cls(gram[order][:, order], [losses[k] for k in order], age)
        raise ValueError(
            f"`state_dict` must hold a Gram matrix of shape [m, m], the names of its m losses and "
            f"its age as 'kept_gram'; got {state!r}."
        )
