"""Programs of your own, named on the command line as ``FILE.py:Class``.

In a file (.csv, .parquet, .npz, .h5ad) the names that the program uses decide.  A column, or an
array of an .npz, that is called like a site of the program, or like a key that it reads from the
batch, is the value of that name: whole numbers and booleans int64, other numbers float32, what is
missing not observed.  What is only read is an input; missing entries of it are 0, and
``batch.present`` tells.  If the program has a site ``x`` of vectors, the other columns form it, as
for every method; else they are left out, and a line says so.  The column that ``label`` names is
the site ``y``, and so is an integer array ``y`` of an .npz where ``y`` is finite: labels, which are
observed where ``labels`` says so.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyrozoo.guides import Amortized
from pyrozoo.guides.targets import find_given
from pyrozoo.inference import Batch, EnumELBO
from pyrozoo.inference.graph import Graph, Site, read_graph
from pyrozoo.inference.modes import seeded
from pyrozoo.zoo import tables
from pyrozoo.zoo.catalogue import Model
from pyrozoo.zoo.tables.cells import some
from pyrozoo.zoo.tables.schema import SITE_NAME
from pyrozoo.zoo.tasks import ON_DISK, Task


def find_class(text: str) -> type[Any]:
    """The class that ``FILE.py:Class`` names; the file is yours and is executed.

    Raises:
        ValueError: no such file, or no such class in it.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or path.suffix != ".py" or spec is None or spec.loader is None:
        raise ValueError(f"expected FILE.py:Class with an existing file, got {text!r}")
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    module.__spec__ = spec
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        classes = [n for n, v in vars(module).items() if inspect.isclass(v)]
        raise ValueError(f"{path} has no class {name!r} (classes: {', '.join(classes)})")
    return found


def maker(cls: type[Any]) -> Callable[[Any, Task, int], Model]:
    """How a model of a class is made for a task, with a guide built from the program.

    The class gets the options of the specification; besides, where it takes them, ``x_dim``, the
    features of x, and ``likelihood`` or ``columns``, what a table brings.  What the program reads
    from the data and is no site is an input of its objective.
    """

    def make(spec: Any, task: Task, seed: int) -> Model:
        width = task.train.shape("x")[1:].numel() if "x" in task.train else None
        likelihoods = task.likelihoods() if task.likelihoods is not None else {}
        options = _options(cls, spec, width, likelihoods)
        first, names = task.train[:2], task.train.names
        find = {n: functools.partial(first.stored, n) for n in names}
        rows = _Rows(len(first), find, f"the data have no such value (they have: {some(names)})")
        with seeded(seed):
            program = cls(**options)
            graph = read_graph(program, rows)
            inputs = tuple(n for n in rows.read if n not in graph.sites)
            leaves = find_given(graph, None, None)
            given = [n for n in leaves if graph.sites[n].own is None or n in names]
            given += [n for n in (*graph.sites, *inputs) if n in (*names, "y")]
            hidden = options.get("hidden", (256, 256))
            guide = Amortized(program, list(dict.fromkeys(given)), hidden, example=task.train)
        return Model(spec["method"], program, guide, EnumELBO(inputs=inputs), options=options)

    return make


