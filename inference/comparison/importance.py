"""Importance weights of a guide, of each row or of everything, and the bounds that they give.

With z_p ~ q(z | x) and ``y`` the finite sites, which are summed exactly, the weight of a draw is ::

    w_p = sum_y p(x, y, z_p) / q(z_p | x)                             of one row
    w_p = p(g_p) / q(g_p) prod_n sum_y p(x_n, y, z_np | g_p) / q(z_np | x_n, g_p)      of all rows

where g are the sites that all rows share.  See :mod:`.psis` for what the tail of the weights says.

Source of the bounds: Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, "Importance weighted
autoencoders" (2016).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.bounds.runs import run, sample_sites
from pyrozoo.inference.bounds.stock import stock
from pyrozoo.inference.bounds.terms import same_scale, take_apart
from pyrozoo.inference.bounds.weights import log_weights
from pyrozoo.inference.checking import check_shapes, check_values
from pyrozoo.inference.evidence import draw_log_weights, evenly, fitting, portions, refuse_shared
from pyrozoo.inference.modes import evaluating, seeded
from pyrozoo.inference.observing import Net, Observed
from pyrozoo.inference.plan import Plan
from pyrozoo.inference.reading import read_count
from pyrozoo.inference.running import read_seed, slices


def importance_weights(
    program: Net,
    guide: Net,
    data: Data,
    num_particles: int = 1000,
    *,
    inputs: Iterable[str] = (),
    batch_size: int = 1024,
    chunk_size: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Log importance weights of every row, ``(num_particles, rows)``.

    Their log-mean-exp is :func:`~pyrozoo.inference.evidence.log_evidence`, draw for draw if the
    chunks are the same, and what is observed, missing or summed is treated as there: weights of
    training play no part, and a row with nothing observed has weight one.

    Args:
        program, guide: the fitted pair.
        data: what is known.
        num_particles: draws of the guide per row, P.
        inputs: names of values that are read but are no sites.
        batch_size: rows that are read at a time.
        chunk_size: rows x particles that are computed at once; by default as many as fit a cache.
        seed: of the draws.

    Raises:
        ValueError: as ``log_evidence``; above all, a proposed site is shared by all rows: then see
            :func:`joint_log_weights`.
    """
    num_particles = read_count("num_particles", num_particles)
    size = None if chunk_size is None else read_count("chunk_size", chunk_size)
    objective = EnumELBO(kl="sampled", split=False, inputs=tuple(inputs))
    objective._reparameterised = False  # there is no gradient
    found = []
    for p, q, batch, plan in slices(objective, program, guide, data, batch_size, seed):
        refuse_shared(plan)
        rows, parts = portions(p, q, batch, plan, num_particles, size)
        with pyro.validation_enabled(False):
            for start in range(0, len(batch), rows):
                piece = batch[start : start + rows]
                found.append(torch.cat([draw_log_weights(p, q, piece, count) for count in parts]))
    return torch.cat(found, 1)


