"""Files in and out, by extension: what to read, whole files only, and errors that name the file."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pyrozoo.zoo.tables import formats
from pyrozoo.zoo.tables.cells import library, repeated, some
from pyrozoo.zoo.tables.sources import Source, from_arrays

NEEDS = {".parquet": ("pyarrow",), ".h5ad": ("anndata", "h5py")}
FORMATS: dict[str, tuple[Callable[..., Source], Callable[[Any, Path], None]]] = {
    ".csv": (formats.read_csv, formats.write_csv),
    ".parquet": (formats.read_parquet, formats.write_parquet),
    ".npz": (formats.read_npz, formats.write_npz),
    ".h5ad": (formats.read_h5ad, formats.write_h5ad),
}


def load(
    source: Any,
    index: str | int | None = None,
    text: Iterable[str] = (),
    named: Collection[str] | None = (),
) -> Source:
    """Read a file, a data frame or a dictionary of arrays; a source is returned as it is.

    Args:
        source: a path, a pandas data frame, or arrays by site.
        index: the column, by name or number, of the labels of rows; for ``.csv``, ``.parquet`` and
            data frames.
        text: columns of a ``.csv`` that are text even if they look like numbers.
        named: arrays that are asked for by name and read as they are; None: all of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another type; the message names it.
        TypeError: the source is none of these.
    """
    if isinstance(source, Source):
        where, loaded = source.where, source
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        where, loaded = str(path), _read(path, index, tuple(text), named)
        if path.suffix.lower() == ".csv":
            return loaded
    elif isinstance(source, Mapping):
        where, loaded = "the arrays", from_arrays(source, named=named)
    elif _is_frame(source):
        where, loaded = "the data frame", Source(source)
    else:
        raise TypeError(
            "expected a path, a pandas data frame or a dictionary of arrays, got"
            f" {type(source).__module__}.{type(source).__name__}"
            + ("; use its .to_pandas()" if hasattr(source, "to_pandas") else "")
        )
    if index is None:
        return loaded
    if isinstance(source, Source) or loaded.arrays or loaded.extra is not None:
        raise ValueError(f"{where}: index is for .csv and .parquet files and data frames")
    return Source(
        loaded.frame.set_index(formats.index_name(index, list(loaded.frame.columns), where)), where
    )


def write(data: Any, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a data frame (``.csv``, ``.parquet``, ``.h5ad``) or arrays by site (``.npz``).

    The file is complete or not there: it is written beside its final name and moved there in one
    step. A ``.csv`` holds the index unless that only counts the rows; in an ``.h5ad`` numeric
    columns are X and the others ``obs``.

    Raises:
        FileExistsError: there is such a file, and ``overwrite`` is false.
        FileNotFoundError: there is no such folder.
        ValueError: the extension is another one, or the file cannot hold the data.
        TypeError: the data are neither, or of the other type.
    """
    path = Path(path)
    kind = _extension(path)
    if not (isinstance(data, Mapping) if kind == ".npz" else _is_frame(data)):
        expected = "a dictionary of arrays" if kind == ".npz" else "a pandas data frame"
        raise TypeError(f"{path}: {kind} files hold {expected}, got {type(data).__name__}")
    if kind != ".npz" and (twice := repeated(map(str, data.columns))):
        raise ValueError(f"{path}: two columns are called {some(twice)}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; say overwrite=True to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} to")
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        FORMATS[kind][1](data, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    return path


def _is_frame(data: Any) -> bool:
    return "pandas" in sys.modules and isinstance(data, library("pandas").DataFrame)


def _extension(path: Path) -> str:
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected a file of type {', '.join(FORMATS)}")
    return path.suffix.lower()


def _read(
    path: Path, index: str | int | None, text: tuple[str, ...], named: Collection[str] | None
) -> Source:
    kind = _extension(path)
    reader = FORMATS[kind][0]
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb"):
        pass  # a file that may not be read is no damaged file
    for name in ("pandas", *NEEDS.get(kind, ())):
        library(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {".csv": (index, text), ".npz": (named,)}.get(kind, ())
            return reader(path, *options)
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path} cannot be read: {reason or type(error).__name__}") from error
