"""Simulation-based calibration: does a guide know how much it does not know?

Draw latents and data from the program, and draws of the guide given the data::

    t, x ~ p(t) p(x | t),    t_1..t_L ~ q(t | x),    r = #(t_l < t)

If q is the posterior then t, t_1, .., t_L are exchangeable, so that every rank r is uniform on 0..L
and intervals of q contain t as often as they say.  The test is of the average over data that the
program itself generates; it says nothing of data that are unlike these.  Ranks look at one scalar
at a time; two regions look at all components together: those of highest density, by the rank of
log q(t | x) among log q of draws, and balls around random points (TARP, :mod:`.uniformity`).

Sources: Sean Talts, Michael Betancourt, Daniel Simpson, Aki Vehtari, Andrew Gelman, "Validating
Bayesian inference algorithms with simulation-based calibration" (2018); Yuling Yao, Aki Vehtari,
Daniel Simpson, Andrew Gelman, "Yes, but did it work? Evaluating variational inference" (2018);
Joeri Hermans et al., "A trust crisis in simulation-based inference? Your posterior approximations
can be unfaithful" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.comparison import uniformity
from pyrozoo.inference.comparison.simulating import (
    as_data,
    densities,
    given_sites,
    is_latent,
    one_draw,
    simulate,
)
from pyrozoo.inference.comparison.uniformity import Band, Floats, Ranks, rank, tarp_ranks
from pyrozoo.inference.graph import Graph, Site, read_graph
from pyrozoo.inference.observing import Net, pair
from pyrozoo.inference.posterior import posterior
from pyrozoo.inference.reading import read_count
from pyrozoo.inference.running import read_seed

OVERSAMPLED = 10  # draws for each one that importance weights choose


@dataclass(frozen=True)
class Calibration:
    """Ranks of simulated truths among draws of a guide, and what they say.

    Attributes:
        ranks: site -> integers ``(datasets, components)`` from 0 to ``num_draws``.
        num_draws: draws of the guide per simulated data set, L.
        regions: ``"distance"`` (TARP) and, where the guide has a density of its own,
            ``"density"``: ranks ``(datasets,)``; L is inside every region, 0 outside all.
        levels: nominal levels at which :attr:`coverage` is reported.

    Standard errors of a coverage c are ``sqrt(c (1 - c) / datasets)``.
    """

    ranks: dict[str, Ranks]
    num_draws: int
    regions: dict[str, Ranks] = field(default_factory=dict)
    levels: Floats = field(default_factory=lambda: np.linspace(0.05, 0.95, 19))

    @property
    def p_values(self) -> dict[str, Floats]:
        """Chi-square p-value of each component, ``(components,)``; not corrected for their number.

        Under a perfect guide the smallest of m is below 0.05 / m in about one run out of twenty.
        """
        return {n: uniformity.chi_square(r, self.num_draws) for n, r in self.ranks.items()}

    @property
    def band_p_values(self) -> dict[str, Floats]:
        """The same by the simultaneous band, which sees shifts that bins blur; at least 1/4001."""
        return {n: uniformity.band_test(r, self.num_draws) for n, r in self.ranks.items()}

    @property
    def p_value(self) -> float:
        """The smallest p-value of both tests of all components times their number (Bonferroni)."""
        both = [*self.p_values.values(), *self.band_p_values.values()]
        found = np.concatenate(both)
        found = found[~np.isnan(found)]
        return min(1.0, float(found.min()) * len(found))

    @property
    def coverage(self) -> dict[str, Floats]:
        """How often central intervals of each nominal level hold the truth, ``(levels, C)``."""
        return {
            name: uniformity.central_coverage(ranks, self.num_draws, self.levels)
            for name, ranks in self.ranks.items()
        }

    @property
    def region_coverage(self) -> dict[str, Floats]:
        """How often the regions of each nominal level hold the whole truth, ``(levels,)``."""
        return {
            name: uniformity.upper_coverage(ranks[:, None], self.num_draws, self.levels)[:, 0]
            for name, ranks in self.regions.items()
        }

    def mean_coverage(self) -> Floats:
        """The coverage of central intervals, averaged over all components, ``(levels,)``."""
        return np.concatenate(list(self.coverage.values()), 1).mean(1)

    def coverage_at(self, level: float) -> float:
        """The same at one nominal level."""
        ranks = np.concatenate(list(self.ranks.values()), 1)
        return float(uniformity.central_coverage(ranks, self.num_draws, [level]).mean())

    def bands(self, level: float = 0.95) -> Band:
        """Where the whole ECDF of one component, minus the diagonal, lies with this probability."""
        return uniformity.band(len(next(iter(self.ranks.values()))), self.num_draws, level)

    def ecdf_differences(self, grid: Floats) -> dict[str, Floats]:
        """The ECDFs of the ranks minus the diagonal at the grid of a band, ``(C, points)``."""
        of = uniformity.ecdf_difference
        return {name: of(ranks, self.num_draws, grid) for name, ranks in self.ranks.items()}


def sbc(
    program: Net,
    guide: Net | None,
    num_datasets: int = 500,
    num_draws: int = 99,
    *,
    data: Data | None = None,
    observed: Iterable[str] | None = None,
    sites: Iterable[str] | None = None,
    refit: Callable[[Batch], Net] | None = None,
    importance: bool = False,
    inputs: Iterable[str] = (),
    batch_size: int = 256,
    seed: int = 0,
) -> Calibration:
    """Ranks of latents that the program draws among draws of the guide given the data that follow.

    Where all latents are local, a row is a data set and all are simulated in one batch.  With
    latents that all rows share, or with ``refit``, a data set is a batch of as many rows as
    ``data`` has, made and looked at ``num_datasets`` times: with ``refit`` it costs as many fits.
    Then local sites count with their first row.

    Args:
        program: what generates truth and data.
        guide: what is tested; None with ``refit``.
        num_datasets: simulated data sets, N.
        num_draws: draws of the guide for each, L.
        data: rows whose pattern of what is observed and missing is imitated, one after the other,
            and whose inputs are read.  Their values play no part, and what is missing is taken to
            be missing at random.
        observed: the sites that the guide is given; default: those of ``data``, or the leaves.
        sites: the latent sites whose ranks are wanted; default: all, or those that all rows share.
        refit: makes a guide for a simulated batch.
        importance: rank among draws that are chosen by their importance weights, 10 L for each L.
        inputs: names of values of ``data`` that are read but are no sites.
        batch_size: rows at a time.
        seed: of everything.

    Raises:
        ValueError: there is no latent site to look at, the program has a factor or values of its
            own, rows or a guide are lacking, or a value or an option does not fit.
    """
    num_datasets, num_draws = (
        read_count(n, v) for n, v in (("num_datasets", num_datasets), ("num_draws", num_draws))
    )
    seed, inputs = read_seed(seed), tuple(inputs)
    if guide is None and refit is None:
        raise ValueError("a guide, or refit=..., which makes one for simulated data, is needed")
    template = Batch.of({}, rows=1) if data is None else Batch.of(data)
    graph = read_graph(program, _inputs(template, inputs)[:2])
    given = given_sites(graph, None if data is None else template.names, observed)
    latent = [s for s in graph.sites.values() if is_latent(s, given)]
    whole = refit is not None or any(not s.local for s in latent)
    if whole and data is None:
        raise ValueError("data=... says how many rows a data set has, and what is observed in it")
    if not whole:
        template = template[torch.arange(num_datasets) % len(template)]
    wanted = _wanted(graph, [s.name for s in latent], sites, whole)
    options: dict[str, Any] = {
        "inputs": inputs,
        "batch_size": len(template) if whole else batch_size,
    }
    truths: dict[str, list[Tensor]] = {name: [] for name in wanted}
    draws: dict[str, list[Tensor]] = {name: [] for name in wanted}
    regions = {}
    for turn in range(num_datasets if whole else 1):
        own_seed = seed + 3 * turn
        drawn = simulate(program, _inputs(template, inputs), own_seed)
        batch = as_data(drawn, graph, template, given, inputs)
        if refit is not None:
            guide = refit(batch)
        if refit is not None or turn == 0:
            assert guide is not None
            p, q = pair(program, guide, inputs)
        count = num_draws * (OVERSAMPLED if importance else 1)
        found = posterior(p, q, batch, count, importance=importance, seed=own_seed + 1, **options)
        for name in wanted:
            _collect(truths, draws, graph.sites[name], drawn, found, num_draws, whole)
        if not whole and not importance:
            both = densities(p, q, batch, drawn, num_draws, seed=own_seed + 2, **options)
            if both is not None:
                regions["density"] = rank(both[0].cpu().numpy(), both[1].cpu().numpy(), seed)
    truth = {n: torch.cat(parts).double().cpu().numpy() for n, parts in truths.items()}
    other = {n: torch.cat(parts, 1).double().cpu().numpy() for n, parts in draws.items()}
    ranks = {name: rank(truth[name], other[name], seed + i) for i, name in enumerate(truth)}
    every, others = (np.concatenate(list(x.values()), -1) for x in (truth, other))
    regions["distance"] = tarp_ranks(every, others, seed=seed)
    return Calibration(ranks, num_draws, regions)


def _inputs(template: Batch, inputs: tuple[str, ...]) -> Batch:
    return template.drop(*(name for name in template.names if name not in inputs))


def _wanted(graph: Graph, latent: list[str], sites: Iterable[str] | None, whole: bool) -> list[str]:
    inner = [n for n in latent if graph.descendants(n) or not graph.sites[n].local]
    if sites is None:
        shared = [n for n in inner if not graph.sites[n].local]
        found = shared if whole and shared else inner
    else:
        found = [sites] if isinstance(sites, str) else list(sites)
    for name in found:
        if name not in inner:
            raise ValueError(f"{name!r} is no latent site (latent: {', '.join(inner) or 'none'})")
    if not found:
        raise ValueError("the program has no latent site whose rank could be looked at")
    return found


def _collect(
    truths: dict[str, list[Tensor]],
    draws: dict[str, list[Tensor]],
    site: Site,
    drawn: dict[str, Tensor],
    found: dict[str, Tensor],
    num_draws: int,
    whole: bool,
) -> None:
    """Add the truth ``(datasets, C)`` and draws of it ``(L, datasets, C)``."""
    truth, others = one_draw(site, drawn[site.name]), found[site.name][:num_draws]
    if whole:  # one data set; of a local site its first row
        truth = truth[:1] if site.local else truth.unsqueeze(0)
        others = others[:, :1] if site.local else others.unsqueeze(1)
    truths[site.name].append(truth.reshape(len(truth), -1))
    draws[site.name].append(others.reshape(*others.shape[:2], -1))
