r"""Mode "per_example": one backward pass for any number of losses of one scalar per example.

If loss i is a function of the scalars :math:`z_1, \ldots, z_N` of N examples that do not interact,
such as log-probabilities of completions, then with :math:`u_{in} = \partial L_i / \partial z_n`

.. math:: g_i = \sum_n u_{in} \nabla_\theta z_n.

One backward pass of :math:`\sum_n z_n` meets every layer's input and the gradient of its output.
For a linear layer with inputs :math:`x_{nt}` and output gradients :math:`\delta_{nt}` they give
:math:`D_n = \sum_t \delta_{nt} x_{nt}^\top`, the gradient of :math:`z_n`, and
:math:`\sum_n u_{in} D_n` is the part of loss i: only this last sum depends on the loss.

- `layers`: the contribution of a layer, from its input and output gradient; the known layers;
- `watch`: marks the outputs of layers in the graph;
- `one_pass`: the pass, and the checks that it equals autograd's result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from raco_optim.gradients import Gather, PerLossGradients
from raco_optim.gradients.accumulation import add_pending
from raco_optim.gradients.dense import DenseGradients, DenseMode, Memory
from raco_optim.gradients.per_example.one_pass import LayerGradients
from raco_optim.objectives import Batch, Found, Pending

__all__ = ["LayerGradients", "PerExampleMode"]


class PerExampleMode(DenseMode):
    """Runs one backward pass for all losses if that is exact, else one per loss."""

    name = "per_example"

    def __init__(
        self, model: nn.Module, parameters: Sequence[Tensor], gather: Gather | None = None
    ) -> None:
        super().__init__(gather)
        self._layers = LayerGradients(model, parameters)

    def check(self, batch: Batch, *, accumulate: bool) -> None:
        """Raises unless there are scalars, wherever the losses are tensors."""
        z: Any = batch.through
        if z is None and (batch.tensors is None or not any(x is not None for x in batch.losses)):
            return
        if not isinstance(z, Tensor) or z.dim() != 1 or not z.requires_grad:
            got = f"shape {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(
                f"`scalars` must be the tensor of shape [N], with a graph, from which all losses "
                f'are computed, because gradients="per_example"; got {got}'
                f"{' without a graph' if isinstance(z, Tensor) and not z.requires_grad else ''}."
            )

    def collect(self, batch: Batch) -> PerLossGradients:
        """Returns the gradients of this call, added to those of earlier micro-batches."""
        if self._gather is not None:
            return self._gather(batch, self._summed(batch))
        found = self._one_pass(batch)
        if found is None:
            return super().collect(batch)
        values, rows = map(list, zip(*found, strict=True))
        memory = Memory()  # without blanks: all rows of a parameter are one tensor, freed at once
        memory.workspace = self._memory.workspace
        return DenseGradients(values, rows, batch.parameters.shared, memory=memory)

    def accumulate(self, batch: Batch, *, named: bool) -> Pending:
        """Adds the gradients of a micro-batch to those of earlier ones."""
        found = self._one_pass(batch)
        if found is None:
            return super().accumulate(batch, named=named)
        values, rows = map(list, zip(*found, strict=True))
        return Pending(batch.names, named, batch.parameters, values, rows)

    def _summed(self, batch: Batch) -> Iterator[Found]:
        """Yields what `collect` averages; as `Gather` expects, an error comes with the first."""
        found = self._one_pass(batch)
        yield from add_pending(self.rows(batch), batch.pending) if found is None else found

    def _one_pass(self, batch: Batch) -> list[Found] | None:
        """Returns values and gradients from one pass; None if impossible, and `ran` says why."""
        losses, scalars = batch.tensors, batch.through
        rows, why = None, "callables" if losses is None else "all losses are absent"
        losses = losses or []
        if scalars is not None and any(x is not None for x in losses):
            rows, why = self._layers.gradients(
                scalars, losses, batch.names, keep_graph=batch.retain_graph
            )
        if rows is None:
            self.ran = f"dense: {why}"
            return None
        self.ran = f"{self.name}; one pass for each loss where {why}" if why else self.name
        values = [None if x is None else x.detach().clone() for x in losses]
        found = zip(values, rows, strict=True)
        return list(add_pending(found, batch.pending, in_place=True))
