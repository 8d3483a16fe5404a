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
from pyrozoo.inference.provenance import Watch

DATA = "data"  # the name of the plate over the rows of a batch
PLATE = 'pyro.plate("data", len(batch))'


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
    value: Tensor | None = field(default=None, repr=False)  # what was drawn

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
    """All sites of one program, in the order of the program.

    ``turned`` says where the program makes a Python number, or a branch, of the value of a site:
    what depends on that is not seen.
    """

    sites: dict[str, Site]
    turned: dict[str, str] = field(default_factory=dict)
    _below: dict[str, frozenset[str]] = field(default_factory=dict)

    def descendants(self, name: str) -> frozenset[str]:
        """The sites that depend on ``name``, directly or not; none that are deterministic."""
        if name not in self._below:
            found = {name}
            for other in self.sites.values():  # program order is a topological order
                if found & other.parents and other.kind != "deterministic":
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
        ValueError: it reads a value that the batch lacks, branches on what it has drawn, or its own
            plate does not fit the batch.
        RuntimeError: a name is drawn twice.
    """
    watch = Watch()
    with (
        undisturbed(program),
        torch.no_grad(),
        pyro.validation_enabled(True),
        poutine.block(),
        _Track(),
    ):
        try:
            with watch:
                trace = poutine.trace(_Bare()(program)).get_trace(batch)
        except Exception as error:
            _explain(error, program, batch, watch.found)
            raise
        sites, turned = {}, dict(watch.found)
        with watch:
            for name, msg in trace.nodes.items():
                if msg["type"] == "sample" and not site_is_subsample(msg):
                    sites[name] = _site(name, msg, batch)
    return Graph(sites, turned)


def turned_into_python(name: str, where: str) -> str:
    """What is wrong with making a Python number, or a branch, of the value of a site."""
    return (
        f"the value of site {name!r} becomes a Python number or decides a branch ({where}), which"
        " hides what depends on it; compute with tensors: torch.where in place of if, no .item()"
    )


def _explain(error: Exception, program: Any, batch: Batch, turned: dict[str, str]) -> None:
    """Raise a clearer error where the reason is known; else add to it what was being done."""
    text = str(error.args[0]) if error.args else ""
    name = getattr(program, "__name__", type(program).__name__)
    if isinstance(error, KeyError) and "is not observed in this batch" in text:
        key = text.partition(" is not")[0]
        raise ValueError(
            f"{name} reads batch[{key}], but the batch has {', '.join(batch.names) or 'no values'};"
            f" a value that is read is in the data, named by inputs=[{key}] if it is no site, and"
            " in the example=... of a guide that is built from the program"
        ) from error
    if isinstance(error, RuntimeError) and turned and text.startswith("Boolean value"):
        raise ValueError(turned_into_python(*list(turned.items())[-1])) from error
    if text.startswith("subsample_size does not match"):
        raise ValueError(
            f"a plate of {name} takes a part of its entries (subsample_size=): write {PLATE};"
            " minibatches are cut by fit(batch_size=)"
        ) from error
    arguments = _arguments(program)
    required = [n for n, needed in arguments.items() if needed]
    if len(required) > 1 or (len(arguments) > 1 and "Batch" in text):  # not made for a batch
        raise TypeError(
            f"{name}({', '.join(arguments)}) was called with one batch and failed"
            f" ({type(error).__name__}: {text}): write {name}(batch), read values as batch['x'],"
            f" naming what is no site with inputs=['x'], write {PLATE}:, and draw what is observed"
            " without obs=, under the name that the data have"
        ) from error
    hint = ""
    if "Shape mismatch inside plate" in text:
        hint = "; dimensions that belong to one row are declared by .to_event(n)"
    error.add_note(f"{name} was run as {name}(batch), on {batch!r}, to read its sites{hint}")


def _arguments(program: Any) -> dict[str, bool]:
    """What a program takes, but for ``*args`` and ``**kwargs``: name -> whether it is needed."""
    with contextlib.suppress(TypeError, ValueError):  # those of built-in functions are not known
        found = inspect.signature(getattr(program, "forward", program)).parameters.values()
        named = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return {p.name: p.default is p.empty for p in named}
    return {}


def _site(name: str, msg: Any, batch: Batch) -> Site:
    kind = _kind(msg)
    for frame in msg["cond_indep_stack"]:
        if frame.name == DATA:
            _check_rows(name, frame, batch)
    frames = [f for f in msg["cond_indep_stack"] if f.vectorized]
    if kind == "deterministic":
        parents = get_provenance(msg["value"])
    else:
        parents = get_provenance(msg["fn"].log_prob(msg["value"]))
        parents |= get_provenance(msg["mask"]) | get_provenance(msg["scale"])
    value, fn = detach_provenance(msg["value"]), msg["fn"]
    if kind == "deterministic" and fn.event_dim >= value.dim() and frames:  # says nothing of it
        depth = max(-f.dim for f in frames)
        fn = Delta(value, event_dim=max(0, value.dim() - depth)).mask(False)
    return Site(
        name=name,
        fn=fn,
        dims={f.name: f.dim for f in frames},
        sizes={f.name: f.size for f in frames},
        parents=frozenset(parents) - {name},
        kind=kind,
        dtype=value.dtype,
        value=value,
        infer=dict(msg["infer"]),
        scale=detach_provenance(msg["scale"]),
        own=msg["infer"].get("_own"),
    )


def _check_rows(name: str, frame: Any, batch: Batch) -> None:
    if not frame.vectorized:
        raise ValueError(
            f"plate 'data' is iterated over at site {name!r}, so that every row has sites of its"
            f" own; write with {PLATE}: and draw all rows at once"
        )
    if frame.size != len(batch):
        raise ValueError(
            f"plate 'data' has {frame.size} rows at site {name!r}, but the batch has {len(batch)}:"
            f" write {PLATE}"
        )
    if frame.full_size not in (None, frame.size):
        raise ValueError(
            f"plate 'data' draws {frame.size} of {frame.full_size} rows at site {name!r}, which"
            f" would count them {frame.full_size / frame.size:g} times each: write {PLATE}; the"
            " objective knows the number of rows (num_rows=)"
        )
