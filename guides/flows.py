"""Normalising flows of monotonic splines, by zuko, as Pyro distributions.

With ``e ~ Normal(0, I)`` and ``f`` an increasing map of each component that depends on components
before it (in alternating order) and on a context ``h``::

    z = loc(h) + scale(h) f(e; h),    log q(z) = log Normal(e; 0, I) - log |det df/de| - log scale

Drawing takes one pass of the networks; the density of a value from elsewhere takes as many as
there are components (two for a coupling), that of its own draw none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

EXTRA = "flows need zuko: pip install 'pyrozoo[flows]'"


class FlowDistribution(TorchDistribution):
    """``loc + scale f(e)``: batch shape that of ``loc`` and ``scale``, event shape ``(D,)``.

    The log-density of the last draw is kept, for this very tensor; that of any other value, also of
    an equal one, is computed from the value.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, transform: Any, loc: Tensor, scale: Tensor) -> None:
        self.transform = transform
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same with another batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        return FlowDistribution(self.transform, self.loc.expand(shape), self.scale.expand(shape))

    def moved(self, loc: Tensor, scale: Tensor) -> FlowDistribution:
        """The same flow around another location and scale."""
        return FlowDistribution(self.transform, loc, scale)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A draw ``(sample_shape, *, D)``, through which gradients flow."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        value, jacobian = self.transform.call_and_ladj(noise)
        value = self.loc + self.scale * value
        self._last = value, self._density(noise, jacobian)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of any value ``(*, D)``."""
        if self._last is not None and value is self._last[0]:
            return self._last[1]
        base = (value - self.loc) / self.scale
        noise = self.transform.inv(base)
        return self._density(noise, self.transform.call_and_ladj(noise)[1])

    def _density(self, noise: Tensor, jacobian: Tensor) -> Tensor:
        each = noise.square() / 2 + math.log(2 * math.pi) / 2 + self.scale.log()
        return -each.sum(-1) - jacobian


class Flow(nn.Module):
    """The networks of a flow, which is the identity at the start.

    Args:
        size: number of components, D.
        context: width of what it is given; 0 for nothing.
        transforms: how many there are, in alternating order of the components.
        passes: into how many groups the components fall; each group reads those before it.
        bins: of the splines, on [-5, 5]; outside they are the identity.
        width: of the two hidden layers of each transform.
    """

    def __init__(
        self, size: int, context: int, transforms: int, passes: int, bins: int, width: int
    ) -> None:
        super().__init__()
        try:
            from zuko.flows import MaskedAutoregressiveTransform
            from zuko.transforms import ComposedTransform, MonotonicRQSTransform
        except ImportError as error:
            raise ImportError(EXTRA) from error
        if transforms < 1 or bins < 2 or width < 1:
            raise ValueError(
                f"a flow has at least one transform of two bins, got {transforms} of {bins} bins,"
                f" width {width}"
            )
        self._compose = ComposedTransform
        order = torch.arange(size)
        self.transforms = nn.ModuleList(
            MaskedAutoregressiveTransform(
                size,
                context,
                **({"passes": passes, "order": order if i % 2 == 0 else order.flip(0)}
                   if size > 1 else {}),
                univariate=MonotonicRQSTransform,
                shapes=[(bins,), (bins,), (bins - 1,)],
                **({"hidden_features": (width, width)} if size > 1 or context else {}),
            )
            for i in range(transforms)
        )  # fmt: skip
        for module in self.transforms:
            transform: Any = module
            last = transform.hyper[-1] if hasattr(transform, "hyper") else transform.phi
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, loc: Tensor, scale: Tensor, context: Tensor | None) -> FlowDistribution:
        """The flow around a normal: ``loc``, ``scale`` ``(*, D)``, context ``(*, width)``."""
        transform = self._compose(*(t(context) for t in self.transforms))
        return FlowDistribution(transform, loc, scale)
