"""Posteriors: draws of every latent site, exact responsibilities, predictions of any site.

Latent sites that the guide proposes are drawn from it; sites that are summed are drawn from, or
reported as, their exact conditional given those draws.  Where a value is known it is kept.  Rows
are taken in slices, and nothing here changes a parameter, a buffer or the random state's owner.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.contract import Factor, add, by_row, expectations, sum_out
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.bounds.terms import PARTICLES, Terms, nesting, sample_sites, take_apart
from pyrozoo.inference.bounds.weights import log_weights
from pyrozoo.inference.graph import DATA, Site, innermost
from pyrozoo.inference.observing import Net, Observed
from pyrozoo.inference.plan import Plan
from pyrozoo.inference.reading import read_count
from pyrozoo.inference.running import observed_until, slices, touching, until


def responsibilities(
    program: Net,
    guide: Net,
    data: Data,
    site: str = "y",
    *,
    num_samples: int = 16,
    inputs: Iterable[str] = (),
    batch_size: int = 1024,
    seed: int | None = None,
) -> Tensor:
    """The probabilities of a finite site, ``(rows, K)``: one for a known value, else its posterior.

    Exact given each draw of the guide: for a site that is summed in the program the exact
    conditional, averaged over ``num_samples`` draws; for one that the guide proposes, the guide's
    probabilities. Rows in which nothing that depends on the site is observed get its prior.

    Raises:
        ValueError: there is no such finite site in plate ``"data"`` alone, there are no rows, or a
            value or an option does not fit.
    """
    pieces, num_samples = [], read_count("num_samples", num_samples)
    objective = EnumELBO(num_samples, kl="sampled", split=False, inputs=tuple(inputs))
    for p, q, batch, plan in slices(objective, program, guide, data, batch_size, seed):
        pieces.append(_responsibilities(objective, p, q, batch, plan, _finite_site(plan, site)))
    return torch.cat(pieces)


def posterior(
    program: Net,
    guide: Net,
    data: Data,
    num_samples: int = 1,
    *,
    predictive: bool = False,
    importance: bool = False,
    inputs: Iterable[str] = (),
    batch_size: int = 1024,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Draws of every latent site, ``(num_samples, rows, *event)`` by name.

    Sites outside plate ``"data"`` are ``(num_samples, *event)``, drawn once for each slice of
    ``batch_size`` rows.  With ``predictive=True`` draws of all other sites follow: what the program
    generates at those latents, for observed sites too (reconstructions).

    With ``importance=True`` the ``num_samples`` draws of each row are drawn again, with replacement
    and in proportion to p(latents, observed) / q(latents): as their number grows they come from the
    exact posterior, whatever the guide is (sampling importance resampling, as Mattei and Frellsen,
    "MIWAE: deep generative modelling and imputation of incomplete data sets", 2019, impute).

    Raises:
        ValueError: ``importance=True`` and the program has latent sites that all rows share, there
            are no rows, or a value or an option does not fit.
    """
    num_samples = read_count("num_samples", num_samples)
    pieces: list[dict[str, Tensor]] = []
    local: set[str] = set()
    objective = EnumELBO(kl="sampled", split=False, inputs=tuple(inputs))
    for p, q, batch, plan in slices(objective, program, guide, data, batch_size, seed):
        latent = {n for n, role in plan.roles.items() if role not in ("given", "masked", "own")}
        latent -= {n for n, role in plan.roles.items() if role == "pruned" and _leaf(plan, n)}
        wanted = plan.roles if predictive else latent
        draws = _draw(p, q, batch, plan, num_samples, wanted, importance)
        names = [n for n in draws if n in wanted]
        pieces.append({n: _rows_first(plan.program.sites[n], draws[n][0]) for n in names})
        local |= {n for n in names if plan.program.sites[n].local}
    return {
        name: torch.cat([piece[name] for piece in pieces], 1) if name in local else pieces[0][name]
        for name in pieces[0]
    }


