"""The objectives that RACO is compared with: AMoPO and MODPO."""

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
    r"""Computes the losses of AMoPO with static weights, which the caller multiplies and adds.

    .. math::
        L_k = -\log \sigma \left( \frac{\beta}{|y_w|} \log \pi(y_w | x)
            - \frac{\beta}{|y_l|} \log \pi(y_l | x) \right), \quad L = \sum_k \alpha_k L_k

    averaged over the pairs that objective k labels; :math:`y_w` is the completion that it
    prefers. That is SimPO with margin 0: neither a reference nor a reward model.

    The paper draws :math:`\alpha` anew in every step: it prompts the model once per objective,
    with the objective described in the prompt, fits a Gaussian to the token probabilities of each
    of these m forward passes, draws one number from each and takes their softmax. Here all
    objectives share one prompt and one forward pass, so the m Gaussians would be the same and
    their draws noise. Static weights, the user's, are also what RACO's authors compare with.

    Args:
        log_probs: Of B pairs, with their lengths.
        signs: ``[B, m]``, see `preference_losses`.
        beta: > 0. Per-token log-probabilities need a larger one than DPO's sums: RACO's authors
            tune it between 0.1 and 1.5.
        pair_weights: ``[B, m]``, see `preference_losses`.
        counts: ``[m]``, see `preference_losses`.

    Returns:
        m scalars, None for an objective without a label.

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
    """The keyword arguments that say what a mean runs over; `modpo_loss` has them."""

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
        L = -\log \sigma \left( \frac{s}{w_k} \Big( \beta (\rho_{chosen} - \rho_{rejected})
            - \sum_{j \ne k} w_j \, (r_{j, chosen} - r_{j, rejected}) \Big) \right),
        \quad \rho = \log \pi - \log \pi_{ref}

    averaged over the pairs that objective k labels. With weight 1 on k it is DPO.

    Args:
        log_probs: Of B pairs, with those of the reference.
        sign: Labels of objective k, ``[B]``, see `preference_losses`.
        margins: Reward of the chosen completion minus that of the rejected one, for every
            objective, ``[B, m]``, as reward models that the user has give them. Finite where the
            pair is labelled. Not read: column k and the columns with weight 0.
        weights: w, m numbers on the simplex, in the order of the columns.
        objective: k, the position of the objective with preferences; its weight must not be 0.
        beta: Strength of the tie to the reference, > 0.
        pair_weight (Tensor | None): Weights of the pairs, ``[B]``, see `preference_losses`.
        count (Tensor | float | None): Divide by this instead of the sum of the weights, see
            `preference_losses`.

    Returns:
        A scalar, or None where no pair is labelled.

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
            f"`weights` must not be 0 for `objective`, which MODPO divides by; got {w} and "
            f"objective {objective}. Choose an objective with a weight."
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
