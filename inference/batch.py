"""Batches: what is known about each row, by site name.

A batch holds, for every name, a value with the data plate first and, where it is only partly known,
a boolean mask of what is present.  It is the single argument of every program and guide::

    batch = Batch.of({"x": images, "y": (labels, labels_known)})
    len(batch)            # rows
    batch["x"]            # (rows, 784)
    batch.present("y")    # (rows,) boolean

Conventions: a missing key, ``None`` and an all-false mask all mean "not observed"; a mask that is the
same for all entries of a row is a mask of rows.  Values under a mask are overwritten with zeros, so that
nobody can come to depend on them.  ``uint8`` arrays with an
event (images) are read as pixels, ``x / 255``, when they are asked for and stored as bytes until then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

Data: TypeAlias = "Batch | Mapping[str, Any]"


class Batch:
    """A read-only table of named values with one row per datum.  Make one with :meth:`Batch.of`."""

    __slots__ = ("_dtype", "_floats", "_present", "_rows", "_values")

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

    @staticmethod
    def of(data: Data | int, rows: int | None = None) -> Batch:
        """Read a dictionary of tensors, arrays, masked arrays, ``(value, present)`` pairs or ``None``.

        Args:
            data: a batch (returned as it is), a dictionary, or a number of rows without any value.
            rows: the number of rows; needed only when nothing is observed.

        Raises:
            TypeError: a value is none of the above.
            ValueError: rows disagree, a mask does not fit, or a bare value has NaN or infinite entries.
        """
        if isinstance(data, Batch):
            return data
        if isinstance(data, int) and not isinstance(data, bool):
            if data < 0:
                raise ValueError(f"a batch has at least 0 rows, got {data}")
            return Batch({}, {}, data)
        if not isinstance(data, Mapping):
            raise TypeError(
                f"expected a Batch or a dictionary of site name -> values, got {type(data).__name__}"
            )
        values: dict[str, Tensor] = {}
        present: dict[str, Tensor] = {}
        sizes: dict[str, int] = {} if rows is None else {"rows": rows}
        for name, given in data.items():
            if not isinstance(name, str):
                raise TypeError(f"site names are strings, got {name!r}")
            value, known = _canonical(name, given)
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
        """The value of a site, ``(rows, *)``, or the batch of some rows (slice, mask or indices)."""
        if isinstance(key, str):
            if key not in self._values:
                known = ", ".join(self._values) or "nothing"
                raise KeyError(f"{key!r} is not observed in this batch (observed: {known})")
            return self._value(key)
        if isinstance(key, slice):
            rows = len(range(*key.indices(self._rows)))
        else:
            key = self._index(key)
            rows = int(key.sum()) if key.dtype == torch.bool else len(key)
        return Batch(
            {name: value[key] for name, value in self._values.items()},
            {name: known[key] for name, known in self._present.items()},
            rows,
            self._dtype,
        )

    def _index(self, key: Any) -> Tensor:
        if isinstance(key, np.ndarray):
            key = torch.from_numpy(np.array(key))
        elif isinstance(key, list | tuple | range):
            key = torch.tensor(key, dtype=None if len(key) else torch.long)
        if not isinstance(key, Tensor) or key.is_floating_point() or key.dim() != 1:
            raise TypeError(
                "index a batch by a site name, a slice, a boolean mask or a vector of row numbers, not"
                f" {type(key).__name__} {key!r}"
            )
        if key.dtype == torch.bool and len(key) != self._rows:
            raise IndexError(f"a mask of {len(key)} rows does not fit a batch of {self._rows}")
        return key.to(self.device, None if key.dtype == torch.bool else torch.long)

    def _value(self, name: str) -> Tensor:
        value = self._values[name]
        if not _is_pixels(value):
            return value
        if name not in self._floats:
            self._floats[name] = value.to(self._dtype or torch.get_default_dtype()) / 255
        return self._floats[name]

    def present(self, name: str) -> Tensor:
        """Boolean, true where known: ``(rows,)``, or with entries of the event if some are missing."""
        if name in self._present:
            return self._present[name]
        return torch.full((self._rows,), name in self._values, device=self.device)

    def partly(self, name: str) -> bool:
        """Whether the site is known in some rows or entries only (a property of the whole data set)."""
        return name in self._present

    def drop(self, *names: str) -> Batch:
        """The same rows with these sites no longer observed."""
        return Batch(
            {n: v for n, v in self._values.items() if n not in names},
            {n: v for n, v in self._present.items() if n not in names},
            self._rows,
            self._dtype,
        )

    def hide(self, name: str, present: Tensor) -> Batch:
        """The same batch with a site known only where ``present`` is true as well.

        The mask, ``(rows,)`` or with entries of the event, stays one even if it is all true or false.
        """
        known, value = self.present(name), self._values[name]
        if present.dtype != torch.bool or present.shape != value.shape[: present.dim()]:
            raise ValueError(
                f"{name!r}: expected a boolean mask of shape ({self._rows},), or with entries of"
                f" {tuple(value.shape)}, got {tuple(present.shape)} {present.dtype}"
            )
        present = present.to(value.device)
        rank = max(known.dim(), present.dim())
        mask = _pad(present, rank) & _pad(known, rank)
        return Batch(
            {**self._values, name: _fill(value, mask)},
            {**self._present, name: mask},
            self._rows,
            self._dtype,
        )

    def full(self, name: str) -> Batch:
        """The same batch with a site declared known in every row (rows of one pattern)."""
        present = {n: v for n, v in self._present.items() if n != name}
        return Batch(self._values, present, self._rows, self._dtype)

    def patterns(self, names: Iterable[str]) -> list[tuple[Tensor, tuple[str, ...]]]:
        """Rows grouped by which of the names they know: a list of (row indices, known names)."""
        names = tuple(names)
        if not names:
            return [(torch.arange(self._rows, device=self.device), ())]
        known = torch.stack([self.present(n).reshape(self._rows, -1).all(1) for n in names], -1)
        code = (known * (2 ** torch.arange(len(names), device=known.device))).sum(-1)
        groups = []
        for c in torch.unique(code).tolist():
            inside = tuple(n for i, n in enumerate(names) if int(c) >> i & 1)
            groups.append(((code == c).nonzero().squeeze(-1), inside))
        return groups

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """Move to a device, or cast floating values to a precision; bytes and integers stay."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        return Batch(
            {n: move(v) for n, v in self._values.items()},
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


