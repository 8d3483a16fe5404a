"""Programs whose posterior is known from long runs of NUTS, stored beside this file."""

from __future__ import annotations

from importlib.resources import files

import pyro
import pyro.distributions as dist
import torch
from safetensors.torch import load
from torch import Tensor, nn

from pyrozoo.inference import Batch
from pyrozoo.zoo.truth.exact import generator
from pyrozoo.zoo.truth.rung import Draws, Rung

CHAINS, WARMUP, SAMPLES, KEPT = 4, 500, 2500, 1000  # of the stored runs


def stored(name: str) -> Draws:
    """The stored draws of a program, ``(KEPT, *shape)`` by site.

    Raises:
        FileNotFoundError: they have not been made; ``python -m pyrozoo.zoo.truth.references``.
    """
    path = files("pyrozoo.zoo.truth") / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"the draws of {name} are not there: python -m pyrozoo.zoo.truth.references FOLDER"
            " makes them"
        )
    return load(path.read_bytes())


def _rung(
    name: str,
    title: str,
    program: nn.Module,
    data: dict[str, Tensor],
    *keys: str,
    epochs: int = 1000,
) -> Rung:
    def draws(n: int, seed: int) -> Draws:
        found = stored(name)
        total = len(next(iter(found.values())))
        if n > total:
            raise ValueError(f"{total} draws of {name} are stored, got a request for {n}")
        pick = torch.randperm(total, generator=generator(seed))[:n]
        return {site: value[pick] for site, value in found.items()}

    return Rung(name, title, program, data, ("x",), "NUTS", draws, inputs=keys, epochs=epochs)


class EightSchools(nn.Module):
    """``x_j | theta_j ~ Normal(theta_j, s_j)`` with known s, ``theta_j = mu + tau z_j``::

        mu ~ Normal(0, 5)    tau ~ HalfCauchy(5)    z_j ~ Normal(0, 1)

    Source: Donald Rubin, "Estimation in parallel randomized experiments" (1981); the priors are
    those of Gelman et al., "Bayesian data analysis", as posteriordb has them.
    """

    def forward(self, batch: Batch) -> None:
        """Generate the schools of a batch, whose known errors it reads from ``batch["s"]``."""
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        s = batch["s"] if "s" in batch else torch.ones(len(batch))
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mu + tau * z, s))


def eight_schools() -> Rung:
    """The effect of coaching in eight schools (Rubin, 1981)."""
    x = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    s = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return _rung(
        "eight_schools", "eight schools", EightSchools(), {"x": x, "s": s}, "s", epochs=4000
    )


class Logistic(nn.Module):
    """``x ~ Bernoulli(logit = a + w u)`` with ``a, w ~ Normal(0, 2.5)`` and known u."""

    def forward(self, batch: Batch) -> None:
        """Generate the rows of a batch, whose covariates it reads from ``batch["u"]``."""
        a = pyro.sample("a", dist.Normal(0.0, 2.5))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.5).to_event(1))
        u = batch["u"] if "u" in batch else torch.zeros(len(batch), 3)
        with pyro.plate("data", len(batch)):
            logit = a + (u * w).sum(-1)
            pyro.sample("x", dist.Bernoulli(logits=logit))


def logistic() -> Rung:
    """Forty rows and correlated covariates: the posterior is skewed and correlated."""
    g = generator(7)
    u = torch.randn(40, 3, generator=g)
    u[:, 1] = 0.9 * u[:, 0] + 0.4 * u[:, 1]
    probs = torch.sigmoid(0.5 + u @ torch.tensor([2.0, -1.0, 0.5]))
    x = torch.bernoulli(probs, generator=g)
    return _rung("logistic", "logistic regression", Logistic(), {"x": x, "u": u}, "u")


class Counts(nn.Module):
    """``x ~ Poisson(exp(a + b u + tau e))``, an effect e of each row::

    a, b ~ Normal(0, 1)    tau ~ HalfNormal(1)    e ~ Normal(0, 1)
    """

    def forward(self, batch: Batch) -> None:
        """Generate the rows of a batch, whose covariate it reads from ``batch["u"]``."""
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        u = batch["u"] if "u" in batch else torch.zeros(len(batch))
        with pyro.plate("data", len(batch)):
            e = pyro.sample("e", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson((a + b * u + tau * e).exp()))


def counts() -> Rung:
    """Fifty overdispersed counts."""
    g = generator(8)
    u, e = torch.randn(50, generator=g), torch.randn(50, generator=g)
    x = torch.poisson((0.5 + 0.7 * u + 0.6 * e).exp(), generator=g)
    return _rung("counts", "overdispersed counts", Counts(), {"x": x, "u": u}, "u", epochs=4000)


class UnknownMeans(nn.Module):
    """``y ~ Categorical(p)``, ``x | y ~ Normal(loc_y, s)``, all of p, loc and s unknown::

    p ~ Dirichlet(2, 2)    loc ~ Normal((-1, 1), 1)    s ~ LogNormal(0, 0.5)
    """

    def forward(self, batch: Batch) -> None:
        """Generate the rows of a batch."""
        p = pyro.sample("p", dist.Dirichlet(torch.full((2,), 2.0)))
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(p))
            mean = torch.where(y == 0, loc[..., 0], loc[..., 1])
            pyro.sample("x", dist.Normal(mean, s))


def unknown_means() -> Rung:
    """Sixty rows of two Gaussians that overlap: positive and simplex latents, a summed site."""
    g = generator(9)
    y = (torch.rand(60, generator=g) > 0.35).float()
    x = -1.2 + 2.6 * y + 0.9 * torch.randn(60, generator=g)
    return _rung("unknown_means", "two unknown Gaussians", UnknownMeans(), {"x": x})
