"""Draws of a pair together with their densities, in passes that fit the memory.

With g the latent sites that all rows share, l_n those of row n and x_n all that is observed in the
row, the draws come with ::

    log p(x_n | g) = log sum over l_n of p(x_n, l_n | g)     where there is a g
    log p(x_n, l_n),  log q(l_n | x_n)                       where there is none

Finite sites that the program sums are summed; all others of the row are integrated by importance
sampling with the guide, ``(1/M) sum_m p(x_n, l_nm | g) / q(l_nm | x_n, g)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.contract import add
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.bounds.runs import in_particles, nesting, one_by_one, run, sample_sites
from pyrozoo.inference.bounds.terms import take_apart
from pyrozoo.inference.bounds.weights import log_weights
from pyrozoo.inference.drawing import draw, rows_first
from pyrozoo.inference.evidence import evenly, fitting, refuse_shared
from pyrozoo.inference.graph import DATA, Graph, Site
from pyrozoo.inference.observing import Net, Observed
from pyrozoo.inference.plan import Plan
from pyrozoo.inference.running import slices

LARGER = 8  # than what fits a processor's cache, for fewer passes


@dataclass
class Drawn:
    """Draws ``(draws, rows, *inner plates, *event)`` by name, shared sites without the rows.

    Attributes:
        plan: what was done with every site.
        sites: latent and deterministic sites, and leaves generated anew at them.
        values: what is known: sites and inputs, by name, with what is present.
        known: rows in which anything is observed, ``(rows,)``.
        shared: latent sites that all rows share, g.
        integrated: sites of a row that were integrated by draws of the guide.
        refusal: why there are no densities, or ''.
        log_likelihood: log p(x_n | g), ``(draws, rows)``; with g only.
        log_p, log_q: of g and all rows, ``(draws,)``; without g of each row, ``(draws, rows)``.
    """

    plan: Plan
    shared: list[str]
    integrated: list[str]
    refusal: str
    sites: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    known: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    log_likelihood: Tensor | None = None
    log_p: Tensor | None = None
    log_q: Tensor | None = None


class _Once(Messenger):
    """Draw every site once: a later run gets what the first has drawn, kept in ``values``."""

    def __init__(self, values: dict[str, Tensor], names: Iterable[str] | None = None) -> None:
        super().__init__()
        self.values, self.names = values, None if names is None else frozenset(names)

    def _skip(self, msg: Any) -> bool:
        other = self.names is not None and msg["name"] not in self.names
        pruned = msg["mask"] is False  # the guide's, or the program's at the guide's value
        return other or pruned or msg["is_observed"] or site_is_subsample(msg)

    def _pyro_sample(self, msg: Any) -> None:
        if not self._skip(msg) and msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if not self._skip(msg):
            self.values.setdefault(msg["name"], msg["value"])


def _once(half: Observed, values: dict[str, Tensor]) -> Observed:
    """Half of a pair that draws every site once, see :class:`_Once`."""
    return Observed(_Once(values)(half.module), half.pairing, half.of_guide)


def plates_of(site: Site) -> list[str]:
    """The plates of a site, that over the rows first, the others as the program enters them."""
    return [DATA] * site.local + [plate for plate in site.dims if plate != DATA]


def draw_with_densities(
    program: Net,
    guide: Net,
    data: Data,
    num_draws: int,
    num_particles: int,
    *,
    inputs: Iterable[str] = (),
    batch_size: int = 256,
    seed: int = 0,
) -> Drawn:
    """Draw from the guide, sites that all rows share once a draw: see :class:`Drawn`.

    Args:
        program, guide: the fitted pair.
        data: what is known.
        num_draws: of the guide.
        num_particles: M of the formula of the module, at least 2.
        inputs: names of values that are read but are no sites.
        batch_size: rows at a time.
        seed: of the draws; the global random state is left as it was.

    Raises:
        ValueError: the pair is outside the class of the row-wise bound, there are no rows, or a
            value or an option does not fit.
    """
    objective = EnumELBO(kl="sampled", split=False, inputs=tuple(inputs))
    objective._reparameterised = False  # there is no gradient
    found: Drawn | None = None
    pieces: list[dict[str, Tensor]] = []
    for p, q, batch, plan in slices(objective, program, guide, data, batch_size, seed):
        if found is None:
            found = _begin(plan)
            fit = fitting(p, q, batch, LARGER)
            counts = evenly(num_draws, fit)
            once: list[dict[str, Tensor]] = [{} for _ in counts]
        with pyro.validation_enabled(False):
            parts = [
                _pass(found, p, q, batch, count, values, num_particles, fit)
                for count, values in zip(counts, once, strict=True)
            ]
        _note(found, p, batch)
        pieces.append({n: torch.cat([part[n] for part in parts]) for n in parts[0]})
    assert found is not None
    _finish(found, pieces)
    return found


def _begin(plan: Plan) -> Drawn:
    assert plan.guide is not None
    local = {n: s for n, s in plan.guide.sites.items() if s.local and s.kind == "sample"}
    mine = ("proposed", "merged", "auxiliary")
    integrated = [n for n in local if plan.roles.get(n, "auxiliary") in mine]
    proposed = [n for n, role in plan.roles.items() if role == "proposed"]
    shared = [n for n in proposed if not plan.program.sites[n].local]
    refusal = ""
    try:
        refuse_shared(dataclasses.replace(plan, guide=Graph(local)))
    except ValueError as error:
        refusal = str(error)
    return Drawn(plan, shared, integrated, refusal)


def _pass(
    found: Drawn,
    p: Observed,
    q: Observed,
    batch: Batch,
    count: int,
    once: dict[str, Tensor],
    num_particles: int,
    fit: int,
) -> dict[str, Tensor]:
    """Draw ``count`` times for the rows of a slice; ``once`` has what all slices share."""
    plan, drawn = p.pairing.plan(batch), dict(once)
    sites, again = plan.program.sites, _once(q, drawn)
    prior = [n for n, role in plan.roles.items() if role == "pruned" and not sites[n].local]
    new, alone = {}, bool(one_by_one(p, batch))
    with _Once(once, prior):
        draws = draw(p, again, batch, plan, count, {*plan.roles, *plan.computed}, alone=alone)
    for name, found_draws in draws.items():
        value = found_draws.values
        if plan.roles.get(name) == "own" or sites[name].own is not None:
            value, _ = found_draws.each(_sampled)  # the program has given its own value
        new[name] = rows_first(sites[name], value)
    assert plan.guide is not None
    once |= {n: drawn[n] for n, s in plan.guide.sites.items() if not s.local and n in drawn}
    if found.refusal:
        return new
    local, whole_p, local_q, whole_q = _densities(p, again, batch, count, alone)
    if not found.shared:
        return {**new, "/log_p": local + local_q, "/log_q": local_q}
    if found.integrated:
        shared = {n: v for n, v in once.items() if n in plan.guide.sites}
        if alone:
            passes = [_weights(p, q, batch, shared, 1) for _ in range(num_particles)]
            local = torch.cat(passes).double().logsumexp(0, keepdim=True) - math.log(num_particles)
        else:
            local = _integrate(p, q, batch, shared, num_particles, max(1, fit // num_particles))
    return {**new, "/local": local, "/log_p": whole_p + whole_q, "/log_q": whole_q}


def _densities(
    p: Observed, again: Observed, batch: Batch, count: int, alone: bool
) -> tuple[Tensor, ...]:
    """log p - log q and log q at the draws that ``again`` repeats, for the rows and for the rest:
    ``(draws, rows), (draws,), (draws, rows), (draws,)``."""
    plan, rows = p.pairing.plan(batch), len(batch)
    depth = nesting(plan)
    guide_trace = poutine.trace(in_particles(again, plan, count, not alone)).get_trace(batch)
    program = in_particles(EnumMessenger(-2 - depth)(p), plan, count, not alone)
    program = poutine.replay(program, guide_trace)
    sites, guide = _plain(poutine.trace(program).get_trace(batch)), _plain(guide_trace)
    local, whole = _split(take_apart(plan, sites, guide, rows, count).by_row(), count, batch)
    minus, minus_whole = _split(take_apart(plan, {}, guide, rows, count).by_row(), count, batch)
    return local, whole, -minus, -minus_whole


def _plain(trace: Any) -> dict[str, Any]:
    """The sites of a trace without the scales of training."""
    return {name: {**site, "scale": 1.0} for name, site in sample_sites(trace).items()}


def _split(parts: Mapping[str, Tensor], count: int, batch: Batch) -> tuple[Tensor, Tensor]:
    """Terms added up: those of the rows, ``(count, rows)``, and those that the rows share."""
    zero = torch.zeros((), dtype=torch.float64, device=batch.device)
    local = add([zero.expand(count, len(batch)), *(v for v in parts.values() if v.dim() == 2)])
    whole = [v.reshape(-1) for v in parts.values() if v.dim() < 2]
    return local, add([zero.expand(count), *whole])


def _integrate(
    p: Observed, q: Observed, batch: Batch, shared: dict[str, Tensor], particles: int, size: int
) -> Tensor:
    """log p(x_n | g), ``(draws, rows)``, at draws of g that are ``(draws, ...)``."""
    found = []
    total = len(next(iter(shared.values())))
    for start in range(0, total, size):
        some = {n: v[start : start + size] for n, v in shared.items()}
        count = min(size, total - start) * particles
        repeated = {n: v.repeat_interleave(particles, 0) for n, v in some.items()}
        weights = _weights(p, q, batch, repeated, count)
        by_draw = weights.double().reshape(-1, particles, len(batch))
        found.append(by_draw.logsumexp(1) - math.log(particles))
    return torch.cat(found)


def _weights(
    p: Observed, q: Observed, batch: Batch, shared: dict[str, Tensor], count: int
) -> Tensor:
    """Log importance weights, ``(count, rows)``, at values of shared sites."""
    plan = p.pairing.plan(batch)
    program, guide = (_plain(trace) for trace in run(p, _once(q, dict(shared)), batch, count))
    return log_weights(take_apart(plan, program, guide, len(batch), count))


def _sampled(values: Tensor, fn: Any) -> tuple[Tensor, int]:
    return fn.sample(), fn.event_dim


def _note(found: Drawn, p: Observed, batch: Batch) -> None:
    """Keep what is known of a slice."""
    plan = p.pairing.plan(batch)
    own = [n for n, role in plan.roles.items() if role == "own"]
    known = torch.full((len(batch),), any(plan.program.sites[n].local for n in own))
    for name in batch.names:
        pair = (batch[name].cpu(), batch.present(name).cpu())
        old = found.values.get(name)
        found.values[name] = (
            pair if old is None else (torch.cat([old[0], pair[0]]), torch.cat([old[1], pair[1]]))
        )
        if name in plan.observed:
            known |= batch.extent(name).rows.cpu()
    found.known = torch.cat([found.known, known])


def _finish(found: Drawn, pieces: list[dict[str, Tensor]]) -> None:
    """Put the slices together."""
    sites = found.plan.program.sites
    for name, site in sites.items():  # what the program itself observes
        if found.plan.roles.get(name) == "own" and site.own is not None:
            shape = [1] * max((-dim for dim in site.dims.values()), default=0)
            for plate, dim in site.dims.items():
                shape[dim] = site.sizes[plate]
            own = rows_first(site, site.own.expand(*shape, *site.event_shape).unsqueeze(0))[0].cpu()
            if not site.local or len(own) == len(found.known):
                found.values[name] = (own, torch.ones(own.shape[:1], dtype=torch.bool))
    for name in pieces[0]:
        if name in sites:
            local = sites[name].local
            parts = [piece[name].cpu() for piece in pieces]
            found.sites[name] = torch.cat(parts, 1) if local else parts[0]
    if found.refusal:
        return
    log_p, log_q = ([piece[n].cpu() for piece in pieces] for n in ("/log_p", "/log_q"))
    if found.shared:
        found.log_likelihood = torch.cat([piece["/local"].cpu() for piece in pieces], 1)
        found.log_p, found.log_q = log_p[0] + found.log_likelihood.sum(1), log_q[0]
    else:
        found.log_p, found.log_q = torch.cat(log_p, 1), torch.cat(log_q, 1)
