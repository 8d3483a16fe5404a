"""Programs and guides outside the row-wise bound are left to Pyro's own objective."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyrozoo.inference.bounds.runs import nesting
from pyrozoo.inference.plan import Plan


def stock(plan: Plan, num_particles: int) -> TraceEnum_ELBO:
    """Pyro's objective: the sum over rows, as a scalar."""
    return TraceEnum_ELBO(
        num_particles=num_particles,
        vectorize_particles=num_particles > 1,
        max_plate_nesting=nesting(plan),
        strict_enumeration_warning=False,
    )


@contextlib.contextmanager
def explained(reason: str) -> Iterator[None]:
    """Say in an error of Pyro's objective why it was at work, and what it does to values."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError) as error:
        error.add_note(
            f"Pyro's own TraceEnum_ELBO was at work, since {reason}: there a summed value k stands"
            " for all its values at once, in a dimension on the left, and has one entry for all of"
            " a plate, so that k[..., i] cannot pick entries of the plate"
        )
        raise


def outside(plan: Plan, reparameterised: bool = True) -> str:
    """Why a program or guide is outside the class of the row-wise bound ('' if it is inside).

    Args:
        plan: of any batch of the pattern.
        reparameterised: whether gradients are to flow through the guide's draws.
    """
    for graph, side in ((plan.program, "program"), (plan.guide, "guide")):
        for name, site in graph.sites.items() if graph else ():
            summed = name in plan.summed if side == "program" else site.summable
            if plan.roles.get(name) in ("given", "masked", "own", "pruned"):
                continue
            if site.infer.get("_markov_depth"):
                return f"site {name!r} lies in a markov context"
            if site.infer.get("enumerate") == "sequential":
                return f"site {name!r} is enumerated one value at a time"
            if site.infer.get("num_samples"):
                return f"site {name!r} is sampled several times in place of being summed"
            if summed and not site.local:
                return f"summed site {name!r} is outside the plate over the data"
            if isinstance(site.scale, Tensor) and site.scale.dim() and summed:
                return f"summed site {name!r} has a scale with dimensions"
            enumerated = site.summable and site.infer.get("enumerate", "parallel") == "parallel"
            if side == "guide" and reparameterised and not (enumerated or site.fn.has_rsample):
                return f"site {name!r} of the guide is neither summed nor reparameterised"
    return ""
