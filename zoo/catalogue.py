"""The catalogue: the one place where program, default guide and default objective of a method meet.

The makers are in the ``catalogue.py`` of each family; :func:`create` is the public way to call
one::

    model = zoo.create("vade", {"x": images}, num_clusters=10)
    result = model.fit({"x": images})
"""

from __future__ import annotations

import difflib
import re
from importlib.resources import files
from typing import Any

from pyrozoo.inference import Batch
from pyrozoo.inference.batch import Data
from pyrozoo.inference.modes import seeded
from pyrozoo.zoo.clustering.catalogue import METHODS as CLUSTERING
from pyrozoo.zoo.density.catalogue import METHODS as DENSITY
from pyrozoo.zoo.imputation.catalogue import METHODS as IMPUTATION
from pyrozoo.zoo.model import Method, Model
from pyrozoo.zoo.multimodal.catalogue import METHODS as MULTIMODAL
from pyrozoo.zoo.networks import set_precision
from pyrozoo.zoo.semisupervised.catalogue import METHODS as SEMISUPERVISED

__all__ = ["Method", "Model", "citation", "create", "list_methods", "method"]

_METHODS = {m.name: m for m in [*CLUSTERING, *SEMISUPERVISED, *MULTIMODAL, *IMPUTATION, *DENSITY]}


def list_methods(task: str | None = None) -> list[str]:
    """Names of all methods, or of those for a task.

    Raises:
        ValueError: there is no such task.
    """
    tasks = sorted({m.task for m in _METHODS.values()})
    if task is not None and task not in tasks:
        raise ValueError(f"no method is for {task!r}; tasks: {', '.join(tasks)}")
    return [m.name for m in _METHODS.values() if task in (None, m.task)]


def method(name: str) -> Method:
    """The entry of a method.

    Raises:
        ValueError: there is no such method; the message has the nearest name.
    """
    if name not in _METHODS:
        near = difflib.get_close_matches(name, _METHODS, 2)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"no method is called {name!r} (methods: {', '.join(_METHODS)}){hint}")
    return _METHODS[name]


def create(name: str, data: Data, *, seed: int = 0, **options: Any) -> Model:
    """Make a method for a data set: its program, its default guide and its default objective.

    Args:
        name: see :func:`list_methods`.
        data: a dictionary of arrays by site, for the shapes and for what is observed.
        seed: of the networks' initial parameters; the global random state is left alone.
        options: of the method, see ``pyrozoo show NAME``; for all of them ``precision``, which is
            ``"float32"`` or, inside the networks alone, ``"bf16"``.

    Raises:
        ValueError: no such method or option, or the data lack a site that it needs.
    """
    entry = method(name)
    if unknown := set(options) - set(entry.options):
        near = difflib.get_close_matches(sorted(unknown)[0], entry.options, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{name} has no option {', '.join(sorted(unknown))}"
            f" (options: {', '.join(entry.options)}){hint}"
        )
    batch = Batch.of(data)
    with seeded(seed):
        model = entry.make(batch, **{k: v for k, v in options.items() if k != "precision"})
    model.options = {**entry.options, **options}
    if (precision := model.options["precision"]) != "float32":
        set_precision(model.program, precision)
        set_precision(model.guide, precision)
    return model


def citation(name: str) -> str:
    """The BibTeX entry of a method's paper."""
    text = (files("pyrozoo.zoo") / "references.bib").read_text()
    entry = re.search(rf"^@\w+{{{method(name).paper},.*?^}}", text, re.MULTILINE | re.DOTALL)
    if entry is None:
        raise LookupError(f"references.bib has no entry {method(name).paper}")
    return entry.group()
