"""Pairs of one architecture as one graph: parameters, draws and rows are stacked by seed.

The graph of :mod:`.staging` is made for the first pair, checked against every other one, and run
for all of them by ``torch.vmap``: products of matrices become products of stacks of matrices.
While it is at work the parameters of the modules are views of the stacks, so that a module is
always up to date.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Self

import pyro
import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.modes import seeded
from pyrozoo.inference.seeds.lifting import lift, many, squares
from pyrozoo.inference.staging.layout import Inputs
from pyrozoo.inference.staging.staged import Staged, is_active, kind_of, leaves_of, like_scalar
from pyrozoo.inference.staging.tracing import (
    NotCompiled,
    NotTraced,
    Traced,
    agree,
    compile_graph,
    draw,
    gradient,
    loss_of,
)
from pyrozoo.inference.training.fit import stored_name


class Together:
    """The steps of many seeds at once; a context, inside which the modules have no own memory.

    Args:
        staged: for each seed its objective and pair, of which no graph has been made.
        batches: for each seed an example.
        seeds: their names, for messages.

    Attributes:
        flops: multiplications and additions in a step of one seed.
        parameters: those that are trained, ``(seeds, *)``; inside the context.

    Raises:
        ValueError: the pairs differ in a parameter or a buffer, or share one.
        NotTraced: they cannot be staged, compute different things, or draw what depends on values.
    """

    def __init__(
        self, staged: Sequence[Staged], batches: Sequence[Batch], seeds: Sequence[int]
    ) -> None:
        self.staged, self.seeds, first = list(staged), list(seeds), staged[0]
        self.tensors = [_tensors(s.module) for s in staged]
        self._same_tensors()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reason is in what is raised
            step = first._find(batches[0])
        if step is None:
            raise NotTraced(first.reason)
        self.layout = step.layout
        names = {id(x): name for name, x in self.tensors[0].items()}
        self.constants = [(names.get(id(x)), x) for x in step.traced.constants]
        self.used = [names[id(step.parameters[i])] for i in step.traced.used]
        self.module, self.draws = lift(step.traced.module)
        self.noise = [d.room(len(staged)) for d in self.draws]
        self.parameters: list[nn.Parameter] = []
        examples = [next(s._inputs(self.layout, b)) for s, b in zip(staged, batches, strict=True)]
        for i, (batch, inputs) in enumerate(zip(batches, examples, strict=True)):
            if kind_of(batch) != kind_of(batches[0]) or not self.layout.takes(batch):
                raise NotTraced("the seeds have batches of different kinds")
            self._check(i, batch, inputs)
        with FlopCounterMode(display=False) as counter:
            self._alone(0, examples[0])
        self.flops = counter.get_total_flops()
        self._example = self._stacked(examples)
        self.run: Any = self._vmap(examples)
        self.how = "staged"
        self._states = [s._state() for s in staged]

    def _same_tensors(self) -> None:
        """Check that parameters and buffers have the same names, shapes and types."""
        first, owners = self.tensors[0], dict[int, int]()
        for seed, tensors in zip(self.seeds, self.tensors, strict=True):
            for name in [*first, *tensors]:
                here, there = (_described(x, name) for x in (tensors, first))
                if here != there:
                    of = f"{stored_name(name)} is {there} for seed {self.seeds[0]}"
                    raise ValueError(f"the pairs differ: {of}, but {here} for seed {seed}")
            for name, x in tensors.items():
                if isinstance(x, nn.Parameter) and owners.setdefault(id(x), seed) != seed:
                    raise ValueError(
                        f"seeds {owners[id(x)]} and {seed} share {stored_name(name)}: make(seed)"
                        " builds a new program and a new guide in every call"
                    )

    # ---- one graph for all ----------------------------------------------------------------------

    def _alone(self, i: int, inputs: Inputs) -> list[Tensor]:
        """The graph of one seed, on copies: buffers stay as they are."""
        own = [x if n is None else self.tensors[i][n] for n, x in self.constants]
        with torch.no_grad():
            copies = [x.detach().clone() for x in own]
            return list(self.module(*copies, *leaves_of(inputs), *(x[i] for x in self.noise)))

    def _check(self, i: int, batch: Batch, inputs: Inputs) -> None:
        """Check that the graph, with the parameters of a seed, is what its pair computes."""
        staged, tensors = self.staged[i], self.tensors[i]
        trained: dict[str, Any] = {n: x for n, x in tensors.items() if x.requires_grad}
        buffers = [(x, x.clone()) for x in staged.module.buffers()]
        dependent: list[str] = []

        def program() -> list[Tensor]:
            loss = loss_of(staged.objective, staged.p, staged.q, inputs)
            found = gradient(loss, list(trained.values()))
            grads = {n: g for n, g in zip(trained, found, strict=True) if g is not None}
            dependent[:] = grads
            return [loss.detach(), *(grads[n] for n in self.used if n in grads)]

        try:
            with pyro.validation_enabled(False):
                with seeded(0):
                    staged.objective.loss(staged.p, staged.q, batch)  # makes the plans
                right = draw(program)
        finally:
            with torch.no_grad():
                for x, before in buffers:
                    x.copy_(before)
        self._fill([i], [torch.Generator(batch.device).manual_seed(1)] * len(self.seeds))
        if set(dependent) != set(self.used) or not agree(self._alone(i, inputs), right):
            raise NotTraced(
                f"seeds {self.seeds[0]} and {self.seeds[i]} differ in more than their parameters"
            )

    def _vmap(self, examples: Sequence[Inputs]) -> Any:
        """The graph of all seeds, checked against that of each."""
        count, names = len(self.seeds), self.layout.names
        inputs = examples[0]
        rest = 1 + len(inputs.weights) + len(inputs.observed_guide_weights)
        dims = [
            *(None if n is None else 0 for n, _ in self.constants),
            *[0] * len(_pytree.tree_leaves(inputs.batches)),
            *[0 if names else None] * len(inputs.shares),
            *[None] * rest,
            *[0] * len(self.noise),
        ]
        device = inputs.shared.device
        self._fill(range(count), [torch.Generator(device).manual_seed(i) for i in range(count)])
        right = [self._alone(i, x) for i, x in enumerate(examples)]
        self._right = [torch.stack(x) for x in zip(*right, strict=True)]
        self._right.insert(1, squares(self._right[1:]))
        run = many(self.module, dims, self._arguments())
        try:
            found = list(run(*self._arguments()))
        except Exception as error:
            raise NotTraced(f"seeds cannot be run at once: {error}") from error
        if not agree(found, self._right):
            raise NotTraced("the graph of all seeds differs from those of each")
        return run

    def _arguments(self) -> list[Tensor]:
        """Constants, inputs and draws of the examples; copies."""
        stacks = [
            x.detach() if n is None else torch.stack([t[n].detach() for t in self.tensors])
            for n, x in self.constants
        ]
        return [*stacks, *self._example, *self.noise]

    def compile(self) -> None:
        """Compile the graph.

        Raises:
            NotCompiled: see :func:`.tracing.compile_graph`; it runs uncompiled then.
        """
        with torch.no_grad():
            self.run = compile_graph(Traced(self.run, [], []), self._arguments(), self._right)
        self.how = "compiled"

    # ---- steps ----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.memory = [
            x.detach() if n is None else torch.stack([t[n].detach() for t in self.tensors])
            for n, x in self.constants
        ]
        for (name, _), stack in zip(self.constants, self.memory, strict=True):
            for i, tensors in enumerate(self.tensors):
                if name is not None:
                    tensors[name].data = stack[i]
        memory = {n: x for (n, _), x in zip(self.constants, self.memory, strict=True)}
        self.parameters = [nn.Parameter(memory[n]) for n in self.used]
        return self

    def __exit__(self, *_: object) -> None:
        for i in range(len(self.seeds)):
            self.release(i)

    def release(self, i: int) -> None:
        """Give the modules of a seed memory of their own: further steps leave them alone."""
        for name, _ in self.constants:
            if name is not None:
                self.tensors[i][name].data = self.tensors[i][name].data.clone()

    def gradients(
        self, rows: Batch, index: Tensor, generators: Sequence[Generator]
    ) -> tuple[Tensor, Tensor]:
        """Put gradients into the parameters.

        Args:
            rows: of the data.
            index: which of them each seed sees, ``(seeds, rows of a step)``.
            generators: of the draws of each seed.

        Returns:
            the losses in nats per datum, and the squares of the norms of the gradients; both
            ``(seeds,)``.
        """
        total: list[Tensor] = []
        with torch.no_grad():
            for leaves, running in self._inputs(rows, index):
                self._fill(running, generators)
                found = list(self.run(*self.memory, *leaves, *self.noise))
                total = [a + b for a, b in zip(total, found, strict=True)] if total else found
                if total is not found:
                    total[1] = squares(total[2:])
        for x, grad in zip(self.parameters, total[2:], strict=True):
            x.grad = grad
        return total[0], total[1]

    def gradients_of(self, i: int) -> None:
        """Put the gradients of one seed into the parameters of its modules."""
        for name, x in zip(self.used, self.parameters, strict=True):
            self.tensors[i][name].grad = None if x.grad is None else x.grad[i]

    def describe(self) -> str:
        """What became of the graph, in words."""
        return f"{self.how}, {self.flops:.1e} operations in a step of one"

    def changed(self) -> int | None:
        """A seed whose modules or objective are no longer what the graph was made of."""
        states = zip(self.seeds, self.staged, self._states, strict=True)
        return next((seed for seed, s, before in states if s._state() != before), None)

    def _fill(self, running: Sequence[int], generators: Sequence[Generator]) -> None:
        for d, noise in zip(self.draws, self.noise, strict=True):
            for i in running:
                d.fill(noise[i], generators[i])

    def _inputs(self, rows: Batch, index: Tensor) -> Iterator[tuple[list[Tensor], Sequence[int]]]:
        """Inputs of every pass, and the seeds that have a share in it."""
        seeds, everybody = len(index), range(len(index))
        if not self.layout.names and index.shape[1] == len(self.layout.full):
            leaves = _pytree.tree_leaves(rows[index.reshape(-1)])
            leaves = [x.reshape(seeds, -1, *x.shape[1:]) for x in leaves]
            yield [*leaves, self.layout.full, *self._options(index.shape[1])], everybody
            return
        parts = [
            list(s._inputs(self.layout, rows[i])) for s, i in zip(self.staged, index, strict=True)
        ]
        for k in range(max(len(part) for part in parts)):
            now = [part[k] if k < len(part) else _idle(part[-1]) for part in parts]
            yield self._stacked(now), [i for i in everybody if k < len(parts[i])]

    def _stacked(self, inputs: Sequence[Inputs]) -> list[Tensor]:
        first = inputs[0]
        batches = [_pytree.tree_leaves(x.batches) for x in inputs]
        leaves = [torch.stack(x) for x in zip(*batches, strict=True)]
        shares = first.shares
        if self.layout.names:
            shares = [torch.stack(x) for x in zip(*(x.shares for x in inputs), strict=True)]
        return [*leaves, *shares, *leaves_of(first._replace(batches=[], shares=[]))]

    def _options(self, rows: int) -> list[Tensor]:
        """What all seeds share of the inputs of a pass."""
        own, like = self.staged[0].objective, self.layout.full
        weights = {n: like_scalar(w, like) for n, w in own.weights.items() if is_active(w)}
        of_guide = {n: like_scalar(w, like) for n, w in own.observed_guide_weights.items()}
        shared = like_scalar(1 / (own.num_rows or rows), like)
        return leaves_of(Inputs([], [], shared, weights, of_guide))


def _idle(inputs: Inputs) -> Inputs:
    """The same without a share in the loss."""
    shares = [torch.zeros_like(x) for x in inputs.shares]
    return inputs._replace(shares=shares, shared=torch.zeros_like(inputs.shared))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a module by name: parameters, buffers and plain attributes."""
    found: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                found.setdefault(f"{path}.{name}", value)
    return found


def _described(tensors: dict[str, Tensor], name: str) -> str:
    if name not in tensors:
        return "missing"
    x = tensors[name]
    what = "a trained parameter" if x.requires_grad else "a tensor"
    return f"{what} of shape {tuple(x.shape)} and type {str(x.dtype).removeprefix('torch.')}"


__all__ = ["NotCompiled", "NotTraced", "Together"]
