"""What a guide for a program has to propose, what it can read, and what stands against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch

from pyrozoo.guides.sites import row_site
from pyrozoo.guides.supports import bijection, check_steady, countable
from pyrozoo.inference import Batch
from pyrozoo.inference.graph import DATA, Graph, Site, read_graph


def graphs_of(program: Any, example: Any, given: Sequence[str] | None) -> tuple[Graph, Graph]:
    """The graphs of two runs on other random numbers; values of ``example`` that are read too.

    Raises:
        ValueError: the runs do not draw the same sites.
    """
    whole = Batch.of(2 if example is None else example)
    batch = whole[:2]
    first, second = (_read(program, batch, seed) for seed in (0, 1))
    for name in (*first.sites, *second.sites):
        if not (name in first.sites and name in second.sites):
            raise ValueError(
                f"site {name!r} is not drawn in every run: a program whose sites depend on drawn"
                " values has no graph to invert"
            )
        if first.sites[name].dims != second.sites[name].dims:
            raise ValueError(f"site {name!r} lies in other plates in another run")
    if _grows(program, first, whole):
        batch = whole
        first, second = (_read(program, batch, seed) for seed in (0, 1))
    read = batch.names if given is None else given
    extra = {n: _value(n, batch) for n in read if n in batch and n not in first.sites}
    if extra:
        first = dataclasses.replace(first, sites={**extra, **first.sites}, _below={})
    return first, second


def _read(program: Any, batch: Batch, seed: int) -> Graph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return read_graph(program, batch)


def _grows(program: Any, graph: Graph, batch: Batch) -> bool:
    """Whether a site that all rows share has an entry for each row; the graph is that of two."""
    shared = [s for s in graph.sites.values() if s.kind == "sample" and not s.local]
    if not shared or len(batch) < 3:
        return False
    more = _read(program, batch[:3], 0).sites
    return any(s.name in more and s.event_shape != more[s.name].event_shape for s in shared)


def _value(name: str, batch: Batch) -> Site:
    """A value that is read and is no site, as if it were one."""
    value = batch[name]
    return Site(
        name=name,
        fn=dist.Normal(torch.zeros(value.shape), 1.0).to_event(value.dim() - 1),
        dims={DATA: -1},
        sizes={DATA: len(batch)},
        parents=frozenset(),
        kind="sample",
        infer={"_input": True},
        scale=1.0,
        dtype=value.dtype,
    )


def plate_dim(graph: Graph) -> int:
    """The tensor dimension of the plate over the data."""
    sites = graph.sites.values()
    return next((s.dims[DATA] for s in sites if s.local and not s.infer.get("_input")), -1)


def find_given(graph: Graph, given: Sequence[str] | None, example: Any) -> tuple[str, ...]:
    """The sites that a guide reads, and values that are no sites.

    By default those without descendants, those that the program observes, and all of ``example``.

    Raises:
        ValueError: a name is no site in plate ``"data"``, or nothing can be read.
    """
    if given is not None:
        if isinstance(given, str) or not given:
            raise ValueError(f"given is a list of at least one site name, got {given!r}")
        return tuple(row_site(graph, name).name for name in given)
    known = () if example is None else Batch.of(example).names
    found = tuple(
        name
        for name, site in graph.sites.items()
        if site.kind == "sample" and site.local and not site.fixed
        and (site.own is not None or not _below(graph, name) or name in known)
    )  # fmt: skip
    for name in found:
        if (
            graph.sites[name].own is not None
            and example is not None
            and name not in Batch.of(example)
        ):
            raise ValueError(
                f"the program observes {name!r} itself, and the batch has no {name!r} that a guide"
                " could read; put it there, too, or name what is to be read with given=[...]"
            )
    return found


def _below(graph: Graph, name: str) -> bool:
    return bool(graph.descendants(name))


def find_targets(
    graph: Graph,
    again: Graph,
    given: Sequence[str],
    sites: Sequence[str] | None,
    own: Mapping[str, Any],
    partly: Collection[str] = (),
) -> list[Site]:
    """The latent sites that a guide has to propose, in the order of the program.

    Args:
        graph, again: of two runs.
        given: sites that are read.
        sites: the sites to propose; default: all that can neither be summed nor computed and have
            something that is given, or observed by the program, below them.
        own: site -> a network of one's own, for any support.
        partly: sites that are known in part in the example: those that are read, and on which
            others depend, are proposed, too.

    Raises:
        ValueError: a site cannot be proposed, or is none.
    """
    wanted = _needed(graph, given) if sites is None else set(sites)
    if sites is None:
        wanted |= {n for n in given if n in partly and _below(graph, n)}
    found = [s for s in graph.sites.values() if s.name in wanted and _latent(s, own)]
    if sites is not None and (unknown := wanted - {s.name for s in found}):
        raise ValueError(f"no continuous latent site is called {', '.join(sorted(unknown))}")
    for site in found:
        if site.name in own:
            continue
        if not site.continuous and not countable(site):
            raise ValueError(
                f"site {site.name!r} ({type(site.fn).__name__}, support {site.fn.support}) can"
                " neither be summed nor proposed: it is discrete, and its values cannot be"
                " enumerated as a whole; put its entries into a plate, so that each is summed"
            )
        if site.continuous:
            bijection(site)
            check_steady(site, again.sites[site.name])
        if site.local and not given:
            raise ValueError(f"site {site.name!r} has nothing to read: name sites with given=[...]")
    return found


def _latent(site: Site, own: Mapping[str, Any]) -> bool:
    if site.kind != "sample" or site.own is not None or site.infer.get("_input"):
        return False
    return site.name in own or not (site.fixed or site.summable)


def _needed(graph: Graph, given: Collection[str]) -> set[str]:
    """Sites that are not given and have something known below them."""
    anchors = {
        name
        for name, site in graph.sites.items()
        if name in given
        or site.kind == "factor"
        or (site.kind == "sample" and site.own is not None)
    }
    return {n for n in graph.sites if n not in anchors and graph.descendants(n) & anchors}
