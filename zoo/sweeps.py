"""Choosing an option, such as the number of clusters, without labels.

Each value is fitted with several seeds to the same rows; the others are held out.  Two figures
speak for a value: the bound of the held-out rows, and the *stability*, how far two seeds agree on
which held-out rows belong together (adjusted Rand index; Hubert and Arabie, "Comparing partitions",
1985).
"""

from __future__ import annotations

import inspect
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import adjusted_rand_score

from pyrozoo.inference import Batch, Result, fit_seeds
from pyrozoo.inference.reports import plots
from pyrozoo.zoo import runs
from pyrozoo.zoo.baselines import check_clusters
from pyrozoo.zoo.catalogue import method
from pyrozoo.zoo.safety import inside, read_json, write_json
from pyrozoo.zoo.tasks import Task, make_task

HELD_OUT = 0.2
PARTICLES = 16


def sweep(
    spec: runs.Spec,
    option: str,
    values: Sequence[Any],
    folder: Path,
    *,
    seeds: int = 3,
    root: str | None = None,
    progress: bool = True,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Fit every value of an option with every seed, and store ``sweep.json`` and ``sweep.png``.

    What the folder already has is not fitted again; the seeds of a value are fitted at once where
    that is faster (:func:`pyrozoo.inference.fit_seeds`).  The held-out rows, a fifth, are the same
    for all.

    Args:
        spec: a specification, see :mod:`.runs`.
        option: of the method, such as ``num_clusters``.
        values: to try.
        folder: where the results go.
        seeds: fits of each value, from seed 0.
        root: folder of the image files.
        progress: show progress bars.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Returns:
        one record a value: ``value``, ``bound`` and ``bound_sd`` over seeds in nats per datum,
        ``clusters_used``, ``stability`` and ``stability_sd`` over pairs of seeds (None for one
        seed, or without a finite site y).

    Raises:
        ValueError: the option is unknown, no value is given, or the folder is of another sweep.
    """
    accepted = method(spec["method"]).options
    if option not in accepted:
        raise ValueError(
            f"{spec['method']} has no option {option!r} (options: {', '.join(accepted)})"
        )
    if not values or seeds < 1:
        raise ValueError(f"expected values and seeds, got {list(values)} and {seeds}")
    for value in values:
        runs.check_options(spec["method"], {option: value})
    path = inside(folder, "sweep.json")
    picture = inside(folder, "sweep.png")
    inside(folder, "sweep.partial")
    plan = {"spec": json.loads(json.dumps(spec)), "option": option}
    fits = _stored(path, plan) if path.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        keys = {f"{json.dumps(value)} seed {seed}": seed for seed in range(seeds)}
        if missing := {key: seed for key, seed in keys.items() if key not in fits}:
            found = _fit(spec, option, value, list(missing.values()), root, progress, device)
            fits |= dict(zip(missing, found, strict=True))
            write_json(path, {**plan, "fits": fits, "summary": []})
    records = [
        _record(v, [fits[f"{json.dumps(v)} seed {s}"] for s in range(seeds)]) for v in values
    ]
    write_json(path, {**plan, "fits": fits, "summary": records})
    draw(records, option).savefig(picture, dpi=150)
    return records


def _stored(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The fits that a folder already has."""
    stored = read_json(path)
    if any(stored.get(key) != plan[key] for key in plan):
        raise ValueError(f"{path} is of another sweep; choose another folder")
    fits = stored.get("fits")
    if not isinstance(fits, dict) or not all(map(_is_fit, fits.values())):
        raise ValueError(f"{path} is damaged: 'fits' is no object of bounds and clusters")
    return fits


def _is_fit(fit: Any) -> bool:
    clusters = fit.get("clusters", []) if isinstance(fit, dict) else None
    return (
        isinstance(clusters, list)
        and all(type(k) is int for k in clusters)
        and isinstance(fit.get("bound"), float)
    )


def best(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record with the best held-out bound."""
    return max(records, key=lambda record: record["bound"])


def _fit(
    spec: runs.Spec,
    option: str,
    value: Any,
    seeds: Sequence[int],
    root: str | None,
    show: bool,
    device: str,
) -> list[dict[str, Any]]:
    """Fit some seeds, small models all at once; gives held-out bound and clusters of each."""
    whole = make_task(spec["data"], spec["method"], 0, root)
    order = np.random.default_rng(0).permutation(len(whole.train))
    count = max(1, round(HELD_OUT * len(order)))
    held, rest = whole.train[np.sort(order[:count])], whole.train[np.sort(order[count:])]
    task = Task(
        rest, whole.labels[np.sort(order[count:])], held, whole.labels[np.sort(order[:count])],
        schema=whole.schema, likelihoods=whole.likelihoods,
    )  # fmt: skip
    chosen = runs.with_overrides(spec, options={option: value})
    models = {seed: runs.make_model(chosen, task, seed) for seed in seeds}
    model = models[seeds[0]]
    if isinstance(clusters := model.options.get("num_clusters"), int):
        check_clusters(clusters, len(rest))
    start = spec.get("start") if model.start is not None else None
    settings = {"device": device, **spec.get("fit", {})}

    def pretrain(seed: int, *_: Any) -> None:
        if (begin := models[seed].start) is not None:
            where = {name: settings[name] for name in ("compile", "device") if name in settings}
            begin(rest, seed=seed, progress=show, **where, **(start or {}))

    if {*model.settings, *settings} <= inspect.signature(fit_seeds).parameters.keys():
        results = fit_seeds(
            lambda seed: (models[seed].program, models[seed].guide), rest, seeds=seeds,
            objective=model.objective, start=pretrain, progress=show, title=spec["method"],
            **{**model.settings, **settings},
        )  # fmt: skip
    else:
        results = [
            m.fit(rest, seed=seed, progress=show, start=start, **settings)
            for seed, m in models.items()
        ]
    return [_figures(result, held) for result in results]


def _figures(result: Result, held: Batch) -> dict[str, Any]:
    found: dict[str, Any] = {"bound": result.evaluate(held, PARTICLES)["bound"]}
    if any(line.startswith("y: ") for line in result.sites):
        found["clusters"] = result.responsibilities(held, seed=0).argmax(1).tolist()
    return found


def _record(value: Any, fits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    bounds = [fit["bound"] for fit in fits]
    clusters = [fit["clusters"] for fit in fits if "clusters" in fit]
    agree = [adjusted_rand_score(a, b) for a, b in itertools.combinations(clusters, 2)]
    return {
        "value": value,
        "bound": statistics.fmean(bounds),
        "bound_sd": statistics.stdev(bounds) if len(bounds) > 1 else None,
        "clusters_used": statistics.fmean(len(set(c)) for c in clusters) if clusters else None,
        "stability": statistics.fmean(agree) if agree else None,
        "stability_sd": statistics.stdev(agree) if len(agree) > 1 else None,
    }


def draw(records: Sequence[dict[str, Any]], option: str) -> Figure:
    """Held-out bound and stability against the value."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    places, names = range(len(records)), [str(r["value"]) for r in records]
    for axes, key, label in (
        (left, "bound", "held-out bound, nats per datum"),
        (right, "stability", "stability, adjusted Rand index"),
    ):
        middle = [np.nan if r[key] is None else r[key] for r in records]
        spread = [r[f"{key}_sd"] or 0.0 for r in records]
        axes.errorbar(places, middle, spread, color=plots.ACCENT, marker="o", ms=4, capsize=2)
        axes.set_xticks(places, names)
        axes.set_xlabel(option.replace("_", " "))
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    right.set_ylim(-0.05, 1.05)
    return figure
