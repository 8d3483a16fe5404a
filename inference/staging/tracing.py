"""The loss of an objective and its gradient as one graph of tensor operations, and compiled.

The effect handlers run once, on tensors that have shapes but no values, and what they do to tensors
is written down; Pyro, the distributions and the modules are not in the graph.  What is read besides
the batch (parameters, buffers, tensors that a module holds) enters by reference, so that an
optimiser's steps are seen; numbers are constants.
"""

from __future__ import annotations

import copy
import logging
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from pyrozoo.inference.bounds.contract import add, spread
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.modes import seeded
from pyrozoo.inference.observing import Observed
from pyrozoo.inference.staging.layout import Inputs

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Traced:
    """A graph ``(*constants, *inputs) -> [loss, *gradients]``."""

    module: fx.GraphModule
    constants: list[Tensor]  # by reference: parameters, buffers, others
    used: list[int]  # the parameters that it has gradients of


class NotTraced(Exception):
    """A program, guide or objective cannot be written down as a graph; says why."""


class NotCompiled(Exception):
    """A graph cannot be compiled on this machine; says why."""


def loss_of(objective: EnumELBO, p: Observed, q: Observed, inputs: Inputs) -> Tensor:
    """The loss, a scalar: minus the bound of the rows, each with its share, and of global sites."""
    objective = copy.copy(objective)
    objective.split = False
    objective.weights = {**objective.weights, **inputs.weights}
    objective.observed_guide_weights = dict(inputs.observed_guide_weights)
    values = [objective._evaluate(p, q, b, p.pairing.plan(b)) for b in inputs.batches]
    rows = [
        spread((value.rows + value.extra).mean(0), share).sum()
        for value, share in zip(values, inputs.shares, strict=True)
    ]
    return -(add(rows) + values[0].shared * inputs.shared)


def gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The gradient by every parameter, laid out like it; None where the loss does not depend."""
    grads = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return [
        g if g is None or g.stride() == x.stride() else torch.empty_like(x).copy_(g)
        for g, x in zip(grads, parameters, strict=True)
    ]


def trace(
    objective: EnumELBO,
    p: Observed,
    q: Observed,
    parameters: Sequence[nn.Parameter],
    inputs: Inputs,
) -> Traced:
    """Write down the loss and its gradient.

    The pair has been run on these inputs before, so that the plans and all that belongs to them are
    at hand; tracing itself draws no random number and changes no buffer.

    Raises:
        NotTraced: a value decides what happens next, a tensor is no parameter but asks for a
            gradient, or an operation is not known to the tracer.
    """
    leaves, spec = _pytree.tree_flatten(inputs)
    used: list[int] = []

    def step(*leaves: Tensor) -> list[Tensor]:
        loss = loss_of(objective, p, q, _pytree.tree_unflatten(list(leaves), spec))
        if not loss.requires_grad:
            raise NotTraced("the loss depends on no parameter")
        grads = gradient(loss, parameters)
        used[:] = [i for i, g in enumerate(grads) if g is not None]
        return [loss.detach(), *(g for g in grads if g is not None)]

    try:
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer's own
            module = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*leaves)
    except NotTraced:
        raise
    except Exception as error:
        raise NotTraced(_where(error)) from error
    constants = _lift_constants(module)
    known = {id(x) for x in parameters}
    if strays := [x for x in constants if x.requires_grad and id(x) not in known]:
        shapes = ", ".join(str(tuple(x.shape)) for x in strays[:5])
        raise NotTraced(f"tensors of shape {shapes} ask for a gradient, but are no parameters")
    _own_outputs(module)
    for node in module.graph.nodes:
        if node.target in _VIEWS:  # strides may differ from what the tracer expects
            node.target = aten.reshape.default
    module.graph.lint()
    module.recompile()
    return Traced(module, constants, used)


def compile_graph(
    traced: Traced, arguments: Sequence[Tensor], right: Sequence[Tensor]
) -> Callable[..., list[Tensor]]:
    """The same function, compiled for the device of its arguments.

    Args:
        traced: the graph.
        arguments: constants and inputs.
        right: what it gives for them by :func:`draw`.

    Raises:
        NotCompiled: there is no compiler, it fails, or the outcome gives something else.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # there is no GPU: known
    import torch._inductor  # takes seconds

    module = copy.deepcopy(traced.module)  # the compiler changes it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler's own
            options = {"fallback_random": True}  # the same draws as without
            run: Any = torch._inductor.compile(module, list(arguments), options=options)
            found = draw(run, *arguments)
    except Exception as error:
        if "C++ compiler" in str(error):
            raise NotCompiled("there is no C++ compiler") from error
        raise NotCompiled(f"the compiler failed, {first_line(error)}") from error
    if not agree(found, right):
        raise NotCompiled("the compiled graph gives another result")
    return run


