"""Amortised guides: a network maps what is given to a proposal of the latent sites.

==================== ================================================================
Amortized            q(z | given) = Normal, for every continuous local latent site
Classifier           q(y | given), categorical, for one finite site
ProductOfExperts     q(z | given) as a product of one Gaussian per given site
Sequential           several of these, the later reading what the earlier have drawn
Mean                 another guide with every Gaussian draw replaced by its mean
==================== ================================================================

Every guide is a module with ``forward(batch)``, proposes sites under their own names, and returns
the drawn values by name.  None knows the loss, the data set or the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyrozoo.guides.inputs import Inputs, first_dtype, graph_of, local_site
from pyrozoo.inference import Batch
from pyrozoo.inference.graph import DATA
from pyrozoo.zoo import networks

Drawn = dict[str, Tensor]


class Part(nn.Module):
    """A guide that can follow others in :class:`Sequential`: override ``inside`` (and
    ``outside``)."""

    def outside(self) -> Drawn:
        """Draw the sites outside plate ``"data"``."""
        return {}

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw the sites in plate ``"data"``, given what earlier parts have drawn."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Drawn:
        """Draw every site that it proposes; returns the values by name."""
        values = self.outside()
        with pyro.plate(DATA, len(batch)):
            return values | self.inside(batch, {})


class Amortized(Part):
    """Mean-field Gaussian: each continuous latent site is drawn given the same inputs.

    ``q(z | given) = Normal(loc(given), scale(given))`` for every continuous local site of the
    program that is not given, on the unconstrained space if its support is constrained.  Sites
    outside plate ``"data"`` get a Gaussian of their own, with parameters in place of networks.
    Finite sites are
    left out: they are summed exactly in the program.

    Args:
        program: what the guide is for; run once, unobserved, to read its sites.
        given: sites (observable ones, whether observed in this data set or not) that are read.
        hidden: widths of the hidden layers of each network.
        activation: of the hidden layers.
        init_scale: constant at which the scales start, if given.
        sites: the sites to propose; default: every continuous latent one.
        network: site -> a module of your own, from the given values to a distribution.
        example: a batch on which the program can be run, if it reads inputs.

    Source: Kingma and Welling, "Auto-encoding variational Bayes" (2014).
    """

    def __init__(
        self,
        program: Any,
        given: Sequence[str],
        hidden: Sequence[int] = (500, 500),
        activation: str = "relu",
        init_scale: float | None = None,
        sites: Sequence[str] | None = None,
        network: Mapping[str, nn.Module] | None = None,
        example: Any = None,
    ) -> None:
        super().__init__()
        graph = graph_of(program, example)
        latent = [
            s for s in graph.sites.values()
            if s.kind == "sample" and s.continuous and s.name not in given
            and (s.local or s.own is None)
            and (sites is None or s.name in sites)
            and (sites is not None or graph.descendants(s.name))
        ]  # fmt: skip
        if sites is not None and (unknown := set(sites) - {s.name for s in latent}):
            raise ValueError(f"no continuous latent site is called {', '.join(sorted(unknown))}")
        self.given = tuple(given)
        self.inputs = nn.ModuleDict()
        self.networks = nn.ModuleDict()
        self.raw = nn.ParameterDict()
        self._supports: dict[str, Any] = {}
        for site in latent:
            self._supports[site.name] = site.fn.support
            size = biject_to(site.fn.support).inverse_shape(site.event_shape).numel()
            if not site.local:
                start = 0.1 if init_scale is None else init_scale
                self.raw[f"{site.name}_loc"] = nn.Parameter(torch.zeros(size))
                raw_scale = networks.inverse_positive_scale(start)
                self.raw[f"{site.name}_scale"] = nn.Parameter(torch.full((size,), raw_scale))
                continue
            local_site(graph, site.name)
            inputs = Inputs(graph, given, site.name)
            self.inputs[site.name] = inputs
            self.networks[site.name] = (network or {}).get(site.name) or networks.Encoder(
                inputs.widths, hidden, size, activation, init_scale
            )
        self._own = frozenset(network or {})
        self._shapes = {s.name: s.event_shape for s in latent}

    def distribution(
        self, name: str, batch: Batch, drawn: Mapping[str, Tensor] | None = None
    ) -> Any:
        """The proposal of one site given a batch: batch shape ``(*, rows)``."""
        net, inputs = self.networks[name], cast(Inputs, self.inputs[name])
        dtype = first_dtype(net)
        if name in self._own:
            return net(*(inputs.value(g, batch, drawn or {}, dtype) for g in self.given))
        return self._on_support(name, net(*inputs(batch, drawn or {}, dtype)))

    def _on_support(self, name: str, normal: Any) -> Any:
        shape, support = self._shapes[name], self._supports[name]
        transform = biject_to(support)
        flat = transform.inverse_shape(shape)
        if len(flat) != 1:
            base = normal.base_dist
            loc, scale = (v.reshape(v.shape[:-1] + flat) for v in (base.loc, base.scale))
            normal = dist.Normal(loc, scale).to_event(len(flat))
        base = getattr(support, "base_constraint", support)
        if isinstance(base, type(constraints.real)):  # also after a copy
            return normal
        return dist.TransformedDistribution(normal, [transform])

    def outside(self) -> Drawn:
        """Draw the global sites."""
        values = {}
        for name in self._shapes:
            if name not in self.networks:
                loc = self.raw[f"{name}_loc"]
                scale = networks.positive_scale(self.raw[f"{name}_scale"])
                fn = self._on_support(name, dist.Normal(loc, scale).to_event(1))
                values[name] = pyro.sample(name, fn)
        return values

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw the local sites."""
        return {n: pyro.sample(n, self.distribution(n, batch, drawn)) for n in self.networks}


