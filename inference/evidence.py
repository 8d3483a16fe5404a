"""The evidence of every row, log p(observed), by importance sampling.

With P draws of the guide, ``y`` the finite sites that are summed in the program or enumerated by
the guide, and z all others that the guide proposes, a row's estimate is ::

    log (1/P) sum_p sum_y p(x, y, z_p) / q(z_p | x)              z_p ~ q(z | x)
    log (1/P) sum_p sum_y p(x, y, z_py) / q(z_py | x, y)         z_py ~ q(z | x, y), one for each y

A guide's q(y | x) has no part in it: the sum over y is exact, whatever a classifier believes.  The
average of the weights is unbiased for p(x), so that its logarithm is a lower bound in expectation,
which grows with P and tends to log p(x).

Source: Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, "Importance weighted autoencoders" (2016).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.bounds.runs import one_by_one, run, sample_sites
from pyrozoo.inference.bounds.terms import take_apart
from pyrozoo.inference.bounds.weights import log_weights
from pyrozoo.inference.graph import innermost
from pyrozoo.inference.observing import Net, Observed
from pyrozoo.inference.plan import Plan
from pyrozoo.inference.reading import read_count
from pyrozoo.inference.running import slices
from pyrozoo.inference.staging.tracing import NotCompiled, Traced, agree, compile_graph, draw

ELEMENTS = {"cpu": 2**21}  # of the widest tensor: small enough for a processor's cache
ELEMENTS_ELSEWHERE = 2**26
OFTEN = 128  # passes of one shape from which it pays to write them down without the handlers


def log_evidence(
    program: Net,
    guide: Net,
    data: Data,
    num_particles: int = 1000,
    *,
    inputs: Iterable[str] = (),
    chunk_size: int | None = None,
    compile: bool = False,
    seed: int = 0,
) -> Tensor:
    """Estimates of log p(observed) in nats, ``(rows,)``: see the formulas of the module.

    The probability is that of everything that is observed in a row, labels too; what is missing is
    marginalised, and a row with nothing observed has 0.  Weights of training, as those of the
    objective and ``poutine.scale``, play no part.  Runs in evaluation mode; the global random state
    is left as it was.

    Args:
        program, guide: the fitted pair.
        data: what is known.
        num_particles: draws of the guide per row, P (for a site that the guide enumerates, P for
            each of its values).
        inputs: names of values that are read but are no sites.
        chunk_size: rows x particles that are computed at once; by default so many that the widest
            tensor has about 2^21 elements on a CPU, 2^26 elsewhere.  The estimates for another size
            are others, from the same distribution.
        compile: compile what is repeated (some seconds at first), where a compiler is at hand;
            without one a warning says so.
        seed: of the draws.

    Raises:
        ValueError: a proposed site is shared by all rows, or is a point mass; an auxiliary site of
            the guide is not all that its followers depend on; there are no rows; or a value or an
            option does not fit.
    """
    num_particles = read_count("num_particles", num_particles)
    size = None if chunk_size is None else read_count("chunk_size", chunk_size)
    objective = EnumELBO(kl="sampled", split=False, inputs=tuple(inputs))
    objective._reparameterised = False  # there is no gradient
    found, fast = [], {}
    for p, q, batch, plan in slices(objective, program, guide, data, 1024, seed):
        refuse_shared(plan)
        rows, counts = portions(p, q, batch, plan, num_particles, size)
        with pyro.validation_enabled(False):
            for start in range(0, len(batch), rows):
                piece, sums = batch[start : start + rows], []
                for count in counts:
                    key = (id(plan), len(piece), count)
                    if key not in fast:
                        often = len(batch) // len(piece) * counts.count(count) >= OFTEN
                        fast[key] = _function(p, q, piece, count, often, compile)
                    sums.append(fast[key](piece))
                found.append(torch.stack(sums).logsumexp(0) - math.log(num_particles))
    return torch.cat(found)


def portions(
    p: Observed, q: Observed, batch: Batch, plan: Plan, num_particles: int, size: int | None
) -> tuple[int, list[int]]:
    """How many rows are computed at once, and how many of their particles in each pass.

    All rows, where the program has observed values of its own (``obs=``), which cannot be sliced,
    and where draws have to be run one by one.

    Args:
        p, q: the observed pair.
        batch: the rows.
        plan: of their sites.
        num_particles: of each row.
        size: rows x particles that are computed at once; default: see :func:`fitting`.
    """
    if "own" in plan.roles.values() or one_by_one(p, batch):
        rows = len(batch)
        most = fitting(p, q, batch)
        most = min(most, max(1, size // rows)) if size else most
    else:
        most = size or fitting(p, q, batch[:1])
        rows = max(1, most // num_particles)
    return rows, evenly(num_particles, most)


def evenly(count: int, most: int) -> list[int]:
    """A number in parts of at most so many, as equal as can be."""
    parts = math.ceil(count / most)
    return [count // parts + (i < count % parts) for i in range(parts)]


def draw_log_weights(p: Observed, q: Observed, batch: Batch, count: int) -> Tensor:
    """Log-weights of ``count`` draws of the guide for every row, ``(count, rows)``."""
    traces = (sample_sites(trace) for trace in run(p, q, batch, count))
    program, guide = ({n: {**site, "scale": 1.0} for n, site in t.items()} for t in traces)
    return log_weights(take_apart(p.pairing.plan(batch), program, guide, len(batch), count))


def _function(
    p: Observed, q: Observed, batch: Batch, count: int, often: bool, compile: bool
) -> Callable[[Batch], Tensor]:
    """The log of the sum of the weights of ``count`` draws, ``(rows,)``, for batches like this one.

    If it is called often it is a graph of tensor operations, without the handlers, where the
    program and the guide can be written down as one.  The draws are the same.
    """
    leaves, spec = _pytree.tree_flatten(batch)

    def eager(*leaves: Tensor) -> list[Tensor]:
        some = _pytree.tree_unflatten(list(leaves), spec)
        return [draw_log_weights(p, q, some, count).logsumexp(0)]

    function: Callable[..., list[Tensor]] = eager
    if often or compile:
        with warnings.catch_warnings(), contextlib.suppress(Exception):  # else as it is
            warnings.simplefilter("ignore")  # of the tracer's own
            graph = make_fx(eager, tracing_mode="fake", _allow_non_fake_inputs=True)(*leaves)
            right = draw(eager, *leaves)
            if agree(draw(graph, *leaves), right):
                function = graph
    if compile:
        try:
            if function is eager:
                raise NotCompiled("program and guide cannot be written down as a graph")
            function = compile_graph(Traced(graph, [], []), leaves, right)
        except NotCompiled as error:
            warnings.warn(f"log_evidence is not compiled: {error}", stacklevel=3)
    return lambda batch: function(*_pytree.tree_leaves(batch))[0]


def refuse_shared(plan: Plan) -> None:
    """Raise ValueError where a row has no evidence of its own, or its weights are not known."""
    assert plan.guide is not None
    for name, site in plan.guide.sites.items():
        role = plan.roles.get(name, "auxiliary")
        if site.kind != "sample" or role not in ("proposed", "merged", "auxiliary"):
            continue
        if not site.local:
            raise ValueError(
                f"site {name!r} is shared by all rows, which therefore have no evidence of their"
                " own; fix its value with pyro.poutine.condition(program, data={...}) and leave it"
                " out of the guide"
            )
        if role == "auxiliary" and not site.infer.get("reversed"):
            for other in plan.guide.sites.values():
                if name in other.parents and not other.fixed:
                    raise ValueError(
                        f"the guide draws {other.name!r} given its auxiliary site {name!r}, so that"
                        f" the density of its draws of {other.name!r} is not known"
                    )
        elif site.fixed and not site.parents - plan.roles.keys():
            raise ValueError(
                f"the guide proposes {name!r} as a point mass ({type(innermost(site.fn)).__name__}"
                "), from which its other values cannot be reached"
            )


class _Sizes(TorchDispatchMode):
    """The number of elements that each operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = _pytree.tree_leaves(out)
        self.found.append(max((x.numel() for x in leaves if isinstance(x, Tensor)), default=0))
        return out


def fitting(p: Observed, q: Observed, rows: Batch, larger: float = 1.0) -> int:
    """How many particles for all of these rows make the widest tensor as large as it may be.

    One, if draws have to be run one by one.

    Args:
        p, q: the observed pair.
        rows: which; a single one gives the number of rows x particles.
        larger: how much wider than what suits importance weights alone.
    """
    if one_by_one(p, rows):
        return 1
    found = []
    for count in (2, 3):
        with _Sizes() as sizes:
            draw_log_weights(p, q, rows, count)
        found.append(sizes.found)
    width = max(1, *(more - less for less, more in zip(*found, strict=False)))
    return max(1, int(larger * ELEMENTS.get(rows.device.type, ELEMENTS_ELSEWHERE)) // width)
