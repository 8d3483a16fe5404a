"""The enumerated evidence bound, row by row.

``EnumELBO`` takes two traces, the guide's and the program's at the guide's draws, to terms; terms to
one value per row of the data plate and a shared value for global sites; and these to a loss, in nats
per datum.  With ``w`` the exact probabilities of sites that the guide enumerates, and ``y`` the sites
that are summed in the program, a row of the bound is ::

    E_w [ log sum_y p(x, z, y) - log q(z, .) ]

Every expectation over enumerated sites is exact; the others are draws.  See ``contract.py`` for the sum
and ``observing.py`` for what is observed where.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import kl_divergence

from .batch import Batch, Data
from .contract import Dims, Factor, add, components, contract, expectations, spread, sum_out
from .graph import DATA
from .kl import closed_form_sites
from .observing import Net, Observed, Plan, pair

PARTICLES = "num_particles_vectorized"  # the name that Pyro gives this plate


@dataclass
class Terms:
    """A bound taken apart, before any sum over enumerated sites.

    ``plain`` maps sites to what they add, ``[(density, plates)]``, the guide's share negative; ``groups``
    are connected factors that are summed in the program; ``weights`` are the guide's enumerated sites.
    """

    plan: Plan
    plates: Dims  # the data plate and the particles: what a row of the bound keeps
    plain: dict[str, list[tuple[Tensor, Dims]]] = field(default_factory=dict)
    groups: list[list[Factor]] = field(default_factory=list)
    scales: list[Any] = field(default_factory=list)  # one per group
    counts: list[bool | Tensor] = field(default_factory=list)  # one per group
    sums: dict[int, Dims] = field(default_factory=dict)  # plates of each program-enumerated dim
    names: dict[int, str] = field(default_factory=dict)  # its site
    weights: list[Factor] = field(default_factory=list)
    weight_dims: dict[str, int] = field(default_factory=dict)  # enumerated site of the guide -> dim
    observed_guide: dict[str, Tensor] = field(default_factory=dict)  # log q at observed values
    rows: int = 0
    data_dim: int = -1
    sites: dict[str, Any] = field(default_factory=dict)  # the program's trace

    def weigh(self, value: Tensor) -> Tensor:
        """The exact expectation over the sites that the guide enumerates."""
        if not self.weights:
            return value
        dims = {d for d in self.weight_dims.values() if -d <= value.dim() and value.shape[d] > 1}
        while True:  # ancestors of the sites that the value depends on; the others add up to one
            used = [f for f in self.weights if self.weight_dims[f.name] in dims]
            more = dims.union(*(f.sums for f in used))
            if more == dims:
                break
            dims = more
        if not used:
            return value
        log_weight = add(f.value for f in used)
        return sum_out(spread(value, log_weight.exp()), dims)

    def to_rows(self, value: Tensor, plates: Dims) -> Tensor:
        """Expectation and inner plates done: ``(particles, rows)``, or ``(particles,)`` if global."""
        value = sum_out(self.weigh(value), plates - self.plates)
        if self.data_dim not in plates:
            return value.sum() if not self._particles else value.reshape(self._particles)
        value = value.movedim(self.data_dim, -1) if value.dim() >= -self.data_dim else value
        return value.reshape(-1, value.shape[-1]).expand(-1, self.rows)

    @property
    def _particles(self) -> int:
        return 0 if len(self.plates) == 1 else self._num_particles

    _num_particles: int = 1


class EnumELBO(TraceEnum_ELBO):
    """The evidence bound with exact sums over discrete sites, in nats per datum.

    Args:
        num_particles: draws of the guide per row, averaged (in one vectorised pass).
        kl: ``"closed"`` uses closed-form divergences wherever they are valid for this program, guide
            and observation pattern (see :mod:`.kl`) and draws elsewhere; ``"sampled"`` equals
            ``TraceEnum_ELBO`` divided by the number of rows, draw for draw.
        weights: site -> factor of its term (a number or a scalar tensor), e.g. ``{"z": beta}``.  The
            term of a site that is summed is ``E_r[log p(y) - log r(y)]`` under the exact
            responsibilities r.  Unless all are 1 the result is no bound (:attr:`is_bound`).
        free_bits: site -> nats per row below which its divergence is not pushed.
        observed_guide_weights: site -> alpha; adds alpha log q(site | .) on the rows where the site is
            observed, e.g. the classification term of M2.  Not part of the bound; default 0.
        num_rows: rows of the whole data set, N; sites outside the data plate weigh 1/N per datum.
            Default: the rows of the batch.
        split: rows that know a label are run apart from those that do not, so that nothing below the
            label is computed K times for them.  ``"auto"``: where an observed site depends directly on
            a partly known summed site.  Equal to ``False``, the masked pass, but for the draws.
        inputs, replace: see :func:`.observing.pair`, for programs and guides that are not paired yet.

    Source: the enumerated bound is that of Obermeyer et al., "Tensor variable elimination for plated
    factor graphs" (2019), as in Pyro; free bits are from Kingma et al., "Improved variational inference
    with inverse autoregressive flow" (2016).
    """

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
        inputs: tuple[str, ...] = (),
        replace: tuple[str, ...] = (),
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles is at least 1, got {num_particles}")
        if kl not in ("closed", "sampled"):
            raise ValueError(f"kl is 'closed' or 'sampled', got {kl!r}")
        if split not in (True, False, "auto"):
            raise ValueError(f"split is True, False or 'auto', got {split!r}")
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
        self.inputs, self.replace = tuple(inputs), tuple(replace)
        self._pairs: dict[tuple[int, int], tuple[Observed, Observed]] = {}
        self._told: set[str] = set()

    # ---- the public face -------------------------------------------------------------------------

    @property
    def is_bound(self) -> bool:
        """Whether the loss is (minus) a lower bound of the evidence: no weight differs from one."""
        weights = [*self.weights.values(), *(1 - w for w in self.observed_guide_weights.values())]
        return all(not isinstance(w, Tensor) and w == 1 for w in weights)

    def __call__(self, program: Net, guide: Net) -> nn.Module:
        """A module whose call with a batch is the loss, with the parameters of both halves."""
        return super().__call__(*self.pair(program, guide))

    def differentiable_loss(self, program: Net, guide: Net, batch: Data) -> Tensor:
        """The loss in nats per datum, a scalar tensor."""
        p, q = self.pair(program, guide)
        ready = p.pairing.prepare(batch)
        plan = p.pairing.plan(ready)
        if reason := self.unsupported(plan):
            return self._stock(reason, plan, ready).differentiable_loss(p, q, ready) / len(ready)
        rows, shared, extra = self._evaluate(p, q, ready, plan)
        return -(rows.mean() + shared / (self.num_rows or len(ready)) + extra)

    def loss(self, program: Net, guide: Net, batch: Data) -> float:
        """The loss as a number, without gradients."""
        with torch.no_grad():
            p, q = self.pair(program, guide)
            ready = p.pairing.prepare(batch)
            plan = p.pairing.plan(ready)
            if reason := self.unsupported(plan):
                return self._stock(reason, plan, ready).loss(p, q, ready) / len(ready)
            return float(self.differentiable_loss(p, q, ready))

    def loss_and_grads(self, program: Net, guide: Net, batch: Data) -> float:
        """The loss as a number, after back-propagation (what :class:`pyro.infer.SVI` calls)."""
        loss = self.differentiable_loss(program, guide, batch)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def per_row(self, program: Net, guide: Net, batch: Data) -> Tensor:
        """The bound of every row, ``(rows,)``; with global latents, given one draw of them."""
        p, q = self.pair(program, guide)
        ready = p.pairing.prepare(batch)
        plan = p.pairing.plan(ready)
        if reason := self.unsupported(plan):
            raise ValueError(f"no value per row: {reason}")
        return self._evaluate(p, q, ready, plan)[0].mean(0)

    def terms(self, program: Net, guide: Net, batch: Data) -> dict[str, Tensor]:
        """What each site adds to the bound: site -> ``(rows,)``, or a scalar for a global site.

        A latent site's term is ``E[log p - log q]`` (minus its divergence), a summed site's
        ``E_r[log p(y) - log r(y)]``.  The means over rows, and global terms divided by the number of
        rows, add up to the bound.
        """
        p, q = self.pair(program, guide)
        ready = p.pairing.prepare(batch)
        plan = p.pairing.plan(ready)
        if reason := self.unsupported(plan):
            raise ValueError(f"no value per term: {reason}")
        return {name: t.mean(0) for name, t in self._site_terms(self.trace(p, q, ready)).items()}

    def explain(self, program: Net, guide: Net, batch: Data) -> list[str]:
        """One line a site: what is done with it, and for latent sites how their divergence is taken."""
        p, q = self.pair(program, guide)
        ready = p.pairing.prepare(batch)
        plan = p.pairing.plan(ready)
        lines = plan.describe(ready)
        if self.kl == "closed" and not self.unsupported(plan):
            for name, reason in closed_form_sites(plan).items():
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

    def unsupported(self, plan: Plan) -> str:
        """Why the row-wise bound does not cover a program or guide ('' if it does)."""
        if "unsupported" not in plan.cache:
            plan.cache["unsupported"] = _unsupported(plan)
        return plan.cache["unsupported"]

    # ---- from traces to terms --------------------------------------------------------------------

    def trace(self, p: Observed, q: Observed, batch: Batch) -> Terms:
        """Run the guide, then the program at its draws; take the two traces apart."""
        plan = p.pairing.plan(batch)
        nesting = _nesting(plan)
        program, guide = EnumMessenger()(p), EnumMessenger(-1 - nesting - self.vectorize_particles)(q)
        if self.vectorize_particles:
            particles = pyro.plate(PARTICLES, self.num_particles, dim=-1 - nesting)
            program, guide = particles(program), particles(guide)
        guide_trace = poutine.trace(guide).get_trace(batch)
        program_trace = poutine.trace(poutine.replay(program, guide_trace)).get_trace(batch)
        return self._take_apart(plan, _samples(program_trace), _samples(guide_trace), len(batch))

    def _take_apart(
        self, plan: Plan, program: dict[str, Any], guide: dict[str, Any], rows: int
    ) -> Terms:
        terms = _empty_terms(plan, rows, self.num_particles, program)
        closed = closed_form_sites(plan) if self.kl == "closed" else {}
        for name, site in guide.items():
            if (dim := site["infer"].get("_enumerate_dim")) is not None:
                terms.weight_dims[name] = dim
        for name, site in guide.items():
            if name in terms.weight_dims:
                value = _log_prob(site, masked=False)
                sums = _dims_in(value, terms.weight_dims.values())
                terms.weights.append(Factor(name, value, _plates(site), sums))
            if "_proposal" in site["infer"]:
                value = site["infer"]["_proposal"].log_prob(program[name]["value"])
                value = scale_and_mask(value, mask=program[name]["mask"])
                terms.observed_guide[name] = terms.to_rows(value, _plates(site))
            elif name in closed and not closed[name]:
                value = -kl_divergence(site["fn"], program[name]["fn"])
                value = scale_and_mask(value, site["scale"], site["mask"])
                terms.plain[name] = [(value, _plates(site))]
            else:
                self._partly_observed_guide(terms, plan, name, site)
                terms.plain[name] = [(-_scaled(site), _plates(site))]
        factors: list[Factor] = []
        enumerated = {n: s for n, s in program.items() if n not in guide and _dim(s) is not None}
        terms.sums = {_dim(s): _plates(s) for s in enumerated.values()}
        terms.names = {_dim(s): n for n, s in enumerated.items()}
        for name, site in program.items():
            if name in closed and not closed[name]:
                continue
            value = _log_prob(site, masked=name not in enumerated)
            sums = _dims_in(value, terms.sums)
            if name in enumerated:
                factors.append(Factor(name, value, _plates(site), sums | {_dim(site)}))
            elif sums:
                factors.append(Factor(name, value, _plates(site), sums))
            else:
                value = scale_and_mask(value, site["scale"])
                terms.plain.setdefault(name, []).append((value, _plates(site)))
        for group in components(factors):
            terms.groups.append(group)
            terms.scales.append(_common_scale([program[f.name]["scale"] for f in group]))
            terms.counts.append(_any_counts(enumerated, [f.name for f in group]))
        return terms

    def _partly_observed_guide(self, terms: Terms, plan: Plan, name: str, site: Any) -> None:
        if plan.roles.get(name) == "merged" and name in self.observed_guide_weights:
            fn = site["fn"]
            value = fn.proposal_log_prob(site["value"])
            value = torch.where(fn._is_known, value, torch.zeros_like(value))
            terms.observed_guide[name] = terms.to_rows(value, _plates(site))

    def _rows(self, terms: Terms) -> dict[str, Tensor]:
        """What plain sites and whole sums add: name -> ``(particles, rows)`` or ``(particles,)``."""
        rows = {
            name: add(terms.to_rows(value, plates) for value, plates in parts)
            for name, parts in terms.plain.items()
        }
        for i, group in enumerate(terms.groups):
            value = contract(group, terms.sums, terms.plates)
            value = scale_and_mask(value, terms.scales[i], _none(terms.counts[i]))
            rows["+".join(f.name for f in group)] = terms.to_rows(value, terms.plates)
        return rows

    def _site_terms(self, terms: Terms) -> dict[str, Tensor]:
        """The same, site by site: expectations under the exact responsibilities."""
        rows = {
            name: [terms.to_rows(value, plates) for value, plates in parts]
            for name, parts in terms.plain.items()
        }
        for i, group in enumerate(terms.groups):
            mask, scale = _none(terms.counts[i]), terms.scales[i]
            total, weights = expectations(group, terms.sums, terms.plates)
            last = [f.name for f in group if f.name in terms.names.values()][-1]
            rest = scale_and_mask(total, scale, mask)
            rest = terms.to_rows(rest, terms.plates)
            for factor, weight in zip(group, weights, strict=True):
                value = sum_out(spread(factor.value, weight), factor.sums)
                value = sum_out(value, factor.plates - terms.plates)
                value = terms.to_rows(scale_and_mask(value, scale, mask), terms.plates)
                if factor.name != last:  # the last summed site takes what is left: the entropy of r
                    rows.setdefault(factor.name, []).append(value)
                    rest = rest - value
            rows.setdefault(last, []).append(rest)
        return {name: add(parts) for name, parts in rows.items()}

    # ---- from terms to a loss --------------------------------------------------------------------

    def _evaluate(
        self, p: Observed, q: Observed, batch: Batch, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ``(particles, rows)``, the shared value, and the mean of extra terms per datum."""
        names = self._split_sites(plan, batch)
        if names:
            groups = []
            for index, known in batch.patterns(names):
                sub = batch[index].drop(*(n for n in names if n not in known))
                for name in known:
                    sub = sub.full(name)
                groups.append((index, *self._evaluate_whole(p, q, sub)))
            order = torch.cat([index for index, *_ in groups]).argsort()
            rows = torch.cat([g[1] for g in groups], -1)[:, order]
            shared = groups[0][2]
            extra = add(g[3] * (len(g[0]) / len(batch)) for g in groups)
            return rows, shared, extra
        return self._evaluate_whole(p, q, batch)

    def _evaluate_whole(self, p: Observed, q: Observed, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        terms = self.trace(p, q, batch)
        if self.weights or self.free_bits:
            parts = self._weighted(terms)
        else:
            parts = self._rows(terms)
        zero = torch.zeros((), dtype=batch._dtype, device=batch.device)
        local = [v for v in parts.values() if v.dim() == 2]
        shared = [v.mean() for v in parts.values() if v.dim() < 2]
        rows = add(local) if local else zero.expand(self.num_particles, len(batch))
        extra = zero
        for name, value in terms.observed_guide.items():
            extra = extra + self.observed_guide_weights.get(name, 0) * value.mean()
        return rows, add(shared) if shared else zero, extra

    def _weighted(self, terms: Terms) -> dict[str, Tensor]:
        parts = self._site_terms(terms)
        for name in [*self.weights, *self.free_bits]:
            if name not in parts:
                raise ValueError(f"no term of the bound is called {name!r} (terms: {', '.join(parts)})")
        for name, bits in self.free_bits.items():
            parts[name] = parts[name].clamp(max=-bits)
        for name, weight in self.weights.items():
            parts[name] = parts[name] * weight
        return parts

    def _split_sites(self, plan: Plan, batch: Batch) -> list[str]:
        if self.split is False:
            return []
        merged = [n for n, role in plan.roles.items() if role == "merged"]
        names = [
            n
            for n in merged
            if plan.program.sites[n].summable and len(plan.program.sites[n].dims) == 1
        ]
        if any(not s.local for s in plan.program.sites.values() if s.kind == "sample"):
            return []  # global latents are drawn once per pass: rows must share the draw
        if self.split is True:
            return names
        heavy = {k for k in plan.observed if plan.program.sites[k].event_shape.numel() > 1}
        return [n for n in names if any(n in plan.program.sites[k].parents for k in heavy)]

    def _stock(self, reason: str, plan: Plan, batch: Batch) -> TraceEnum_ELBO:
        if self.weights or self.free_bits or any(self.observed_guide_weights.values()):
            raise ValueError(f"weights of single terms are not available here: {reason}")
        if self.num_rows not in (None, len(batch)):
            raise ValueError(f"minibatches are not available here: {reason}")
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"falling back to Pyro's TraceEnum_ELBO: {reason}", stacklevel=4)
        return TraceEnum_ELBO(
            num_particles=self.num_particles,
            vectorize_particles=self.vectorize_particles,
            max_plate_nesting=_nesting(plan),
            strict_enumeration_warning=False,
        )


