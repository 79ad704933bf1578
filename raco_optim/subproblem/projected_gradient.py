r"""The projected-gradient solver of the subproblem: pure torch, batched, without host sync.

It solves the dual in `certificate`. With e = 1 / D, the dual at a fixed level :math:`\nu` is

.. math:: \min_{q \ge 0} \; q^\top C q / 2 - (\nu e - b)^\top q,

and the projection on :math:`q \ge 0` is a clamp. So a step is a product and a clamp; on the
simplex it would need a sort. **A round** first takes some steps, which find the positive entries
of q long before their values. On this support q is linear in the level, :math:`q = \nu u + v` with
:math:`C u = e` and :math:`C v = -b`, and its length must be c, a quadratic equation for the level.
So one linear system gives q and the level, from which the next round starts. The support is
usually right after two or three rounds. Otherwise the rounds may cycle, so later rounds take more
steps, which converge at a fixed level.

**If** :math:`G_p = 0`, the norm has a kink and the level is zero. The same rounds at the fixed
level zero find the subgradient: they project g_0 on the cone of directions in which no loss rises.
Both problems form one batch of twice the size.

**The certificate holds** for any q: :math:`y = C q / \max(c, |q|)` has at most length 1, and any
such y bounds the minimum (`certificate`). The point with the smallest gap is returned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raco_optim._checks import ZERO

_TINY = 1e-300


def projected_gradient(H: Tensor, w: Tensor, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns p, ``[..., m]``, Phi(p) and the gap, ``[...]``; H is ``[..., m, m]``, w ``[m]``."""
    shape, m = H.shape[:-1], H.shape[-1]
    H = H.reshape(shape[:-1].numel(), m, m)
    norms = H.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = norms.amax(-1, keepdim=True)
    D = norms / scale.clamp(min=_TINY)
    D = torch.where(D > 1e-100, D, 0.0)
    e = torch.where(D > 0, 1 / D, 0.0)
    inverse = e / scale.clamp(min=_TINY)
    C = H * inverse[:, :, None] * inverse[:, None]
    C = ((C + C.mT) / 2).clamp(-1, 1)
    weighted = (D * w)[:, None]
    image = torch.bmm(weighted, C)
    squared_g0 = (weighted * image).sum(-1)
    moving = squared_g0 > ZERO * weighted.sum(-1) ** 2
    norm_g0 = torch.where(moving, squared_g0, 1.0).sqrt()
    b = image.squeeze(1) / norm_g0

    # Phi(e_i) = D_i (b_i + c): the lowest vertex is often the solution, otherwise the start.
    start, lowest = (D * (b + c)).min(-1, keepdim=True)
    vertex = torch.zeros_like(D).scatter(-1, lowest, 1.0)
    Q, at_zero = _dual_points(C, torch.stack([e, -b], -1), c * vertex, start, c)
    P = torch.cat([w.expand_as(D)[:, None], vertex[:, None], Q * e[:, None]], 1)
    total = P.sum(-1, keepdim=True)
    P = torch.where(total > 0, P / total, vertex[:, None])

    Q = torch.cat([Q, at_zero], 1)
    image = torch.bmm(Q, C)
    length = (Q * image).sum(-1, keepdim=True).clamp(min=0).sqrt()
    y = image / length.clamp(min=max(c, _TINY))
    D, b = D[:, None], b[:, None]
    bound = (D * (b + c * y)).amin(-1).amax(-1, keepdim=True)
    z = D * P
    image = torch.bmm(z, C)
    squared_norm = (z * image).sum(-1, keepdim=True)
    nonzero = squared_norm > ZERO * z.sum(-1, keepdim=True) ** 2
    direction = image / squared_norm.clamp(min=_TINY).sqrt()
    derivative = D * (b + c * torch.where(nonzero, direction, y[:, -1:]))
    value = (P * derivative).sum(-1)
    bound = torch.maximum(derivative.amin(-1), bound)
    gap, best = (value - bound).clamp(min=0).nan_to_num(torch.inf).min(-1, keepdim=True)
    p = P.gather(1, best[..., None].expand(-1, 1, m)).squeeze(1)

    # NaN in, NaN out: a certificate would be false.
    noise = torch.where(squared_g0.isfinite(), 0.0, torch.nan)
    p = torch.where(moving, p, w) + noise
    value = torch.where(moving, value.gather(1, best) * norm_g0 * scale**2, 0.0) + noise
    gap = torch.where(moving, gap, 0.0) + noise
    return p.reshape(shape), value.reshape(shape[:-1]), gap.reshape(shape[:-1])


def _dual_points(
    C: Tensor, right: Tensor, q: Tensor, level: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """Returns q of every round, ``[B, rounds, m]``, and q at the level zero, ``[B, 1, m]``.

    `right` holds e and -b, ``[B, m, 2]``. The rounds start at `q` and `level`.
    """
    size, m = q.shape
    # The second half of the batch stays at the level zero.
    q = torch.cat([q, torch.zeros_like(q)])[..., None]
    level = start = torch.cat([level, torch.zeros_like(level)])[..., None]
    falls = (torch.arange(2 * size, device=q.device) < size)[:, None, None]
    eye = torch.eye(m, dtype=C.dtype, device=C.device)
    # The fourth root of the largest row sum of C^4 is a tight bound of the largest eigenvalue.
    fourth = torch.bmm(C, C)
    fourth = torch.bmm(fourth, fourth)
    step = 1.5 / fourth.abs().sum(-1).amax(-1).sqrt().sqrt().clamp(min=_TINY)[:, None, None]
    inner, shifts = (eye - step * C).repeat(2, 1, 1), (step * right).repeat(2, 1, 1)
    ridged, right = (C + 4 * m * 2.0**-52 * eye).repeat(2, 1, 1), right.repeat(2, 1, 1)
    shift_e, shift_b = shifts.chunk(2, -1)
    points = []
    for round_ in range(5 + m // 11):
        shift = torch.addcmul(shift_b, shift_e, level)
        for _ in range(4 << round_ // 2):
            q = torch.baddbmm(shift, inner, q).clamp_(min=0)
        support = q > 0
        matrix = torch.where(support & support.mT, ridged, eye)
        solved, _ = torch.linalg.solve_ex(matrix, right * support)
        # |nu u + v|^2 = nu^2 eu + 2 nu ev + vv
        eu, ev, _, vv = torch.bmm(right.mT, solved).view(-1, 4, 1).chunk(4, 1)
        found = ((ev * ev - eu * (vv - c * c)).clamp(min=0).sqrt() - ev) / eu
        level = torch.where(falls & (found < start), found, level)
        u, v = solved.chunk(2, -1)
        q = torch.addcmul(v, u, level).clamp(min=0).nan_to_num(0.0)
        points.append(q)
    all_points = torch.cat(points, -1).mT
    return all_points[:size], all_points[size:, -1:]
