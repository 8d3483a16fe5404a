"""Programs of your own, named on the command line as ``FILE.py:Class``."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pyrozoo.guides import Amortized
from pyrozoo.guides.sites import graph_of
from pyrozoo.guides.targets import find_given
from pyrozoo.inference.modes import seeded
from pyrozoo.zoo.catalogue import Model
from pyrozoo.zoo.tasks import Task


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
    features of x, and ``likelihood`` or ``columns``, what a table brings.
    """

    def make(spec: Any, task: Task, seed: int) -> Model:
        options = dict(spec.get("options", {}))
        accepted = inspect.signature(cls).parameters
        if "x_dim" in accepted and "x" in task.train:
            options.setdefault("x_dim", task.train.shape("x")[1:].numel())
        if task.likelihoods is not None:
            likelihoods = task.likelihoods()
            if "columns" in accepted:
                options.setdefault("columns", likelihoods)
            elif "likelihood" in accepted and set(likelihoods) == {"x"}:
                options.setdefault("likelihood", likelihoods["x"])
        with seeded(seed):
            program = cls(**options)
            graph = graph_of(program)
            given = find_given(graph, None, None)
            if "y" in graph.sites and "y" not in given:
                given = (*given, "y")
            guide = Amortized(program, given, hidden=options.get("hidden", (256, 256)))
        return Model(spec["method"], program, guide, options=options)

    return make
