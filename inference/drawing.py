"""Draws of the sites of a pair: proposed ones from the guide, summed ones from exact conditionals.

What both :mod:`.posterior` and the diagnostics (:mod:`.comparison`) draw with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.contract import Factor, expectations, sum_out
from pyrozoo.inference.bounds.runs import in_particles, nesting, one_by_one, sample_sites
from pyrozoo.inference.bounds.terms import Terms, take_apart
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


class Draws(NamedTuple):
    """Draws of a site, and the distributions that they are from, one for each run."""

    values: Tensor  # (samples, *plates, *event)
    fns: list[Any]

    def each(self, value: Callable[[Tensor, Any], tuple[Tensor, int]]) -> tuple[Tensor, int]:
        """What a function gives of the values and the distribution of each run, put together.

        The function gives a tensor and the number of its event dims; so does this.
        """
        parts = zip(self.values.chunk(len(self.fns)), self.fns, strict=True)
        found, event_dims = zip(*(value(*part) for part in parts), strict=True)
        dims = self.values.dim() - self.fns[0].event_dim + event_dims[0]
        spread = [v.reshape((1,) * (dims - v.dim()) + v.shape) for v in found]
        return torch.cat(spread), event_dims[0]


@dataclass
class _Started:
    """What the guide has drawn, and what has been summed given it; by name, as the run has it."""

    drawn: dict[str, Tensor]
    fns: dict[str, Any]
    terms: Terms | None = None


def draw(
    p: Observed,
    q: Observed,
    batch: Batch,
    plan: Plan,
    num_samples: int,
    wanted: Collection[str],
    importance: bool = False,
    alone: bool | None = None,
) -> dict[str, Draws]:
    """Draws of the wanted sites, and perhaps of others before them.

    All draws are made in one run; one by one (``alone``) if the program or the guide cannot do with
    the dimension that this takes (weights that are drawn and given to a layer, for example).
    """
    if not wanted:
        return {}
    needed = {*wanted, *(touching(plan) if _sums(plan, batch, wanted) else ())}
    part = p if importance else observed_until(p, needed, plan)
    if alone is None:
        alone = bool(one_by_one(part, batch))
    times, count = (num_samples, 0) if alone else (1, num_samples)
    starts = [_start(p, q, batch, plan, count, wanted, importance) for _ in range(times)]
    if importance:
        _resample(starts, plan, alone)
    runs = [_finish(p, batch, plan, count, wanted, start) for start in starts]
    return {
        name: Draws(torch.cat([run[name][0] for run in runs]), [run[name][1] for run in runs])
        for name in runs[0]
    }


def _start(
    p: Observed,
    q: Observed,
    batch: Batch,
    plan: Plan,
    count: int,
    wanted: Collection[str],
    importance: bool,
) -> _Started:
    """Run the guide, and the program as far as it is needed to draw what is summed.

    The draws, ``count`` of them, have a dimension; a single one, ``count = 0``, has none.
    """
    depth = nesting(plan)
    guide_trace = poutine.trace(in_particles(q, plan, count or 1, count > 0)).get_trace(batch)
    proposed = sample_sites(guide_trace)
    started = _Started(
        {n: s["value"] for n, s in proposed.items() if n in plan.program.sites},
        {n: s["fn"] for n, s in proposed.items()},
    )
    if importance or _sums(plan, batch, wanted):
        whole = p if importance else observed_until(p, touching(plan), plan)
        program = in_particles(EnumMessenger(-2 - depth)(whole), plan, count or 1, count > 0)
        trace = poutine.trace(poutine.replay(program, guide_trace)).get_trace(batch)
        started.terms = take_apart(plan, sample_sites(trace), proposed, len(batch), count or 1)
        for name, value in draw_summed(started.terms, depth).items():
            started.drawn[name] = value if count else _in_own_plates(plan, name, value[0])
    return started


def _in_own_plates(plan: Plan, name: str, value: Tensor) -> Tensor:
    """``(*plates, *event)`` with all plates of the pair, without those left of the site's own."""
    site = plan.program.sites[name]
    width = max((-dim for dim in site.dims.values()), default=0) + site.fn.event_dim
    return value.reshape(value.shape[value.dim() - width :])


