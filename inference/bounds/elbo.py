"""The enumerated evidence bound, row by row.

``EnumELBO`` turns the terms of two traces (:mod:`.terms`) into one value per row of the data plate
and a shared value for global sites; and these into a loss, in nats per datum.  With ``w`` the exact
probabilities of sites that the guide enumerates, and ``y`` the sites that are summed in the
program, a row of the bound is ::

    E_w [ log sum_y p(x, z, y) - log q(z, .) ]

Every expectation over enumerated sites is exact; the others are draws.  See :mod:`.contract` for
the sum, :mod:`.kl` for closed forms and :mod:`.observing` for what is observed where.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.contract import add
from pyrozoo.inference.bounds.gradients import detach_densities
from pyrozoo.inference.bounds.kl import closed_form_sites
from pyrozoo.inference.bounds.runs import one_by_one, run, sample_sites
from pyrozoo.inference.bounds.stock import explained, outside, stock
from pyrozoo.inference.bounds.terms import Terms, take_apart
from pyrozoo.inference.observing import Net, Observed, pair
from pyrozoo.inference.plan import Plan

__all__ = ["EnumELBO", "Terms", "Value", "coupled_layer"]


class Value(NamedTuple):
    """An objective before it is averaged."""

    rows: Tensor  # (particles, rows)
    shared: Tensor  # what global sites add, once
    extra: Tensor  # (particles, rows): what is no part of the bound


class EnumELBO(TraceEnum_ELBO):
    """The evidence bound with exact sums over discrete sites, in nats per datum.

    Args:
        num_particles: draws of the guide per row, averaged (in one vectorised pass).
        kl: ``"closed"`` uses closed-form divergences wherever they are valid for this program,
            guide and observation pattern (see :mod:`.kl`) and draws elsewhere; ``"sampled"`` equals
            ``TraceEnum_ELBO`` divided by the number of rows, draw for draw.
        weights: site -> factor of its term (a number or a scalar tensor), e.g. ``{"z": beta}``.
            The term of a site that is summed is ``E_r[log p(y) - log r(y)]`` under the exact
            responsibilities r.  Unless all are 1 the result is no bound (:attr:`is_bound`).
        free_bits: site -> nats per row below which its divergence is not pushed.
        observed_guide_weights: site -> alpha; adds alpha log q(site | .) on the rows where the site
            is observed, e.g. the classification term of M2.  Not part of the bound; default 0.
        num_rows: rows of the whole data set, N; sites outside the data plate weigh 1/N per datum.
            Default: the rows of the batch.
        split: rows that know a label are run apart from those that do not, so that nothing below
            the label is computed K times for them.  ``"auto"``: where an observed site depends
            directly on a partly known summed site.  Equal to ``False``, the masked pass, for
            the same draws, and in expectation where knowing the label allows a closed form.
        gradient: ``"total"``, or ``"stl"``, sticking the landing: see :mod:`.gradients`.  Then no
            divergence is taken in closed form.
        inputs, replace: see :func:`.observing.pair`, for halves that are not paired yet.

    Weights are read at every call, also by a loss that is staged (:mod:`.staging`).

    Raises:
        ValueError: an option has another value; when called: what is observed fits no site, a
            latent site is proposed by nobody, or program and guide disagree.

    Source: the enumerated bound is that of Obermeyer et al., "Tensor variable elimination for
    plated factor graphs" (2019), as in Pyro; free bits are from Kingma et al., "Improved
    variational inference with inverse autoregressive flow" (2016).
    """

    gradient = "total"  # of a checkpoint's settings only where another is chosen
    _gradients: tuple[str, ...] = ("total", "stl")
    _reparameterised = True  # whether its gradient flows through the guide's draws

    def __init__(
        self,
        num_particles: int = 1,
        *,
        kl: str = "closed",
        weights: Mapping[str, float | Tensor] | None = None,
        free_bits: Mapping[str, float] | None = None,
        observed_guide_weights: Mapping[str, float | Tensor] | None = None,
        num_rows: int | None = None,
        split: bool | str = "auto",
        gradient: str = "total",
        inputs: tuple[str, ...] = (),
        replace: tuple[str, ...] = (),
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles is at least 1, got {num_particles}")
        if kl not in ("closed", "sampled"):
            raise ValueError(f"kl is 'closed' or 'sampled', got {kl!r}")
        if split not in (True, False, "auto"):
            raise ValueError(f"split is True, False or 'auto', got {split!r}")
        if gradient not in self._gradients:
            raise ValueError(f"gradient is one of {', '.join(self._gradients)}, got {gradient!r}")
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=num_particles > 1,
            strict_enumeration_warning=False,
        )
        self.kl = kl
        self.weights = dict(weights or {})
        self.free_bits = dict(free_bits or {})
        self.observed_guide_weights = dict(observed_guide_weights or {})
        self.num_rows = num_rows
        self.split = split
        if gradient != self.gradient:
            self.gradient = gradient
        self.inputs, self.replace = tuple(inputs), tuple(replace)
        self._pairs: dict[tuple[int, int], tuple[Observed, Observed]] = {}
        self._told: set[str] = set()

    @property
    def is_bound(self) -> bool:
        """Whether the loss is (minus) a lower bound of the evidence: no weight differs from one."""
        extra = self.observed_guide_weights.values()
        return not active(self.weights) and all(_is_number(w, 0) for w in extra)

    def __call__(self, program: Net, guide: Net) -> ELBOModule:
        """A module whose call with a batch is the loss, with the parameters of both halves."""
        return super().__call__(*self.pair(program, guide))

    def differentiable_loss(self, program: Net, guide: Net, batch: Data) -> Tensor:
        """The loss in nats per datum, a scalar tensor."""
        p, q, ready, plan = self._ready(program, guide, batch)
        if reason := self.unsupported(plan):
            fallback = self._stock(reason, plan, ready)
            with explained(reason):
                return fallback.differentiable_loss(p, q, ready) / len(ready)
        value = self._evaluate(p, q, ready, plan)
        shared = value.shared / (self.num_rows or len(ready))
        return -(value.rows.mean() + shared + value.extra.mean())

    def loss(self, program: Net, guide: Net, batch: Data) -> float:
        """The loss as a number, without gradients."""
        with torch.no_grad():
            p, q, ready, plan = self._ready(program, guide, batch)
            if reason := self.unsupported(plan):
                fallback = self._stock(reason, plan, ready)
                with explained(reason):
                    return fallback.loss(p, q, ready) / len(ready)
            return float(self.differentiable_loss(p, q, ready))

    def loss_and_grads(self, program: Net, guide: Net, batch: Data) -> float:
        """The loss as a number, after back-propagation (what :class:`pyro.infer.SVI` calls)."""
        loss = self.differentiable_loss(program, guide, batch)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def per_row(self, program: Net, guide: Net, batch: Data) -> Tensor:
        """The bound of every row, ``(rows,)``; with global latents, given one draw of them."""
        p, q, ready, plan = self._ready(program, guide, batch)
        self._refuse(plan, "no value per row")
        return self._evaluate(p, q, ready, plan).rows.mean(0)

    def terms(self, program: Net, guide: Net, batch: Data) -> dict[str, Tensor]:
        """What each site adds to the bound: site -> ``(rows,)``, or a scalar for a global site.

        A latent site's term is ``E[log p - log q]`` (minus its divergence), a summed site's
        ``E_r[log p(y) - log r(y)]``; of several sites that are summed together the last has the
        entropy of all.  The means over rows, and global terms divided by the number of rows, add up
        to the bound.
        """
        p, q, ready, plan = self._ready(program, guide, batch)
        self._refuse(plan, "no value per term")
        found = [one.trace(p, q, ready).by_site() for one in self.passes(p, ready)]
        return average([{name: t.mean(0) for name, t in terms.items()} for terms in found])

    def explain(self, program: Net, guide: Net, batch: Data) -> list[str]:
        """One line a site: what is done with it, and how the divergence of a latent is taken."""
        p, q, ready, plan = self._ready(program, guide, batch)
        lines = plan.describe(ready)
        if not self.unsupported(plan):
            for name, reason in self._closed_form(plan, p, q, ready).items():
                how = f"KL sampled ({reason})" if reason else "KL in closed form"
                lines = [f"{x}; {how}" if x.startswith(f"{name}: prop") else x for x in lines]
        return lines

    def pair(self, program: Net, guide: Net) -> tuple[Observed, Observed]:
        """The observed pair; bare programs and guides are paired here, once."""
        if isinstance(program, Observed) and isinstance(guide, Observed):
            if program.pairing is not guide.pairing or program.of_guide or not guide.of_guide:
                raise ValueError("program and guide do not come from one call of pair()")
            return program, guide
        if isinstance(program, Observed) or isinstance(guide, Observed):
            raise ValueError("pair(program, guide) makes both halves; only one of them is observed")
        key = (id(program), id(guide))
        if key not in self._pairs:
            self._pairs[key] = pair(program, guide, self.inputs, self.replace)
        return self._pairs[key]

    def unsupported(self, plan: Plan, gradient: bool = True) -> str:
        """Why the row-wise bound, or its gradient, does not cover a pair ('' if it does)."""
        return _outside(plan, gradient and self._reparameterised)

    def passes(self, p: Observed, batch: Batch) -> list[EnumELBO]:
        """Objectives whose mean is this one: itself; with a draw each, if draws go one by one."""
        if self.num_particles == 1 or not one_by_one(p, batch):
            return [self]
        one = copy.copy(self)
        one.num_particles = 1
        return [one] * self.num_particles

    def trace(self, p: Observed, q: Observed, batch: Batch) -> Terms:
        """Run the guide, then the program at its draws; take the two traces apart."""
        plan = p.pairing.plan(batch)
        reasons = self._closed_form(plan, p, q, batch)
        closed = [name for name, reason in reasons.items() if not reason]
        program, guide = (sample_sites(t) for t in run(p, q, batch, self.num_particles))
        terms = self._terms(plan, program, guide, batch, closed)
        if self.gradient == "stl":
            detach_densities(terms, p, q, batch, guide)
        return terms

    def _terms(
        self,
        plan: Plan,
        program: dict[str, Any],
        guide: dict[str, Any],
        batch: Batch,
        closed: Collection[str] = (),
    ) -> Terms:
        wanted = list(self.observed_guide_weights)
        return take_apart(plan, program, guide, len(batch), self.num_particles, closed, wanted)

    def _closed_form(self, plan: Plan, p: Observed, q: Observed, batch: Batch) -> dict[str, str]:
        """Proposed site -> why its divergence has to be sampled; nothing, if all of them are."""
        if self.kl == "closed" and self.gradient == "total":
            return closed_form_sites(plan, p, q, batch)
        return {}

    # ---- from terms to a value -------------------------------------------------------------------

    def _ready(
        self, program: Net, guide: Net, data: Data
    ) -> tuple[Observed, Observed, Batch, Plan]:
        p, q = self.pair(program, guide)
        batch = p.pairing.prepare(data)
        plan = p.pairing.plan(batch)
        for option in (self.weights, self.free_bits, self.observed_guide_weights):
            for name in option:
                if name not in plan.program.sites and name not in plan.proposed:
                    _unknown(name, plan)
        return p, q, batch, plan

    def _refuse(self, plan: Plan, what: str) -> None:
        if reason := _outside(plan, self._reparameterised and torch.is_grad_enabled()):
            raise ValueError(f"{what}: {reason}")

    def _evaluate(self, p: Observed, q: Observed, batch: Batch, plan: Plan) -> Value:
        names = self._split_sites(p, q, plan)
        if not names:
            return self._evaluate_whole(p, q, batch)
        order, parts = [], []
        for index, known in batch.patterns(names):
            sub = batch[index].drop(*(n for n in names if n not in known))
            for name in known:
                sub = sub.full(name)
            order.append(index)
            parts.append(self._evaluate_whole(p, q, sub))
        back = torch.cat(order).argsort()
        rows = torch.cat([v.rows for v in parts], -1)[:, back]
        extra = torch.cat([v.extra for v in parts], -1)[:, back]
        return Value(rows, parts[0].shared, extra)

    def _evaluate_whole(self, p: Observed, q: Observed, batch: Batch) -> Value:
        found = [one._evaluate_pass(p, q, batch) for one in self.passes(p, batch)]
        if len(found) == 1:
            return found[0]
        rows, shared, extra = zip(*found, strict=True)
        return Value(torch.cat(rows), add(shared) / len(shared), torch.cat(extra))

    def _evaluate_pass(self, p: Observed, q: Observed, batch: Batch) -> Value:
        terms = self.trace(p, q, batch)
        weights = active(self.weights)
        if weights or self.free_bits:
            parts = terms.by_site()
            for name in set(self.free_bits) & set(parts):
                parts[name] = parts[name].clamp(max=-self.free_bits[name])
            for name in set(weights) & set(parts):
                parts[name] = parts[name] * weights[name]
        else:
            parts = terms.by_row()
        zero = torch.zeros((), dtype=batch._dtype, device=batch.device)
        none = zero.expand(self.num_particles, len(batch))
        local = [v for v in parts.values() if v.dim() == 2]
        shared = [v.mean() for v in parts.values() if v.dim() < 2]
        rows = add(local).expand_as(none) if local else none
        return Value(rows, add(shared) if shared else zero, self._extra(terms, none))

    def _extra(self, terms: Terms, zeros: Tensor) -> Tensor:
        """What is no part of the bound, ``(particles, rows)``."""
        for name, value in terms.observed_guide.items():
            zeros = zeros + self.observed_guide_weights[name] * value
        return zeros

    def _split_sites(self, p: Observed, q: Observed, plan: Plan) -> list[str]:
        """The partly known sites by whose presence the rows of a batch are split."""
        if self.split is False:
            return []
        key = f"split {self.split}"
        if key not in plan.cache:
            plan.cache[key] = _split_sites(p, q, plan, self.split is True)
        return plan.cache[key]

    def _stock(self, reason: str, plan: Plan, batch: Batch) -> TraceEnum_ELBO:
        if not self.is_bound or self.free_bits:
            raise ValueError(f"weights of single terms are not available here: {reason}")
        if self.gradient != "total":
            raise ValueError(f"gradient={self.gradient!r} is not available here: {reason}")
        if self.num_rows not in (None, len(batch)):
            raise ValueError(
                f"minibatches are not available here: {reason}; take all rows at once, batch_size ="
                f" {self.num_rows}"
            )
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"falling back to Pyro's TraceEnum_ELBO: {reason}", stacklevel=4)
        return stock(plan, self.num_particles)


def own_copy(objective: EnumELBO | None, inputs: Iterable[str] = ()) -> EnumELBO:
    """A copy with inputs and pairs of its own; its dictionaries stay shared.

    Raises:
        TypeError: it is no objective.
    """
    objective = EnumELBO() if objective is None else objective
    if not isinstance(objective, EnumELBO):
        raise TypeError(
            "objective is an EnumELBO or one of its kind, such as IWELBO(num_particles=5), got"
            f" {objective!r}"
        )
    new = copy.copy(objective)
    new.inputs, new._pairs = tuple(dict.fromkeys([*objective.inputs, *inputs])), {}
    return new


def average(terms: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of terms by name."""
    return {name: add(t[name] for t in terms) / len(terms) for name in terms[0]}