def predict(
    program: Net,
    guide: Net,
    data: Data,
    site: str,
    *,
    observed: str = "keep",
    num_samples: int = 16,
    importance: bool = False,
    inputs: Iterable[str] = (),
    batch_size: int = 1024,
    seed: int | None = None,
) -> Tensor:
    """What the model expects at a site: probabilities ``(rows, K)``, or means ``(rows, *event)``.

    Args:
        program, guide: the fitted pair.
        data: what is known.
        site: any site in plate ``"data"``: a label, a latent, another modality, x itself.
        observed: ``"keep"`` conditions on everything in the data, so that predicting an observed x
            is a reconstruction and a known label is certain; ``"ignore"`` drops the values of the
            asked site first, so that they cannot be looked at.
        num_samples: draws of the guide that are averaged.
        importance: draw them again by their importance weights, see :func:`posterior`; not for the
            probabilities of a latent finite site, which are exact given each draw of the guide.
        inputs: names of values that are read but are no sites.
        batch_size: rows at a time.
        seed: of the draws; without one they come from the global random state.

    Raises:
        ValueError: there is no such site, ``observed`` is neither word, there are no rows, or a
            value or an option does not fit.
    """
    if observed not in ("keep", "ignore"):
        raise ValueError(f"observed is 'keep' or 'ignore', got {observed!r}")
    batch = Batch.of(data)
    if observed == "ignore":
        batch = batch.drop(site)
    num_samples = read_count("num_samples", num_samples)
    objective = EnumELBO(num_samples, kl="sampled", split=False, inputs=tuple(inputs))
    pieces = []
    for p, q, piece, plan in slices(objective, program, guide, batch, batch_size, seed):
        target = _local_site(plan, site)
        if _is_label(target) and (not _leaf(plan, site) or site in plan.proposed):
            pieces.append(_responsibilities(objective, p, q, piece, plan, target))
            continue
        values, fn = _draw(p, q, piece, plan, num_samples, [site], importance)[site]
        mean, event_dim = _mean(values, fn, plan.roles[site])
        pieces.append(_rows_first(target, mean, event_dim).mean(0))
    return torch.cat(pieces)


# ---- finite sites --------------------------------------------------------------------------------


def _local_site(plan: Plan, name: str) -> Site:
    site = plan.program.sites.get(name)
    if site is None or site.kind != "sample" or not site.local:
        names = [s.name for s in plan.program.sites.values() if s.kind == "sample" and s.local]
        raise ValueError(f"{name!r} is not a site in plate {DATA!r} (sites: {', '.join(names)})")
    return site


def _finite_site(plan: Plan, name: str) -> Site:
    site = _local_site(plan, name)
    if not site.summable or len(site.dims) > 1:
        kind = type(site.fn).__name__
        raise ValueError(f"site {name!r} ({kind}) is not a finite site of plate {DATA!r} alone")
    return site


def _is_label(site: Site) -> bool:
    return site.summable and len(site.dims) == 1


def _leaf(plan: Plan, name: str) -> bool:
    return not plan.program.descendants(name)


def _responsibilities(
    objective: EnumELBO, p: Observed, q: Observed, batch: Batch, plan: Plan, site: Site
) -> Tensor:
    name, rows = site.name, len(batch)
    support = site.fn.enumerate_support(expand=False)
    counts, known = plan.counts(name, batch), batch.present(name)
    summed, drawn = name in plan.summed, plan.roles[name] in ("proposed", "merged")
    if drawn and not summed and counts is True:
        probs = _of_guide(q, batch, plan, name, objective.num_particles)
    else:
        needed = touching(plan) if summed else {name}
        terms = objective.trace(observed_until(p, needed, plan), q, batch)
        probs = _prior(terms.sites[name]["fn"], support, rows, site.dims[DATA])
        if summed or drawn:
            own = (
                _of_program(terms, name)
                if summed
                else _of_guide(q, batch, plan, name, objective.num_particles)
            )
            mask = torch.as_tensor(counts, device=own.device).reshape(-1, 1)
            probs = torch.where(mask, own, probs)
    if bool(known.any()):
        value = batch[name].to(support.dtype)
        event = tuple(range(2, 2 + len(site.event_shape)))
        equal = value.unsqueeze(1) == support.reshape(1, len(support), *site.event_shape)
        certain = equal.all(event) if event else equal
        probs = torch.where(known.unsqueeze(-1), certain.to(probs.dtype), probs)
    return probs


