"""What a report looks at: a fitted pair, rows of data and what else is known about them.

:class:`View` checks the arguments of :func:`.report.write` once and holds what its pictures share:
the responsibilities, names and colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pyrozoo.inference import metrics
from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.graph import read_graph
from pyrozoo.inference.reports.diagnosis import Finding, diagnose
from pyrozoo.inference.reports.plots import COLOURS
from pyrozoo.inference.training.result import Result
from pyrozoo.inference.training.tracking import ROWS, Tracker

Array = NDArray[Any]

MAX_SITES, MAX_POINTS = 6, 3000


class View:
    """A fitted pair, rows and what is known of them, as given to :func:`.report.write`."""

    def __init__(
        self,
        result: Result,
        data: Data,
        labels: Any,
        label_names: Any,
        images: Mapping[str, tuple[int, int, int]],
        cluster: str | None,
        classes: bool,
        track: Tracker | None = None,
    ) -> None:
        nets = [net for net in (result.program, result.guide) if isinstance(net, nn.Module)]
        device = next((p.device for net in nets for p in net.parameters()), None)
        self.result, self.images, self.classes = result, images, classes
        self.track = track
        self.columns: dict[str, Sequence[str]] = {}  # names of the columns of a site
        self.batch = Batch.of(data).to(device)
        if len(self.batch) == 0:
            raise ValueError("there are no rows to report on")
        graph = read_graph(result.program, self.batch[:2])
        local = {n: s for n, s in graph.sites.items() if s.kind == "sample" and s.local}
        self.inner = {n: s for n, s in local.items() if graph.descendants(n)}
        self.leaves = {n: s for n, s in local.items() if n not in self.inner}
        for name, shape in images.items():
            site = self.leaves[_known("images", name, self.leaves)]
            if site.row_shape.numel() != math.prod(shape):
                found = tuple(site.row_shape)
                raise ValueError(
                    f"images: a row of {name!r} has shape {found}, which is not {shape}"
                )
        finite = [n for n, s in local.items() if s.summable and len(s.dims) == 1]
        now = result.history[-1] if result.history else {}
        watched = [n for n in finite if f"used_{n}" in now]
        self.finite = {n: len(local[n].fn.enumerate_support(expand=False)) for n in watched}
        self.dims = {
            n: s.row_shape.numel()
            for n, s in self.inner.items()
            if s.continuous and not s.fixed and n not in self.batch
        }
        latent = [n for n in finite if n in self.inner]
        self.cluster = latent[0] if cluster is None and len(latent) == 1 else cluster
        if self.cluster is not None:
            _known("cluster", self.cluster, finite)
        self.labels = None if labels is None else np.asarray(torch.as_tensor(labels).cpu())
        if self.labels is not None and self.labels.shape != (len(self.batch),):
            found = self.labels.shape
            raise ValueError(
                f"expected labels of shape ({len(self.batch)},), one a row, got {found}"
            )
        if classes and (self.cluster is None or self.labels is None):
            raise ValueError("classes=True needs labels, and the finite site that predicts them")
        self.word = "class" if classes else "cluster"
        record = result.history[-1] if result.history else {}
        self.kept = result.best_epoch if "val_bound" in record else None
        self.hidden = self.batch  # without the values of the cluster, so that it is predicted
        self.clusters: list[int] = []
        if self.cluster is not None:
            self.hidden = self.batch.drop(self.cluster)
            self.probs = _numpy(result.responsibilities(self.hidden, self.cluster, seed=0))
            self.found = self.probs.argmax(1)
            self.clusters = list(range(self.probs.shape[1]))
            self.shares = np.bincount(self.found, minlength=len(self.clusters)) / len(self.found)
        self._name(label_names)

    def _name(self, given: Any) -> None:
        """Names and colours; a cluster has the colour of the label that it is matched with."""
        names = dict(given) if isinstance(given, Mapping) else dict(enumerate(given or ()))
        present = [] if self.labels is None else np.unique(self.labels).tolist()
        self.label_names = {v: str(names.get(v, v)) for v in present}
        self.label_colours = {v: COLOURS[i % 20] for i, v in enumerate(present)}
        self.names = {k: str(names.get(k, k)) if self.classes else str(k) for k in self.clusters}
        self.heads = dict(self.names)
        self.matched: dict[int, int] = {}
        if self.labels is not None and self.classes:
            self.matched = {k: k for k in self.clusters if k in self.label_names}
        elif self.labels is not None and self.clusters:
            self.matched = metrics.match_clusters(self.labels, self.found)
            for k in np.unique(self.found).tolist():
                values, counts = np.unique(self.labels[self.found == k], return_counts=True)
                self.heads[k] += f" · mostly {self.label_names[values[counts.argmax()]]}"
        taken = [self.label_colours[v] for v in self.matched.values()]
        free = [c for c in COLOURS if c not in taken] or list(COLOURS)
        rest = [k for k in self.clusters if k not in self.matched]
        self.colours = {k: self.label_colours[v] for k, v in self.matched.items()}
        self.colours |= {k: free[i % len(free)] for i, k in enumerate(rest)}

    @property
    def watched_rows(self) -> int:
        """How many training rows were watched in the fit."""
        return min(ROWS, self.result.objective.num_rows or len(self.batch))

    def findings(self) -> list[Finding]:
        """What looks wrong in the history."""
        rows = self.watched_rows
        return diagnose(self.result.history, self.finite, self.dims, rows=rows, kept=self.kept)

    def scores(self) -> dict[str, float]:
        """The figures of the page, as :func:`.report.write` returns them."""
        records = {int(r["epoch"]): r for r in self.result.history}
        record = records.get(self.kept or self.result.epoch, {})
        scores: dict[str, float] = {n: record[n] for n in ("bound", "val_bound") if n in record}
        if self.cluster is None:
            return scores
        scores["mean_confidence"] = float(self.probs.max(1).mean())
        if self.labels is None:
            return scores | {"clusters_used": float(metrics.clusters_used(self.probs))}
        scores |= metrics.clustering_report(self.labels, self.probs)
        if self.classes:
            scores["accuracy"] = metrics.accuracy(self.labels, self.found)
            unseen = ~self.batch.present(self.cluster).cpu().numpy()
            if unseen.any() and not unseen.all():
                found = metrics.accuracy(self.labels[unseen], self.found[unseen])
                scores["accuracy_where_hidden"] = found
            scores["calibration_error"] = metrics.calibration_error(self.probs, self.labels)
        return scores

    def generate(self, batch: Batch) -> dict[str, Array]:
        """The mean of every leaf at one draw of everything above it."""
        batch = batch.to(self.batch.device)
        drawn = self.result.posterior(batch, predictive=True)
        above = {n: drawn[n][0] for n, s in self.inner.items() if not s.fixed}
        given = {n: batch[n] for n in batch.names} | above
        whole = Batch.of(given, len(batch))
        return {n: self.predict(whole, n, num_samples=1) for n in list(self.leaves)[:MAX_SITES]}

    def predict(self, batch: Batch, name: str, **options: Any) -> Array:
        """What the pair expects at a site, ``(rows, columns)``."""
        found = self.result.predict(batch, name, **options)
        return _numpy(found.reshape(len(found), -1))

    def observed(self, name: str, rows: Array) -> Array:
        """The values of a site in some rows, ``(rows, columns)``: NaN where missing."""
        some = self.batch[rows]
        if name not in some:
            return np.zeros((len(rows), 0))
        value, known = some[name], some.present(name)
        known = known.reshape(known.shape + (1,) * (value.dim() - known.dim())).expand_as(value)
        found = np.where(_numpy(known) > 0, _numpy(value), math.nan)
        return found.reshape(len(rows), -1)

    def choose(self, count: int, name: str = "") -> Array:
        """Rows at random, among those that know a site; with labels in order, evenly."""
        known = np.arange(len(self.batch))
        if name:
            known = known[_numpy(self.batch.present(name).reshape(len(known), -1).any(1)) > 0]
        rows = np.random.default_rng(0).permutation(known)
        if self.labels is None or not len(rows):
            return rows[:count]
        rows = rows[np.argsort(self.labels[rows], kind="stable")]
        return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]

    def limits(self, name: str) -> tuple[float, float]:
        """What is black and what is white: zero and one, unless the data go beyond."""
        values = self.observed(name, self.choose(MAX_POINTS))
        values = values[~np.isnan(values)]
        if not values.size or (values.min() >= 0 and values.max() <= 1):
            return 0.0, 1.0
        return float(values.min()), float(values.max())


def _numpy(values: torch.Tensor) -> Array:
    return values.detach().double().cpu().numpy()


def _known(argument: str, name: str, names: Iterable[str]) -> str:
    if name not in names:
        near = get_close_matches(name, list(names), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(names) or "none"
        raise ValueError(f"{argument}: no such site {name!r} (sites that fit: {known}){hint}")
    return name
