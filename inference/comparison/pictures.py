"""Pictures of a comparison: a curve, a bar or a panel for each guide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter
from scipy.ndimage import gaussian_filter

from pyrozoo.inference.reports.plots import (
    COLOURS,
    FAINT,
    INK,
    MUTED,
    SECOND,
    Figure,
    add_axes,
    label_axes,
)

MOST = 6  # panels in a row of them
REACH = 1.5  # k-hat, at the right of the picture

Cells = Mapping[str, Any]


def all_of(cells: Cells, target: float = math.nan) -> Iterator[tuple[str, str, Figure]]:
    """Kind, title and figure of every picture that the cells allow."""
    if any(c.measures.reference for c in cells.values()):
        yield "draws", "Draws against the posterior", draws(cells)
    if any(len(c.measures.bounds) > 1 for c in cells.values()):
        yield "bounds", "Importance weighted bounds", bounds(cells)
    if any(c.measures.khat is not None and len(c.measures.khat) > 1 for c in cells.values()):
        yield "khat", "Pareto k-hat of the rows", khat(cells)
    if any("approximation_gap" in c.measures.figures for c in cells.values()):
        yield "gaps", "Where the bound is lost", gaps(cells)
    if any(c.measures.calibration is not None for c in cells.values()):
        yield "ranks", "Simulation-based calibration", ranks(cells)
        yield "coverage", "Coverage of central intervals", coverage(cells)
    if any(_races(c) for c in cells.values()):
        yield "progress", "The bound in time", progress(cells, target)


def _races(cell: Any) -> bool:
    """Whether its history is one of a bound: that of a point mass is not."""
    return bool(cell.result.history) and "elbo" in cell.measures.figures


def colours(cells: Cells) -> dict[str, str]:
    """A colour for each guide."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(cells)}


def bounds(cells: Cells) -> Figure:
    """The importance weighted bound against the number of draws."""
    fig = Figure(figsize=(4.6, 3.6), layout="constrained")
    ax = add_axes(fig)
    for name, colour in colours(cells).items():
        found = cells[name].measures
        if found.bounds:
            k = sorted(found.bounds)
            value, error = zip(*(found.bounds[i] for i in k), strict=True)
            ax.errorbar(
                k,
                value,
                yerr=np.nan_to_num(error),
                color=colour,
                label=name,
                marker="o",
                ms=3,
                lw=1.2,
            )
    exact = [c.measures.figures["log_evidence"] for c in cells.values()
             if "log_evidence" in c.measures.figures]  # fmt: skip
    if exact:
        ax.axhline(exact[0], color=MUTED, ls="--", lw=0.9, label="evidence")
    ax.set_xscale("log")
    label_axes(ax, "draws", "nats per datum")
    _legend(ax)
    return fig


def khat(cells: Cells) -> Figure:
    """The distribution function of k-hat over rows."""
    fig = Figure(figsize=(4.6, 3.6), layout="constrained")
    ax = add_axes(fig)
    for name, colour in colours(cells).items():
        values = cells[name].measures.khat
        if values is not None and len(values) > 1:
            x = np.sort(np.nan_to_num(values.numpy(), nan=np.inf, posinf=np.inf, neginf=-np.inf))
            y = np.arange(1, len(x) + 1) / len(x)
            ax.step(x.clip(-0.5, REACH), y, where="post", color=colour, label=name, lw=1.4)
    ax.axvline(0.7, color=MUTED, ls="--", lw=0.9)
    ax.set_xlim(-0.5, REACH)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    label_axes(ax, "k-hat", "rows below")
    _legend(ax)
    return fig


def gaps(cells: Cells) -> Figure:
    """Approximation and amortisation gap, one bar a guide."""
    shown = [n for n in cells if "approximation_gap" in cells[n].measures.figures]
    fig = Figure(figsize=(4.6, max(1.9, 1.1 + 0.4 * len(shown))), layout="constrained")
    ax = add_axes(fig)
    figures = [cells[n].measures.figures for n in shown]
    family = np.array([max(0.0, f["approximation_gap"]) for f in figures])
    network = np.array([max(0.0, f.get("amortisation_gap", 0.0)) for f in figures])
    where = np.arange(len(shown))
    ax.barh(where, family, color=COLOURS[0], height=0.6, label="family")
    ax.barh(where, network, left=family, color=SECOND, height=0.6, label="network")
    ax.set_yticks(where, shown, color=INK)
    ax.invert_yaxis()
    label_axes(ax, "nats per datum", "")
    _legend(ax)
    return fig


def ranks(cells: Cells) -> Figure:
    """Rank distributions minus the uniform one, a panel for each guide."""
    shown = [n for n in cells if cells[n].measures.calibration is not None]
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    size = (4.6 if columns == 1 else 3.1 * columns, 2.5 * lines)
    fig = Figure(figsize=size, layout="constrained")
    shades = colours(cells)
    reach = 0.0
    panels = []
    for i, name in enumerate(shown):
        ax = add_axes(fig, (lines, columns, i + 1), name)
        found = cells[name].measures.calibration
        grid, low, high = found.bands()
        ax.fill_between(grid, low, high, color=FAINT, alpha=0.7, lw=0)
        for values in found.ecdf_differences(grid).values():
            for line in np.atleast_2d(values):
                ax.plot(grid, line, color=shades[name], lw=1)
                reach = max(reach, float(np.abs(line).max()))
        reach = max(reach, float(np.abs(high).max()))
        label_axes(ax, "rank of the true latent", "share, too many" if i % columns == 0 else "")
        panels.append(ax)
    for ax in panels:
        ax.set_ylim(-1.1 * reach, 1.1 * reach)
    return fig


