"""KTO on single completions instead of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from raco_optim.alignment._checks import check_log_probs, check_tensor, checked_number
from raco_optim.alignment.labels import labelled


def kto_unpaired_loss(
    policy: Tensor,
    reference: Tensor,
    labels: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor | None:
    r"""Computes the mean KTO loss of completions that are labelled desirable or undesirable.

    .. math::
        \ell = \begin{cases}
            \lambda_D \, (1 - \sigma(\beta (\rho - z))) & \text{desirable} \\
            \lambda_U \, (1 - \sigma(\beta (z - \rho))) & \text{undesirable}
        \end{cases}, \quad \rho = \log \pi - \log \pi_{ref}

    Args:
        policy: Log-probabilities of N completions under the policy, ``[N]``.
        reference: The same under the frozen reference, ``[N]``.
        labels: +1 desirable, -1 undesirable, 0 no label, ``[N]``, any real dtype.
        kl: z, a scalar tensor: the mean of :math:`\log \pi(y' | x) - \log \pi_{ref}(y' | x)` over
            prompts x with the completion y' of another prompt (in TRL, the next one in the batch).
            The caller estimates it, because it takes another forward pass. Negative values count
            as 0; no gradient flows through it.
        beta: Strength of the tie to the reference, > 0.
        desirable_weight: :math:`\lambda_D` >= 0.
        undesirable_weight: :math:`\lambda_U` >= 0.

    Returns:
        A scalar, or None if no completion is labelled.

    Raises:
        TypeError: An argument is not a tensor where it must be.
        ValueError: An argument is out of its range or of the wrong shape.

    Example:
        >>> import torch
        >>> from raco_optim.alignment import kto_unpaired_loss
        >>> policy, reference = torch.tensor([-10.0, -20.0]), torch.tensor([-11.0, -19.0])
        >>> kto_unpaired_loss(policy, reference, torch.tensor([1, -1]), torch.tensor(0.0), beta=1.0)
        tensor(0.2689)

    References:
        Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv
        2402.01306.
    """
    beta = checked_number("beta", beta, positive=True)
    desirable_weight = checked_number("desirable_weight", desirable_weight)
    undesirable_weight = checked_number("undesirable_weight", undesirable_weight)
    check_log_probs("policy", policy, {"N": None})
    shape = {"N": len(policy)}
    check_log_probs("reference", reference, shape)
    check_tensor("kl", kl, {})
    [found] = labelled("labels", labels, shape, policy, soft=False)
    index, sign = found.index, found.label
    log_ratio = policy.index_select(0, index) - reference.index_select(0, index)
    weight = torch.full_like(sign, undesirable_weight).masked_fill(sign > 0, desirable_weight)
    z = kl.detach().clamp(min=0)
    return found.average(weight * torch.sigmoid(-beta * (sign * (log_ratio - z))), None)
