"""Reading values: from what a person hands over to (value, present), or an error that helps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def is_pixels(value: Tensor) -> bool:
    """Whether values are bytes that are read as ``x / 255``."""
    return value.dtype == torch.uint8 and value.dim() > 1


def pad(mask: Tensor, rank: int) -> Tensor:
    """Dimensions of size one on the right, up to a rank."""
    return mask.reshape(mask.shape + (1,) * (rank - mask.dim()))


def fill(value: Tensor, present: Tensor) -> Tensor:
    """Zeros wherever a value is not present; ``present`` covers leading dimensions of ``value``."""
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    return torch.where(pad(present, value.dim()), value, zero)


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
        known = _tensor(name, mask)
        if known.dtype != torch.bool:
            raise TypeError(f"{name!r}: the mask of (value, present) is boolean, got {known.dtype}")
    value = _tensor(name, given)
    if value.dim() == 0:
        raise ValueError(f"{name!r}: values have the rows first, got a scalar")
    if value.dtype == torch.bool:
        value = value.to(torch.get_default_dtype())
    elif not value.is_floating_point() and not is_pixels(value):
        value = value.long()
    if known is not None:
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
        _check_finite(name, value)
    _check_pixels(name, value, known)
    return value, known


def _check_pixels(name: str, value: Tensor, known: Tensor | None) -> None:
    some = known is None or bool(known.any())
    if is_pixels(value) and value.numel() and some and int(value.max()) <= 1:
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
            f"{name!r}: expected a tensor, an array, a masked array, a pair (value, present) or"
            f" None, got {type(given).__name__}"
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
