"""Observing: which sites of a program are known, row by row, and what follows from it.

:func:`pair` turns a program and a guide into two modules that are called with a batch.  The program is
run under an effect handler that treats each site by what the batch knows of it:

=========== =====================================================================================
role        treatment
=========== =====================================================================================
given       observed in every row
masked      a leaf known in some rows or entries: the others are marginalised, that is, left out
merged      has children and is known in part: fixed where known, summed or proposed elsewhere
summed      finite, unknown and not proposed: enumerated, one dimension
proposed    drawn by the guide
pruned      neither it nor anything that depends on it is observed: it drops out
own         the program itself observes it (``obs=`` or ``poutine.condition``)
free        not observed, no guide at hand (:func:`observe` alone, for sampling and MCMC)
=========== =====================================================================================

A site *counts* in a row if it, or something that depends on it, is observed there; elsewhere it is
masked in program and guide.  This is exact when data are missing at random.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import transform_to

from .batch import Batch, Data
from .graph import DATA, Graph, Site, read_graph
from .partial import merge, observed_entries

Net = nn.Module | Callable[[Batch], Any]


@dataclass(frozen=True)
class Plan:
    """What happens to every site under one observation pattern (see the table of the module)."""

    program: Graph
    guide: Graph | None
    roles: dict[str, str]
    observed: tuple[str, ...]  # keys of the batch that are sites
    inputs: tuple[str, ...]
    cache: dict[str, Any] = field(default_factory=dict)  # for what others derive from the plan

    @property
    def proposed(self) -> frozenset[str]:
        """Sites that the guide draws."""
        return frozenset(self.guide.sites) if self.guide else frozenset()

    @property
    def summed(self) -> tuple[str, ...]:
        """Sites that are enumerated in the program."""
        return tuple(
            name
            for name, role in self.roles.items()
            if role == "summed" or (role == "merged" and self._sum(name))
        )

    def _sum(self, name: str) -> bool:
        return name not in self.proposed and self.program.sites[name].summable

    def deciders(self, name: str) -> tuple[str, ...] | None:
        """Keys whose presence decides in which rows a site counts; None: it counts everywhere."""
        below = self.program.descendants(name) | {name}
        for other in below:
            if self.program.sites[other].kind == "factor" or self.roles.get(other) == "own":
                return None
        return tuple(key for key in self.observed if key in below)

    def counts(self, name: str, batch: Batch) -> bool | Tensor:
        """True, False, or a mask over the plates of a site: where it, or a descendant, is observed."""
        deciders = self.deciders(name)
        if deciders is None:
            return True
        site = self.program.sites[name]
        mask: bool | Tensor = False
        for key in deciders:
            if not batch.partly(key) or not site.local:
                return True
            mask = mask | _presence(self.program.sites[key], batch.present(key), site.dims)
        return mask

    def any_row(self, batch: Batch) -> bool | Tensor:
        """The rows in which anything is observed."""
        mask: bool | Tensor = any(
            s.kind == "factor" or self.roles.get(s.name) == "own"
            for s in self.program.sites.values()
        )
        for key in self.observed:
            site = self.program.sites[key]
            if not batch.partly(key):
                return True
            mask = mask | _presence(site, batch.present(key), {DATA: site.dims[DATA]})
        return mask

    def describe(self, batch: Batch, program_name: str = "program") -> list[str]:
        """One line a site, for people: observed, masked n of N, summed over K, proposed, input."""
        lines = []
        for name, site in self.program.sites.items():
            if site.kind != "sample":
                continue
            lines.append(f"{name}: {self._line(site, self.roles[name], batch)}")
        for name in self.guide.sites if self.guide else ():
            if name not in self.program.sites:
                lines.append(f"{name}: auxiliary, drawn by the guide")
        lines += [f"{name}: input" for name in self.inputs if name in batch]
        return lines

    def _line(self, site: Site, role: str, batch: Batch) -> str:
        present = batch.present(site.name)
        missing = f"{int((~present).sum()):,} of {present.numel():,}"
        what = "rows" if present.dim() == 1 else "entries"
        how = "proposed by the guide"
        if site.name not in self.proposed and site.summable:
            how = f"summed over {len(site.fn.enumerate_support(expand=False))} values"
        elif site.summable:
            how += f", summed over {len(site.fn.enumerate_support(expand=False))} values"
        return {
            "given": "observed",
            "masked": f"observed, {missing} {what} masked",
            "merged": f"observed, {missing} {what} {how}",
            "summed": how,
            "proposed": how,
            "pruned": "not observed, nor anything that depends on it: left out",
            "own": "observed by the program itself",
            "free": "drawn from its prior",
        }[role]


def _presence(site: Site, present: Tensor, dims: dict[str, int]) -> Tensor:
    """A mask of presence over some plates: true where any entry below them is present."""
    lead = len(site.dims)
    if present.dim() > lead:
        present = present.reshape(*present.shape[:lead], -1).any(-1)
    mask = site.to_plates(present, 0)
    for plate, dim in site.dims.items():
        if plate not in dims:
            mask = mask.any(dim, keepdim=True)
    return mask


class _Pairing:
    """A program, perhaps with a guide, and its plans: one for each observation pattern."""

    def __init__(
        self, program: Net, guide: Net | None, inputs: Iterable[str], replace: Iterable[str]
    ) -> None:
        self.program, self.guide = program, guide
        self.inputs, self.replace = tuple(inputs), tuple(replace)
        self.plans: dict[Any, Plan] = {}

    def prepare(self, data: Data) -> Batch:
        """Read the batch; cast floats to the precision of the parameters."""
        batch = Batch.of(data)
        dtype = next(
            (
                p.dtype
                for net in (self.program, self.guide)
                if isinstance(net, nn.Module)
                for p in net.parameters()
                if p.is_floating_point()
            ),
            torch.get_default_dtype(),
        )
        return batch if batch._dtype == dtype else batch.to(dtype=dtype)

    def plan(self, batch: Batch) -> Plan:
        """The plan for the observation pattern of a batch; the first of a pattern is checked."""
        key = tuple((n, batch.present(n).dim() if batch.partly(n) else 0) for n in batch.names)
        if key not in self.plans:
            graph = read_graph(self.program, batch)
            guide = None if self.guide is None else read_graph(self.guide, batch)
            plan = make_plan(graph, guide, batch, self.inputs, self.replace)
            check_values(plan, batch)
            self.plans[key] = plan
        return self.plans[key]


def make_plan(
    graph: Graph, guide: Graph | None, batch: Batch, inputs: tuple[str, ...], replace: tuple[str, ...]
) -> Plan:
    """Decide the role of every site (see the table of the module)."""
    for key in batch.names:
        _check_key(key, graph, inputs, batch, replace)
    if guide is not None:
        _check_guide(graph, guide)
    observed = tuple(key for key in batch.names if key in graph.sites)
    roles: dict[str, str] = {}
    plan = Plan(graph, guide, roles, observed, inputs)
    for name, site in graph.sites.items():  # those that the program observes decide what counts
        if site.kind == "sample" and site.own is not None and name not in observed:
            roles[name] = "own"
    for name, site in graph.sites.items():
        if site.kind != "sample" or name in roles:
            continue
        leaf = not graph.descendants(name)
        if name in observed:
            roles[name] = "given" if not batch.partly(name) else "masked" if leaf else "merged"
        elif guide is not None and plan.deciders(name) == ():
            roles[name] = "pruned"
        elif name in plan.proposed:
            roles[name] = "proposed"
        elif site.summable:
            roles[name] = "summed"
        else:
            roles[name] = "free"
        unknown = roles[name] == "free" or (roles[name] == "merged" and not site.summable)
        if guide is not None and unknown and name not in plan.proposed:
            proposed = ", ".join(guide.sites) or "nothing"
            raise ValueError(
                f"site {name!r} ({type(site.fn).__name__}) is not observed everywhere, cannot be summed"
                f" and is not proposed by the guide (which proposes: {proposed})"
            )
        if roles[name] == "merged" and batch.present(name).dim() > len(site.dims) and site.summable:
            raise ValueError(f"site {name!r}: single entries of a summed site cannot be missing")
    return plan


def _check_key(
    key: str, graph: Graph, inputs: tuple[str, ...], batch: Batch, replace: tuple[str, ...]
) -> None:
    if key in inputs:
        return
    site = graph.sites.get(key)
    if site is None:
        sites = [s.name for s in graph.sites.values() if s.kind == "sample"]
        near = difflib.get_close_matches(key, sites, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{key!r} is not a site of the program (sites: {', '.join(sites)}){hint} A value that is"
            f" only read, not modelled, is named by inputs=[{key!r}]"
        )
    if site.kind != "sample":
        raise ValueError(f"{key!r} is a {site.kind} site and cannot be observed")
    if not site.local:
        raise ValueError(
            f"site {key!r} is not in plate {DATA!r}, so a batch cannot observe it; fix a global value"
            " with pyro.poutine.condition(program, data={...})"
        )
    same = site.own is not None and _same(site, batch)
    if site.own is not None and not same and key not in replace:
        raise ValueError(
            f"the program already observes {key!r}; drop the key, or replace its value on purpose with"
            f" replace=[{key!r}]"
        )


def _same(site: Site, batch: Batch) -> bool:
    if site.own is None or tuple(site.row_shape) != tuple(batch[site.name].shape[1:]):
        return False
    mine = site.to_plates(batch[site.name], len(site.event_shape))
    return mine.numel() == site.own.numel() and bool(
        (mine.reshape(site.own.shape) == site.own).all()
    )


def _check_guide(graph: Graph, guide: Graph) -> None:
    for name, site in guide.sites.items():
        if name not in graph.sites:
            if not site.infer.get("is_auxiliary") and site.kind == "sample":
                raise ValueError(
                    f"the guide draws {name!r}, which is not a site of the program (sites:"
                    f" {', '.join(graph.sites)}); an auxiliary site says infer={{'is_auxiliary': True}}"
                )
        elif graph.sites[name].event_shape != site.event_shape:
            raise ValueError(
                f"site {name!r} has event shape {tuple(graph.sites[name].event_shape)} in the program,"
                f" but {tuple(site.event_shape)} in the guide"
            )
        elif graph.sites[name].own is not None:
            raise ValueError(f"the guide proposes {name!r}, which the program itself observes")


def check_values(plan: Plan, batch: Batch) -> None:
    """Check shapes, types and ranges of all observed values of a batch.

    Raises:
        ValueError: naming the site, what was expected and what came.
    """
    for name in plan.observed:
        site = plan.program.sites[name]
        value = batch[name]
        if value.shape[1:] != site.row_shape:
            raise ValueError(
                f"site {name!r} has rows of shape {tuple(site.row_shape)}, got {tuple(value.shape[1:])}"
            )
        if value.is_floating_point() and not site.dtype.is_floating_point:
            raise ValueError(f"site {name!r} takes integers, got {value.dtype}")
        base = site.fn
        while hasattr(base, "base_dist"):
            base = base.base_dist
        if base._validate_args is False:  # asked for: Bernoulli on grey pixels, for example
            continue
        present = batch.present(name)
        aligned = site.to_plates(value.to(site.dtype), len(site.event_shape))
        valid = site.fn.support.check(aligned)
        known = site.to_plates(present, present.dim() - min(present.dim(), len(site.dims)))
        if known.dim() > valid.dim():
            known = known.flatten(valid.dim()).all(-1)
        bad = int((~valid & known).sum())
        if bad:
            raise ValueError(
                f"site {name!r} takes values in {_support(site.fn.support)}, but {bad} of"
                f" {valid.numel()} lie outside (smallest {value.min():g}, largest {value.max():g})"
            )


def _support(support: Any) -> str:
    base = getattr(support, "base_constraint", support)
    bounds = [getattr(base, n, None) for n in ("lower_bound", "upper_bound")]
    if base.is_discrete and all(b is not None for b in bounds):
        low, high = (int(torch.as_tensor(b).max()) for b in bounds)
        return f"{low}..{high}"
    return str(base).removesuffix("()")


class _Handler(Messenger):
    """Treats every site of a program, or of a guide, as the plan says.  Innermost of all handlers."""

    def __init__(self, plan: Plan, batch: Batch, of_guide: bool) -> None:
        super().__init__()
        self.plan, self.batch, self.of_guide = plan, batch, of_guide

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or (msg["is_observed"] and msg["infer"].get("_deterministic")):
            return
        name = msg["name"]
        msg["infer"] = dict(msg["infer"])
        if name not in self.plan.program.sites:
            if not self.of_guide:
                raise ValueError(f"site {name!r} is not drawn in every run of the program")
            _mask(msg, self.plan.any_row(self.batch))
            return
        site = self.plan.program.sites[name]
        if site.kind != "sample":
            return
        treat = self._guide_site if self.of_guide else self._program_site
        treat(msg, site, self.plan.roles[name])

    def _program_site(self, msg: Any, site: Site, role: str) -> None:
        if role == "own":
            return
        if msg["is_observed"]:  # the batch replaces the program's own value
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
        if role in ("given", "masked"):
            self._observe(msg, site, role)
            return
        summed = site.name in self.plan.summed
        if role == "merged" and (site.summable or site.name not in self.plan.proposed):
            value, known = self._known(site)
            msg["fn"] = merge(msg["fn"], value, known, proposal=False)
        if summed:
            msg["infer"].setdefault("enumerate", "parallel")
        else:
            msg["infer"].pop("enumerate", None)
        if role == "pruned" and site.name not in self.plan.proposed:
            with torch.no_grad():  # a draw that costs nothing and that no objective looks for
                msg["value"], msg["is_observed"] = msg["fn"].sample(), True
        if self.plan.guide is not None:
            counts = self.plan.counts(site.name, self.batch)
            if summed:
                msg["infer"]["_counts"] = counts  # used after the sum, not inside
            else:
                _mask(msg, counts)

    def _observe(self, msg: Any, site: Site, role: str) -> None:
        value = site.to_plates(self.batch[site.name], len(site.event_shape)).to(site.dtype)
        if role == "masked":
            present = self.batch.present(site.name)
            if present.dim() <= len(site.dims):
                rows = site.to_plates(present, 0)
                known = rows.reshape(rows.shape + (1,) * len(site.event_shape))
                _mask(msg, rows)
            else:
                known = site.to_plates(present, len(site.event_shape))
                known = known.reshape(known.shape + (1,) * (value.dim() - known.dim()))
                msg["fn"] = observed_entries(msg["fn"], known, f"site {site.name!r}")
            value = torch.where(known, value, _placeholder(site, value))
        msg["value"], msg["is_observed"] = value, True

    def _guide_site(self, msg: Any, site: Site, role: str) -> None:
        if role in ("given", "masked"):
            value = site.to_plates(self.batch[site.name], len(site.event_shape)).to(site.dtype)
            msg["infer"].pop("enumerate", None)
            msg["infer"].update(_proposal=msg["fn"], is_auxiliary=True)
            msg["fn"] = Delta(value, event_dim=len(site.event_shape)).mask(False)
            return
        if role == "merged":
            value, known = self._known(site)
            entrywise = known.dim() == value.dim() and bool(site.event_shape)
            msg["fn"] = merge(msg["fn"], value, known, proposal=True, entrywise=entrywise)
        if role == "pruned":
            msg["infer"].pop("enumerate", None)
        elif msg["fn"].has_enumerate_support:
            msg["infer"].setdefault("enumerate", "parallel")
        _mask(msg, self.plan.counts(site.name, self.batch))

    def _known(self, site: Site) -> tuple[Tensor, Tensor]:
        """Value and presence over the plates of a site."""
        n = len(site.event_shape)
        value = site.to_plates(self.batch[site.name], n).to(site.dtype)
        present = self.batch.present(site.name)
        return value, site.to_plates(present, max(0, present.dim() - len(site.dims)))


def _mask(msg: Any, mask: bool | Tensor) -> None:
    if mask is not True:
        msg["mask"] = mask if msg["mask"] is None else msg["mask"] & mask


def _placeholder(site: Site, value: Tensor) -> Tensor:
    """A valid value for entries that nobody looks at."""
    support = site.fn.support
    zero = torch.zeros(site.event_shape, dtype=value.dtype, device=value.device)
    if support.is_discrete:
        low = getattr(getattr(support, "base_constraint", support), "lower_bound", 0)
        return zero + torch.as_tensor(low, dtype=value.dtype, device=value.device).max()
    return transform_to(support)(zero).to(value.dtype)


class Observed(nn.Module):
    """A program or guide that treats its sites as a batch says; call it with a batch."""

    def __init__(self, net: Net, pairing: _Pairing, of_guide: bool) -> None:
        super().__init__()
        self.module = net
        self._pairing = (pairing,)  # a tuple, or the other half's parameters would become ours
        self.of_guide = of_guide

    @property
    def pairing(self) -> _Pairing:
        """The pair that it belongs to, with its plans."""
        return self._pairing[0]

    def forward(self, batch: Data) -> Any:
        """Run on a batch; a dictionary is read by :meth:`Batch.of`."""
        ready = self.pairing.prepare(batch)
        with _Handler(self.pairing.plan(ready), ready, self.of_guide):
            return self.module(ready)


def pair(
    program: Net, guide: Net, inputs: Iterable[str] = (), replace: Iterable[str] = ()
) -> tuple[Observed, Observed]:
    """Both halves, observed: two modules that are called with a batch.

    Args:
        program: a callable ``program(batch)`` made of Pyro statements, with plate ``"data"``.
        guide: a callable ``guide(batch)`` that draws some of its latent sites.
        inputs: names of values that are read but are no sites.
        replace: sites that the program itself observes and whose value the batch replaces.

    Raises (when called):
        ValueError: a key of the batch is no site, a value does not fit its site, or a site is neither
            observed, summed nor proposed.
    """
    pairing = _Pairing(program, guide, inputs, replace)
    return Observed(program, pairing, False), Observed(guide, pairing, True)


def observe(program: Net, inputs: Iterable[str] = (), replace: Iterable[str] = ()) -> Observed:
    """The program alone, observed: for sampling, ``infer_discrete`` and MCMC.

    Unobserved finite sites are marked for enumeration; nothing is pruned, since a sampler needs the
    prior of every latent site.
    """
    return Observed(program, _Pairing(program, None, inputs, replace), False)


class _Registered(nn.Module):
    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name, self.module = name, module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pyro.module(self.name, self.module)
        return self.module(*args, **kwargs)


def register(module: nn.Module, name: str | None = None) -> nn.Module:
    """Show the parameters of a plain module to :class:`pyro.infer.SVI`, which trains nothing otherwise.

    The name under which they appear in Pyro's parameter store is, by default, ``program`` or ``guide``
    for the halves of a pair, and else the name of the class.
    """
    if name is None and isinstance(module, Observed):
        name = "guide" if module.of_guide else "program"
    return _Registered(name or type(module).__name__, module)
