"""One column of a data frame as it was read: which cells are known, and what type they have.

Missing are NaN, None, ``pd.NA``, ``NaT`` and the masks of pandas' nullable types. Known cells of a
column are all numbers, all booleans or all text; anything else is an error that says what came.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

Level: TypeAlias = str | int | float | bool

#: Up to here every whole number is its own float64.
MAX_EXACT = 2**53
EXTRAS = {"anndata": "anndata", "h5py": "anndata"}
DATES = (date, time, timedelta, np.datetime64, np.timedelta64)
TYPES: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("bool", (bool, np.bool_)),
    ("number", (int, float, Decimal, np.integer, np.floating)),
    ("text", (str,)),
)


def library(name: str, extra: str | None = None) -> Any:
    """Import an optional library, of the extra that is named here or in ``EXTRAS``.

    Raises:
        ImportError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = extra or EXTRAS.get(name.partition(".")[0], "tables")
        raise ImportError(
            f'tables need {name.partition(".")[0]}: pip install "pyrozoo[{extra}]"'
        ) from error


def some(names: Iterable[Any], limit: int = 20) -> str:
    """Names or values for a message, the first few of them: ``'a', 'b' and 3 more``."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(n) for n in names[:limit]) + more


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur twice, sorted."""
    return sorted(name for name, times in Counter(names).items() if times > 1)


def rows_text(index: pd.Index[Any], bad: NDArray[np.bool_]) -> str:
    """The index labels of the rows of a mask, for a message: ``rows 3, 8 and 4 more``."""
    labels = index[bad].tolist()
    return f"row{'s' if len(labels) > 1 else ''} {some(labels, 5)}"


@dataclass(frozen=True, eq=False)
class Cells:
    """A column of N rows.

    Attributes:
        name: of the column.
        series: the pandas column, categories undone.
        type: of the known cells: "number", "bool", "text", or "empty" where none is known.
        known: (N,) boolean.
        numbers: (N,) float64, NaN where missing; for numbers only.
        declared: the categories of a pandas categorical, in their order.
        ordered: whether those are ordered.
    """

    name: str
    series: pd.Series[Any] = field(repr=False)
    type: str
    known: NDArray[np.bool_]
    numbers: NDArray[np.float64] = field(repr=False)
    declared: tuple[Level, ...] | None = None
    ordered: bool = False

    @property
    def index(self) -> pd.Index[Any]:
        """Labels of the rows."""
        return self.series.index

    @cached_property
    def _factors(self) -> tuple[tuple[Level, ...], NDArray[np.int64]]:
        codes = np.full(len(self.known), -1, np.int64)
        found: list[Any]
        if self.type == "number":
            values, codes[self.known] = np.unique(self.numbers[self.known], return_inverse=True)
            found = values.tolist()
            whole = bool((values == np.floor(values)).all())
            if whole and not (self.known.all() and _has_floats(self.series)):
                found = [int(v) for v in found]
            return tuple(found), codes
        cells = self.series[self.known]
        found = sorted({plain(v) for v in cells})
        place = {v: i for i, v in enumerate(found)}
        codes[self.known] = [place[plain(v)] for v in cells]
        return tuple(found), codes

    @property
    def distinct(self) -> tuple[Level, ...]:
        """The distinct known values, sorted.

        Numbers of an integer column are integers, and so are whole numbers of a column that has
        missing cells: pandas turns such a column of integers into floats.
        """
        return self._factors[0]

    def codes(self, levels: Iterable[Level], advice: str = "") -> NDArray[np.int64]:
        """The cells as places in a list of levels, (N,); -1 where missing.

        Levels are compared as Python compares: 1, 1.0 and True are equal, 1 and "1" are not.

        Raises:
            ValueError: a value is none of the levels, or integers are too large to be told apart;
                the message names column, value and rows.
        """
        large = self.known & (np.abs(self.numbers) > MAX_EXACT)
        if large.any() and not _has_floats(self.series):
            raise ValueError(
                f"column {self.name!r}: integers beyond 2**53 cannot be told apart as levels,"
                f" {rows_text(self.index, large)}; store them as text"
            )
        levels = tuple(levels)
        place = {level: i for i, level in enumerate(levels)}
        distinct, codes = self._factors
        table = np.array([place.get(v, -2) for v in distinct] + [-1], dtype=np.int64)
        out = table[codes]
        if (out == -2).any():
            unknown = [v for v in distinct if v not in place]
            raise ValueError(
                f"column {self.name!r}: unknown level {some(unknown, 5)} in"
                f" {rows_text(self.index, out == -2)}; the levels are {some(levels)}{advice}"
            )
        return out


