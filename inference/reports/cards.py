"""The pictures of a report.  Each function returns the cards that a view allows, perhaps none."""

from __future__ import annotations

import base64
import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from sklearn.decomposition import PCA

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.reports import epochs, plots
from pyrozoo.inference.reports.view import MAX_POINTS, View

MAX_CLUSTERS, NUM_DRAWS = 20, 12
DPI = 200  # twice what is shown, for fine screens

DARK = {plots.INK: "#e6e8ec", plots.MUTED: "#a3a9b5", plots.FAINT: "#3d424d"}


@dataclass
class Card:
    """A picture with its title; ``kind`` chooses the words that explain it."""

    kind: str
    title: str
    figure: Figure

    @property
    def width(self) -> int:
        """In CSS pixels."""
        return round(self.figure.get_figwidth() * 100)

    def address(self, dark: bool = False) -> str:
        """The picture itself as a ``data:`` address."""
        return "data:image/png;base64," + base64.b64encode(png(self.figure, dark)).decode()


def curves(view: View) -> list[Card]:
    """The bound and its terms against the epoch."""
    if not view.result.history:
        return []
    return [Card("curves", "What training did", plots.curves(view.result.history, view.kept))]


def watched(view: View) -> list[Card]:
    """Clusters, latents and gradients against the epoch."""
    track, history = view.track, view.result.history
    shares = {} if track is None else track.shares
    numbers = {n: {e: v.numpy() for e, v in by.items()} for n, by in shares.items()}
    colours = {view.cluster: view.colours} if view.cluster is not None else {}
    figure = epochs.watched(history, view.finite, view.dims, numbers, colours, view.kept)
    return [] if figure is None else [Card("watched", "Clusters and latents over time", figure)]


def strip(view: View) -> list[Card]:
    """The codes of some rows, epoch by epoch."""
    track = view.track
    if track is None or not track.codes:
        return []
    codes = {epoch: values.numpy() for epoch, values in track.codes.items()}
    groups = {epoch: np.full(len(track.rows), -1) for epoch in codes}
    names, colours, by = {}, {}, ""
    if track.labels is not None and view.labels is not None and bool((track.labels >= 0).all()):
        names, colours, by = view.label_names, view.label_colours, ", by label"
        groups = dict.fromkeys(codes, track.labels.numpy())
    elif (found := track.found.get(view.cluster or "")) is not None and set(found) >= set(codes):
        names, colours, by = view.names, view.colours, ", by cluster"
        groups = {epoch: found[epoch].numpy() for epoch in codes}
    figure = epochs.strip(codes, groups, names, colours, track.site)
    return [Card("strip", f"How {track.site} came to be{by}", figure)]


def samples(view: View) -> list[Card]:
    """What the program generates: given each cluster, or from its prior."""
    by_cluster = view.cluster in view.inner and not view.inner[view.cluster].parents
    groups, heads = list(range(6)), [""] * 6
    if by_cluster:
        groups = sorted(np.argsort(-view.shares, kind="stable")[:MAX_CLUSTERS].tolist())
        heads = [f"{view.heads[k]} · {view.shares[k]:.1%}" for k in groups]
    count = NUM_DRAWS if view.images else 50 if by_cluster else 1
    rows = torch.arange(len(groups) * count, device=view.batch.device)
    given = {
        n: view.batch[n][rows % len(view.batch)] for n in view.result.inputs if n in view.batch
    }
    if by_cluster and view.cluster:
        fn = view.inner[view.cluster].fn
        values = fn.enumerate_support(expand=False).flatten(0, len(fn.batch_shape))
        given[view.cluster] = values[np.repeat(groups, count)]
    cards = []
    for name, drawn in view.generate(Batch.of(given, len(rows))).items():
        title = f"Samples of each {view.word}" if by_cluster else "Samples"
        title += f": {name}" if len(view.leaves) > 1 else ""
        kind = "" if by_cluster else "_prior"
        if name in view.images:
            pictures = drawn.reshape(len(groups), count, *view.images[name])
            figure = plots.image_rows(list(zip(heads, pictures, strict=True)), view.limits(name))
            cards.append(Card("samples" + kind, title, figure))
        elif not view.images:
            known = view.observed(name, view.choose(MAX_POINTS, name))
            if known.shape[1:] != drawn.shape[1:]:
                continue
            with warnings.catch_warnings():  # columns without any value
                warnings.simplefilter("ignore", RuntimeWarning)
                centre, spread = np.nanmean(known, 0), np.nanstd(known, 0)
            spread[~(spread > 0)] = 1
            mean = drawn.reshape(len(groups), count, -1).mean(1)
            ticks = [h or f"draw {i + 1}" for i, h in enumerate(heads)]
            labels = ("", f"columns of {name}", "standard deviations")
            profile = np.nan_to_num((mean - centre) / spread)
            figure = plots.heat_map(profile, ticks, view.columns.get(name, ()), labels)
            cards.append(Card("profiles" + kind, title, figure))
    return cards