def joint_log_weights(
    program: Net,
    guide: Net,
    data: Data,
    num_particles: int = 1000,
    *,
    inputs: Iterable[str] = (),
    chunk_size: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Log importance weights of draws of everything, ``(num_particles,)``, in nats for all rows.

    One draw is one value of the sites that all rows share and one of the local sites of each row.
    Programs outside the class of the row-wise bound (markov contexts, finite sites that all rows
    share, no data plate) are run once per draw by ``TraceEnum_ELBO``, whose bound with one particle
    is the weight as long as the guide enumerates nothing.

    Raises:
        ValueError: the guide proposes a point mass, depends on an auxiliary site of its own,
            or enumerates a site outside the class; there, a site is scaled; or a value does not
            fit.
    """
    num_particles, seed = read_count("num_particles", num_particles), read_seed(seed)
    size = None if chunk_size is None else read_count("chunk_size", chunk_size)
    objective = EnumELBO(kl="sampled", split=False, inputs=tuple(inputs))
    p, q = objective.pair(program, guide)
    batch = p.pairing.prepare(data)
    with torch.no_grad(), evaluating(p, q), poutine.block(), seeded(seed):
        plan = p.pairing.plan(batch)
        check_shapes(plan.program, batch)
        check_values(plan, batch)
        _refuse_jointly(plan)
        if objective.unsupported(plan) or not any(s.local for s in plan.program.sites.values()):
            _refuse_alone(plan)
            one = stock(plan, 1)
            draws = [-one.loss(p, q, batch) for _ in range(num_particles)]
            return torch.tensor(draws, dtype=torch.float64)
        most = fitting(p, q, batch) if size is None else max(1, size // len(batch))
        with pyro.validation_enabled(False):
            parts = evenly(num_particles, most)
            return torch.cat([_jointly(p, q, batch, count) for count in parts])


def _jointly(p: Observed, q: Observed, batch: Batch, count: int) -> Tensor:
    traces = (sample_sites(trace) for trace in run(p, q, batch, count))
    program, guide = ({n: {**site, "scale": 1.0} for n, site in t.items()} for t in traces)
    terms = take_apart(p.pairing.plan(batch), program, guide, len(batch), count)
    total = log_weights(terms).sum(-1)
    for value, plates in (part for parts in terms.plain.values() for part in parts):
        if terms.data_dim not in plates:
            total = total + terms.to_rows(value, plates)
    return total


def _refuse_jointly(plan: Plan) -> None:
    assert plan.guide is not None
    for name, site in plan.guide.sites.items():
        role = plan.roles.get(name, "auxiliary")
        if site.kind != "sample" or role not in ("proposed", "merged", "auxiliary"):
            continue
        if role != "auxiliary":
            if site.fixed and not site.parents - plan.roles.keys():
                raise ValueError(f"the guide proposes {name!r} as a point mass: it has no weights")
            continue
        for other in plan.guide.sites.values():
            if name in other.parents and not other.fixed:
                raise ValueError(
                    f"the guide draws {other.name!r} given its auxiliary site {name!r}, so that the"
                    f" density of its draws of {other.name!r} is not known"
                )


def _refuse_alone(plan: Plan) -> None:
    assert plan.guide is not None
    for name, site in (*plan.program.sites.items(), *plan.guide.sites.items()):
        if not same_scale(site.scale, 1.0):
            raise ValueError(f"site {name!r} is scaled, which a weight cannot be: take it off")
    for name, site in plan.guide.sites.items():
        if site.kind == "sample" and site.summable and plan.roles.get(name) == "proposed":
            raise ValueError(
                f"the guide enumerates {name!r}, so that one draw has no weight here; leave it out"
                " of the guide: the program sums it exactly"
            )


# ---- what the weights say ------------------------------------------------------------------------


def iwae_bounds(
    log_weights: Tensor, counts: Iterable[int] = (1, 10, 100, 1000), *, over: str = "rows"
) -> dict[int, tuple[float, float]]:
    """The bounds ``E log (1/k) sum of k weights``, for several k out of the same P draws.

    For each k the draws are cut into ``P // k`` disjoint blocks, whose bounds are averaged.

    Args:
        log_weights: ``(P, rows)``; joint weights ``(P,)`` count as one row (divide what comes out
            by the number of data).
        counts: the numbers k; those above P are left out.
        over: what the standard error is over.  ``"rows"``: sd(row means) / sqrt(rows), the noise of
            the draws included, for rows that were not seen.  ``"draws"``: from the variance over
            the blocks of each row, for these very rows; of a single row it is always this.

    Returns:
        k -> mean over the rows in nats, and its standard error (NaN over draws with one block).

    Raises:
        ValueError: no count is between 1 and P, or ``over`` is neither word.
    """
    if over not in ("rows", "draws"):
        raise ValueError(f"over is 'rows' or 'draws', got {over!r}")
    weights, counts = log_weights.double().reshape(len(log_weights), -1), tuple(counts)
    found = {}
    for count in counts:
        blocks = len(weights) // read_count("a count", count)
        if blocks:
            parts = weights[: blocks * count].reshape(blocks, count, -1)
            bounds = parts.logsumexp(1) - math.log(count)
            rows = bounds.mean(0)
            if over == "rows" and len(rows) > 1:
                error = rows.std().item() / len(rows) ** 0.5
            else:
                within = bounds.var(0).sum().item() if blocks > 1 else math.nan
                error = (within / blocks) ** 0.5 / len(rows)
            found[count] = (rows.mean().item(), error)
    if not found:
        raise ValueError(f"{len(weights)} draws are fewer than any of the counts {counts}")
    return found
