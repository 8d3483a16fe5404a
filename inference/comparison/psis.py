"""What the tail of importance weights says of the proposal (Pareto smoothed importance sampling).

The largest M = min(P / 5, 3 sqrt(P)) of P weights are fitted by a generalised Pareto distribution,
``p(w > t) = (1 + k (t - u) / s)^(-1/k)`` above the next largest weight u, whose shape is k-hat: the
weights have 1 / k finite moments.  Below :func:`khat_threshold` what is averaged with these weights
can be relied on; above 0.7 it cannot, for any practical P, and the proposal is far from the
posterior where it matters.  A small k-hat does not prove a good proposal: a mode that no draw has
reached leaves no trace in the weights.

Sources: Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry, "Pareto smoothed
importance sampling" (2024); Jin Zhang, Michael Stephens, "A new and efficient estimation method for
the generalized Pareto distribution" (2009); Yuling Yao, Aki Vehtari, Daniel Simpson, Andrew Gelman,
"Yes, but did it work? Evaluating variational inference" (2018).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyrozoo.inference.comparison.importance import (
    importance_weights,
    iwae_bounds,
    joint_log_weights,
)
from pyrozoo.inference.reading import read_count

__all__ = [
    "BAD",
    "importance_weights",
    "iwae_bounds",
    "joint_log_weights",
    "khat_threshold",
    "pareto_khat",
    "smoothed",
]

LEAST = 5  # weights in a tail that is fitted; with 20 draws or fewer there are not as many
COLUMNS = 512  # fitted at once
EQUAL = 64 * torch.finfo(torch.float32).eps  # relative: weights this close are the same
BAD = 0.7  # a k-hat above which no practical number of draws suffices


def khat_threshold(num_particles: int) -> float:
    """The k-hat below which S draws suffice: ``min(1 - 1 / log10(S), 0.7)`` (Vehtari et al.)."""
    return min(1 - 1 / math.log10(read_count("num_particles", num_particles, 2)), BAD)


def pareto_khat(log_weights: Tensor, dim: int = 0) -> Tensor:
    """The shape of the tail of the weights along one dimension; the others remain.

    ``-inf``: the largest weights are equal up to float32 rounding, as those of an exact proposal.
    ``inf``: fewer than five draws stand out from the others, so that no tail can be fitted.
    ``nan``: there are 20 draws or fewer, no draw has any weight, or some weight is not a number.
    """
    flat = log_weights.movedim(dim, 0)
    columns = flat.reshape(len(flat), -1)
    return torch.cat([_psis(c)[1] for c in columns.split(COLUMNS, 1)]).reshape(flat.shape[1:])


def smoothed(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Log weights along one dimension, the tail replaced by quantiles of its fit, summing to one.

    Where :func:`pareto_khat` is not finite they are only normalised.
    """
    flat = log_weights.movedim(dim, 0)
    columns = flat.reshape(len(flat), -1)
    found = torch.cat([_psis(c)[0] for c in columns.split(COLUMNS, 1)], 1)
    return found.reshape(flat.shape).movedim(0, dim)


def _psis(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised smoothed log weights ``(P, rows)`` in the given precision, and k-hat."""
    x, count = log_weights.double(), len(log_weights)
    length = math.ceil(min(count / 5, 3 * count**0.5))
    top = x.max(0).values
    x = x - top
    unknown = ~x.isfinite().any(0) | x.isnan().any(0)
    if length < LEAST:
        shape = torch.full_like(top, torch.nan)
    else:
        ordered, index = x.sort(0)
        cut = ordered[-length - 1].clamp(min=math.log(np.finfo(float).tiny))
        tail = ordered[-length:]
        inside = tail > cut
        excess = torch.where(inside, cut.exp() * (tail - cut).expm1(), 0.0)
        shape, scale = _fit(excess, inside.sum(0))
        shape = torch.where(inside.sum(0) < LEAST, torch.inf, shape)
        fits = shape.isfinite() & (scale > 0)
        quantiles = _quantiles(inside, shape, scale) + cut.exp()
        better = quantiles.log().clamp(max=0)
        ordered[-length:] = torch.where(inside & fits, better, tail)
        x = torch.empty_like(x).scatter(0, index, ordered)
        same = tail[-1] - cut <= EQUAL * top.abs().clamp(min=1)
        shape = torch.where(same, -torch.inf, shape)
    shape = torch.where(unknown, torch.nan, shape)
    return (x - x.logsumexp(0)).to(log_weights.dtype), shape


def _fit(excess: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale of generalised Pareto distributions, ``(rows,)`` each.

    The posterior mean of ``b = -k / s`` on a grid, then k given it, drawn towards 0.5 as by ten
    observations more.

    Args:
        excess: over the threshold, ``(M, rows)``, ascending; zeros first where there are fewer.
        count: how many there are, ``(rows,)``.
    """
    n = count.clamp(min=1)
    quartile = excess.gather(0, (len(excess) - n + (n / 4 + 0.5).long() - 1).unsqueeze(0))
    points = 30 + n.sqrt().long()
    grid = torch.arange(1, int(points.max()) + 1, dtype=excess.dtype).to(excess).unsqueeze(1)
    b = (1 - (points / (grid - 0.5)).sqrt()) / (3 * quartile) + 1 / excess[-1]
    k = torch.log1p(-b.unsqueeze(1) * excess).sum(1) / n
    density = n * ((-b / k).log() - k - 1)
    weights = density.masked_fill(grid > points, -torch.inf).softmax(0)
    weights = weights * (weights >= 10 * torch.finfo(excess.dtype).eps)
    b = (b * weights).nan_to_num(0.0).sum(0) / weights.sum(0)
    k = torch.log1p(-b * excess).sum(0) / n
    return (n * k + 5) / (n + 10), -k / b


def _quantiles(inside: Tensor, shape: Tensor, scale: Tensor) -> Tensor:
    """The expected order statistics of a tail, ``(M, rows)``."""
    n = inside.sum(0)
    place = torch.arange(len(inside)).to(shape).unsqueeze(1) - (len(inside) - n)
    log_above = torch.log1p(-(place + 0.5) / n)
    flat = shape.abs() < torch.finfo(shape.dtype).eps
    curved = (-shape * log_above).expm1() / torch.where(flat, 1.0, shape)
    return scale * torch.where(flat, -log_above, curved)
