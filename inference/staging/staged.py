"""Staging: the loss and its gradient without Pyro, compiled.

``stage`` runs the effect handlers once, on an example, and compiles what they do to tensors
(:mod:`.tracing`)::

    staged = stage(EnumELBO(), program, guide, example)
    loss = staged(batch)          # its gradient is in .grad of the parameters
    optimizer.step()

Draws come from torch's generator; for a batch of the example's size they are those of the objective
itself.  What a program does in Python happens once, while it is traced.  But numbers among the
attributes of its modules, with ``.train()`` and ``.eval()``, are looked at in every call, and
another graph is made when they change.

All batches get the size of the example (:mod:`.layout`): smaller ones are padded with rows that
have no share in the loss, larger ones go through the graph several times.  Where rows are split by
what they know (see :class:`.EnumELBO`) every group has a size of its own, with room to spare.  So
there is one graph, however the patterns of rows fall into batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.elbo import EnumELBO, coupled_layer
from pyrozoo.inference.modes import seeded
from pyrozoo.inference.observing import Net
from pyrozoo.inference.staging.capture import Captured, capturable
from pyrozoo.inference.staging.layout import Inputs, Layout
from pyrozoo.inference.staging.tracing import (
    NotCompiled,
    NotTraced,
    Traced,
    agree,
    compile_graph,
    draw,
    first_line,
    gradient,
    loss_of,
    trace,
)

MOST_GRAPHS = 4  # for one kind of batch; what needs more is not staged
MOST_NAMES = 2  # by which rows are split
_PLAIN = (int, float, str, type(None))


@dataclass(frozen=True)
class _Step:
    """A graph for one kind of batch."""

    layout: Layout
    traced: Traced
    parameters: list[nn.Parameter]
    run: Callable[..., Any]
    compiled: bool


class Staged:
    """An objective of a program and a guide, staged: see :func:`stage`.

    Attributes:
        reason: why it is not compiled, or not staged ('' if it is).
        graphs: how many graphs were made.
        compilations: how many of them were compiled.
        eager_calls: how many calls were left to the objective itself.
    """

    def __init__(self, objective: EnumELBO, program: Net, guide: Net, compile: bool = True) -> None:
        self.objective, self.compile = objective, compile
        self.p, self.q = objective.pair(program, guide)
        self.module = objective(self.p, self.q)
        self.reason = ""
        self.graphs = self.compilations = self.eager_calls = 0
        self._steps: dict[Any, _Step | None] = {}
        self._captured: dict[Any, Captured | None] = {}
        self._told: set[str] = set()
        self._parameters: list[nn.Parameter] = []
        self._attributes: list[tuple[dict[str, Any], str, str]] | None = None

    @property
    def how(self) -> str:
        """What was made of the last kind of batch: ``"compiled"``, ``"graph"`` or ``"eager"``."""
        step = next(reversed(self._steps.values()), None)
        return "eager" if step is None else "compiled" if step.compiled else "graph"

    def __call__(self, data: Data) -> Tensor:
        """The loss in nats per datum, a scalar; ``.grad`` of every parameter is overwritten."""
        batch = self.p.pairing.prepare(data)
        step = self._find(batch)
        for x in self._parameters:
            x.grad = None
        if step is None or not step.layout.takes(batch):
            self.eager_calls += 1
            loss = self.objective.differentiable_loss(self.p, self.q, batch)
            loss.backward()
            return loss
        total: list[Tensor] = []
        with torch.no_grad():
            for inputs in self._inputs(step.layout, batch):
                found = step.run(*step.traced.constants, *leaves_of(inputs))
                total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        for i, grad in zip(step.traced.used, total[1:], strict=True):
            step.parameters[i].grad = grad
        return total[0]

    def step(
        self,
        data: Data,
        optimizer: torch.optim.Optimizer,
        clip: float | None = None,
        check: Callable[[Tensor], None] = lambda loss: None,
    ) -> Tensor:
        """A whole step of training, with gradients clipped to the norm ``clip``; gives the loss.

        On a GPU, with a fused Adam, it becomes one CUDA graph: see :mod:`.capture`.  ``check`` is
        called with the loss before the optimiser's step, or after such a graph, which by itself
        leaves the parameters alone if the loss or its gradient is not finite.
        """
        batch = self.p.pairing.prepare(data)
        step = self._find(batch) if batch.device.type == "cuda" else None
        if step is not None and step.layout.takes(batch):
            passes = list(self._inputs(step.layout, batch))
            key = (id(step), id(optimizer), clip)
            if len(passes) == 1 and key in self._captured:  # the first step fills the optimiser
                if (captured := self._captured[key]) is None:
                    captured = self._captured[key] = Captured(
                        step.run,
                        step.traced,
                        step.parameters,
                        leaves_of(passes[0]),
                        optimizer,
                        clip,
                    )
                loss = captured(leaves_of(passes[0]))
                check(loss)
                return loss
            if capturable(optimizer):
                self._captured[key] = None
        loss = self(batch)
        check(loss)
        if clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, clip)
        optimizer.step()
        return loss.detach()

    def _inputs(self, layout: Layout, batch: Batch) -> Iterator[Inputs]:
        own, like = self.objective, layout.full
        weights = {n: like_scalar(w, like) for n, w in own.weights.items() if is_active(w)}
        of_guide = {n: like_scalar(w, like) for n, w in own.observed_guide_weights.items()}
        shared = like_scalar(1 / (own.num_rows or len(batch)), like)
        for batches, shares in layout.passes(batch):
            yield Inputs(batches, shares, shared, weights, of_guide)
            shared = torch.zeros_like(shared)  # counted in the first pass

    def describe(self) -> str:
        """What became of the last kind of batch, in words."""
        step = next(reversed(self._steps.values()), None)
        count = 0 if step is None else len(step.traced.module.graph.nodes)
        if step is None:
            return f"not staged: {self.reason}"
        what = "compiled" if step.compiled else "staged"
        return f"{what}: {count} operations" + (f"; {self.reason}" if self.reason else "")

    # ---- one graph for every kind of batch -------------------------------------------------------

    def _find(self, batch: Batch) -> _Step | None:
        kind = kind_of(batch)
        key = (kind, self._state())
        if key not in self._steps:
            if sum(of == kind for of, _ in self._steps) >= MOST_GRAPHS:
                self._tell("options, or numbers in its modules, change again and again")
                return None
            self._steps[key] = self._make(batch)
        return self._steps[key]

    def _state(self) -> Any:
        """What is a constant of a graph but may change between two calls."""
        own = self.objective
        if self._attributes is None:
            self._parameters = list(self.module.parameters())
            self._attributes = [
                (module.__dict__, name, type(module).__name__)
                for module in self.module.modules()
                for name, value in module.__dict__.items()
                if isinstance(value, _PLAIN)
            ]
        return (
            tuple([found.get(name) for found, name, _ in self._attributes]),
            tuple([x.requires_grad for x in self._parameters]),
            tuple([x for x in own.__dict__.values() if isinstance(x, _PLAIN)]),
            tuple([n for n, w in own.weights.items() if is_active(w)]),
            tuple(own.observed_guide_weights),
            tuple(own.free_bits.items()),
        )

    def _make(self, batch: Batch) -> _Step | None:
        buffers = [(x, x.clone()) for x in self.module.buffers()]
        try:
            with seeded(0), pyro.validation_enabled(False):
                return self._trace(batch)
        except NotTraced as error:
            self._tell(f"every step runs with Pyro: {error}")
            return None
        finally:
            with torch.no_grad():
                for x, before in buffers:
                    x.copy_(before)

    def _trace(self, batch: Batch) -> _Step:
        objective, p, q = self.objective, self.p, self.q
        before = self._state()
        objective.loss(p, q, batch)  # makes the plans; what it raises is the user's to know
        for i, (_, name, of) in enumerate(self._attributes or ()):
            if before[0][i] != self._state()[0][i]:
                raise NotTraced(f"attribute {name!r} of {of} changes whenever it runs")
        plan = p.pairing.plan(batch)
        if reason := objective.unsupported(plan):
            raise NotTraced(reason)
        if type(objective).differentiable_loss is not EnumELBO.differentiable_loss:
            raise NotTraced(f"{type(objective).__name__} computes its loss in a way of its own")
        names = tuple(objective._split_sites(p, q, plan))
        if len(names) > MOST_NAMES or type(objective)._evaluate is not EnumELBO._evaluate:
            names = ()
        layout = Layout.of(batch, names, bool(coupled_layer(p.module, q.module)))
        parameters = [x for x in self.module.parameters() if x.requires_grad]
        inputs = next(self._inputs(layout, batch))

        def program() -> list[Tensor]:
            loss = loss_of(objective, p, q, inputs)
            return [loss.detach(), *(g for g in gradient(loss, parameters) if g is not None)]

        traced = trace(objective, p, q, parameters, inputs)
        right = draw(program)
        arguments = (*traced.constants, *leaves_of(inputs))
        with torch.no_grad():
            try:
                same = agree(draw(traced.module, *arguments), right)
            except Exception as error:
                raise NotTraced(f"the graph does not run, {first_line(error)}") from error
            if not same:
                raise NotTraced("the graph differs from the program: is Python drawing at random?")
            self.graphs += 1
            step = _Step(layout, traced, parameters, traced.module, compiled=False)
            if not self.compile:
                return step
            try:
                run = compile_graph(traced, arguments, right)
            except NotCompiled as error:
                self._tell(str(error))
                return step
        self.compilations += 1
        return replace(step, run=run, compiled=True)

    def _tell(self, reason: str) -> None:
        self.reason = reason
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"not compiled: {reason}", stacklevel=2)


def stage(
    objective: EnumELBO, program: Net, guide: Net, example: Data, *, compile: bool = True
) -> Staged:
    """Stage an objective of a program and a guide.

    Args:
        objective: its options may change from call to call; weights, numbers or tensors, enter the
            graph as tensors.  Rows are split as it says.
        program, guide: bare, or a pair.
        example: a batch of the size, and with about the patterns, that most batches will have.
        compile: compile the graph, which takes 10 to 60 seconds; without, its operations run one by
            one.

    Returns:
        a function of a batch.  What cannot be staged or compiled runs all the same, more slowly;
        :attr:`Staged.reason` and a warning say why.

    Raises:
        ValueError: the example has no rows; or what the objective itself raises for it.
    """
    staged = Staged(objective, program, guide, compile)
    batch = staged.p.pairing.prepare(example)
    if not len(batch):
        raise ValueError("the example has no rows")
    staged._find(batch)
    return staged


def kind_of(batch: Batch) -> Any:
    """What batches have in common that share a graph."""
    sites = [
        (n, batch.stored(n).dtype, batch.shape(n)[1:], batch.partly(n) and batch.present(n).dim())
        for n in batch.names
    ]
    return batch._dtype, batch.device, tuple(sites)


def is_active(weight: float | Tensor) -> bool:
    """Whether a weight may differ from one."""
    return isinstance(weight, Tensor) or weight != 1


def like_scalar(weight: float | Tensor, like: Tensor) -> Tensor:
    """A weight as a scalar tensor of the kind of another."""
    return torch.as_tensor(weight, dtype=like.dtype, device=like.device)


def leaves_of(inputs: Inputs) -> list[Tensor]:
    """The tensors of the inputs of a graph, in its order."""
    return [x.contiguous() for x in _pytree.tree_leaves(inputs)]
