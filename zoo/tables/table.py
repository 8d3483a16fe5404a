"""Tables: values by site, ready for a batch, with the schema that says what they mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrozoo.zoo.tables.cells import Cells, read_cells, rows_text, some
from pyrozoo.zoo.tables.files import load
from pyrozoo.zoo.tables.kinds import KINDS, LEVELLED, check_support
from pyrozoo.zoo.tables.schema import Field, Label, Schema, Site
from pyrozoo.zoo.tables.sources import Source

if TYPE_CHECKING:
    import pandas as pd

Known = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Table:
    """N rows as :meth:`pyrozoo.inference.Batch.of` takes them.

    Attributes:
        schema: what the values mean.
        data: site -> values (N, D), or (values, present) with a boolean mask where some are
            missing. Columns are float32 in the user's units, levels as codes 0 .. K-1; pixels
            uint8, or float32 from 0 to 1 if all bytes are 0 or 1; ``y`` is int64 (N,); values that
            were asked for by name are (N, *), see :meth:`.Source.value`.
        index: the labels of the rows.
        labels: (N,) int64 codes, -1 where unlabelled; None without a column of labels.
    """

    schema: Schema
    data: dict[str, Known] = field(repr=False)
    index: pd.Index[Any] = field(repr=False)
    labels: NDArray[np.int64] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def present(self, site: str) -> NDArray[np.bool_]:
        """What is known of a site of columns or pixels, (N, D)."""
        entry = self.data[site]
        if isinstance(entry, Tensor):
            return np.ones((len(self), self.schema.site(site).width), dtype=bool)
        return entry[1].numpy()

    def summary(self) -> list[str]:
        """What was read, a line for each site, for people."""
        lines = [self._line(site) for site in self.schema.sites] + self._label_line()
        return lines + [self._value_line(name) for name in self.schema.values]

    def _value_line(self, name: str) -> str:
        entry = self.data[name]
        value, known = entry if isinstance(entry, tuple) else (entry, torch.ones(len(self)) > 0)
        kind = str(value.dtype).removeprefix("torch.")
        missing = f"{(~known).sum()} of {known.numel()} entries missing"
        return f"{name}: {len(self)} rows, {kind} {tuple(value.shape)}; {missing}"

    def _line(self, site: Site) -> str:
        present = self.present(site.name)
        kinds = [f.kind for f in site.columns]
        what = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds)
        if site.image_shape is not None:
            what = " x ".join(map(str, site.image_shape)) + " pixels"
        else:
            what = f"{len(kinds)} column{'s' * (len(kinds) != 1)} ({what})"
        holes, empty = ~present.all(1), ~present.any(1)
        return (
            f"{site.name}: {len(self)} rows, {what}; {(~present).sum()} of {present.size} entries"
            f" missing; {holes.sum()} rows incomplete, {empty.sum()} with nothing known"
        )

    def _label_line(self) -> list[str]:
        label = self.schema.label
        if self.labels is None or label is None:
            return []
        unknown = int((self.labels < 0).sum())
        return [
            f"y: {len(self)} rows, label {label.name!r} of {len(label.levels)} classes"
            f" ({some(label.levels, 10)}); {unknown} of {len(self)} unlabelled"
        ]


def encode(
    schema: Schema,
    source: Any,
    *,
    absent: Literal["error", "missing"] = "error",
    drop: Iterable[str] = (),
    rows: Any = None,
    index: str | int | None = None,
) -> Table:
    """Read new data with the schema of a model; the order of columns does not matter.

    Args:
        schema: of the training data.
        source: as for :func:`pyrozoo.zoo.tables.read`.
        absent: what to do with columns, or sites of arrays, that the new data lack: an error, or
            take all of it as missing. The column of labels may always be absent.
        drop: further columns to leave out; those left out at training are anyway.
        rows: the rows to read, a mask or row numbers; default all.
        index: column of the labels of rows, as for ``read``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is absent or not known, or a cell has an unknown level or a value that
            its column cannot have; the message names column, value and rows.
    """
    if absent not in ("error", "missing"):
        raise ValueError(f"absent is 'error' or 'missing', got {absent!r}")
    if isinstance(drop, str) or not isinstance(drop, Iterable):
        what = "the text " if isinstance(drop, str) else ""
        raise TypeError(f"drop is a list of columns, got {what}{drop!r}")
    loaded = load(source, index, _text_columns(schema), (*schema.values, *schema.dropped))
    if rows is not None:
        loaded = loaded.rows(rows)
    _check_columns(schema, loaded, absent, {*drop, *schema.dropped})
    data: dict[str, Known] = {}
    for site in schema.sites:
        data[site.name] = _columns(site, loaded) if site.columns else _pixels(site, loaded)
    for name, kind in schema.values.items():
        if loaded.has(name) or name in loaded.named:
            value, present = map(torch.from_numpy, loaded.value(name))
            data[name] = _entry(value.float() if kind == "float32" else value, present)
    labels, label = None, schema.label
    if label is not None and loaded.has(label.name):
        labels = _codes(label, read_cells(label.name, loaded.column(label.name)))
        known = torch.from_numpy(labels >= 0)
        data["y"] = _entry(torch.from_numpy(labels.clip(0)), known)
    return Table(schema, data, loaded.frame.index, labels)


def _text_columns(schema: Schema) -> list[str]:
    columns: list[Field | Label] = [f for site in schema.sites for f in site.columns]
    columns += [schema.label] if schema.label is not None else []
    return [c.name for c in columns if c.levels and all(isinstance(v, str) for v in c.levels)]


def _check_columns(schema: Schema, source: Source, absent: str, dropped: set[str]) -> None:
    names = {*schema.columns, *schema.values}
    names |= {s.name for s in schema.sites if s.image_shape is not None}
    here = {*source.pixels, *source.named}
    lacking = [n for n in names if not source.has(n) and n not in here]
    if lacking and absent != "missing":
        raise ValueError(
            f"{source.where} lacks {some(sorted(lacking))}; if all of it is missing there, say"
            " absent='missing'"
        )
    label = None if schema.label is None else schema.label.name
    given = [*source.frame.columns, *source.pixels]
    if extra := [n for n in given if n not in names and n not in dropped and n != label]:
        raise ValueError(
            f"{source.where} has {some(extra)}, which the model does not know; leave it out with"
            " drop=[...]"
        )


def _columns(site: Site, source: Source) -> Known:
    values = np.zeros((len(source), len(site.columns)), dtype=np.float32)
    present = np.zeros(values.shape, dtype=bool)
    for j, column in enumerate(site.columns):
        if not source.has(column.name):
            continue
        cells = read_cells(column.name, source.column(column.name))
        found = _numbers(column, cells)
        values[cells.known, j] = found[cells.known]
        present[:, j] = cells.known
    return _entry(torch.from_numpy(values), torch.from_numpy(present))


def _numbers(column: Field, cells: Cells) -> NDArray[Any]:
    if column.kind in LEVELLED:
        advice = (
            f"; if it has more of them, read the training data with columns={{{column.name!r}: {{"
            f'"{column.kind}": [...]}}}}'
        )
        return cells.codes(column.levels, advice if column.kind != "binary" else "")
    if cells.type not in ("number", "empty"):
        kind = "booleans" if cells.type == "bool" else "text"
        raise ValueError(
            f"column {column.name!r}: expected numbers ({column.kind}), got {kind} in"
            f" {rows_text(cells.index, cells.known)}"
        )
    return check_support(column.likelihood, cells)


def _codes(label: Label, cells: Cells) -> NDArray[np.int64]:
    codes = cells.codes((*label.levels, -1) if cells.type == "number" else label.levels)
    return np.where(codes == len(label.levels), -1, codes)


def _pixels(site: Site, source: Source) -> Known:
    assert site.image_shape is not None
    if site.name not in source.pixels:
        value = torch.zeros((len(source), site.width), dtype=torch.uint8)
        return value, torch.zeros(value.shape, dtype=torch.bool)
    images, known = source.pixels[site.name]
    if images.shape[1:] != site.image_shape:
        raise ValueError(
            f"{source.where}: {site.name!r} has images of shape {images.shape[1:]}, the model knows"
            f" {site.image_shape}"
        )
    value = torch.from_numpy(images.reshape(len(images), site.width).copy())
    if value.numel() and int(value.max()) <= 1:
        value = value / 255  # a batch takes bytes of 0 and 1 for a mistake; this is what it reads
    if known is None:
        return value
    flat = known.reshape(len(known), -1)
    return _entry(value, torch.from_numpy(np.broadcast_to(flat, value.shape).copy()))


def _entry(value: Tensor, present: Tensor) -> Known:
    return value if bool(present.all()) else (value, present)
