"""A guide made richer by an auxiliary variable: a mixture with infinitely many components.

The guide draws ``a ~ q(a | given)``, then ``z ~ q(z | a, given)``; its marginal over ``a`` is
neither normal nor independent.  A reverse model ``r(a | z, given)`` stands for the posterior of
``a``; the bound is exact for any ``r``, and tightest where it is that posterior::

    log p(x) >= E_q [ log p(x, z) - log q(z | a, x) - log q(a | x) + log r(a | z, x) ]

The program does not change: ``a`` is a site of the guide alone, and ``log r`` is a part of the
density with which the guide proposes z.  The program extended by ``a ~ r(a | z, x)``, which leaves
p(x, z) as it is, has the same bound.

Source: Maaloe, Sonderby, Sonderby, Winther, "Auxiliary deep generative models" (2016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyrozoo.guides.families import Family, make
from pyrozoo.guides.inputs import Inputs, first_dtype, graph_of, local_site
from pyrozoo.guides.parts import Drawn, Part
from pyrozoo.guides.supports import bijection, is_real
from pyrozoo.inference import Batch
from pyrozoo.inference.graph import DATA


class Auxiliary(Part):
    """``q(a | given) q(z | a, given)`` for one continuous local site, with ``r(a | z, given)``.

    In the guide are three sites: ``a``; ``<site>_proposal``, the draw on the unconstrained space;
    and the site itself, which takes that draw.  For ADGM put a classifier before it:
    ``Sequential(Classifier(p, "y", ["x"]), Auxiliary(p, ["x", "y"]))``.

    Args:
        program: what the guide is for.
        given: sites that are read; also such that an earlier part of the guide has drawn.
        site: the latent site, a number or vector.
        name: of the auxiliary site.
        dim: its width.
        family: of ``q(z | a, given)``, see :func:`~pyrozoo.guides.families.make`.
        hidden, activation, init_scale: of the networks.  Started narrow, q settles on one mode; an
            ``init_scale`` as wide as the prior lets ``a`` come to mean which mode it is.
        example: a batch on which the program can be run, if it reads inputs.

    Raises:
        ValueError: the site is not continuous, or an array.
    """

    def __init__(
        self,
        program: Any,
        given: Sequence[str],
        site: str = "z",
        name: str = "a",
        dim: int = 2,
        family: Family = "mean_field",
        hidden: Sequence[int] = (500, 500),
        activation: str = "relu",
        init_scale: float | None = None,
        example: Any = None,
    ) -> None:
        super().__init__()
        graph = graph_of(program, example)
        found = local_site(graph, site)
        if not found.continuous or len(found.event_shape) > 1:
            raise ValueError(
                f"site {site!r} is expected to be a continuous number or vector, but it is"
                f" {type(found.fn).__name__} of shape {tuple(found.event_shape)}"
            )
        if name in graph.sites:
            raise ValueError(f"{name!r} is a site of the program; give the auxiliary one a name")
        support, transform, flat = bijection(found)
        size = flat.numel()
        self.data_dim = found.dims[DATA]
        self.site, self.name, self.scalar = site, name, not found.event_shape
        self._transform = None if is_real(support) else transform
        self.inputs = Inputs(graph, given, site)
        widths, options = self.inputs.widths, (hidden, activation, init_scale)
        self.forwards = make("mean_field", widths, dim, *options)
        self.network = make(family, [*widths, dim], size, *options)
        self.reverse = make("mean_field", [*widths, size], dim, *options)

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw the auxiliary site and the site itself."""
        inputs = self.inputs(batch, drawn, first_dtype(self.network))
        infer: Any = {"is_auxiliary": True, "reversed": True}
        a = pyro.sample(self.name, self.forwards(*inputs), infer=infer)
        u = pyro.sample(f"{self.site}_proposal", self.network(*inputs, a), infer=infer.copy())
        value = u.squeeze(-1) if self.scalar else u
        density = -self.reverse(*inputs, u).log_prob(a)
        if self._transform is not None:
            value, before = self._transform(value), value
            jacobian = self._transform.log_abs_det_jacobian(before, value)
            density = density - (jacobian if jacobian.dim() < u.dim() else jacobian.sum(-1))
        fn = dist.Delta(value, density, event_dim=0 if self.scalar else 1)
        return {self.site: pyro.sample(self.site, fn)}
