"""Log-probabilities of pairs of completions, and their implicit rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raco_optim.alignment._checks import check_log_probs, check_tensor, checked_number


@dataclass(frozen=True)
class PairLogProbs:
    r"""Log-probabilities of B pairs of completions under the policy and the reference.

    .. math:: \log \pi(y | x) = \sum_t \log \pi(y_t | x, y_{<t})

    over the tokens of the completion y, not of the prompt x. Sum in float32 or better: the losses
    use differences of such sums, and near -200 a bfloat16 can only hold whole numbers.

    Attributes:
        chosen: Under the policy, of the completions named "chosen" in the data, ``[B]``.
        rejected: Under the policy, of the completions named "rejected", ``[B]``. An objective
            may prefer either; its sign says which.
        ref_chosen: Of the chosen completions under the frozen reference model, ``[B]``, or None.
        ref_rejected: Of the rejected completions under the reference model, ``[B]``, or None.
        chosen_tokens: Lengths of the chosen completions, ``[B]``, any real dtype, or None. Needed
            for length normalisation only; 0 counts as 1.
        rejected_tokens: Lengths of the rejected completions, ``[B]``, or None.

    Raises:
        TypeError: A field is not a tensor.
        ValueError: A field differs in shape from `chosen`, a log-probability has no floating
            dtype, or only one of a chosen/rejected pair of fields is given.

    Example:
        >>> import torch
        >>> from raco_optim.alignment import PairLogProbs
        >>> log_probs = PairLogProbs(
        ...     chosen=torch.tensor([-10.0, -20.0]),
        ...     rejected=torch.tensor([-12.0, -15.0]),
        ...     ref_chosen=torch.tensor([-11.0, -20.0]),
        ...     ref_rejected=torch.tensor([-11.0, -14.0]),
        ... )
        >>> log_probs.rewards(beta=0.5)
        (tensor([0.5000, 0.0000]), tensor([-0.5000, -0.5000]))
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_tokens: Tensor | None = None
    rejected_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        check_log_probs("chosen", self.chosen, {"B": None})
        shape = {"B": len(self.chosen)}
        check_log_probs("rejected", self.rejected, shape)
        optional = vars(self)
        for check, a, b in (
            (check_log_probs, "ref_chosen", "ref_rejected"),
            (check_tensor, "chosen_tokens", "rejected_tokens"),
        ):
            given = [name for name in (a, b) if optional[name] is not None]
            if len(given) == 1:
                raise ValueError(f"`{a}` and `{b}` must be given together; got `{given[0]}` alone.")
            for name in given:
                check(name, optional[name], shape)

    def select(self, index: Tensor) -> PairLogProbs:
        """Returns the pairs at the positions `index`, ``[n]``, int64, on the same device.

        Example:
            >>> import torch
            >>> from raco_optim.alignment import PairLogProbs
            >>> log_probs = PairLogProbs(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0]))
            >>> log_probs.select(torch.tensor([1])).rejected
            tensor([-4.])
        """
        selected: dict[str, Any] = {
            name: None if x is None else x.index_select(0, index) for name, x in vars(self).items()
        }
        return PairLogProbs(**selected)

    def log_ratios(
        self, *, length_normalized: bool = False, reference_free: bool = False
    ) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\log \pi - \log \pi_{ref}` of the chosen and of the rejected.

        Args:
            length_normalized: Divide each by the length of its completion.
            reference_free: Use 0 as the reference's log-probabilities.

        Returns:
            Two tensors ``[B]``.

        Raises:
            ValueError: The reference or the lengths are needed but missing.

        Example:
            >>> import torch
            >>> from raco_optim.alignment import PairLogProbs
            >>> log_probs = PairLogProbs(torch.tensor([-1.0]), torch.tensor([-3.0]))
            >>> log_probs.log_ratios(reference_free=True)
            (tensor([-1.]), tensor([-3.]))
        """
        chosen, rejected = self.chosen, self.rejected
        if not reference_free:
            if self.ref_chosen is None or self.ref_rejected is None:
                raise ValueError(
                    "`ref_chosen` and `ref_rejected` must hold the reference model's "
                    "log-probabilities; got None. Pass them, or reference_free=True if the loss "
                    "supports it."
                )
            chosen, rejected = chosen - self.ref_chosen, rejected - self.ref_rejected
        if length_normalized:
            if self.chosen_tokens is None or self.rejected_tokens is None:
                raise ValueError(
                    "`chosen_tokens` and `rejected_tokens` must hold the lengths of the "
                    "completions; got None. Pass them, or length_normalized=False if the loss "
                    "supports it."
                )
            chosen = chosen / self.chosen_tokens.clamp(min=1)
            rejected = rejected / self.rejected_tokens.clamp(min=1)
        return chosen, rejected

    def rewards(
        self, *, beta: float, length_normalized: bool = False, reference_free: bool = False
    ) -> tuple[Tensor, Tensor]:
        r"""Returns the implicit rewards :math:`\beta (\log \pi - \log \pi_{ref})`.

        Args:
            beta: Strength of the tie to the reference, > 0.
            length_normalized: See `log_ratios`.
            reference_free: See `log_ratios`.

        Returns:
            Rewards of the chosen and of the rejected completions, ``[B]`` each.

        Raises:
            ValueError: `beta` is not positive; or see `log_ratios`.

        Example:
            >>> import torch
            >>> from raco_optim.alignment import PairLogProbs
            >>> log_probs = PairLogProbs(torch.tensor([-1.0]), torch.tensor([-3.0]))
            >>> log_probs.rewards(beta=0.5, reference_free=True)
            (tensor([-0.5000]), tensor([-1.5000]))

        References:
            Eq. 5 of Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290.
        """
        beta = checked_number("beta", beta, positive=True)
        chosen, rejected = self.log_ratios(
            length_normalized=length_normalized, reference_free=reference_free
        )
        return beta * chosen, beta * rejected
