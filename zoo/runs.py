"""Runs: a specification, as an experiment file has it, becomes a fit, figures and a run folder.

A specification is a dictionary with the tables of the files in ``zoo/experiments``: ``method``,
``data`` (see :mod:`.tasks`), ``options`` of the method, ``start`` (pretraining), ``fit``, ``score``
(options of :func:`.scoring.score`), and ``published`` figures.
"""

from __future__ import annotations

import copy
import inspect
import math
import platform
import time
import tomllib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from pyrozoo.inference import Result, Tracker, processes
from pyrozoo.inference.training.guarding import out_of_memory
from pyrozoo.zoo import scoring
from pyrozoo.zoo.baselines import check_clusters
from pyrozoo.zoo.catalogue import Model, create, list_methods, method
from pyrozoo.zoo.rivals import plain_rivals
from pyrozoo.zoo.tasks import Task, make_task

Spec = dict[str, Any]
TABLES = ("method", "data", "options", "start", "fit", "score", "published")
RECOMMENDED = (  # the best for its time of a method's experiments on the same data
    "dilokthanakul2016_gmvae_mnist_graph",
    "falck2021_mfcvae_mnist_graph",
    "jiang2017_vade_digits_balanced",
    "jiang2017_vade_mnist_balanced",
    "kingma2014_m1m2_mnist_graph",
    "kingma2014_m2_mnist_graph",
)
PARTICLES = 1000  # for the evidence of a density
MOST = 10**6  # clusters, dimensions or units of a layer


def experiments() -> list[str]:
    """Names of the experiment files."""
    folder = files("pyrozoo.zoo") / "experiments"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load_experiment(name: str) -> Spec:
    """The specification in an experiment file.

    Raises:
        ValueError: there is no such experiment, or the file has unknown tables.
    """
    if name not in experiments():
        raise ValueError(
            f"no experiment is called {name!r} (there are: {', '.join(experiments())})"
        )
    text = (files("pyrozoo.zoo") / "experiments" / f"{name}.toml").read_text()
    spec = tomllib.loads(text)
    if unknown := set(spec) - set(TABLES):
        raise ValueError(f"{name}: unknown tables {', '.join(sorted(unknown))}")
    return spec


def default_spec(name: str, data: Mapping[str, Any]) -> Spec:
    """What ``pyrozoo train NAME --data DATA`` runs: the experiment for the two, if there is one.

    Of several, that in ``RECOMMENDED``, else the first by name.  Further settings in ``data``
    replace those of the experiment.
    """
    for experiment in (*RECOMMENDED, *experiments()):
        spec = load_experiment(experiment)
        if spec["method"] == name and spec["data"].get("name") == data.get("name", 0):
            return {**spec, "data": {**spec["data"], **data}}
    return {"method": name, "data": dict(data)}


def with_overrides(spec: Spec, **tables: Mapping[str, Any]) -> Spec:
    """A copy of a specification with some entries of its tables replaced (None: left alone)."""
    new = copy.deepcopy(spec)
    for table, entries in tables.items():
        for key, value in entries.items():
            if value is not None:
                new.setdefault(table, {})[key] = value
    return new


