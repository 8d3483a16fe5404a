"""Kinds of columns: which there are, how one is told from the values, and what it may hold.

=========== =================================== ==================================================
kind        likelihood (the default first)      inferred for
=========== =================================== ==================================================
real        normal, student_t                   all other numbers
positive    log_normal                          numbers above 0 whose logarithm is less skewed
count       negative_binomial, poisson,         whole numbers from 0 up
            zero_inflated_negative_binomial
proportion  beta, continuous_bernoulli          never: say so with ``columns``
binary      bernoulli                           booleans, and any two distinct values
categorical categorical                         text and pandas categoricals
ordered     ordered                             ordered pandas categoricals, and numbers with 3 to 5
                                                distinct values that occur twice on average
=========== =================================== ==================================================

The rules are tried in the order binary, categorical, ordered, count, positive, real. Categories of
a pandas categorical are its levels in their order, seen or not; other levels are sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pyrozoo.zoo.networks import Column
from pyrozoo.zoo.networks.column import on_network_scale
from pyrozoo.zoo.tables.cells import Cells, Level, plain, rows_text, some

KINDS: dict[str, tuple[str, ...]] = {
    "real": ("normal", "student_t"),
    "positive": ("log_normal",),
    "count": ("negative_binomial", "poisson", "zero_inflated_negative_binomial"),
    "proportion": ("beta", "continuous_bernoulli"),
    "binary": ("bernoulli",),
    "categorical": ("categorical",),
    "ordered": ("ordered",),
}
KIND_OF = {likelihood: kind for kind, names in KINDS.items() for likelihood in names}
#: Kinds whose values are levels, stored as codes 0 .. K-1.
LEVELLED = ("binary", "categorical", "ordered")
#: Numbers with so many distinct values or fewer are levels, if each occurs twice on average.
FEW = 5
#: More levels than these are an identifier or free text.
MAX_LEVELS = 50
#: Up to here every whole number is its own float32.
MAX_COUNT = 2**24
#: Columns that vary less have no spread for networks.
MIN_SPREAD = 1e-8
#: The largest rounding error, relative to the spread of a column, that float32 may make.
MAX_LOSS = 6e-4

Numbers = NDArray[np.float64]
Wish = str | Sequence[Level] | Mapping[str, Sequence[Level]]

SUPPORTS: dict[str, tuple[str, Callable[[Numbers, NDArray[np.float32]], NDArray[np.bool_]]]] = {
    "log_normal": ("numbers above 0", lambda x, single: (single > 0) & np.isfinite(single)),
    "beta": (
        "numbers between 0 and 1, without them",
        lambda x, single: (single > 0) & (single < 1),
    ),
    "continuous_bernoulli": ("numbers from 0 to 1", lambda x, single: (x >= 0) & (x <= 1)),
    **dict.fromkeys(
        KINDS["count"],
        (
            f"whole numbers from 0 to {MAX_COUNT} (2**24)",
            lambda x, single: (x >= 0) & (x <= MAX_COUNT) & (x == np.floor(x)),
        ),
    ),
}


def infer(cells: Cells) -> tuple[str, tuple[Level, ...]]:
    """The kind of a column with two or more distinct values, and its levels if it has any.

    Raises:
        ValueError: it is text, or a categorical, with too many levels.
    """
    distinct = cells.declared or cells.distinct
    if len(distinct) == 2:
        return "binary", distinct
    if cells.declared or cells.type == "text":
        _check_levels(cells, distinct)
        return "ordered" if cells.ordered else "categorical", distinct
    known = cells.numbers[cells.known]
    if len(distinct) <= FEW and 2 * len(distinct) <= len(known):
        return "ordered", distinct
    if (known >= 0).all() and (known == np.floor(known)).all():
        return "count", ()
    if (known > 0).all() and abs(_skew(np.log(known))) < abs(_skew(known)):
        return "positive", ()
    return "real", ()


def choose(cells: Cells, wish: Wish | None) -> tuple[str, str, tuple[Level, ...]]:
    """Kind, likelihood and levels of a column, inferred or as asked for.

    Args:
        cells: the column, with two or more distinct values.
        wish: a kind, a likelihood, a list of levels in their order (then it is ordered), or
            ``{kind: levels}``.

    Raises:
        ValueError: the column cannot be what was asked for, or its kind cannot be told.
    """
    if wish is None:
        kind, levels = infer(cells)
        return kind, KINDS[kind][0], levels
    kind, likelihood, given = _parse(cells.name, wish)
    if kind not in LEVELLED:
        if cells.type != "number":
            raise ValueError(
                f"column {cells.name!r} cannot be {kind}: that takes numbers, and it holds"
                f" {cells.type}, such as {some(cells.distinct, 2)}"
            )
        return kind, likelihood, ()
    if not given:
        if kind == "ordered" and cells.type == "text" and not cells.declared:
            raise ValueError(
                f"column {cells.name!r}: text has no order of its own; give the levels from low to"
                f" high, columns={{{cells.name!r}: [...]}}; they are {some(cells.distinct)}"
            )
        given = cells.declared or cells.distinct
    if kind == "binary" and len(given) != 2:
        raise ValueError(
            f"column {cells.name!r} cannot be binary: it has {len(given)} values, {some(given, 5)}"
        )
    return kind, likelihood, given


def check_support(likelihood: str, cells: Cells) -> NDArray[np.float32]:
    """Numbers in the precision of networks, (N,) float32, NaN where missing.

    Raises:
        ValueError: the likelihood cannot have a value; the message names column, values and rows.
    """
    values = cells.numbers
    with np.errstate(over="ignore", under="ignore"):
        single = values.astype(np.float32)
    needs, allowed = SUPPORTS.get(
        likelihood, ("numbers within the range of float32", lambda x, single: np.isfinite(single))
    )
    bad = cells.known & ~allowed(values, single)
    if bad.any():
        large = KIND_OF[likelihood] == "count" and bool((values[bad] > MAX_COUNT).any())
        advice = "; subtract a constant, change the unit, or read it as 'log_normal' or 'normal'"
        found = [int(v) if v == np.floor(v) else v for v in np.unique(values[bad]).tolist()]
        raise ValueError(
            f"column {cells.name!r}: {likelihood} needs {needs}, got {some(found, 5)} in"
            f" {rows_text(cells.index, bad)}{advice if large else ''}"
        )
    return single


def location_scale(likelihood: str, cells: Cells) -> tuple[float, float]:
    """Center and spread of the known numbers, on the scale on which networks see them.

    Raises:
        ValueError: float32 would lose how they differ; the message says what to do.
    """
    single = torch.from_numpy(check_support(likelihood, cells)[cells.known])
    known = torch.from_numpy(cells.numbers[cells.known])
    column = Column.of(cells.name, likelihood, known)
    exact = on_network_scale(likelihood, known)
    error = (on_network_scale(likelihood, single).double() - exact).abs()
    loss = float((error / (exact - column.center).abs().clamp_min(column.spread)).max())
    if not loss <= MAX_LOSS or float(exact.std()) <= MIN_SPREAD:
        raise ValueError(
            f"column {cells.name!r}: float32 loses how its values differ, which are near"
            f" {float(known.mean()):.6g} and vary by {float(known.std()):.3g}; subtract a constant"
            f" ({float(known.mean()):.6g}) or change the unit first"
        )
    return column.center, column.spread


def _parse(name: str, wish: Wish) -> tuple[str, str, tuple[Level, ...]]:
    if isinstance(wish, str) and wish in KINDS:
        return wish, KINDS[wish][0], ()
    if isinstance(wish, str) and wish in KIND_OF:
        return KIND_OF[wish], wish, ()
    if isinstance(wish, list | tuple):
        return "ordered", "ordered", tuple(map(plain, wish))
    if isinstance(wish, Mapping) and len(wish) == 1:
        kind, levels = next(iter(wish.items()))
        if kind in LEVELLED and isinstance(levels, list | tuple):
            return kind, KINDS[kind][0], tuple(map(plain, levels))
    raise ValueError(
        f"column {name!r}: expected a kind ({some(KINDS)}), a likelihood ({some(KIND_OF)}), a list"
        f" of levels from low to high, or {{kind: levels}} ({some(LEVELLED)}), got {wish!r}"
    )


def _check_levels(cells: Cells, levels: Sequence[Level]) -> None:
    many = len(levels) > MAX_LEVELS
    if not many and (cells.declared or 2 * len(levels) <= cells.known.sum()):
        return
    numeric = [v for v in map(str, cells.distinct) if v.lstrip("+-").replace(".", "", 1).isdigit()]
    odd = [v for v in cells.distinct if v not in numeric]
    hint = f"; most of it is numbers, but not {some(odd, 3)}"
    raise ValueError(
        f"column {cells.name!r} has {len(levels)} distinct values in {cells.known.sum()} rows and"
        " looks like an identifier or free text; leave it out (drop=[...]), or ask for it with"
        f' columns={{{cells.name!r}: "categorical"}}'
        f"{hint if 2 * len(numeric) > len(cells.distinct) and odd else ''}"
    )


def _skew(values: Numbers) -> float:
    scaled = values / np.abs(values).max()
    centred = scaled - scaled.mean()
    variance = float((centred**2).mean())
    return float((centred**3).mean()) / variance**1.5 if variance > 0 else 0.0
