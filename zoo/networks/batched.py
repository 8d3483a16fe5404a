"""Give a module that wants exactly one batch dimension any number of leading dimensions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyrozoo.zoo.networks.precision import computing_in


def broadcast_shapes(leads: Sequence[Sequence[int]]) -> torch.Size:
    """Broadcast leading shapes against each other.

    Raises:
        ValueError: if they do not broadcast.
    """
    try:
        return torch.broadcast_shapes(*leads)
    except RuntimeError as error:
        got = ", ".join(str(tuple(lead)) for lead in leads)
        raise ValueError(f"leading dimensions do not broadcast: {got}") from error


def broadcast_leading(inputs: Sequence[Tensor], event_dims: Sequence[int]) -> list[Tensor]:
    """Broadcast the leading dimensions of several inputs against each other.

    Args:
        inputs: tensors; the last `event_dims[i]` dimensions of `inputs[i]` are left alone.
        event_dims: one number for each input.

    Returns:
        The inputs as (expanded) views, all with the same leading shape `*`.

    Raises:
        ValueError: if an input has too few dimensions or the leading shapes do not broadcast.
    """
    splits = [x.dim() - dims for x, dims in zip(inputs, event_dims, strict=True)]
    if min(splits) < 0:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(f"expected at least {tuple(event_dims)} dimensions, got shapes {shapes}")
    lead = broadcast_shapes([x.shape[:n] for x, n in zip(inputs, splits, strict=True)])
    return [x.expand(lead + x.shape[n:]) for x, n in zip(inputs, splits, strict=True)]


class Batched(nn.Module):
    """A module with one batch dimension, lifted to any number of them; see `batched`."""

    def __init__(self, net: nn.Module, event_dims: int | Sequence[int] = 1) -> None:
        super().__init__()
        self.net, self.precision = net, "float32"
        self.event_dims = event_dims if isinstance(event_dims, int) else tuple(event_dims)
        _refuse_batch_statistics(net)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Flatten the leading dimensions, call the net once, restore them.

        Args:
            inputs: tensors of shape (*, event); their leading dimensions broadcast.

        Returns:
            The net's output, of shape (*, output event).

        Raises:
            ValueError: if the number of inputs or their leading dimensions do not fit, or a
                batch normalisation has been put back into training mode.
            TypeError: if the net returns anything but a tensor.
        """
        _refuse_batch_statistics(self.net)
        dims = self.event_dims
        dims = (dims,) * len(inputs) if isinstance(dims, int) else dims
        if len(inputs) != len(dims) or not inputs:
            raise ValueError(f"expected {len(dims) or 'some'} inputs, got {len(inputs)}")
        expanded = broadcast_leading(inputs, dims)
        lead = expanded[0].shape[: expanded[0].dim() - dims[0]]
        rows = math.prod(lead)
        flat = [x.reshape(rows, *x.shape[len(lead) :]) for x in expanded]
        with computing_in(self.precision, flat[0].device):
            out = self.net(*flat)
        if not isinstance(out, Tensor):
            raise TypeError(f"a batched net must return a tensor, got {type(out).__name__}")
        if self.precision != "float32":
            out = out.to(flat[0].dtype)
        return out.reshape(lead + out.shape[1:])


def batched(net: nn.Module, event_dims: int | Sequence[int] = 1) -> Batched:
    """Wrap a module that wants exactly one batch dimension, such as a convolutional stack.

    Batch normalisation in training mode is refused: its statistics would be taken over the
    flattened rows, which mix the hypotheses of an enumeration (and the particles) with the data.

    Args:
        net: takes tensors of shape (N, event) and returns one tensor of shape (N, output event).
        event_dims: how many trailing dimensions of an input belong to one row; one number for
            all inputs, or one for each.

    Returns:
        A module taking tensors of shape (*, event), returning (*, output event).

    Raises:
        ValueError: if the net holds a batch normalisation that uses the statistics of the batch.
    """
    return Batched(net, event_dims)


def _refuse_batch_statistics(net: nn.Module) -> None:
    for name, layer in net.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            raise ValueError(
                f"layer {name or 'net'!r} ({type(layer).__name__}) takes statistics of the batch, "
                "which would mix hypotheses and particles with the data; use another "
                "normalisation, or put the layer with running statistics into .eval() mode"
            )
