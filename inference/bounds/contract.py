"""Exact sums over discrete sites.

All factors that touch a site are added first and one ``logsumexp`` is taken.  (Contracting them in
pairs, each shifted by its own maximum, loses value and gradient in float32 as soon as two pairs
prefer different values by more than about 16 nats; ``tests/upstream`` has a reproduction.)

A factor is a log-density with negative dimensions aligned to the plates; enumeration dimensions lie
to the left of all plates.  Reduced dimensions are kept with size one, so that alignment never
changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Dims = frozenset[int]


@dataclass(frozen=True)
class Factor:
    """A log-density over some plates (``plates``) and enumerated sites (``sums``), both as dims."""

    name: str
    value: Tensor
    plates: Dims
    sums: Dims


def sum_out(value: Tensor, dims: Iterable[int]) -> Tensor:
    """Sum over some negative dims, where the tensor has them, keeping them with size one."""
    present = [d for d in dims if -d <= value.dim()]
    return value.sum(present, keepdim=True) if present else value


def components(factors: Sequence[Factor]) -> list[list[Factor]]:
    """Group factors that are connected through enumerated sites."""
    groups: list[tuple[Dims, list[Factor]]] = []
    for factor in factors:
        joined, sums, rest = [factor], factor.sums, []
        for dims, members in groups:
            if dims & sums:
                joined, sums = members + joined, sums | dims
            else:
                rest.append((dims, members))
        groups = [*rest, (sums, joined)]
    return [members for _, members in groups]


def contract(factors: Sequence[Factor], sites: dict[int, Dims], target: Dims) -> Tensor:
    """The log of the sum, over all enumerated sites, of the product of the factors.

    Variables are eliminated from the innermost plates outwards, the cheapest first.

    Args:
        factors: connected factors, see :func:`components`.
        sites: the plates of each enumerated dimension.
        target: the plates that remain; inner plates are multiplied out.

    Raises:
        NotImplementedError: plates cross, so that no sum can be done before a product over a plate.
    """
    work = list(factors)
    while left := {d for f in work for d in f.sums}:
        depth = max(len(sites[d]) for d in left)
        best = min(
            (d for d in left if len(sites[d]) == depth),
            key=lambda d: len(frozenset().union(*(f.sums for f in work if d in f.sums))),
        )
        touching = [f for f in work if best in f.sums]
        _check_nesting(touching, best, sites)
        work = [f for f in work if best not in f.sums]
        total = add(sum_out(f.value, f.plates - sites[best]) for f in touching)
        value = total.logsumexp(best, keepdim=True) if -best <= total.dim() else total
        sums = frozenset().union(*(f.sums for f in touching)) - {best}
        work.append(Factor("", value, sites[best], sums))
    return add(sum_out(f.value, f.plates - target) for f in work)


def _check_nesting(factors: Sequence[Factor], dim: int, sites: dict[int, Dims]) -> None:
    for factor in factors:
        inner = factor.plates - sites[dim]  # multiplied out before the sum over ``dim``
        if any(sites[other] & inner for other in factor.sums - {dim}):
            raise NotImplementedError(
                f"site {factor.name!r} joins summed sites of plates that cross: these sums"
                " cannot be taken one after the other"
            )


def expectations(
    factors: Sequence[Factor], sites: dict[int, Dims], target: Dims
) -> tuple[Tensor, list[Tensor]]:
    """The contraction, and for each factor its marginal weights under the exact responsibilities.

    The weights are the derivatives of the contraction by the factors: tensors of the factors'
    shapes, non-negative, that sum to one over the enumerated dimensions of the factor.
    """
    build = torch.is_grad_enabled()
    sizes = {
        d: max(f.value.shape[d] for f in factors if -d <= f.value.dim())
        for f in factors
        for d in f.plates
        if -d <= f.value.dim()
    }
    with torch.enable_grad():
        values = [f.value if f.value.requires_grad else f.value.detach().clone() for f in factors]
        leaves = [v if v.requires_grad else v.requires_grad_() for v in values]
        # A fresh node for every factor: its derivative is not that of what it shares with others.
        fresh = [_full(v, f.plates, sizes) * 1 for f, v in zip(factors, leaves, strict=True)]
        replaced = [
            Factor(f.name, v, f.plates, f.sums) for f, v in zip(factors, fresh, strict=True)
        ]
        total = contract(replaced, sites, target)
        weights = torch.autograd.grad(total.sum(), fresh, create_graph=build, retain_graph=True)
    if not build:
        return total.detach(), [w.detach() for w in weights]
    return total, list(weights)


def _full(value: Tensor, plates: Dims, sizes: dict[int, int]) -> Tensor:
    """A factor expanded to the sizes of its plates, so that each row has a weight of its own."""
    dims = [d for d in plates if d in sizes]
    width = max([value.dim(), *(-d for d in dims)])
    value = value.reshape((1,) * (width - value.dim()) + value.shape)
    shape = list(value.shape)
    for d in dims:
        shape[d] = max(shape[d], sizes[d])
    return value.expand(shape)


def add(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of broadcastable tensors."""
    first, *others = tensors
    for other in others:
        first = first + other
    return first


def spread(value: Tensor, weights: Tensor) -> Tensor:
    """Weights times values; zero, with a finite gradient, where the weight is zero."""
    return weights * torch.where(weights > 0, value, value.new_zeros(()))


def by_row(probs: Tensor, data_dim: int, dim: int, rows: int) -> Tensor:
    """Probabilities ``(rows, K)`` of a site's values, averaged over all dimensions but two.

    Args:
        probs: with the rows at ``data_dim`` and the values at ``dim``, both negative.
        data_dim, dim: as said; what is not there has size one.
        rows: how many there are.
    """
    width = max(-dim, -data_dim)
    probs = probs.reshape((1,) * (width - probs.dim()) + probs.shape)
    probs = probs.movedim((data_dim, dim), (-2, -1))
    return probs.reshape(-1, *probs.shape[-2:]).mean(0).expand(rows, -1)