class Classifier(Part):
    """``q(y | given)`` for a finite site: summed exactly where it is unknown, as in M2.

    Args:
        program: what the guide is for.
        site: a ``Categorical`` site of the program.
        given: sites that are read.
        hidden, activation: of the network.
        network: a module of your own, from the given values to a distribution.
        example: a batch on which the program can be run, if it reads inputs.
    """

    def __init__(
        self,
        program: Any,
        site: str,
        given: Sequence[str],
        hidden: Sequence[int] = (500,),
        activation: str = "relu",
        network: nn.Module | None = None,
        example: Any = None,
    ) -> None:
        super().__init__()
        graph = graph_of(program, example)
        fn = local_site(graph, site).fn
        if not isinstance(fn, dist.Categorical):
            raise ValueError(
                f"site {site!r} is expected to be Categorical, not {type(fn).__name__}"
            )
        self.site, self.given = site, tuple(given)
        self.inputs = Inputs(graph, given, site)
        self._own = network is not None
        self.network = network or networks.Classifier(
            self.inputs.widths, hidden, fn.probs.shape[-1], activation
        )

    def distribution(self, batch: Batch, drawn: Mapping[str, Tensor] | None = None) -> Any:
        """``q(y | given)``, batch shape ``(*, rows)``."""
        dtype = first_dtype(self.network)
        if self._own:
            values = [self.inputs.value(g, batch, drawn or {}, dtype) for g in self.given]
        else:
            values = self.inputs(batch, drawn or {}, dtype)
        return self.network(*values)

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw the site (under an enumerating objective: all its values)."""
        return {self.site: pyro.sample(self.site, self.distribution(batch, drawn))}


class ProductOfExperts(Part):
    """A Gaussian whose precision is the sum of the precisions of the experts that see something.

    With ``T_m`` the precision of the expert of modality m, zero in rows where m is missing::

        T = 1 + sum_m T_m,    q(z | given) = Normal(sum_m T_m loc_m / T, T^(-1/2))

    The one is the prior, a standard normal; a row without any modality falls back to it.

    Args:
        program: what the guide is for.
        given: the modalities, one expert each.
        site: the shared latent site.
        hidden, activation: of each expert.
        network: modality -> a module of your own that returns a Normal (``.to_event(1)``).
        example: a batch on which the program can be run, if it reads inputs.

    Source: Wu and Goodman, "Multimodal generative models for scalable weakly-supervised learning"
    (2018).
    """

    def __init__(
        self,
        program: Any,
        given: Sequence[str],
        site: str = "z",
        hidden: Sequence[int] = (512, 512),
        activation: str = "relu",
        network: Mapping[str, nn.Module] | None = None,
        example: Any = None,
    ) -> None:
        super().__init__()
        graph = graph_of(program, example)
        latent_dim = local_site(graph, site).event_shape.numel()
        self.site, self.given = site, tuple(given)
        self.inputs = nn.ModuleDict({m: Inputs(graph, [m], site) for m in given})
        self.experts = nn.ModuleDict(
            {
                m: (network or {}).get(m)
                or networks.Encoder(
                    cast(Inputs, self.inputs[m]).widths, hidden, latent_dim, activation
                )
                for m in given
            }
        )
        self._own = frozenset(network or {})

    def distribution(self, batch: Batch, drawn: Mapping[str, Tensor] | None = None) -> Any:
        """``q(z | given)``, batch shape ``(*, rows)``."""
        precision: Any = 1.0
        weighted: Any = 0.0
        for name in self.given:
            present = batch.present(name).reshape(len(batch), -1).any(1)
            known = (present | torch.full_like(present, name in (drawn or {}))).unsqueeze(-1)
            normal = self._normal(name, batch, drawn or {})
            share = known / normal.scale**2
            precision = precision + share
            weighted = weighted + share * normal.loc
        return dist.Normal(weighted / precision, precision**-0.5).to_event(1)

    def _normal(self, name: str, batch: Batch, drawn: Mapping[str, Tensor]) -> Any:
        """What the expert of a modality says, ``(*, rows, D)``."""
        expert, inputs = self.experts[name], cast(Inputs, self.inputs[name])
        dtype = first_dtype(expert)

        def run() -> Any:
            if name in self._own:
                return expert(inputs.value(name, batch, drawn, dtype)).base_dist
            return expert(*inputs(batch, drawn, dtype)).base_dist

        return run() if name in drawn else batch.once((id(self), name), run)

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw the shared latent site."""
        return {self.site: pyro.sample(self.site, self.distribution(batch, drawn))}


