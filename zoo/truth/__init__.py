"""A ladder of programs whose posterior is known, on which a guide is seen to be right or wrong.

=============== ========================================================= ====================
name            program                                                   known by
=============== ========================================================= ====================
factor          factor analysis                                           a closed form
mixture         finite mixture of Gaussians                               enumeration
hierarchy       three finite sites, two of them below the third           enumeration
decoder         two latents behind a fixed network                        quadrature
modes           the same with squares: posteriors with two modes          quadrature
eight_schools   random effects of eight schools                           long runs of NUTS
logistic        logistic regression                                       long runs of NUTS
counts          Poisson regression with an effect of each row             long runs of NUTS
unknown_means   two Gaussians of unknown means, scale and shares          long runs of NUTS
=============== ========================================================= ====================

No program has a parameter to learn: what a comparison shows is the guide's doing.
"""

from __future__ import annotations

from collections.abc import Callable

from pyrozoo.zoo.truth.exact import decoder, factor, hierarchy, mixture, modes
from pyrozoo.zoo.truth.rung import Rung
from pyrozoo.zoo.truth.sampled import counts, eight_schools, logistic, unknown_means

RUNGS: dict[str, Callable[[], Rung]] = {
    "factor": factor,
    "mixture": mixture,
    "hierarchy": hierarchy,
    "decoder": decoder,
    "modes": modes,
    "eight_schools": eight_schools,
    "logistic": logistic,
    "counts": counts,
    "unknown_means": unknown_means,
}

__all__ = ["RUNGS", "Rung", "rung"]


def rung(name: str) -> Rung:
    """One rung of the ladder, by name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in RUNGS:
        raise ValueError(f"no program of the ladder is called {name!r} (there are: {list(RUNGS)})")
    return RUNGS[name]()