def refuse_coupled_rows(nets: tuple[Any, ...], why: str) -> None:
    """Raise a ValueError if a network has layers that couple the rows of a batch (BatchNorm)."""
    for net in nets:
        for name, layer in net.named_modules() if isinstance(net, nn.Module) else ():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                raise ValueError(
                    f"layer {name!r} ({type(layer).__name__}) couples the rows of a batch, which is not"
                    f" allowed where {why}; use LayerNorm or none"
                )


def _nesting(plan: Plan) -> int:
    return max(plan.program.nesting, plan.guide.nesting if plan.guide else 0)


def _samples(trace: Any) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    }


def _empty_terms(plan: Plan, rows: int, num_particles: int, program: dict[str, Any]) -> Terms:
    nesting = _nesting(plan)
    data = next((s.dims[DATA] for s in plan.program.sites.values() if s.local), -1)
    plates = {data} if num_particles == 1 else {data, -1 - nesting}
    terms = Terms(plan, frozenset(plates), rows=rows, data_dim=data, sites=program)
    terms._num_particles = num_particles
    return terms


def _dim(site: Any) -> int | None:
    return site["infer"].get("_enumerate_dim")


def _plates(site: Any) -> Dims:
    return frozenset(f.dim for f in site["cond_indep_stack"] if f.vectorized)


