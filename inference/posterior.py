"""Posteriors: draws of every latent site, exact responsibilities, predictions of any site.

Latent sites that the guide proposes are drawn from it; sites that are summed are drawn from, or
reported as, their exact conditional given those draws.  Where a value is known it is kept.  Rows
are taken in slices, and nothing here changes a parameter, a buffer or the random state's owner.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.contract import add, by_row, expectations, sum_out
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.bounds.runs import FIX, nesting, sample_sites
from pyrozoo.inference.bounds.terms import Terms
from pyrozoo.inference.drawing import draw, is_leaf, rows_first
from pyrozoo.inference.graph import DATA, Site, innermost
from pyrozoo.inference.observing import Net, Observed
from pyrozoo.inference.plan import Plan
from pyrozoo.inference.reading import read_count
from pyrozoo.inference.running import observed_until, slices, touching


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
    """Draws of every latent and every deterministic site, ``(num_samples, rows, *event)`` by name.

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
        latent -= {n for n, role in plan.roles.items() if role == "pruned" and is_leaf(plan, n)}
        latent |= plan.computed
        wanted = plan.roles.keys() | latent if predictive else latent
        draws = draw(p, q, batch, plan, num_samples, wanted, importance)
        names = [n for n in draws if n in wanted]
        pieces.append({n: rows_first(plan.program.sites[n], draws[n].values) for n in names})
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
        site: any site in plate ``"data"``: a label, a latent, another modality, x itself, or one
            that is deterministic.
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
        if _is_label(target) and (not is_leaf(plan, site) or site in plan.proposed):
            pieces.append(_responsibilities(objective, p, q, piece, plan, target))
            continue
        draws = draw(p, q, piece, plan, num_samples, [site], importance)[site]
        mean, event_dim = draws.each(functools.partial(_mean, plan.roles.get(site, "fixed")))
        pieces.append(rows_first(target, mean, event_dim).mean(0))
    return torch.cat(pieces)


# ---- finite sites --------------------------------------------------------------------------------


def _local_site(plan: Plan, name: str) -> Site:
    site = plan.program.sites.get(name)
    if site is None or site.kind == "factor" or not site.local:
        names = [s.name for s in plan.program.sites.values() if s.kind != "factor" and s.local]
        raise ValueError(f"{name!r} is not a site in plate {DATA!r} (sites: {', '.join(names)})")
    return site


def _finite_site(plan: Plan, name: str) -> Site:
    site = _local_site(plan, name)
    if not _is_label(site):
        kind = type(site.fn).__name__
        raise ValueError(f"site {name!r} ({kind}) is not a finite site of plate {DATA!r} alone")
    return site


def _is_label(site: Site) -> bool:
    return site.kind == "sample" and site.summable and len(site.dims) == 1


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
        part = observed_until(p, needed, plan)
        passes = objective.passes(part, batch)
        found = [_of_program(one.trace(part, q, batch), site, support, summed) for one in passes]
        probs, own = (add(values) / len(passes) for values in zip(*found, strict=True))
        if summed or drawn:
            if not summed:
                own = _of_guide(q, batch, plan, name, objective.num_particles)
            mask = torch.as_tensor(counts, device=own.device).reshape(-1, 1)
            probs = torch.where(mask, own, probs)
    if probs.shape != (rows, len(support)) or not torch.allclose(
        probs.sum(1), probs.new_ones(()), atol=1e-3
    ):
        raise ValueError(
            f"the probabilities of site {name!r} do not fit {rows} rows and {len(support)} values:"
            f" draws come in dimensions to the left; {FIX}"
        )
    if bool(known.any()):
        value = batch[name].to(support.dtype)
        event = tuple(range(2, 2 + len(site.event_shape)))
        equal = value.unsqueeze(1) == support.reshape(1, len(support), *site.event_shape)
        certain = equal.all(event) if event else equal
        probs = torch.where(known.unsqueeze(-1), certain.to(probs.dtype), probs)
    return probs


def _of_program(terms: Terms, site: Site, support: Tensor, summed: bool) -> tuple[Tensor, Tensor]:
    """The prior of a site, and its exact conditional if it is summed, averaged over the draws."""
    name = site.name
    prior = _prior(terms.sites[name]["fn"], support, terms.rows, site.dims[DATA])
    if not summed:
        return prior, prior
    dim = next(d for d, n in terms.names.items() if n == name)
    group = next(g for g in terms.groups if name in {f.name for f in g})
    _, weights = expectations(group, terms.sums, terms.plates)
    own = next(i for i, f in enumerate(group) if f.name == name)
    marginal = terms.weigh(sum_out(weights[own], group[own].sums - {dim}))
    return prior, by_row(marginal, terms.data_dim, dim, terms.rows)


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


def _mean(role: str, values: Tensor, fn: Any) -> tuple[Tensor, int]:
    """The mean of each draw's distribution where it has one, else the draws; its event dims."""
    if role != "merged":
        if isinstance(fn, dist.Categorical):
            return fn.probs, 1
        if hasattr(innermost(fn), "average"):  # codes of categories have no mean
            if values.shape[0] == 1 and fn.batch_shape != values.shape[: values.dim() - 1]:
                raise ValueError(f"draws one by one of columns with levels: {FIX}")
            return innermost(fn).average(), fn.event_dim
        with contextlib.suppress(NotImplementedError):
            return fn.mean.expand(values.shape), fn.event_dim
    return values, fn.event_dim
