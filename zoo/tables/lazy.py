"""Files that are larger than memory: opened, and read row by row while a model is fitted.

::

    rows = tables.open_rows("images.zarr", label="digit")
    fit(program, guide, rows.data)

================== ================================================================================
``.npy``           one array, the site ``x``; several files as ``{"x": "x.npy", "y": "y.npy"}``
``.h5`` ``.hdf5``  datasets by name; by default those at the top, called ``x``, ``x_<view>``, ``y``,
``.zarr``          and ``<site>_present`` with booleans
``.h5ad``          ``X``, dense or sparse by rows; a label is a column of ``obs``
``.parquet``       columns; by default all but the label and ``<site>_present`` are ``x``
================== ================================================================================

As everywhere, bytes (uint8) with the rows first and something behind are pixels from 0 to 255.
What is missing is said by booleans, ``<site>_present``, or by the missing values of a Parquet
column; NaN is refused.  Labels are read into memory.  Single rows can be read fast from ``.npy``,
and from ``.h5`` datasets without chunks; from everything else whole blocks are, see
:class:`pyrozoo.inference.Stored`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyrozoo.zoo.tables.cells import library, some
from pyrozoo.zoo.tables.columnar import ParquetColumns, ParquetFile, SparseRows
from pyrozoo.zoo.tables.formats import refuse_links
from pyrozoo.zoo.tables.schema import SITE_NAME
from pyrozoo.zoo.tables.sources import MASK, take_masks

if TYPE_CHECKING:
    from pyrozoo.inference import Stored

Array = NDArray[Any]
Sites = Mapping[str, str | Sequence[str]]

SUFFIXES = (".npy", ".h5", ".hdf5", ".zarr", ".h5ad", ".parquet")


class Labels(NamedTuple):
    """Labels of all rows, in memory."""

    codes: Array
    known: Array
    names: tuple[str, ...]  # of the codes


class Opened(NamedTuple):
    """An open file: rows on disk, and what each label is called (none without labels)."""

    data: Stored
    label_names: tuple[str, ...] = ()


def open_rows(
    source: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    sites: Sites | None = None,
    *,
    label: str | None = None,
    shuffle: str = "auto",
    window: int = 2**27,
) -> Opened:
    """Open a file of rows without reading them.

    Args:
        source: its path; or site -> path of an ``.npy``.
        sites: site (or ``<site>_present``) -> where it is in the file: the name of a dataset, or
            of columns. See the module for what it is by default.
        label: the dataset or column of labels, which becomes the site ``y``: whole numbers, of
            which -1 is unlabelled, or (``.parquet``, ``.h5ad``) text. Its distinct values are
            numbered in their order.
        shuffle, window: see :class:`pyrozoo.inference.Stored`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the library for it is not installed; the message names the extra.
        ValueError: the file is damaged, or does not hold what was asked for; the message names it.
        TypeError: what it holds are no numbers.
    """
    from pyrozoo.inference import Stored

    if isinstance(source, Mapping):
        if sites is not None or label is not None:
            raise ValueError("several .npy files are given by site, without sites or label")
        where, arrays = "the files", {n: _npy(Path(path)) for n, path in source.items()}
    else:
        path, where = Path(source), str(source)
        kind = path.suffix.lower()
        if kind not in SUFFIXES:
            raise ValueError(f"{path}: expected a file of type {', '.join(SUFFIXES)}")
        if not path.exists():
            raise FileNotFoundError(f"no file {path}")
        if kind == ".npy" and (sites is not None or label is not None):
            raise ValueError(f"{path} has one array: give several as a dictionary, site -> file")
        wanted = dict(sites or {})
        if label is not None and wanted.setdefault("y", label) != label:
            raise ValueError(f"{path}: label {label!r} and sites={{'y': {wanted['y']!r}}} differ")
        arrays = _OPENERS[kind](path, wanted, sites is None)
    masks = take_masks(arrays)
    for key in arrays:
        if key != "y" and (not SITE_NAME.fullmatch(key) or key.endswith(MASK)):
            raise ValueError(
                f"{where}: sites are x or x_<view>, y, and <site>{MASK}, got {key!r}; say which"
                " sites there are with sites={'x': ...}"
            )
    names: tuple[str, ...] = ()
    if "y" in arrays:
        labels = arrays["y"]
        if not isinstance(labels, Labels):
            labels = _numbered(where, labels)
        known, names = labels.known, labels.names
        if "y" in masks:
            known = known & np.asarray(masks.pop("y")[:], dtype=bool)
        arrays["y"] = (labels.codes, known)
    given = {k: (v, masks[k]) if k in masks else v for k, v in arrays.items()}
    return Opened(Stored(given, shuffle=shuffle, window=window), names)


# ---- one opener for each type of file: (path, sites, whether all that is there) -> arrays --------


def _npy(path: Path, wanted: Any = None, everything: bool = True) -> Any:
    if path.suffix.lower() != ".npy":
        raise ValueError(f"{path}: several files are .npy files, one for each site")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is no .npy file")
    return array if wanted is None else {"x": array}


def _hdf5(path: Path, wanted: dict[str, Any], everything: bool) -> dict[str, Any]:
    h5py = library("h5py", "storage")
    file = _opened(path, lambda: h5py.File(path, "r"))
    refuse_links(file, h5py)
    return _datasets(path, file, wanted, everything)


def _zarr(path: Path, wanted: dict[str, Any], everything: bool) -> dict[str, Any]:
    zarr = library("zarr", "storage")
    file = _opened(path, lambda: zarr.open(str(path), mode="r"))
    if hasattr(file, "shape"):  # one array without a group
        if wanted:
            raise ValueError(f"{path} is one array, the site x, without others inside")
        return {"x": file}
    return _datasets(path, file, wanted, everything)


def _datasets(path: Path, file: Any, wanted: dict[str, Any], everything: bool) -> dict[str, Any]:
    names = [name for name in file if hasattr(file[name], "shape")]
    if everything:
        mine = set(wanted.values())
        wanted = {**{name: name for name in names if name not in mine}, **wanted}
    found = {}
    for site, name in wanted.items():
        if not isinstance(name, str) or name not in file or not hasattr(file[name], "shape"):
            raise ValueError(f"{path}: no dataset {name!r} for {site!r} (datasets: {some(names)})")
        found[site] = file[name]
    return found


def _h5ad(path: Path, wanted: dict[str, Any], everything: bool) -> dict[str, Any]:
    h5py, anndata = library("h5py"), library("anndata.io")
    file = _opened(path, lambda: h5py.File(path, "r"))
    refuse_links(file, h5py)
    label = wanted.pop("y", None)
    found: dict[str, Any] = {}
    for site, name in (wanted or {"x": "X"}).items():
        if name not in file:
            raise ValueError(f"{path}: no matrix {name!r} for {site!r} (it has: {some(file)})")
        sparse = not hasattr(file[name], "shape")
        found[site] = SparseRows(file[name], f"{path}/{name}", path) if sparse else file[name]
    if label is not None:
        columns = [n for n in file["obs"] if n != file["obs"].attrs.get("_index")]
        if label not in columns:
            raise ValueError(f"{path}: no column {label!r} in obs (columns: {some(columns)})")
        values = anndata.read_elem(file[f"obs/{label}"])
        if hasattr(values, "categories"):
            found["y"] = _named(path, values.codes, [str(c) for c in values.categories])
        elif np.asarray(values).dtype.kind in "iuf":
            found["y"] = values
        else:
            levels, codes = np.unique(np.asarray(values, dtype=str), return_inverse=True)
            found["y"] = _named(path, codes, levels.tolist())
    return found


def _parquet(path: Path, wanted: dict[str, Any], everything: bool) -> dict[str, Any]:
    library("pyarrow", "storage")
    file: ParquetFile = _opened(path, lambda: ParquetFile(path))
    label = wanted.pop("y", "y" if "y" in file.names and everything else None)
    if label is not None and label not in file.names:
        raise ValueError(f"{path}: no column {label!r} (columns: {some(file.names)})")
    if everything:
        rest = [name for name in file.names if name != label]
        masks = [n for n in rest if n.endswith(MASK) and SITE_NAME.fullmatch(n)]
        wanted = {"x": [n for n in rest if n not in masks], **{n: n for n in masks}, **wanted}
    found: dict[str, Any] = {}
    for site, names in wanted.items():
        vector = isinstance(names, str) and site.endswith(MASK)
        columns = [names] if isinstance(names, str) else list(names)
        if not columns:
            raise ValueError(f"{path}: no columns for {site!r} (columns: {some(file.names)})")
        found[site] = ParquetColumns(file, columns, vector=vector)
        if found[site].partly and site + MASK not in wanted:
            found[site + MASK] = ParquetColumns(file, columns, known=True)
    if label is not None:
        types = library("pyarrow").types
        column = file.read([label]).column(0).combine_chunks()
        if types.is_integer(column.type):
            known = column.is_valid().to_numpy(zero_copy_only=False)
            found["y"] = np.where(known, column.fill_null(0).to_numpy(), -1)
        else:
            coded = column if types.is_dictionary(column.type) else column.dictionary_encode()
            codes = coded.indices.fill_null(-1).to_numpy()
            found["y"] = _named(path, codes, [str(v) for v in coded.dictionary.to_pylist()])
    return found


def _opened(path: Path, how: Callable[[], Any]) -> Any:
    try:
        return how()
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error


_OPENERS: dict[str, Callable[[Path, dict[str, Any], bool], dict[str, Any]]] = {
    ".npy": _npy, ".h5": _hdf5, ".hdf5": _hdf5, ".zarr": _zarr, ".h5ad": _h5ad,
    ".parquet": _parquet,
}  # fmt: skip


# ---- labels --------------------------------------------------------------------------------------


def _numbered(where: str, given: Any) -> Labels:
    """Whole numbers, of which -1 is unlabelled."""
    values = np.asarray(given[:])
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: labels are expected as whole numbers (rows,), -1 where unlabelled, got"
            f" {values.dtype} {values.shape}"
        )
    known = values != -1
    levels, codes = np.unique(values, return_inverse=True)
    return _named(where, np.where(known, codes, -1), [str(level) for level in levels.tolist()])


def _named(where: str | Path, codes: Array, names: list[str]) -> Labels:
    """Numbers of names, -1 where unlabelled; names that nobody has are left out."""
    used, compact = np.unique(codes[codes >= 0], return_inverse=True)
    if len(used) < 2:
        found = some(names[k] for k in used.tolist()) or "none"
        raise ValueError(f"{where}: labels need two classes or more, got {found}")
    kept = [names[k] for k in used.tolist()]
    order = sorted(range(len(kept)), key=kept.__getitem__) if _is_text(kept) else range(len(kept))
    rank = np.empty(len(kept), dtype=np.int64)
    rank[list(order)] = np.arange(len(kept))
    numbers = np.zeros(len(codes), dtype=np.int64)
    numbers[codes >= 0] = rank[compact]
    return Labels(numbers, np.asarray(codes >= 0), tuple(kept[k] for k in order))


def _is_text(names: list[str]) -> bool:
    return not all(name.lstrip("-").isdigit() for name in names)
