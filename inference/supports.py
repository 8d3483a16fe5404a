"""Whether a guide proposes values that a site of the program can take.

A proposal fits if its support lies in that of the site: ``q(z) > 0`` only where ``p(z) > 0``.
Bounds are compared where both supports have some; a point mass, and a support that says no more
than where a transform ends, are judged by what was drawn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TransformedDistribution
from pyro.ops.provenance import get_provenance
from torch.distributions import constraints

from pyrozoo.inference.graph import Site

RELAXED = [(constraints.one_hot, constraints.simplex), (constraints.boolean, constraints.interval)]


def check_support(site: Site, proposal: Site) -> None:
    """Check that what a guide proposes for a site lies in its support.

    Raises:
        ValueError: naming the site and both supports.
    """
    support, other = site.fn.support, proposal.fn.support
    both = (support, other)
    unsure = any(constraints.is_dependent(_base(s)) or depends_on_draws(s) for s in both)
    if unsure or _relaxed(support, other) or proposal.value is None:
        return
    inside = _inside(other, support)
    point = proposal.fixed
    if inside and not point:
        return
    kinds = point or _discrete(support) == _discrete(other)
    known = inside is not None and not point and not _transformed(proposal.fn)
    value = proposal.value
    if kinds and not known and bool((support.check(value) | _nan(value, support)).all()):
        return
    drew = f", and drew {_example(support, value)}" if not known and kinds else ""
    fix = ""
    if not point and not _discrete(support) and isinstance(_base(other), type(constraints.real)):
        fix = "; dist.TransformedDistribution(proposal, [biject_to(support)]) moves it there"
    raise ValueError(
        f"site {site.name!r} ({_name(site.fn)}) takes values in {describe(support)} in the program,"
        f" but the guide proposes {_name(proposal.fn)}, with values in {describe(other)}{drew}{fix}"
    )


def describe(support: Any) -> str:
    """A support in words."""
    base = _base(support)
    low, high = (getattr(base, n, None) for n in ("lower_bound", "upper_bound"))
    if base.is_discrete and low is not None and high is not None:
        return f"{int(torch.as_tensor(low).max())}..{int(torch.as_tensor(high).max())}"
    if base.is_discrete and low is not None:
        return f"whole numbers from {int(torch.as_tensor(low).max())}"
    if base is constraints.unit_interval:
        return "[0, 1]"
    return str(base).removesuffix("()")


def depends_on_draws(support: Any) -> bool:
    """Whether its bounds were computed from what the program has drawn."""
    return any(bool(get_provenance(v)) for s in (support, _base(support)) for v in vars(s).values())


def _inside(inner: Any, outer: Any) -> bool | None:
    """Whether one support lies in another; None: not to be seen from their bounds."""
    a, b = _bounds(inner), _bounds(outer)
    if a is None or b is None:
        return True if type(_base(inner)) is type(_base(outer)) else None
    if _discrete(inner) != _discrete(outer):
        return False
    try:
        return bool((a[0] >= b[0] - 1e-6).all() and (a[1] <= b[1] + 1e-6).all())
    except RuntimeError:  # bounds by row, of other rows
        return None


def _bounds(support: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    base = _base(support)
    if base is constraints.boolean:
        low, high = 0.0, 1.0
    elif isinstance(base, type(constraints.real)):
        low, high = -math.inf, math.inf
    elif hasattr(base, "lower_bound") or hasattr(base, "upper_bound"):
        low = getattr(base, "lower_bound", -math.inf)
        high = getattr(base, "upper_bound", math.inf)
    else:
        return None
    return torch.as_tensor(low), torch.as_tensor(high)


def _relaxed(support: Any, other: Any) -> bool:
    a, b = _base(support), _base(other)
    types = [(type(p), q if isinstance(q, type) else type(q)) for p, q in RELAXED]
    return any(isinstance(a, p) and isinstance(b, q) for p, q in types)


def _transformed(fn: Any) -> bool:
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    return isinstance(fn, TransformedDistribution)


def _nan(value: torch.Tensor, support: Any) -> torch.Tensor:
    """Where a draw is not a number: something else is wrong then."""
    missing = value.isnan()
    return missing.flatten(-support.event_dim).any(-1) if support.event_dim else missing


def _example(support: Any, value: torch.Tensor) -> str:
    wrong = value[~support.check(value)]
    return str([round(x, 4) for x in wrong.flatten()[:3].tolist()])


def _name(fn: Any) -> str:
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    return type(fn).__name__


def _discrete(support: Any) -> bool:
    return bool(_base(support).is_discrete)


def _base(support: Any) -> Any:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support
