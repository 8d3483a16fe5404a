"""One site of rows on disk: its values, and where they are known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pyrozoo.inference.disk.arrays import Numbers, Source
from pyrozoo.inference.reading import check_finite, check_pixels, convert, fill, is_pixels

PIECE = 2**24  # bytes that are read at a time where all rows are looked at


@contextlib.contextmanager
def _named(source: Source) -> Iterator[None]:
    """Errors with the file that they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not source.where or source.where in str(error):
            raise
        raise type(error)(f"{source.where}: {error}") from error


class StoredSite:
    """Values of a site and where they are known; all rows of the files."""

    def __init__(self, value: Source) -> None:
        self.value = value
        self.known: Tensor | None = None  # by row
        self.entries: Source | None = None  # by entry
        self.some = torch.ones(len(value), dtype=torch.bool)  # rows that know anything
        self.missing = torch.zeros(0, dtype=torch.int32)  # entries by row

    def read(self, rows: Numbers | slice) -> tuple[Tensor, Tensor | None]:
        """Values and presence (None: all known), checked and as a batch has them."""
        source, known = self.value, None
        with _named(source):
            value = convert(source.name, source.read(rows))
            if self.known is not None:
                known = self.known[rows if isinstance(rows, slice) else torch.from_numpy(rows)]
            elif self.entries is not None:
                known = torch.from_numpy(self.entries.read(rows))
            value = value if known is None else fill(value, known)
            if value.is_floating_point():
                check_finite(source.name, value)
        return value, known

    def read_mask(self, mask: Source) -> None:
        """Look through a mask once: it may be of rows, all true or all false."""
        value = self.value
        fits = mask.shape == value.shape[: len(mask.shape)]
        if mask.dtype != np.bool_ or not fits:
            raise ValueError(
                f"{value}: the mask of what is present is expected to be boolean"
                f" {value.shape[:1]} or {value.shape}, got {mask.dtype} {mask.shape}"
                + (f" in {mask}" if mask.where else "")
            )
        step, by_row = max(1, PIECE // max(1, mask.row_bytes)), True
        size = int(np.prod(mask.shape[1:], dtype=np.int64))
        self.missing = torch.zeros(len(mask), dtype=torch.int32)
        for first in range(0, len(mask), step):
            rows = slice(first, min(first + step, len(mask)))
            count = torch.from_numpy(mask.read(rows)).reshape(rows.stop - first, -1).sum(1)
            by_row = by_row and bool(((count == 0) | (count == size)).all())
            self.some[rows] = count > 0
            self.missing[rows] = (size - count).int()
        if by_row:
            self.known = None if bool(self.some.all()) else self.some
        else:
            self.entries = mask

    def check_bytes(self) -> None:
        """Bytes are pixels, unless they are 0 or 1 in all rows."""
        source = self.value
        if source.dtype != np.uint8 or len(source.shape) < 2 or not len(source):
            return
        largest, step = 0, 64
        first = 0
        while first < len(source) and largest <= 1:
            rows = slice(first, min(first + step, len(source)))
            value, _ = self.read(rows)
            assert is_pixels(value)
            largest = max(largest, int(value.max()) if value.numel() else 2)
            first, step = rows.stop, min(2 * step, max(64, PIECE // max(1, source.row_bytes)))
        if largest <= 1:
            with _named(source):
                check_pixels(source.name, torch.full((1, 1), largest, dtype=torch.uint8), None)
