"""A guide of several latents from one trunk: each is read off at its own height."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
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

    With ``top_down`` the latents are then drawn from the top rung down, and what comes down is
    weighed with what has gone up, by precision::

        z_J | given ~ Normal(loc_J, scale_J)
        z_j | z_(j+1), given ~ Normal(weighted mean, T^(-1/2)),   T = scale_j^-2 + own_j(z_(j+1))^-2

    as in a chain of Gaussians, where the posterior of z_j given z_(j+1) is its conditional times
    what the data say.  The paper takes ``own_j`` from the program, its released code has networks
    of the guide's own, as here.

    Args:
        program: what the guide is for; run once, unobserved, to read its sites.
        given: sites that are read.
        sites: the latent sites, from the lowest rung up; real vectors in plate ``"data"``.
        hidden: widths of the trunk, one for each rung.
        activation: of the trunk.
        depth: layers of the same width that each rung has.
        init_scale: constant at which the scales start, if given.
        example: a batch on which the program can be run, if it reads inputs.
        top_down: widths of the hidden layers of each network that comes down, none for a linear
            one; default: there are no such networks.

    Raises:
        ValueError: a site is no real vector of plate ``"data"`` alone, there is none, or not one
            width for each.

    Sources: Zhao, Song, Ermon, "Learning hierarchical features from deep generative models" (2017);
    with ``top_down`` Sønderby, Raiko, Maaløe, Sønderby, Winther, "Ladder variational autoencoders"
    (2016).
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
        top_down: Sequence[int] | None = None,
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
        self.down = nn.ModuleDict()
        if top_down is not None:
            sizes = {name: graph.sites[name].event_shape[0] for name in sites}
            for name, above in itertools.pairwise(sites):
                down = networks.MLP(sizes[above], top_down, activation=activation)
                width = (sizes[above], *top_down)[-1]
                self.down[name] = networks.GaussianEncoder(down, width, sizes[name], init_scale)

    def distributions(self, batch: Batch, drawn: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What goes up to every site: batch shape ``(*, rows)``, event shape ``(D_j,)``.

        Without ``top_down`` these are the proposals.
        """
        h = self.inputs(batch, drawn or {}, first_dtype(self.trunk))
        found = {}
        for name, layer in zip(self.sites, self.trunk, strict=True):
            h = [layer(*h)]
            found[name] = self.heads[name](*h)
        return found

    def distribution(self, name: str, batch: Batch, drawn: Mapping[str, Any] | None = None) -> Any:
        """The proposal of one site; with ``top_down`` the site above it is among the drawn."""
        return self._proposal(name, self.distributions(batch, drawn)[name], drawn or {})

    def _proposal(self, name: str, up: Any, drawn: Mapping[str, Any]) -> Any:
        if name not in self.down:
            return up
        above = self.sites[self.sites.index(name) + 1]
        return _weighed(up.base_dist, self.down[name](drawn[above]).base_dist)

    def inside(self, batch: Batch, drawn: Mapping[str, Any]) -> Drawn:
        """Draw the local sites: the lowest rung's first, or with ``top_down`` the highest's."""
        upward, found = self.distributions(batch, drawn), dict[str, Any]()
        for name in reversed(self.sites) if self.down else self.sites:
            found[name] = pyro.sample(name, self._proposal(name, upward[name], found))
        return found


def _weighed(first: Any, second: Any) -> Any:
    """The product of two normals, normalised."""
    one, two = first.scale**-2, second.scale**-2
    total = one + two
    loc = (one * first.loc + two * second.loc) / total
    return dist.Normal(loc, total**-0.5).to_event(1)
