"""Likelihoods by name: modules that turn the raw outputs of a network into a Pyro distribution."""

import re
from collections.abc import Callable, Sequence

from pyrozoo.zoo.networks.base import (
    MIN_SCALE,
    Likelihood,
    inverse_positive_scale,
    positive_scale,
)
from pyrozoo.zoo.networks.continuous import (
    Beta,
    ContinuousBernoulli,
    LogNormal,
    Normal,
    StudentT,
)
from pyrozoo.zoo.networks.discrete import (
    Bernoulli,
    Categorical,
    NegativeBinomial,
    Ordered,
    Poisson,
    ZeroInflatedNegativeBinomial,
)

__all__ = [
    "MIN_SCALE",
    "Bernoulli",
    "Beta",
    "Categorical",
    "ContinuousBernoulli",
    "Likelihood",
    "LogNormal",
    "NegativeBinomial",
    "Normal",
    "Ordered",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "inverse_positive_scale",
    "likelihood",
    "positive_scale",
]

_ENTRIES: dict[str, Callable[[tuple[int, ...]], Likelihood]] = {
    "bernoulli": Bernoulli,
    "normal": Normal,
    "student_t": StudentT,
    "log_normal": LogNormal,
    "beta": Beta,
    "continuous_bernoulli": ContinuousBernoulli,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
    "zero_inflated_negative_binomial": ZeroInflatedNegativeBinomial,
}
_SINGLE: dict[str, Callable[[int], Likelihood]] = {"categorical": Categorical, "ordered": Ordered}
_FIXED: dict[str, Callable[[tuple[int, ...], float], Likelihood]] = {
    "normal": Normal,
    "student_t": StudentT,
    "log_normal": LogNormal,
    "beta": Beta,
    "negative_binomial": NegativeBinomial,
}


def likelihood(spec: str | Likelihood, event_shape: int | Sequence[int]) -> Likelihood:
    """Turn a name into a likelihood module, or check a module against the event shape.

    Args:
        spec: a name, or a module.  Of independent entries: "bernoulli", "normal" (with one learnt
            scale), "normal(0.2)" (with a fixed one), "student_t", "log_normal", "beta",
            "continuous_bernoulli", "poisson", "negative_binomial" (with one learnt dispersion for
            each entry), "zero_inflated_negative_binomial"; "student_t(DF)", "log_normal(SCALE)",
            "beta(CONCENTRATION)" and "negative_binomial(DISPERSION)" are fixed.  Of a single index:
            "categorical", "ordered".
        event_shape: the shape of one observation.  For the names "categorical" and "ordered" it is
            (num_classes,), although the observation itself, an index, has shape ().

    Raises:
        ValueError: if the name is not known, or the module has another event shape.
        TypeError: if `spec` is neither a name nor a `Likelihood`.
    """
    shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
    if isinstance(spec, Likelihood):
        if spec.event_shape != shape:
            raise ValueError(
                f"the likelihood has event shape {tuple(spec.event_shape)}, expected {shape}"
            )
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"expected a name or a Likelihood, got {type(spec).__name__}")
    if spec in _SINGLE:
        if len(shape) != 1:
            raise ValueError(f'"{spec}" wants the event shape (num_classes,), got {shape}')
        return _SINGLE[spec](shape[0])
    if spec in _ENTRIES:
        return _ENTRIES[spec](shape)
    fixed = re.fullmatch(r"(\w+)\(([0-9.eE+-]+)\)", spec)
    if fixed and fixed.group(1) in _FIXED:
        return _FIXED[fixed.group(1)](shape, float(fixed.group(2)))
    names = ", ".join(f'"{name}"' for name in [*_ENTRIES, *_SINGLE])
    raise ValueError(f'expected {names} or "normal(SCALE)", got {spec!r}')
