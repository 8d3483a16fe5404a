"""Distributions of sites that are known in part.

``merge`` keeps one site under its own name: where the value is known every draw, and every
enumerated value, equals it; elsewhere the site is as it was.  While a site is summed over K values
the density of a known row is lowered by log K, so that K equal terms add up to one; a proposal's is
-log K, the weight of each of them.  The sum over the site is then exact in known and unknown rows
alike, and so is its gradient.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from pyro.distributions import Independent, MultivariateNormal, Normal
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor


class _Merged:
    """Mixed into the class of a distribution, see :func:`merge`.

    What is known belongs to the class, which is made anew by every merge: Pyro rebuilds
    distributions as ``type(fn)(logits=...)``, and their draws have to equal the known values too.
    """

    _copies = 1  # how many equal values the site is summed over
    _known: Tensor  # values, broadcastable to batch_shape + event_shape
    _is_known: Tensor  # over batch_shape or, if entrywise, with the event
    _is_proposal: bool
    _entrywise: bool

    def _where(self, draw: Tensor) -> Tensor:
        event_dim = 0 if self._entrywise else len(self.event_shape)  # type: ignore[attr-defined]
        mask = self._is_known.reshape(self._is_known.shape + (1,) * event_dim)
        return torch.where(mask, self._known.to(draw.dtype), draw)

    def rsample(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._where(super().rsample(*args, **kwargs))  # type: ignore[misc]

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._where(super().sample(*args, **kwargs))  # type: ignore[misc]

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = super().enumerate_support(expand=False)  # type: ignore[misc]
        merged = self._where(values)
        shape = torch.Size(self.batch_shape) + torch.Size(self.event_shape)  # type: ignore[attr-defined]
        if expand:
            return merged.expand(values.shape[:1] + shape)
        missing = 1 + len(shape) - merged.dim()
        return merged.reshape(merged.shape[:1] + (1,) * missing + merged.shape[1:])

    def log_prob(self, value: Tensor) -> Tensor:
        density = super().log_prob(value)  # type: ignore[misc]
        if self._entrywise:
            return density
        log_k = math.log(self._copies)
        known = torch.full_like(density, -log_k) if self._is_proposal else density - log_k
        return torch.where(self._is_known, known, density)

    def proposal_log_prob(self, value: Tensor) -> Tensor:
        """The density that the site had before it was merged."""
        return super().log_prob(value)  # type: ignore[misc]


def merge(fn: Any, value: Tensor, known: Tensor, *, proposal: bool, entrywise: bool = False) -> Any:
    """A copy of ``fn`` whose draws and enumerated values equal ``value`` where ``known``.

    Args:
        fn: a distribution with batch shape ``*`` and event shape ``E``.
        value: ``(*, E)``; anything, but finite, where not known.
        known: ``(*)``, or ``(*, E)`` with ``entrywise=True`` for a factorised continuous ``fn``.
        proposal: whether ``fn`` belongs to a guide, whose known values cost nothing.
    """
    if entrywise and proposal:
        fn = observed_entries(fn, ~known, "the guide")
    new = copy.copy(fn)
    state = {
        "__module__": type(fn).__module__,
        "_known": value,
        "_is_known": known,
        "_is_proposal": proposal,
        "_entrywise": entrywise,
    }
    new.__class__ = type(type(fn).__name__, (_Merged, type(fn)), state)
    return new


def mark_enumerated(fn: Any) -> None:
    """Say that the values of a site are enumerated; changes nothing unless ``fn`` is merged."""
    if isinstance(fn, _Merged):
        fn._copies = len(fn.enumerate_support(expand=False))


def observed_entries(fn: Any, present: Tensor, where: str) -> Any:
    """The marginal of ``fn`` over the entries of its event that are present, ``(*, E)``.

    Raises:
        ValueError: the entries are dependent and no marginal is known for this distribution.
    """
    if not fn.event_shape:
        return fn.mask(present)
    if isinstance(fn, Independent):
        n = fn.reinterpreted_batch_ndims
        if not fn.base_dist.event_shape:
            return fn.base_dist.mask(present).to_event(n)
    if isinstance(fn, MultivariateNormal):
        return _ObservedEntriesOfNormal(fn, present)
    raise ValueError(
        f"{where}: single entries of a {type(fn).__name__} event cannot be missing; entries of"
        " factorised events (.to_event) and of multivariate normals can, and whole rows of anything"
    )


class _ObservedEntriesOfNormal(TorchDistribution):
    """The marginal of a multivariate normal over some entries, as a density on whole vectors.

    Missing entries are given unit variance, no covariance and their own mean, and what they then
    add to the log-density, -log(2 pi) / 2 each, is taken away again.
    """

    has_rsample = True

    def __init__(self, normal: Any, present: Tensor) -> None:
        self.normal, self.present = normal, present
        super().__init__(normal.batch_shape, normal.event_shape, validate_args=False)

    @property
    def arg_constraints(self) -> Any:
        return {}

    @property
    def support(self) -> Any:
        return self.normal.support

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.normal.rsample(torch.Size(sample_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return _ObservedEntriesOfNormal(self.normal.expand(batch_shape), self.present)

    def log_prob(self, value: Tensor) -> Tensor:
        loc = self.normal.loc
        keep = self.present.to(loc.dtype)
        cov = self.normal.covariance_matrix * keep.unsqueeze(-1) * keep.unsqueeze(-2)
        cov = cov + torch.diag_embed(1 - keep)
        diff = torch.where(self.present, value - loc, torch.zeros_like(loc))
        zero = torch.zeros_like(diff)
        density = MultivariateNormal(zero, cov, validate_args=False).log_prob(diff)
        blank = Normal(zero, 1.0, validate_args=False).log_prob(zero)
        return density - ((1 - keep) * blank).sum(-1)