def _outside(plan: Plan, reparameterised: bool) -> str:
    key = f"outside {reparameterised}"
    if key not in plan.cache:
        plan.cache[key] = outside(plan, reparameterised)
    return plan.cache[key]


def coupled_layer(*nets: Any) -> str:
    """The name of a layer that couples the rows of a batch (BatchNorm), or ''."""
    for net in nets:
        for name, layer in net.named_modules() if isinstance(net, nn.Module) else ():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                return f"{name} ({type(layer).__name__})"
    return ""


def _split_sites(p: Observed, q: Observed, plan: Plan, forced: bool) -> list[str]:
    sites = plan.program.sites
    names = [
        n
        for n, role in plan.roles.items()
        if role == "merged" and sites[n].summable and len(sites[n].dims) == 1
    ]
    if not forced:
        heavy = [k for k in plan.observed if sites[k].event_shape.numel() > 1]
        names = [n for n in names if any(n in sites[k].parents for k in heavy)]
    reason = ""
    if any(not s.local for s in sites.values() if s.kind == "sample"):
        reason = "global latents are drawn once for all rows"
    elif layer := coupled_layer(p.module, q.module):
        reason = f"layer {layer} couples the rows of a batch; use LayerNorm or none"
    if names and reason and forced:
        raise ValueError(f"rows cannot be split: {reason}")
    return [] if reason else names


def _is_number(weight: Any, number: float) -> bool:
    return not isinstance(weight, Tensor) and weight == number


def active(weights: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
    return {name: w for name, w in weights.items() if not _is_number(w, 1)}


def _unknown(name: str, plan: Plan) -> None:
    sites = list(dict.fromkeys([*plan.program.sites, *sorted(plan.proposed)]))
    near = difflib.get_close_matches(name, sites, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no term of the bound is called {name!r} (sites: {', '.join(sites)}){hint}")
