"""What is watched while a fit goes on, so that one sees afterwards when it went wrong.

A record of the history has, beside bound and terms, at the end of an epoch:

================== ===========================================================================
``used_<site>``    values of a finite latent site that some row names (its most probable one)
``largest_<site>`` share of the rows that name the most frequent of them
``entropy_<site>`` mean entropy of the responsibilities, nats per datum
``active_<site>``  active units: dimensions of a continuous latent site whose posterior mean has a
                   variance above 0.01 between rows
``grad_norm``      mean norm of the gradient over the steps of the epoch, before clipping
``grad_norm_max``  that of the largest step
================== ===========================================================================

All but the norms are read off the two traces that score the first 1000 training rows, over those
rows in which the site counts and is not known, with the same noise every time: nothing more is
computed, no parameter and no random state changes.  What is latent given another latent is looked
at given one draw of that.  A posterior without a closed mean has no active units.  A staged step on
a GPU with ``clip`` has no norm.

Source: active units are those of Burda, Grosse and Salakhutdinov, "Importance weighted
autoencoders" (2016).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.contract import add, by_row, expectations, sum_out
from pyrozoo.inference.bounds.elbo import EnumELBO, average
from pyrozoo.inference.bounds.kl import closed_form_sites
from pyrozoo.inference.bounds.runs import run, sample_sites
from pyrozoo.inference.bounds.terms import Terms, take_apart
from pyrozoo.inference.graph import DATA
from pyrozoo.inference.observing import Observed
from pyrozoo.inference.plan import Plan

ROWS = 1000  # of the training rows, the first
ACTIVE = 0.01  # variance of the posterior mean of a dimension that is used
WIDEST = 1024  # dimensions of a latent site that a tracker keeps

_NORMS = ("grad_norm", "grad_norm_max")
_KINDS = ("used", "largest", "entropy", "active")


def is_watched(name: str, record: Mapping[str, float]) -> bool:
    """Whether an entry of a record is described here, and is no term of the bound."""
    kind, _, site = name.partition("_")
    return name in _NORMS or (kind in _KINDS and site in record)


class Norms:
    """The norms of the gradients of an epoch, on their device: nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.largest, self.steps = self.total.clone(), 0

    def add(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Note the norm of ``.grad`` of all parameters together, and return it, a scalar."""
        norm = nn.utils.get_total_norm([x.grad for x in parameters if x.grad is not None])
        self.total += norm
        self.largest = torch.maximum(self.largest, norm.to(self.total))
        self.steps += 1
        return norm

    def figures(self) -> dict[str, float]:
        """Their mean and the largest, since the last call; nothing without steps."""
        total, largest, steps = float(self.total), float(self.largest), self.steps
        self.total.zero_()
        self.largest, self.steps = self.total.clone(), 0
        return {"grad_norm": total / steps, "grad_norm_max": largest} if steps else {}


class Watch:
    """What the traces of an evaluation say of the latent sites.

    Attributes:
        counted: site -> ``(rows,)``, where it counts and is not known.
        probs: finite site -> responsibilities ``(rows, K)``.
        means: continuous site -> posterior means ``(rows, D)``, else draws.
        drawn: sites whose ``means`` are draws.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        self.drawn: set[str] = set()

    def clear(self) -> None:
        """Forget everything: an evaluation begins anew."""
        self._parts, self.drawn = {}, set()

    counted = property(lambda self: self._joined("counted"))
    probs = property(lambda self: self._joined("probs"))
    means = property(lambda self: self._joined("means"))

    def terms(self, objective: EnumELBO, p: Observed, q: Observed, batch: Batch) -> dict[str, Any]:
        """``objective.terms(p, q, batch)``, draw for draw, with a look at its traces."""
        plan = p.pairing.plan(batch)
        objective._refuse(plan, "no value per term")
        reasons = closed_form_sites(plan, p, q, batch) if objective.kl == "closed" else {}
        closed = [name for name, reason in reasons.items() if not reason]
        found: list[dict[str, Tensor]] = []
        for one in objective.passes(p, batch):
            program, guide = (sample_sites(t) for t in run(p, q, batch, one.num_particles))
            terms = take_apart(plan, program, guide, len(batch), one.num_particles, closed)
            if not found:
                self._look(terms, guide, batch)
            found.append({name: t.mean(0) for name, t in terms.by_site().items()})
        return average(found)

    def _look(self, terms: Terms, guide: dict[str, Any], batch: Batch) -> None:
        plan = terms.plan
        for name, site in plan.program.sites.items():
            latent = plan.roles.get(name) in ("summed", "merged", "proposed")
            if site.kind != "sample" or list(site.dims) != [DATA] or not latent:
                continue
            found = None
            if site.summable and not site.event_shape:
                found = "probs", _probabilities(terms, name)
            elif site.continuous and name in guide:
                found = "means", self._mean(terms, guide[name], name)
            if found is not None and found[1] is not None:
                self._note("counted", name, _unknown(plan, name, batch))
                self._note(*(found[0], name, found[1]))

    def figures(self) -> dict[str, float]:
        """The entries of a record, see the module."""
        record: dict[str, float] = {}
        counted = self.counted
        for name, probs in self.probs.items():
            if len(some := probs[counted[name]].double()):
                sizes = some.argmax(1).bincount(minlength=some.shape[1])
                record[f"used_{name}"] = float((sizes > 0).sum())
                record[f"largest_{name}"] = float(sizes.max()) / len(some)
                record[f"entropy_{name}"] = float(torch.special.entr(some).sum(1).mean())
        for name, means in self.means.items():
            some = means[counted[name]].double()
            if len(some) and name not in self.drawn:
                record[f"active_{name}"] = float((some.var(0, correction=0) > ACTIVE).sum())
        return record

    def _mean(self, terms: Terms, site: Any, name: str) -> Tensor:
        """``(rows, D)``: the mean of a guide's site, over what the guide enumerates."""
        fn = site["fn"]
        try:
            mean = fn.mean
        except (NotImplementedError, AttributeError):
            mean = site["value"]
            self.drawn.add(name)
        plates = mean.shape[: mean.dim() - fn.event_dim]
        width = max(len(plates), -terms.data_dim, *(-d for d in terms.weight_dims.values()), 1)
        mean = mean.reshape((1,) * (width - len(plates)) + plates + (-1,))
        mean = terms.weigh(mean.movedim(-1, 0)).movedim((0, terms.data_dim), (-1, -2))
        return mean.reshape(-1, *mean.shape[-2:]).mean(0).expand(terms.rows, -1)

    def _note(self, kind: str, name: str, value: Tensor) -> None:
        self._parts.setdefault(f"{kind}.{name}", []).append(value.detach())

    def _joined(self, kind: str) -> dict[str, Tensor]:
        found = {k.partition("."): torch.cat(v) for k, v in self._parts.items()}
        return {name: x.cpu() for (of, _, name), x in found.items() if of == kind}


def _probabilities(terms: Terms, name: str) -> Tensor | None:
    """Responsibilities ``(rows, K)`` of a finite site at the draws; None if it was drawn itself."""
    if name in terms.names.values():
        dim = next(d for d, n in terms.names.items() if n == name)
        group = next(g for g in terms.groups if name in {f.name for f in g})
        _, weights = expectations(group, terms.sums, terms.plates)
        own = next(i for i, f in enumerate(group) if f.name == name)
        probs = terms.weigh(sum_out(weights[own], group[own].sums - {dim}))
    elif name in terms.weight_dims:
        dim = terms.weight_dims[name]
        dims, more = {dim}, {dim}
        while True:  # with the sites that it is proposed given
            used = [f for f in terms.weights if terms.weight_dims[f.name] in dims]
            more = dims.union(*(f.sums for f in used))
            if more == dims:
                break
            dims = more
        probs = sum_out(add(f.value for f in used).exp(), dims - {dim})
    else:
        return None
    return by_row(probs, terms.data_dim, dim, terms.rows)


def _unknown(plan: Plan, name: str, batch: Batch) -> Tensor:
    """Rows ``(rows,)`` in which a site counts and is not known."""
    known = batch.present(name).reshape(len(batch), -1).all(1)
    counts = torch.as_tensor(plan.counts(name, batch), device=known.device)
    return counts.reshape(-1).expand(len(batch)) & ~known


@dataclass
class Tracker:
    """Keeps what a page needs to show how latents came to be: ``fit(..., tracker=Tracker())``.

    Shares of clusters are kept of every epoch, codes and clusters of the rows of epochs 1, 2, 4, 8,
    .. and of the last.  After a resume it has the epochs that followed.

    Attributes:
        rows: numbers of the tracked rows in the data of the fit, ``(n,)``.
        labels: for a report to colour them by, ``(n,)``; set by whoever has some.
        shares: finite site -> epoch -> share of the rows of each cluster ``(K,)``.
        found: finite site -> epoch -> cluster of each row ``(n,)``, -1 where it is known.
        codes: epoch -> posterior means of the first continuous latent site ``(n, D)``.
        site: the name of that site ('' if there is none).
    """

    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    labels: Tensor | None = None
    shares: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    found: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    codes: dict[int, Tensor] = field(default_factory=dict)
    site: str = ""

    def note(self, epoch: int, rows: Tensor, watch: Watch) -> None:
        """Note an epoch of these rows, counted from one."""
        self.rows, counted = rows.cpu(), watch.counted
        for name, probs in watch.probs.items():
            found = torch.where(counted[name], probs.argmax(1), -1).int()
            sizes = found[counted[name]].bincount(minlength=probs.shape[1])
            self.shares.setdefault(name, {})[epoch] = sizes / sizes.sum().clamp(min=1)
            _keep(self.found.setdefault(name, {}), epoch, found)
        if means := watch.means:
            self.site = next(iter(means))
            codes = means[self.site][:, :WIDEST].float()
            _keep(self.codes, epoch, codes.where(counted[self.site][:, None], torch.nan))

    def pack(self) -> dict[str, Tensor]:
        """As tensors by name, for a file."""
        tensors = {"rows": self.rows} if self.labels is None else {
            "rows": self.rows, "labels": self.labels,
        }  # fmt: skip
        tables = {f"shares.{name}": by_epoch for name, by_epoch in self.shares.items()}
        tables |= {f"found.{name}": by_epoch for name, by_epoch in self.found.items()}
        tables |= {f"codes.{self.site}": self.codes} if self.codes else {}
        for name, by_epoch in tables.items():
            tensors[f"values.{name}"] = torch.stack(list(by_epoch.values()))
            tensors[f"epochs.{name}"] = torch.tensor(list(by_epoch))
        return tensors

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> Tracker:
        """Read what :meth:`pack` made.

        Raises:
            ValueError: something is missing, or its shapes or types do not fit.
        """
        rows, labels = tensors.get("rows"), tensors.get("labels")
        if rows is None or rows.dim() != 1 or rows.dtype != torch.int64:
            raise ValueError("what was tracked has no numbers of rows")
        if labels is not None and (labels.shape != rows.shape or labels.dtype != torch.int64):
            raise ValueError("what was tracked has no labels, one a row")
        new = cls(rows, labels)
        for key, values in tensors.items():
            if not key.startswith("values."):
                continue
            kind, _, name = key.removeprefix("values.").partition(".")
            epochs = tensors.get(f"epochs.{kind}.{name}")
            if not _fits(kind, values, epochs, len(rows)):
                raise ValueError(f"what was tracked of {name!r} ({kind}) is not as it was written")
            by_epoch = dict(zip(epochs.tolist(), values, strict=True)) if epochs is not None else {}
            if kind == "codes":
                new.codes, new.site = by_epoch, name
            else:
                (new.shares if kind == "shares" else new.found)[name] = by_epoch
        return new


def _keep(by_epoch: dict[int, Tensor], epoch: int, value: Tensor) -> None:
    """Keep the epochs that are powers of two, and this one."""
    for old in [e for e in by_epoch if e & (e - 1)]:
        del by_epoch[old]
    by_epoch[epoch] = value.clone()


def _fits(kind: str, values: Tensor, epochs: Tensor | None, rows: int) -> bool:
    dims = {"shares": 2, "found": 2, "codes": 3}.get(kind)
    if epochs is None or epochs.dim() != 1 or epochs.dtype != torch.int64:
        return False
    if values.dim() != dims or len(values) != len(epochs) or not len(epochs):
        return False
    if values.is_floating_point() == (kind == "found"):
        return False
    rising = bool((epochs.diff() > 0).all()) and int(epochs[0]) > 0
    return rising and (kind == "shares" or values.shape[1] == rows) and values.shape[-1] > 0