def _finish(
    p: Observed, batch: Batch, plan: Plan, count: int, wanted: Collection[str], start: _Started
) -> dict[str, tuple[Tensor, Any]]:
    """Run the program at what has been drawn: ``(draws, *plates, *event)``, and distributions."""
    drawn, depth = dict(start.drawn), nesting(plan)
    for name in plan.observed:  # inner sites keep what is known; leaves are generated anew
        site = plan.program.sites[name]
        if plan.roles[name] == "given" and not is_leaf(plan, name):
            drawn[name] = site.to_plates(batch[name], len(site.event_shape)).to(site.dtype)
    for name in list(drawn):
        if plan.roles.get(name) in ("given", "masked", "pruned") and is_leaf(plan, name):
            del drawn[name]
    with _Fix(drawn, plan, batch):
        net = in_particles(until(p.module, wanted, plan), plan, count or 1, count > 0)
        trace = poutine.trace(net).get_trace(batch)
    found = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        own = plan.program.sites[name]
        if own.kind == "deterministic" and name in wanted:
            found[name] = _computed(own, site["value"], count or 1, depth)
        elif own.kind == "sample":
            value = site["value"].expand(site["fn"].batch_shape + site["fn"].event_shape)
            if not count:
                value = with_draws(value, depth, site["fn"].event_dim)
            fn = start.fns.get(name) if name in drawn else site["fn"]
            found[name] = (value, fn or dist.Delta(value, event_dim=site["fn"].event_dim))
    return found


def _computed(site: Site, value: Tensor, count: int, depth: int) -> tuple[Tensor, Any]:
    """The value of a deterministic site, the same for all draws if it depends on none."""
    event_dim = len(site.event_shape)
    split = value.dim() - event_dim
    if not site.dims and value.shape[:split].numel() == count:  # its event may be of plates
        value = value.reshape((count,) + (1,) * depth + value.shape[split:])
    value = with_draws(value, depth, event_dim)
    value = value.expand(count, *value.shape[1:])
    return value, dist.Delta(value, event_dim=event_dim)


def with_draws(value: Tensor, depth: int, event_dim: int) -> Tensor:
    """``(*plates, *event)`` as one draw, ``(1, *plates, *event)`` with all plates of the pair."""
    return value.reshape((1,) * (1 + depth + event_dim - value.dim()) + value.shape)


def _sums(plan: Plan, batch: Batch, wanted: Collection[str]) -> bool:
    """Whether sites are drawn from exact conditionals."""
    return not _read(plan, batch, wanted).isdisjoint(plan.summed)


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


def _resample(starts: list[_Started], plan: Plan, alone: bool) -> None:
    """Draw the particles of each row again, in proportion to their importance weights."""
    for name in starts[0].drawn:
        if not plan.program.sites[name].local:
            raise ValueError(f"importance weights by row: site {name!r} is shared by all rows")
    terms = [start.terms for start in starts if start.terms is not None]
    weights, depth = torch.cat([log_weights(t) for t in terms]), nesting(plan)
    count, rows = weights.shape
    chosen = dist.Categorical(logits=weights.T).sample((count,))
    plates = [1] * depth
    plates[terms[0].data_dim] = rows
    index = chosen.reshape(count, *plates)
    for name in starts[0].drawn:
        values = [start.drawn[name] for start in starts]
        event_dim = plan.program.sites[name].fn.event_dim
        whole = torch.cat([with_draws(value, depth, event_dim) for value in values])
        full = index.reshape(index.shape + (1,) * event_dim)
        again = whole.expand(count, *whole.shape[1:]).take_along_dim(full, -1 - depth - event_dim)
        for i, start in enumerate(starts):
            start.drawn[name] = again[i].reshape(values[i].shape) if alone else again
    for start in starts:
        start.fns = {}


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
