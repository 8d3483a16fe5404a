"""Importance weights of the guide's draws, with exact sums over all enumerated sites.

With ``y`` the finite sites that are summed in the program or enumerated by the guide, and z all
others that the guide proposes, the weight of a draw, whose mean is p(x), is ::

    w = sum_y p(x, y, z) / q(z | x)           or   sum_y p(x, y, z_y) / q(z_y | x, y)

where in the second z is drawn for each y.  A guide's q(y | x) has no part in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyrozoo.inference.bounds.contract import Factor, add, components, contract
from pyrozoo.inference.bounds.terms import Terms


def log_weights(terms: Terms, more: Iterable[Factor] = ()) -> Tensor:
    """Log importance weights, ``(particles, rows)``; all enumerated sites are summed exactly.

    Args:
        terms: without closed forms and scales.
        more: factors that join the others under the sum.
    """
    sums = terms.sums | {terms.weight_dims[f.name]: f.plates for f in terms.weights}
    factors = [*(f for group in terms.groups for f in group), *more]
    for name, parts in terms.plain.items():
        if name in terms.weight_dims:  # not the guide's, and whether it counts is asked afterwards
            site = terms.sites[name]
            plates = next(f.plates for f in terms.weights if f.name == name)
            parts = [(site["fn"].log_prob(site["value"]), plates)]
        factors += [Factor(name, value, plates, frozenset()) for value, plates in parts]
    rows = []
    for group in components([_with_sums(f, sums) for f in factors]):
        value = contract(group, sums, terms.plates)
        if any(f.sums for f in group):
            names = [f.name for f in group if f.name in terms.sites]
            value = scale_and_mask(value, mask=_counts([terms.sites[n] for n in names], terms))
        rows.append(terms.to_rows(value, frozenset().union(*(f.plates for f in group))))
    local = [value for value in rows if value.dim() == 2]
    shape = (terms.num_particles, terms.rows)
    return add(local).expand(shape) if local else torch.zeros(shape)


def _with_sums(factor: Factor, sums: Iterable[int]) -> Factor:
    value = factor.value
    here = frozenset(d for d in sums if -d <= value.dim() and value.shape[d] > 1)
    return Factor(factor.name, value, factor.plates, factor.sums | here)


def _counts(sites: list[Any], terms: Terms) -> bool | Tensor:
    """Where any of the sites counts; where none does, the sum is that of a prior: log 1."""
    mask: bool | Tensor = False
    for site in sites:
        counts = site["infer"].get("_counts", site["mask"])
        if counts is None or counts is True:
            return True
        if isinstance(counts, Tensor):
            for dim in range(-counts.dim(), 0):
                counts = counts if dim in terms.plates else counts.any(dim, keepdim=True)
        mask = mask | counts
    return mask
