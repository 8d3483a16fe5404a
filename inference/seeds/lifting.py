"""A graph with its random draws taken out, run for many seeds at once.

What a graph of :mod:`.tracing` draws depends on no value, as a rule: standard normal noise, the
mask of a dropout, a random subset.  Then the draws become inputs, and every seed can have those of
a generator of its own, the same as when it runs alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Generator, Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyrozoo.inference.bounds.contract import add
from pyrozoo.inference.staging.tracing import _VIEWS, NotTraced, first_line

aten = torch.ops.aten
_EMPTY = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
_SHAPED = {"rand_like": "rand", "randn_like": "randn"}


@dataclass(frozen=True)
class Draw:
    """A random operation that was taken out of a graph."""

    like: Tensor  # has its shape, strides and type, but no values
    fill: Callable[[Tensor, Generator], object]

    def room(self, seeds: int) -> Tensor:
        """Memory for the draws of some seeds, ``(seeds, *)``, each laid out as in the graph."""
        like, count = self.like, max(self.like.numel(), 1)
        return torch.empty_strided(
            (seeds, *like.shape), (count, *like.stride()), dtype=like.dtype, device=like.device
        )


def lift(module: fx.GraphModule) -> tuple[fx.GraphModule, list[Draw]]:
    """Make inputs, after all others, of what a graph draws.

    Args:
        module: the graph, left as it is.

    Returns:
        the new graph, and its draws in their order.

    Raises:
        NotTraced: what is drawn depends on values (a gamma distribution, for example).
    """
    graph = fx.Graph()
    output: Any = graph.graph_copy(module.graph, {})
    graph.output(output)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    draws: list[Draw] = []
    for node in list(graph.nodes):
        tags = getattr(node.target, "tags", ()) if node.op == "call_function" else ()
        if torch.Tag.nondeterministic_seeded not in tags:
            continue
        draws.append(Draw(node.meta["val"], _filler(node)))
        with graph.inserting_before(first):
            given = graph.placeholder(f"draw_{len(draws)}")
        if any(getattr(u.target, "_schema", node.target._schema).is_mutable for u in node.users):
            with graph.inserting_before(node):  # a user writes into it
                given = graph.call_function(aten.clone.default, (given,))
        node.replace_all_uses_with(given)
        graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(module, graph), draws


def _filler(node: fx.Node) -> Callable[[Tensor, Generator], object]:
    """What fills memory with new draws of an operation."""
    target: Any = node.target
    name = target._schema.name.removeprefix("aten::")
    arguments: list[Any] = list(node.args)
    source = arguments[0] if arguments else None
    nodes = [x for x in node.all_input_nodes if x is not source]
    if target._schema.is_mutable and isinstance(source, fx.Node) and not nodes:
        if source.target in _EMPTY and len(source.users) == 1:
            options = {k: v for k, v in node.kwargs.items() if k != "generator"}
            return lambda out, generator: target(
                out, *arguments[1:], generator=generator, **options
            )
    elif name in ("rand", "randn", "randint", "randperm") and not node.all_input_nodes:
        return lambda out, generator: out.copy_(
            getattr(torch, name)(
                *node.args, generator=generator, dtype=out.dtype, device=out.device
            )
        )
    elif name in _SHAPED and not nodes:
        return lambda out, generator: out.copy_(
            getattr(torch, _SHAPED[name])(
                out.shape, generator=generator, dtype=out.dtype, device=out.device
            )
        )
    raise NotTraced(f"draws of {name} depend on values, so that they cannot be made beforehand")


def many(
    module: fx.GraphModule, dims: Sequence[int | None], arguments: Sequence[Tensor]
) -> fx.GraphModule:
    """The graph ``-> [loss, *gradients]`` for all seeds at once.

    Args:
        module: without draws.
        dims: for each argument 0, or None if all seeds share it.
        arguments: an example; the others have seeds first.

    Returns:
        a graph ``-> [losses, squares, *gradients]``, all with seeds first; the squares are those of
        the norms of the gradients, ``(seeds,)``.

    Raises:
        NotTraced: an operation cannot be run for all seeds at once.
    """

    def step(*arguments: Tensor) -> list[Tensor]:
        losses, *grads = torch.vmap(module, in_dims=tuple(dims))(*arguments)
        grads = [g.contiguous() for g in grads]
        return [losses, squares(grads), *grads]

    try:
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that become loops over seeds
            made = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    except Exception as error:
        raise NotTraced(f"seeds cannot be run at once, {first_line(error)}") from error
    for node in made.graph.nodes:
        if node.target in _VIEWS:
            node.target = aten.reshape.default
    made.recompile()
    return made


def squares(gradients: Sequence[Tensor]) -> Tensor:
    """The square of the norm of each seed's gradient, ``(seeds,)``."""
    return add(g.reshape(len(g), -1).square().sum(1) for g in gradients)
