"""A guide of several latents from one trunk: each is read off at its own height."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
from torch import nn
from torch.distributions import constraints

from pyrozoo.guides.amortized import Drawn, Part
from pyrozoo.guides.inputs import Inputs, first_dtype, graph_of, local_site
from pyrozoo.inference import Batch
from pyrozoo.zoo import networks


class Ladder(Part):
    """``q(z_1 | given) .. q(z_J | given)``, with a Gaussian head at each rung of one trunk.

    The trunk goes up from what is given, with ``depth`` hidden layers a rung::

        h_0 = given,    h_j = layers_j(h_(j-1)),    z_j ~ Normal(loc_j(h_j), scale_j(h_j))

    Given the inputs the latents are independent.

    Args:
        program: what the guide is for; run once, unobserved, to read its sites.
        given: sites that are read.
        sites: the latent sites, from the lowest rung up; real vectors in plate ``"data"``.
        hidden: widths of the trunk, one for each rung.
        activation: of the trunk.
        depth: layers of the same width that each rung has.
        init_scale: constant at which the scales start, if given.
        example: a batch on which the program can be run, if it reads inputs.

    Raises:
        ValueError: a site is no real vector of plate ``"data"`` alone, there is none, or not one
            width for each.

    Source: Zhao, Song, Ermon, "Learning hierarchical features from deep generative models" (2017).
    """

    def __init__(
        self,
        program: Any,
        given: Sequence[str],
        sites: Sequence[str],
        hidden: Sequence[int] = (500, 2000),
        activation: str = "relu",
        depth: int = 1,
        init_scale: float | None = None,
        example: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(sites, str) or not sites or len(sites) != len(hidden):
            raise ValueError(
                f"a ladder has one width for each of its sites, got {tuple(hidden)} for {sites!r}"
            )
        graph = graph_of(program, example)
        self.given, self.sites = tuple(given), tuple(sites)
        below = {frozenset(graph.descendants(name)).intersection(given) for name in sites}
        self.inputs = Inputs(graph, given, self.sites[0] if len(below) == 1 else None)
        self.trunk, self.heads = nn.ModuleList(), nn.ModuleDict()
        widths: Any = self.inputs.widths
        for name, width in zip(sites, hidden, strict=True):
            site = local_site(graph, name)
            support = getattr(site.fn.support, "base_constraint", site.fn.support)
            if len(site.event_shape) != 1 or not isinstance(support, type(constraints.real)):
                raise ValueError(
                    f"site {name!r} is expected to be a real vector, but it is"
                    f" {type(site.fn).__name__} of shape {tuple(site.event_shape)}"
                )
            self.trunk.append(networks.MLP(widths, (width,) * depth, activation=activation))
            self.heads[name] = networks.GaussianEncoder(
                nn.Identity(), width, site.event_shape[0], init_scale
            )
            widths = width

    def distributions(self, batch: Batch, drawn: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The proposal of every site: batch shape ``(*, rows)``, event shape ``(D_j,)``."""
        h = self.inputs(batch, drawn or {}, first_dtype(self.trunk))
        found = {}
        for name, layer in zip(self.sites, self.trunk, strict=True):
            h = [layer(*h)]
            found[name] = self.heads[name](*h)
        return found

    def distribution(self, name: str, batch: Batch, drawn: Mapping[str, Any] | None = None) -> Any:
        """The proposal of one site, as :meth:`distributions` has it."""
        return self.distributions(batch, drawn)[name]

    def inside(self, batch: Batch, drawn: Mapping[str, Any]) -> Drawn:
        """Draw the local sites, the lowest rung's first."""
        proposals = self.distributions(batch, drawn)
        return {name: pyro.sample(name, fn) for name, fn in proposals.items()}
