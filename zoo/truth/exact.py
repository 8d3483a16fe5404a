"""Programs whose posterior and evidence are computed: in closed form, by enumeration, on a grid."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.inference import Batch
from pyrozoo.zoo.truth.rung import Draws, Rung


def generator(seed: int) -> torch.Generator:
    """A random state of its own."""
    return torch.Generator().manual_seed(seed)


# ---- factor analysis -----------------------------------------------------------------------------


class FactorAnalysis(nn.Module):
    """``z ~ Normal(0, I)``, ``x | z ~ Normal(W z, s)``: 3 factors, 8 columns."""

    weight: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        g = generator(0)
        self.register_buffer("weight", torch.randn(8, 3, generator=g))
        self.register_buffer("scale", 0.5 + torch.rand(8, generator=g))

    def forward(self, batch: Batch) -> None:
        """Generate the rows of a batch."""
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(self.weight.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, self.scale).to_event(1))


def factor() -> Rung:
    """Factor analysis: the posterior is Gaussian, with correlated factors."""
    program = FactorAnalysis()
    g = generator(1)
    w, s = program.weight, program.scale
    x = torch.randn(500, 3, generator=g) @ w.T + s * torch.randn(500, 8, generator=g)
    w64, s64, x64 = w.double(), s.double(), x.double()
    whole = dist.MultivariateNormal(torch.zeros(8).double(), w64 @ w64.T + torch.diag(s64**2))
    precision = torch.eye(3).double() + w64.T @ (w64 / s64.unsqueeze(-1) ** 2)
    mean = torch.linalg.solve(precision, w64.T @ (x64 / s64**2).T).T
    root = torch.linalg.cholesky(torch.linalg.inv(precision))

    def draws(n: int, seed: int) -> Draws:
        noise = torch.randn(n, len(x), 3, generator=generator(seed), dtype=torch.float64)
        return {"z": (mean + noise @ root.T).float()}

    return Rung(
        "factor", "factor analysis", program, {"x": x}, ("x",), "closed form", draws,
        log_evidence=whole.log_prob(x64),
    )  # fmt: skip


# ---- finite sites --------------------------------------------------------------------------------


class FiniteMixture(nn.Module):
    """``y ~ Categorical(p)``, ``x | y ~ Normal(loc_y, s_y)``: 4 components in the plane."""

    probs: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("probs", torch.tensor([0.4, 0.3, 0.2, 0.1]))
        self.register_buffer("loc", torch.tensor([[0.0, 0.0], [2.0, 0.5], [0.5, 2.0], [-1.5, 1.0]]))
        self.register_buffer("scale", torch.tensor([[1.0, 0.5], [0.6, 0.9], [0.8, 0.8], [0.5, 1]]))

    def forward(self, batch: Batch) -> None:
        """Generate the rows of a batch."""
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(self.probs))
            pyro.sample("x", dist.Normal(self.loc[y], self.scale[y]).to_event(1))


def mixture() -> Rung:
    """A finite mixture: all that is unknown is finite."""
    program = FiniteMixture()
    g = generator(2)
    y = torch.multinomial(program.probs, 500, True, generator=g)
    x = program.loc[y] + program.scale[y] * torch.randn(500, 2, generator=g)
    parts = dist.Normal(program.loc.double(), program.scale.double()).log_prob(
        x.double().unsqueeze(1)
    )
    joint = program.probs.double().log() + parts.sum(-1)

    def draws(n: int, seed: int) -> Draws:
        probs = joint.softmax(-1)
        return {"y": torch.multinomial(probs, n, True, generator=generator(seed)).T}

    return Rung(
        "mixture", "finite mixture", program, {"x": x}, ("x",), "enumeration", draws, epochs=1,
        log_evidence=joint.logsumexp(-1),
    )  # fmt: skip


class Hierarchy(nn.Module):
    """``c ~ Cat``, ``y_1, y_2 | c ~ Cat``, ``x_j | y_j, c ~ Normal(loc_j[y_j] + shift[c], 1)``."""

    top: Tensor
    middle: Tensor
    loc: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        g = generator(3)
        self.register_buffer("top", torch.tensor([0.5, 0.3, 0.2]))
        self.register_buffer("middle", torch.rand(2, 3, 4, generator=g).softmax(-1))
        self.register_buffer("loc", 2 * torch.randn(2, 4, generator=g))
        self.register_buffer("shift", torch.randn(3, generator=g))

    def forward(self, batch: Batch) -> None:
        """Generate the rows of a batch."""
        with pyro.plate("data", len(batch)):
            c = pyro.sample("c", dist.Categorical(self.top))
            for j in range(2):
                y = pyro.sample(f"y_{j + 1}", dist.Categorical(self.middle[j][c]))
                pyro.sample(f"x_{j + 1}", dist.Normal(self.loc[j][y] + self.shift[c], 1.0))


def hierarchy() -> Rung:
    """Finite sites at two levels, summed together."""
    program = Hierarchy()
    g = generator(4)
    c = torch.multinomial(program.top, 500, True, generator=g)
    y = [torch.multinomial(program.middle[j][c], 1, generator=g).squeeze(-1) for j in range(2)]
    x = [program.loc[j][y[j]] + program.shift[c] + torch.randn(500, generator=g) for j in range(2)]
    joint = program.top.double().log().reshape(1, 3, 1, 1)
    for j in range(2):
        mean = (program.loc[j] + program.shift.unsqueeze(-1)).double()  # (3, 4)
        value = x[j].double().reshape(-1, 1, 1)
        part = program.middle[j].double().log() + dist.Normal(mean, 1.0).log_prob(value)
        joint = joint + (part.unsqueeze(-1) if j == 0 else part.unsqueeze(-2))

    def draws(n: int, seed: int) -> Draws:
        flat = torch.multinomial(joint.flatten(1).exp(), n, True, generator=generator(seed)).T
        return {"c": flat // 16, "y_1": flat // 4 % 4, "y_2": flat % 4}

    return Rung(
        "hierarchy", "finite hierarchy", program, {"x_1": x[0], "x_2": x[1]}, ("x_1", "x_2"),
        "enumeration", draws, epochs=1, log_evidence=joint.flatten(1).logsumexp(-1),
    )  # fmt: skip


# ---- two latents behind a network ----------------------------------------------------------------


class FixedDecoder(nn.Module):
    """``z ~ Normal(0, I)`` in the plane, ``x | z ~ Normal(V tanh(U z), 0.5)``: 3 columns.

    Posteriors bend.  Where all columns but the first are squared, hence even in z, many have two
    modes.

    Args:
        squared: whether they are.
    """

    inner: Tensor
    outer: Tensor

    def __init__(self, squared: bool = False) -> None:
        super().__init__()
        self.squared = squared
        g = generator(5)
        self.register_buffer("inner", 1.5 * torch.randn(2, 12, generator=g))
        self.register_buffer("outer", torch.randn(12, 3, generator=g) / 2)

    def mean(self, z: Tensor) -> Tensor:
        """The mean of x, ``(*, 3)``."""
        hidden = torch.tanh(z @ self.inner.to(z.dtype))
        out = hidden @ self.outer.to(z.dtype)
        return torch.cat([out[..., :1], out[..., 1:] ** 2], -1) if self.squared else out

    def forward(self, batch: Batch) -> None:
        """Generate the rows of a batch."""
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(self.inner.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), 0.5).to_event(1))


def decoder(points: int = 193, reach: float = 6.0) -> Rung:
    """Two latents behind a network: bent posteriors, known on a grid.

    Args:
        points: of the grid in each direction, over ``[-reach, reach]``.
    """
    return _on_a_grid("decoder", "two latents behind a network", False, points, reach)


def modes(points: int = 193, reach: float = 6.0) -> Rung:
    """The same with squares: many posteriors have two modes.  Takes what :func:`decoder` does."""
    return _on_a_grid("modes", "posteriors with two modes", True, points, reach)


def _on_a_grid(name: str, title: str, squared: bool, points: int, reach: float) -> Rung:
    program = FixedDecoder(squared)
    g = generator(6)
    z = torch.randn(200, 2, generator=g)
    x = program.mean(z) + 0.5 * torch.randn(200, 3, generator=g)
    line = torch.linspace(-reach, reach, points, dtype=torch.float64)
    step = float(line[1] - line[0])
    grid = torch.cartesian_prod(line, line)
    prior = dist.Normal(grid.new_zeros(2), 1.0).log_prob(grid).sum(-1)
    mean = program.mean(grid)
    joint = torch.cat(
        [
            prior + dist.Normal(mean, 0.5).log_prob(row.double()).sum(-1).unsqueeze(0)
            for row in x.unsqueeze(1)
        ]
    )

    def draws(n: int, seed: int) -> Draws:
        random = generator(seed)
        cell = torch.multinomial(joint.softmax(-1), n, True, generator=random).T
        jitter = torch.rand(n, len(x), 2, generator=random, dtype=torch.float64) - 0.5
        return {"z": (grid[cell] + step * jitter).float()}

    return Rung(
        name, title, program, {"x": x}, ("x",), "quadrature", draws, epochs=2000,
        log_evidence=joint.logsumexp(-1) + 2 * math.log(step),
    )  # fmt: skip
