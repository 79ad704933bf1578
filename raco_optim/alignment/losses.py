"""Preference losses of m objectives that judge the same pairs of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raco_optim._checks import checked_choice
from raco_optim.alignment._checks import check_tensor, checked_number
from raco_optim.alignment.labels import average, labelled
from raco_optim.alignment.log_probs import PairLogProbs

if TYPE_CHECKING:
    from typing_extensions import Unpack

PreferenceLoss = Literal["dpo", "ipo", "simpo", "kto"]
LOSSES: tuple[PreferenceLoss, ...] = ("dpo", "ipo", "simpo", "kto")
_PER_TOKEN = ("ipo", "simpo")
_SMOOTHED = ("dpo", "simpo")


class LossForm(TypedDict, total=False):
    """The keyword arguments that say what a preference loss is; `preference_losses` has them."""

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
    counts: Tensor | Sequence[float] | None = None,
    **form: Unpack[LossForm],
) -> list[Tensor | None]:
    r"""Computes one loss per objective: the mean over the pairs that the objective labels.

    .. math:: L_k = \frac{1}{n_k} \sum_{b : s_{bk} \ne 0} \ell(b, s_{bk}),
        \quad n_k = |\{b : s_{bk} \ne 0\}|

    With :math:`\rho = \log \pi - \log \pi_{ref}`, the log-ratio of a completion, the loss of a pair
    :math:`\ell` is

    .. math::
        \Delta &= s \, (\rho_{chosen} - \rho_{rejected}) \\
        \text{dpo} &: -(1 - \epsilon) \log \sigma(\beta \Delta)
            - \epsilon \log \sigma(-\beta \Delta) \\
        \text{ipo} &: (\Delta - 1 / (2 \beta))^2, \quad \rho \text{ per token} \\
        \text{simpo} &: \text{dpo with } \beta \Delta - \gamma \text{ for } \beta \Delta,
            \quad \rho = \log \pi \text{ per token} \\
        \text{kto} &: \tfrac12 [\sigma(-\beta (\rho_{winner} - z_{loser}))
            + \sigma(-\beta (z_{winner} - \rho_{loser}))]

    where z is the mean of :math:`\rho` over the winners (losers) of the objective in the call, at
    least 0 and without a gradient. All objectives share the log-probabilities, so one forward pass
    serves them all.

    A tie and a missing label are both 0 in `signs`. Such a pair is in neither sum nor count, and
    its log-probabilities, NaN or not, reach neither loss nor gradient.

    Signs on an accelerator are copied to the host, once per call; it is the only wait. Signs on
    the CPU cost none.

    Args:
        log_probs: Of B pairs.
        signs: ``[B, m]``, any real dtype: +1 where the objective prefers the chosen completion,
            -1 where it prefers the rejected one, 0 for a tie or no label.
        counts: ``[m]``, > 0: divide by these instead of :math:`n_k`. With the labelled pairs of
            a whole batch, the losses of its micro-batches add up to the loss of the batch, and
            so do their gradients; not for KTO, whose z is estimated from the pairs of a call.
        loss (str): ``"dpo"`` (default), ``"ipo"``, ``"simpo"`` or ``"kto"`` (pairs as one
            desirable and one undesirable example each; see `kto_unpaired_loss` for examples that
            are no pairs).
        beta (float): Strength of the tie to the reference, > 0, default 0.1; for IPO the tau of
            its paper.
        label_smoothing (float): epsilon, in [0, 0.5), default 0: the share of labels that is
            taken to be wrong (conservative DPO). For DPO and SimPO. It would do nothing new in
            IPO, where it amounts to the beta ``beta / (1 - 2 * label_smoothing)``.
        gamma (float): Target margin of SimPO, >= 0, default 0, in units of :math:`\beta \Delta`.
        length_normalized (bool | None): Log-ratios per token. None (default) is the
            custom of the loss: yes for IPO (as its authors do, though not in the paper's formula)
            and SimPO, no for DPO and KTO.
        reference_free (bool): Take the reference's log-probabilities for 0; default False. SimPO
            always does.

    Returns:
        m scalars of the dtype of the log-probabilities, None for an objective without a label.

    Raises:
        TypeError: `signs` is not a tensor.
        ValueError: An argument is out of its range or of the wrong shape, or `log_probs` lacks
            what the loss needs.

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

    References:
        DPO: Rafailov et al., arXiv 2305.18290, Eq. 7. Label smoothing: Mitchell, "A note on DPO
        with noisy preferences & relationship to IPO", 2023, Eq. 3. IPO: Azar et al., arXiv
        2310.12036, Eq. 17. SimPO: Meng et al., arXiv 2405.14734. KTO: Ethayarajh et al., arXiv
        2402.01306; for pairs as TRL's former ``loss_type="kto_pair"``.
    """
    settings = _checked(**form)
    shape = {"B": len(log_probs.chosen), "m": None}
    columns = labelled("signs", signs, shape, log_probs.chosen)
    if isinstance(counts, Tensor):
        check_tensor("counts", counts, {"m": len(columns)})
    elif counts is not None and len(counts) != len(columns):
        raise ValueError(
            f"`counts` must hold one number per objective, {len(columns)}; got {len(counts)}."
        )
    losses = (_losses(log_probs.select(index), sign, settings) for index, sign in columns)
    return [average(x, None if counts is None else counts[k]) for k, x in enumerate(losses)]


def pair_losses(
    log_probs: PairLogProbs,
    sign: Tensor,
    **form: Unpack[LossForm],
) -> Tensor:
    """Computes the loss of each pair for one objective.

    Args:
        log_probs: Of B pairs.
        sign: The objective's column of signs, ``[B]``.
        **form: As in `preference_losses`.

    Returns:
        Losses, ``[B]``: 0, without a gradient, where the sign is 0.

    Raises:
        TypeError: `sign` is not a tensor.
        ValueError: See `preference_losses`.

    Example:
        >>> import torch
        >>> from raco_optim.alignment import PairLogProbs
        >>> from raco_optim.alignment.losses import pair_losses
        >>> log_probs = PairLogProbs(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0]))
        >>> pair_losses(log_probs, torch.tensor([1, 0]), beta=1.0, reference_free=True)
        tensor([0.1269, 0.0000])
    """
    settings = _checked(**form)
    [(index, labels)] = labelled("sign", sign, {"B": len(log_probs.chosen)}, log_probs.chosen)
    losses = _losses(log_probs.select(index), labels, settings)
    return losses.new_zeros(len(sign)).index_copy(0, index, losses)


def reward_margins(
    log_probs: PairLogProbs,
    sign: Tensor,
    *,
    loss: PreferenceLoss = "dpo",
    beta: float = 0.1,
    length_normalized: bool | None = None,
    reference_free: bool = False,
) -> Tensor:
    r"""Measures by how much the policy prefers what the objective prefers.

    .. math:: \beta \Delta = s \, (r_{chosen} - r_{rejected})

    with the implicit rewards that the loss compares. Above 0 the policy orders the pair as the
    objective does, so the share of such pairs is the accuracy.

    Args:
        log_probs: Of B pairs.
        sign: The objective's column of signs, ``[B]``.
        loss: As in `preference_losses`.
        beta: As in `preference_losses`.
        length_normalized: As in `preference_losses`.
        reference_free: As in `preference_losses`.

    Returns:
        Margins of the labelled pairs, in their order, ``[n]``; detached.

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
    [(index, labels)] = labelled("sign", sign, {"B": len(log_probs.chosen)}, log_probs.chosen)
    with torch.no_grad():
        chosen, rejected = log_probs.select(index).log_ratios(
            length_normalized=settings.length_normalized, reference_free=settings.reference_free
        )
        return settings.beta * (labels * (chosen - rejected))