def make_model(spec: Spec, task: Task, seed: int) -> Model:
    """The method of a specification, made for a task.

    A table brings the likelihoods of its columns; known classes say how many values y has, unless
    the options do.
    """
    options, accepted = dict(spec.get("options", {})), method(spec["method"]).options
    check_options(spec["method"], options)
    if task.likelihoods is not None:
        likelihoods = task.likelihoods()
        if "columns" in accepted:
            options.setdefault("columns", likelihoods)
        elif "likelihood" in accepted:
            alone = likelihoods.get("x") if set(likelihoods) == {"x"} else likelihoods
            options.setdefault("likelihood", alone)
    for key in ("num_clusters", "num_classes"):
        if key in accepted and task.label_names:
            options.setdefault(key, len(task.label_names))
    try:
        return create(spec["method"], task.train, seed=seed, **options)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(f"{spec['method']} with {options} is too large: {error}") from error


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check the types of a method's options, as its maker declares them, and that counts count.

    Raises:
        ValueError: naming the option, what it takes and what came.
    """
    for key, parameter in inspect.signature(method(name).make).parameters.items():
        kind, value = parameter.annotation, options.get(key)
        if key not in options or kind not in _TAKES:
            continue
        words, fits = _TAKES[kind]
        least = 0 if parameter.default == 0 else 1
        if not fits(value, least):
            raise ValueError(f"{name}: option {key} is {words.format(least)}, got {value!r}")


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= MOST


def _is_number(value: Any, least: int) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list(value: Any, least: int) -> bool:
    return isinstance(value, list | tuple) and all(_is_count(v, 1) for v in value)


#: annotation of an option -> what it takes, in words, and a test of it
_TAKES: dict[str, tuple[str, Callable[[Any, int], bool]]] = {
    "int": (f"a whole number from {{}} to {MOST}", _is_count),
    "float": ("a finite number", _is_number),
    "bool": ("true or false", lambda value, least: isinstance(value, bool)),
    "str": ("a name", lambda value, least: isinstance(value, str)),
    "Mapping[str, Likelihood | str] | None": (
        "a dictionary by site",
        lambda value, least: isinstance(value, Mapping | None),
    ),
    "Sequence[int]": (f"a list of whole numbers from 1 to {MOST}", _is_list),
}


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    names = ["pyrozoo", "pyro-ppl", "torch", "numpy", "scikit-learn"]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def fit_spec(
    spec: Spec,
    seed: int,
    *,
    root: str | None = None,
    progress: bool = True,
    make: Callable[[Spec, Task, int], Model] = make_model,
    **fit_options: Any,
) -> tuple[Model, Result, Task, dict[str, float]]:
    """Load, create, fit and score one seed of a specification."""
    settings = {**spec.get("fit", {}), **fit_options}
    ranks = processes.start(settings.get("device", "auto"), settings.get("devices"))
    with ranks.together():
        task = make_task(spec["data"], spec["method"], seed, root)
        if progress and ranks.first:
            for line in task.summary:
                Console(stderr=True).print(line, highlight=False, markup=False)
        model = make(spec, task, seed)
        if isinstance(clusters := model.options.get("num_clusters"), int):
            check_clusters(clusters, len(task.train))
    start = spec.get("start") if model.start is not None else None
    began = time.perf_counter()
    result = model.fit(task.train, seed=seed, progress=progress, start=start, **settings)
    seconds = time.perf_counter() - began
    options = {"num_particles": PARTICLES} if _is_density(spec["method"]) else {}
    options |= spec.get("score", {})
    scores = scoring.score(result, task, **options) if ranks.first else {}
    figures = {**scores, "bound": result.history[-1]["bound"]}
    return model, result, task, {**figures, "seconds": seconds}


def run(
    spec: Spec,
    folder: Path,
    *,
    seed: int = 0,
    root: str | None = None,
    device: str = "auto",
    devices: int | str | None = None,
    resume: bool = False,
    progress: bool = True,
    make: Callable[[Spec, Task, int], Model] = make_model,
    command: str = "",
) -> dict[str, Any]:
    """Train, compare with plain rivals, and leave a run folder (see :mod:`.folders`).

    Of several processes the first does all but the training.
    """
    from pyrozoo.zoo import folders

    folders.check(folder)
    track = Tracker()
    model, result, task, figures = fit_spec(
        spec, seed, root=root, progress=progress, make=make, folder=folder, resume=resume,
        device=device, devices=devices, save_every=10, tracker=track,
    )  # fmt: skip
    if processes.rank():
        return figures
    epochs = spec.get("start", {}).get("epochs")
    with processes.alone():
        everything = {**figures, **plain_rivals(model, task, seed, epochs)}
    folders.store(
        folder, model, result, task, everything,
        {"spec": spec, "seed": seed, "command": command, "versions": versions()},
        track if len(track.rows) else None,
    )  # fmt: skip
    folders.write_report(folders.load(folder, lambda *_: model))
    return everything


def _is_density(name: str) -> bool:
    return known_method(name) and method(name).task == "density"


def known_method(name: str) -> bool:
    """Whether the catalogue has a method of this name."""
    return name in list_methods()
