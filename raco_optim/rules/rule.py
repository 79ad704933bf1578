"""What every rule offers: coefficients, settings to show and to compare, and a state to save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raco_optim.rules.attributes import attributes_of, new_values, set_attributes


@dataclass(frozen=True)
class MixingCoefficients:
    """Coefficients of the combined gradient and where they come from; float64 tensors.

    Attributes:
        coefficients: alpha, ``[m]``: the combined gradient is ``sum_i alpha_i g_i``.
        p: Solution of the subproblem on the simplex, ``[m]``, or None.
        p_clipped: The clipped solution p~, ``[m]``, or None.
        gap: Relative Frank-Wolfe gap of p, a scalar, or None.

    Example:
        >>> import torch
        >>> from raco_optim import MixingCoefficients
        >>> MixingCoefficients(torch.tensor([0.7, 0.3])).p is None
        True
    """

    coefficients: Tensor
    p: Tensor | None = None
    p_clipped: Tensor | None = None
    gap: Tensor | None = None


class Rule:
    """Maps the Gram matrix of the losses of a step to the coefficients of their gradients.

    Derive from it to write a rule that uses the weights. A rule that uses the Gram matrix alone
    can be any function; `FunctionRule` wraps it.

    Attributes:
        deterministic: Whether equal arguments give equal coefficients, to the bit, in every
            process. If not, all processes use the result of the first.

    Example:
        >>> import torch
        >>> from raco_optim.rules import MixingCoefficients, Rule
        >>> class InverseNorms(Rule):
        ...     def __call__(self, gram, weights):
        ...         w = gram.new_tensor(weights)
        ...         return MixingCoefficients(w / gram.diagonal().sqrt())
        >>> InverseNorms()(torch.diag(torch.tensor([4.0, 1.0])), [0.5, 0.5]).coefficients
        tensor([0.2500, 0.5000])
    """

    deterministic: bool = True

    def __call__(self, gram: Tensor, weights: Sequence[float]) -> MixingCoefficients:
        """Computes the coefficients of the losses that are present in a step.

        Args:
            gram: H of these losses, ``[m, m]``, float64. The rule does not write to it.
            weights: The user's weights of these losses, m numbers >= 0. Their sum is 1, or less
                if some losses are absent from the step.

        Returns:
            The coefficients, on the device of `gram` or on the host.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Returns what ``repr`` shows and what must be equal in all processes."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: the rule's attributes, unless a subclass says other.

        ``torch.load(weights_only=True)`` must be able to read it.
        """
        return attributes_of(self)

    def check_state(self, state: Any) -> None:  # noqa: ANN401  # that is what it checks
        """Raises `ValueError` if `load_state_dict` cannot load the state; changes nothing."""
        new_values(self, state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        set_attributes(self, state)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({settings})"
