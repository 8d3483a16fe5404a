"""Two traces, of a guide and of a program at the guide's draws, taken apart into terms.

A site that is summed in the program joins with everything that touches it into a *group* of
factors; all other sites are *plain*: what they add is a density, or minus a divergence.  Sites that
the guide enumerates give *weights*, under which expectations are exact.  Nothing is reduced before
it has to be: importance weights, for example, need the terms before the sum.

The terms know nothing of a loss; :mod:`.elbo` makes one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyrozoo.inference.bounds.contract import (
    Dims,
    Factor,
    add,
    components,
    contract,
    expectations,
    spread,
    sum_out,
)
from pyrozoo.inference.bounds.runs import PARTICLES, nesting
from pyrozoo.inference.graph import DATA
from pyrozoo.inference.plan import Plan


@dataclass
class Terms:
    """A bound taken apart, before any sum over enumerated sites.

    A dim is a negative tensor dimension: of a plate, or of an enumerated site (left of all plates).
    """

    plan: Plan
    plates: Dims  # the data plate and the particles: what a row of the bound keeps
    rows: int
    data_dim: int
    num_particles: int
    sites: dict[str, Any]  # the program's trace
    plain: dict[str, list[tuple[Tensor, Dims]]] = field(default_factory=dict)  # and their plates
    groups: list[list[Factor]] = field(default_factory=list)
    scales: list[Any] = field(default_factory=list)  # one per group
    counts: list[bool | Tensor] = field(default_factory=list)  # one per group
    sums: dict[int, Dims] = field(default_factory=dict)  # plates of each dim summed in the program
    names: dict[int, str] = field(default_factory=dict)  # its site
    weights: list[Factor] = field(default_factory=list)  # log q of sites that the guide enumerates
    weight_dims: dict[str, int] = field(default_factory=dict)  # their dims
    observed_guide: dict[str, Tensor] = field(default_factory=dict)  # log q at known values, by row

    def weigh(self, value: Tensor) -> Tensor:
        """The exact expectation over the sites that the guide enumerates."""
        dims = {d for d in self.weight_dims.values() if -d <= value.dim() and value.shape[d] > 1}
        while True:  # ancestors of the sites that the value depends on; the others add up to one
            used = [f for f in self.weights if self.weight_dims[f.name] in dims]
            more = dims.union(*(f.sums for f in used))
            if more == dims:
                break
            dims = more
        if not used:
            return value
        return sum_out(spread(value, add(f.value for f in used).exp()), dims)

    def to_rows(self, value: Tensor, plates: Dims) -> Tensor:
        """Expectations and inner plates done: ``(particles, rows)``; ``(particles,)`` if global."""
        value = sum_out(self.weigh(value), plates - self.plates)
        if self.data_dim not in plates:
            return value.sum() if self.num_particles == 1 else value.reshape(self.num_particles)
        value = value.movedim(self.data_dim, -1)
        return value.reshape(-1, value.shape[-1]).expand(-1, self.rows)

    def by_row(self) -> dict[str, Tensor]:
        """What plain sites and whole sums add, by name, each as :meth:`to_rows` has it."""
        rows = {name: self._plain(parts) for name, parts in self.plain.items()}
        for i, group in enumerate(self.groups):
            value = self._finish(i, contract(group, self.sums, self.plates))
            rows["+".join(f.name for f in group)] = value
        return rows

    def by_site(self) -> dict[str, Tensor]:
        """The same, site by site: expectations under the exact responsibilities r.

        A summed site's term is ``E_r[log p(y) - log r(y)]``; of several that are summed together
        the last has the entropy of all.
        """
        rows = {name: [self._plain(parts)] for name, parts in self.plain.items()}
        for i, group in enumerate(self.groups):
            total, weights = expectations(group, self.sums, self.plates)
            last = [f.name for f in group if f.name in self.names.values()][-1]
            rest = self._finish(i, total)
            for factor, weight in zip(group, weights, strict=True):
                if factor.name != last:
                    value = sum_out(spread(factor.value, weight), factor.sums)
                    value = self._finish(i, sum_out(value, factor.plates - self.plates))
                    rows.setdefault(factor.name, []).append(value)
                    rest = rest - value
            rows.setdefault(last, []).append(rest)
        return {name: add(parts) for name, parts in rows.items()}

    def _plain(self, parts: Iterable[tuple[Tensor, Dims]]) -> Tensor:
        return add(self.to_rows(value, plates) for value, plates in parts)

    def _finish(self, group: int, value: Tensor) -> Tensor:
        counts = self.counts[group]
        value = scale_and_mask(value, self.scales[group], None if counts is True else counts)
        return self.to_rows(value, self.plates)


def take_apart(
    plan: Plan,
    program: dict[str, Any],
    guide: dict[str, Any],
    rows: int,
    num_particles: int = 1,
    closed: Collection[str] = (),
    wanted: Collection[str] = (),
) -> Terms:
    """Terms of two traces.

    Args:
        plan: of the batch that they were run on.
        program, guide: their sites, see :func:`.runs.sample_sites`.
        rows: of the batch.
        num_particles: size of the particle plate, left of all others; none if one.
        closed: latent sites whose divergence is taken in closed form.
        wanted: guide sites whose log-density at known values is wanted.
    """
    data = next((s.dims[DATA] for s in plan.program.sites.values() if s.local), -1)
    plates = {data} if num_particles == 1 else {data, -1 - nesting(plan)}
    terms = Terms(plan, frozenset(plates), rows, data, num_particles, program)
    terms.weight_dims = {n: d for n, s in guide.items() if (d := _enumerated(s)) is not None}
    for name, site in guide.items():
        _take_guide_site(terms, name, site, name in closed)
    for name in wanted:
        if name in guide and (value := _at_known(plan, guide[name], program[name])) is not None:
            terms.observed_guide[name] = terms.to_rows(value, _plates(guide[name]))
    for name, site in program.items():
        if name not in guide and (dim := _enumerated(site)) is not None:
            terms.sums[dim], terms.names[dim] = _plates(site), name
    _take_program(terms, {n: s for n, s in program.items() if n not in closed})
    return terms


def _take_guide_site(terms: Terms, name: str, site: Any, closed: bool) -> None:
    if "_proposal" in site["infer"]:  # observed in every row: no part of the bound
        return
    if closed:
        value = kl_divergence(site["fn"], terms.sites[name]["fn"])
    else:
        value = _density(site)
        if name in terms.weight_dims:  # neither scaled nor masked: these are probabilities
            sums = _dims_in(value, terms.weight_dims.values())
            terms.weights.append(Factor(name, value, _plates(site), sums))
    value = -scale_and_mask(value, site["scale"], site["mask"])
    terms.plain[name] = [_whole(value, site)]


def _at_known(plan: Plan, site: Any, of_program: Any) -> Tensor | None:
    """The guide's own log-density where the batch knows the site, zero elsewhere."""
    if "_proposal" in site["infer"]:
        value = site["infer"]["_proposal"].log_prob(of_program["value"])
        return scale_and_mask(value, mask=of_program["mask"])
    if plan.roles.get(site["name"]) != "merged":
        return None
    fn = site["fn"]
    value = fn.proposal_log_prob(site["value"])
    return torch.where(fn._is_known, value, value.new_zeros(()))


