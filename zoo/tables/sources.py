"""Sources: a file, a data frame or a dictionary of arrays, brought into one form.

Arrays, as in an ``.npz`` file, are named by their sites: ``x`` or ``x_<view>`` with the rows first,
``y`` with whole numbers, -1 where unlabelled, and ``<site>_present``, booleans by row or by entry.

- ``uint8`` arrays (N, D), (N, H, W) or (N, C, H, W) are pixels from 0 to 255.
- Other numbers and booleans (N, D) are D columns, called ``x[0]``, ``x[1]`` ..; NaN is missing.

Arrays that are asked for by name have any name and any shape (N, *), and are read as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyrozoo.zoo.tables.cells import library, read_cells, repeated, some
from pyrozoo.zoo.tables.schema import SITE_NAME

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]
MASK = "_present"


@dataclass(frozen=True, eq=False)
class Source:
    """N rows, read and checked but not yet understood.

    Attributes:
        frame: the columns.
        where: what it was read from, for messages.
        extra: columns that are used if they are asked for by name (``obs`` of an ``.h5ad`` file).
        views: site -> columns, where the source itself says so (arrays).
        pixels: site -> images, (N, *shape) uint8, and which rows or entries are known.
        named: arrays that were asked for by name, (N, *), and which rows or entries are known.
        counts: whether all of ``frame`` is one matrix of counts.
    """

    frame: pd.DataFrame
    where: str = "the data frame"
    extra: pd.DataFrame | None = None
    views: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pixels: Mapping[str, tuple[Array, Array | None]] = field(default_factory=dict)
    named: Mapping[str, tuple[Array, Array | None]] = field(default_factory=dict)
    counts: bool = False

    def __post_init__(self) -> None:
        frames = [self.frame] if self.extra is None else [self.frame, self.extra]
        names = [name for frame in frames for name in frame.columns]
        if wrong := [name for name in names if not isinstance(name, str) or not name]:
            raise ValueError(
                f"{self.where}: names of columns are text, got {some(wrong, 5)}; rename them with"
                " frame.columns = frame.columns.astype(str)"
            )
        if twice := repeated(names):
            raise ValueError(f"{self.where}: two columns are called {some(twice)}")

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def arrays(self) -> bool:
        """Whether it came as arrays by site."""
        return bool(self.views or self.pixels or self.named)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, and the arrays that were asked for by name."""
        extra = () if self.extra is None else self.extra.columns
        return (*self.frame.columns, *extra, *self.named)

    def has(self, name: str) -> bool:
        """Whether there is such a column."""
        return name in self.frame.columns or (self.extra is not None and name in self.extra.columns)

    def column(self, name: str) -> pd.Series[Any]:
        """A column by its name, (N,)."""
        if name in self.frame.columns or self.extra is None:
            return self.frame[name]
        return self.extra[name]

    def value(self, name: str) -> tuple[Array, NDArray[np.bool_]]:
        """A column (N,), or a named array (N, *), as it is, and what is known of it.

        Whole numbers and booleans are int64, other numbers float32; images stay bytes.

        Raises:
            ValueError: a column holds no numbers.
        """
        if name in self.named:
            value, mask = self.named[name]
            known = np.ones(value.shape, dtype=bool)
            if mask is not None:
                known &= mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
            if value.dtype.kind == "f":
                known &= ~np.isnan(value)
                return np.where(known, value, 0).astype(np.float32), known
            pixels = value.dtype == np.uint8 and value.ndim > 1
            return value if pixels else value.astype(np.int64), known
        cells = read_cells(name, self.column(name))
        if cells.type == "text":
            raise ValueError(
                f"column {name!r} holds text, such as {some(cells.distinct, 2)}, and the program"
                " takes numbers: number its levels from 0, or, if these are labels for the site y,"
                " name it as the label"
            )
        if cells.type == "bool":
            return cells.codes((False, True)).clip(0), cells.known
        whole = all(isinstance(v, int) for v in cells.distinct)
        numbers = np.where(cells.known, cells.numbers, 0)
        return numbers.astype(np.int64 if whole else np.float32), cells.known

    def rows(self, rows: Any) -> Source:
        """Some rows: a mask (N,) of booleans, or row numbers from 0.

        Raises:
            ValueError: they do not fit N rows.
        """
        chosen = np.asarray(rows)
        if chosen.dtype != np.bool_ and chosen.size == 0:
            chosen = chosen.astype(np.int64)
        if chosen.ndim != 1 or chosen.dtype.kind not in "biu":
            raise ValueError("rows are a vector of booleans or of row numbers")
        if chosen.dtype == np.bool_ and len(chosen) != len(self):
            raise ValueError(f"{self.where} has {len(self)} rows, the mask of rows {len(chosen)}")
        if chosen.dtype != np.bool_ and chosen.size:
            low, high = int(chosen.min()), int(chosen.max())
            if low < 0 or high >= len(self):
                raise ValueError(
                    f"{self.where} has rows 0 to {len(self) - 1}, got {low if low < 0 else high}"
                )
        pixels, named = (
            {
                n: (v[chosen], None if known is None else known[chosen])
                for n, (v, known) in a.items()
            }
            for a in (self.pixels, self.named)
        )
        extra = None if self.extra is None else self.extra.iloc[chosen]
        frame = self.frame.iloc[chosen]
        return Source(frame, self.where, extra, self.views, pixels, named, self.counts)


