"""Proposals of global sites: parameters in place of networks, and a linear map of other globals.

On the unconstrained space, with u what the family draws and v the globals that were drawn before
and that the site reads::

    loc + A v + scale e    for mean_field,    u + A v    for the other families,    A = 0 at first

The entries of a plate have parameters of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform

from pyrozoo.guides.families import Family, make
from pyrozoo.guides.inversion import Factorisation
from pyrozoo.guides.supports import Counts, on_support
from pyrozoo.inference.graph import Site
from pyrozoo.zoo import networks

JITTER = 0.1  # of the locations of the entries of a plate, which are all alike to the program


class Shared(nn.Module):
    """The proposals of all global sites of a guide.

    Args:
        sites: the global sites in the order of their draws.
        keys: site -> its name among parameters.
        maps: continuous site -> support, bijection and unconstrained shape.
        factorisation: says which of them each reads.
        families: site -> family.
        init_scale: constant at which the scales start; default 0.1.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        keys: Mapping[str, str],
        maps: Mapping[str, tuple[Any, Any, torch.Size]],
        factorisation: Factorisation,
        families: Mapping[str, Family],
        init_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.order = tuple(site.name for site in sites)
        self.drawn_by, self.read = nn.ModuleDict(), nn.ModuleDict()
        self._keys, self._maps = dict(keys), dict(maps)
        self._sites = {site.name: site for site in sites}
        self._reads = {name: factorisation.parents[name] for name in self.order}
        for site in sites:
            key, entries = keys[site.name], self._entries(site.name)
            size = maps[site.name][2].numel() if site.name in maps else 0
            eye = (entries,) if site.dims else ()
            if not size:
                self.drawn_by[key] = Counts(eye, site.event_shape, (), "relu")
            elif families[site.name] == "mean_field":
                start = networks.inverse_positive_scale(0.1 if init_scale is None else init_scale)
                scale = torch.full((entries * size,), start)
                loc = JITTER * torch.randn(entries * size) if entries > 1 else torch.zeros(size)
                self.register_parameter(f"{key}_loc", nn.Parameter(loc))
                self.register_parameter(f"{key}_scale", nn.Parameter(scale))
            else:
                self.drawn_by[key] = make(families[site.name], eye, size, init_scale=init_scale)
            if size and (width := sum(self._width(n) for n in self._reads[site.name])):
                linear = nn.Linear(width, entries * size, bias=False)
                nn.init.zeros_(linear.weight)
                self.read[key] = linear

    def __getitem__(self, name: str) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self, name))

    def _entries(self, name: str) -> int:
        return torch.Size(self._sites[name].sizes.values()).numel()

    def _width(self, name: str) -> int:
        return self._entries(name) * self._maps[name][2].numel()

    def _layout(self, name: str) -> list[int]:
        """Sizes of the plates, where the program has them."""
        site = self._sites[name]
        shape = [1] * max((-dim for dim in site.dims.values()), default=0)
        for plate, dim in site.dims.items():
            shape[dim] = site.sizes[plate]
        return shape

    def distribution(self, name: str, drawn: Mapping[str, Tensor]) -> Any:
        """The proposal of a site given values of others, in the plates of the program.

        Args:
            name: of the site.
            drawn: values of the globals that it reads, ``(*, *plates, *event)``.
        """
        key, layout = self._keys[name], self._layout(name)
        if name not in self._maps:
            return self._own(key, name, layout)
        size = self._maps[name][2].numel()
        shift = self._shift(key, name, drawn, layout, size)
        if key not in self.drawn_by:
            loc = self[f"{key}_loc"].reshape(*layout, size)
            scale = networks.positive_scale(self[f"{key}_scale"])
            scale = scale.reshape(*layout, size)
            loc = loc if shift is None else loc + shift
            fn: Any = dist.Normal(loc, scale).to_event(1)
        else:
            fn = self._own(key, name, layout)
            if shift is not None and isinstance(fn, dist.Delta):
                fn = dist.Delta(fn.v + shift, event_dim=1)
            elif shift is not None:
                one = torch.ones((), dtype=shift.dtype, device=shift.device)
                fn = dist.TransformedDistribution(fn, [AffineTransform(shift, one, 1)])
        return on_support(fn, *self._maps[name], self._sites[name].event_shape)

    def _own(self, key: str, name: str, layout: Sequence[int]) -> Any:
        """What the family draws; the entries of the plates are told apart by their numbers."""
        if not self._sites[name].dims:
            return self.drawn_by[key]()
        like = next(self.drawn_by[key].parameters())
        entries = self._entries(name)
        eye = torch.eye(entries, dtype=like.dtype, device=like.device)
        return self.drawn_by[key](eye.reshape(*layout, entries))

    def _shift(
        self, key: str, name: str, drawn: Mapping[str, Tensor], layout: Sequence[int], size: int
    ) -> Tensor | None:
        if key not in self.read:
            return None
        parts = []
        for other in self._reads[name]:
            _, transform, flat = self._maps[other]
            value = transform.inv(drawn[other])
            plates = len(self._layout(other))
            lead = value.shape[: value.dim() - len(flat) - plates]
            parts.append(value.reshape(*lead, *[1] * plates, self._width(other)))
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        joined = torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], -1)
        shift = self.read[key](joined)
        return shift.reshape(*lead[: max(0, len(lead) - len(layout))], *layout, size)