def plain(value: Any) -> Level:
    """A Python scalar for a cell that is text, a number or a boolean."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Decimal):
        return float(value)
    scalar: Level = value.item() if isinstance(value, np.generic) else value
    return scalar


def read_cells(name: str, series: pd.Series[Any]) -> Cells:
    """Read a column of a data frame.

    Raises:
        ValueError: it holds dates, infinite numbers, or cells of several types or of another type;
            the message names column and rows.
    """
    pd = library("pandas")
    declared, ordered, dtype = None, False, series.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        declared = tuple(plain(v) for v in dtype.categories)
        ordered = bool(dtype.ordered)
        series = series.astype(object)
        dtype = series.dtype
    if getattr(dtype, "kind", "O") in "mM" or isinstance(dtype, pd.PeriodDtype | pd.IntervalDtype):
        _refuse_dates(name)
    if pd.api.types.is_complex_dtype(dtype):
        raise ValueError(f"column {name!r} holds complex numbers; split it into two columns")
    numbers = np.full(len(series), np.nan)
    is_bool = pd.api.types.is_bool_dtype(dtype)
    if pd.api.types.is_numeric_dtype(dtype) and not is_bool:
        kind = "number"
        numbers = series.to_numpy(dtype=np.float64, na_value=np.nan)
        known = ~np.isnan(numbers)
    else:
        known = series.notna().to_numpy(dtype=bool)
        kind = "bool" if is_bool else _type_of_objects(name, series, known)
        if kind == "number":
            numbers[known] = [_number(v) for v in series[known]]
    if (infinite := np.isinf(numbers)).any():
        raise ValueError(
            f"column {name!r} has infinite numbers in {rows_text(series.index, infinite)};"
            " leave these cells empty if they are missing"
        )
    return Cells(name, series, kind if known.any() else "empty", known, numbers, declared, ordered)


def _type_of_objects(name: str, series: pd.Series[Any], known: NDArray[np.bool_]) -> str:
    found: dict[str, Any] = {}
    for cell_type in {type(v) for v in series[known]}:
        kind = next((k for k, types in TYPES if issubclass(cell_type, types)), "other")
        found[kind] = cell_type
    if "other" in found:
        if issubclass(found["other"], DATES) or found["other"].__name__ in ("Period", "Interval"):
            _refuse_dates(name)
        raise ValueError(
            f"column {name!r} holds cells of type {found['other'].__name__}; a column holds"
            " numbers, booleans or text"
        )
    if len(found) > 1:
        types = sorted(t.__name__ for t in found.values())
        raise ValueError(
            f"column {name!r} mixes cells of type {' and '.join(types)}; make them all one type"
        )
    return next(iter(found), "empty")


def _refuse_dates(name: str) -> None:
    raise ValueError(
        f"column {name!r} holds dates or times; make it a number first, such as the days since a"
        ' fixed day: (frame[c] - pd.Timestamp("2020-01-01")).dt.days, or leave it out (drop=[...])'
    )


def _has_floats(series: pd.Series[Any]) -> bool:
    kind = getattr(series.dtype, "kind", "O")
    return kind == "f" or (kind == "O" and any(isinstance(v, float | Decimal) for v in series))


def _number(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")
