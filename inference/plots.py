"""Pictures of a fitted model: arrays in, a :class:`matplotlib.figure.Figure` out.

Every function stands alone and can be called in a notebook, which shows the figure that it returns.
Nothing here touches pyplot, and so no state is shared.  :func:`png` renders a figure on a transparent
ground, in ink for light or for dark pages.  ``N`` is the number of rows, ``K`` that of groups.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

Array = NDArray[Any]

INK, MUTED, FAINT = "#2b303b", "#6b7280", "#d5d9e0"
DARK = {INK: "#e6e8ec", MUTED: "#a3a9b5", FAINT: "#3d424d"}  # the same, on a dark page
ACCENT, SECOND = "#3f7fbf", "#e07b00"
COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
    "#a96b59", "#e76300", "#b9ac70", "#5b5f69", "#92dadd",
    "#1a7f5a", "#e377c2", "#17306e", "#8fbf3f", "#c9a0dc",
    "#6b4c00", "#00b3a4", "#f2b5a7", "#4d7ea8", "#7a0c3a",
)  # fmt: skip
"""Colours of groups; the first ten are M. A. Petroff's, made for the colour-blind (2021)."""

SEQUENTIAL = LinearSegmentedColormap.from_list("ink", [(*(0.25, 0.5, 0.75), a) for a in (0, 1)])
DIVERGING = LinearSegmentedColormap.from_list(
    "two inks", [(0.13, 0.4, 0.7, 1), (0.6, 0.6, 0.6, 0), (0.85, 0.45, 0, 1)]
)


def curves(history: Sequence[Mapping[str, float]], kept: int | None = None) -> Figure:
    """Draw the bound and each of its terms against the epoch, held-out values beside them.

    Args:
        history: one record an epoch, as in :class:`pyrozoo.inference.Result`.
        kept: the epoch whose parameters were kept, marked by a line.
    """
    skip = ("epoch", "loss", "seconds", "bound")
    found = [n for n in history[-1] if n not in skip and not n.startswith("val_")]
    names = ["bound", *found]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    fig = Figure(figsize=(3.1 * columns, 2.1 * rows + 0.1), layout="constrained")
    for i, name in enumerate(names):
        ax = _axes(fig, rows, columns, i + 1, title=name if name == "bound" else f"term of {name}")
        for key, colour, style in ((name, ACCENT, "-"), (f"val_{name}", SECOND, "--")):
            points = [(r["epoch"], r[key]) for r in history if key in r]
            if points:
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
    fig.supxlabel("epoch", fontsize=8.5, color=MUTED)
    fig.supylabel("nats per datum", fontsize=8.5, color=MUTED)
    return fig


