"""Back from values to the user's columns: levels put back, posterior draws summarised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyrozoo.zoo.tables.cells import library, rows_text, some
from pyrozoo.zoo.tables.kinds import LEVELLED
from pyrozoo.zoo.tables.schema import Field, Schema

if TYPE_CHECKING:
    import pandas as pd


class Summary(NamedTuple):
    """Posterior draws as four data frames with the same rows and columns.

    Attributes:
        value: the mean of numbers, the most frequent level of the others; what is known as it is.
        lower: lower end of the central interval; of an ordered column a level. Binary and
            categorical columns have no interval: missing.
        upper: upper end.
        probability: of the level in ``value``, 1 where known; NaN for numbers.
    """

    value: pd.DataFrame
    lower: pd.DataFrame
    upper: pd.DataFrame
    probability: pd.DataFrame


def decode(schema: Schema, site: str, values: Any, index: Any = None) -> pd.DataFrame:
    """Values of a site as a data frame of the user's columns.

    Numbers stay float32, means of counts included. Categorical and ordered columns become pandas
    categoricals, binary ones too if they are text; other binary ones keep their type.

    Args:
        schema: of the training data.
        site: a site of columns, or ``y``.
        values: (N, D) tensor or array, (N,) for ``y``; levels as codes.
        index: labels of the rows; default 0 .. N-1.

    Raises:
        ValueError: the site has no columns, the shape is another one, a value is not finite, or a
            code is none of 0 .. K-1; the message names column and rows.
    """
    columns = _fields(schema, site)
    array = _array(site, values, len(columns), 2)
    labels = _labels(index, len(array))
    _check(columns, array, labels)
    return _frame(columns, array, labels)


def summarise(
    schema: Schema,
    site: str,
    draws: Any,
    known: Any = None,
    level: float = 0.9,
    index: Any = None,
) -> Summary:
    """Posterior draws of a site as values with intervals or probabilities.

    Args:
        schema: of the training data.
        site: a site of columns, or ``y``.
        draws: (S, N, D) tensor or array, (S, N) for ``y``; levels as codes.
        known: what was observed, as in ``Table.data``: (N, D) values, or (values, present). Known
            entries are returned as they are, with intervals of zero width.
        level: the probability of the intervals, between 0 and 1.
        index: labels of the rows; default 0 .. N-1.

    Raises:
        ValueError: there is no draw, ``level`` is not inside (0, 1), or see :func:`decode`.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is between 0 and 1, got {level}")
    columns = _fields(schema, site)
    array = _array(site, draws, len(columns), 3)
    if len(array) == 0:
        raise ValueError(f"site {site!r}: there is no draw to summarise")
    rows = array.shape[1]
    labels = _labels(index, rows)
    _check(columns, array, labels)
    observed, present = _known(site, known, (rows, len(columns)))
    _check(columns, np.where(present, observed, array[0]), labels)
    tails = [(1 - level) / 2, (1 + level) / 2]
    middle, low, high, chance = (np.full((rows, len(columns)), np.nan) for _ in range(4))
    for j, column in enumerate(columns):
        drawn = array[:, :, j]
        if column.kind not in LEVELLED:
            middle[:, j] = drawn.mean(0, dtype=np.float64)
            low[:, j], high[:, j] = np.quantile(drawn, tails, axis=0)
            continue
        shares = np.stack([(drawn == code).mean(0) for code in range(len(column.levels))])
        middle[:, j], chance[:, j] = shares.argmax(0), shares.max(0)
        chance[present[:, j], j] = 1.0
        if column.kind == "ordered":
            low[:, j], high[:, j] = np.quantile(drawn, tails, axis=0, method="inverted_cdf")
    for entries in (middle, low, high):
        entries[present] = observed[present]
    value, lower, upper = (_frame(columns, entries, labels) for entries in (middle, low, high))
    names = [column.name for column in columns]
    chances = library("pandas").DataFrame(chance, index=labels, columns=names)
    return Summary(value, lower, upper, chances)