def coverage(cells: Cells) -> Figure:
    """Empirical against nominal coverage."""
    fig = Figure(figsize=(4.6, 3.6), layout="constrained")
    ax = add_axes(fig)
    ax.plot([0, 1], [0, 1], color=MUTED, ls="--", lw=0.9)
    for name, colour in colours(cells).items():
        found = cells[name].measures.calibration
        if found is not None:
            ax.plot(found.levels, found.mean_coverage(), color=colour, label=name, lw=1.4)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    label_axes(ax, "claimed", "found")
    _legend(ax)
    return fig


def progress(cells: Cells, target: float = math.nan) -> Figure:
    """The bound of the training rows against seconds."""
    fig = Figure(figsize=(4.6, 3.6), layout="constrained")
    ax, lowest = add_axes(fig), []
    for name, colour in colours(cells).items():
        history = cells[name].result.history
        if _races(cells[name]):
            seconds = np.cumsum([r["seconds"] for r in history])
            values = np.array([r["bound"] for r in history])
            ax.plot(seconds, values, color=colour, label=name, lw=1.2)
            lowest.append(float(np.quantile(values, 0.1)))
            top = float(values.max())
            lowest.append(top - 3 * (top - float(np.median(values))) - 1e-3)
    if not math.isnan(target):
        ax.axhline(target, color=MUTED, ls=":", lw=0.9)
    ax.set_ylim(bottom=min(lowest))
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    label_axes(ax, "seconds", "nats per datum")
    _legend(ax)
    return fig


def draws(cells: Cells, row: int = 0) -> Figure:
    """Draws of each guide over draws from the posterior: of two dimensions, or of one."""
    shown = [n for n in cells if cells[n].measures.reference][:MOST]
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    fig = Figure(figsize=(9.6 if columns > 1 else 4.6, 3.0 * lines), layout="constrained")
    found = [cells[n].measures for n in shown]
    exact, heads = _coordinates(found[0].reference, found[0].shared, row)
    owns = [_coordinates(f.draws, f.shared, row)[0] for f in found]
    low, high = np.quantile(np.concatenate([exact, *owns]), [0.002, 0.998], axis=0)
    pad = 0.1 * (high - low) + 1e-6
    for i, (name, own) in enumerate(zip(shown, owns, strict=True)):
        ax = add_axes(fig, (lines, columns, i + 1), name)
        if exact.shape[1] > 1:
            _shade(ax, exact[:, :2], low[:2] - pad[:2], high[:2] + pad[:2])
            ax.scatter(*own[:, :2].T, s=5, color=SECOND, alpha=0.6, lw=0, label="guide")
            ax.set_ylim(low[1] - pad[1], high[1] + pad[1])
            label_axes(ax, heads[0], heads[1] if i % columns == 0 else "")
        else:
            edges = np.linspace(low[0] - pad[0], high[0] + pad[0], 40)
            ax.hist(exact[:, 0], edges, density=True, color=MUTED, alpha=0.5, label="posterior")
            ax.hist(own[:, 0], edges, density=True, histtype="step", color=SECOND, label="guide")
            label_axes(ax, heads[0], "density" if i % columns == 0 else "")
        ax.set_xlim(low[0] - pad[0], high[0] + pad[0])
        if i == 0:
            legend = ax.legend(loc="upper right", frameon=False, fontsize=7.5, labelcolor=INK)
            for mark in legend.legend_handles:
                mark.set(alpha=1.0, **({"sizes": [18]} if exact.shape[1] > 1 else {}))
    return fig


def _shade(ax: Any, points: Any, low: Any, high: Any, bins: int = 50) -> None:
    """Where the points are: areas that hold 95, 75, 50 and 25 % of them, ever darker."""
    ranges = list(zip(low, high, strict=True))
    counts, *edges = np.histogram2d(points[:, 0], points[:, 1], bins, ranges)
    density = gaussian_filter(counts, 1.5)
    centres = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    falling = np.sort(density.ravel())[::-1]
    share = falling.cumsum() / falling.sum()
    for held in (0.95, 0.75, 0.5, 0.25):
        level = min(falling[min(int((share < held).sum()), len(falling) - 1)], 0.99 * falling[0])
        ax.contourf(*centres, density.T, [level, np.inf], colors=[MUTED], alpha=0.25)
    ax.scatter([], [], s=18, color=MUTED, alpha=0.6, lw=0, label="posterior")


def _coordinates(values: Mapping[str, Any], shared: bool, row: int) -> tuple[Any, list[str]]:
    """Draws as columns ``(draws, columns)``, and their names; of one row where rows are apart."""
    columns, heads = [], []
    for name, value in values.items():
        if not value.is_floating_point():
            continue
        part = (value if shared else value[:, row]).reshape(len(value), -1)
        columns.append(part.double().cpu().numpy())
        count = part.shape[1]
        heads += [name] if count == 1 else [f"{name}[{j}]" for j in range(count)]
    if not columns:
        name, value = next(iter(values.items()))
        columns = [(value if shared else value[:, row]).reshape(len(value), -1).double().numpy()]
        heads = [f"{name}[{j}]" for j in range(columns[0].shape[1])]
    return np.concatenate(columns, 1), heads


def _legend(ax: Any) -> None:
    ax.legend(frameon=False, fontsize=7.5, labelcolor=INK)
