"""A summary of any number of entries that does not depend on their order.

With ``e`` the values and presence flags of an entry, and ``n`` the entries that are there::

    ( sum_present MLP(e) / n,  log(1 + n) )

Source: Zaheer et al., "Deep sets" (2017).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pyrozoo.zoo.networks import MLP


class Pool(nn.Module):
    """A permutation-invariant summary of the entries of some plates, see the module.

    Args:
        widths: of the values of an entry.
        hidden, activation: of the network that every entry goes through.
    """

    def __init__(self, widths: Sequence[int], hidden: Sequence[int], activation: str) -> None:
        super().__init__()
        self.mlp = MLP(widths, hidden, None if hidden else sum(widths), activation)
        self.width = self.mlp.out_dim + 1

    def forward(self, values: Sequence[Tensor], present: Tensor, dims: Iterable[int]) -> Tensor:
        """The summary ``(*, width)``, in which the pooled dims have size one.

        Args:
            values: of the entries, ``(*, width)`` each.
            present: ``(*, 1)``, zero or one.
            dims: to pool, negative, the features being the last.
        """
        h = self.mlp(*values)
        shape = torch.broadcast_shapes(h.shape[:-1], present.shape[:-1])
        weight = present.expand(*shape, 1)
        total = (h * weight).sum(tuple(dims), keepdim=True)
        count = weight.sum(tuple(dims), keepdim=True)
        return torch.cat([total / count.clamp(min=1), count.log1p()], -1)