def images(schema: Schema, site: str, values: Any) -> NDArray[np.uint8]:
    """Values of a site of pixels as bytes from 0 to 255.

    Args:
        schema: of the training data.
        site: a site of pixels.
        values: (N, D) tensor or array of numbers from 0 to 1.

    Returns:
        (N, *image_shape) uint8.

    Raises:
        ValueError: the site has columns, or the values another shape or range.
    """
    found = schema.site(site)
    if found.image_shape is None:
        raise ValueError(f"site {site!r} has columns; use decode")
    array = _array(site, values, found.width, 2)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"site {site!r}: pixels are numbers from 0 to 1")
    return np.rint(array * 255).astype(np.uint8).reshape(len(array), *found.image_shape)


def _fields(schema: Schema, site: str) -> tuple[Field, ...]:
    if site == "y" and schema.label is not None:
        kind, likelihood = (
            ("binary", "bernoulli")
            if len(schema.label.levels) == 2
            else ("categorical", "categorical")
        )
        return (Field(schema.label.name, kind, likelihood, schema.label.levels),)
    columns = schema.site(site).columns
    if not columns:
        raise ValueError(f"site {site!r} has pixels, not columns; use images")
    return columns


def _array(site: str, values: Any, columns: int, rank: int) -> NDArray[Any]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if site == "y" and array.ndim == rank - 1:
        array = array[..., None]
    if array.ndim != rank or array.shape[-1] != columns or array.dtype.kind not in "biuf":
        shape = ("draws, " if rank == 3 else "") + f"rows, {columns}"
        raise ValueError(
            f"site {site!r}: expected numbers of shape ({shape}), got {array.dtype} {array.shape}"
        )
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _labels(index: Any, rows: int) -> pd.Index[Any]:
    labels: pd.Index[Any] = library("pandas").Index(range(rows) if index is None else index)
    if len(labels) != rows:
        raise ValueError(f"the index has {len(labels)} labels for {rows} rows")
    return labels


def _check(columns: tuple[Field, ...], array: NDArray[Any], labels: pd.Index[Any]) -> None:
    """Check (*, N, D) values: finite, and codes where there are levels."""
    for j, column in enumerate(columns):
        found, expected = np.atleast_2d(array[..., j]), "finite numbers"
        wrong = ~np.isfinite(found)
        if column.kind in LEVELLED:
            expected = f"codes 0 .. {len(column.levels) - 1}"
            with np.errstate(invalid="ignore"):
                wrong |= (found != np.floor(found)) | (found < 0) | (found >= len(column.levels))
        if wrong.any():
            seen = np.unique(found[wrong]).tolist()
            raise ValueError(
                f"column {column.name!r}: expected {expected}, got {some(seen, 5)} in"
                f" {rows_text(labels, wrong.any(0))}"
            )


def _known(site: str, known: Any, shape: tuple[int, int]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    if known is None:
        return np.zeros(shape), np.zeros(shape, dtype=bool)
    value, present = known if isinstance(known, tuple) else (known, np.ones(shape, dtype=bool))
    value = _array(site, value, shape[1], 2)
    present = np.asarray(present)
    if present.ndim == 1:
        present = np.broadcast_to(present[:, None], (len(present), shape[1]))
    if value.shape != shape or present.shape != shape or present.dtype != np.bool_:
        raise ValueError(
            f"site {site!r}: the draws have shape (.., {shape[0]}, {shape[1]}), what is known"
            f" {value.shape} and its mask {present.dtype} {present.shape}"
        )
    return value, present


def _frame(
    columns: tuple[Field, ...], entries: NDArray[Any], labels: pd.Index[Any]
) -> pd.DataFrame:
    """Entries (N, D), NaN where missing, as the user's columns."""
    data = {
        column.name: _levels(column, found) if column.kind in LEVELLED else found.astype(np.float32)
        for column, found in zip(columns, entries.T, strict=True)
    }
    frame: pd.DataFrame = library("pandas").DataFrame(data, index=labels)
    return frame


def _levels(column: Field, codes: NDArray[Any]) -> Any:
    pd = library("pandas")
    places = np.where(np.isnan(codes), -1, codes).astype(np.int64)
    levels = list(column.levels)
    if column.kind == "binary":
        missing = bool((places < 0).any())
        values = [levels[place] if place >= 0 else None for place in places]
        if all(isinstance(v, bool) for v in levels):
            return pd.array(values, dtype="boolean" if missing else "bool")
        if all(type(v) is int for v in levels):
            return pd.array(values, dtype="Int64" if missing else "int64")
        if all(isinstance(v, int | float) for v in levels):
            return np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return pd.Categorical.from_codes(places, categories=levels, ordered=column.kind == "ordered")
