"""Readers of rows for files that keep single rows together with others: Parquet, sparse matrices.

Each is an array as :class:`pyrozoo.inference.disk.arrays.Source` takes it: ``shape``, ``dtype``,
``row_starts``, and slices of whole blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrozoo.zoo.tables.cells import library, some

Array = NDArray[Any]

SPARSE_BLOCK = 2**24  # bytes of a block of a sparse matrix


class ParquetFile:
    """An open Parquet file, whose row groups are the blocks.

    Attributes:
        path: of the file.
        names: of the columns.
        row_starts: the first row of every row group.
        rows: how many there are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = library("pyarrow.parquet", "storage").ParquetFile(
            path, page_checksum_verification=True
        )
        self._lock = threading.Lock()
        meta = self._file.metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        kept = [i for i, size in enumerate(sizes) if size]
        self.row_starts = np.cumsum([0, *(sizes[i] for i in kept)])[:-1]
        self.groups = dict(zip(self.row_starts.tolist(), kept, strict=True))
        self.rows = int(meta.num_rows)
        self.schema = self._file.schema_arrow
        self.names = list(self.schema.names)

    def read(self, names: Sequence[str], first: int | None = None) -> Any:
        """Columns as an Arrow table: of the row group that begins at a row, or of all."""
        with self._lock:
            if first is None:
                return self._file.read(list(names), use_threads=False)
            group = self.groups[first]
            return self._file.read_row_group(group, list(names), use_threads=False)

    def missing(self, name: str) -> bool:
        """Whether a column may have missing values; False only if the file says that it has none.

        ``name`` is that of a column without columns inside.
        """
        meta = self._file.metadata
        for group in self.groups.values():
            chunks = [meta.row_group(group).column(i) for i in range(meta.num_columns)]
            found = next(c.statistics for c in chunks if c.path_in_schema == name)
            if found is None or not found.has_null_count or found.null_count:
                return True
        return False


class ParquetColumns:
    """Columns of numbers as a matrix ``(rows, columns)``, one column of lists of one length as
    ``(rows, length)``, or, with ``vector``, one column as ``(rows,)``.

    Args:
        file: the open file.
        names: of the columns.
        vector: whether one column is a vector and not a matrix.
        known: where values are present, in place of the values.

    Raises:
        ValueError: there is no such column, or it holds no numbers; the message names it.
    """

    def __init__(
        self, file: ParquetFile, names: Sequence[str], *, vector: bool = False, known: bool = False
    ) -> None:
        self._file, self.names, self.vector, self.known = file, list(names), vector, known
        self.where, self.file, self.row_starts = str(file.path), file.path, file.row_starts
        types = library("pyarrow", "storage").types
        if lacks := [name for name in self.names if name not in file.names]:
            raise ValueError(
                f"{self.where}: no column {some(lacks, 5)} (columns: {some(file.names)})"
            )
        kinds = {name: file.schema.field(name).type for name in self.names}
        first = kinds[self.names[0]]
        self.lists = len(kinds) == 1 and types.is_fixed_size_list(first)
        for name, kind in kinds.items():
            inner = kind.value_type if self.lists else kind
            number = types.is_integer(inner) or types.is_floating(inner) or types.is_boolean(inner)
            if not number:
                raise ValueError(
                    f"{self.where}: column {name!r} is expected to hold numbers or booleans, got"
                    f" {kind}; leave it out by naming the columns of each site"
                )
            kinds[name] = inner
        self.dtype = np.dtype(bool) if known else np.result_type(
            *(np.dtype(kind.to_pandas_dtype()) for kind in kinds.values())
        )  # fmt: skip
        width = first.list_size if self.lists else len(self.names)
        self.shape = (file.rows,) if vector else (file.rows, width)

    @property
    def partly(self) -> bool:
        """Whether values may be missing."""
        return not self.lists and any(self._file.missing(name) for name in self.names)

    def __getitem__(self, rows: slice) -> Array:
        table = self._file.read(self.names, rows.start)
        if self.lists:
            found = self._from_lists(table.column(0))
        else:
            found = np.empty((table.num_rows, len(self.names)), self.dtype)
            for j, column in enumerate(table.columns):
                found[:, j] = self._values(column)
        return found[:, 0] if self.vector else found

    def _values(self, column: Any) -> Array:
        if self.known:
            return column.is_valid().to_numpy()
        if column.null_count:
            blank = False if column.type == library("pyarrow").bool_() else 0
            column = column.fill_null(blank)
        return column.to_numpy()

    def _from_lists(self, column: Any) -> Array:
        parts = []
        for chunk in column.chunks:
            inner = chunk.flatten()
            if chunk.null_count or inner.null_count:
                raise ValueError(
                    f"column {self.names[0]!r} has missing values in its lists; say which rows are"
                    f" there by a column of booleans, {self.names[0]}_present"
                )
            values = inner.to_numpy(zero_copy_only=False)
            parts.append(values.reshape(len(chunk), *self.shape[1:]))
        return np.concatenate(parts)


class SparseRows:
    """The rows of a sparse matrix in an ``.h5ad`` file, kept by rows (CSR): ``(rows, columns)``.

    Raises:
        ValueError: it is kept by columns.
    """

    def __init__(self, group: Any, where: str, file: Path) -> None:
        kind = str(group.attrs.get("encoding-type"))
        if kind != "csr_matrix":
            raise ValueError(
                f"{where}: rows can be read of a dense matrix or of one kept by rows (csr_matrix),"
                f" got {kind}"
            )
        self._rows = library("anndata.io").sparse_dataset(group)
        self.where, self.file = where, file
        self.shape, self.dtype = tuple(self._rows.shape), np.dtype(group["data"].dtype)
        each = self.dtype.itemsize + group["indices"].dtype.itemsize
        mean = max(1, group["data"].shape[0] * each // max(1, self.shape[0]))
        step = max(1, SPARSE_BLOCK // mean)
        self.row_starts = np.arange(0, max(1, self.shape[0]), step)
        self.block_bytes = min(step, self.shape[0]) * mean

    def __getitem__(self, rows: slice) -> Any:
        return self._rows[rows]
