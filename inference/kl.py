"""Where a divergence may be taken in closed form.

For a site z that the guide draws, ``KL(q(z|.) || p(z|.))`` may replace ``log q - log p`` at the draw if

(a) no parent of z in the program depends on z in the guide: otherwise the program's distribution at
    the draw was chosen knowing z, and the average over z is not the integral;
(b) no parent of z in the program is summed there: the sum is outside the logarithm;
(c) both halves carry the same scale; the site is not partly observed; and a closed form is known.

For (a) *all* latent sites are followed, not only those that cannot be reparameterised: a bottom-up
ladder, q(z_1|x) q(z_2|z_1) against p(z_2) p(z_1|z_2), fails at z_1 although every site is Gaussian.
"""

from __future__ import annotations

import torch
from torch.distributions import kl_divergence

from .observing import Plan


def closed_form_sites(plan: Plan) -> dict[str, str]:
    """Latent site -> why its divergence has to be sampled ('' if the closed form is valid)."""
    if "closed_form" not in plan.cache:
        guide = plan.guide
        names = [] if guide is None else [n for n in guide.sites if plan.roles.get(n) == "proposed"]
        plan.cache["closed_form"] = {n: r for n in names if (r := _reason(plan, n)) is not None}
    return plan.cache["closed_form"]


def _reason(plan: Plan, name: str) -> str | None:
    assert plan.guide is not None
    p, q = plan.program.sites[name], plan.guide.sites[name]
    if q.summable:
        return None  # summed exactly
    parents = _latent_parents(plan, name)
    if loop := parents & plan.guide.descendants(name):
        return f"the program's {name} depends on {_and(loop)}, which the guide draws from {name}"
    if summed := parents & set(plan.summed):
        return f"the program's {name} depends on {_and(summed)}, which is summed"
    if not (p.scale is q.scale or _equal(p.scale, q.scale)):
        return "program and guide are scaled differently"
    try:
        with torch.no_grad():
            kl_divergence(q.fn, p.fn)
    except NotImplementedError:
        return f"no closed form for {type(q.fn).__name__} and {type(p.fn).__name__}"
    return ""


def _latent_parents(plan: Plan, name: str) -> set[str]:
    fixed = ("given", "own")
    return {s for s in plan.program.sites[name].parents if plan.roles.get(s) not in fixed}


def _equal(a: object, b: object) -> bool:
    return not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b


def _and(names: set[str] | frozenset[str]) -> str:
    return " and ".join(sorted(names))
