"""Whether data and guide fit a program: keys, shapes, values, and what the guide proposes."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import Independent
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.graph import DATA, PLATE, Graph, Site, innermost
from pyrozoo.inference.supports import check_support, depends_on_draws, describe

if TYPE_CHECKING:
    from pyrozoo.inference.plan import Plan


def check_key(
    key: str, graph: Graph, inputs: tuple[str, ...], batch: Batch, replace: tuple[str, ...]
) -> None:
    """Check that a key of the data is a site that can be observed, or an input.

    Raises:
        ValueError: it is neither; the message has the sites and the nearest name.
    """
    site = graph.sites.get(key)
    if site is None:
        if key in inputs:
            return
        sites = [s.name for s in graph.sites.values() if s.kind == "sample"]
        known = {name.casefold(): name for name in [*sites, *inputs]}
        near = difflib.get_close_matches(key.casefold(), known, 1)
        hint = f" Did you mean {known[near[0]]!r}?" if near else ""
        raise ValueError(
            f"{key!r} is not a site of the program (sites: {', '.join(sites)}).{hint} A value that"
            f" is only read, not modelled, is named by inputs=[{key!r}]"
        )
    if site.kind != "sample":
        raise ValueError(f"{key!r} is a {site.kind} site and cannot be observed")
    if not site.local and not any(s.local for s in graph.sites.values()):
        plates = ", ".join({repr(p): 0 for s in graph.sites.values() for p in s.dims}) or "none"
        raise ValueError(
            f"site {key!r} is not in plate {DATA!r}, and neither is any other site (plates:"
            f" {plates}); draw what every row has inside of with {PLATE}:"
        )
    if not site.local:
        raise ValueError(
            f"site {key!r} is not in plate {DATA!r}, so a batch cannot observe it; fix a global"
            " value with pyro.poutine.condition(program, data={...})"
        )
    same = site.own is not None and _same(site, batch)
    if site.own is not None and not same and key not in replace:
        raise ValueError(
            f"the program already observes {key!r}; drop the key, or replace its value on purpose"
            f" with replace=[{key!r}]"
        )


def _same(site: Site, batch: Batch) -> bool:
    if site.own is None or tuple(site.row_shape) != tuple(batch[site.name].shape[1:]):
        return False
    mine = site.to_plates(batch[site.name], len(site.event_shape))
    return mine.numel() == site.own.numel() and bool(
        (mine.reshape(site.own.shape) == site.own).all()
    )


def check_guide(graph: Graph, guide: Graph, roles: dict[str, str], batch: Batch) -> None:
    """Check that what a guide proposes are sites of the program, of the same shapes and plates.

    Raises:
        ValueError: naming the site, what the program has and what the guide has.
    """
    for name, proposal in guide.sites.items():
        site = graph.sites.get(name)
        if site is None:
            if not proposal.infer.get("is_auxiliary") and proposal.kind == "sample":
                raise ValueError(
                    f"the guide draws {name!r}, which is not a site of the program (sites:"
                    f" {', '.join(graph.sites)}); an auxiliary site says"
                    " infer={'is_auxiliary': True}"
                )
            continue
        if site.event_shape != proposal.event_shape:
            hint = (
                ".to_event(n) declares n dimensions as the event, all others lie in the same plates"
                " in both"
            )
            if not site.local and len(batch) in site.event_shape:
                hint = (
                    "if it has an entry for each row, all rows have to be taken at once: by the"
                    " example=... of the guide, and by batch_size"
                )
            raise ValueError(
                f"site {name!r} has event shape {tuple(site.event_shape)} in the program, but"
                f" {tuple(proposal.event_shape)} in the guide; {hint}"
            )
        if site.dims != proposal.dims:
            raise ValueError(
                f"site {name!r} lies in plates {site.dims or 'none'} (name: dim) in the program,"
                f" but {proposal.dims or 'none'} in the guide; draw it in the same plates, entered"
                " in the same order or with the same dim=..."
            )
        if site.sizes != proposal.sizes:
            raise ValueError(
                f"site {name!r} lies in plates of sizes {site.sizes} in the program, but"
                f" {proposal.sizes} in the guide"
            )
        if roles.get(name) == "own":
            raise ValueError(f"the guide proposes {name!r}, which the program itself observes")
        if site.kind == proposal.kind == "sample":
            check_support(site, proposal)


def check_shapes(graph: Graph, batch: Batch) -> None:
    """Check that the rows of every observed site have its shape, before a guide reads them.

    Raises:
        ValueError: naming the site, what was expected and what came.
    """
    for name in batch.names:
        site = graph.sites.get(name)
        if site is None or site.kind != "sample" or not site.local:
            continue
        got = batch.shape(name)[1:]
        if got != site.row_shape:
            raise ValueError(
                f"site {name!r} has rows of shape {tuple(site.row_shape)}, got {tuple(got)}"
            )


def check_values(plan: Plan, batch: Batch) -> None:
    """Check types and ranges of all observed values of a batch.

    Raises:
        ValueError: naming the site, what was expected and what came.
    """
    for name in plan.observed:
        site = plan.program.sites[name]
        value = batch[name]
        if value.is_floating_point() and not site.dtype.is_floating_point:
            raise ValueError(f"site {name!r} takes integers, got {value.dtype}; pass value.long()")
        n, support = len(site.event_shape), site.fn.support
        if innermost(site.fn)._validate_args is False:
            if not isinstance(innermost(site.fn), torch.distributions.Bernoulli):
                continue
            support = constraints.independent(constraints.unit_interval, n)  # grey pixels
        if depends_on_draws(support):
            continue
        aligned = site.to_plates(value.to(site.dtype), n)
        present = batch.present(name)
        known = site.to_plates(present, max(0, present.dim() - len(site.dims)))
        entries = present.dim() > len(site.dims)
        if entries and not isinstance(site.fn, Independent):
            continue  # real vectors, or refused when observed
        if entries:
            full = known.reshape(known.shape + (1,) * (aligned.dim() - known.dim()))
            aligned = torch.where(full, aligned, placeholder(site, support, aligned))
        wrong = ~support.check(aligned)
        wrong = wrong if entries else wrong & known
        if bad := int(wrong.sum()):
            seen = aligned.expand(wrong.shape + site.event_shape)[wrong]
            base = getattr(support, "base_constraint", support)
            if hasattr(base, "explain"):  # a support that says itself what is wrong
                raise ValueError(
                    f"site {name!r}, {base.explain(seen)}; what is not known is said with a pair"
                    " (value, present)"
                )
            raise ValueError(
                f"site {name!r} takes values in {describe(support)}, but {bad} of {wrong.numel()}"
                f" lie outside (smallest {seen.min():g}, largest {seen.max():g}); what is not known"
                " is said with a pair (value, present)"
            )


def placeholder(site: Site, support: Any, value: Tensor) -> Tensor:
    """A valid value for entries that nobody looks at."""
    base = getattr(support, "base_constraint", support)
    if hasattr(base, "placeholder"):  # a support that knows one
        return base.placeholder(value)
    zero = torch.zeros(site.event_shape, dtype=value.dtype, device=value.device)
    if support is constraints.one_hot:
        zero[..., 0] = 1
        return zero
    if support.is_discrete:
        low = getattr(getattr(support, "base_constraint", support), "lower_bound", 0)
        return zero + torch.as_tensor(low, dtype=value.dtype, device=value.device).max().detach()
    transform = transform_to(support)
    shape = transform.inverse_shape(site.event_shape)
    return transform(zero.new_zeros(shape)).to(value.dtype).detach()
