"""Families of proposals: densities by quadrature, divergences in closed form, particles, staging."""

import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn
from torch.distributions import kl_divergence

from pyrozoo.guides.families import FAMILIES, make
from pyrozoo.inference import EnumELBO, pair, stage
from pyrozoo.zoo.networks import Encoder

pytestmark = pytest.mark.usefixtures("double")

DENSE = [name for name in FAMILIES if name != "delta"]


def shaken(family, in_dims, size, spread=0.3, **options):
    """A module of a family whose parameters were moved off their start."""
    module = make(family, in_dims, size, (8,), "tanh", 0.6, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            far = 0.2 * spread if name.startswith("flow") else spread
            parameter.add_(far * torch.randn_like(parameter))
    return module


def grid(size, width, steps):
    axis = torch.linspace(-width, width, steps)
    return torch.cartesian_prod(*[axis] * size).reshape(-1, size), (axis[1] - axis[0]) ** size


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", DENSE)
def test_densities_integrate_to_one_and_are_those_of_the_draws(family, size):
    z, volume = grid(size, 60.0 if size == 1 else 15.0, 12_001 if size == 1 else 151)
    module = shaken(family, [3], size)
    fn = module(torch.randn(3))
    assert fn.batch_shape == ()
    assert fn.event_shape == (size,)
    mass = fn.log_prob(z).exp() * volume
    # Student's t has about 1e-5 of its mass beyond the square, and a spline has kinks
    assert abs(float(mass.sum()) - 1) < 2e-3
    draws = fn.rsample(torch.Size([10_000]))
    kept = fn.log_prob(draws)
    torch.testing.assert_close(kept, fn.log_prob(draws.clone()))
    weights = mass / mass.sum()
    for test in (torch.sin, lambda v: torch.cos(2 * v), lambda v: torch.cos(v.sum(-1, True))):
        exact = (weights.unsqueeze(-1) * test(z)).sum(0)
        torch.testing.assert_close(test(draws).mean(0), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("family", DENSE)
def test_every_family_starts_near_the_mean_field(family):
    module = make(family, [3, 2], 2, (8,), init_scale=0.6)
    fn = module(torch.randn(4, 3), torch.randn(5, 1, 2))
    assert fn.batch_shape == (5, 4)
    loc = fn.mean if family not in ("autoregressive", "coupling") else fn.loc
    value = loc + 0.6 * torch.randn(5, 4, 2).clamp(-1.5, 1.5)
    start = dist.Normal(loc, 0.6).to_event(1).log_prob(value)
    tolerance = {"low_rank": 0.05, "student": 0.2}.get(family, 1e-9)
    torch.testing.assert_close(fn.log_prob(value), start, rtol=0, atol=tolerance)


def test_the_mean_field_is_the_encoder_itself():
    assert type(make("mean_field", [3], 2, (4,))) is Encoder
    made = make(lambda in_dims, size: Encoder(in_dims, (4,), size), 3, 2)
    assert made.trunk.in_dims == (3,)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_inputs_there_are_plain_parameters(family):
    module = make(family, [], 2)
    fn = module()
    assert fn.batch_shape == ()
    assert fn.event_shape == (2,)
    draw = fn.expand((3,)).rsample()
    assert draw.shape == (3, 2)
    (draw.sum() + fn.log_prob(draw.detach()).sum()).backward()
    free = [n for n, p in module.named_parameters() if p.grad is None]
    assert free == []


@pytest.mark.parametrize("family", ["full", "low_rank"])
def test_divergence_of_a_correlated_normal_from_independent_ones(family):
    q = shaken(family, [2], 3)(torch.randn(4, 2))
    p = dist.Normal(torch.randn(3), 0.5 + torch.rand(4, 3)).to_event(1)
    exact = kl_divergence(
        dist.MultivariateNormal(q.mean, q.covariance_matrix),
        dist.MultivariateNormal(p.mean, p.stddev.diag_embed() ** 2),
    )
    torch.testing.assert_close(kl_divergence(q, p), exact)
    z = q.rsample(torch.Size([50_000]))
    drawn = (q.log_prob(z) - p.log_prob(z)).mean(0)
    torch.testing.assert_close(drawn, exact, rtol=0, atol=0.06)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, dist.Laplace(torch.zeros(3), 1.0).to_event(1))


class Program(nn.Module):
    """y in {0, 1, 2}, z on the plane, x given both."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(3)))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.linear(z) + torch.eye(3)[y]
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))


class Guide(nn.Module):
    """q(z | x), or q(y | x) q(z | x, y), or q(z)."""

    def __init__(self, family, reads):
        super().__init__()
        self.reads = reads
        self.module = shaken(family, [3] * reads, 2)

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            inputs = [batch["x"]][: self.reads]
            if self.reads == 2:
                y = pyro.sample("y", dist.Categorical(logits=batch["x"]))
                inputs.append(torch.eye(3)[y])
            pyro.sample("z", self.module(*inputs))


@pytest.mark.parametrize("reads", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_with_particles_is_that_of_pyro(family, reads):
    program, guide = Program(), Guide(family, reads)
    batch = {"x": torch.randn(4, 3)}
    p, q = pair(program, guide)
    for particles in (1, 5):
        torch.manual_seed(1)
        loss = EnumELBO(particles, kl="sampled").differentiable_loss(p, q, batch)
        torch.manual_seed(1)
        stock = TraceEnum_ELBO(
            particles, max_plate_nesting=1, vectorize_particles=particles > 1
        ).differentiable_loss(p, q, batch)
        torch.testing.assert_close(loss, stock / 4)
        parameters = list(guide.parameters())
        grads = torch.autograd.grad(loss, parameters)
        for found, right in zip(grads, torch.autograd.grad(stock / 4, parameters), strict=True):
            torch.testing.assert_close(found, right)


@pytest.mark.parametrize("family", ["full", "low_rank", "student", "autoregressive", "coupling"])
def test_the_families_can_be_staged(family):
    program, guide = Program(), Guide(family, 2)
    batch = {"x": torch.randn(4, 3)}
    objective = EnumELBO(3)
    staged = stage(objective, program, guide, batch, compile=False)
    assert staged.reason == "" or "compile" in staged.reason
    torch.manual_seed(2)
    found = staged(batch)
    assert staged.eager_calls == 0
    torch.manual_seed(2)
    torch.testing.assert_close(found, objective.differentiable_loss(program, guide, batch).detach())


def test_a_flow_reaches_two_modes():
    modes = dist.Normal(torch.tensor([-2.0, 2.0]), 0.5)

    def target(z):
        return modes.log_prob(z).logsumexp(-1) - math.log(2)

    bounds = {}
    for family in ("mean_field", "autoregressive"):
        module = make(family, [], 1, init_scale=1.5)
        optimizer = torch.optim.Adam(module.parameters(), 0.04)
        for _ in range(200):
            z = (fn := module()).rsample(torch.Size([128]))
            loss = (fn.log_prob(z) - target(z)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            z = (fn := module()).rsample(torch.Size([20_000]))
            bounds[family] = float((target(z) - fn.log_prob(z)).mean())
    assert -0.25 < bounds["autoregressive"] < 0.01  # the evidence is log 1
    assert bounds["mean_field"] < -0.4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make("gauss", [2], 2), ValueError, "no family is called 'gauss'.*mean_field"),
        (lambda: make("full", [2], 0), ValueError, "size of a draw is positive"),
        (lambda: make("low_rank", [2], 2, rank=3), ValueError, "between 1 and 2"),
        (lambda: make("coupling", [2], 2, transforms=0), ValueError, "at least one transform"),
        (lambda: make(lambda a, b: 3, [2], 2), TypeError, "returns a module, got int"),
        (lambda: make("full", [2], 2, rank=1), TypeError, "rank"),
    ],
)
def test_wrong_families(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_to_install_for_flows(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(ImportError, match=r"pyrozoo\[flows\]"):
        make("coupling", [2], 2)