def _is_pixels(value: Tensor) -> bool:
    return value.dtype == torch.uint8 and value.dim() > 1


def _missing(known: Tensor) -> str:
    return f"{int((~known).sum())} of {known.numel()} missing"


def _pad(mask: Tensor, rank: int) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (rank - mask.dim()))


def _fill(value: Tensor, present: Tensor) -> Tensor:
    """Zeros wherever a value is not present; ``present`` covers leading dimensions of ``value``."""
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    return torch.where(_pad(present, value.dim()), value, zero)


def _canonical(name: str, given: Any) -> tuple[Tensor | None, Tensor | None]:
    """Turn one entry of the dictionary into (value, present); present is None where all is known."""
    known: Tensor | None = None
    if given is None:
        return None, None
    if isinstance(given, np.ma.MaskedArray):
        known = torch.from_numpy(~np.ma.getmaskarray(given))
        given = np.ma.getdata(given)
    elif isinstance(given, tuple):
        if len(given) != 2:
            raise TypeError(f"{name!r}: a tuple is (value, present), got {len(given)} parts")
        given, mask = given
        known = _tensor(name, mask)
        if known.dtype != torch.bool:
            raise TypeError(f"{name!r}: the mask of (value, present) is boolean, got {known.dtype}")
    value = _tensor(name, given)
    if value.dim() == 0:
        raise ValueError(f"{name!r}: values have the rows first, got a scalar")
    if value.dtype == torch.bool:
        value = value.to(torch.get_default_dtype())
    elif not value.is_floating_point() and not _is_pixels(value):
        value = value.long()
    if known is not None:
        known = known.to(value.device)
        if known.dim() == 0 or known.shape != value.shape[: known.dim()]:
            raise ValueError(
                f"{name!r}: the mask has shape {tuple(known.shape)}, but the values {tuple(value.shape)};"
                " it needs one entry per row or per entry"
            )
        flat = known.reshape(len(known), -1) if known.numel() else known
        if known.numel() and bool((flat == flat[:, :1]).all()):
            known = flat[:, 0]  # whole rows are missing
        value = _fill(value, known)
    if value.is_floating_point():
        _check_finite(name, value)
    _check_pixels(name, value, known)
    return value, known


def _check_pixels(name: str, value: Tensor, known: Tensor | None) -> None:
    some = known is None or bool(known.any())
    if _is_pixels(value) and value.numel() and some and int(value.max()) <= 1:
        raise ValueError(
            f"{name!r}: uint8 arrays are read as pixels 0..255, but the largest value is"
            f" {int(value.max())}; pass booleans for yes/no, or floats that are used as they are"
        )


def _check_finite(name: str, value: Tensor) -> None:
    bad = ~torch.isfinite(value)
    count = int(bad.sum())
    if not count:
        return
    nan = int(torch.isnan(value).sum())
    kind = "NaN" if nan == count else "NaN or infinite" if nan else "infinite"
    rows = int(bad.reshape(len(value), -1).any(1).sum())
    raise ValueError(
        f"{name!r}: {count} {kind} entries in {rows} of {len(value)} rows; say what is missing"
        " with a pair (value, present) or a numpy masked array"
    )


def _tensor(name: str, given: Any) -> Tensor:
    if isinstance(given, Tensor):
        if given.is_complex():
            raise TypeError(f"{name!r}: complex values cannot be observed")
        return given.detach()
    if not isinstance(given, np.ndarray):
        raise TypeError(
            f"{name!r}: expected a tensor, an array, a masked array, a pair (value, present) or None,"
            f" got {type(given).__name__}"
        )
    if given.dtype.kind not in "biuf":
        raise TypeError(f"{name!r}: cannot read an array of type {given.dtype}")
    if given.dtype.kind == "u" and given.dtype.itemsize > 1:
        given = given.astype(np.int64)
    elif given.dtype.kind == "f" and given.dtype.itemsize > 8:
        given = given.astype(np.float64)
    odd = any(s < 0 or s % given.dtype.itemsize for s in given.strides)
    if odd or not given.dtype.isnative or not given.flags.writeable:  # torch refuses, or warns
        given = np.array(given, dtype=given.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(given)


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
