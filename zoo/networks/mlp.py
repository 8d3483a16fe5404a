"""The multilayer perceptron whose first layer does not repeat work over broadcast inputs."""

import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrozoo.zoo.networks.batched import broadcast_leading, broadcast_shapes
from pyrozoo.zoo.networks.precision import computing_in

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
}


def make_activation(activation: str | nn.Module) -> nn.Module:
    """Return a new activation: relu, softplus, tanh, silu, gelu, elu, or a copy of a module.

    Raises:
        ValueError: if the name is not known.
    """
    if isinstance(activation, nn.Module):
        return copy.deepcopy(activation)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"expected an activation of {sorted(_ACTIVATIONS)}, got {activation!r}")
    return _ACTIVATIONS[activation]()


def one_hot(index: Tensor, num_classes: int, dtype: torch.dtype | None = None) -> Tensor:
    """Encode class indices as rows of the identity matrix.

    Nothing here waits for the device or looks at values in Python, so that it can be traced,
    unlike `torch.nn.functional.one_hot`.

    Args:
        index: integers of shape (*,), in [0, num_classes); others are an `IndexError` (on a CPU).
        num_classes: the width of the result.
        dtype: the dtype of the result; torch's default dtype if None.

    Returns:
        A tensor of shape (*, num_classes).
    """
    identity = torch.eye(num_classes, dtype=dtype, device=index.device)
    return F.embedding(index.long(), identity)


class SplitLinear(nn.Linear):
    """One `nn.Linear` over the concatenation of several inputs, computed in parts.

    As W [x; y] = W_x x + W_y y, each input goes through its own columns of the weight at its own
    leading shape, and only the sum is broadcast: for x of shape (B, D) and y of shape (K, 1, C)
    the product with x is computed on B rows and not on K B. Parameters and their initialisation
    are those of `nn.Linear(sum(in_dims), out_dim)`.
    """

    def __init__(self, in_dims: int | Sequence[int], out_dim: int) -> None:
        self.in_dims = _in_dims(in_dims)
        super().__init__(sum(self.in_dims), out_dim)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map inputs of shapes (*, in_dims[0]), (*, in_dims[1]), ... to (*, out_dim).

        Raises:
            ValueError: if the number of inputs, their widths or their leading shapes do not fit.
        """
        _check_inputs(self.in_dims, inputs)
        weights = self.weight.split(self.in_dims, dim=1)
        out = F.linear(inputs[0], weights[0], self.bias)
        for x, weight in zip(inputs[1:], weights[1:], strict=True):
            out = out + F.linear(x, weight)
        return out


class MLP(nn.Module):
    """A multilayer perceptron of one or several inputs, with a `SplitLinear` as first layer.

    Args:
        in_dims: the width of the input, or the widths of several inputs.
        hidden: the widths of the hidden layers; () for a linear map.
        out_dim: the width of the output. None stops after the last hidden activation, for a
            trunk with separate heads (with no hidden layers, the inputs joined to one).
        activation: a name (see `make_activation`) or a module, copied for each layer.

    Attributes:
        in_dims: the widths of the inputs, as a tuple.
        out_dim: the width of the output.
        precision: see `set_precision`.

    Raises:
        ValueError: if a width is not positive or the activation is not known.
    """

    def __init__(
        self,
        in_dims: int | Sequence[int],
        hidden: Sequence[int],
        out_dim: int | None = None,
        activation: str | nn.Module = "relu",
    ) -> None:
        super().__init__()
        self.in_dims, self.precision = _in_dims(in_dims), "float32"
        if isinstance(hidden, int):
            raise TypeError(f"hidden is a sequence of widths, such as ({hidden},), got {hidden}")
        widths = [*hidden] if out_dim is None else [*hidden, out_dim]
        if any(width < 1 for width in widths):
            raise ValueError(f"layer widths must be positive, got {widths}")
        self.out_dim = widths[-1] if widths else sum(self.in_dims)
        self.first = SplitLinear(self.in_dims, widths[0]) if widths else _Join(self.in_dims)
        rest: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            rest += [make_activation(activation), nn.Linear(before, after)]
        if out_dim is None and widths:
            rest.append(make_activation(activation))
        self.rest = nn.Sequential(*rest)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map inputs of shapes (*, in_dims[0]), (*, in_dims[1]), ... to (*, out_dim).

        The leading dimensions of the inputs broadcast against each other.

        Raises:
            ValueError: if the number of inputs, their widths or their leading shapes do not fit.
        """
        if self.precision == "float32":
            return self.rest(self.first(*inputs))
        with computing_in(self.precision, inputs[0].device):
            out = self.rest(self.first(*inputs))
        return out.to(inputs[0].dtype)


class _Join(nn.Module):
    """Concatenate the inputs: the first layer of a trunk without any layers."""

    def __init__(self, in_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.in_dims = in_dims

    def forward(self, *inputs: Tensor) -> Tensor:
        _check_inputs(self.in_dims, inputs)
        return torch.cat(broadcast_leading(inputs, (1,) * len(inputs)), dim=-1)


def _in_dims(in_dims: int | Sequence[int]) -> tuple[int, ...]:
    dims = (in_dims,) if isinstance(in_dims, int) else tuple(in_dims)
    if not dims or any(dim < 1 for dim in dims):
        raise ValueError(f"in_dims must be one or more positive widths, got {in_dims}")
    return dims


def _check_inputs(in_dims: tuple[int, ...], inputs: Sequence[Tensor]) -> None:
    if len(inputs) != len(in_dims) or any(
        x.shape[-1:] != (dim,) for x, dim in zip(inputs, in_dims, strict=True)
    ):
        expected = ", ".join(f"(*, {dim})" for dim in in_dims)
        got = ", ".join(str(tuple(x.shape)) for x in inputs) or "nothing"
        raise ValueError(f"expected {len(in_dims)} input(s) of shapes {expected}; got {got}")
    if len(inputs) > 1:
        broadcast_shapes([x.shape[:-1] for x in inputs])
