"""Pictures of what went on epoch by epoch: arrays in, a figure out, as :mod:`.plots`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FormatStrFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)
from sklearn.decomposition import PCA

from pyrozoo.inference.reports.plots import (
    ACCENT,
    COLOURS,
    FAINT,
    MUTED,
    SECOND,
    Array,
    Figure,
    add_axes,
    label_axes,
    shorten,
    style_axes,
)

COLUMNS, MOST, PICTURES = 3, 4, 8  # of panels; sites of a kind; pictures of a strip


def watched(
    history: Sequence[Mapping[str, float]],
    clusters: Mapping[str, int],
    dims: Mapping[str, int],
    shares: Mapping[str, Mapping[int, Array]] | None = None,
    colours: Mapping[str, Mapping[int, str]] | None = None,
    kept: int | None = None,
) -> Figure | None:
    """Draw clusters used, entropies, active units and gradient norms against the epoch.

    Args:
        history: one record an epoch; see :mod:`pyrozoo.inference.training.tracking`.
        clusters: finite latent site -> number of its values.
        dims: continuous latent site -> number of its dimensions.
        shares: finite site -> epoch -> share of rows of each cluster ``(K,)``.
        colours: finite site -> cluster -> colour.
        kept: the epoch whose parameters were kept, marked by a line.

    Returns:
        the figure, or None if the history has nothing of this.
    """
    now = history[-1] if history else {}
    finite = [n for n in clusters if f"used_{n}" in now][:MOST]
    latent = [n for n in dims if f"active_{n}" in now][:MOST]
    panels: list[tuple[str, str, str, float]] = []  # kind, site, title, top
    for n in finite:
        panels.append(("used", n, f"{n}: clusters used, of {clusters[n]}", clusters[n]))
        if shares and shares.get(n):
            panels.append(("share", n, f"{n}: share of rows in each cluster", 1.0))
        top = math.log(clusters[n])
        panels.append(("entropy", n, f"{n}: entropy of responsibilities", top))
    panels += [("active", n, f"{n}: active units, of {dims[n]}", dims[n]) for n in latent]
    panels += [("grad_norm", "", "norm of the gradient", math.nan)] if "grad_norm" in now else []
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig = Figure(figsize=(max(9.4 * columns / 3, 4.6), 2.15 * rows), layout="constrained")
    first, last = history[0]["epoch"], now["epoch"]
    for i, (kind, name, title, top) in enumerate(panels):
        ax = add_axes(fig, (rows, columns, i + 1), title)
        if kind == "share":
            assert shares is not None
            _stack(ax, shares[name], (colours or {}).get(name, {}))
        else:
            _line(ax, history, f"{kind}_{name}" if name else kind, kind, top)
        if kept is not None:
            ax.axvline(kept, color=MUTED, lw=0.8, ls=":")
        pad = 0.03 * (last - first) or 0.5
        ax.set_xlim(first - pad, last + pad)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        units = {"used": "clusters", "entropy": "nats per datum", "active": "dimensions"}
        bottom = i // columns == rows - 1
        label_axes(ax, "epoch" if bottom else "", units.get(kind, ""))
    return fig


def _line(ax: Any, history: Sequence[Mapping[str, float]], key: str, kind: str, top: float) -> None:
    """One figure against the epoch, below the most that it can be."""
    pairs = [(key, ACCENT, "-", "mean"), ("grad_norm_max", SECOND, "--", "largest step")]
    for name, colour, style, label in pairs if kind == "grad_norm" else pairs[:1]:
        points = [(r["epoch"], r[name]) for r in history if name in r]
        mark = "o" if len(points) < 3 else ""
        ax.plot(*zip(*points, strict=True), style, color=colour, marker=mark, label=label)
    if kind == "grad_norm":
        values = [r["grad_norm_max"] for r in history if "grad_norm_max" in r]
        if all(0 < v < math.inf for v in values):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.legend(frameon=False, fontsize=8, labelcolor=MUTED)
    else:
        ax.axhline(top, color=MUTED, lw=0.9, ls="--")
        ax.set_ylim(-0.04 * top, 1.08 * top)
        if kind == "entropy":
            ax.yaxis.set_major_locator(MaxNLocator(4))
        else:
            ax.set_yticks(sorted({0, round(top / 2), round(top)}))
    ax.grid(True, axis="y", color=FAINT, lw=0.6)


def _stack(ax: Any, by_epoch: Mapping[int, Array], colours: Mapping[int, str]) -> None:
    """Shares on top of each other, the largest at the bottom."""
    table = np.stack([np.asarray(v) for v in by_epoch.values()])
    epochs = np.array(list(by_epoch), float)
    if len(epochs) == 1:  # an area needs two
        epochs, table = np.array([epochs[0] - 0.4, epochs[0] + 0.4]), np.repeat(table, 2, 0)
    order = np.argsort(-table[-1], kind="stable")
    shades = [colours.get(k, COLOURS[k % len(COLOURS)]) for k in order.tolist()]
    ax.stackplot(epochs, table[:, order].T, colors=shades, linewidth=0.3, edgecolor="white")
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def strip(
    codes: Mapping[int, Array],
    groups: Mapping[int, Array],
    names: Mapping[int, str],
    colours: Mapping[int, str],
    site: str,
) -> Figure:
    """Draw the codes of some epochs as a strip of small pictures with the same axes.

    With more than two dimensions they are projected onto the two principal components of the last
    epoch, so that nothing moves but the codes.

    Args:
        codes: epoch -> ``(n, D)``, NaN in rows to leave out; at most ``PICTURES`` are drawn.
        groups: epoch -> group of each row ``(n,)``; what is in no group is grey.
        names, colours: of the groups.
        site: whose codes they are.
    """
    chosen = sorted(codes)
    if len(chosen) > PICTURES:
        places = np.linspace(0, len(chosen) - 1, PICTURES).round().astype(int)
        chosen = [chosen[i] for i in places]
    flat, axes = _projected([np.asarray(codes[e], float) for e in chosen], site)
    columns = next((n for n in (5, 4, 3) if len(chosen) % n == 0), min(4, len(chosen)))
    rows = math.ceil(len(chosen) / columns)
    fig = Figure(
        figsize=(min(max(2.3 * columns, 4.6), 9.6), 2.25 * rows + 0.5), layout="constrained"
    )
    known = np.concatenate(flat)
    known = known[~np.isnan(known).any(1)]
    limits = [_limits(known[:, i]) for i in range(known.shape[1])] if len(known) else []
    for i, (epoch, points) in enumerate(zip(chosen, flat, strict=True)):
        ax = fig.add_subplot(rows, columns, i + 1)
        style_axes(ax, frame=False)
        for spine in ax.spines.values():
            spine.set_visible(True)
        ax.set_title(f"epoch {epoch}", fontsize=9, color=MUTED, loc="left", pad=4)
        ax.set_xticks([])
        ax.set_yticks([])
        here = ~np.isnan(points).any(1)
        shades = np.array([colours.get(g, "#94a4a2") for g in groups[epoch].tolist()])[here]
        if points.shape[1] == 1:
            jitter = np.random.default_rng(0).uniform(0, 1, len(points))[:, None]
            points = np.concatenate([points, jitter], 1)
        dot = float(np.clip(2500 / max(len(points), 1), 3, 14))
        ax.scatter(points[here, 0], points[here, 1], s=dot, c=shades, alpha=0.8, linewidths=0)
        if limits:
            ax.set_xlim(limits[0])
            ax.set_ylim(limits[1] if len(limits) > 1 else (-0.1, 1.1))
    present = np.unique(np.concatenate([groups[e] for e in chosen]))
    shown = [g for g in names if g in present]
    if 1 < len(shown) <= 20:
        dots = [Line2D([], [], ls="", marker="o", ms=5, color=colours[g]) for g in shown]
        fig.legend(
            dots, [shorten(names[g], 14) for g in shown], loc="outside upper center", frameon=False,
            ncols=min(10, len(shown)), fontsize=8, labelcolor=MUTED, handletextpad=0.1,
            columnspacing=1.2,
        )  # fmt: skip
    fig.supxlabel(axes[0], fontsize=8.5, color=MUTED)
    if len(axes) > 1:
        fig.supylabel(axes[1], fontsize=8.5, color=MUTED)
    return fig


def _projected(codes: Sequence[Array], site: str) -> tuple[list[Array], list[str]]:
    """Codes in one or two dimensions, and what the axes are."""
    width, last = codes[-1].shape[1], codes[-1][~np.isnan(codes[-1]).any(1)]
    if width <= 2 or len(last) < 2:
        return [c[:, :2] for c in codes], [f"{site}[{i}]" for i in range(min(width, 2))]
    with np.errstate(invalid="ignore", divide="ignore"):  # where all codes are the same
        pca = PCA(2, svd_solver="full").fit(last)
    parts = np.nan_to_num(pca.explained_variance_ratio_)
    flat = [(c - pca.mean_) @ pca.components_.T for c in codes]
    return flat, [f"component {i + 1} of {site}, {v:.0%} of variance" for i, v in enumerate(parts)]


def _limits(values: Array) -> tuple[float, float]:
    """All but a thousandth at each end, with a margin."""
    low, high = np.quantile(values, [0.001, 0.999])
    pad = 0.06 * (high - low) or 0.5
    return float(low - pad), float(high + pad)
