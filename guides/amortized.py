"""Amortised guides: a network maps what is given to a proposal of the latent sites.

==================== ================================================================
Amortized            q(z | given) for every latent site, by inversion of the program
Classifier           q(y | given), categorical, for one finite site
ProductOfExperts     q(z | given) as a product of one Gaussian per given site
Sequential           several of these, the later reading what the earlier have drawn
Mean                 another guide with every Gaussian draw replaced by its mean
==================== ================================================================

Every guide is a module with ``forward(batch)``, proposes sites under their own names, and returns
the drawn values by name.  None knows the loss, the data set or the number of rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor, nn

from pyrozoo.guides.experts import Classifier, ProductOfExperts
from pyrozoo.guides.families import Family, make
from pyrozoo.guides.inputs import Inputs, first_dtype
from pyrozoo.guides.inversion import Factorisation, invert
from pyrozoo.guides.parts import Drawn, Mean, Part, Sequential
from pyrozoo.guides.shared import Shared
from pyrozoo.guides.supports import Counts, bijection, on_support
from pyrozoo.guides.targets import find_given, find_targets, graphs_of, plate_dim
from pyrozoo.inference import Batch
from pyrozoo.inference.graph import DATA, Site
from pyrozoo.zoo import networks

__all__ = ["Amortized", "Classifier", "Drawn", "Mean", "Part", "ProductOfExperts", "Sequential"]

WIDEST = 64  # numbers in all globals together that are read by others, with read_globals="auto"


class Amortized(Part):
    """A proposal of every latent site that cannot be summed, each given what it has to read.

    The program's graph is inverted (:mod:`.inversion`), which gives the order of the draws and what
    each of them reads; :attr:`factorisation` says both and why.  A site in plate ``"data"``,
    and perhaps in others, is drawn from a network of what is given and of other latents; one
    outside has parameters in place of a network, and depends linearly on globals drawn before.
    Finite sites are left out: they are summed exactly in the program.  So are latents with
    nothing given below them.

    Args:
        program: what the guide is for; run twice, unobserved, to read its sites.
        given: sites that are read, whether observed in this data set or not, and values of
            ``example`` that are no sites; default: all local sites without descendants, those
            that the program itself observes, and all that ``example`` has.
        hidden: widths of the hidden layers of each network.
        activation: of the hidden layers.
        init_scale: constant at which the scales start, if given.
        sites: the sites to propose; default: every one that needs it, among them given ones on
            which others depend and which are known in part in ``example``: they are proposed where
            they are missing.
        network: site -> a module of your own, from the given values to a distribution.
        example: a batch on which the program can be run; wanted if it reads inputs, and says by
            its keys and masks what is observable.
        structure: ``"inverse"``; ``"independent"``, each local latent given only ``given``; or
            ``"topological"``, in the program's order, each given ``given`` and the latents above.
        family: of the proposals on the unconstrained space, see :mod:`.families`; one for all, or
            by site (default: ``"mean_field"``).
        read_globals: whether other sites read the global ones; ``"auto"``: if these are 64 numbers
            or fewer, and not in the independent structure.

    Raises:
        ValueError: a name or an option does not fit, or a site cannot be proposed, named in the
            message.

    Sources: Kingma and Welling, "Auto-encoding variational Bayes" (2014); Webb et al., "Faithful
    inversion of generative models for effective amortized inference" (2018).
    """

    def __init__(
        self,
        program: Any,
        given: Sequence[str] | None = None,
        hidden: Sequence[int] = (500, 500),
        activation: str = "relu",
        init_scale: float | None = None,
        sites: Sequence[str] | None = None,
        network: Mapping[str, nn.Module] | None = None,
        example: Any = None,
        structure: str = "inverse",
        family: Family | Mapping[str, Family] = "mean_field",
        read_globals: bool | str = "auto",
    ) -> None:
        super().__init__()
        if read_globals not in (True, False, "auto"):
            raise ValueError(f"read_globals is True, False or 'auto', got {read_globals!r}")
        graph, again = graphs_of(program, example, given)
        self.data_dim = plate_dim(graph)
        self.given = find_given(graph, given, example)
        some = Batch.of(2 if example is None else example)
        partly = [n for n in some.names if some.partly(n)]
        targets = find_targets(graph, again, self.given, sites, network or {}, partly)
        self._own = frozenset(network or {})
        self._sites: dict[str, Site] = {site.name: site for site in targets}
        self._maps = {
            s.name: bijection(s) for s in targets if s.continuous and s.name not in self._own
        }
        found = invert(graph, self.given, list(self._sites), structure)
        unread = [n for n in some.names if n not in graph.sites and n not in self.given]
        if any(site.local for site in targets):
            note = "an input that no site reads; a guide that should know it has it in given, too"
            found = dataclasses.replace(found, notes=found.notes | dict.fromkeys(unread, note))
        self.factorisation: Factorisation = self._limit(found, read_globals, structure)
        families = family if isinstance(family, Mapping) else dict.fromkeys(self._sites, family)
        if unknown := set(families) - set(self._sites):
            raise ValueError(
                f"family names {', '.join(sorted(unknown))}, but the guide proposes"
                f" {', '.join(self._sites) or 'nothing'}"
            )
        self.inputs, self.networks = nn.ModuleDict(), nn.ModuleDict()
        self._keys = {name: _key(name, self._sites) for name in self._sites}
        unconstrain = {n: m[1] for n, m in self._maps.items() if not self._sites[n].local}
        for name, reads in self.factorisation.reads.items():
            site = self._sites[name]
            if not site.local:
                continue
            own = name in self._own
            inputs = Inputs(
                graph,
                [n for n in (self.given if own else reads) if n in self.given],
                name,
                drawn=[] if own else [n for n in reads if n not in self.given],
                across={} if own else {n: read.across for n, read in reads.items()},
                observable=self.given,
                unconstrain={n: t for n, t in unconstrain.items() if n in reads},
                hidden=hidden,
                activation=activation,
            )
            self.inputs[self._keys[name]] = inputs
            kind = families.get(name, "mean_field")
            self.networks[self._keys[name]] = (network or {}).get(name) or (
                self._network(name, kind, inputs, hidden, activation, init_scale)
            )
        shared = [n for n in self.factorisation.order if not self._sites[n].local]
        self.raw = Shared(
            [self._sites[n] for n in shared], self._keys, self._maps, self.factorisation,
            {n: families.get(n, "mean_field") for n in shared}, init_scale,
        )  # fmt: skip
        self._graph_sizes = {p: n for s in graph.sites.values() for p, n in s.sizes.items()}
        self._rows = {n: graph.sites[n] for n in self.given}

    def _limit(self, found: Factorisation, read: bool | str, structure: str) -> Factorisation:
        shared = [s for s in self._sites.values() if not s.local]
        total = 0
        for site in shared:
            entries = torch.Size(site.sizes.values()).numel()
            total += entries * (self._maps[site.name][2].numel() if site.name in self._maps else 1)
        if read is False or (read == "auto" and structure == "independent"):
            return found.without([s.name for s in shared], "other sites do not read globals")
        counts = [s.name for s in shared if not s.continuous]
        found = found.without(counts, "a count, which other sites do not read")
        if read == "auto" and total > WIDEST:
            note = f"the globals are {total} numbers, more than {WIDEST}: other sites do not read"
            return found.without([s.name for s in shared], note)
        return found

    def _network(
        self, name: str, kind: Family, inputs: Inputs, hidden: Sequence[int], activation: str,
        init_scale: float | None,
    ) -> nn.Module:  # fmt: skip
        if name not in self._maps:
            return Counts(inputs.widths, self._sites[name].event_shape, hidden, activation)
        size = self._maps[name][2].numel()
        if kind == "mean_field":
            return networks.Encoder(inputs.widths, hidden, size, activation, init_scale)
        return make(kind, inputs.widths, size, hidden, activation, init_scale)

    def distribution(
        self, name: str, batch: Batch, drawn: Mapping[str, Tensor] | None = None
    ) -> Any:
        """The proposal of one local site given a batch: batch shape ``(*, rows)``.

        Args:
            name: of the site.
            batch: what is known.
            drawn: values of the latent sites that it reads, ``(*, rows, *event)``.

        Raises:
            ValueError: one of these is missing.
        """
        key = self._keys[name]
        net, inputs = self.networks[key], cast(Inputs, self.inputs[key])
        dtype = first_dtype(net)
        if name in self._own:
            return net(*(inputs.value(g, batch, drawn or {}, dtype) for g in self.given))
        fn = net(*inputs(batch, drawn or {}, dtype))
        if name not in self._maps:
            return fn
        return on_support(fn, *self._maps[name], self._sites[name].event_shape)

    def outside(self) -> Drawn:
        """Draw the global sites."""
        values: Drawn = {}
        plates = _Plates(self._graph_sizes)
        for name in self.raw.order:
            with plates.of(self._sites[name]):
                values[name] = pyro.sample(name, self.raw.distribution(name, values))
        return values

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw the local sites."""
        values: Drawn = {}
        plates = _Plates(self._graph_sizes | self._sizes(batch))
        for name in self.factorisation.order:
            if (site := self._sites[name]).local:
                fn = self.distribution(name, batch, {**drawn, **values})
                with plates.of(site):
                    values[name] = pyro.sample(name, fn)
        return values

    def _sizes(self, batch: Batch) -> dict[str, int]:
        """Sizes of the inner plates, which may differ from batch to batch."""
        sizes: dict[str, int] = {}
        for name, site in self._rows.items():
            if name in batch and len(site.dims) > 1:
                inner = [plate for plate in site.dims if plate != DATA]
                sizes |= dict(zip(inner, batch.shape(name)[1:], strict=False))
        return sizes

    def __str__(self) -> str:
        return str(self.factorisation)


class _Plates:
    """The plates of a run, made once each, with the dims that they have in the program.

    They are hidden from traces: another part of the guide may have made them, too.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes, self.made = sizes, dict[str, Any]()

    @contextlib.contextmanager
    def of(self, site: Site) -> Iterator[None]:
        """In all plates of a site but that over the data."""
        with contextlib.ExitStack() as stack:
            for name, dim in site.dims.items():
                if name == DATA:
                    continue
                if name not in self.made:
                    with poutine.block(hide=[name]):
                        self.made[name] = pyro.plate(name, self.sizes[name], dim=dim)
                stack.enter_context(self.made[name])
            yield


def _key(name: str, taken: Mapping[str, Any]) -> str:
    """A name that a module can have: no dots, no names of methods."""
    key = name.replace(".", "_")
    while (key != name and key in taken) or hasattr(nn.ModuleDict, key):
        key += "_"
    return key
