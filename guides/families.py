"""Families of proposals: from inputs, or from free parameters, to a distribution on R^D.

With ``h`` the features of a multilayer perceptron of the inputs, ``m(h)`` and ``s(h)`` linear heads
(``s`` made positive) and ``e ~ Normal(0, I)``, a draw is

============== ====================================================================================
mean_field     ``m + s e``
full           ``m + S (I + T) e``, with ``T(h)`` strictly lower triangular, ``S = diag(s)``
low_rank       ``m + S (e + F u)``, with ``F(h)`` of D x rank entries, ``u ~ Normal(0, I)``
student        ``m + s t``, ``t`` independent Student's t with degrees of freedom ``2 + d(h)``
autoregressive ``m + s f(e; h)``, a component of ``f`` reads those before it, then those behind it
coupling       the same, but one half of the components reads the other
delta          ``m``
============== ====================================================================================

At the start ``T`` and ``f - e`` are zero, and ``F`` is small: every family but ``delta`` starts
near ``mean_field``.  Without inputs the heads are free parameters, shared by all rows.

Sources: Kingma et al., "Improved variational inference with inverse autoregressive flow" (2016);
Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP" (2017), for couplings; Durkan et
al., "Neural spline flows" (2019), for the monotonic splines that ``f`` is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.guides.flows import Flow
from pyrozoo.guides.heads import Heads
from pyrozoo.zoo.networks import Encoder, inverse_positive_scale, positive_scale

Family = str | Callable[..., nn.Module]


class MeanField(nn.Module):
    """An independent normal for each of D components; base of all other families.

    Args:
        in_dims: widths of the inputs, perhaps none.
        size: D.
        hidden, activation: of the trunk.
        init_scale: constant at which the scales start; 0.1 without inputs unless given.
        more: further outputs that a family has, name -> width.
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        size: int,
        hidden: Sequence[int] = (),
        activation: str = "relu",
        init_scale: float | None = None,
        *,
        more: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        widths = {"loc": size, "raw_scale": size, **(more or {})}
        self.heads = Heads(in_dims, widths, hidden, activation)
        if init_scale is not None or not in_dims:
            self.heads.start("raw_scale", inverse_positive_scale(init_scale or 0.1))

    def forward(self, *inputs: Tensor) -> Any:
        """The proposal, with batch shape ``*`` (that of the inputs) and event shape ``(D,)``."""
        raw, _ = self.heads(*inputs)
        return dist.Normal(raw["loc"], positive_scale(raw["raw_scale"])).to_event(1)