def with_values(
    cls: type[Any], spec: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """A specification whose data have the columns that the program calls by name as ``values``.

    Args:
        cls: the class of the program, which is run on the first rows.
        spec: as :func:`.runs.run` takes it; data that are no table in a file stay as they are.
        say: called with a line about columns that are left out.

    Raises:
        ValueError: the program reads what is no column, or calls no column by its name.
    """
    data = spec["data"]
    if "file" not in data or Path(data["file"]).suffix.lower() in ON_DISK:
        return dict(spec)
    source = tables.load(data["file"], data.get("index"), named=None)
    views, dropped = data.get("views", {}), list(data.get("drop", ()))
    taken = {*dropped, *(n for names in views.values() for n in names)}
    taken |= {data["label"], "y"} if data.get("label") else set()
    names = [n for n in source.names if n not in taken]
    graph, read = _look(cls, spec, source, names)
    sites = {n: s for n, s in graph.sites.items() if s.kind == "sample"}
    usual = [n for n in names if _is_usual(n, source, sites.get(n), n in read)]
    values = [n for n in names if (n in sites or n in read) and n not in usual]
    forms_x = not (source.arrays or views or "x" in values) and ("x" in sites or "x" in read)
    if not (values or usual or views or forms_x):
        raise ValueError(
            f"{cls.__name__} calls no column of {source.where} by its name (columns: {some(names)};"
            f" sites: {some(sites)})"
        )
    rest = [] if forms_x else [n for n in names if n not in (*values, *usual)]
    if rest := [n for n in rest if n in source.frame or n in source.named]:
        say(f"left out, as {cls.__name__} does not use them: {some(rest)}")
    more = {"values": values, "drop": [*dropped, *rest]}
    return {**spec, "data": {**data, **{key: found for key, found in more.items() if found}}}


def _look(
    cls: type[Any], spec: Mapping[str, Any], source: tables.Source, names: Sequence[str]
) -> tuple[Graph, Collection[str]]:
    """The graph of the program, and what it reads, from a run on the first rows of a file."""
    data, rows = spec["data"], min(len(source), 2)
    views = {f"x_{view}": columns for view, columns in data.get("views", {}).items()}
    widths = {site: len(columns) for site, columns in views.items()}
    widths = widths or {"x": sum(n in source.frame for n in names)}
    if "x" in source.named:
        widths["x"] = source.named["x"][0][0].size
    likelihoods: Mapping[str, Any] = {}
    if not {"columns", "likelihood"}.isdisjoint(inspect.signature(cls).parameters):
        how = {key: data[key] for key in ("label", "views", "columns", "drop") if key in data}
        if source.arrays:
            how["values"] = [n for n in names if n != "y" and not SITE_NAME.fullmatch(n)]
        table = tables.read(data["file"] if source.arrays else source, **how)
        likelihoods = table.schema.likelihoods()
    find: dict[str, Callable[[], Tensor]] = {
        site: functools.partial(torch.zeros, rows, width) for site, width in widths.items()
    }
    if data.get("label"):
        find["y"] = functools.partial(torch.zeros, rows, dtype=torch.int64)
    find |= {n: functools.partial(_first, source, n, rows) for n in names}
    where = f"{source.where} has no such column (columns: {some(names)})"
    batch = _Rows(rows, find, where)
    graph = None
    with seeded(0):
        program = cls(**_options(cls, spec, widths.get("x"), likelihoods))
        try:
            graph = read_graph(program, batch)
        except (ValueError, RuntimeError):
            if "x" not in batch.read or "x" in names:
                raise
    if graph is None or ("x" in batch.read and "x" not in (*names, *graph.sites)):
        raise ValueError(f"the program reads batch['x'], but {where}")
    return graph, batch.read


def _first(source: tables.Source, name: str, rows: int) -> Tensor:
    return torch.from_numpy(source.value(name)[0][:rows])


def _is_usual(name: str, source: tables.Source, site: Site | None, read: bool) -> bool:
    """Whether it means what it does for every method: a vector x, or labels of an .npz."""
    if SITE_NAME.fullmatch(name):
        return site is not None and len(site.row_shape) > 0
    if name != "y" or not source.arrays:
        return False
    value = source.named[name][0]
    return value.ndim == 1 and value.dtype.kind in "iu" and (site.summable if site else not read)


class _Rows(Batch):
    """Some rows whose values are found when they are read; ``read`` has the names of these."""

    __slots__ = ("_find", "_where", "read")

    def __init__(self, rows: int, find: Mapping[str, Callable[[], Tensor]], where: str) -> None:
        super().__init__({}, {}, rows)
        self._find, self._where, self.read = find, where, dict[str, None]()

    def __contains__(self, name: object) -> bool:
        if name in self._find:
            self.read[str(name)] = None
        return name in self._find

    def stored(self, name: str) -> Tensor:
        """The value of a name."""
        if name not in self:
            raise ValueError(f"the program reads batch[{name!r}], but {self._where}")
        return self._find[name]()

    def present(self, name: str) -> Tensor:
        """True if there is such a name."""
        return torch.full((len(self),), name in self)


def _options(
    cls: type[Any], spec: Mapping[str, Any], width: int | None, likelihoods: Mapping[str, Any]
) -> dict[str, Any]:
    """What the class gets, see :func:`maker`."""
    options = dict(spec.get("options", {}))
    accepted = inspect.signature(cls).parameters
    if "x_dim" in accepted and width is not None:
        options.setdefault("x_dim", width)
    if likelihoods and "columns" in accepted:
        options.setdefault("columns", likelihoods)
    elif "likelihood" in accepted and set(likelihoods) == {"x"}:
        options.setdefault("likelihood", likelihoods["x"])
    return options
