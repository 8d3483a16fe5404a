"""Learning a schema from training data: which columns there are, their kinds, levels and scales."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pyrozoo.zoo.networks import Column
from pyrozoo.zoo.tables.cells import Cells, read_cells, repeated, some
from pyrozoo.zoo.tables.files import load
from pyrozoo.zoo.tables.kinds import LEVELLED, Wish, choose, location_scale
from pyrozoo.zoo.tables.schema import Field, Label, Schema, Site
from pyrozoo.zoo.tables.sources import Source
from pyrozoo.zoo.tables.table import Table, encode

Views = Mapping[str, Sequence[str]]


def read(
    source: Any,
    *,
    label: str | None = None,
    views: Views | None = None,
    columns: Mapping[str, Wish] | None = None,
    drop: Iterable[str] = (),
    values: Iterable[str] = (),
    constant: Literal["error", "drop"] = "error",
    rows: Any = None,
    index: str | int | None = None,
) -> Table:
    """Read training data and learn their schema.

    Args:
        source: a path (``.csv``, ``.parquet``, ``.npz``, ``.h5ad``), a pandas data frame, a
            dictionary of arrays by site, or what :func:`pyrozoo.zoo.tables.load` returned.
        label: the column of labels, which becomes the site ``y``; missing, or -1 in a column of
            numbers, is unlabelled. Arrays bring their own ``y``.
        views: view -> its columns, which become the site ``x_<view>``; without views all columns
            are the site ``x``. Arrays bring their own views.
        columns: column -> its kind, its likelihood, its levels from low to high (ordered), or
            ``{kind: levels}``, where the inferred kind is not right; for arrays also site -> ...
        drop: columns, or sites of arrays, to leave out; new data may have them or not.
        values: columns, or arrays of any name and shape, that are values of their own names, read
            as they are, and belong to no site of columns (see :meth:`.Source.value`).
        constant: what to do with columns that have one value only, or none.
        rows: the rows to read and to learn from, a mask or row numbers; default all.
        index: column, by name or number, of the labels of rows (``.csv``, ``.parquet``, frames).

    Returns:
        The table of these rows; its schema encodes new data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the data, or what was asked for, make no sense; the message names file, column
            and rows.
        TypeError: the source is of another type.
    """
    if isinstance(drop, str) or not isinstance(drop, Iterable):
        what = "the text " if isinstance(drop, str) else ""
        raise TypeError(f"drop is a list of columns, got {what}{drop!r}")
    for what, given in (("views", views or {}), ("columns", columns or {})):
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} is a dictionary, got {given!r}")
    if constant not in ("error", "drop"):
        raise ValueError(f"constant is 'error' or 'drop', got {constant!r}")
    drop, values = tuple(drop), tuple(values)
    loaded = load(source, index, _text(columns or {}), (*values, *drop))
    if rows is not None:
        loaded = loaded.rows(rows)
    if len(loaded) == 0:
        raise ValueError(f"{loaded.where} has no rows to learn from")
    schema = _learn(loaded, label, views, dict(columns or {}), drop, values, constant)
    return encode(schema, loaded)


def _text(columns: Mapping[str, Wish]) -> list[str]:
    """Columns whose levels were given as text, so that "01" is not read as a number."""

    def is_text(wish: Any) -> bool:
        levels = next(iter(wish.values()), ()) if isinstance(wish, Mapping) else wish
        return isinstance(levels, list | tuple) and all(isinstance(v, str) for v in levels)

    return [name for name, wish in columns.items() if is_text(wish)]


def _learn(
    source: Source,
    label: str | None,
    views: Views | None,
    wishes: dict[str, Wish],
    drop: tuple[str, ...],
    values: tuple[str, ...],
    constant: str,
) -> Schema:
    if source.arrays and (views is not None or label not in (None, "y")):
        raise ValueError(f"{source.where}: arrays bring their own views and their label 'y'")
    if label is None and source.arrays and source.has("y"):
        label = "y"
    if label is not None:
        _check_known(source, [label], "label")
    asked = [*wishes, *dict.fromkeys(drop), *values]
    if clash := [n for n in asked if n == label or asked.count(n) > 1]:
        what = "the label" if clash[0] == label else "dropped" if clash[0] in drop else "a value"
        raise ValueError(f"{clash[0]!r} is {what} and asked for as something else")
    dropped = _expand(source, dict.fromkeys(drop), "drop")
    counts: dict[str, Wish] = dict.fromkeys(source.frame.columns, "count") if source.counts else {}
    wishes = _expand(source, wishes, "columns")
    _check_known(source, values, "values")
    sites = _sites(source, views, label, tuple(wishes), (*dropped, *values))
    if values and sites == {"x": []}:
        sites = {}
    found: list[Site] = []
    useless: dict[str, str] = {}
    for name, names in sites.items():
        fields = []
        for column in names:
            cells = read_cells(column, source.column(column))
            if len(cells.distinct) < 2:
                useless[column] = f"only {cells.distinct[0]!r}" if cells.distinct else "no value"
                continue
            fields.append(_field(cells, wishes.get(column, counts.get(column))))
        if fields:
            found.append(Site(name, tuple(fields)))
    if useless and constant != "drop":
        listed = ", ".join(f"{name!r} ({what})" for name, what in list(useless.items())[:20])
        more = f" and {len(useless) - 20} more" if len(useless) > 20 else ""
        raise ValueError(
            f"{source.where}: nothing can be learnt from columns with one value or none: {listed}"
            f"{more}; leave them out with drop=[...], or all such columns with constant='drop'"
        )
    found += [_pixel_site(source, name) for name in source.pixels if name not in dropped]
    empty = [name for name in sites if name not in {site.name for site in found}]
    if empty or not (found or values):
        raise ValueError(f"{source.where}: no columns are left for site {some(empty or ['x'])}")
    return Schema(
        tuple(found),
        None if label is None else _label(read_cells(label, source.column(label))),
        (*dropped, *useless),
        {name: str(source.value(name)[0].dtype) for name in values},
    )


def _check_known(source: Source, names: Iterable[str], what: str) -> None:
    known = [*source.frame.columns, *([] if source.extra is None else source.extra.columns)]
    for name in names:
        if not source.has(name) and name not in source.pixels and name not in source.named:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{source.where}: {what} names {name!r}, which is no column (columns:"
                f" {some(known)}){hint}"
            )


def _expand(source: Source, named: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Names of sites of arrays stand for all of their columns."""
    out: dict[str, Any] = {}
    for name, value in named.items():
        out |= dict.fromkeys(source.views[name], value) if name in source.views else {}
    out |= {name: value for name, value in named.items() if name not in source.views}
    _check_known(source, out, what)
    return out


