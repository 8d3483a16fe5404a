"""The ladder guide: bottom-up, and weighted by precision on the way down."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

from pyrozoo.guides import Ladder
from pyrozoo.inference import Batch, EnumELBO, evaluate, fit, schedules
from pyrozoo.inference.staging.staged import stage

SLOPE, SCALE, WEIGHT, NOISE = 1.2, 0.7, 0.9, 0.5


class Chain(nn.Module):
    """z_2 ~ Normal(0, 1), z_1 | z_2 ~ Normal(a z_2, s), x | z_1 ~ Normal(w z_1, t)."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z_2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z = pyro.sample("z_1", dist.Normal(SLOPE * z, SCALE).to_event(1))
            pyro.sample("x", dist.Normal(WEIGHT * z, NOISE).to_event(1))


def rows(count=400):
    x = math.sqrt(WEIGHT**2 * (SLOPE**2 + SCALE**2) + NOISE**2) * torch.randn(count, 1)
    fn = dist.Normal(0.0, math.sqrt(WEIGHT**2 * (SLOPE**2 + SCALE**2) + NOISE**2))
    return {"x": x}, fn.log_prob(x).mean()


def made(top_down):
    torch.manual_seed(0)
    return Ladder(Chain(), ["x"], ["z_1", "z_2"], (2, 2), nn.Identity(), top_down=top_down)


@pytest.mark.parametrize("top_down", [None, ()])
def test_a_chain_of_gaussians(top_down):
    """Exact on the way down; independent latents cost what the posterior's correlation says."""
    torch.manual_seed(1)
    data, evidence = rows()
    program, guide = Chain(), made(top_down)
    fit(
        program, guide, data, objective=EnumELBO(4, gradient="stl"), epochs=300, batch_size=400,
        lr=0.05, lr_schedule=schedules.cosine(300), progress=False,
    )  # fmt: skip
    elbo = evaluate(program, guide, data, num_particles=200)["bound"]
    gap = float(evidence) - elbo
    precision = torch.tensor([  # of z_1, z_2 given x
        [1 / SCALE**2 + (WEIGHT / NOISE) ** 2, -SLOPE / SCALE**2],
        [-SLOPE / SCALE**2, 1 + SLOPE**2 / SCALE**2],
    ])  # fmt: skip
    rho = precision[0, 1] / (precision[0, 0] * precision[1, 1]).sqrt()
    least = 0.0 if top_down is not None else float(-0.5 * torch.log1p(-(rho**2)))
    assert gap == pytest.approx(least, abs=0.01)


def test_the_proposal_is_the_product_of_both_ways():
    guide, batch = made((3,)), Batch.of(rows(5)[0])
    z = torch.randn(7, 5, 1)
    up = guide.distributions(batch)["z_1"]
    down = guide.down["z_1"](z)
    found = guide.distribution("z_1", batch, {"z_2": z})
    assert found.batch_shape == (7, 5)
    grid = torch.linspace(-30, 30, 20_001).reshape(-1, 1, 1, 1)
    joint = up.log_prob(grid) + down.log_prob(grid)
    density = (joint - (joint.logsumexp(0) + math.log(60 / 20_000))).exp()
    torch.testing.assert_close(found.log_prob(grid).exp(), density, rtol=1e-3, atol=1e-4)
    top = guide.distribution("z_2", batch)
    torch.testing.assert_close(
        kl_divergence(top, guide.distributions(batch)["z_2"]), torch.zeros(5)
    )


def test_the_way_down_is_staged():
    program, guide, batch = Chain(), made((3,)), Batch.of(rows(20)[0])
    staged = stage(EnumELBO(2), program, guide, batch, compile=False)
    assert (staged.how, staged.reason) == ("graph", "")
    torch.manual_seed(3)
    found = float(staged(batch))
    torch.manual_seed(3)
    assert found == pytest.approx(EnumELBO(2).loss(program, guide, batch), rel=1e-5)
