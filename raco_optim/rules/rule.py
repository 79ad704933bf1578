"""The interface of rules: coefficients, settings, and a state for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raco_optim._checks import check_attribute
from raco_optim.rules.attributes import attributes_of, new_values, set_attributes


@dataclass(frozen=True)
class MixingCoefficients:
    """Coefficients of the combined gradient and their derivation; float64 tensors.

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
    """Maps the Gram matrix of a step's losses to the coefficients of their gradients.

    Derive from it to write a rule that uses the weights. A rule that uses only the Gram matrix can
    be a function; `FunctionRule` wraps it.

    Attributes:
        deterministic: Whether equal arguments give bitwise equal coefficients in every process. If
            not, all processes use the result of the first one.

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
            gram: H of these losses, ``[m, m]``, float64. Do not modify it.
            weights: The user's weights of these losses, m numbers >= 0. They sum to less than 1 if
                some losses are absent from the step.

        Returns:
            The coefficients, on the device of `gram` or on the CPU.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Returns the settings to show in ``repr`` and to compare between processes."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint: by default the rule's attributes.

        ``torch.load(weights_only=True)`` must be able to read it.
        """
        return attributes_of(self)

    def check_state(self, state: Any) -> None:  # noqa: ANN401  # checked here
        """Raises `ValueError` if `load_state_dict` cannot load the state; changes nothing."""
        new_values(self, state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        set_attributes(self, state)

    def __setattr__(self, name: str, value: object) -> None:
        check_attribute(self, name, Rule)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({settings})"
