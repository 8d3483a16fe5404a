"""Draws of the sites of a pair: proposed ones from the guide, summed ones from exact conditionals.

What both :mod:`.posterior` and the diagnostics (:mod:`.comparison`) draw with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.contract import Factor, expectations, sum_out
from pyrozoo.inference.bounds.terms import PARTICLES, Terms, nesting, sample_sites, take_apart
from pyrozoo.inference.bounds.weights import log_weights
from pyrozoo.inference.graph import DATA, Site
from pyrozoo.inference.observing import Observed
from pyrozoo.inference.plan import Plan
from pyrozoo.inference.running import observed_until, touching, until


def is_leaf(plan: Plan, name: str) -> bool:
    """Whether no site of the program depends on this one."""
    return not plan.program.descendants(name)


class _Fix(Messenger):
    """Give latent sites their drawn values, and inner sites their known ones.

    In rows where a site does not count, where neither it nor what depends on it is observed, its
    posterior is its prior given its parents, and it is drawn from that.
    """

    def __init__(self, values: dict[str, Tensor], plan: Plan, batch: Batch) -> None:
        super().__init__()
        self.values, self.plan, self.batch = values, plan, batch

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.values:
            return
        value, counts = self.values[name], self.plan.counts(name, self.batch)
        if counts is not True:
            counts = torch.as_tensor(counts, device=value.device)
            counts = counts.reshape(counts.shape + (1,) * msg["fn"].event_dim)
            value = torch.where(counts, value, msg["fn"].sample())
        msg["value"], msg["done"] = value, True


def draw(
    p: Observed,
    q: Observed,
    batch: Batch,
    plan: Plan,
    num_samples: int,
    wanted: Collection[str],
    importance: bool = False,
) -> dict[str, tuple[Tensor, Any]]:
    """Draws ``(samples, *plates, *event)`` of the wanted sites, and perhaps of others before them,
    with the distributions they are from.

    All draws are made in one run; one by one if the program or the guide cannot do with the
    dimension that this takes (weights that are drawn and given to a layer, for example).
    """
    if not wanted:
        return {}
    try:
        plate = pyro.plate(PARTICLES, num_samples, dim=-1 - nesting(plan))
        return _at_once(p, q, batch, plan, num_samples, wanted, importance, plate)
    except (RuntimeError, IndexError, ValueError):
        if importance:
            raise
        single = functools.partial(_at_once, p, q, batch, plan, 1, wanted, False)
        singles = [single(_alone) for _ in range(num_samples)]
    found = {}
    for name in singles[0]:
        values = torch.cat([single[name][0] for single in singles])
        event_dim = singles[0][name][1].event_dim
        found[name] = (values, dist.Delta(values, event_dim=event_dim))
    return found


def _alone(net: Any) -> Any:
    return net


def _at_once(
    p: Observed,
    q: Observed,
    batch: Batch,
    plan: Plan,
    num_samples: int,
    wanted: Collection[str],
    importance: bool,
    particles: Callable[[Any], Any],
) -> dict[str, tuple[Tensor, Any]]:
    """The same, in one run; the dimension of the draws comes of the plate ``particles``, if any."""
    depth = nesting(plan)
    guide_trace = poutine.trace(particles(q)).get_trace(batch)
    proposed = sample_sites(guide_trace)
    drawn = {n: s["value"] for n, s in proposed.items() if n in plan.program.sites}
    fns = {n: s["fn"] for n, s in proposed.items()}
    if importance or _read(plan, batch, wanted).intersection(plan.summed):
        whole = p if importance else observed_until(p, touching(plan), plan)
        program = particles(EnumMessenger(-2 - depth)(whole))
        trace = poutine.trace(poutine.replay(program, guide_trace)).get_trace(batch)
        terms = take_apart(plan, sample_sites(trace), proposed, len(batch), num_samples)
        drawn |= draw_summed(terms, depth)
        if importance:
            drawn = _resample(drawn, terms, depth)
            fns = {}
    for name in plan.observed:  # inner sites keep what is known; leaves are generated anew
        site = plan.program.sites[name]
        if plan.roles[name] == "given" and not is_leaf(plan, name):
            drawn[name] = site.to_plates(batch[name], len(site.event_shape)).to(site.dtype)
    for name in list(drawn):
        if plan.roles.get(name) in ("given", "masked", "pruned") and is_leaf(plan, name):
            del drawn[name]
    if particles is _alone:  # summed sites come with a dimension of draws
        drawn = {n: v[0] if n not in proposed and n in plan.summed else v for n, v in drawn.items()}
    with _Fix(drawn, plan, batch):
        trace = poutine.trace(particles(until(p.module, wanted, plan))).get_trace(batch)
    found = {}
    for name, site in sample_sites(trace).items():
        if plan.program.sites[name].kind == "sample":
            value = site["value"].expand(site["fn"].batch_shape + site["fn"].event_shape)
            if particles is _alone:
                lead = depth - len(site["fn"].batch_shape)
                value = value.reshape(1, *[1] * lead, *value.shape)
            fn = fns.get(name) if name in drawn else site["fn"]
            found[name] = (value, fn or dist.Delta(value, event_dim=site["fn"].event_dim))
    return found


def _read(plan: Plan, batch: Batch, wanted: Collection[str]) -> set[str]:
    """The wanted sites and all whose values they are drawn from."""
    found, left = set[str](), list(wanted)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            of_guide = name in plan.proposed and plan.counts(name, batch) is True
            left += [] if of_guide else plan.program.sites[name].parents
    return found


def _resample(drawn: dict[str, Tensor], terms: Terms, depth: int) -> dict[str, Tensor]:
    """Draw the particles of each row again, in proportion to their importance weights."""
    for name in drawn:
        if not terms.plan.program.sites[name].local:
            raise ValueError(f"importance weights by row: site {name!r} is shared by all rows")
    chosen = dist.Categorical(logits=log_weights(terms).T).sample((terms.num_particles,))
    plates = [1] * depth
    plates[terms.data_dim] = terms.rows
    index = chosen.reshape(terms.num_particles, *plates)
    again = {}
    for name, value in drawn.items():
        event_dim = terms.plan.program.sites[name].fn.event_dim
        whole = value.expand(terms.num_particles, *value.shape[1:])
        full = index.reshape(index.shape + (1,) * event_dim)
        again[name] = whole.take_along_dim(full, -1 - depth - event_dim)
    return again


def draw_summed(terms: Terms, depth: int) -> dict[str, Tensor]:
    """Draw the summed sites one after the other, each from its exact conditional."""
    drawn: dict[str, Tensor] = {}
    sites = terms.sites
    for group in terms.groups:
        left = list(group)
        for factor in group:
            dim = next((d for d, n in terms.names.items() if n == factor.name), None)
            if dim is None:
                continue
            _, weights = expectations(left, terms.sums, terms.plates)
            own = next(i for i, f in enumerate(left) if f.name == factor.name)
            weight = sum_out(weights[own], left[own].sums - {dim})
            if -dim > weight.dim():  # a single value
                weight = weight.unsqueeze(0)
            index = dist.Categorical(probs=weight.movedim(dim, -1)).sample().unsqueeze(-1)
            index = index.movedim(-1, dim)
            event_dim = sites[factor.name]["fn"].event_dim
            value = _take(sites[factor.name]["value"], index, dim, event_dim)
            drawn[factor.name] = value.reshape(value.shape[value.dim() - 1 - depth - event_dim :])
            left = [
                Factor(f.name, _take(f.value, index, dim, 0), f.plates, f.sums - {dim})
                if dim in f.sums
                else f
                for f in left
            ]
    return drawn


def _take(value: Tensor, index: Tensor, dim: int, event_dim: int) -> Tensor:
    """The entries of an enumerated tensor at an index over one of its dimensions."""
    index = index.reshape(index.shape + (1,) * event_dim)
    dim = dim - event_dim
    if -dim > value.dim() or value.shape[dim] == 1:
        return value
    width = max(value.dim(), index.dim())
    value = value.reshape((1,) * (width - value.dim()) + value.shape)
    index = index.reshape((1,) * (width - index.dim()) + index.shape)
    shape = [max(a, b) for a, b in zip(value.shape, index.shape, strict=True)]
    shape[dim] = value.shape[dim]
    value = value.expand(shape)
    shape[dim] = 1
    return value.take_along_dim(index.expand(shape), dim)


def rows_first(site: Site, value: Tensor, event_dim: int | None = None) -> Tensor:
    """``(samples, *plates, *event)`` to ``(samples, rows, *inner plates, *event)``.

    Without rows for a site that all rows share.
    """
    rest = len(site.event_shape) if event_dim is None else event_dim
    event = value.shape[value.dim() - rest :] if rest else torch.Size()
    order = [DATA] * site.local + [plate for plate in site.dims if plate != DATA]
    width = value.dim() - rest
    sources = [width + site.dims[plate] for plate in order]
    others = [d for d in range(1, width) if d not in sources]
    value = value.permute(0, *sources, *others, *range(width, value.dim()))
    return value.reshape(value.shape[: 1 + len(order)] + event)
