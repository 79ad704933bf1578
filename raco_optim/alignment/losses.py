"""Preference losses of several objectives on the same pairs of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from raco_optim._checks import checked_choice
from raco_optim.alignment._checks import check_tensor, checked_number
from raco_optim.alignment.labels import Labelled, labelled
from raco_optim.alignment.log_probs import PairLogProbs

if TYPE_CHECKING:
    from typing_extensions import Unpack

PreferenceLoss = Literal[
    "dpo", "ipo", "simpo", "kto", "hinge", "robust", "apo_zero", "apo_down", "bco", "sft"
]
LOSSES: tuple[PreferenceLoss, ...] = get_args(PreferenceLoss)
REFERENCE_FREE = ("simpo", "sft")
_PER_TOKEN = ("ipo", *REFERENCE_FREE)
SMOOTHED = ("dpo", "simpo", "robust")


class LossForm(TypedDict, total=False):
    """Keyword arguments of `preference_losses` that define the loss of a pair."""

    loss: PreferenceLoss
    beta: float
    label_smoothing: float
    gamma: float
    length_normalized: bool | None
    reference_free: bool


def preference_losses(
    log_probs: PairLogProbs,
    signs: Tensor,
    *,
    pair_weights: Tensor | None = None,
    counts: Tensor | Sequence[float] | None = None,
    **form: Unpack[LossForm],
) -> list[Tensor | None]:
    r"""Computes one loss per objective: the mean over the pairs that the objective labels.

    .. math:: L_k = \frac{1}{n_k} \sum_{b : s_{bk} \ne 0} v_{bk} \, \ell(b, s_{bk}),
        \quad n_k = \sum_{b : s_{bk} \ne 0} v_{bk}

    with pair weights v, 1 by default. The loss :math:`\ell` of a pair, written with the log-ratio
    :math:`\rho = \log \pi - \log \pi_{ref}` of a completion, is

    .. math::
        \Delta &= s \, (\rho_{chosen} - \rho_{rejected}) = \rho_{winner} - \rho_{loser} \\
        \text{dpo} &: -(1 - \epsilon) \log \sigma(\beta \Delta)
            - \epsilon \log \sigma(-\beta \Delta) \\
        \text{robust} &: \frac{-(1 - \epsilon) \log \sigma(\beta \Delta)
            + \epsilon \log \sigma(-\beta \Delta)}{1 - 2 \epsilon} \\
        \text{hinge} &: \max(0, 1 - \beta \Delta) \\
        \text{ipo} &: (\Delta - 1 / (2 \beta))^2, \quad \rho \text{ per token} \\
        \text{simpo} &: \text{dpo with } \beta \Delta - \gamma \text{ for } \beta \Delta,
            \quad \rho = \log \pi \text{ per token} \\
        \text{kto} &: \tfrac12 [\sigma(-\beta (\rho_{winner} - z_{loser}))
            + \sigma(-\beta (z_{winner} - \rho_{loser}))] \\
        \text{apo\_zero} &: 1 - \sigma(\beta \rho_{winner}) + \sigma(\beta \rho_{loser}) \\
        \text{apo\_down} &: \sigma(\beta \rho_{winner}) + 1 - \sigma(\beta \Delta) \\
        \text{bco} &: -\log \sigma(\beta \rho_{winner})
            - \log \sigma(-\beta \rho_{loser}) \\
        \text{sft} &: -\rho_{winner}, \quad \rho = \log \pi \text{ per token}

    where z is the mean of :math:`\rho` over the objective's winners (losers) in this call, at
    least 0 and without a gradient. All objectives share the log-probabilities of one forward pass.

    A label s between -1 and 1 is uncertain: the chosen completion is better with probability
    :math:`(1 + s) / 2`, and the loss is its expectation,

    .. math:: \ell(b, s) = \frac{1 + s}{2} \ell(b, +1) + \frac{1 - s}{2} \ell(b, -1).

    A sign of 0 means a tie or no label. Such a pair does not count, and its log-probabilities
    affect neither the loss nor the gradient, even if they are NaN. A small label is different from
    0: 0.01 means that both completions are about equally good, so DPO pulls :math:`\Delta` towards
    0.

    Signs on an accelerator are copied to the CPU once per call; nothing else waits for a device.

    Args:
        log_probs: Log-probabilities of B pairs.
        signs: ``[B, m]``, any real dtype, in [-1, 1]: +1 if the objective prefers the chosen
            completion, -1 if it prefers the rejected one, 0 for a tie or no label.
        pair_weights: v, ``[B, m]``, >= 0. A pair with weight 2 counts as two pairs, and one with
            weight 0 as unlabelled. Default: 1.
        counts: ``[m]``, > 0: divisors instead of :math:`n_k`. If they are the sums of the weights
            over a batch, the losses and gradients of its micro-batches add up to those of the
            batch, except for KTO, which estimates z in each call.
        loss (str): ``"dpo"`` (default) or another name above. ``"kto"`` treats a pair as a
            desirable and an undesirable example; see `kto_unpaired_loss` for single examples.
            ``"sft"`` is a term to add to another loss (RPO, MPO).
        beta (float): Strength of the tie to the reference, > 0, default 0.1; tau in the IPO paper.
        label_smoothing (float): epsilon, in [0, 0.5), default 0: the fraction of labels assumed
            to be wrong, for ``"dpo"`` (conservative DPO), ``"simpo"`` and ``"robust"``. For IPO,
            use the equivalent ``beta / (1 - 2 * label_smoothing)``.
        gamma (float): Target margin of SimPO, >= 0, default 0, in units of :math:`\beta \Delta`.
        length_normalized (bool | None): Whether to use log-ratios per token. None (default) means
            True for IPO (like its authors, unlike the formula in their paper), SimPO and SFT, and
            False for the others.
        reference_free (bool): Whether to use 0 as the reference's log-probabilities. Default:
            False; always True for SimPO and SFT.

    Returns:
        m scalars of the dtype of the log-probabilities; None for an objective without a label.

    Raises:
        TypeError: `signs` or `pair_weights` is not a tensor.
        ValueError: An argument is out of its range or of the wrong shape, or `log_probs` lacks
            the reference or the lengths that the loss needs.

    Example:
        >>> import torch
        >>> from raco_optim.alignment import PairLogProbs, preference_losses
        >>> log_probs = PairLogProbs(
        ...     chosen=torch.tensor([-10.0, -20.0]),
        ...     rejected=torch.tensor([-12.0, -15.0]),
        ...     ref_chosen=torch.tensor([-11.0, -20.0]),
        ...     ref_rejected=torch.tensor([-11.0, -14.0]),
        ... )
        >>> helpful_short = torch.tensor([[1, -1], [1, 0]])
        >>> preference_losses(log_probs, helpful_short, beta=0.5)
        [tensor(0.3937), tensor(1.3133)]
        >>> preference_losses(log_probs, torch.tensor([[0.5], [0.0]]), beta=0.5)
        [tensor(0.5633)]

    References:
        DPO: Rafailov et al., arXiv 2305.18290, Eq. 7. Label smoothing: Mitchell, "A note on DPO
        with noisy preferences & relationship to IPO", 2023, Eq. 3. Robust: Chowdhury et al., arXiv
        2403.00409. Hinge: Zhao et al. (SLiC), arXiv 2305.10425, on log-ratios as in Liu et al.
        (RSO), arXiv 2309.06657. IPO: Azar et al., arXiv 2310.12036, Eq. 17. SimPO: Meng et al.,
        arXiv 2405.14734. KTO: Ethayarajh et al., arXiv 2402.01306; for pairs as TRL's former
        ``loss_type="kto_pair"``. APO: D'Oosterlinck et al., arXiv 2408.06266, Eq. 7 and 8. BCO:
        Jung et al., arXiv 2404.04656, without the reward shift, as TRL's ``"bco_pair"``. SFT: the
        term in RPO (Pang et al., arXiv 2404.19733) and MPO (Wang et al., arXiv 2411.10442).
    """
    settings = _checked(**form)
    pairs = log_probs.chosen
    columns = labelled("signs", signs, {"B": len(pairs), "m": None}, pairs, weights=pair_weights)
    if isinstance(counts, Tensor):
        check_tensor("counts", counts, {"m": len(columns)})
    elif counts is not None and len(counts) != len(columns):
        raise ValueError(
            f"`counts` must hold one number per objective, {len(columns)}; got {len(counts)}."
        )
    return [
        found.average(_losses(log_probs, found, settings), None if counts is None else counts[k])
        for k, found in enumerate(columns)
    ]


def pair_losses(
    log_probs: PairLogProbs,
    sign: Tensor,
    **form: Unpack[LossForm],
) -> Tensor:
    """Computes the loss of each pair for one objective, ``[B]``; 0 where the sign is 0."""
    settings = _checked(**form)
    [found] = labelled("sign", sign, {"B": len(log_probs.chosen)}, log_probs.chosen)
    losses = _losses(log_probs, found, settings)
    return losses.new_zeros(len(sign)).index_copy(0, found.index, losses)


def reward_margins(
    log_probs: PairLogProbs,
    sign: Tensor,
    *,
    loss: PreferenceLoss = "dpo",
    beta: float = 0.1,
    length_normalized: bool | None = None,
    reference_free: bool = False,
) -> Tensor:
    r"""Computes the reward margins of the pairs that an objective labels.

    .. math:: \beta \Delta = s \, (r_{chosen} - r_{rejected})

    with the implicit rewards r of the loss and the sign s of the label. The margin is positive if
    the policy prefers the same completion as the objective; the accuracy is the fraction of
    positive margins.

    Args:
        log_probs: Log-probabilities of B pairs.
        sign: The objective's column of signs, ``[B]``.
        loss: As in `preference_losses`.
        beta: As in `preference_losses`.
        length_normalized: As in `preference_losses`.
        reference_free: As in `preference_losses`.

    Returns:
        Margins of the labelled pairs, in order, ``[n]``; detached.

    Raises:
        TypeError: `sign` is not a tensor.
        ValueError: See `preference_losses`.

    Example:
        >>> import torch
        >>> from raco_optim.alignment import PairLogProbs, reward_margins
        >>> log_probs = PairLogProbs(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0]))
        >>> reward_margins(log_probs, torch.tensor([0, -1]), beta=1.0, reference_free=True)
        tensor([-2.])
    """
    settings = _checked(loss, beta, 0.0, 0.0, length_normalized, reference_free)
    [found] = labelled("sign", sign, {"B": len(log_probs.chosen)}, log_probs.chosen)
    with torch.no_grad():
        chosen, rejected = settings.log_ratios(log_probs.select(found.index))
        return settings.beta * (found.label.sign() * (chosen - rejected))


class _Settings(NamedTuple):
    loss: PreferenceLoss
    beta: float
    label_smoothing: float
    gamma: float
    length_normalized: bool
    reference_free: bool

    def log_ratios(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        return pairs.log_ratios(
            length_normalized=self.length_normalized, reference_free=self.reference_free
        )


def _checked(
    loss: PreferenceLoss = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    length_normalized: bool | None = None,
    reference_free: bool = False,
) -> _Settings:
    checked_choice("loss", loss, LOSSES)
    beta = checked_number("beta", beta, positive=True)
    label_smoothing = checked_number("label_smoothing", label_smoothing, below=0.5)
    gamma = checked_number("gamma", gamma)
    if label_smoothing and loss not in SMOOTHED:
        remedy = f"{', '.join(map(repr, SMOOTHED))} support it."
        if loss == "ipo":
            remedy = f"Use beta={beta / (1 - 2 * label_smoothing):g}, which has the same effect."
        raise ValueError(
            f"`label_smoothing` must be 0 for loss {loss!r}; got {label_smoothing}. {remedy}"
        )
    if gamma and loss != "simpo":
        raise ValueError(f"`gamma` must be 0 for loss {loss!r}; got {gamma}. 'simpo' supports it.")
    if length_normalized is None:
        length_normalized = loss in _PER_TOKEN
    reference_free = reference_free or loss in REFERENCE_FREE
    return _Settings(loss, beta, label_smoothing, gamma, length_normalized, reference_free)


def _losses(log_probs: PairLogProbs, found: Labelled, settings: _Settings) -> Tensor:
    """Returns the losses of the pairs that an objective labels."""
    loss, beta, epsilon = settings.loss, settings.beta, settings.label_smoothing
    chosen, rejected = settings.log_ratios(log_probs.select(found.index))

    def of_signs(sign: Tensor) -> Tensor:
        delta = sign * (chosen - rejected)
        if loss == "hinge":
            return relu(1 - beta * delta)
        if loss == "ipo":
            return (delta - 1 / (2 * beta)).square()
        if loss in ("dpo", "simpo", "robust"):
            x = beta * delta - settings.gamma
            losses = -logsigmoid(x)
            if not epsilon:
                return losses
            if loss == "robust":
                return ((1 - epsilon) * losses + epsilon * logsigmoid(-x)) / (1 - 2 * epsilon)
            return (1 - epsilon) * losses - epsilon * logsigmoid(-x)
        winner = torch.where(sign > 0, chosen, rejected)
        loser = torch.where(sign > 0, rejected, chosen)
        if loss == "sft":
            return -winner
        if loss == "bco":
            return -logsigmoid(beta * winner) - logsigmoid(-beta * loser)
        if loss == "apo_zero":
            return torch.sigmoid(-beta * winner) + torch.sigmoid(beta * loser)
        if loss == "apo_down":
            return torch.sigmoid(beta * winner) + torch.sigmoid(-beta * delta)
        # KTO: the KL of the losers is the reference point of the winners, and the other way round.
        desirable = torch.sigmoid(-beta * (winner - z_loser))
        undesirable = torch.sigmoid(-beta * (z_winner - loser))
        return (desirable + undesirable) / 2

    if loss == "kto":

        def kl(a: Tensor, b: Tensor) -> Tensor:
            return found.mean(found.expectation(lambda sign: torch.where(sign > 0, a, b))).clamp(0)

        z_winner, z_loser = (
            kl(chosen.detach(), rejected.detach()),
            kl(rejected.detach(), chosen.detach()),
        )
    return found.expectation(of_signs)
