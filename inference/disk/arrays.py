"""Arrays that stay on disk, read by rows.

A :class:`Source` wraps whatever has ``shape``, ``dtype`` and numpy-style reading of slices and of
sorted row numbers: ``np.memmap``, ``h5py.Dataset``, ``zarr.Array`` or an array in memory.  Where
one row cannot be read without its neighbours (compressed chunks, row groups) whole blocks are read,
and the last few are kept.  Such an array may say so itself, by these attributes:

- ``row_starts``: the first row of every block; then only slices of whole blocks are asked for;
- ``block_bytes``: the size of a block in memory;
- ``where``: what to call it in messages; ``file``: the path that is watched for changes.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[Any]
Numbers: TypeAlias = NDArray[np.int64]

BLOCK = 2**20  # bytes; smaller chunks are read several at a time


class Source:
    """One array of some rows.

    Args:
        name: of the site, for messages.
        given: the array.

    Raises:
        TypeError: it is no array of numbers or booleans.
        ValueError: it is a single number.
    """

    def __init__(self, name: str, given: Any) -> None:
        if isinstance(given, Tensor):
            given = given.detach().cpu().numpy()
        lacks = [a for a in ("shape", "dtype", "__getitem__") if not hasattr(given, a)]
        if lacks:
            raise TypeError(
                f"{name!r}: expected an array that is read by rows (shape, dtype, [rows]), got"
                f" {type(given).__name__} without {', '.join(lacks)}"
            )
        self.name, self.where, self.file = name, *_place(given)
        self.shape = tuple(int(size) for size in given.shape)
        try:
            self.dtype = np.dtype(given.dtype)
        except TypeError:
            self.dtype = np.dtype(object)
        if self.dtype.kind not in "biuf":
            raise TypeError(f"{self}: expected numbers or booleans, got type {given.dtype}")
        if not self.shape:
            raise ValueError(f"{self}: values have the rows first, got a single number")
        self.array = _mapped(given, self.file)
        self.row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        self.starts = self._starts()
        self.keep = 4  # blocks
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._stamp = self._look()

    def __len__(self) -> int:
        return self.shape[0]

    def __str__(self) -> str:
        return f"{self.where}: {self.name!r}" if self.where else repr(self.name)

    @property
    def block_bytes(self) -> int:
        """Size of the largest block, in bytes; of one row, where rows are read alone."""
        if self.starts is None:
            return self.row_bytes
        longest = int(np.diff(np.append(self.starts, len(self))).max(initial=0))
        return int(getattr(self.array, "block_bytes", longest * self.row_bytes))

    def read(self, rows: Numbers | slice) -> Array:
        """Some rows: their numbers, in any order and also repeatedly, or a slice of step one.

        Raises:
            ValueError: they cannot be read, or the file was changed since it was opened.
        """
        if isinstance(rows, slice):
            return self._read(np.arange(rows.start, rows.stop))
        if len(rows) < 2 or bool((np.diff(rows) > 0).all()):
            return self._read(rows)
        unique, back = np.unique(rows, return_inverse=True)
        return self._read(unique)[back]

    def _read(self, rows: Numbers) -> Array:
        if not len(rows):
            return np.empty((0, *self.shape[1:]), self.dtype)
        self.check_unchanged()
        try:
            found = self._read_alone(rows) if self.starts is None else self._read_blocks(rows)
        except MemoryError:
            raise
        except Exception as error:
            self.check_unchanged()
            raise ValueError(
                f"{self}: rows {rows[0]} to {rows[-1]} cannot be read:"
                f" {str(error) or type(error).__name__}"
            ) from error
        return self._checked(found, len(rows))

    def _read_alone(self, rows: Numbers) -> Array:
        if rows[-1] - rows[0] + 1 == len(rows):
            return np.array(self.array[int(rows[0]) : int(rows[-1]) + 1])
        by_row = getattr(self.array, "oindex", self.array)  # zarr's reading of row numbers
        return np.asarray(by_row[rows])

    def _read_blocks(self, rows: Numbers) -> Array:
        assert self.starts is not None
        which = np.searchsorted(self.starts, rows, side="right") - 1
        cuts = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(rows)]
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for a, b in itertools.pairwise(cuts):
            part = self._block(int(which[a]))[rows[a:b] - self.starts[which[a]]]
            found[a:b] = part.toarray() if hasattr(part, "toarray") else part
        return found

    def _block(self, number: int) -> Any:
        assert self.starts is not None
        with self._lock:
            if number not in self._kept:
                ends = np.append(self.starts[1:], len(self))
                start, stop = int(self.starts[number]), int(ends[number])
                while len(self._kept) >= max(1, self.keep):
                    self._kept.popitem(last=False)
                block = self.array[start:stop]
                if block.shape[1:] != self.shape[1:] or block.shape[0] != stop - start:
                    raise ValueError(
                        f"expected a block of shape {(stop - start, *self.shape[1:])}, got"
                        f" {tuple(block.shape)}"
                    )
                self._kept[number] = block
            self._kept.move_to_end(number)
            return self._kept[number]

    def _checked(self, found: Array, rows: int) -> Array:
        expected = (rows, *self.shape[1:])
        if found.shape != expected or found.dtype != self.dtype:
            raise ValueError(
                f"{self}: expected {rows} rows as {self.dtype} {expected}, got {found.dtype}"
                f" {found.shape}"
            )
        return found

    def _starts(self) -> Numbers | None:
        """The first row of every block; None where rows are read alone."""
        if (given := getattr(self.array, "row_starts", None)) is not None:
            return np.asarray(given, dtype=np.int64)
        chunks = None if isinstance(self.array, np.ndarray) else getattr(self.array, "chunks", None)
        if not chunks or int(chunks[0]) <= 1:
            return None
        rows = int(chunks[0])
        rows *= max(1, BLOCK // max(1, rows * self.row_bytes))
        return np.arange(0, max(1, len(self)), rows)

    def _look(self) -> tuple[int, int] | None:
        """Size and time of the file."""
        if self.file is None:
            return None
        found = self.file.stat()
        return found.st_size, found.st_mtime_ns

    def check_unchanged(self) -> None:
        """Check that the file is the one that was opened.

        Raises:
            ValueError: it is not there any more, or its size or time differ.
        """
        try:
            now = self._look()
        except OSError as error:
            raise ValueError(f"{self}: the file is not there any more ({error.strerror})") from None
        if now is not None and now != self._stamp:
            then = self._stamp[0] if self._stamp else 0
            raise ValueError(
                f"{self}: the file was changed since it was opened: it had {then:,} bytes, and now"
                f" has {now[0]:,}" + ("" if now[0] != then else " and another time")
            )


def _place(given: Any) -> tuple[str, Path | None]:
    """What to call an array, and the file that it is in."""
    where, file = getattr(given, "where", ""), getattr(given, "file", None)
    if isinstance(given, np.memmap) and given.filename is not None:
        file = given.filename
    elif file is not None and hasattr(file, "filename"):  # of h5py
        file = file.filename
        where = f"{file}{given.name}"
    elif hasattr(given, "store_path"):  # of zarr
        where, file = str(given.store_path), None
    path = Path(os.fsdecode(file)) if isinstance(file, str | bytes | os.PathLike) else None
    if path is not None and not path.is_file():
        path = None
    return where or str(path or ""), path


def _mapped(given: Any, file: Path | None) -> Any:
    """A dataset of an HDF5 file that lies there in one piece is mapped, which is far faster."""
    offset = getattr(getattr(given, "id", None), "get_offset", None)
    if offset is None or file is None or given.chunks or given.external or given.is_virtual:
        return given
    at = offset()
    if at is None or given.file.mode != "r" or given.file.userblock_size or 0 in given.shape:
        return given
    return np.memmap(file, np.dtype(given.dtype), "r", at, given.shape)