class _Settings(NamedTuple):
    loss: PreferenceLoss
    beta: float
    label_smoothing: float
    gamma: float
    length_normalized: bool
    reference_free: bool


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
    if label_smoothing and loss not in _SMOOTHED:
        remedy = "'dpo' and 'simpo' have label smoothing."
        if loss == "ipo":
            remedy = f"beta={beta / (1 - 2 * label_smoothing):g} has the effect that it would have."
        raise ValueError(
            f"`label_smoothing` must be 0 for loss {loss!r}; got {label_smoothing}. {remedy}"
        )
    if gamma and loss != "simpo":
        raise ValueError(f"`gamma` must be 0 for loss {loss!r}; got {gamma}. 'simpo' has a margin.")
    if length_normalized is None:
        length_normalized = loss in _PER_TOKEN
    return _Settings(
        loss, beta, label_smoothing, gamma, length_normalized, reference_free or loss == "simpo"
    )


def _losses(pairs: PairLogProbs, sign: Tensor, settings: _Settings) -> Tensor:
    """Returns the losses of pairs all of which are labelled."""
    chosen, rejected = pairs.log_ratios(
        length_normalized=settings.length_normalized, reference_free=settings.reference_free
    )
    beta, epsilon = settings.beta, settings.label_smoothing
    if settings.loss == "kto":
        winner = torch.where(sign > 0, chosen, rejected)
        loser = torch.where(sign > 0, rejected, chosen)
        # Each half judges the other: the KL of the losers is the winners' point of reference.
        z_winner, z_loser = (x.detach().mean().clamp(min=0) for x in (winner, loser))
        desirable = torch.sigmoid(-beta * (winner - z_loser))
        undesirable = torch.sigmoid(-beta * (z_winner - loser))
        return (desirable + undesirable) / 2
    delta = sign * (chosen - rejected)
    if settings.loss == "ipo":
        return (delta - 1 / (2 * beta)).square()
    x = beta * delta - settings.gamma
    losses = -logsigmoid(x)
    return (1 - epsilon) * losses - epsilon * logsigmoid(-x) if epsilon else losses
