"""Distributions whose densities stay finite, in value and gradient, for extreme parameters."""

from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import SigmoidTransform, Transform
from torch.distributions.utils import broadcast_all

#: Above this a gamma function is taken from Stirling's series, which is then exact in float64.
_STIRLING = 16.0


class _OpenUnitInterval(constraints.Constraint):
    """Numbers between 0 and 1, neither of which belongs to it."""

    def check(self, value: Tensor) -> Tensor:
        return (value > 0) & (value < 1)

    def __repr__(self) -> str:
        return "numbers above 0 and below 1"


open_unit_interval = _OpenUnitInterval()


def _to_open_unit_interval(constraint: Any) -> Transform:
    return SigmoidTransform()


for _registry in (biject_to, transform_to):
    _registry.register(_OpenUnitInterval, _to_open_unit_interval)


def log_ways(total: Tensor, count: Tensor) -> Tensor:
    """Return log Gamma(total + count) / (Gamma(total) Gamma(count + 1)), nothing cancelling.

    Args:
        total: positive, shape (*).
        count: at least 0, shape (*).
    """
    total, count = broadcast_all(total, count)
    big, small = torch.maximum(total, count + 1), torch.minimum(total, count + 1)
    large = big > _STIRLING
    start = torch.where(large, big, _STIRLING)
    step = torch.where(large, small - 1, 0.0)
    end = start + step
    series = (start - 0.5) * torch.log1p(step / start) + step * (end.log() - 1)
    series = series + _stirling(end) - _stirling(start) - torch.lgamma(small)
    low, few = torch.where(large, 1.0, total), torch.where(large, 0.0, count)
    direct = torch.lgamma(low + few) - torch.lgamma(low) - torch.lgamma(few + 1)
    return torch.where(large, series, direct)


def _stirling(z: Tensor) -> Tensor:
    square = z.reciprocal() ** 2
    return (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680))) / z


def ordered_logits(location: Tensor, cutpoints: Tensor) -> Tensor:
    """Return log-probabilities (*, K) of levels with P(level <= k) = sigmoid(cutpoints[k] - loc).

    Args:
        location: shape (*).
        cutpoints: increasing along the last dimension, shape (*, K - 1) or (K - 1,).
    """
    raw = cutpoints - location.unsqueeze(-1)
    below = F.pad(F.logsigmoid(raw), (0, 1))
    above = F.pad(F.logsigmoid(-raw), (1, 0))
    gap = torch.log(-torch.expm1(cutpoints[..., :-1] - cutpoints[..., 1:]))
    return below + above + F.pad(gap, (1, 1)) if cutpoints.shape[-1] > 1 else below + above


class Beta(dist.Beta):
    """A beta distribution on the open interval, whose draws never touch 0 or 1."""

    support = open_unit_interval  # type: ignore[assignment]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw values of shape sample_shape + batch_shape."""
        eps = torch.finfo(self.concentration1.dtype).eps
        return super().rsample(torch.Size(sample_shape)).clamp(eps, 1 - eps)


