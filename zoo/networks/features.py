"""What a guide's network reads of the columns of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyrozoo.zoo.networks.batched import broadcast_leading
from pyrozoo.zoo.networks.column import LEVELS, Column, on_network_scale


class Features(nn.Module):
    """The columns of a table, in groups of one kind, and what a guide's network reads of them.

    A number is read as (value - center) / spread on the column's scale, without clipping, but for
    "student_t", where outliers are expected and asinh of that is read; a binary value as -1 or 1; a
    category as one of K; an ordered level as K - 1 answers, -1 or 1, to "is it above j".  Features
    are in the order of the groups; `owners` says whose they are.

    Args:
        columns: at least one, with distinct names.

    Attributes:
        center, spread: buffers of shape (D,), stored with the parameters.
        owners: the column of each feature, shape (F,).
        filler: a value that each column takes, shape (D,).

    Raises:
        ValueError: if there is no column or a name comes twice.
    """

    center: Tensor
    spread: Tensor
    owners: Tensor
    filler: Tensor
    back: Tensor

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__()
        self.columns = tuple(columns)
        names = [column.name for column in self.columns]
        if not names or len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"a table has columns with distinct names, got {twice or 'none'}")
        self.register_buffer("center", torch.tensor([c.center for c in self.columns]))
        self.register_buffer("spread", torch.tensor([c.spread for c in self.columns]))
        groups: dict[str, list[int]] = {}
        for i, column in enumerate(self.columns):  # of levels: at most twice as many as another
            size = 2 ** math.ceil(math.log2(column.num_values)) if column.num_values else ""
            groups.setdefault(f"{column.likelihood}{size}", []).append(i)
        self.groups = {name: tuple(group) for name, group in groups.items()}
        order: list[int] = []
        owners: list[int] = []
        for name, group in self.groups.items():
            self._keep(f"_{name}", torch.tensor(group))
            order += group
            for i in group:
                column = self.columns[i]
                width = column.num_values - (column.likelihood == "ordered")
                owners += [i] * max(1, width)
            if self.kind(name) in LEVELS:
                sizes = torch.tensor([self.columns[i].num_values for i in group])
                if self.kind(name) == "ordered":
                    sizes = sizes - 1
                inside = torch.arange(int(sizes.max())) < sizes.unsqueeze(-1)
                self._keep(f"_{name}_features", inside.flatten().nonzero().squeeze(-1))
        self._keep("back", torch.tensor(order).argsort())
        self._keep("owners", torch.tensor(owners))
        fillers = {"log_normal": 1.0, "beta": 0.5}
        self._keep("filler", torch.tensor([fillers.get(c.likelihood, 0.0) for c in self.columns]))

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    @property
    def num_features(self) -> int:
        """How many features a row has."""
        return len(self.owners)

    def kind(self, group: str) -> str:
        """The likelihood of a group."""
        return self.columns[self.groups[group][0]].likelihood

    def take(self, value: Tensor, group: str) -> Tensor:
        """The entries (*, n) of a group in values (*, D)."""
        return value if len(self.groups) == 1 else value[..., getattr(self, f"_{group}")]

    def put(self, parts: Sequence[Tensor]) -> Tensor:
        """Entries (*, n) of all groups in the order of the columns, (*, D)."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat(broadcast_leading(parts, (1,) * len(parts)), -1)[..., self.back]

    def check(self, value: Tensor) -> Tensor:
        """Which of the values (*, D) their columns take."""
        return torch.stack([c.allows(value[..., i]) for i, c in enumerate(self.columns)], -1)

    def explain(self, rows: Tensor) -> str:
        """What is wrong with rows of values, (n, D): the first three columns that are."""
        wrong = ~self.check(rows)
        found = [
            column.refuse(rows[:, i][wrong[:, i]], int(wrong[:, i].sum()))
            for i, column in enumerate(self.columns)
            if wrong[:, i].any()
        ]
        more = [f"and {len(found) - 3} more columns"] if len(found) > 3 else []
        return "; ".join([*found[:3], *more])

    def forward(self, value: Tensor) -> Tensor:
        """The features (*, F) of values (*, D), all of which the columns take."""
        found = []
        for group in self.groups:
            kind, part = self.kind(group), self.take(value, group)
            if kind in LEVELS:
                inside = getattr(self, f"_{group}_features")
                size = max(self.columns[i].num_values for i in self.groups[group])
                codes = torch.arange(size, device=value.device, dtype=value.dtype)
                if kind == "ordered":
                    part = 2 * (part.unsqueeze(-1) > codes[:-1]).to(value.dtype) - 1
                else:
                    part = (part.unsqueeze(-1) == codes).to(value.dtype)
                part = part.flatten(-2)[..., inside]
            elif kind == "bernoulli":
                part = 2 * part - 1
            else:
                part = on_network_scale(kind, part) - self.take(self.center, group)
                part = part / self.take(self.spread, group)
                part = part.asinh() if kind == "student_t" else part
            found.append(part)
        return torch.cat(found, -1)
