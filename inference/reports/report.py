"""A report: one self-contained HTML page about a fitted pair, for whoever has just trained it.

``write("report.html", result, data, labels=labels, images={"x": (1, 28, 28)})`` says what looks
wrong, draws what the pieces allow (curves, clusters and latents over time, samples of each cluster,
reconstructions, latents, confusion, sizes) and returns the figures that it shows.  Only the report
looks at the labels; values of the reported cluster that the data hold are hidden before it is
predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from pyrozoo.inference.batch import Data
from pyrozoo.inference.metrics import Array
from pyrozoo.inference.reports import cards as pictures
from pyrozoo.inference.reports.cards import Card
from pyrozoo.inference.reports.diagnosis import looked_at
from pyrozoo.inference.reports.view import View
from pyrozoo.inference.training.result import Record, Result
from pyrozoo.inference.training.tracking import Tracker, is_watched

HISTORY_ROWS = 9


def write(
    path: str | Path,
    result: Result,
    data: Data,
    *,
    labels: Array | None = None,
    label_names: Sequence[str] | Mapping[int, str] | None = None,
    images: Mapping[str, tuple[int, int, int]] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
    cluster: str | None = None,
    classes: bool = False,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    title: str = "",
    facts: Mapping[str, Any] | None = None,
    figures: Mapping[str, Figure] | None = None,
    track: Tracker | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Write the page, and return the figures that it shows.

    Args:
        path: the file to write.
        result: what :func:`.fit` returned.
        data: what was trained on, or other rows of the same sites.
        labels: true labels ``(rows,)``, for the report only.
        label_names: what each label is called: label -> name, or in order.
        images: site -> (channels, height, width), for sites that are pictures.
        columns: site -> names of its columns.
        cluster: the finite site to report; default: the only latent one if there is one, else none.
        classes: the values of that site are the labels themselves (a classifier): adds the accuracy
            and the calibration, and nothing is renamed.
        baselines: name -> metric -> value, shown beside this model.
        title: default: the name of the program.
        facts: what else to state: command, seed, versions.
        figures: title -> a figure of your own, shown on white.
        track: what a :class:`.Tracker` kept of the fit, for the pictures of its epochs; its
            ``labels``, if it has some, colour them.
        seed: of everything that is drawn.

    Returns:
        ``bound`` (and ``val_bound``) of the parameters that were kept; with a cluster also
        ``mean_confidence`` and ``clusters_used``; with labels all of
        :func:`.metrics.clustering_report`; with ``classes`` also ``accuracy``,
        ``calibration_error`` and, where the data hold part of the labels,
        ``accuracy_where_hidden``, of the other rows.

    Raises:
        ValueError: an argument does not fit the program or the data.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        view = View(result, data, labels, label_names, images or {}, cluster, classes, track)
        view.columns = dict(columns or {})
        scores = view.scores()
        draw = (
            pictures.curves,
            pictures.watched,
            pictures.strip,
            pictures.samples,
            pictures.rebuilt,
            pictures.codes,
            pictures.groups,
        )
        cards = [card for part in draw for card in part(view)]
    cards += [Card("extra", name, figure) for name, figure in (figures or {}).items()]
    nets = [net for net in (result.program, result.guide) if isinstance(net, nn.Module)]
    history = _some(result.history)
    page = render(
        "report.html",
        title=title or _name(result.program),
        program=_name(result.program),
        guide=_name(result.guide),
        view=view,
        result=result,
        scores=scores,
        cards=cards,
        wide=wide(cards),
        baselines=baselines or {},
        facts=facts or {},
        history=history,
        columns=[n for n in dict.fromkeys(k for r in history for k in r) if not _aside(n, history)],
        findings=view.findings(),
        looked_at=looked_at(result.history),
        parameters=sum({id(p): p.numel() for net in nets for p in net.parameters()}.values()),
        seconds=sum(record.get("seconds", 0.0) for record in result.history),
    )
    Path(path).write_text(page, "utf-8")
    return scores


def render(template: str, **values: Any) -> str:
    """A page from one of the templates in this folder, with the style that they share."""
    folder = files(__package__)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": _figure, "duration": _duration}
    text = folder.joinpath(template).read_text("utf-8")
    style = folder.joinpath("style.css").read_text("utf-8")
    return environment.from_string(text).render(style=style, **values)


def wide(cards: Sequence[Card]) -> list[Card]:
    """The pictures that take a whole line: large ones, and a small one without a neighbour."""
    small = [card for card in cards if card.width <= 500]
    lonely = small[-1:] if len(small) % 2 else []
    return [card for card in cards if card.width > 500 or card in lonely]


def _some(history: Sequence[Record]) -> list[Record]:
    """A few epochs: the first ones, the last one, and some between, ever farther apart."""
    if len(history) <= HISTORY_ROWS:
        return list(history)
    which = np.unique(np.geomspace(1, len(history), HISTORY_ROWS).round().astype(int) - 1)
    return [history[i] for i in which]


def _aside(name: str, history: Sequence[Record]) -> bool:
    return any(is_watched(name, record) for record in history)


def _name(net: Any) -> str:
    return getattr(net, "__name__", type(net).__name__)


def _figure(value: Any, name: str = "") -> str:
    """A number as people write it; a dash where there is none."""
    if not isinstance(value, int | float):
        return "\N{EN DASH}"
    if name in ("clusters_used", "epoch"):
        return f"{value:.0f}"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
