"""Data that a program generates, with the latents behind them, and the density of a guide there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.contract import add, sum_out
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.bounds.runs import in_particles, one_by_one, sample_sites
from pyrozoo.inference.drawing import rows_first
from pyrozoo.inference.graph import DATA, Graph, Site
from pyrozoo.inference.modes import evaluating, seeded
from pyrozoo.inference.observing import Net, observe
from pyrozoo.inference.plan import Plan
from pyrozoo.inference.running import slices


def given_sites(
    graph: Graph, names: Iterable[str] | None, observed: Iterable[str] | None
) -> set[str]:
    """The sites that a guide is given: as asked, those of the data, or the leaves.

    Args:
        graph: of the program.
        names: keys of the data, if there are any.
        observed: what is asked for.

    Raises:
        ValueError: the program weighs or observes something itself, or a site does not fit.
    """
    for site in graph.sites.values():
        if site.kind == "factor" or site.own is not None:
            what = "a factor" if site.kind == "factor" else "observed by the program (obs=)"
            raise ValueError(
                f"site {site.name!r} is {what}: data can only be simulated by a program that draws"
                " everything"
            )
    if observed is not None:
        found = {observed} if isinstance(observed, str) else set(observed)
    elif names is not None:
        found = set(names) & graph.sites.keys()
    else:
        leaves = (s for s in graph.sites.values() if s.local and is_latent(s))
        found = {s.name for s in leaves if not graph.descendants(s.name)}
    for name in found:
        if name not in graph.sites or not graph.sites[name].local:
            known = ", ".join(s.name for s in graph.sites.values() if s.local)
            raise ValueError(f"{name!r} is not a site in plate {DATA!r} (sites: {known})")
    return found


def is_latent(site: Site, given: Iterable[str] = ()) -> bool:
    """Whether a program draws it and nobody knows it."""
    return site.kind == "sample" and not site.fixed and site.name not in given


def simulate(program: Net, inputs: Batch, seed: int) -> dict[str, Tensor]:
    """One draw of every site for a batch of inputs, ``(*plates, *event)`` by name."""
    ready = observe(program, inputs.names).pairing.prepare(inputs)
    with torch.no_grad(), evaluating(program), poutine.block(), seeded(seed):
        sites = sample_sites(poutine.trace(program).get_trace(ready))
    return {name: site["value"] for name, site in sites.items()}


def one_draw(site: Site, value: Tensor) -> Tensor:
    """A draw as data have it: ``(rows, *inner plates, *event)``."""
    return rows_first(site, value.unsqueeze(0))[0]


def as_data(
    drawn: dict[str, Tensor], graph: Graph, template: Batch, given: set[str], inputs: Iterable[str]
) -> Batch:
    """A batch of the given sites with drawn values, present where they are in the template."""
    values: dict[str, Any] = {n: template.stored(n) for n in inputs if n in template}
    values |= {name: one_draw(graph.sites[name], drawn[name]) for name in given}
    pairs = {n: (v, template.present(n)) if template.partly(n) else v for n, v in values.items()}
    return Batch.of(pairs, rows=len(template))


def densities(
    program: Net,
    guide: Net,
    data: Batch,
    truth: dict[str, Tensor],
    num_draws: int,
    *,
    inputs: tuple[str, ...],
    batch_size: int,
    seed: int,
) -> tuple[Tensor, Tensor] | None:
    """log q of all that the guide proposes, at true values ``(rows,)`` and at draws ``(L, rows)``.

    None if it has none: something is auxiliary, a point mass, shared by all rows or known in part,
    or nothing is proposed.
    """
    objective = EnumELBO(kl="sampled", split=False, inputs=inputs)
    own, others, start = [], [], 0
    for p, q, piece, plan in slices(objective, program, guide, data, batch_size, seed):
        names = _proposed(plan)
        if not names:
            return None
        values = {n: _rows(plan.program.sites[n], truth[n], start, len(piece)) for n in names}
        at_truth = poutine.trace(poutine.condition(q, data=values)).get_trace(piece)
        times, count = (num_draws, 1) if one_by_one(p, piece) else (1, num_draws)
        net = in_particles(q, plan, count)
        traces = [poutine.trace(net).get_trace(piece) for _ in range(times)]
        own.append(_log_density(at_truth, names, plan)[0])
        others.append(torch.cat([_log_density(trace, names, plan) for trace in traces]))
        start += len(piece)
    return torch.cat(own), torch.cat(others, 1)


def _proposed(plan: Plan) -> list[str]:
    assert plan.guide is not None
    names = []
    for name, site in plan.guide.sites.items():
        role = plan.roles.get(name)
        if site.kind != "sample" or role in ("given", "masked", "pruned"):
            continue
        if role != "proposed" or site.fixed or not site.local:
            return []
        names.append(name)
    return names


def _rows(site: Site, value: Tensor, start: int, count: int) -> Tensor:
    return value.narrow(site.dims[DATA] - len(site.event_shape), start, count)


def _log_density(trace: Any, names: list[str], plan: Plan) -> Tensor:
    """``(draws, rows)``; one draw if there is no plate for several."""
    assert plan.guide is not None
    parts = []
    for name in names:
        site, dims = trace.nodes[name], plan.guide.sites[name].dims
        value = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
        value = sum_out(value, [d for plate, d in dims.items() if plate != DATA])
        value = value.movedim(dims[DATA], -1)
        parts.append(value.reshape(-1, value.shape[-1]))
    return add(parts)
