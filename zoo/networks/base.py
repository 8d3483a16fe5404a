"""What all likelihoods share: positive scales, and the step from raw outputs to a distribution."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

#: The smallest scale that any network of this package returns.
MIN_SCALE = 1e-4

#: Where the logarithm of a positive mean levels off: e^40 and its gradient are finite in float32.
MAX_LOG = 40.0


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


def bounded_log(raw: Tensor) -> Tensor:
    """Return `raw` as the logarithm of a positive number, levelling off at `MAX_LOG`."""
    return raw - F.softplus(raw - MAX_LOG)


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


class Located(Likelihood):
    """Base class: one raw location for each entry of the event, and positive numbers beside it.

    Such a number (a scale, a dispersion) is "shared" (one learnt for all entries), "learned" (one
    for each entry of the event), "predicted" (the network puts one out beside each location), or
    fixed.  Raw outputs are all locations, then all of each predicted number in turn.
    """

    def add_number(self, name: str, given: str | float, start: float, least: float = 0.0) -> None:
        """Add a positive number.

        Args:
            name: its name; a learnt one is the parameter `raw_<name>`.
            given: "shared", "learned", "predicted", or the number itself.
            start: the raw value at which a learnt one starts.
            least: a fixed number is above it.

        Raises:
            ValueError: if `given` is another string or number.
        """
        if isinstance(given, str):
            if given not in ("shared", "learned", "predicted"):
                raise ValueError(
                    f'{name} must be "shared", "learned", "predicted" or a positive number,'
                    f" got {given!r}"
                )
        elif not least < given < math.inf:
            floor = f"above {least:g}" if least else "positive"
            raise ValueError(f"a fixed {name} must be {floor} and finite, got {given}")
        setattr(self, name, given)
        if given in ("shared", "learned"):
            shape = self.event_shape if given == "learned" else torch.Size()
            setattr(self, f"raw_{name}", nn.Parameter(torch.full(shape, start)))
        elif given == "predicted":
            self.num_params += math.prod(self.event_shape)

    def split(self, params: Tensor, **numbers: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the locations, then the numbers of these names, each of shape (*, event_shape).

        Args:
            params: raw outputs of shape (*, num_params).
            numbers: name -> the map from its raw values; fixed numbers are as they were given.
        """
        predicted = [name for name in numbers if getattr(self, name) == "predicted"]
        loc, *rest = (self.unflatten(part) for part in params.chunk(1 + len(predicted), dim=-1))
        found = [loc]
        for name, positive in numbers.items():
            given = getattr(self, name)
            if given == "predicted":
                found.append(positive(rest.pop(0)))
            elif isinstance(given, str):
                found.append(positive(getattr(self, f"raw_{name}")).expand_as(loc))
            else:
                found.append(torch.full_like(loc, float(given)))
        return found
