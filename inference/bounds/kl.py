"""Where a divergence may be taken in closed form.

For a site z that the guide draws, ``KL(q(z|.) || p(z|.))`` may replace ``log q - log p`` at the
draw if

(a) no parent of z in the program depends on z in the guide: otherwise the program's distribution at
    the draw was chosen knowing z, and the average over z is not the integral;
(b) no parent of z in the program is summed there: the sum is outside the logarithm;
(c) both halves carry the same scale, and neither a mask of its own; the site is not partly
    observed; and a closed form is known.

For (a) *all* latent sites are followed, not only those that cannot be reparameterised: a bottom-up
ladder, q(z_1|x) q(z_2|z_1) against p(z_2) p(z_1|z_2), fails at z_1 although every site is Gaussian.
"""

from __future__ import annotations

from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions import Delta, MaskedDistribution
from torch.distributions import kl_divergence

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.terms import same_scale
from pyrozoo.inference.graph import undisturbed
from pyrozoo.inference.observing import Observed
from pyrozoo.inference.plan import Plan
from pyrozoo.inference.provenance import Watch


def closed_form_sites(plan: Plan, p: Observed, q: Observed, batch: Batch) -> dict[str, str]:
    """Proposed site -> why its divergence has to be sampled ('' if the closed form is valid).

    Decided once per plan; ``p``, ``q`` and ``batch`` are run for it that once.
    """
    if "closed_form" not in plan.cache:
        masked = _masked(p.module, batch) | _masked(q.module, batch)
        plan.cache["closed_form"] = {
            name: _reason(plan, name, masked)
            for name, site in (plan.guide.sites if plan.guide else {}).items()
            if plan.roles.get(name) == "proposed" and not site.summable
        }
    return plan.cache["closed_form"]


def _reason(plan: Plan, name: str, masked: frozenset[str]) -> str:
    assert plan.guide is not None
    p, q = plan.program.sites[name], plan.guide.sites[name]
    parents = _random_parents(plan, name)
    if loop := parents & plan.guide.descendants(name):
        return f"the program's {name} depends on {_and(loop)}, which the guide draws from {name}"
    if summed := parents & set(plan.summed):
        return f"the program's {name} depends on {_and(summed)}, which is summed"
    if not same_scale(p.scale, q.scale):
        return "program and guide are scaled differently"
    if name in masked or _has(p.fn, MaskedDistribution) or _has(q.fn, MaskedDistribution):
        return "it is masked by the program or the guide itself"
    if _has(q.fn, Delta):
        return "a point mass is its own draw"
    try:
        with torch.no_grad(), Watch():  # their parameters have marks
            kl_divergence(q.fn, p.fn)
    except NotImplementedError:
        return f"no closed form for {type(q.fn).__name__} and {type(p.fn).__name__}"
    return ""


def _random_parents(plan: Plan, name: str) -> set[str]:
    """The latent sites that a site of the program reads, directly or through a ``Delta``."""
    found: set[str] = set()
    for parent in plan.program.sites[name].parents:
        role = plan.roles.get(parent)
        if role == "fixed":
            found |= _random_parents(plan, parent)
        elif role not in ("given", "own"):
            found.add(parent)
    return found


def _masked(net: Any, batch: Batch) -> frozenset[str]:
    """Sites that a program or guide masks on its own, before anything is observed."""
    with undisturbed(net), torch.no_grad(), poutine.block():
        nodes = poutine.trace(net).get_trace(batch).nodes
    return frozenset(
        n for n, site in nodes.items() if site["type"] == "sample" and site["mask"] is not None
    )


def _has(fn: Any, kind: type) -> bool:
    while not isinstance(fn, kind):
        if not hasattr(fn, "base_dist"):
            return False
        fn = fn.base_dist
    return True


def _and(names: set[str] | frozenset[str]) -> str:
    return " and ".join(sorted(names))