class ContinuousBernoulli(TorchDistribution):
    """Density proportional to exp(logits x) on [0, 1], with its exact normalising constant.

    Source: Loaiza-Ganem and Cunningham, "The continuous Bernoulli: fixing a pervasive error in
    variational autoencoders" (2019).
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Return the same distribution with another batch shape."""
        new = ContinuousBernoulli(self.logits.expand(torch.Size(batch_shape)), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return logits (x - 1/2) - log(sinh(h) / h), where h = logits / 2."""
        if self._validate_args:
            self._validate_sample(value)
        half = self.logits.abs() / 2
        small = half < 0.15
        far = torch.where(small, 1.0, half)
        log_far = far + torch.log(-torch.expm1(-2 * far)) - torch.log(2 * far)
        square = torch.where(small, half, 0.0) ** 2
        near = square * (1 / 6 - square * (1 / 180 - square * (1 / 2835 - square / 37800)))
        return self.logits * (value - 0.5) - torch.where(small, near, log_far)

    @property
    def mean(self) -> Tensor:
        """The mean, (1 + coth(h) - 1/h) / 2."""
        half = self.logits / 2
        small = half.abs() < 0.15
        far = torch.where(small, 1.0, half)
        near = torch.where(small, half, 0.0)
        square = near**2
        series = 1 / 3 - square * (1 / 45 - square * (2 / 945 - square * (1 / 4725)))
        return 0.5 + torch.where(small, near * series, far.tanh().reciprocal() - 1 / far) / 2

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw values of shape sample_shape + batch_shape by inversion."""
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        slope = self.logits.abs().clamp_min(1e-3)
        tail = torch.log(uniform + (1 - uniform) * torch.exp(-slope))  # of the mirrored density
        steep = 1 + tail / slope
        steep = torch.where(self.logits < 0, -tail / slope, steep)
        flat = uniform + self.logits * uniform * (1 - uniform) / 2
        return torch.where(self.logits.abs() < 1e-3, flat, steep).clamp(0, 1)


class NegativeBinomial(TorchDistribution):
    """Counts with a given mean and dispersion: the variance is mean + dispersion mean^2.

    Args:
        log_mean: logarithm of the mean, shape (*).
        log_dispersion: logarithm of the dispersion, shape (*); -inf would be a Poisson.
    """

    arg_constraints = {  # noqa: RUF012
        "log_mean": constraints.real,
        "log_dispersion": constraints.real,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self, log_mean: Tensor, log_dispersion: Tensor, validate_args: bool | None = None
    ) -> None:
        self.log_mean, self.log_dispersion = broadcast_all(log_mean, log_dispersion)
        super().__init__(self.log_mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Return the same distribution with another batch shape."""
        shape = torch.Size(batch_shape)
        new = NegativeBinomial(
            self.log_mean.expand(shape), self.log_dispersion.expand(shape), validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of counts of shape (*)."""
        if self._validate_args:
            self._validate_sample(value)
        total = (-self.log_dispersion).exp()
        odds = self.log_mean + self.log_dispersion  # of a success, as a logit
        return log_ways(total, value) - total * F.softplus(odds) - value * F.softplus(-odds)

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        """The variance, mean + dispersion mean^2."""
        return self.mean + self.log_dispersion.exp() * self.mean**2

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw counts of shape sample_shape + batch_shape: a Poisson whose rate is a gamma draw."""
        with torch.no_grad():
            total = (-self.log_dispersion).exp()
            gamma = dist.Gamma(total, 1.0, validate_args=False).sample(torch.Size(sample_shape))
            rate = gamma * (self.log_mean + self.log_dispersion).exp()
            return torch.poisson(rate.clamp_max(1e18))


class ZeroInflatedNegativeBinomial(TorchDistribution):
    """Zero with probability sigmoid(gate), else a draw of a negative binomial.

    Args:
        gate: logit of the additional zeros, shape (*).
        counts: the negative binomial, batch shape (*).
    """

    arg_constraints = {"gate": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(
        self, gate: Tensor, counts: NegativeBinomial, validate_args: bool | None = None
    ) -> None:
        self.gate, self.counts = gate.expand(counts.batch_shape), counts
        super().__init__(counts.batch_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Return the same distribution with another batch shape."""
        shape = torch.Size(batch_shape)
        new = ZeroInflatedNegativeBinomial(
            self.gate.expand(shape), self.counts.expand(shape), validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of counts of shape (*)."""
        counted = F.logsigmoid(-self.gate) + self.counts.log_prob(value)
        zero = torch.logaddexp(F.logsigmoid(self.gate).expand_as(counted), counted)
        return torch.where(value == 0, zero, counted)

    @property
    def mean(self) -> Tensor:
        """The mean of all counts, the additional zeros included."""
        return torch.sigmoid(-self.gate) * self.counts.mean

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw counts of shape sample_shape + batch_shape."""
        with torch.no_grad():
            draw = self.counts.sample(sample_shape)
            zero = torch.rand_like(draw) < self.gate.sigmoid()
            return torch.where(zero, torch.zeros_like(draw), draw)