def image_rows(
    rows: Sequence[tuple[str, Array]], limits: tuple[float, float] = (0, 1), height: float = 0.46
) -> Figure:
    """Draw rows of small pictures, each row with a heading at its left.

    Args:
        rows: headings with images ``(n, channels, height, width)``; one channel is drawn in grey,
            three in colour, and of any other number the mean.
        limits: the values shown as black and as white.
        height: of one picture, in inches.
    """
    tall, wide = rows[0][1].shape[-2:]
    pad = max(1, tall // 8)
    count = max(len(images) for _, images in rows)
    board = np.zeros((len(rows) * (tall + pad), count * (wide + pad), 4))  # transparent between them
    for i, (_, images) in enumerate(rows):
        for j, image in enumerate(images):
            y, x = i * (tall + pad), j * (wide + pad)
            board[y : y + tall, x : x + wide, :3] = _pixels(image, limits)
            board[y : y + tall, x : x + wide, 3] = 1
    board = board[:-pad, :-pad]
    scale = height / tall * min(1, 7.5 / (height / tall * board.shape[1]))
    heads = [_short(text, 28) for text, _ in rows]
    left, (h, w) = 0.078 * max(map(len, heads)) + 0.2, board.shape[:2]
    size = (left + w * scale, h * scale)
    fig = Figure(figsize=size)
    ax = fig.add_axes((left / size[0], 0, 1 - left / size[0], 1))
    _style(ax, frame=False)
    ax.imshow(board, aspect="auto")
    ax.set_xticks([])
    ax.set_yticks([i * (tall + pad) + (tall - 1) / 2 for i in range(len(rows))], heads, fontsize=8.5)
    return fig


def heat_map(
    values: Array,
    row_names: Sequence[str],
    column_names: Sequence[str] = (),
    labels: tuple[str, str, str] = ("", "", ""),
    *,
    counts: bool = False,
) -> Figure:
    """Draw a matrix in colour.

    Args:
        values: ``(rows, columns)``; signed, shown around zero, unless they are ``counts``, which are
            coloured by their share of the row and written into the cells where there is room.
        row_names, column_names: of the ticks.
        labels: what the rows, the columns and the colours are.
    """
    height = 0.9 + 0.3 * len(values)
    wide = max(4.5, min(9.2, 1.5 + 0.31 * values.shape[1]))
    fig = Figure(figsize=(wide, min(max(height, 2.2), 9)), layout="constrained")
    ax = _axes(fig, frame=False)
    top = 1.0 if counts else float(np.abs(values).max()) or 1.0
    shown = values / np.maximum(values.sum(1, keepdims=True), 1) if counts else values
    low, cmap = (0.0, SEQUENTIAL) if counts else (-top, DIVERGING)
    mesh = ax.imshow(
        shown, cmap=cmap, vmin=low, vmax=top, aspect="auto", interpolation="nearest"
    )
    if counts and values.shape[1] <= 25 and len(values) <= 25:
        for (i, j), value in np.ndenumerate(values):
            colour = "white" if shown[i, j] > 0.55 else INK if value else MUTED
            ax.text(j, i, f"{value:d}" if value else "·", ha="center", va="center", fontsize=7.5,
                    color=colour)  # fmt: skip
    if not counts:
        bar = fig.colorbar(mesh, ax=ax, pad=0.01, aspect=30)
        bar.outline.set_visible(False)  # type: ignore[operator]
        _style(bar.ax, frame=False)
        bar.set_label(labels[2], fontsize=8.5, color=MUTED)
    if len(row_names) <= 40:
        ax.set_yticks(range(len(row_names)), [_short(n) for n in row_names])
    if column_names and len(column_names) <= 40:
        turn = 60 if max(len(_short(n)) for n in column_names) > 3 else 0
        ax.set_xticks(range(len(column_names)), [_short(n) for n in column_names], rotation=turn)
    _label(ax, labels[1], labels[0])
    return fig


def codes(
    points: Array,
    groupings: Sequence[tuple[str, Array, Mapping[int, str], Mapping[int, str]]],
    axis_names: Sequence[str],
) -> Figure:
    """Draw codes, side by side once for each grouping: dots in two dimensions, else histograms.

    Args:
        points: ``(N, 1)`` or ``(N, 2)``.
        groupings: title, group of each point ``(N,)``, names and colours of the groups.
        axis_names: one for each column of ``points``.
    """
    count = len(groupings)
    fig = Figure(figsize=(4.6 * count, 4.2 if points.shape[1] > 1 else 2.8), layout="constrained")
    for i, (title, ids, names, colours) in enumerate(groupings):
        ax = _axes(fig, 1, count, i + 1, title=title)
        groups = [g for g in names if (ids == g).any()]
        _label(ax, axis_names[0], axis_names[1] if points.shape[1] > 1 else "rows")
        if points.shape[1] == 1:
            parts = [points[ids == g, 0] for g in groups]
            shades = [colours[g] for g in groups]
            ax.hist(parts, bins=40, stacked=True, color=shades, label=[_short(names[g]) for g in groups])
            if 1 < len(groups) <= 20:
                ax.legend(frameon=False, fontsize=7, labelcolor=INK)
            continue
        shade = [colours.get(int(g), MUTED) for g in ids]
        size = float(np.clip(6000 / len(points), 5, 40))
        ax.scatter(*points.T, s=size, c=shade, alpha=0.8, linewidths=0)
        for g in groups if 1 < len(groups) <= 30 else ():
            x, y = np.median(points[ids == g], axis=0)
            box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": colours[g], "alpha": 0.85}
            ax.text(x, y, _short(names[g], 12), fontsize=8, color="black", ha="center", va="center",
                    bbox=box)  # fmt: skip
    return fig


def sizes(
    shares: Array, confidence: Array, names: Sequence[str], colours: Sequence[str]
) -> Figure:
    """Draw the share of rows in each cluster, and how sure the model is of the rows in it.

    Args:
        shares: ``(K,)``, from 0 to 1.
        confidence: mean probability of the cluster among its rows, ``(K,)``, NaN where it has none.
        names, colours: of the clusters.
    """
    fig = Figure(figsize=(4.5, max(2.0, 0.9 + 0.3 * len(shares))), layout="constrained")
    where = np.arange(len(shares))
    left = _axes(fig, 1, 2, 1, title="share of rows")
    left.barh(where, shares, color=list(colours), height=0.65)
    left.set_yticks(where, [_short(n) for n in names])
    right = _axes(fig, 1, 2, 2, title="mean confidence")
    right.scatter(confidence, where, c=list(colours), s=34)
    right.set_xlim(0, 1.04)
    right.set_yticks(where, [""] * len(where))
    for ax in (left, right):
        ax.set_ylim(len(shares) - 0.4, -0.6)
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
    used = np.unique(bins)
    x = [sure[bins == b].mean() for b in used]
    y = [right[bins == b].mean() for b in used]
    share = np.array([(bins == b).mean() for b in used])
    fig = Figure(figsize=(4.5, 3.9), layout="constrained")
    ax = _axes(fig)
    ax.plot([0, 1], [0, 1], color=MUTED, lw=0.9, ls="--")
    ax.plot(x, y, color=ACCENT, lw=1)
    ax.scatter(x, y, s=20 + 400 * share, color=ACCENT, alpha=0.75, linewidths=0)
    ax.set(xlim=(-0.02, 1.05), ylim=(-0.02, 1.05))
    _label(ax, "mean probability of the predicted label", "share of predictions that are right")
    ax.grid(True, color=FAINT, lw=0.6)
    return fig


def agreement(observed: Array, rebuilt: Mapping[str, Array]) -> Figure:
    """Draw rebuilt values against observed ones, entry by entry, one panel for each entry of ``rebuilt``."""
    fig = Figure(figsize=(4.5 * len(rebuilt), 3.9), layout="constrained")
    pick = np.random.default_rng(0).permutation(observed.size)[:3000]
    x = observed.reshape(-1)[pick]
    for i, (title, values) in enumerate(rebuilt.items()):
        ax = _axes(fig, 1, len(rebuilt), i + 1, title=title)
        ax.axline((float(x.mean()),) * 2, slope=1, color=MUTED, lw=0.9, ls="--")
        ax.scatter(x, values.reshape(-1)[pick], s=6, color=ACCENT, alpha=0.4, linewidths=0)
        _label(ax, "observed", "mean under the model")
    return fig


def png(fig: Figure, dark: bool = False, dpi: int = 200) -> bytes:
    """Render on a transparent ground; with ``dark`` the figure's own inks are exchanged first."""
    if dark:
        for ax in fig.axes:
            ax.tick_params(which="both", colors=DARK[MUTED], grid_color=DARK[FAINT])
            for spine in ax.spines.values():
                spine.set_edgecolor(DARK[FAINT])
        for artist in fig.findobj(lambda a: isinstance(a, Text | Line2D)):
            old = to_hex(artist.get_color())  # type: ignore[attr-defined]
            artist.set_color(DARK.get(old, old))  # type: ignore[attr-defined]
    FigureCanvasAgg(fig)
    file = io.BytesIO()
    with warnings.catch_warnings():  # letters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph")
        fig.savefig(file, format="png", dpi=dpi, transparent=True, pil_kwargs={"optimize": True})
    return file.getvalue()


def _axes(
    fig: Figure, rows: int = 1, columns: int = 1, index: int = 1, title: str = "", frame: bool = True
) -> Any:
    ax = fig.add_subplot(rows, columns, index)
    _style(ax, frame)
    ax.set_title(_short(title, 60), fontsize=9.5, color=INK, loc="left")
    return ax


def _style(ax: Any, frame: bool) -> None:
    ax.tick_params(which="both", colors=MUTED, labelsize=8, length=2.5 if frame else 0)
    for side, spine in ax.spines.items():
        spine.set_visible(frame and side in ("left", "bottom"))
        spine.set_edgecolor(FAINT)
    ax.set_facecolor("none")


def _label(ax: Any, x: str, y: str) -> None:
    ax.set_xlabel(x, fontsize=8.5, color=MUTED)
    ax.set_ylabel(y, fontsize=8.5, color=MUTED)


def _short(text: str, length: int = 18) -> str:
    """At most so many letters, and dollars that do not begin a formula."""
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.replace("$", r"\$")


def _pixels(image: Array, limits: tuple[float, float]) -> Array:
    low, high = limits
    unit = np.clip((image - low) / ((high - low) or 1), 0, 1)
    unit = unit if len(unit) == 3 else unit.mean(0, keepdims=True).repeat(3, 0)
    return unit.transpose(1, 2, 0)