class Sequential(Part):
    """Several guides, one after the other; each may be *given* the sites that were drawn before.

    ``Sequential(Classifier(p, "y", ["x"]), Amortized(p, ["x", "y"]))`` is q(y | x) q(z | x, y).
    """

    def __init__(self, *parts: Part) -> None:
        super().__init__()
        for part in parts:
            if not isinstance(part, Part):
                raise TypeError(
                    f"a part of a sequential guide is a Part, not {type(part).__name__}"
                )
        self.parts = nn.ModuleList(parts)

    def outside(self) -> Drawn:
        """Draw the global sites of all parts."""
        values: Drawn = {}
        for part in self.parts:
            values |= cast(Part, part).outside()
        return values

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw the local sites of all parts."""
        values: Drawn = {}
        for part in self.parts:
            values |= cast(Part, part).inside(batch, {**drawn, **values})
        return values


class _Means(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        if msg["type"] == "sample" and isinstance(msg["fn"], dist.Independent | dist.Normal):
            fn = msg["fn"]
            if isinstance(getattr(fn, "base_dist", fn), dist.Normal):
                msg["fn"] = dist.Delta(fn.mean, event_dim=fn.event_dim)


class Mean(nn.Module):
    """Another guide without its noise: each Gaussian site is a point mass at its mean.

    With the weights of the latent terms at zero, the bound under this guide is the reconstruction
    of an autoencoder.  The parameters are those of the other guide.

    Args:
        guide: any guide.
        noise: sd of Gaussian noise on the floating-point values that the guide reads in training,
            which makes it a denoising autoencoder: the program still generates the clean values.
    """

    def __init__(self, guide: nn.Module, noise: float = 0.0) -> None:
        super().__init__()
        self.guide, self.noise = guide, noise

    def forward(self, batch: Batch) -> Any:
        """Draw, without noise in the latent sites."""
        if self.training and self.noise:
            for name in batch.names:
                if (value := batch[name]).is_floating_point():
                    batch = batch.replace(name, value + self.noise * torch.randn_like(value))
        with _Means():
            return self.guide(batch)
