"""Running both halves of a pair: finite sites enumerated, several draws of the guide at once.

Draws lie in a dimension left of all plates.  Programs that count dimensions from the left, or that
index what all rows share by ``x[k]``, cannot do with it; then draws are run one by one, which
:func:`one_by_one` finds out.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import Delta
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.graph import innermost
from pyrozoo.inference.modes import evaluating, seeded
from pyrozoo.inference.observing import Observed
from pyrozoo.inference.plan import Plan

PARTICLES = "num_particles_vectorized"  # the name that Pyro gives this plate
TRIED = 2  # draws that are run both ways
REFUSALS = (RuntimeError, IndexError, ValueError, TypeError, AssertionError)
FIX = (
    "write pyro.ops.indexing.Vindex(x)[..., k] for x[..., k] or x[k] where x is drawn, dim=-1 for"
    " dim=1, and zoo.networks.batched(net) for a network that takes one batch dimension"
    " (convolutions, x.view(-1, ..))"
)


def run(p: Observed, q: Observed, batch: Batch, num_particles: int) -> tuple[Any, Any]:
    """Traces of the program and the guide, in this order, as ``TraceEnum_ELBO`` would draw them.

    Raises:
        ValueError: there are several draws, which can only be run one by one.
    """
    check_draws(p, batch, num_particles)
    plan = p.pairing.plan(batch)
    guide = poutine.trace(enumerating(q, plan, num_particles)).get_trace(batch)
    program = poutine.replay(enumerating(p, plan, num_particles), guide)
    return poutine.trace(program).get_trace(batch), guide


def check_draws(p: Observed, batch: Batch, num_particles: int) -> None:
    """Raise ValueError if so many draws can only be run one by one."""
    if num_particles > 1 and (reason := one_by_one(p, batch)):
        raise ValueError(f"{num_particles} draws at once are not possible: {reason}; {FIX}")


def enumerating(net: Observed, plan: Plan, num_particles: int) -> Any:
    """A half with its finite sites enumerated, in all particles; the guide is to be run first."""
    dim = -1 - nesting(plan) - (num_particles > 1)  # the program's dims follow those of the guide
    return in_particles(EnumMessenger(dim if net.of_guide else None)(net), plan, num_particles)


def in_particles(net: Any, plan: Plan, num_particles: int, always: bool = False) -> Any:
    """A half inside the plate of the particles, if there are several (or ``always``)."""
    if num_particles == 1 and not always:
        return net
    return pyro.plate(PARTICLES, num_particles, dim=-1 - nesting(plan))(net)


def nesting(plan: Plan) -> int:
    """The number of dimensions that the plates of both halves take."""
    return max(plan.program.nesting, plan.guide.nesting if plan.guide else 0)


def sample_sites(trace: Any) -> dict[str, Any]:
    """The sites of a trace that have a density."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    }


def one_by_one(p: Observed, batch: Batch) -> str:
    """Why several draws of a pair have to be run one by one ('' if they can be run at once).

    Some are run both ways, in evaluation mode; every site is to have the same density.  Inside of a
    transformation or a tracer, where values cannot be looked at, the answer is '' if there is none
    from before.
    """
    plan, key = p.pairing.plan(batch), f"one by one {p.until}"
    if key not in plan.cache:
        if not _readable(p, batch):
            return ""
        guide = p.pairing.guide
        q = None if guide is None else Observed(guide, p.pairing, True)
        halves = (p,) if q is None else (p, q)
        with torch.no_grad(), evaluating(*halves), poutine.block(), seeded(0):
            plan.cache[key] = _difference(p, q, batch, plan)
    return plan.cache[key]


def _readable(p: Observed, batch: Batch) -> bool:
    tensors = [batch.stored(name) for name in batch.names] + list(p.parameters())[:1]
    try:
        for x in tensors:
            bool((x.reshape(-1)[:1] == 0).any())
    except RuntimeError:
        return False
    return True


def _difference(p: Observed, q: Observed | None, batch: Batch, plan: Plan) -> str:
    try:
        together = _both(p, q, batch, plan, TRIED, {})
        wide = {name: _densities(sites) for name, sites in together.items()}
    except REFUSALS as error:
        return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    with contextlib.suppress(*REFUSALS):  # what cannot be run alone fails in the open
        return _other_density(p, q, batch, plan, together, wide)
    return ""


def _other_density(
    p: Observed,
    q: Observed | None,
    batch: Batch,
    plan: Plan,
    together: dict[str, dict[str, Any]],
    wide: dict[str, dict[str, Tensor]],
) -> str:
    """A site whose density in several draws is not that in each of them."""
    dim = -1 - nesting(plan)
    for i in range(TRIED):
        alone = {half: _Slice(sites, i, dim) for half, sites in together.items()}
        narrow = {n: _densities(s) for n, s in _both(p, q, batch, plan, 1, alone).items()}
        for half, sites in wide.items():
            for name, value in sites.items():
                if not _close(_at(value, i, dim), narrow[half].get(name)):
                    again = _densities(_both(p, q, batch, plan, 1, alone)[half])
                    if _close(narrow[half].get(name), again.get(name)):  # no noise of its own
                        return f"site {name!r} has another density than in a single draw"
    return ""


def _both(
    p: Observed, q: Observed | None, batch: Batch, plan: Plan, count: int, given: dict[str, _Slice]
) -> dict[str, dict[str, Any]]:
    """The sites of the program and the guide, with the dims of several draws; perhaps at values."""
    found, trace = {}, None
    for half, net in (("guide", q), ("program", p)):
        if net is None:
            continue
        inner = in_particles(_enumerated(net, plan, q is None), plan, count)
        inner = inner if trace is None else poutine.replay(inner, trace)
        inner = given[half](inner) if half in given else inner
        trace = poutine.trace(inner).get_trace(batch)
        found[half] = sample_sites(trace)
    return found


def _enumerated(net: Observed, plan: Plan, first: bool) -> Any:
    return EnumMessenger(-2 - nesting(plan) if net.of_guide or first else None)(net)


def _densities(sites: dict[str, Any]) -> dict[str, Tensor]:
    """Of new objects: a transformation that remembers its draws must not know them again."""
    return {n: s["fn"].log_prob(s["value"].view_as(s["value"])) for n, s in sites.items()}


def _at(value: Tensor, index: int, dim: int) -> Tensor:
    """One draw out of the dimension of all of them, which is kept if it is there."""
    if -dim > value.dim():
        return value
    return value.narrow(dim, index if value.shape[dim] > 1 else 0, 1)


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return False
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        return False
    return torch.allclose(a, b, rtol=1e-2, atol=1e-2, equal_nan=True)


class _Slice(Messenger):
    """Give sites the values of one out of several draws."""

    def __init__(self, sites: dict[str, Any], index: int, dim: int) -> None:
        super().__init__()
        self.sites, self.index, self.dim = sites, index, dim

    def _pyro_sample(self, msg: Any) -> None:
        site = self.sites.get(msg["name"])
        if site is None or msg["is_observed"] or site["infer"].get("_enumerate_dim") is not None:
            return
        if isinstance(innermost(msg["fn"]), Delta):  # computed, up to rounding, from what is given
            return
        event = msg["fn"].event_dim
        value = _at(site["value"], self.index, self.dim - event)
        while value.dim() > event + len(msg["fn"].batch_shape) and value.shape[0] == 1:
            value = value[0]
        msg["value"], msg["done"] = value, True
