"""Likelihoods: modules that turn the raw outputs of a network into a Pyro distribution."""

import math
import re
from collections.abc import Sequence

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

#: The smallest scale that any network of this package returns.
MIN_SCALE = 1e-4


def positive_scale(raw: Tensor) -> Tensor:
    """Map raw outputs to scales, `softplus(raw) + MIN_SCALE`: positive, and linear when large.

    Unlike `exp(raw / 2)` it cannot overflow, and a raw output of zero means a scale near 0.69.
    """
    return F.softplus(raw) + MIN_SCALE


def inverse_positive_scale(scale: float) -> float:
    """Return the raw value at which `positive_scale` is `scale`.

    Raises:
        ValueError: if the scale is not above `MIN_SCALE`.
    """
    if not MIN_SCALE < scale < math.inf:
        raise ValueError(f"a scale must be finite and above {MIN_SCALE}, got {scale}")
    excess = scale - MIN_SCALE
    return excess + math.log(-math.expm1(-excess))


class Likelihood(nn.Module):
    """Base class: `num_params` network outputs become a distribution over `event_shape`.

    Attributes:
        event_shape: the shape of one observation.
        num_params: how many raw outputs the distribution wants.
    """

    event_shape: torch.Size
    num_params: int

    def __init__(self, event_shape: int | Sequence[int], num_params: int | None = None) -> None:
        super().__init__()
        self.event_shape = torch.Size(
            (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        )
        self.num_params = math.prod(self.event_shape) if num_params is None else num_params

    def forward(self, params: Tensor) -> TorchDistributionMixin:
        """Return the distribution with these parameters.

        Args:
            params: raw network outputs of shape (*, num_params).

        Returns:
            A distribution with batch shape `*` and event shape `event_shape`.

        Raises:
            ValueError: if the last dimension of `params` is not `num_params`.
        """
        if params.shape[-1:] != (self.num_params,):
            raise ValueError(
                f"expected parameters of shape (*, {self.num_params}), got {tuple(params.shape)}"
            )
        return self.distribution(params)

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution from checked parameters of shape (*, num_params)."""
        raise NotImplementedError

    def unflatten(self, params: Tensor) -> Tensor:
        """Reshape (*, prod(event_shape)) to (*, event_shape)."""
        return params.reshape(params.shape[:-1] + self.event_shape)

    def extra_repr(self) -> str:
        """Show the shapes in the printed module."""
        return f"event_shape={tuple(self.event_shape)}, num_params={self.num_params}"


class Bernoulli(Likelihood):
    """Independent Bernoulli entries, parametrised by logits.

    The values may be grey, anywhere in [0, 1]: `log_prob` is then the cross entropy, and the
    support is not checked.
    """

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution from logits of shape (*, prod(event_shape))."""
        base = dist.Bernoulli(logits=self.unflatten(params), validate_args=False)
        return base.to_event(len(self.event_shape))


class Normal(Likelihood):
    """Independent normal entries.

    Args:
        event_shape: the shape of one observation.
        scale: "shared" (one learnt scale for all entries, starting at 1), "learned" (one for each
            entry of the event; an entry that never varies drives its scale to the floor),
            "predicted" (the network puts out a scale beside each location), or a number (fixed).

    Raises:
        ValueError: if `scale` is another string or a number that is not positive and finite.
    """

    def __init__(self, event_shape: int | Sequence[int], scale: str | float = "shared") -> None:
        super().__init__(event_shape)
        if isinstance(scale, str):
            if scale not in ("shared", "learned", "predicted"):
                raise ValueError(
                    'scale must be "shared", "learned", "predicted" or a positive number,'
                    f" got {scale!r}"
                )
        elif not 0 < scale < math.inf:
            raise ValueError(f"a fixed scale must be positive and finite, got {scale}")
        self.scale = scale
        if scale in ("shared", "learned"):
            shape = self.event_shape if scale == "learned" else torch.Size()
            self.raw_scale = nn.Parameter(torch.full(shape, inverse_positive_scale(1.0)))
        elif scale == "predicted":
            self.num_params *= 2

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution; with predicted scales, params are all locations, then scales."""
        if self.scale == "predicted":
            raw_loc, raw_scale = params.chunk(2, dim=-1)
            loc, scale = self.unflatten(raw_loc), positive_scale(self.unflatten(raw_scale))
        else:
            loc = self.unflatten(params)
            if self.scale in ("shared", "learned"):
                scale = positive_scale(self.raw_scale).expand_as(loc)
            else:
                scale = torch.full_like(loc, float(self.scale))
        return dist.Normal(loc, scale).to_event(len(self.event_shape))


class Categorical(Likelihood):
    """A single class index out of `num_classes`; the event shape is ()."""

    def __init__(self, num_classes: int) -> None:
        super().__init__((), num_classes)

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution from logits of shape (*, num_classes)."""
        return dist.Categorical(logits=params)


def likelihood(spec: str | Likelihood, event_shape: int | Sequence[int]) -> Likelihood:
    """Turn a name into a likelihood module, or check a module against the event shape.

    Args:
        spec: "bernoulli", "normal" (with one learnt scale), "normal(0.2)" (with a fixed one),
            "categorical", or a module.
        event_shape: the shape of one observation. For the name "categorical" it is
            (num_classes,), although the observation itself, a class index, has shape ().

    Raises:
        ValueError: if the name is not known, or the module has another event shape.
        TypeError: if `spec` is neither a name nor a `Likelihood`.
    """
    shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
    if isinstance(spec, Likelihood):
        if spec.event_shape != shape:
            raise ValueError(
                f"the likelihood has event shape {tuple(spec.event_shape)}, expected {shape}"
            )
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"expected a name or a Likelihood, got {type(spec).__name__}")
    if spec == "bernoulli":
        return Bernoulli(shape)
    if spec == "normal":
        return Normal(shape)
    if fixed := re.fullmatch(r"normal\(([0-9.eE+-]+)\)", spec):
        return Normal(shape, float(fixed.group(1)))
    if spec == "categorical":
        if len(shape) != 1:
            raise ValueError(f'"categorical" wants the event shape (num_classes,), got {shape}')
        return Categorical(shape[0])
    raise ValueError(
        f'expected "bernoulli", "normal", "normal(SCALE)" or "categorical", got {spec!r}'
    )
