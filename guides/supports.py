"""From the unconstrained space to the support of a site, and proposals of counts.

A continuous site is proposed as ``T(u)``, with u on R^D and T the bijection of its support: real,
positive, bounded, ordered, simplex, correlation (or its Cholesky factor), lower Cholesky and
positive definite.  A count that cannot be summed, Poisson for example, is proposed as negative
binomial with mean m and concentration c given by a network, ``Var = m + m^2 / c``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints as pyro_constraints
from pyro.ops.provenance import detach_provenance
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ReshapeTransform, Transform

from pyrozoo.inference.graph import Site, innermost
from pyrozoo.zoo.networks import MLP, positive_scale

CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises)
BOUNDS = ("lower_bound", "upper_bound")


class LowerCholesky(Transform):
    """Vectors of length n (n + 1) / 2 to lower triangular matrices with a positive diagonal."""

    domain = constraints.real_vector
    codomain: Any = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def forward_shape(self, shape: Any) -> torch.Size:
        """``(*, n (n + 1) / 2)`` to ``(*, n, n)``."""
        n = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
        return torch.Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """``(*, n, n)`` to ``(*, n (n + 1) / 2)``."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))

    def _tril(self, x: Tensor) -> Tensor:
        n = self.forward_shape(x.shape)[-1]
        index = torch.tril_indices(n, n, device=x.device)
        low = x.new_zeros(*x.shape[:-1], n, n)
        low[..., index[0], index[1]] = x
        diagonal = low.diagonal(dim1=-2, dim2=-1).exp()
        return low.tril(-1) + diagonal.diag_embed()

    def _vector(self, low: Tensor) -> Tensor:
        n = low.shape[-1]
        index = torch.tril_indices(n, n, device=low.device)
        logs = low.diagonal(dim1=-2, dim2=-1).log()
        return (low.tril(-1) + logs.diag_embed())[..., index[0], index[1]]

    def _call(self, x: Tensor) -> Tensor:
        return self._tril(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._vector(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the logarithms of the diagonal."""
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class PositiveDefinite(LowerCholesky):
    """Vectors of length n (n + 1) / 2 to positive definite matrices ``L L^T``.

    ``log |d L L^T / d L| = n log 2 + sum_i (n - i + 1) log L_ii``, i from 1 to n.
    """

    codomain = constraints.positive_definite

    def _call(self, x: Tensor) -> Tensor:
        low = self._tril(x)
        return low @ low.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return self._vector(torch.linalg.cholesky(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """That of the Cholesky factor, and that of its square."""
        logs = self._tril(x).diagonal(dim1=-2, dim2=-1).log()
        n = logs.shape[-1]
        power = torch.arange(n + 1, 1, -1, dtype=x.dtype, device=x.device)
        return n * math.log(2) + (power * logs).sum(-1)


def steady(site: Site) -> Any:
    """The support of a site, with bounds that are the same in all entries of its plates.

    Raises:
        ValueError: they are not.
    """
    support = site.fn.support
    base = getattr(support, "base_constraint", support)
    if isinstance(innermost(site.fn), CIRCULAR):  # periodic, with a support declared as real
        circle = constraints.interval(-math.pi, math.pi)
        depth = len(site.event_shape)
        return constraints.independent(circle, depth) if depth else circle
    if is_real(support) and (image := _image(site.fn)) is not None:
        base, support = image, constraints.independent(image, support.event_dim)
    bounds = {n: v for n in BOUNDS if isinstance(v := getattr(base, n, None), Tensor)}
    if not bounds:
        return support
    new = []
    for name in BOUNDS:
        value: Any = getattr(base, name, None)
        if isinstance(value, Tensor):
            entries = value.detach().expand(site.fn.batch_shape + site.event_shape)
            entries = entries.reshape(-1, *site.event_shape)
            if not (entries == entries[:1]).all():
                raise ValueError(_moving(site))
            value = entries[0]
            value = value.flatten()[0].item() if (value == value.flatten()[0]).all() else value
        if value is not None:
            new.append(value)
    base = type(base)(*new)
    depth = support.event_dim - base.event_dim
    return constraints.independent(base, depth) if depth else base


def _image(fn: Any) -> Any:
    """Where the transforms of a distribution take its base, if that is less than the real line.

    The declared support is that of the last transform, the real line for an affine one.
    """
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    if not isinstance(fn, torch.distributions.TransformedDistribution):
        return None
    start = fn.base_dist.support
    low, high = getattr(start, "lower_bound", -math.inf), getattr(start, "upper_bound", math.inf)
    known = (constraints.real, constraints.positive, constraints.unit_interval)
    if not isinstance(start, tuple(map(type, known))) or any(
        t.domain.event_dim for t in fn.transforms
    ):
        return None
    ends = [torch.as_tensor(end, dtype=torch.get_default_dtype()) for end in (low, high)]
    for transform in fn.transforms:
        ends = [detach_provenance(transform(end)) for end in ends]
    lower, upper = torch.minimum(*ends), torch.maximum(*ends)
    if lower.isfinite().all() and upper.isfinite().all():
        return constraints.interval(lower, upper)
    if lower.isfinite().all():
        return constraints.greater_than(lower)
    return constraints.less_than(upper) if upper.isfinite().all() else None


def _moving(site: Site) -> str:
    return (
        f"site {site.name!r}: the bounds of its support depend on the row or on other sites"
        f" ({type(site.fn).__name__}); draw it on a fixed support and move the draw"
    )


def check_steady(site: Site, again: Site) -> None:
    """Refuse a support that was another one in another run.

    Raises:
        ValueError: naming the site.
    """
    bases = [getattr(steady(s), "base_constraint", steady(s)) for s in (site, again)]
    for name in BOUNDS:
        first, second = (getattr(base, name, None) for base in bases)
        if first is not None and not torch.equal(torch.as_tensor(first), torch.as_tensor(second)):
            raise ValueError(_moving(site))


def bijection(site: Site) -> tuple[Any, Any, torch.Size]:
    """The support, the transform onto it, and the shape of what it transforms.

    Raises:
        ValueError: there is none for this support.
    """
    support = steady(site)
    for transform in (LowerCholesky(), PositiveDefinite()):
        if isinstance(support, type(transform.codomain)):
            return support, transform, transform.inverse_shape(site.event_shape)
    try:
        found = biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"site {site.name!r} ({type(site.fn).__name__}) cannot be proposed: no bijection from"
            f" real numbers to its support ({support}) is known; observe it, or pass"
            f" network={{{site.name!r}: ...}}, a module that returns a distribution on it"
        ) from None
    return support, found, torch.Size(found.inverse_shape(site.event_shape))


def is_real(support: Any) -> bool:
    """Whether no transform is needed (also after a copy)."""
    base = getattr(support, "base_constraint", support)
    return isinstance(base, type(constraints.real))


def on_support(fn: Any, support: Any, transform: Any, flat: torch.Size, shape: torch.Size) -> Any:
    """A distribution on R^D, event shape ``(D,)``, brought to the support of a site.

    Args:
        fn: batch shape ``*``.
        support, transform, flat: as :func:`bijection` has them.
        shape: of the event of the site.
    """
    if isinstance(fn, dist.Delta):
        value = fn.v.reshape(fn.v.shape[:-1] + flat)
        return dist.Delta(transform(value), event_dim=len(shape))
    steps = []
    if len(flat) != 1:
        base = getattr(fn, "base_dist", None)
        if isinstance(fn, dist.Independent) and isinstance(base, dist.Normal):
            loc, scale = (v.reshape(v.shape[:-1] + flat) for v in (base.loc, base.scale))
            fn = dist.Normal(loc, scale).to_event(len(flat))
        else:
            steps.append(ReshapeTransform(fn.event_shape, flat))
    if not is_real(support):
        steps.append(transform)
    return dist.TransformedDistribution(fn, steps) if steps else fn


def countable(site: Site) -> bool:
    """Whether it is a count from zero up, without a largest value."""
    base = getattr(site.fn.support, "base_constraint", site.fn.support)
    return isinstance(base, type(pyro_constraints.nonnegative_integer)) and base.lower_bound == 0


class Counts(nn.Module):
    """Negative binomial counts, their means and concentrations linear heads of a network.

    Args:
        in_dims: widths of the inputs; none for plain parameters.
        shape: of one draw.
        hidden, activation: of the network.
    """

    def __init__(
        self, in_dims: Sequence[int], shape: torch.Size, hidden: Sequence[int], activation: str
    ) -> None:
        super().__init__()
        self.shape, self.size = shape, shape.numel()
        self.mlp = MLP(in_dims, hidden, 2 * self.size, activation) if in_dims else None
        if not in_dims:
            self.raw = nn.Parameter(torch.zeros(2 * self.size))

    def forward(self, *inputs: Tensor) -> Any:
        """The proposal, with batch shape ``*`` (that of the inputs)."""
        raw = self.raw if self.mlp is None else self.mlp(*inputs)
        mean, concentration = positive_scale(raw).split(self.size, -1)
        mean = mean.reshape(mean.shape[:-1] + self.shape)
        concentration = concentration.reshape(mean.shape)
        fn = dist.NegativeBinomial(concentration, logits=mean.log() - concentration.log())
        return fn.to_event(len(self.shape)) if self.shape else fn
