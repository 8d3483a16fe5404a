"""Pictures of a fitted model: arrays in, a :class:`matplotlib.figure.Figure` out.

Every function can be called in a notebook, which shows the figure that it returns.  Nothing here
touches pyplot, so that no state is shared.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from pyrozoo.inference.training.tracking import is_watched

Array = NDArray[Any]

INK, MUTED, FAINT = "#2b303b", "#6b7280", "#d5d9e0"
ACCENT, SECOND = "#3f7fbf", "#e07b00"
COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300",
    "#b9ac70", "#717581", "#92dadd", "#1a7f5a", "#e377c2", "#4455c4", "#8fbf3f",
    "#c9a0dc", "#8f6a10", "#00b3a4", "#f2b5a7", "#4d7ea8", "#b0306a",
)  # fmt: skip
"""Colours of groups; the first ten are M. A. Petroff's (2021), made for the colour-blind."""

COUNTS = LinearSegmentedColormap.from_list("counts", [(0.25, 0.5, 0.75, a) for a in (0, 1)])
BLUE, NOTHING, ORANGE = (0.13, 0.4, 0.7, 1), (0.6, 0.6, 0.6, 0), (0.85, 0.45, 0, 1)
SIGNED = LinearSegmentedColormap.from_list("signed", [BLUE, NOTHING, ORANGE])


