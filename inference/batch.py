"""Batches: what is known about each row, by site name.

A batch holds, for every name, a value with the data plate first and, where it is only partly known,
a boolean mask of what is present.  It is the single argument of every program and guide::

    batch = Batch.of({"x": images, "y": (labels, labels_known)})
    len(batch)            # rows
    batch["x"]            # (rows, 784)
    batch.present("y")    # (rows,) boolean

Conventions: a missing key, ``None`` and an all-false mask all mean "not observed"; a mask of
entries that is constant in every row is a mask of rows.  Values under a mask are overwritten with
zeros, so that nobody can come to depend on them.  ``uint8`` arrays with an event (images) are read
as pixels, ``x / 255``, when they are asked for and stored as bytes until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from pyrozoo.inference.reading import (
    canonical,
    fill,
    is_pixels,
    kind_of,
    narrow,
    pad,
    read_count,
    read_index,
)

Data: TypeAlias = "Batch | Mapping[str, Any]"
T = TypeVar("T")


class Extent(NamedTuple):
    """How much of a site is known in some rows."""

    rows: Tensor  # (rows,) boolean: where anything is known
    lacking: int  # rows in which anything is missing
    missing: int  # entries, or rows, that are missing
    total: int
    by_entry: bool


class Batch:
    """A read-only table of named values with one row per datum.  Make one with :meth:`Batch.of`."""

    __slots__ = ("_dtype", "_floats", "_present", "_rows", "_shared", "_values")

    def __init__(
        self,
        values: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        rows: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._values = dict(values)
        self._present = dict(present)
        self._rows = rows
        self._dtype = dtype
        self._floats: dict[str, Tensor] = {}
        self._shared: dict[Any, Any] | None = None

    @staticmethod
    def of(data: Data | int, rows: int | None = None) -> Batch:
        """Read a dictionary of tensors, (masked) arrays, ``(value, present)`` pairs or ``None``.

        Args:
            data: a batch (returned as it is), a dictionary, or a number of rows without any value.
            rows: the number of rows; needed only when nothing is observed.

        Raises:
            TypeError: a value is none of the above.
            ValueError: rows disagree, a mask does not fit, or a value has NaN or infinite entries.
        """
        rows = None if rows is None else read_count("rows", rows, 0)
        if isinstance(data, int | np.integer) and not isinstance(data, bool):
            if data < 0:
                raise ValueError(f"a batch has at least 0 rows, got {data}")
            data = Batch({}, {}, int(data))
        if isinstance(data, Batch):
            if rows not in (None, len(data)):
                raise ValueError(f"the batch has {len(data)} rows, not rows={rows}")
            return data
        if not isinstance(data, Mapping):
            raise TypeError(
                "expected a Batch or a dictionary of site name -> values, got"
                f" {type(data).__name__}"
            )
        values: dict[str, Tensor] = {}
        present: dict[str, Tensor] = {}
        sizes: dict[str, int] = {} if rows is None else {"rows": rows}
        for name, given in data.items():
            if not isinstance(name, str):
                raise TypeError(f"site names are strings, got {name!r}")
            value, known = canonical(name, given)
            if value is None:
                continue
            sizes[name] = len(value)
            if known is not None and not bool(known.any()):
                continue
            values[name] = value
            if known is not None and not bool(known.all()):
                present[name] = known
        if not sizes:
            raise ValueError("nothing is observed: say how many rows with Batch.of(data, rows=...)")
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name}: {size}" for name, size in sizes.items())
            raise ValueError(f"all values need the same number of rows, got {found}")
        return Batch(values, present, next(iter(sizes.values())))

    def __len__(self) -> int:
        return self._rows

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        raise TypeError("a batch is a table of rows; iterate over batch.names or slice batch[a:b]")

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are known in some row."""
        return tuple(self._values)

    @property
    def device(self) -> torch.device:
        """Where the values are (the CPU when there are none)."""
        return next((v.device for v in self._values.values()), torch.device("cpu"))

    @overload
    def __getitem__(self, key: str) -> Tensor: ...
    @overload
    def __getitem__(self, key: slice | Sequence[int] | Tensor | np.ndarray[Any, Any]) -> Batch: ...
    def __getitem__(self, key: Any) -> Any:
        """The value of a site, ``(rows, *)``, or a batch of some rows (slice, mask or indices)."""
        if isinstance(key, str):
            return self._value(key)
        if isinstance(key, slice):
            rows = len(range(*key.indices(self._rows)))
        else:
            key = read_index(key, self._rows).to(self.device)
            rows = int(key.sum()) if key.dtype == torch.bool else len(key)
        return Batch(
            {name: value[key] for name, value in self._values.items()},
            {name: known[key] for name, known in self._present.items()},
            rows,
            self._dtype,
        )

    def _value(self, name: str) -> Tensor:
        value = self.stored(name)
        if not is_pixels(value):
            return value
        if name not in self._floats:
            self._floats[name] = value.to(self._dtype or torch.get_default_dtype()) / 255
        return self._floats[name]

    def present(self, name: str) -> Tensor:
        """Boolean, true where known: ``(rows,)``, or with entries of the event if some miss."""
        if name in self._present:
            return self._present[name]
        return torch.full((self._rows,), name in self._values, device=self.device)

    def partly(self, name: str) -> bool:
        """Whether the site is known in part (a property of the data set, kept by its parts)."""
        return name in self._present

    def mask_dims(self, name: str) -> int:
        """Dimensions of the mask of a site that is known in part, 0 for any other."""
        return self._present[name].dim() if name in self._present else 0

    def extent(self, name: str) -> Extent:
        """How much of a site is known."""
        present = self.present(name)
        by_row, lacking = present, ~present
        if present.dim() > 1:
            by_row, lacking = present.flatten(1).any(1), lacking.flatten(1).any(1)
        missing = present.numel() - int(present.sum())
        return Extent(by_row, int(lacking.sum()), missing, present.numel(), present.dim() > 1)

    def shape(self, name: str) -> torch.Size:
        """Shape of the value of a site, rows first, without reading it."""
        return self.stored(name).shape

    def stored(self, name: str) -> Tensor:
        """The value of a site as it is stored: bytes stay bytes."""
        if name not in self._values:
            known = ", ".join(self._values) or "nothing"
            raise KeyError(f"{name!r} is not observed in this batch (observed: {known})")
        return self._values[name]

    def drop(self, *names: str) -> Batch:
        """The same rows with these sites no longer observed."""
        batch = Batch(
            {n: v for n, v in self._values.items() if n not in names},
            {n: v for n, v in self._present.items() if n not in names},
            self._rows,
            self._dtype,
        )
        batch._shared = self._shared
        return batch

    def add(self, data: Data) -> Batch:
        """The same rows with more sites, or other values of them, read as by :meth:`of`.

        Raises:
            ValueError: numbers of rows differ.
        """
        more = Batch.of(data, self._rows)
        rest = self.drop(*more.names)
        return Batch(
            {**rest._values, **more._values},
            {**rest._present, **more._present},
            self._rows,
            self._dtype,
        )

    def sharing(self) -> Batch:
        """The same batch; what is computed by :meth:`once` is kept for it and what it drops."""
        batch = Batch(self._values, self._present, self._rows, self._dtype)
        batch._shared = {}
        return batch

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """What ``compute`` gives; with :meth:`sharing` it is called once for a key.

        What it gives may depend on the values of one site, which is part of the key, alone.
        """
        if self._shared is None:
            return compute()
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def hide(self, name: str, present: Tensor) -> Batch:
        """The same batch with a site known only where ``present`` is true as well.

        The mask, ``(rows,)`` or with entries of the event, stays even if it is all true or false.
        """
        known, value = self.present(name), self.stored(name)
        tensor = isinstance(present, Tensor) and present.dtype == torch.bool and present.dim() > 0
        if not tensor or present.shape != value.shape[: present.dim()]:
            raise ValueError(
                f"{name!r}: expected a boolean mask of shape ({self._rows},), or with entries of"
                f" {tuple(value.shape)}, got {kind_of(present)}"
            )
        present = present.to(value.device)
        rank = max(known.dim(), present.dim())
        mask = pad(present, rank) & pad(known, rank)
        return Batch(
            {**self._values, name: fill(value, mask)},
            {**self._present, name: mask},
            self._rows,
            self._dtype,
        )

    def replace(self, name: str, value: Tensor) -> Batch:
        """The same batch with another value of a site, known where the old one was."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name!r}: expected a tensor, got {kind_of(value)}")
        if value.shape != self[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(self[name].shape)}, its new value {tuple(value.shape)}"
            )
        if name in self._present:
            value = fill(value, self._present[name])
        return Batch({**self._values, name: value}, self._present, self._rows, self._dtype)

    def full(self, name: str) -> Batch:
        """The same batch with a site declared known in every row (rows of one pattern)."""
        present = {n: v for n, v in self._present.items() if n != name}
        return Batch(self._values, present, self._rows, self._dtype)

    def patterns(self, names: Iterable[str]) -> list[tuple[Tensor, tuple[str, ...]]]:
        """Rows grouped by which of the names they know: a list of (row indices, known names)."""
        names = tuple(names)
        if not names:
            return [(torch.arange(self._rows, device=self.device), ())]
        if len(names) > 62:
            raise ValueError(f"patterns of at most 62 names can be told apart, got {len(names)}")
        known = torch.stack([_whole(self.present(n)) for n in names], -1)
        code = (known * (2 ** torch.arange(len(names), device=known.device))).sum(-1)
        groups = []
        for c in torch.unique(code).tolist():
            inside = tuple(n for i, n in enumerate(names) if int(c) >> i & 1)
            groups.append(((code == c).nonzero().squeeze(-1), inside))
        return groups

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Batch:
        """Move to a device, or cast floating values to a precision; bytes and integers stay.

        Raises:
            ValueError: the type is no floating one, or a value is too large for it.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"floating values are cast to a floating type, got {dtype}")
        return Batch(
            {n: narrow(n, v, dtype).to(device) for n, v in self._values.items()},
            {n: v.to(device) for n, v in self._present.items()},
            self._rows,
            dtype or self._dtype,
        )

    def __repr__(self) -> str:
        parts = [
            f"{name}: {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            + (f", {_missing(self._present[name])}" if name in self._present else "")
            for name, value in self._values.items()
        ]
        return f"Batch({self._rows} rows; {'; '.join(parts) or 'nothing observed'})"


def _whole(known: Tensor) -> Tensor:
    """Rows that are known entirely."""
    return known.flatten(1).all(1) if known.dim() > 1 else known


def _missing(known: Tensor) -> str:
    return f"{int((~known).sum())} of {known.numel()} missing"


_pytree.register_pytree_node(
    Batch,
    lambda b: (
        [*b._values.values(), *b._present.values()],
        (tuple(b._values), tuple(b._present), b._rows, b._dtype),
    ),
    lambda leaves, spec: Batch(
        dict(zip(spec[0], leaves, strict=False)),
        dict(zip(spec[1], list(leaves)[len(spec[0]) :], strict=False)),
        spec[2],
        spec[3],
    ),
)
