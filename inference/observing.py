"""Observing: a program and a guide, run so that a batch decides what is known, row by row.

:func:`pair` turns the two into modules that are called with a batch.  They run under an effect
handler that treats every site as the plan for what is observed says, see :mod:`.plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.checking import check_shapes, check_values, placeholder
from pyrozoo.inference.disk.stored import Stored
from pyrozoo.inference.graph import DATA, Site, modules_of, read_graph
from pyrozoo.inference.partial import mark_enumerated, merge, observed_entries
from pyrozoo.inference.plan import Plan, make_plan

__all__ = ["Net", "Observed", "Plan", "check_values", "observe", "pair", "register"]

Net = nn.Module | Callable[[Batch], Any]


class _Pairing:
    """A program, perhaps with a guide, and its plans: one for each observation pattern."""

    def __init__(
        self, program: Net, guide: Net | None, inputs: Iterable[str], replace: Iterable[str]
    ) -> None:
        for what, net in (("program", program), ("guide", guide)):
            _check_net(what, net)
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
                for module in modules_of(net)
                for p in module.parameters()
                if p.is_floating_point()
            ),
            None,  # without parameters, values stay as they are
        )
        return batch if dtype in (None, batch._dtype) else batch.to(dtype=dtype)

    def plan(self, batch: Batch) -> Plan:
        """The plan for the observation pattern of a batch; the first of a pattern is checked."""
        key = tuple((n, batch.mask_dims(n), batch.shape(n)[1:]) for n in batch.names)
        if key not in self.plans:
            if isinstance(batch, Stored):
                batch.refuse("a run of the program")
            graph = read_graph(self.program, batch)
            check_shapes(graph, batch)
            guide = None if self.guide is None else read_graph(self.guide, batch)
            plan = make_plan(graph, guide, batch, self.inputs, self.replace)
            check_values(plan, batch)
            self.plans[key] = plan
        return self.plans[key]


def _check_net(what: str, net: Any) -> None:
    name = getattr(net, "__name__", type(net).__name__)
    if isinstance(net, type):
        raise TypeError(f"the {what} is the class {name}; pass an instance, {name}(...)")
    forward = net.forward if isinstance(net, nn.Module) else net
    missing = getattr(forward, "__func__", None) is nn.Module.forward
    if net is not None and (missing or not callable(net)):
        raise TypeError(
            f"the {what} is to be called with a batch, but {name} has no forward(batch)"
        )


class _Handler(Messenger):
    """Treats every site of a program, or of a guide, as the plan says.  Innermost handler."""

    def __init__(self, plan: Plan, batch: Batch, of_guide: bool) -> None:
        super().__init__()
        self.plan, self.batch, self.of_guide = plan, batch, of_guide
        self.expected = (plan.guide if of_guide else plan.program) or plan.program
        self.seen: set[str] = set()

    def check_all_seen(self) -> None:
        """Raise if a site was left out in this run."""
        for name, site in self.expected.sites.items():
            if name not in self.seen and site.kind != "deterministic":
                raise ValueError(_changing(name))

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name = msg["name"]
        if name not in self.expected.sites:
            if msg["infer"].get("_deterministic"):
                return
            raise ValueError(_changing(name))
        self.seen.add(name)
        sizes = self.expected.sites[name].sizes
        for frame in msg["cond_indep_stack"]:
            if frame.name != DATA and sizes.get(frame.name, frame.size) != frame.size:
                raise ValueError(
                    f"plate {frame.name!r} at site {name!r} had size {sizes[frame.name]} in one run"
                    f" and has {frame.size} in another; make it as large as ever needed and leave"
                    " out the rest with poutine.mask"
                )
        if msg["is_observed"] and msg["infer"].get("_deterministic"):
            return
        msg["infer"] = dict(msg["infer"])
        if name not in self.plan.program.sites:
            guide = self.plan.guide
            assert guide is not None
            if guide.sites[name].kind == "sample":
                _mask(msg, self.plan.counts_auxiliary(name, self.batch))
            return
        site = self.plan.program.sites[name]
        if site.kind != "sample":
            return
        treat = self._guide_site if self.of_guide else self._program_site
        treat(msg, site, self.plan.roles[name])

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["type"] != "sample" or self.plan.roles.get(msg["name"]) != "merged":
            return
        if not msg["infer"].keys().isdisjoint(("_enumerate_dim", "_enum_total")):
            mark_enumerated(msg["fn"])
        if self.plan.guide is None:
            value, known = self._known(self.plan.program.sites[msg["name"]])
            mask = known.reshape(known.shape + (1,) * (value.dim() - known.dim()))
            if bool(((msg["value"] != value) & mask).any()):
                raise ValueError(
                    f"site {msg['name']!r} is known in part, but got another value from outside;"
                    " MCMC and conditioning need it to be known everywhere or nowhere"
                )

    def _program_site(self, msg: Any, site: Site, role: str) -> None:
        if role == "own":
            return
        if msg["is_observed"]:  # the batch replaces the program's own value
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
        if role in ("given", "masked"):
            self._observe(msg, site, role)
            return
        if role == "fixed":  # nobody else is to give it a value
            msg["value"], msg["is_observed"] = msg["fn"](), True
        summed = site.name in self.plan.summed
        if role == "merged" and (site.summable or site.name not in self.plan.proposed):
            value, known = self._known(site)
            msg["fn"] = merge(msg["fn"], value, known, proposal=False)
        if summed:
            msg["infer"].setdefault("enumerate", "parallel")
        else:
            msg["infer"].pop("enumerate", None)
        if role == "pruned" and site.name not in self.plan.proposed:
            fn = msg["fn"]  # no objective looks at it; what leads to it falls away when staged
            like = torch.zeros((), dtype=site.dtype, device=self.batch.device)
            value = placeholder(site, fn.support, like).expand(fn.shape())
            msg["value"], msg["is_observed"] = value, True
        if self.plan.guide is not None:
            counts = self.plan.counts(site.name, self.batch)
            if summed:
                msg["infer"]["_counts"] = counts  # used after the sum, not inside
            else:
                _mask(msg, counts)

    def _observe(self, msg: Any, site: Site, role: str) -> None:
        value, known = self._known(site)
        if role == "masked":
            if known.dim() == value.dim() and site.event_shape:
                msg["fn"] = observed_entries(msg["fn"], known, f"site {site.name!r}")
            else:
                _mask(msg, known)
                known = known.reshape(known.shape + (1,) * len(site.event_shape))
            value = torch.where(known, value, placeholder(site, msg["fn"].support, value))
        msg["value"], msg["is_observed"] = value, True

    def _guide_site(self, msg: Any, site: Site, role: str) -> None:
        if role in ("given", "masked"):
            value, _ = self._known(site)
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
        """Value and presence over the plates of a site; presence has the event if entries miss."""
        value = site.to_plates(self.batch[site.name], len(site.event_shape)).to(site.dtype)
        present = self.batch.present(site.name)
        if (entries := present.dim() - len(site.dims)) <= 0:
            return value, site.to_plates(present, 0)
        present = present.reshape(present.shape + (1,) * (len(site.event_shape) - entries))
        return value, site.to_plates(present, len(site.event_shape))


def _changing(name: str) -> str:
    return (
        f"site {name!r} is not drawn in every run; which sites there are may not depend on drawn"
        " values or on chance: draw all of them always, and choose with torch.where or poutine.mask"
    )


def _mask(msg: Any, mask: bool | Tensor) -> None:
    if mask is not True:
        msg["mask"] = mask if msg["mask"] is None else msg["mask"] & mask


class Observed(nn.Module):
    """A program or guide that treats its sites as a batch says; call it with a batch."""

    def __init__(self, net: Net, pairing: _Pairing, of_guide: bool, name: str = "") -> None:
        super().__init__()
        self.module = net
        if not isinstance(
            net, nn.Module
        ):  # a partial or a method: its parameters are ours all the same
            self.inside = nn.ModuleList(modules_of(net))
        self._pairing = (pairing,)  # a tuple, or the other half's parameters would become ours
        self.of_guide = of_guide
        self.until = ""  # the last site that is drawn, '' for all
        self.name = name  # in Pyro's parameter store, if registered

    @property
    def pairing(self) -> _Pairing:
        """The pair that it belongs to, with its plans."""
        return self._pairing[0]

    def forward(self, batch: Data) -> Any:
        """Run on a batch; a dictionary is read by :meth:`Batch.of`."""
        ready = self.pairing.prepare(batch)
        if isinstance(ready, Stored):
            ready.refuse("a run of the program")
        if self.name:
            _register(self.name, self)
        handler = _Handler(self.pairing.plan(ready), ready, self.of_guide)
        with handler:
            result = self.module(ready)
        if self.module is (self.pairing.guide if self.of_guide else self.pairing.program):
            handler.check_all_seen()  # a run may also end early, see :func:`.running.until`
        return result


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
        ValueError: a key of the batch is no site, a value does not fit its site, or a site is
            neither observed, summed nor proposed.
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
        _register(self.name, self.module)
        return self.module(*args, **kwargs)


def _register(name: str, module: nn.Module) -> None:
    if next(module.parameters(), None) is not None:
        pyro.module(name, module)


def register(module: nn.Module, name: str | None = None) -> nn.Module:
    """Show the parameters of a module to :class:`pyro.infer.SVI`, which trains nothing otherwise.

    The name under which they appear in Pyro's parameter store is, by default, ``program`` or
    ``guide`` for the halves of a pair, and else the name of the class.
    """
    if isinstance(module, Observed):
        name = name or ("guide" if module.of_guide else "program")
        return Observed(module.module, module.pairing, module.of_guide, name)
    return _Registered(name or type(module).__name__, module)