def take_masks(arrays: dict[str, Any]) -> dict[str, Any]:
    """Site -> mask: takes the arrays ``<site>_present`` beside those of sites out of the rest."""
    return {
        key.removesuffix(MASK): arrays.pop(key)
        for key in list(arrays)
        if key.endswith(MASK) and key.removesuffix(MASK) in arrays
    }


def from_arrays(
    arrays: Mapping[str, Any], where: str = "the arrays", named: Collection[str] | None = ()
) -> Source:
    """Read a dictionary of arrays or tensors by site, as the docstring of the module says.

    ``named`` are asked for by name; None: all of them.

    Raises:
        ValueError: a name, type or shape is another one, or the numbers of rows differ.
    """
    pd = library("pandas")
    values = {key: _array(key, value, where) for key, value in arrays.items()}
    masks = take_masks(values)
    own = {k: (values.pop(k), masks.get(k)) for k in list(values) if named is None or k in named}
    for key in values:
        if key != "y" and (not SITE_NAME.fullmatch(key) or key.endswith(MASK)):
            raise ValueError(
                f"{where}: expected arrays x or x_<view>, y, and <site>{MASK}, got {key!r}"
            )
    if not own and not any(key != "y" for key in values):
        raise ValueError(f"{where} has no array x or x_<view>")
    sizes = {key: len(value) for key, value in values.items()}
    sizes |= {key: len(value) for key, (value, _) in own.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{where}: all arrays need the same number of rows, got {sizes}")
    rows = next(iter(sizes.values()))
    frames, views, pixels = [pd.DataFrame(index=pd.RangeIndex(rows))], {}, {}
    for key, value in values.items():
        known = _mask(key, value, masks.get(key), where)
        if key == "y":
            frames.append(_labels(value, known, where))
        elif value.dtype == np.uint8:
            pixels[key] = _pixels(key, value, where), known
        else:
            frame = _columns(key, value, known, where)
            views[key] = tuple(frame.columns)
            frames.append(frame)
    for key, (value, known) in own.items():
        _mask(key, value, known, where)
    return Source(pd.concat(frames, axis=1), where, None, views, pixels, own)


def _array(key: Any, value: Any, where: str) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(key, str) or not isinstance(value, np.ndarray):
        raise ValueError(f"{where}: {key!r} is no array but {type(value).__name__}")
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{where}: {key!r} is a masked array; give {key} and {key}{MASK} instead")
    if value.dtype.kind not in "biuf":
        raise ValueError(
            f"{where}: {key!r} has type {value.dtype}; arrays hold numbers or booleans"
        )
    if value.ndim == 0:
        raise ValueError(f"{where}: {key!r} is a single number; arrays have the rows first")
    return np.array(value, dtype=value.dtype.newbyteorder("="), order="C")


def _mask(key: str, value: Array, known: Array | None, where: str) -> Array | None:
    if known is None:
        return None
    if known.dtype != np.bool_ or known.shape not in (value.shape[:1], value.shape):
        raise ValueError(
            f"{where}: '{key}{MASK}' is expected to hold booleans of shape {value.shape[:1]} or"
            f" {value.shape}, got {known.dtype} {known.shape}"
        )
    return known


def _pixels(key: str, value: Array, where: str) -> Array:
    if not 2 <= value.ndim <= 4 or 0 in value.shape[1:]:
        raise ValueError(
            f"{where}: {key!r} holds bytes, so images (N, D), (N, H, W) or (N, C, H, W), but has"
            f" shape {value.shape}"
        )
    return value


def _columns(key: str, value: Array, known: Array | None, where: str) -> pd.DataFrame:
    if value.ndim != 2 or value.shape[1] == 0:
        raise ValueError(
            f"{where}: {key!r} has shape {value.shape} and type {value.dtype}; expected columns"
            " (N, D), or images as uint8 from 0 to 255"
        )
    names = [f"{key}[{j}]" for j in range(value.shape[1])]
    frame: pd.DataFrame = library("pandas").DataFrame(value, columns=names)
    if known is None:
        return frame
    known = np.broadcast_to(known.reshape(len(known), -1), value.shape)
    nullable: dict[str, Any] = {"b": "boolean", "i": "Int64", "u": "UInt64"}
    if value.dtype.kind in nullable:
        frame = frame.astype(nullable[value.dtype.kind])
    return frame.where(known)


def _labels(value: Array, known: Array | None, where: str) -> pd.DataFrame:
    pd = library("pandas")
    if value.ndim != 1 or value.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: 'y' is expected to hold whole numbers (N,), -1 where unlabelled, got"
            f" {value.dtype} {value.shape}"
        )
    labels = pd.Series(value, name="y").astype("UInt64" if value.dtype.kind == "u" else "Int64")
    return pd.DataFrame({"y": labels if known is None else labels.where(known)})