def _log_prob(site: Any, masked: bool) -> Tensor:
    value = site["fn"].log_prob(site["value"])
    return scale_and_mask(value, mask=site["mask"]) if masked else value


def _scaled(site: Any) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])


def _dims_in(value: Tensor, dims: Any) -> Dims:
    return frozenset(d for d in dims if -d <= value.dim() and value.shape[d] > 1)


def _common_scale(scales: list[Any]) -> Any:
    first, *others = scales
    for other in others:
        same = other is first or (
            not isinstance(first, Tensor) and not isinstance(other, Tensor) and first == other
        )
        if not same:
            raise ValueError(
                "all sites that touch a summed site need one poutine.scale; use the objective's"
                " weights={...} for single terms"
            )
    return first


def _any_counts(enumerated: dict[str, Any], names: list[str]) -> bool | Tensor:
    mask: bool | Tensor = False
    for name in names:
        if name in enumerated:
            counts = enumerated[name]["infer"].get("_counts", True)
            if counts is True:
                return True
            mask = mask | counts
    return mask


def _none(mask: bool | Tensor) -> bool | Tensor | None:
    return None if mask is True else mask


def _unsupported(plan: Plan) -> str:
    for graph, side in ((plan.program, "program"), (plan.guide, "guide")):
        for name, site in graph.sites.items() if graph else ():
            summed = name in plan.summed if side == "program" else site.summable
            if plan.roles.get(name) in ("given", "masked", "own", "pruned"):
                continue
            if "_markov_depth" in site.infer and site.infer["_markov_depth"]:
                return f"site {name!r} lies in a markov context"
            if site.infer.get("enumerate") == "sequential":
                return f"site {name!r} is enumerated one value at a time"
            if site.infer.get("num_samples"):
                return f"site {name!r} is sampled several times in place of being summed"
            if summed and not site.local:
                return f"summed site {name!r} is outside the plate over the data"
            if isinstance(site.scale, Tensor) and site.scale.dim() and summed:
                return f"summed site {name!r} has a scale with dimensions"
            if side == "guide" and not site.fn.has_rsample:
                enumerated = site.infer.get("enumerate", "parallel") == "parallel"
                if not (site.summable and enumerated):
                    return f"site {name!r} of the guide is neither summed nor reparameterised"
    return ""