def rebuilt(view: View) -> list[Card]:
    """What was observed, beside what the model makes of it."""
    cards = []
    sites = [n for n in view.leaves if n in view.batch and n != view.cluster]
    for name in sites:
        rows = view.choose(NUM_DRAWS if name in view.images else 500, name)
        some = view.hidden[rows]
        parts = {"observed": view.observed(name, rows), "rebuilt": view.predict(some, name)}
        if len({values.shape for values in parts.values()}) > 1:
            continue  # such as labels, whose prediction is probabilities
        if len(sites) > 1:
            parts["from the others"] = view.predict(some, name, observed="ignore")
        title = "Rebuilding the data" if len(sites) == 1 else f"Rebuilding {name}"
        if name in view.images:
            shape = view.images[name]
            shown = [(head, values.reshape(-1, *shape)) for head, values in parts.items()]
            cards.append(Card("rebuilt", title, plots.image_rows(shown, view.limits(name))))
        else:
            figure = plots.agreement(parts.pop("observed"), parts, name in view.columns)
            cards.append(Card("agreement", title, figure))
    return cards


def codes(view: View) -> list[Card]:
    """The posterior means of the first continuous latent site."""
    latent = [
        name
        for name, site in view.inner.items()
        if site.continuous and len(site.dims) == 1 and not site.fixed and name not in view.batch
    ]
    if not latent:
        return []
    name, rows = latent[0], view.choose(MAX_POINTS)
    points = view.predict(view.hidden[rows], name)
    axes = [f"{name}[{i}]" for i in range(points.shape[1])]
    if points.shape[1] > 2 and len(points) > 1:
        with np.errstate(invalid="ignore", divide="ignore"):  # where all codes are the same
            pca = PCA(2, svd_solver="full").fit(points)
        points, parts = pca.transform(points), np.nan_to_num(pca.explained_variance_ratio_)
        axes = [f"component {i + 1} of {name}, {v:.0%} of variance" for i, v in enumerate(parts)]
    groupings: list[Any] = []
    if view.cluster is not None:
        title = "by predicted class" if view.classes else "by cluster"
        groupings += [(title, view.found[rows], view.names, view.colours)]
    if view.labels is not None:
        groupings += [("by label", view.labels[rows], view.label_names, view.label_colours)]
    plain = ("", np.zeros(len(rows), int), {0: ""}, {0: plots.ACCENT})
    figure = plots.codes(points[:, :2], groupings or [plain], axes)
    return [Card("codes", f"Where the rows lie in {name}", figure)]


def groups(view: View) -> list[Card]:
    """Confusion, sizes and calibration of the clusters or classes."""
    if view.cluster is None:
        return []
    cards, largest = [], np.argsort(-view.shares, kind="stable").tolist()
    if view.labels is not None:
        order = sorted(view.matched, key=lambda k: view.matched[k])
        order += [k for k in largest if k not in view.matched]
        inside = view.found[:, None] == order
        counts = np.stack([inside[view.labels == v].sum(0) for v in view.label_names])
        rows, columns = list(view.label_names.values()), [view.names[k] for k in order]
        axes = ("label", f"predicted {view.word}" if view.classes else view.word, "")
        figure = plots.heat_map(counts, rows, columns, axes)
        title = "Labels against predictions" if view.classes else "Labels against clusters"
        cards.append(Card("classes" if view.classes else "confusion", title, figure))
    order = sorted(largest[: 2 * MAX_CLUSTERS])
    top = view.probs.max(1)
    sure = np.array([top[view.found == k].mean() if view.shares[k] else math.nan for k in order])
    names, colours = [view.names[k] for k in order], [view.colours[k] for k in order]
    figure = plots.sizes(view.shares[order], sure, names, colours)
    cards.append(Card("sizes", f"How large and how sure each {view.word} is", figure))
    if view.classes and view.labels is not None:
        figure = plots.reliability(view.probs, view.labels)
        cards.append(Card("reliability", "Whether its probabilities can be trusted", figure))
    return cards


def png(fig: Figure, dark: bool = False) -> bytes:
    """Render on a transparent ground; for a dark page the figure's inks are exchanged for good."""
    if dark:
        for ax in fig.axes:
            ax.tick_params(which="both", colors=DARK[plots.MUTED], grid_color=DARK[plots.FAINT])
            for spine in ax.spines.values():
                spine.set_edgecolor(DARK[plots.FAINT])
        artists: list[Any] = [*fig.findobj(Text), *fig.findobj(Line2D)]
        for artist in artists:
            old = to_hex(artist.get_color())
            artist.set_color(DARK.get(old, old))
    FigureCanvasAgg(fig)
    file = io.BytesIO()
    with warnings.catch_warnings():  # letters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph")
        fig.savefig(file, format="png", dpi=DPI, transparent=True)
    fig.set_layout_engine("none")  # keep the layout for a second rendering
    return file.getvalue()
