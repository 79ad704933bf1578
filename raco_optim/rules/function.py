"""A function of the Gram matrix as a rule, with its state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raco_optim.rules.attributes import attributes_of, bad_state, new_values, set_attributes
from raco_optim.rules.rule import MixingCoefficients, Rule


class FunctionRule(Rule):
    """A user's function, or a TorchJD ``Weighting``, as a rule; it does not receive the weights.

    A checkpoint contains the state of `function`, so a resumed run continues exactly. The state is
    ``function.state_dict()`` if it has ``state_dict`` and ``load_state_dict`` and is not an
    `nn.Module`; otherwise its attributes or, for an `nn.Module`, the attributes, parameters and
    buffers of all submodules. Attributes can be numbers, strings, tensors, None, dtypes, devices,
    and tuples, lists, dicts and sets of them; other types are left out with a warning, unless they
    are callable. The state does not include closures, nor the model or the optimizer whose method
    `function` is.

    Args:
        function: Maps the Gram matrix, ``[m, m]``, float64, to coefficients, ``[m]``, or to
            `MixingCoefficients`. It may modify its argument, which is a copy.

    Raises:
        TypeError: `function` is not callable.

    Warns:
        UserWarning: Once, if a function with a state is called with another number of losses.

    Example:
        >>> import torch
        >>> from raco_optim.rules import FunctionRule
        >>> rule = FunctionRule(lambda gram: 1 / gram.diagonal().sqrt())
        >>> rule(torch.diag(torch.tensor([4.0, 1.0])), [0.5, 0.5]).coefficients
        tensor([0.5000, 1.0000])
    """

    deterministic = False

    def __init__(self, function: Callable[[Tensor], Tensor | MixingCoefficients]) -> None:
        if isinstance(function, type) or not callable(function):
            raise TypeError(
                f"`rule` must be a callable from the Gram matrix to the coefficients; got "
                f"{function!r}."
            )
        self.function = function
        self._number: int | None = None  # of losses in the last call
        self._warned = False

    def __call__(self, gram: Tensor, weights: Sequence[float]) -> MixingCoefficients:
        """Calls the function without recording gradients, and checks its result."""
        if self._number not in (None, len(gram)) and not self._warned and self.state_dict():
            self._warned = True
            warnings.warn(
                f"`rule` is called with {len(gram)} losses after {self._number}, because some are "
                f"absent from a step. {type(self.function).__name__} may lose or mix up its state "
                f"for single losses.",
                stacklevel=2,
            )
        self._number = len(gram)
        with torch.no_grad():
            mixing = self.function(gram.clone())
        if isinstance(mixing, Tensor):
            mixing = MixingCoefficients(mixing)
        if not isinstance(mixing, MixingCoefficients):
            raise TypeError(
                f"`rule` must return a tensor or MixingCoefficients; got {type(mixing).__name__}."
            )
        alpha = mixing.coefficients
        if alpha.shape != gram.shape[:1] or not alpha.is_floating_point():
            raise ValueError(
                f"`rule` must return a real tensor of shape [{len(gram)}], one coefficient per "
                f"loss; got shape {list(alpha.shape)} and dtype {alpha.dtype}."
            )
        return mixing

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the function."""
        holder, has_own = self._holder()
        return {"function": holder.state_dict()} if has_own else attributes_of(holder)

    def check_state(self, state: Any) -> None:  # noqa: ANN401  # checked here
        """Raises `ValueError` if the state is of another function; changes nothing."""
        holder, has_own = self._holder()
        if not has_own:
            new_values(holder, state)
        elif not isinstance(state, Mapping) or state.keys() != {"function"}:
            raise bad_state('hold only "function"', state)
        else:
            try:
                copy.deepcopy(holder).load_state_dict(state["function"])
            except Exception as error:
                raise bad_state(f"fit; {type(error).__name__}: {error}", state) from error

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        self.check_state(state)
        holder, has_own = self._holder()
        if has_own:
            holder.load_state_dict(state["function"])
        else:
            set_attributes(holder, state)

    def __repr__(self) -> str:
        return f"FunctionRule({self.function!r})"

    def _holder(self) -> tuple[Any, bool]:
        """Returns the object with the state, and whether it has its own ``state_dict``."""
        holder = getattr(self.function, "__self__", self.function)  # of a bound method
        if holder is not self.function and isinstance(holder, nn.Module | Optimizer):
            return None, False  # has a separate checkpoint
        has_both = hasattr(holder, "state_dict") and hasattr(holder, "load_state_dict")
        return holder, has_both and not isinstance(holder, nn.Module)