def _of_program(terms: Terms, name: str) -> Tensor:
    """The exact conditional of a summed site, averaged over the draws."""
    dim = next(d for d, n in terms.names.items() if n == name)
    group = next(g for g in terms.groups if name in {f.name for f in g})
    _, weights = expectations(group, terms.sums, terms.plates)
    own = next(i for i, f in enumerate(group) if f.name == name)
    marginal = terms.weigh(sum_out(weights[own], group[own].sums - {dim}))
    return by_row(marginal, terms.data_dim, dim, terms.rows)


def _of_guide(q: Observed, batch: Batch, plan: Plan, name: str, num_samples: int) -> Tensor:
    """The guide's probabilities of a site that it enumerates, averaged over what it drew before."""
    enumerated = EnumMessenger(-1 - nesting(plan))(q)
    pieces = []
    for _ in range(num_samples):
        sites = sample_sites(poutine.trace(enumerated).get_trace(batch))
        found = {n: s for n, s in sites.items() if "_enumerate_dim" in s["infer"]}
        dims = {n: s["infer"]["_enumerate_dim"] for n, s in found.items()}
        joint = add(s["fn"].log_prob(s["value"]) for s in found.values()).exp()
        joint = sum_out(joint, [d for n, d in dims.items() if n != name])
        data_dim = plan.program.sites[name].dims[DATA]
        pieces.append(by_row(joint, data_dim, dims[name], len(batch)))
        earlier = itertools.takewhile(lambda n: n != name, sites)
        if all(n in found or sites[n]["is_observed"] for n in earlier):
            break  # it would be the same again
    return torch.stack(pieces).mean(0)


def _prior(fn: Any, support: Tensor, rows: int, data_dim: int) -> Tensor:
    """The prior of a finite site, averaged over whatever it depends on."""
    plain = getattr(fn, "proposal_log_prob", fn.log_prob)
    value = support.reshape(len(support), *[1] * len(fn.batch_shape), *fn.event_shape)
    return by_row(plain(value).exp(), data_dim, -1 - len(fn.batch_shape), rows)


# ---- draws ---------------------------------------------------------------------------------------


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


def _draw(
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
        return _draw_at_once(p, q, batch, plan, num_samples, wanted, importance, plate)
    except (RuntimeError, IndexError, ValueError):
        if importance:
            raise
        draw = functools.partial(_draw_at_once, p, q, batch, plan, 1, wanted, False)
        singles = [draw(_alone) for _ in range(num_samples)]
    found = {}
    for name in singles[0]:
        values = torch.cat([single[name][0] for single in singles])
        event_dim = singles[0][name][1].event_dim
        found[name] = (values, dist.Delta(values, event_dim=event_dim))
    return found


def _alone(net: Any) -> Any:
    return net


def _draw_at_once(
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
        drawn |= _draw_summed(terms, depth)
        if importance:
            drawn = _resample(drawn, terms, depth)
            fns = {}
    for name in plan.observed:  # inner sites keep what is known; leaves are generated anew
        site = plan.program.sites[name]
        if plan.roles[name] == "given" and not _leaf(plan, name):
            drawn[name] = site.to_plates(batch[name], len(site.event_shape)).to(site.dtype)
    for name in list(drawn):
        if plan.roles.get(name) in ("given", "masked", "pruned") and _leaf(plan, name):
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


def _draw_summed(terms: Terms, depth: int) -> dict[str, Tensor]:
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


def _mean(values: Tensor, fn: Any, role: str) -> tuple[Tensor, int]:
    """The mean of each draw's distribution where it has one, else the draws; its event dims."""
    if role != "merged":
        if isinstance(fn, dist.Categorical):
            return fn.probs, 1
        if hasattr(innermost(fn), "average"):  # codes of categories have no mean
            return innermost(fn).average(), fn.event_dim
        with contextlib.suppress(NotImplementedError):
            return fn.mean.expand(values.shape), fn.event_dim
    return values, fn.event_dim


def _rows_first(site: Site, value: Tensor, event_dim: int | None = None) -> Tensor:
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
