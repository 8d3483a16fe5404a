"""File formats of tables: one reader and one writer each.

- ``.csv``: commas, UTF-8, the names of the columns in the first line, every line as long as it.
  Missing are the fields in ``MISSING``, as in pandas: empty ones, ``NA``, ``NaN``, ``null`` ..
- ``.npz``: arrays by site, see :mod:`pyrozoo.zoo.tables.sources`. Nothing is ever unpickled.
- ``.h5ad``: X, dense or sparse, becomes columns called by ``var_names``; columns of ``obs`` are
  read where they are asked for by name; ``obs_names`` are the index.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from torch import Tensor

from pyrozoo.zoo.tables.cells import library, repeated, rows_text, some
from pyrozoo.zoo.tables.sources import Source, from_arrays

if TYPE_CHECKING:
    import pandas as pd

#: Fields of a ``.csv`` that are read as missing.
MISSING = (
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
)  # fmt: skip


def index_name(index: str | int, names: list[str], where: str) -> str:
    """The name of the column of labels of rows, given by name or number."""
    if isinstance(index, int) and not 0 <= index < len(names):
        raise ValueError(f"{where}: no column number {index}; there are {len(names)}")
    name = names[index] if isinstance(index, int) else index
    if name not in names:
        raise ValueError(f"{where}: no column {name!r} for the index (columns: {some(names)})")
    return name


def read_csv(path: Path, index: str | int | None, text: tuple[str, ...]) -> Source:
    """Read a ``.csv``, with the column of the index and the columns that are text."""
    pd = library("pandas")
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(_without_nul(file))
        names = next((line for line in lines if line), [])
        rows = 0
        for line in filter(None, lines):
            rows += 1
            if len(line) != len(names):
                raise ValueError(
                    f"line {lines.line_num} has {len(line)} fields, the first line {len(names)}"
                )
    if twice := repeated(names):
        raise ValueError(f"two columns are called {some(twice)}")
    column = names.index(index_name(index, names, str(path))) if index is not None else None
    if unnamed := [i for i, name in enumerate(names) if not name and i != column]:
        raise ValueError(
            f"column {unnamed[0]} has no name; if it holds the labels of the rows, say"
            f" index={unnamed[0]}"
        )
    as_text = {name: str for name in text if name in names}
    frame = pd.read_csv(
        path,
        encoding="utf-8-sig",
        dtype=as_text,
        na_values=list(MISSING),
        keep_default_na=False,
        low_memory=False,
        float_precision="round_trip",
    )
    if len(frame) != rows:
        raise ValueError(f"it has {rows} rows, of which {len(frame)} can be told apart")
    if column is not None:
        frame = frame.set_index(frame.columns[column])
        frame.index.name = names[column] or None
    return Source(frame, str(path))


def _without_nul(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise ValueError(f"line {number} has a null byte")
        yield line


def read_parquet(path: Path) -> Source:
    """Read a ``.parquet``; what its checksums do not fit, where it has any, is refused."""
    options = {"engine": "pyarrow", "page_checksum_verification": True}
    return Source(library("pandas").read_parquet(path, **options), str(path))


def read_npz(path: Path, named: Collection[str] | None) -> Source:
    """Read an ``.npz`` of arrays by site, or asked for by name."""
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("it holds one array without a name")
        _check_members(file, archive.files)
        return from_arrays({key: archive[key] for key in archive.files}, str(path), named)


def _check_members(file: BinaryIO, names: list[str]) -> None:
    """Check that a zip file lists as many members as it says at its end.

    Raises:
        ValueError: its list is damaged, so that arrays are hidden, or two have one name.
    """
    file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
    end = file.read().rpartition(b"PK\x05\x06")[2]
    count = int.from_bytes(end[6:8], "little")
    if count != len(names) or repeated(names):
        raise ValueError(f"it says that it has {count} arrays, and lists {some(names)}")


def read_h5ad(path: Path) -> Source:
    """Read X, ``obs`` and ``var`` of an ``.h5ad``, and nothing else of it."""
    pd, h5py, anndata = library("pandas"), library("h5py"), library("anndata.io")
    with h5py.File(path, "r") as file:
        refuse_links(file, h5py)
        if lacks := [key for key in ("X", "obs", "var") if key not in file]:
            raise ValueError(f"it has no {' and no '.join(lacks)}")
        matrix, obs, var = (anndata.read_elem(file[key]) for key in ("X", "obs", "var"))
    matrix = matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)
    if matrix.shape != (len(obs), len(var)):
        raise ValueError(f"X has shape {matrix.shape}, obs and var {len(obs)} and {len(var)} rows")
    counts = bool(
        matrix.size and matrix.min() >= 0 and matrix.max() > 1 and (matrix % 1 == 0).all()
    )
    frame = pd.DataFrame(matrix, index=obs.index, columns=[str(name) for name in var.index])
    return Source(frame, str(path), extra=obs, counts=counts)


def refuse_links(file: Any, h5py: Any) -> None:
    """Raise a ValueError if reading the file would read another one."""

    def is_link(name: str, link: Any) -> str | None:
        return name if isinstance(link, h5py.ExternalLink) else None

    def is_outside(name: str, item: Any) -> str | None:
        outside = isinstance(item, h5py.Dataset) and (item.external or item.is_virtual)
        return name if outside else None

    found = file.visititems_links(is_link) or file.visititems(is_outside)
    if found is not None:
        raise ValueError(f"{found} is kept in another file")


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a ``.csv``; text that would be read as missing is refused."""
    pd = library("pandas")
    counting = frame.index.name is None and frame.index.equals(pd.RangeIndex(len(frame)))
    for name in frame.columns:
        if (lost := frame[name].isin(MISSING)).any():
            raise ValueError(
                f"column {name!r} has text that reads as missing in a .csv,"
                f" {frame[name][lost].iloc[0]!r} in {rows_text(frame.index, lost.to_numpy())};"
                " write a .parquet"
            )
    frame.to_csv(path, index=not counting, compression=None)


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Write a ``.parquet`` with checksums."""
    library("pyarrow")
    frame.to_parquet(path, engine="pyarrow", write_page_checksum=True)


def write_npz(arrays: Mapping[str, Any], path: Path) -> None:
    """Write an ``.npz``."""
    plain: dict[str, Any] = {}
    for key, value in arrays.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
            raise ValueError(f"{key!r} is no array of numbers or booleans")
        plain[key] = value
    with path.open("wb") as file:
        np.savez_compressed(file, **plain)


def write_h5ad(frame: pd.DataFrame, path: Path) -> None:
    """Write an ``.h5ad``: numeric columns are X, the others ``obs``; text as categories."""
    pd, anndata = library("pandas"), library("anndata")
    is_bool, is_number = pd.api.types.is_bool_dtype, pd.api.types.is_numeric_dtype
    numeric = [c for c in frame if is_number(frame[c].dtype) and not is_bool(frame[c].dtype)]
    obs = frame.drop(columns=numeric)
    obs.index = obs.index.astype(str)
    for column in obs:
        if obs[column].dtype == object or pd.api.types.is_string_dtype(obs[column].dtype):
            obs[column] = obs[column].astype("category")
    matrix = frame[numeric].to_numpy(dtype=np.float64, na_value=np.nan)
    anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=numeric)).write_h5ad(path)