def _take_program(terms: Terms, sites: dict[str, Any]) -> None:
    factors = []
    summed = set(terms.names.values())
    for name, site in sites.items():
        value = _density(site)
        sums = _dims_in(value, terms.sums)
        if name in summed:  # whether it counts is asked after the sum
            factors.append(Factor(name, value, _plates(site), sums | {_enumerated(site)}))
        elif sums:
            value = scale_and_mask(value, mask=site["mask"])
            factors.append(Factor(name, value, _plates(site), sums))
        else:
            value = scale_and_mask(value, site["scale"], site["mask"])
            terms.plain.setdefault(name, []).append(_whole(value, site))
    for group in components(factors):
        names = [f.name for f in group]
        terms.groups.append(group)
        terms.scales.append(_common_scale([sites[n]["scale"] for n in names]))
        terms.counts.append(_counts([sites[n] for n in names if n in summed], terms.plates))


def _counts(summed: list[Any], plates: Dims) -> bool | Tensor:
    """Where any of the sites counts; where none does, the sum is that of a prior: log 1."""
    mask: bool | Tensor = False
    for site in summed:
        counts = site["infer"].get("_counts", True)
        if counts is True:
            return True
        if counts is not False:
            for dim in _plates(site) - plates:
                counts = counts.any(dim, keepdim=True) if -dim <= counts.dim() else counts
        mask = mask | counts
    return mask


def _common_scale(scales: list[Any]) -> Any:
    first, *others = scales
    if any(not same_scale(first, other) for other in others):
        raise ValueError(
            "all sites that touch a summed site need one poutine.scale; use the objective's"
            " weights={...} for single terms"
        )
    return first


def same_scale(a: Any, b: Any) -> bool:
    """Whether two scales are known to be equal without reading a tensor."""
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def _enumerated(site: Any) -> Any:
    return site["infer"].get("_enumerate_dim")


def _plates(site: Any) -> Dims:
    return frozenset(f.dim for f in site["cond_indep_stack"] if f.vectorized)


def _whole(value: Tensor, site: Any) -> tuple[Tensor, Dims]:
    """A value and its plates; those of a global site are summed, lest one be taken for the rows."""
    plates, frames = _plates(site), [f for f in site["cond_indep_stack"] if f.vectorized]
    if any(f.name == DATA for f in frames):
        return value, plates
    own = frozenset(f.dim for f in frames if f.name != PARTICLES)
    return sum_out(value, own), plates - own


def _density(site: Any) -> Tensor:
    return site["fn"].log_prob(site["value"])


def _dims_in(value: Tensor, dims: Iterable[int]) -> Dims:
    return frozenset(d for d in dims if -d <= value.dim() and value.shape[d] > 1)