class Full(MeanField):
    """A normal with any covariance."""

    def __init__(self, in_dims: Sequence[int], size: int, *args: Any, **options: Any) -> None:
        tril = {"tril": size * (size - 1) // 2} if size > 1 else {}
        super().__init__(in_dims, size, *args, **options, more=tril)
        if size > 1:
            self.heads.start("tril", 0.0)

    def forward(self, *inputs: Tensor) -> Any:
        """The proposal: batch shape ``*``, event shape ``(D,)``."""
        raw, _ = self.heads(*inputs)
        scale = positive_scale(raw["raw_scale"])
        eye = torch.eye(self.size, dtype=scale.dtype, device=scale.device)
        tril = eye.expand(*scale.shape[:-1], -1, -1).clone()
        if self.size > 1:
            i, j = torch.tril_indices(self.size, self.size, -1, device=scale.device)
            tril[..., i, j] = raw["tril"]
        return dist.MultivariateNormal(raw["loc"], scale_tril=scale.unsqueeze(-1) * tril)


class LowRank(MeanField):
    """A normal whose covariance is ``S (I + F F^T) S``; ``rank`` is 10 at most unless given."""

    def __init__(
        self, in_dims: Sequence[int], size: int, *args: Any, rank: int | None = None, **options: Any
    ) -> None:
        self.rank = min(size, 10) if rank is None else rank
        if not 1 <= self.rank <= size:
            raise ValueError(f"rank lies between 1 and {size}, the size, got {rank}")
        super().__init__(in_dims, size, *args, **options, more={"factor": size * self.rank})
        with torch.no_grad():
            if in_dims:
                for parameter in self.heads.heads["factor"].parameters():
                    parameter.mul_(0.1)
            else:
                self.heads.free["factor"].normal_(0.0, 0.1)

    def forward(self, *inputs: Tensor) -> Any:
        """The proposal: batch shape ``*``, event shape ``(D,)``."""
        raw, _ = self.heads(*inputs)
        scale = positive_scale(raw["raw_scale"])
        factor = raw["factor"].unflatten(-1, (self.size, self.rank)) * scale.unsqueeze(-1)
        return dist.LowRankMultivariateNormal(raw["loc"], factor, scale**2)


class StudentT(MeanField):
    """Independent Student's t, with heavier tails than a normal; they start at 10 degrees."""

    def __init__(self, in_dims: Sequence[int], size: int, *args: Any, **options: Any) -> None:
        super().__init__(in_dims, size, *args, **options, more={"raw_df": size})
        self.heads.start("raw_df", inverse_positive_scale(8.0))

    def forward(self, *inputs: Tensor) -> Any:
        """The proposal: batch shape ``*``, event shape ``(D,)``."""
        raw, _ = self.heads(*inputs)
        df, scale = 2 + positive_scale(raw["raw_df"]), positive_scale(raw["raw_scale"])
        return dist.StudentT(df, raw["loc"], scale).to_event(1)


class Flowing(MeanField):
    """A normalising flow of splines around an independent normal.

    Args:
        in_dims, size, hidden, activation, init_scale: see :class:`MeanField`.
        coupling: half of the components reads the other half, in place of all those before it.
        transforms, bins, width: of the flow, see :class:`~pyrozoo.guides.flows.Flow`.
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        size: int,
        *args: Any,
        coupling: bool = False,
        transforms: int = 2,
        bins: int = 8,
        width: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(in_dims, size, *args, **options)
        passes = 2 if coupling else size
        self.flow = Flow(size, self.heads.features, transforms, passes, bins, width)

    def forward(self, *inputs: Tensor) -> Any:
        """The proposal: batch shape ``*``, event shape ``(D,)``."""
        raw, features = self.heads(*inputs)
        return self.flow(raw["loc"], positive_scale(raw["raw_scale"]), features)


class Point(nn.Module):
    """A point mass: no density, so that its bound is that of a maximum a posteriori estimate."""

    def __init__(
        self,
        in_dims: Sequence[int],
        size: int,
        hidden: Sequence[int] = (),
        activation: str = "relu",
        init_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.heads = Heads(in_dims, {"loc": size}, hidden, activation)

    def forward(self, *inputs: Tensor) -> Any:
        """The proposal: batch shape ``*``, event shape ``(D,)``."""
        return dist.Delta(self.heads(*inputs)[0]["loc"], event_dim=1)


def _mean_field(
    in_dims: Sequence[int],
    size: int,
    hidden: Sequence[int] = (),
    activation: str = "relu",
    init_scale: float | None = None,
) -> nn.Module:
    if in_dims:
        return Encoder(in_dims, hidden, size, activation, init_scale)
    return MeanField(in_dims, size, hidden, activation, init_scale)


def _coupling(in_dims: Sequence[int], size: int, *args: Any, **options: Any) -> nn.Module:
    return Flowing(in_dims, size, *args, coupling=True, **options)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "mean_field": _mean_field,  # independent normals
    "full": Full,  # a normal with any covariance
    "low_rank": LowRank,  # a normal, covariance diagonal plus low rank; option rank
    "student": StudentT,  # independent Student's t
    "autoregressive": Flowing,  # a flow, each component given those before it
    "coupling": _coupling,  # a flow, one half of the components given the other
    "delta": Point,  # a point mass
}


def make(
    family: Family,
    in_dims: int | Sequence[int],
    size: int,
    hidden: Sequence[int] = (),
    activation: str = "relu",
    init_scale: float | None = None,
    **options: Any,
) -> nn.Module:
    """A module of one of the :data:`FAMILIES`.

    Called with inputs ``(*, in_dims[0])``, ``(*, in_dims[1])``, .. whose leading dimensions
    broadcast, it returns a distribution with batch shape ``*`` and event shape ``(size,)``.
    Without ``in_dims`` it is called without inputs and has plain parameters: batch shape ``()``.

    Args:
        family: a name, or a callable ``(in_dims, size) -> module``, which is taken as it is.
        in_dims: widths of the inputs, perhaps none.
        size: of a draw.
        hidden, activation: of the network.
        init_scale: constant at which the scales start, if given.
        options: of the family: ``rank`` of ``"low_rank"``; ``transforms``, ``bins`` and ``width``
            of the flows.

    Raises:
        ValueError: there is no such family, or the size is not positive.
        TypeError: a callable does not return a module, or an option is not known.
        ImportError: a flow is asked for and zuko is not installed.
    """
    dims = (in_dims,) if isinstance(in_dims, int) else tuple(in_dims)
    if size < 1:
        raise ValueError(f"the size of a draw is positive, got {size}")
    if callable(family):
        module = family(dims, size)
        if not isinstance(module, nn.Module):
            raise TypeError(f"a family returns a module, got {type(module).__name__}")
        return module
    if family not in FAMILIES:
        raise ValueError(
            f"no family is called {family!r} (families: {', '.join(FAMILIES)}, or a callable"
            " (in_dims, size) -> module)"
        )
    return FAMILIES[family](dims, size, hidden, activation, init_scale, **options)
