"""The gradients of a step's objectives: summed over micro-batches, averaged, combined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from raco_optim.gradients import Found, check_losses, iterate_gradients
from raco_optim.materialized import Gradients, add_pending, collect
from raco_optim.per_example import LinearLayerGradients
from raco_optim.processes import Processes
from raco_optim.step import Rule, Step, average, solve, write

# Scores of the completions, and the m losses, which depend on them alone.
Forward = Callable[[], tuple[Tensor, list[Tensor | None]]]


class Surgery:
    """Goes from the losses of micro-batches to ``.grad``.

    Args:
        weights: Weights of the m objectives.
        rule: From the Gram matrix to the coefficients.
        processes: The processes over which gradients are averaged.
    """

    def __init__(self, weights: Mapping[str, float], rule: Rule, processes: Processes) -> None:
        self._names, self._weights = tuple(weights), list(weights.values())
        self._rule = rule
        self._processes = processes
        self._pending: Gradients | None = None
        self._layers: LinearLayerGradients | None = None

    def begin(self) -> None:
        """Begins a step; what is left of one that was stopped in the middle is dropped."""
        self._pending = None

    def micro_batch(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        forward: Forward,
        last: bool,
    ) -> tuple[list[Tensor | None], Step | None]:
        """Adds up the gradients of the losses; in the last micro-batch, adds to ``.grad``.

        Args:
            model: The model, which `forward` runs.
            optimizer: The optimizer of its parameters.
            forward: The forward pass. If it fails in one process, all raise.
            last: Whether the step ends with this micro-batch.

        Returns:
            The losses of the micro-batch, and what the step computed, if it has ended.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._layers is None or not self._layers.serve(parameters):
            self._layers = LinearLayerGradients(model, parameters)
        with self._layers:
            with self._processes.agreeing():
                scores, losses = forward()
                found = self._gradients(scores, losses, parameters)
                found = add_pending(found, self._pending)
                self._pending = None if last else collect(self._names, found, keep=True)
            return losses, self._combine(found, parameters) if last else None

    def _gradients(
        self, scores: Tensor, losses: list[Tensor | None], parameters: Sequence[Tensor]
    ) -> Iterable[Found]:
        assert self._layers is not None
        # For adapters, one backward pass serves all losses.
        rows = self._layers.gradients(scores, losses)
        if rows is None:
            check_losses(losses, parameters, self._names)
            return iterate_gradients(losses, parameters, self._names)
        return zip([None if x is None else x.detach() for x in losses], rows, strict=True)

    def _combine(self, found: Iterable[Found], parameters: Sequence[Tensor]) -> Step:
        shared = [True] * len(parameters)
        gradients = average(self._names, found, parameters, shared, None, self._processes)
        step = solve(gradients, self._weights, shared, self._rule, "raise")
        return write(parameters, gradients, step, shared, "raise")
