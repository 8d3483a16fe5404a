"""The VAE of the catalogue: its evidence by quadrature, its objectives, its start."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyrozoo import zoo
from pyrozoo.inference import IWELBO, EnumELBO, log_evidence

SMALL = {"hidden": (8,), "latent_dim": 2}


def data(rows=60):
    torch.manual_seed(0)
    return {"x": (torch.rand(rows, 6) > 0.5).float()}


def test_the_evidence_is_that_of_quadrature():
    x = data(5)
    model = zoo.create("vae", x, **SMALL)
    model.fit(x, epochs=200, lr=1e-2, progress=False)  # weights of another guide vary too much
    line = torch.linspace(-7, 7, 141)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        fn = model.program.decoder(grid.unsqueeze(1))
        prior = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1)
        joint = prior.unsqueeze(1) + fn.log_prob(x["x"])
    exact = joint.logsumexp(0) + 2 * math.log(float(line[1] - line[0]))
    found = log_evidence(model.program, model.guide, x, 20_000)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_a_start_by_the_evidence_bound(objective):
    x = data()
    seen = []
    model = zoo.create("vae", x, objective=objective, num_particles=7, **SMALL)
    assert isinstance(model.objective, IWELBO)
    assert (model.objective.num_particles, model.objective.gradient) == (
        7, "dreg" if objective == "dreg" else "total",
    )  # fmt: skip
    before = [v.clone() for v in model.program.parameters()]
    result = model.fit(
        x, epochs=1, lr=1e-12, start={"epochs": 3}, progress=False, callbacks=[seen.append]
    )
    twin = zoo.create("vae", x, **SMALL)
    assert isinstance(twin.objective, EnumELBO)
    twin.fit(x, epochs=3, lr_schedule="cosine", progress=False)
    for a, b, c in zip(result.program.parameters(), twin.program.parameters(), before, strict=True):
        assert not torch.equal(a, c)
        torch.testing.assert_close(a, b)
    assert len(seen) == 1


def test_objectives_that_there_are_not():
    with pytest.raises(ValueError, match="objective is one of elbo, iwae, dreg, got 'best'"):
        zoo.create("vae", data(), objective="best")
    with pytest.raises(ValueError, match="vae has no pretraining, but got epochs"):
        zoo.create("vae", data(), **SMALL).fit(data(), start={"epochs": 1})