def draw(function: Callable[..., Any], *arguments: Tensor) -> list[Tensor]:
    """What a function returns when it draws from a seed that is always the same."""
    with seeded(1):
        return list(function(*arguments))


def agree(found: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether losses and gradients are equal but for rounding; what is not finite is let pass."""
    if len(found) != len(right):
        return False
    size = torch.stack([x.double().norm() for x in right])
    far = torch.stack([(a - b).double().norm() for a, b in zip(found, right, strict=True)])
    if not bool(size.isfinite().all()):
        return True
    tolerance = torch.finfo(right[0].dtype).eps ** 0.5
    limit = tolerance * (1 + torch.stack([size[0], size[1:].norm()]))
    return bool((torch.stack([far[0], far[1:].norm()]) <= limit).all())


def _lift_constants(module: fx.GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that a graph holds; returns them in the order of the inputs."""
    graph = module.graph
    inputs: dict[int, fx.Node] = {}
    found: dict[int, Tensor] = {}
    targets: set[str] = set()
    first = next(iter(graph.nodes))
    for node in list(graph.find_nodes(op="get_attr")):
        value = getattr(module, node.target)
        if id(value) not in inputs:
            with graph.inserting_before(first):
                inputs[id(value)] = graph.placeholder(f"constant_{len(found)}")
            found[id(value)] = value
        node.replace_all_uses_with(inputs[id(value)])
        graph.erase_node(node)
        targets.add(str(node.target))
    for target in targets:
        delattr(module, target)
    graph.set_codegen(fx.graph.CodeGen())
    return list(found.values())


def _own_outputs(module: fx.GraphModule) -> None:
    """Give every output memory of its own, as clipping changes gradients in place."""
    output = next(iter(module.graph.find_nodes(op="output")))
    seen, owned = set(), []
    for node in output.args[0]:
        root = node
        while root.op == "call_function" and _is_view(root.target):
            root = root.args[0]
        if root.op == "placeholder" or root in seen:
            with module.graph.inserting_before(output):
                node = module.graph.call_function(aten.clone.default, (node,))
        seen.add(root)
        owned.append(node)
    output.args = (owned,)


def _is_view(target: Any) -> bool:
    returns = getattr(getattr(target, "_schema", None), "returns", ())
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _where(error: Exception) -> str:
    """What went wrong, in one line, and where in the user's code."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    value = any(
        word in f"{type(error).__name__} {text}" for word in ("DataDependent", "tracing te")
    )
    what = "a value decides what happens next" if value else f"{type(error).__name__}: {text[:200]}"
    ours = (Path(torch.__file__).parent, Path(pyro.__file__).parent, Path(__file__).parents[1])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith("<") and not any(
            Path(frame.filename).is_relative_to(folder) for folder in ours
        ):
            return f"{what} ({Path(frame.filename).name}, line {frame.lineno}: {frame.line})"
    return what


def first_line(error: Exception) -> str:
    """An error in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}"
