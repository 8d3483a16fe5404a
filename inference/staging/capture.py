"""One CUDA graph for a whole step: the loss, its gradient, clipping and the optimiser.

A replay runs no Python of the program.  A step whose loss or gradient is not finite leaves the
parameters as they were.  None of this has been run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrozoo.inference.staging.tracing import Traced


def capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all an optimiser's state is on the GPU, so that its step can be captured."""
    return all(group.get("fused") and "capturable" in group for group in optimizer.param_groups)


class Captured:
    """A captured step; call it with inputs that are laid out like the first.

    Args:
        run: ``(*constants, *inputs) -> [loss, *gradients]``.
        traced: what it was made of.
        parameters: those that it was traced with.
        inputs: an example.
        optimizer: a fused one, which has made a step before.  Its rates become tensors; a number
            that is put in their place is written into them.
        clip: largest norm of the gradient.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        traced: Traced,
        parameters: Sequence[nn.Parameter],
        inputs: Sequence[Tensor],
        optimizer: Any,
        clip: float | None,
    ) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.groups = optimizer.param_groups
        self.rates = [torch.as_tensor(g["lr"], device=inputs[0].device) for g in self.groups]
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["capturable"], group["lr"] = True, rate
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.loss, *gradients = run(*traced.constants, *self.inputs)
            for x in parameters:
                x.grad = None
            for i, grad in zip(traced.used, gradients, strict=True):
                parameters[i].grad = grad
            norm = nn.utils.get_total_norm(gradients)
            if clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            optimizer.found_inf = (~(self.loss + norm).isfinite()).float()  # then it makes no step
            optimizer.step()
        del optimizer.found_inf
        self.gradients = [x.grad for x in parameters]
        self.parameters = parameters

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Make a step; gives the loss, a scalar."""
        torch._foreach_copy_(self.inputs, list(inputs))
        for group, rate in zip(self.groups, self.rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate
        self.graph.replay()
        for x, grad in zip(self.parameters, self.gradients, strict=True):
            x.grad = grad
        return self.loss.clone()