def _sites(
    source: Source,
    views: Views | None,
    label: str | None,
    wished: tuple[str, ...],
    dropped: tuple[str, ...],
) -> dict[str, list[str]]:
    out = {label, *dropped}
    if source.arrays:
        sites = {site: [n for n in names if n not in out] for site, names in source.views.items()}
        return {site: names for site, names in sites.items() if names}
    extra = [] if source.extra is None else list(source.extra.columns)
    wanted = {*wished, *(name for names in (views or {}).values() for name in names)}
    available = [n for n in source.frame.columns if n not in out]
    available += [n for n in extra if n in wanted and n not in out]
    if views is None:
        return {"x": available}
    for view, names in views.items():
        if not re.fullmatch(r"[A-Za-z0-9_]+", view) or isinstance(names, str) or not names:
            raise ValueError(
                f"views are name -> list of columns, with names of letters, digits and _, got"
                f" {view!r}: {names!r}"
            )
    listed = [name for names in views.values() for name in names]
    _check_known(source, listed, "views")
    if taken := [name for name in listed if name in out]:
        raise ValueError(f"views have columns that are the label or dropped: {some(taken)}")
    if twice := repeated(listed):
        raise ValueError(f"columns in two views: {some(twice)}")
    if missing := [name for name in available if name not in listed]:
        raise ValueError(f"columns in no view: {some(missing)}; name them in one, or drop them")
    return {f"x_{view}": list(names) for view, names in views.items()}


def _field(cells: Cells, wish: Wish | None) -> Field:
    kind, likelihood, levels = choose(cells, wish)
    if kind not in LEVELLED:
        return Field(cells.name, kind, likelihood, (), *location_scale(likelihood, cells))
    codes = cells.codes(levels)[cells.known]
    column = Column.of(cells.name, likelihood, codes, 0 if kind == "binary" else len(levels))
    return Field(cells.name, kind, likelihood, levels, column.center, column.spread)


def _label(cells: Cells) -> Label:
    levels = [v for v in cells.distinct if v != -1 or cells.type != "number"]
    if cells.type == "number" and any(v != int(v) for v in levels):
        raise ValueError(
            f"label {cells.name!r} holds numbers such as {some([v for v in levels if v % 1], 2)};"
            " labels are classes: leave such a column among the others"
        )
    if 2 * len(levels) > max(len(cells.known), 4):
        raise ValueError(
            f"label {cells.name!r} has {len(levels)} classes in {len(cells.known)} rows; it looks"
            " like an identifier"
        )
    if len(levels) < 2:
        hint = "; -1 means unlabelled" if len(levels) < len(cells.distinct) else ""
        raise ValueError(
            f"label {cells.name!r} needs two classes or more, got {some(levels) or 'none'}{hint}"
        )
    whole = [int(v) for v in levels] if cells.type == "number" else levels
    return Label(cells.name, tuple(whole))


def _pixel_site(source: Source, name: str) -> Site:
    value, known = source.pixels[name]
    if int(np.max(value, initial=0)) <= 1:
        raise ValueError(
            f"{source.where}: {name!r} holds bytes, which are pixels from 0 to 255, but the largest"
            f" is {int(value.max())}; store yes/no as booleans"
        )
    if known is not None and not known.any():
        raise ValueError(f"{source.where}: {name!r} is known in no row; leave it out")
    return Site(name, image_shape=value.shape[1:])
