"""The dependency graph of a program or guide, read from one run of it.

The run is unobserved (conditioning that the program brings along is undone, since observed values
cut dependencies), in evaluation mode, hidden from every handler around it and on a copy of the
random state: looking at a program changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import Delta, Unit
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyrozoo.inference.batch import Batch

DATA = "data"  # the name of the plate over the rows of a batch


@dataclass(frozen=True)
class Site:
    """What one run says of a ``pyro.sample`` statement.

    ``dims`` maps each vectorised plate to its tensor dimension, ``sizes`` to its size; ``parents``
    are the sites that its distribution reads; ``own`` is a value that the program itself brings
    (``obs=``).
    """

    name: str
    fn: Any
    dims: dict[str, int]
    sizes: dict[str, int]
    parents: frozenset[str]
    kind: str  # "sample", "factor" or "deterministic"
    infer: dict[str, Any]
    scale: Any
    dtype: torch.dtype
    own: Tensor | None = None

    @property
    def local(self) -> bool:
        """Whether it lies in the plate over the data."""
        return DATA in self.dims

    @property
    def summable(self) -> bool:
        """Whether its values can be enumerated exactly."""
        return bool(self.fn.has_enumerate_support)

    @property
    def continuous(self) -> bool:
        """Whether its support is continuous."""
        return not self.fn.support.is_discrete

    @property
    def fixed(self) -> bool:
        """Whether the program computes its value (a ``Delta``): nobody has to propose it."""
        return isinstance(innermost(self.fn), Delta)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one draw, without plates."""
        return torch.Size(self.fn.event_shape)

    @property
    def row_shape(self) -> torch.Size:
        """Shape of one row of data: the plates inside the data plate, then the event."""
        inner = [size for plate, size in self.sizes.items() if plate != DATA]
        return torch.Size(inner) + self.event_shape

    def to_plates(self, value: Tensor, event_dim: int) -> Tensor:
        """Bring ``(rows, *inner plates, *event)`` into the order of the plates' dimensions.

        Inner plates are in the order in which the program enters them; those at the end may be left
        out, as in a mask per row.
        """
        order = [DATA, *(plate for plate in self.dims if plate != DATA)]
        lead, split = len(order), value.dim() - event_dim
        event = value.shape[split:]
        value = value.reshape(value.shape[:split] + (1,) * (lead - split) + event)
        perm = sorted(range(lead), key=lambda i: self.dims[order[i]])
        value = value.permute(*perm, *range(lead, lead + event_dim))
        shape = [1] * max(-dim for dim in self.dims.values())
        for position, i in enumerate(perm):
            shape[self.dims[order[i]]] = value.shape[position]
        return value.reshape(*shape, *event)


@dataclass(frozen=True)
class Graph:
    """All sites of one program, in the order of the program."""

    sites: dict[str, Site]
    _below: dict[str, frozenset[str]] = field(default_factory=dict)

    def descendants(self, name: str) -> frozenset[str]:
        """The sites that depend on ``name``, directly or not."""
        if name not in self._below:
            found = {name}
            for other in self.sites.values():  # program order is a topological order
                if found & other.parents:
                    found.add(other.name)
            self._below[name] = frozenset(found - {name})
        return self._below[name]

    @property
    def nesting(self) -> int:
        """The number of tensor dimensions that its plates take."""
        return max((-d for s in self.sites.values() for d in s.dims.values()), default=0)


class _Bare(Messenger):
    """Undo conditioning and keep the value aside; factors and deterministic sites stay."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and _kind(msg) == "sample":
            msg["infer"] = {**msg["infer"], "_own": msg["value"]}
            msg["is_observed"] = False
            msg["value"] = None
            msg["done"] = False


class _Track(Messenger):
    """Mark every draw with its own name, so that what is computed from it can be traced back.

    Unlike Pyro's ``TrackProvenance`` this does not look through ``Delta`` sites.
    """

    def _pyro_post_sample(self, msg: Any) -> None:
        if _kind(msg) == "sample" and not site_is_subsample(msg):
            value = detach_provenance(msg["value"])
            msg["value"] = track_provenance(value, frozenset({msg["name"]}))


def _kind(msg: Any) -> str:
    if isinstance(msg["fn"], Unit):
        return "factor"
    if msg["infer"].get("_deterministic"):
        return "deterministic"
    return "sample"


def innermost(fn: Any) -> Any:
    """A distribution without masks, expansions and reinterpreted dimensions around it."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def modules_of(net: Any, depth: int = 4) -> list[nn.Module]:
    """The modules in a module, a bound method, a partial (what handlers return) or a closure."""
    if isinstance(net, nn.Module):
        return [net]
    if isinstance(net, functools.partial):
        inside = [net.func, *net.args, *net.keywords.values()]
    elif inspect.ismethod(net):
        inside = [net.__self__]
    elif inspect.isfunction(net):
        inside = list(inspect.getclosurevars(net).nonlocals.values())
    else:
        inside = []
    found = {id(m): m for x in inside if callable(x) and depth for m in modules_of(x, depth - 1)}
    return list(found.values())


@contextlib.contextmanager
def undisturbed(*nets: Any) -> Iterator[None]:
    """Run in evaluation mode on a copy of the random state; restore every flag afterwards."""
    training = [
        m for net in nets for inside in modules_of(net) for m in inside.modules() if m.training
    ]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        for m in training:
            m.training = False
        try:
            yield
        finally:
            for m in training:
                m.training = True


def read_graph(program: Callable[[Batch], Any], batch: Batch) -> Graph:
    """Run a program or guide once, unobserved, and read its sites and their dependencies.

    Raises:
        ValueError: a name is drawn twice, or the program's own plate does not fit the batch.
    """
    with (
        undisturbed(program),
        torch.no_grad(),
        pyro.validation_enabled(True),
        poutine.block(),
        _Track(),
    ):
        trace = poutine.trace(_Bare()(program)).get_trace(batch)
        sites = {}
        for name, msg in trace.nodes.items():
            if msg["type"] == "sample" and not site_is_subsample(msg):
                sites[name] = _site(name, msg, batch)
    return Graph(sites)


def _site(name: str, msg: Any, batch: Batch) -> Site:
    kind = _kind(msg)
    frames = [f for f in msg["cond_indep_stack"] if f.vectorized]
    for frame in frames:
        if frame.name == DATA and frame.size != len(batch):
            raise ValueError(
                f"plate 'data' has {frame.size} rows at site {name!r}, but the batch has"
                f' {len(batch)}: write pyro.plate("data", len(batch))'
            )
    if kind == "deterministic":
        parents = get_provenance(msg["value"])
    else:
        parents = get_provenance(msg["fn"].log_prob(msg["value"]))
        parents |= get_provenance(msg["mask"]) | get_provenance(msg["scale"])
    return Site(
        name=name,
        fn=msg["fn"],
        dims={f.name: f.dim for f in frames},
        sizes={f.name: f.size for f in frames},
        parents=frozenset(parents) - {name},
        kind=kind,
        dtype=detach_provenance(msg["value"]).dtype,
        infer=dict(msg["infer"]),
        scale=detach_provenance(msg["scale"]),
        own=msg["infer"].get("_own"),
    )
