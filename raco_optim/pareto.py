"""Quality of trade-offs: Pareto front, hypervolume, distance to a front, Pareto-criticality.

All objectives are minimised. Everything runs on the CPU in float64, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt
import torch
from torch import Tensor

from raco_optim.subproblem import min_norm_point


def pareto_front(points: Tensor | npt.ArrayLike) -> Tensor:
    r"""Marks the points that no other point dominates.

    .. math::
        a \text{ dominates } b \Leftrightarrow
            a_i \le b_i \text{ for all } i \text{ and } a \ne b

    Equal points do not dominate each other: all copies of a point on the front are marked.

    Args:
        points: Objective values, ``[n, m]``, finite; n may be 0.

    Returns:
        Mask of the non-dominated points, ``[n]``, bool: ``points[pareto_front(points)]``.

    Raises:
        ValueError: `points` is not a finite real ``[n, m]`` array.

    Example:
        >>> from raco_optim.pareto import pareto_front
        >>> pareto_front([[1.0, 3.0], [2.0, 2.0], [2.0, 3.0], [1.0, 3.0]])
        tensor([ True,  True, False,  True])

    References:
        Kung, Luccio and Preparata, "On finding the maxima of a set of vectors", 1975.
    """
    # In lexicographic order a dominated point comes after its dominator, so the first remaining
    # point is on the front. Time n * |front| * m, memory n * m.
    distinct, position = torch.unique(_as_points(points, "points"), dim=0, return_inverse=True)
    on_front = torch.zeros(len(distinct), dtype=torch.bool)
    left = torch.arange(len(distinct))
    while len(left):
        on_front[left[0]] = True
        left = left[(distinct[left] < distinct[left[0]]).any(dim=1)]
    return on_front[position]


def hypervolume(points: Tensor | npt.ArrayLike, reference: Tensor | npt.ArrayLike) -> Tensor:
    r"""Computes the volume between the points and the reference that the points dominate.

    .. math:: HV = \mathrm{vol} \bigcup_{a} [a_1, r_1] \times \cdots \times [a_m, r_m]

    Larger is better. Dominated points do not count, nor do points that are not below the reference
    in every objective. The value depends on the reference: use the same one in comparisons.

    Time is O(n log n) for one or two objectives. More need the optional package moocore:
    O(n log n) for three, O(n^2) for four, and up to O(n^(m-2)) for more (on a sphere with m = 8,
    100 points take 0.8 s and 200 points 19 s).

    Args:
        points: Objective values, ``[n, m]``, finite; n may be 0.
        reference: Upper bound of every objective, ``[m]``, finite.

    Returns:
        The hypervolume, a float64 scalar in units of the product of the objectives.

    Raises:
        ValueError: `points` or `reference` is not a finite real array of the right shape.
        ImportError: There are more than two objectives and moocore is not installed.

    Example:
        >>> from raco_optim.pareto import hypervolume
        >>> hypervolume([[1.0, 3.0], [2.0, 2.0]], reference=[4.0, 4.0])
        tensor(5., dtype=torch.float64)

    References:
        Fonseca et al., "An improved dimension-sweep algorithm for the hypervolume indicator", 2006.
    """
    rows = _as_points(points, "points")
    bound = _as_finite(reference, "reference")
    if bound.shape != rows.shape[1:]:
        raise ValueError(
            f"`reference` must have shape {list(rows.shape[1:])}, one bound per objective of "
            f"`points`; got {list(bound.shape)}. Pass the worst values that should count."
        )
    # Relative to the reference, offsets of the objectives cancel before any product.
    sides = bound - rows[(rows < bound).all(dim=1)]
    if len(bound) > 2:
        return _moocore_hypervolume(sides)
    widths, order = sides[:, 0].sort(descending=True)
    heights = sides[order, 1] if len(bound) == 2 else torch.ones_like(widths)
    # A staircase: each strip between two widths has the height of the highest box of that width.
    strips = widths - torch.cat([widths[1:], widths.new_zeros(1)])
    return (strips * heights.cummax(dim=0).values).sum()


def distance_to_front(points: Tensor | npt.ArrayLike, front: Tensor | npt.ArrayLike) -> Tensor:
    r"""Computes the Euclidean distance of each point to the nearest point of a front.

    .. math:: d(a) = \min_{b \in \text{front}} \|a - b\|_2

    The mean is the generational distance. With swapped arguments it is the inverted generational
    distance of Coello Coello and Reyes Sierra (2004), ``distance_to_front(front, points).mean()``.
    If `front` is a sample, the true front can be closer by at most the spacing of the sample.

    Args:
        points: Objective values, ``[n, m]``, finite; n may be 0.
        front: Points of the reference front, ``[k, m]`` with k >= 1, finite.

    Returns:
        Distances, ``[n]``, float64. Memory is O(nk).

    Raises:
        ValueError: `points` or `front` is not a finite real array of the right shape.

    Example:
        >>> from raco_optim.pareto import distance_to_front
        >>> distance_to_front([[0.0, 0.0], [3.0, 1.0]], front=[[0.0, 1.0], [3.0, 5.0]])
        tensor([1., 3.], dtype=torch.float64)
    """
    rows, targets = _as_points(points, "points"), _as_points(front, "front")
    if not len(targets) or targets.shape[1] != rows.shape[1]:
        raise ValueError(
            f"`front` must have shape [k, {rows.shape[1]}] with k >= 1, the objectives of "
            f"`points`; got {list(targets.shape)}."
        )
    # By default cdist expands |a|^2 - 2ab + |b|^2 above 25 rows, which cancels near the front.
    return torch.cdist(rows, targets, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)


def pareto_criticality(gram: Tensor | Sequence[Sequence[float]]) -> Tensor:
    r"""Computes the distance from Pareto-criticality from the Gram matrix of the gradients.

    .. math:: M = \min_{p \in \Delta} \| \sum_i p_i g_i \| = \min_{p \in \Delta} \sqrt{p^\top H p}

    M = 0 if and only if no direction decreases all objectives to first order. This is necessary
    for a Pareto optimum and, if the objectives are convex, sufficient for a weak one. M does not
    depend on the weights. H holds squares, so the resolution of M is about ``1e-8 max_i |g_i|``.

    Args:
        gram: Gram matrix H of the gradients, ``[m, m]``, as from `gram_matrix`.

    Returns:
        M, a float64 scalar in units of a gradient's norm.

    Raises:
        ValueError: `gram` is not a Gram matrix (shape, NaN or Inf, asymmetric, indefinite).

    Example:
        >>> from raco_optim.pareto import pareto_criticality
        >>> pareto_criticality([[4.0, 0.0], [0.0, 4.0]])  # orthogonal, both of norm 2
        tensor(1.4142, dtype=torch.float64)

    References:
        Desideri, "Multiple-gradient descent algorithm", 2012; Theorem 3.1 of arXiv 2602.02495.
    """
    return min_norm_point(gram).norm.cpu()


def _as_points(values: Tensor | npt.ArrayLike, argument: str) -> Tensor:
    points = _as_finite(values, argument)
    if points.ndim != 2 or points.shape[1] == 0:
        raise ValueError(
            f"`{argument}` must have shape [n, m], one row per point and m >= 1 objectives; got "
            f"{list(points.shape)}. Pass a single point as `{argument}[None]`."
        )
    return points


def _as_finite(values: Tensor | npt.ArrayLike, argument: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{argument}` must be an array of numbers; got {values!r}. Pass rows of equal length."
        ) from error
    if tensor.is_complex():
        raise ValueError(f"`{argument}` must be real; got {tensor.dtype}. Pass its real part.")
    bad = tensor[~tensor.isfinite()]
    if len(bad):
        raise ValueError(
            f"`{argument}` must be finite; got {len(bad)} NaN or Inf. Leave out diverged runs."
        )
    return tensor.to(torch.float64)


def _moocore_hypervolume(sides: Tensor) -> Tensor:
    try:
        import moocore
    except ImportError as error:
        raise ImportError(
            "`hypervolume` must have moocore installed for three objectives or more; got none. "
            'Run `pip install "raco_optim[pareto]"`.'
        ) from error
    volume = moocore.hypervolume(-sides.numpy(), ref=[0.0] * sides.shape[1])
    return torch.tensor(volume, dtype=torch.float64)
