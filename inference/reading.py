"""Reading values: from what a person hands over to (value, present), or an error that helps."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TYPES = (
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip


def is_pixels(value: Tensor) -> bool:
    """Whether values are bytes that are read as ``x / 255``."""
    return value.dtype == torch.uint8 and value.dim() > 1


def kind_of(given: Any) -> str:
    """Shape and type of a tensor, or the type of something else, for a message."""
    if isinstance(given, Tensor):
        return f"{tuple(given.shape)} {given.dtype}"
    return type(given).__name__


def pad(mask: Tensor, rank: int) -> Tensor:
    """Dimensions of size one on the right, up to a rank."""
    return mask.reshape(mask.shape + (1,) * (rank - mask.dim()))


def fill(value: Tensor, present: Tensor) -> Tensor:
    """Zeros wherever a value is not present; ``present`` covers leading dimensions of ``value``."""
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    return torch.where(pad(present, value.dim()), value, zero)


def read_count(what: str, value: Any, least: int = 1) -> int:
    """A whole number that says how many.

    Raises:
        TypeError: it is no integer.
        ValueError: it is less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{what} is a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{what} is at least {least}, got {value}")
    return int(value)


def read_index(key: Any, rows: int) -> Tensor:
    """A boolean mask over rows, or a vector of row numbers, as a tensor.

    Raises:
        TypeError: it is neither.
        IndexError: it does not fit the number of rows.
    """
    found = key
    if isinstance(key, list | tuple | range):
        with contextlib.suppress(ValueError):  # rows of several lengths
            found = np.array(key, dtype=None if len(key) else np.int64)
    if isinstance(found, np.ndarray) and found.dtype.kind in "biu" and found.ndim == 1:
        found = torch.from_numpy(found.astype(bool if found.dtype.kind == "b" else np.int64))
    numbers = isinstance(found, Tensor) and not (found.is_floating_point() or found.is_complex())
    if not numbers or found.dim() != 1:
        raise TypeError(
            "index a batch by a site name, a slice, a boolean mask or a vector of row numbers, not"
            f" {type(key).__name__} {key!r}"
        )
    if found.dtype == torch.bool:
        if len(found) != rows:
            raise IndexError(f"a mask of {len(found)} rows does not fit a batch of {rows}")
        return found
    found = found.long()
    if found.device.type == "cpu" and len(found):
        low, high = int(found.min()), int(found.max())
        if low < -rows or high >= rows:
            raise IndexError(f"a batch of {rows} rows has no row {low if low < -rows else high}")
    return found


def narrow(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating value in another precision; integers and bytes stay.

    Raises:
        ValueError: a finite value becomes infinite.
    """
    if dtype is None or not value.is_floating_point() or value.dtype == dtype:
        return value
    cast = value.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(value.dtype).max
    if narrower and (large := int((torch.isinf(cast) & torch.isfinite(value)).sum())):
        raise ValueError(
            f"{name!r}: {large} entries are too large for {dtype} (the largest is"
            f" {float(value.abs().max()):g}); change the unit"
        )
    return cast


def canonical(name: str, given: Any) -> tuple[Tensor | None, Tensor | None]:
    """Turn one entry of the dictionary into (value, present); present is None if all is known."""
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
        if any(isinstance(part, np.ma.MaskedArray) for part in (given, mask)):
            raise TypeError(f"{name!r}: a masked array brings its own mask; pass it alone")
        known = _tensor(name, mask)
    value = convert(name, given)
    if known is not None:
        if known.dtype != torch.bool:
            raise TypeError(f"{name!r}: the mask of (value, present) is boolean, got {known.dtype}")
        known = known.to(value.device)
        if known.dim() == 0 or known.shape != value.shape[: known.dim()]:
            raise ValueError(
                f"{name!r}: the mask has shape {tuple(known.shape)}, but the values"
                f" {tuple(value.shape)}; it needs one entry per row or per entry"
            )
        flat = known.reshape(len(known), -1) if known.numel() else known
        if known.numel() and bool((flat == flat[:, :1]).all()):
            known = flat[:, 0]  # whole rows are missing
        value = fill(value, known)
    if value.is_floating_point():
        check_finite(name, value)
    check_pixels(name, value, known)
    return value, known


def convert(name: str, given: Any) -> Tensor:
    """A tensor or array as a batch stores it: floats and pixels as they are, integers as int64.

    Raises:
        TypeError: it is neither.
        ValueError: it is a single number.
    """
    value = _tensor(name, given)
    if value.dim() == 0:
        raise ValueError(f"{name!r}: values have the rows first, got a scalar")
    if value.dtype == torch.bool:
        return value.to(torch.get_default_dtype())
    return value if value.is_floating_point() or is_pixels(value) else value.long()


def check_pixels(name: str, value: Tensor, known: Tensor | None) -> None:
    """Refuse bytes that are 0 or 1 only."""
    some = known is None or bool(known.any())
    if is_pixels(value) and value.numel() and some and int(value.max()) <= 1:
        raise ValueError(
            f"{name!r}: uint8 arrays are read as pixels 0..255, but the largest value is"
            f" {int(value.max())}; pass booleans for yes/no, or floats that are used as they are"
        )


def check_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinite entries."""
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
        if given.dtype not in _TYPES or given.layout != torch.strided or given.is_meta:
            kind = "meta" if given.is_meta else given.layout
            raise TypeError(
                f"{name!r}: expected a dense tensor of numbers or booleans, got {given.dtype}"
                f" ({kind})"
            )
        if given.dtype == torch.uint64:
            _check_unsigned(name, given.numpy(force=True))
        return given.detach()
    if not isinstance(given, np.ndarray):
        raise TypeError(
            f"{name!r}: expected a tensor, an array, a masked array, a pair (value, present) or"
            f" None, got {type(given).__name__}"
        )
    if given.dtype.kind not in "biuf":
        raise TypeError(f"{name!r}: cannot read an array of type {given.dtype}")
    if given.dtype.kind == "u" and given.dtype.itemsize > 1:
        _check_unsigned(name, given)
        given = given.astype(np.int64)
    elif given.dtype.kind == "f" and given.dtype.itemsize > 8:
        given = given.astype(np.float64)
    odd = any(s < 0 or s % given.dtype.itemsize for s in given.strides)
    if odd or not given.dtype.isnative or not given.flags.writeable:  # torch refuses, or warns
        given = np.array(given, dtype=given.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(given)


def _check_unsigned(name: str, given: np.ndarray[Any, Any]) -> None:
    if given.size and int(given.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name!r}: integers beyond 2**63 - 1 cannot be read, got {given.max()}")
