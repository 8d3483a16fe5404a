"""Rows that stay on disk: a batch of which only what is asked for is read.

::

    rows = Stored({"x": np.load("images.npy", mmap_mode="r"), "y": (labels, known)})
    rows[:256]                 # a Batch, read now
    rows.select(numbers)       # some of the rows, nothing is read
    fit(program, guide, rows)  # reads ahead while it computes

The rows are what :meth:`Batch.of` would make of the same arrays in memory, bit for bit: bytes stay
bytes, integers become int64, floats get the precision of the parameters when they are read.  What
can be said of all rows only is found out once, when the object is made: a mask, where there is one,
is read in pieces (and kept in memory if it is by rows), and bytes until one of them is above one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from pyrozoo.inference.batch import Batch, Data, Extent
from pyrozoo.inference.disk.arrays import Numbers, Source
from pyrozoo.inference.disk.site import PIECE, StoredSite
from pyrozoo.inference.reading import read_count, read_index

WINDOW = 2**27  # bytes of the blocks that are shuffled together
LARGE = 2**30  # bytes of blocks in memory that are worth a warning


class Stored(Batch):
    """Rows on disk.

    Args:
        data: site -> array, or ``(array, present)`` with booleans by row or by entry, or None.  An
            array is whatever has ``shape``, ``dtype`` and numpy-style reading of slices and sorted
            row numbers, rows first: ``np.memmap``, ``h5py.Dataset``, ``zarr.Array``, one in memory,
            or a reader of your own, see :mod:`.arrays`.
        shuffle: how :func:`.fit` mixes the rows. ``"rows"``: every order is as likely, as in
            memory. ``"blocks"``: for what is read in blocks only, see :func:`.rows.block_order`.
            ``"auto"``: blocks where some array is read in blocks that are not all kept in memory.
        window: bytes of the blocks that are mixed together; twice as many are kept.

    Raises:
        TypeError: a value is no array of numbers or booleans.
        ValueError: rows disagree, a mask does not fit, or bytes are 0 or 1 only.
    """

    def __init__(
        self, data: Mapping[str, Any], *, shuffle: str = "auto", window: int = WINDOW
    ) -> None:
        if not isinstance(data, Mapping):
            raise TypeError(f"expected a dictionary of site -> array, got {type(data).__name__}")
        if shuffle not in ("auto", "rows", "blocks"):
            raise ValueError(f"shuffle is 'auto', 'rows' or 'blocks', got {shuffle!r}")
        window = read_count("window", window)
        sites, sizes = {}, {}
        for name, given in data.items():
            if given is None:
                continue
            if not isinstance(name, str):
                raise TypeError(f"site names are strings, got {name!r}")
            values, mask = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
            sites[name] = StoredSite(Source(name, values))
            sizes[str(sites[name].value)] = len(sites[name].value)
            if mask is not None:
                sites[name].read_mask(Source(name, mask))
        if not sites:
            raise ValueError("nothing is observed: give one array or more")
        if len(set(sizes.values())) > 1:
            found = "; ".join(f"{name}: {size:,}" for name, size in sizes.items())
            raise ValueError(f"all arrays need the same number of rows, got {found}")
        super().__init__({}, {}, next(iter(sizes.values())))
        self._sites = {name: site for name, site in sites.items() if bool(site.some.any())}
        self._rows_of: Tensor | None = None  # numbers of the rows in the files; None: all
        self._to: torch.device | None = None
        for site in self._sites.values():
            site.check_bytes()
        starts = [s for s in self._sources() if s.starts is not None]
        self.starts = max(starts, key=lambda s: s.block_bytes).starts if starts else None
        if shuffle == "blocks" and self.starts is None:
            raise ValueError("shuffle='blocks': none of the arrays is read in blocks")
        count = 1 if self.starts is None else len(self.starts)
        size = sum(max(1, s.block_bytes) for s in starts) or 1
        self.window = min(count, max(1, window // size))  # blocks
        self.by_blocks = shuffle == "blocks" or (shuffle == "auto" and count > 2 * self.window)
        for source in starts:
            source.keep = 2 * self.window
        if 2 * self.window * size > LARGE:
            warnings.warn(
                f"{starts[0]}: blocks of {size / 2**20:,.0f} MiB, of which two are kept in memory;"
                " write the file in smaller chunks or row groups",
                stacklevel=2,
            )

    def _sources(self) -> Iterator[Source]:
        for site in self._sites.values():
            yield site.value
            if site.entries is not None:
                yield site.entries

    # ---- reading ---------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Any:
        """Some rows as a :class:`Batch`, read now: a slice, a mask, or numbers in any order."""
        if isinstance(key, str):
            self.refuse(f"{key!r}")
        return self.read(key).to(self._to)

    def read(self, key: Any) -> Batch:
        """As ``rows[key]``, on the CPU."""
        rows = self._numbers(key)
        values: dict[str, Tensor] = {}
        present: dict[str, Tensor] = {}
        for name, site in self._sites.items():
            values[name], known = site.read(rows)
            if known is not None:
                present[name] = known
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        return Batch(values, present, count).to(dtype=self._dtype)

    def select(self, key: Any) -> Stored:
        """Some of the rows, in this order, without reading them."""
        rows = self._numbers(key)
        numbers = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        return self._with(_rows=len(numbers), _rows_of=torch.as_tensor(numbers))

    def in_order(self) -> Stored:
        """The same rows in the order in which they lie on disk."""
        if self._rows_of is None:
            return self
        return self._with(_rows_of=self._rows_of.sort().values)

    def pieces(self, most: int = 4096) -> Iterator[Batch]:
        """All rows in order, so many at a time or fewer if they are large."""
        size = sum(s.row_bytes for s in self._sources()) or 1
        step = max(1, min(most, PIECE // size))
        for first in range(0, len(self), step):
            yield self[first : first + step]

    def blocks_of(self, rows: Tensor) -> Tensor:
        """The block that each of some rows is in."""
        if self.starts is None:
            return torch.zeros_like(rows)
        numbers = rows if self._rows_of is None else self._rows_of[rows]
        return torch.searchsorted(torch.from_numpy(self.starts), numbers, right=True) - 1

    def _numbers(self, key: Any) -> Numbers | slice:
        """Rows of the files."""
        if isinstance(key, slice):
            start, stop, step = key.indices(self._rows)
            if self._rows_of is None and step == 1:
                return slice(start, max(start, stop))
            found = torch.from_numpy(np.arange(start, stop, step))
        else:
            found = read_index(key, self._rows).cpu()
            found = found.nonzero().squeeze(-1) if found.dtype == torch.bool else found
            found = torch.where(found < 0, found + self._rows, found)
        return (found if self._rows_of is None else self._rows_of[found]).numpy()

    def _with(self, **changes: Any) -> Self:
        new = copy.copy(self)
        for name, value in changes.items():
            setattr(new, name, value)
        return new

    def refuse(self, what: str) -> NoReturn:
        """Raise a TypeError: something needs the values."""
        raise TypeError(
            f"{what} needs values of {self._rows:,} rows that are on disk: read some of them first,"
            " as in rows[:1000], or hand the rows to fit, evaluate, predict or responsibilities"
        )

    # ---- what a batch says without its values ----------------------------------------------------

    def __contains__(self, name: object) -> bool:
        return name in self._sites

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are known in some row."""
        return tuple(self._sites)

    @property
    def device(self) -> torch.device:
        """Where what is read goes."""
        return self._to or torch.device("cpu")

    def partly(self, name: str) -> bool:
        """Whether the site is known in part (in all the files, not only in these rows)."""
        return self.mask_dims(name) > 0

    def mask_dims(self, name: str) -> int:
        """Dimensions of the mask of a site that is known in part, 0 for any other."""
        site = self._sites.get(name)
        if site is None or (site.known is None and site.entries is None):
            return 0
        return 1 if site.entries is None else len(site.entries.shape)

    def present(self, name: str) -> Tensor:
        """Boolean ``(rows,)``, true where known.

        Raises:
            TypeError: single entries are missing: ask for some rows.
        """
        if self.mask_dims(name) > 1:
            self.refuse(f"what is known of {name!r}")
        return self.extent(name).rows

    def extent(self, name: str) -> Extent:
        """How much of a site is known."""
        rows = slice(None) if self._rows_of is None else self._rows_of
        if name not in self._sites:
            some = torch.zeros(self._rows, dtype=torch.bool)
            return Extent(some, self._rows, self._rows, self._rows, False)
        site = self._sites[name]
        some = site.some[rows]
        if site.entries is None:
            lacking = self._rows - int(some.sum())
            return Extent(some, lacking, lacking, self._rows, False)
        missing = site.missing[rows]
        total = self._rows * int(np.prod(site.entries.shape[1:]))
        return Extent(some, int((missing > 0).sum()), int(missing.sum()), total, True)

    def shape(self, name: str) -> torch.Size:
        """Shape of the value of a site, rows first, without reading it."""
        if name not in self._sites:
            self.stored(name)
        return torch.Size((self._rows, *self._sites[name].value.shape[1:]))

    def stored(self, name: str) -> Tensor:
        """Refused: the values are on disk."""
        if name not in self._sites:
            known = ", ".join(self._sites) or "nothing"
            raise KeyError(f"{name!r} is not observed in these rows (observed: {known})")
        self.refuse(f"{name!r}")

    def drop(self, *names: str) -> Stored:
        """The same rows with these sites no longer observed."""
        return self._with(_sites={n: s for n, s in self._sites.items() if n not in names})

    def add(self, data: Data) -> Stored:
        """The same rows with more sites, read from memory as by :meth:`Batch.of`: labels, say.

        Raises:
            ValueError: numbers of rows differ; or a row was selected twice.
        """
        more = Batch.of(data, self._rows)
        rows = torch.arange(self._rows) if self._rows_of is None else self._rows_of
        if len(rows.unique()) < len(rows):
            raise ValueError("sites cannot be added to rows that were selected more than once")
        total = max((len(s) for s in self._sources()), default=self._rows)
        sites = dict(self._sites)
        for name in more.names:
            whole = torch.zeros(total, *more.shape(name)[1:], dtype=more.stored(name).dtype)
            whole[rows] = more.stored(name)
            sites[name] = StoredSite(Source(name, whole))
            if more.partly(name):
                known = more.present(name)
                mask = torch.ones(total, *known.shape[1:], dtype=torch.bool)
                mask[rows] = known
                sites[name].read_mask(Source(name, mask))
        return self._with(_sites=sites)

    def full(self, name: str) -> Batch:
        """Refused, as whatever else makes new values."""
        self.refuse(f"{name!r}")

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Stored:
        """The same rows, brought to a device, or to a precision, when they are read."""
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"floating values are cast to a floating type, got {dtype}")
        to = self._to if device is None else torch.device(device)
        return self._with(_to=to, _dtype=dtype or self._dtype)

    def __repr__(self) -> str:
        parts = [
            f"{name}: {tuple(self.shape(name))} {site.value.dtype}"
            + (f" in {site.value.where}" if site.value.where else "")
            for name, site in self._sites.items()
        ]
        return f"Stored({self._rows} rows; {'; '.join(parts)})"
