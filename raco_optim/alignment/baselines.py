"""Losses of the baselines AMoPO and MODPO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor
from torch.nn.functional import logsigmoid

from raco_optim._checks import checked_weights
from raco_optim.alignment._checks import check_tensor, checked_number
from raco_optim.alignment.labels import labelled
from raco_optim.alignment.log_probs import PairLogProbs
from raco_optim.alignment.losses import preference_losses

if TYPE_CHECKING:
    from typing_extensions import Unpack


def amopo_losses(
    log_probs: PairLogProbs,
    signs: Tensor,
    *,
    beta: float,
    pair_weights: Tensor | None = None,
    counts: Tensor | Sequence[float] | None = None,
) -> list[Tensor | None]:
    r"""Computes the losses of AMoPO, for the caller to weight and add.

    .. math::
        L_k = -\log \sigma \left( \frac{\beta}{|y_w|} \log \pi(y_w | x)
            - \frac{\beta}{|y_l|} \log \pi(y_l | x) \right), \quad L = \sum_k \alpha_k L_k

    averaged over the pairs that objective k labels, where k prefers :math:`y_w` to :math:`y_l`.
    This is SimPO with margin 0, which needs neither a reference nor a reward model.

    The weights :math:`\alpha` are static, as in the baseline of RACO's authors. The AMoPO paper
    samples them in every step instead: it prompts the model once per objective, describing the
    objective in the prompt, fits a Gaussian to the token probabilities of each forward pass, and
    takes the softmax of one sample from each. With one shared prompt, these Gaussians would all
    be equal and the samples noise.

    Args:
        log_probs: Log-probabilities of B pairs, with their lengths.
        signs: ``[B, m]``, see `preference_losses`.
        beta: > 0. Use a larger value than for DPO, because the log-probabilities are per token:
            RACO's authors tune it between 0.1 and 1.5.
        pair_weights: ``[B, m]``, see `preference_losses`.
        counts: ``[m]``, see `preference_losses`.

    Returns:
        m scalars; None for an objective without a label.

    Raises:
        TypeError: `signs` is not a tensor.
        ValueError: See `preference_losses`.

    Example:
        >>> import torch
        >>> from raco_optim.alignment import PairLogProbs, amopo_losses
        >>> log_probs = PairLogProbs(
        ...     chosen=torch.tensor([-10.0]),
        ...     rejected=torch.tensor([-12.0]),
        ...     chosen_tokens=torch.tensor([10]),
        ...     rejected_tokens=torch.tensor([6]),
        ... )
        >>> amopo_losses(log_probs, torch.tensor([[1, -1]]), beta=1.0)
        [tensor(0.3133), tensor(1.3133)]

    References:
        Eq. 9 of Liu et al., "AMoPO: Adaptive Multi-objective Preference Optimization without
        Reward Models and Reference Models", arXiv 2506.07165.
    """
    return preference_losses(
        log_probs, signs, pair_weights=pair_weights, counts=counts, loss="simpo", beta=beta
    )


class PairMean(TypedDict, total=False):
    """Keyword arguments of `modpo_loss` for the mean over pairs."""

    pair_weight: Tensor | None
    count: Tensor | float | None


def modpo_loss(
    log_probs: PairLogProbs,
    sign: Tensor,
    margins: Tensor,
    weights: Sequence[float] | Mapping[str, float],
    objective: int,
    *,
    beta: float,
    **mean: Unpack[PairMean],
) -> Tensor | None:
    r"""Computes the loss of MODPO: DPO on one objective, with the rewards of the others as margin.

    .. math::
        L = -\log \sigma \left( \frac{s}{w_k} \left( \beta (\rho_{chosen} - \rho_{rejected})
            - \sum_{j \ne k} w_j \, (r_{j, chosen} - r_{j, rejected}) \right) \right),
        \quad \rho = \log \pi - \log \pi_{ref}

    averaged over the pairs that objective k labels. With weight 1 on k it equals DPO.

    Args:
        log_probs: Log-probabilities of B pairs under policy and reference.
        sign: Labels s of objective k, ``[B]``, see `preference_losses`.
        margins: Reward margins :math:`r_{j, chosen} - r_{j, rejected}` from the user's reward
            models, ``[B, m]``; finite for labelled pairs. Column k and columns with weight 0 are
            ignored.
        weights: w, m numbers >= 0 that sum to 1, in the order of the columns.
        objective: k, the position of the objective with preferences; its weight must be positive.
        beta: Strength of the tie to the reference, > 0.
        pair_weight (Tensor | None): Weights of the pairs, ``[B]``, see `preference_losses`.
        count (Tensor | float | None): Divisor instead of the sum of the pair weights, see
            `preference_losses`.

    Returns:
        A scalar, or None if no pair is labelled.

    Raises:
        TypeError: `sign` or `margins` is not a tensor.
        ValueError: An argument is out of its range or of the wrong shape, or `log_probs` lacks
            the reference.

    Example:
        >>> import torch
        >>> from raco_optim.alignment import PairLogProbs, modpo_loss
        >>> log_probs = PairLogProbs(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)))
        >>> margins = torch.tensor([[0.0, 1.0]])  # the second reward prefers the chosen one too
        >>> modpo_loss(log_probs, torch.tensor([1]), margins, [0.5, 0.5], 0, beta=1.0)
        tensor(0.0486)

    References:
        Zhou et al., "Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct Preference
        Optimization", arXiv 2310.03708; `modpo_loss` in the authors' trainer.
    """
    beta = checked_number("beta", beta, positive=True)
    pair_weight, count = _mean(**mean)
    w = checked_weights(weights)
    if objective not in range(len(w)):
        raise ValueError(
            f"`objective` must be the position of one of the {len(w)} weights; got {objective!r}."
        )
    if w[objective] == 0:
        raise ValueError(
            f"`weights` must be positive for `objective`, because MODPO divides by it; got {w} and "
            f"objective {objective}. Choose an objective with a positive weight."
        )
    pairs = len(log_probs.chosen)
    check_tensor("margins", margins, {"B": pairs, "m": len(w)})
    [found] = labelled("sign", sign, {"B": pairs}, log_probs.chosen, weights=pair_weight)
    chosen, rejected = log_probs.select(found.index).log_ratios()
    x = beta * (chosen - rejected)
    rewards = margins.index_select(0, found.index).to(x.dtype)
    for j, weight in enumerate(w):
        if j != objective and weight > 0:
            x = x - weight * rewards[:, j]
    losses = found.expectation(lambda label: -logsigmoid(label * x / w[objective]))
    return found.average(losses, count)


def _mean(
    pair_weight: Tensor | None = None, count: Tensor | float | None = None
) -> tuple[Tensor | None, Tensor | float | None]:
    return pair_weight, count
