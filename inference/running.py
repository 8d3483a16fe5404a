"""Running an observed pair to look at it: in slices of rows, and no further than what is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.checking import check_shapes, check_values
from pyrozoo.inference.disk.stored import Stored
from pyrozoo.inference.modes import evaluating, seeded
from pyrozoo.inference.observing import Net, Observed
from pyrozoo.inference.plan import Plan
from pyrozoo.inference.reading import read_count


def slices(
    objective: EnumELBO, program: Net, guide: Net, data: Data, size: int, seed: int | None
) -> Iterator[tuple[Observed, Observed, Batch, Plan]]:
    """The observed pair with ``size`` rows at a time, checked, and what is done with their sites.

    The body of the loop runs without gradients, in evaluation mode, hidden from handlers around it
    and, with a seed, on a random state of its own.

    Raises:
        ValueError: there are no rows, a value or an option does not fit, or the pair is outside the
            class of the row-wise bound.
    """
    p, q = objective.pair(program, guide)
    whole, size = p.pairing.prepare(data), read_count("batch_size", size)
    if len(whole) == 0:
        raise ValueError("the data have no rows")
    random = contextlib.nullcontext() if seed is None else seeded(read_seed(seed))
    with torch.no_grad(), evaluating(p, q), poutine.block(), random:
        for start in range(0, len(whole), size):
            entire = len(whole) <= size and not isinstance(whole, Stored)
            batch = whole if entire else whole[start : start + size]
            plan = p.pairing.plan(batch)
            check_shapes(plan.program, batch)
            check_values(plan, batch)
            if reason := objective.unsupported(plan, gradient=False):
                raise ValueError(f"{reason}: use pyro.infer.Predictive or infer_discrete for it")
            yield p, q, batch, plan


def read_seed(seed: Any) -> int:
    """A seed as given, checked."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is a whole number below 2**64, or None, got {seed!r}")
    return seed


class _Enough(BaseException):  # passes through ``except Exception`` in a program
    pass


class _Stop(Messenger):
    def __init__(self, last: str) -> None:
        super().__init__()
        self.last = last

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self.last and all(f.vectorized for f in msg["cond_indep_stack"]):
            raise _Enough


def until(net: Net, names: Iterable[str], plan: Plan) -> Callable[[Batch], Any]:
    """A program that ends as soon as it has drawn all of these sites; it returns nothing.

    What comes after them, a decoder above all, is not computed.
    """
    last = _last(names, plan)

    def run(batch: Batch) -> None:
        with contextlib.suppress(_Enough), _Stop(last):
            net(batch)

    return run


def _last(names: Iterable[str], plan: Plan) -> str:
    wanted = set(names)
    return [name for name in plan.program.sites if name in wanted][-1]


def observed_until(p: Observed, names: Iterable[str], plan: Plan) -> Observed:
    """The same for the program of an observed pair."""
    part = Observed(until(p.module, names, plan), p.pairing, False)
    part.until = _last(names, plan)
    return part


def touching(plan: Plan) -> frozenset[str]:
    """The sites that are summed in the program, and those whose density depends on their values."""
    summed, found = set(plan.summed), set[str]()
    for name, site in plan.program.sites.items():
        if name in summed or any(_varies(plan, parent, summed) for parent in site.parents):
            found.add(name)
    return frozenset(found)


def _varies(plan: Plan, name: str, summed: set[str]) -> bool:
    """Whether a value of the program has one entry per value of a summed site."""
    if name in summed:
        return True
    known = plan.roles.get(name) in ("given", "masked", "own")
    if known or name in plan.proposed:
        return False
    return any(_varies(plan, parent, summed) for parent in plan.program.sites[name].parents)