class Figure(figure.Figure):
    """A figure that a notebook shows, whether pyplot is at work there or not."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        FigureCanvasAgg(self).print_png(file)
        return file.getvalue()


def curves(history: Sequence[Mapping[str, float]], kept: int | None = None) -> Figure:
    """Draw the bound and each of its terms against the epoch, with held-out values beside them.

    Args:
        history: one record an epoch, as in :class:`pyrozoo.inference.Result`.
        kept: the epoch whose parameters were kept, marked by a line.
    """
    names = ["bound", *terms_of(history[-1])]
    columns = 4 if len(names) in (4, 7, 8) else min(3, len(names))
    rows = math.ceil(len(names) / columns)
    fig = Figure(figsize=(min(9.4, 3.6 * columns), 2.3 * rows), layout="constrained")
    for i, name in enumerate(names):
        ax = add_axes(fig, (rows, columns, i + 1), f"term of {name}" if i else name)
        for key, colour, style in ((name, ACCENT, "-"), (f"val_{name}", SECOND, "--")):
            if points := [(r["epoch"], r[key]) for r in history if key in r]:
                label = "held out" if key.startswith("val_") else "training rows"
                mark = "o" if len(points) < 3 else ""
                ax.plot(*zip(*points, strict=True), style, color=colour, marker=mark, label=label)
        if kept is not None:
            ax.axvline(kept, color=MUTED, lw=0.8, ls=":")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.grid(True, axis="y", color=FAINT, lw=0.6)
        if i == 0 and f"val_{name}" in history[-1]:
            ax.legend(frameon=False, fontsize=8, labelcolor=MUTED)
        label_axes(ax, "epoch", "" if i % columns else "nats per datum")
    return fig


def terms_of(record: Mapping[str, float]) -> list[str]:
    """The entries of a record that are terms of the bound."""
    others = ("epoch", "loss", "seconds", "bound")
    names = [n for n in record if n not in others and not n.startswith("val_")]
    return [n for n in names if not is_watched(n, record)]


def image_rows(
    rows: Sequence[tuple[str, Array]], limits: tuple[float, float] = (0, 1), height: float = 0.46
) -> Figure:
    """Draw rows of small pictures, each row with a heading at its left.

    Args:
        rows: headings with images ``(n, channels, height, width)``; three channels are drawn in
            colour, any other number as their mean, in grey; NaN is half grey.
        limits: the values shown as black and as white.
        height: of one picture, in inches.
    """
    tall, wide = rows[0][1].shape[-2:]
    pad, count = max(1, tall // 8), max(len(images) for _, images in rows)
    board = np.zeros((len(rows) * (tall + pad), count * (wide + pad), 4))  # transparent
    for i, (_, images) in enumerate(rows):
        for j, image in enumerate(images):
            y, x = i * (tall + pad), j * (wide + pad)
            unit = np.clip((image - limits[0]) / ((limits[1] - limits[0]) or 1), 0, 1)
            unit = np.nan_to_num(unit if len(unit) == 3 else unit.mean(0)[None], nan=0.5)
            board[y : y + tall, x : x + wide, :3] = unit.transpose(1, 2, 0)
            board[y : y + tall, x : x + wide, 3] = 1
    board = board[:-pad, :-pad]
    heads = [shorten(text, 28) for text, _ in rows]
    left, scale = 0.078 * max(map(len, heads)) + 0.2, min(height / tall, 7 / board.shape[1])
    width, depth = left + board.shape[1] * scale, board.shape[0] * scale
    fig = Figure(figsize=(width, depth))
    ax = fig.add_axes((left / width, 0, 1 - left / width, 1))
    style_axes(ax, frame=False)
    ax.imshow(board, aspect="auto")
    ax.set_xticks([])
    middles = [i * (tall + pad) + (tall - 1) / 2 for i in range(len(rows))]
    ax.set_yticks(middles, heads, fontsize=8.5, color=INK)
    return fig


def heat_map(
    values: Array, rows: Sequence[str], columns: Sequence[str] = (), labels: Sequence[str] = "   "
) -> Figure:
    """Draw a matrix in colour.

    Args:
        values: ``(rows, columns)``.  Integers are counts: coloured by their share of the row, and
            written into the cells where there is room.  Others are shown around zero.
        rows, columns: names of the ticks.
        labels: what the rows, the columns and the colours are.
    """
    counts = values.dtype.kind in "iu"
    names = [shorten(n) for n in columns] if len(columns) <= 40 else []
    slanted = max(map(len, names), default=0) > 3
    width, depth = 1.5 + 0.31 * values.shape[1], 0.9 + 0.3 * len(values) + slanted
    fig = Figure(figsize=(np.clip(width, 4.5, 9.2), np.clip(depth, 2.2, 9)), layout="constrained")
    ax = add_axes(fig, frame=False)
    shown = values / np.maximum(values.sum(1, keepdims=True), 1) if counts else values
    top = 1.0 if counts else float(np.abs(values).max()) or 1.0
    cmap, low = (COUNTS, 0.0) if counts else (SIGNED, -top)
    mesh = ax.imshow(shown, cmap, aspect="auto", vmin=low, vmax=top, interpolation="nearest")
    for (i, j), value in np.ndenumerate(values) if counts and max(values.shape) <= 25 else ():
        colour = "white" if shown[i, j] > 0.55 else INK if value else MUTED
        ax.text(j, i, str(value or "·"), ha="center", va="center", fontsize=7.5, color=colour)
    if not counts:
        bar = fig.colorbar(mesh, ax=ax, pad=0.01, aspect=30)
        style_axes(bar.ax, frame=False)
        bar.set_label(labels[2], fontsize=8.5, color=MUTED)
    if len(rows) <= 40:
        ax.set_yticks(range(len(rows)), [shorten(n, 28) for n in rows])
    if names:
        turned: Any = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        ax.set_xticks(range(len(names)), names, **turned)
    label_axes(ax, labels[1], labels[0])
    return fig


def codes(
    points: Array,
    groupings: Sequence[tuple[str, Array, Mapping[int, str], Mapping[int, str]]],
    axes: Sequence[str],
) -> Figure:
    """Draw codes once for each grouping, side by side: dots in two dimensions, else histograms.

    Args:
        points: ``(N, 1)`` or ``(N, 2)``.
        groupings: title, group of each point ``(N,)``, names and colours of the groups.
        axes: names of the columns of ``points``.
    """
    flat, count = points.shape[1] > 1, len(groupings)
    size = (4.6 * count if count > 1 else 6.4, 4.2 if flat else 2.8)
    fig = Figure(figsize=size, layout="constrained")
    for i, (title, ids, names, colours) in enumerate(groupings):
        ax = add_axes(fig, (1, count, i + 1), title)
        label_axes(ax, axes[0], axes[1] if flat else "rows")
        groups = [g for g in names if (ids == g).any()]
        if flat:
            dot = float(np.clip(6000 / len(points), 5, 40))
            ax.scatter(*points.T, s=dot, c=[colours[g] for g in ids], alpha=0.8, linewidths=0)
        else:
            parts, shades = [points[ids == g, 0] for g in groups], [colours[g] for g in groups]
            heads = [shorten(names[g]) for g in groups]
            ax.hist(parts, bins=40, stacked=True, color=shades, label=heads)
        if not flat and 1 < len(groups) <= 20:
            ax.legend(loc="upper right", frameon=False, fontsize=7, labelcolor=INK)
        for g in groups if flat and 1 < len(groups) <= 30 else ():
            x, y = np.median(points[ids == g], axis=0)
            box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": colours[g], "alpha": 0.85}
            ax.text(x, y, shorten(names[g], 12), fontsize=8, ha="center", va="center", bbox=box)
    return fig


def sizes(shares: Array, sure: Array, names: Sequence[str], colours: Sequence[str]) -> Figure:
    """Draw the share of rows in each cluster, and how sure the model is of them.

    Args:
        shares: ``(K,)``, from 0 to 1.
        sure: mean probability of the cluster among its rows, ``(K,)``, NaN where there are none.
        names, colours: of the clusters.
    """
    fig = Figure(figsize=(4.5, max(2.0, 0.9 + 0.3 * len(shares))), layout="constrained")
    where = np.arange(len(shares))
    left, right = (
        add_axes(fig, (1, 2, 1), "share of rows"),
        add_axes(fig, (1, 2, 2), "mean confidence"),
    )
    left.barh(where, shares, color=colours, height=0.65)
    right.scatter(sure, where, c=colours, s=34)
    right.set_xlim(0, 1.04)
    for ax, ticks in ((left, [shorten(n) for n in names]), (right, [""] * len(names))):
        ax.set_ylim(len(shares) - 0.4, -0.6)
        ax.set_yticks(where, ticks)
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.grid(True, axis="x", color=FAINT, lw=0.6)
        ax.set_axisbelow(True)
    return fig


def reliability(probabilities: Array, labels: Array, num_bins: int = 15) -> Figure:
    """Draw how often the most probable label is right against its probability, bin by bin.

    Args:
        probabilities: of the labels 0 to ``K - 1``, ``(N, K)``.
        labels: true labels, ``(N,)``.
        num_bins: of equal width, as in :func:`.metrics.calibration_error`.
    """
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], sure, side="left")
    inside = (bins == np.unique(bins)[:, None]).astype(float)
    x, y, share = inside @ sure / inside.sum(1), inside @ right / inside.sum(1), inside.mean(1)
    fig = Figure(figsize=(4.5, 3.9), layout="constrained")
    ax = add_axes(fig)
    ax.plot([0, 1], [0, 1], color=MUTED, lw=0.9, ls="--")
    ax.plot(x, y, color=ACCENT, lw=1)
    ax.scatter(x, y, s=20 + 400 * share, color=ACCENT, alpha=0.75, linewidths=0)
    ax.grid(True, color=FAINT, lw=0.6)
    label_axes(ax, "mean probability of the predicted label", "share of predictions that are right")
    return fig


def agreement(observed: Array, rebuilt: Mapping[str, Array], scaled: bool = False) -> Figure:
    """Draw rebuilt values against observed ones that are not NaN, one panel per title.

    With ``scaled`` every column is shown in its standard deviations from its mean.
    """
    unit = ""
    if scaled:
        with warnings.catch_warnings():  # columns without any value
            warnings.simplefilter("ignore", RuntimeWarning)
            middle, spread = np.nanmean(observed, 0), np.nanstd(observed, 0)
        spread = np.where(spread > 0, spread, 1.0)
        observed = (observed - middle) / spread
        rebuilt = {title: (values - middle) / spread for title, values in rebuilt.items()}
        unit = ", sd of the column"
    fig = Figure(figsize=(4.5 * len(rebuilt), 3.9), layout="constrained")
    pick = np.random.default_rng(0).permutation(np.flatnonzero(~np.isnan(observed)))[:3000]
    x = observed.reshape(-1)[pick]
    for i, (title, values) in enumerate(rebuilt.items()):
        ax = add_axes(fig, (1, len(rebuilt), i + 1), title)
        ax.plot([x.min(), x.max()], [x.min(), x.max()], color=MUTED, lw=0.9, ls="--")
        ax.scatter(x, values.reshape(-1)[pick], s=6, color=ACCENT, alpha=0.4, linewidths=0)
        label_axes(ax, "observed" + unit, "mean under the model" + unit)
    return fig


def add_axes(
    fig: Figure, place: Sequence[int] = (1, 1, 1), title: str = "", frame: bool = True
) -> Any:
    """Axes in the style of all pictures, with or without a frame."""
    ax = fig.add_subplot(*place)
    style_axes(ax, frame)
    ax.set_title(shorten(title, 60), fontsize=9.5, color=INK, loc="left")
    return ax


def style_axes(ax: Any, frame: bool) -> None:
    """Quiet ticks, and lines on the left and below or none."""
    ax.tick_params(which="both", colors=MUTED, labelsize=8, length=2.5 if frame else 0)
    for side, spine in ax.spines.items():
        spine.set_visible(frame and side in ("left", "bottom"))
        spine.set_edgecolor(FAINT)
    ax.set_facecolor("none")


def label_axes(ax: Any, x: str, y: str) -> None:
    """Name both axes."""
    ax.set_xlabel(x, fontsize=8.5, color=MUTED)
    ax.set_ylabel(y, fontsize=8.5, color=MUTED)


def shorten(text: str, length: int = 18) -> str:
    """At most so many letters, on one line, without anything that would start a formula."""
    text = " ".join(text.split())
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")
