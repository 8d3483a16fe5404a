"""What a run says of new rows, and rows that it generates, as arrays or as a data frame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyrozoo.inference import Batch, EnumELBO
from pyrozoo.inference.graph import read_graph
from pyrozoo.inference.modes import seeded
from pyrozoo.inference.reading import read_count
from pyrozoo.zoo.folders import Run
from pyrozoo.zoo.tables import Source

Array = NDArray[Any]
ENTRIES = 20_000_000  # of draws that are held at a time
MAX_VALUE = 2**31 - 1  # of a finite site that is given


def predict(
    run: Run, data: Batch, *, num_samples: int = 200, level: float = 0.9, seed: int = 0
) -> dict[str, Any]:
    """Everything that a fitted model says of rows.

    Args:
        run: a run folder that was read.
        data: the rows; a label y that they bring is kept as certain.
        num_samples: draws of the posterior for what is filled in, by importance where no latent
            site is shared by all rows.
        level: of the intervals.
        seed: of the draws.

    Returns:
        by name, rows first: ``y``, the most probable cluster or label, and ``p_y``, ``(rows, K)``,
        where there is one; ``z`` (and so on), posterior means of latent sites; ``bound``, a lower
        bound of the log-evidence in nats per row; for every site with missing entries
        ``<site>_filled``, ``<site>_lower`` and ``<site>_upper``: data frames for a table, else
        arrays.  A finite site has the most probable value, and no interval.

    Raises:
        ValueError: the data do not fit the program or have no rows, or the level is no share.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is a share between 0 and 1, got {level}")
    num_samples = read_count("num_samples", num_samples)
    if len(data) == 0:
        raise ValueError("there are no rows to predict")
    result = run.result
    found: dict[str, Any] = {}
    if run.finite:
        probabilities = result.responsibilities(data, seed=seed).cpu().numpy()
        found |= {"y": probabilities.argmax(1), "p_y": probabilities}
    graph = read_graph(result.program, data[:2])
    for name, site in graph.sites.items():
        plain = site.kind == "sample" and site.continuous and set(site.dims) == {"data"}
        if plain and graph.descendants(name) and name not in data:
            found[name] = result.predict(data, name, seed=seed).cpu().numpy()
    objective = EnumELBO(10, kl="sampled", split=False, inputs=result.inputs)
    with torch.no_grad(), seeded(seed):
        slices = [data[i : i + 1024] for i in range(0, len(data), 1024)]
        bounds = [objective.per_row(result.program, result.guide, part) for part in slices]
    found["bound"] = torch.cat(bounds).cpu().numpy()
    leaves = [
        n for n, s in graph.sites.items()
        if s.kind == "sample" and s.local and not graph.descendants(n)
        and not (n == "y" and run.finite)
    ]  # fmt: skip
    importance = all(s.local for s in graph.sites.values() if s.kind == "sample")
    for name in leaves:
        site, whole = graph.sites[name], name in data and not data.partly(name)
        if not whole and site.summable and len(site.dims) == 1:
            likeliest = result.responsibilities(data, name, seed=seed).argmax(1)
            found[f"{name}_filled"] = likeliest.cpu().numpy()
        elif not whole:
            width = site.event_shape.numel()
            parts = [
                _filled(run, part, name, num_samples, level, seed, importance)
                for part in _slices(data, max(1, ENTRIES // (num_samples * width)))
            ]
            for i, kind in enumerate(("filled", "lower", "upper")):
                found[f"{name}_{kind}"] = _join([part[i] for part in parts])
    return found


def read_arrays(run: Run, source: Source) -> Batch:
    """Arrays by site as rows of a run that was trained on arrays.

    Args:
        run: a run folder that was read.
        source: what :func:`pyrozoo.zoo.tables.load` returned; NaN is missing, and -1 in ``y``.

    Raises:
        ValueError: an array has another shape than in training.
    """
    entries: dict[str, tuple[Array, Array | None]] = dict(source.pixels)
    for site, columns in source.views.items():
        value = source.frame[list(columns)].to_numpy(np.float64, na_value=np.nan)
        entries[site] = np.where(np.isnan(value), 0.0, value), ~np.isnan(value)
    if source.has("y"):
        labels = source.column("y").fillna(-1).to_numpy(np.int64)
        entries["y"] = labels.clip(0), labels >= 0
    found: dict[str, Any] = {}
    for site, (value, known) in entries.items():
        shape = tuple(run.facts["shapes"].get(site, value.shape[1:]))
        if math.prod(value.shape[1:]) != math.prod(shape):
            raise ValueError(
                f"{source.where}: {site!r} has rows of shape {value.shape[1:]}, expected {shape}"
            )
        value = value.reshape(len(value), *shape)
        if known is not None and known.ndim > 1:
            known = known.reshape(len(value), *shape)
        found[site] = value if known is None else (value, known)
    return Batch.of(found, len(source))


def _slices(data: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    import pandas as pd

    return pd.concat(parts, ignore_index=True)


def _filled(
    run: Run, data: Batch, name: str, num_samples: int, level: float, seed: int, importance: bool
) -> tuple[Any, Any, Any]:
    """Known entries as they are; others as posterior mean (or likeliest level) and interval."""
    draws = run.result.posterior(
        data, num_samples, predictive=True, importance=importance, batch_size=len(data), seed=seed
    )[name].cpu()
    draws = draws if draws.is_floating_point() else draws.float()
    value = data[name].cpu() if name in data else torch.zeros(draws.shape[1:])
    present = data.present(name).cpu()
    present = present.reshape(present.shape + (1,) * (value.dim() - present.dim()))
    known = present.expand(value.shape)
    if _has_columns(run, name):
        whole = run.schema.summarise(name, draws, (value, known.numpy()), level)
        return whole.value, whole.lower, whole.upper
    low, high = ((1 - level) / 2, (1 + level) / 2)
    middle = [draws.mean(0), torch.quantile(draws, low, 0), torch.quantile(draws, high, 0)]
    filled, lower, upper = (torch.where(known, value, m).numpy() for m in middle)
    return filled, lower, upper


def sample(
    run: Run, rows: int, *, given: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, Array]:
    """Rows that the program generates, by site: latent sites and data.

    Args:
        run: a run folder that was read.
        rows: how many.
        given: values of finite sites (``{"y": 3}``), else they are drawn too.
        seed: of the draws.

    Raises:
        ValueError: a site or a value is unknown.
    """
    rows = read_count("rows", rows)
    for name, value in (given or {}).items():
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_VALUE:
            raise ValueError(f"{name}={value!r}: the value of a finite site is a whole number")
    fixed = {name: torch.full((rows,), value) for name, value in (given or {}).items()}
    batch = Batch.of(fixed, rows)
    draws = run.result.posterior(batch, predictive=True, seed=seed, batch_size=rows)
    local = {n: v[0].cpu().numpy() for n, v in draws.items() if v.dim() > 1 and v.shape[1] == rows}
    return {**{n: v.numpy() for n, v in fixed.items()}, **local}


def to_frame(run: Run, found: Mapping[str, Any], index: Any = None) -> Any:
    """Arrays and frames by name as one data frame: ``z[0]``, ``p(y=3)``, ``alcohol_lower``.

    The columns of a table keep their names and levels, a label its name and levels.
    """
    import pandas as pd

    pieces = []
    for name, value in found.items():
        kind = name.rpartition("_")[2]
        if isinstance(value, pd.DataFrame):
            pieces.append(value if kind == "filled" else value.add_suffix(f"_{kind}"))
        elif _has_columns(run, name):
            pieces.append(run.schema.decode(name, value))
        elif name == "y":
            names = _names(run)
            label = [names[k] if k < len(names) else k for k in value] if names else value
            pieces.append(pd.DataFrame({"y": label}))
        elif name == "p_y":
            names = _names(run)
            heads = [f"p(y={names[k] if k < len(names) else k})" for k in range(value.shape[1])]
            pieces.append(pd.DataFrame(value, columns=heads))
        elif value.ndim == 1:
            pieces.append(pd.DataFrame({name: value}))
        else:
            flat = value.reshape(len(value), -1)
            heads = [f"{name}[{i}]" for i in range(flat.shape[1])]
            pieces.append(pd.DataFrame(flat, columns=heads))
    frame = pd.concat(pieces, axis=1)
    if index is not None:
        frame.index = index
    return frame


def _has_columns(run: Run, name: str) -> bool:
    sites = run.schema.sites if run.schema is not None else ()
    return any(site.name == name and site.columns for site in sites)


def _names(run: Run) -> list[str]:
    """The labels' names, if y is a label; clusters are numbers."""
    return list(run.facts["label_names"]) if run.supervised else []
