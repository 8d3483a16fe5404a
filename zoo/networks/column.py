"""A column of a table: what its values are, and where they lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COUNTS = ("poisson", "negative_binomial", "zero_inflated_negative_binomial")
LEVELS = ("categorical", "ordered")
_TAKES = {
    "normal": "numbers",
    "student_t": "numbers",
    "log_normal": "numbers above 0",
    "beta": "numbers above 0 and below 1",
    "continuous_bernoulli": "numbers from 0 to 1",
    "bernoulli": "0 or 1",
    **dict.fromkeys(COUNTS, "whole numbers from 0"),
    **dict.fromkeys(LEVELS, "codes"),
}
KINDS = tuple(_TAKES)


@dataclass(frozen=True)
class Column:
    """One column of a table, in the units of the user.

    Its `center` and `spread` say where its values lie, on the scale on which networks read them:
    logarithms for "log_normal", log(1 + value) for counts, log-odds for "beta", the values
    themselves otherwise, so that the centre of "bernoulli" is its share of ones; "categorical" and
    "ordered" have none.  Learn them on training rows, for example with `Column.of`.

    Args:
        name: for messages.
        likelihood: "normal", "student_t", "log_normal", "poisson", "negative_binomial",
            "zero_inflated_negative_binomial", "beta", "continuous_bernoulli", "bernoulli",
            "categorical" or "ordered".
        num_values: levels of "categorical" and "ordered", whose values are codes 0, 1, ...
        center: a typical value.
        spread: how far values lie from it, above 0.

    Raises:
        ValueError: if one of these is not valid; the message names the column.
    """

    name: str
    likelihood: str
    num_values: int = 0
    center: float = 0.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        where = f"column {self.name!r}"
        if self.likelihood not in KINDS:
            known = ", ".join(KINDS)
            raise ValueError(f"{where}: expected a likelihood of {known}; got {self.likelihood!r}")
        if self.likelihood in LEVELS and self.num_values < 2:
            raise ValueError(
                f"{where} ({self.likelihood}) wants num_values of at least 2, got {self.num_values}"
            )
        if self.likelihood not in LEVELS and self.num_values:
            raise ValueError(
                f"{where} ({self.likelihood}) has no levels, got num_values={self.num_values}"
            )
        if not math.isfinite(self.center) or not 0 < self.spread < math.inf:
            raise ValueError(
                f"{where}: center is finite and spread above 0, got {self.center}, {self.spread}"
            )

    @property
    def takes(self) -> str:
        """The values it takes, in words."""
        if self.likelihood in LEVELS:
            return f"whole numbers from 0 to {self.num_values - 1}"
        return _TAKES[self.likelihood]

    def allows(self, value: Tensor) -> Tensor:
        """Which values, of shape (*), it takes."""
        kind = self.likelihood
        if kind in ("normal", "student_t"):
            return value.isfinite()
        if kind in ("log_normal", "beta", "continuous_bernoulli"):
            closed = kind == "continuous_bernoulli"
            low = value >= 0 if closed else value > 0
            high = value <= 1 if closed else value < 1
            return low & value.isfinite() if kind == "log_normal" else low & high
        top = {"bernoulli": 1.0, **dict.fromkeys(LEVELS, self.num_values - 1.0)}.get(kind, math.inf)
        return (value >= 0) & (value <= top) & (value.frac() == 0)

    @staticmethod
    def of(name: str, likelihood: str, values: Any, num_values: int = 0) -> Column:
        """A column with the centre and spread of known values, of shape (rows,).

        These are mean and standard deviation on the scale of networks (median and scaled median
        deviation for "student_t"); a column that never varies, or has no value, has a spread of 1.

        Raises:
            ValueError: if a value is none that the column takes, or an argument is not valid.
        """
        column = Column(name, likelihood, num_values)
        known = torch.as_tensor(values, dtype=torch.float64).flatten()
        if bad := int((~column.allows(known)).sum()):
            raise ValueError(column.refuse(known[~column.allows(known)], bad))
        if likelihood in LEVELS or not len(known):
            return column
        scaled = on_network_scale(likelihood, known)
        center, spread = scaled.mean(), scaled.std(correction=0)
        if likelihood == "student_t":
            center = scaled.quantile(0.5)
            deviation = (scaled - center).abs().quantile(0.5) / 0.6745
            spread = deviation if deviation > 0 else spread
        return Column(name, likelihood, 0, float(center), float(spread) if spread > 1e-8 else 1.0)

    def refuse(self, wrong: Tensor, rows: int) -> str:
        """What is to be said of values, of shape (*), that it does not take."""
        seen = [f"{v:g}" for v in wrong.unique().tolist()]
        shown = ", ".join(seen[:3]) + (", .." if len(seen) > 3 else "")
        where = f"column {self.name!r} ({self.likelihood})"
        return f"{where} takes {self.takes}, got {shown} in {rows} row{'s' * (rows != 1)}"


def on_network_scale(likelihood: str, value: Tensor) -> Tensor:
    """Values of shape (*) on the scale on which networks read them, before centring."""
    if likelihood == "log_normal":
        return value.log()
    if likelihood in COUNTS:
        return value.log1p()
    if likelihood == "beta":
        return value.log() - torch.log1p(-value)
    return value
