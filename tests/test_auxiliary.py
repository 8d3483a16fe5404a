"""Auxiliary guides: a bound by quadrature, more than one mode, ADGM, rows without anything."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn

from pyrozoo.guides.amortized import Amortized, Classifier, Sequential
from pyrozoo.guides.auxiliary import Auxiliary
from pyrozoo.inference import Batch, EnumELBO, pair, posterior
from pyrozoo.inference.evidence import log_weights
from pyrozoo.inference.graph import read_graph
from pyrozoo.zoo.semisupervised import M2

pytestmark = pytest.mark.usefixtures("double")


class Square(nn.Module):
    """z on the line, x about z^2: two modes."""

    def __init__(self, noise=0.3):
        super().__init__()
        self.noise = noise

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z**2, self.noise).to_event(1))


def square_evidence(x, noise=0.3):
    z = torch.linspace(-8, 8, 8001)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z**2, noise).log_prob(x)
    return joint.logsumexp(-1) + math.log(z[1] - z[0])


def shaken(guide, spread=0.3):
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return guide


def train(program, guide, data, steps):
    optimizer = torch.optim.Adam(guide.parameters(), 0.03)
    loss_of = EnumELBO(16)(program, guide)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        loss = loss_of(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_bound_is_the_integral_over_all_draws_and_below_the_evidence():
    program, x = Square(), torch.tensor([[0.2], [1.5]])
    guide = shaken(Auxiliary(program, ["x"], dim=1, hidden=(4,), activation="tanh"))
    axis = torch.linspace(-9, 9, 601)
    a, z = (v.reshape(-1, 1, 1) for v in torch.cartesian_prod(axis, axis).unbind(-1))
    with torch.no_grad():
        q_a = guide.forwards(x).log_prob(a)
        q_z = guide.network(x, a).log_prob(z)
        r = guide.reverse(x, z).log_prob(a)
        prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        joint = prior + dist.Normal(z**2, 0.3).log_prob(x).sum(-1)
        weight = (q_a + q_z).exp() * (axis[1] - axis[0]) ** 2
        torch.testing.assert_close(weight.sum(0), torch.ones(2), rtol=0, atol=1e-6)
        exact = (weight * (joint + r - q_a - q_z)).sum(0)
        assert (exact < square_evidence(x)).all()
        bound = EnumELBO(100_000, kl="sampled").per_row(program, guide, {"x": x})
    torch.testing.assert_close(bound, exact, rtol=0.02, atol=0)


@torch.no_grad()
def test_importance_weights_have_the_evidence_as_their_mean():
    program, x = Square(), torch.tensor([[0.2], [1.5]])
    guide = Auxiliary(program, ["x"], dim=1, hidden=(4,), init_scale=1.0)
    objective = EnumELBO(200_000, kl="sampled")
    p, q = pair(program, guide)
    terms = objective.trace(p, q, Batch.of({"x": x}))
    found = log_weights(terms).logsumexp(0) - math.log(200_000)
    torch.testing.assert_close(found, square_evidence(x), rtol=0, atol=0.03)


def test_two_modes_cost_less():
    program, x = Square(0.5), torch.tensor([[0.8], [1.2]])
    evidence, found = square_evidence(x, 0.5).mean(), {}
    for kind, options in ((Amortized, {}), (Auxiliary, {"dim": 1})):
        torch.manual_seed(3)
        guide = kind(program, ["x"], hidden=(16,), activation="tanh", init_scale=1.0, **options)
        train(program, guide, {"x": x}, 200)
        with torch.no_grad():
            rows = EnumELBO(20_000, kl="sampled").per_row(program, guide, {"x": x})
        found[kind] = rows.mean()
    assert found[Amortized] < evidence - 0.4
    assert found[Amortized] + 0.15 < found[Auxiliary] < evidence + 0.01


def adgm():
    program = M2(5, 3, 2, (4,))
    parts = [
        Classifier(program, "y", ["x"], (4,)),
        Auxiliary(program, ["x", "y"], dim=2, hidden=(4,)),
    ]
    return program, shaken(Sequential(*parts))


def test_with_a_label_the_bound_is_that_of_pyro_draw_for_draw():
    program, guide = adgm()
    p, q = pair(program, guide)
    data = {"x": torch.rand(6, 5)}
    for particles in (1, 3):
        torch.manual_seed(1)
        found = EnumELBO(particles).differentiable_loss(p, q, data)
        torch.manual_seed(1)
        stock = TraceEnum_ELBO(particles, max_plate_nesting=1, vectorize_particles=particles > 1)
        torch.testing.assert_close(found, stock.differentiable_loss(p, q, data) / 6)
    found.backward()
    assert all(g.grad is not None and g.grad.isfinite().all() for g in guide.parameters())
    assert posterior(program, guide, data, 3)["z"].shape == (3, 6, 2)


def test_rows_without_anything_count_zero_and_labels_may_miss():
    program, guide = adgm()
    seen, known = torch.arange(6) > 0, torch.tensor([0, 1, 0, 1, 1, 0]).bool()
    data = {"x": (torch.rand(6, 5), seen), "y": (torch.arange(6) % 3, known)}
    rows = EnumELBO(split=False).per_row(program, guide, data)
    assert rows[0] == 0
    assert (rows[1:] != 0).all()
    only = {"x": (data["x"][0], torch.arange(6) < 0), "y": torch.arange(6) % 3}
    rows = EnumELBO(split=False).per_row(
        program, guide, only
    )  # z does not count: only p(y) is left
    torch.testing.assert_close(rows, torch.full((6,), -math.log(3)))


class Shares(nn.Module):
    """p on the simplex and s positive, x given both."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            s = pyro.sample("s", dist.Gamma(2.0, torch.ones(())))
            pyro.sample("x", dist.Normal(p * s.unsqueeze(-1), 0.2).to_event(1))


@torch.no_grad()
def test_several_sites_on_other_supports():
    program, x = Shares(), torch.rand(3, 3)
    parts = [
        Auxiliary(program, ["x"], "p", "a_1", hidden=(4,), init_scale=1.5),
        Auxiliary(program, ["x", "p"], "s", "a_2", hidden=(4,), family="student", init_scale=1.0),
    ]
    guide = Sequential(*parts)
    graph = read_graph(guide, Batch.of({"x": x}))
    assert list(graph.sites) == ["a_1", "p_proposal", "p", "a_2", "s_proposal", "s"]
    p, q = pair(program, guide)
    terms = EnumELBO(100_000, kl="sampled").trace(p, q, Batch.of({"x": x}))
    found = log_weights(terms).logsumexp(0) - math.log(100_000)
    uniform = dist.Dirichlet(torch.ones(3)).sample(torch.Size([400_000, 1]))
    size = dist.Gamma(2.0, 1.0).sample(torch.Size([400_000, 1, 1]))
    drawn = dist.Normal(uniform * size, 0.2).to_event(1).log_prob(x)
    exact = drawn.logsumexp(0) - math.log(400_000)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)


def test_wrong_auxiliary_guides():
    program = M2(5, 3, 2, (4,))
    with pytest.raises(ValueError, match="'y' is expected to be a continuous"):
        Auxiliary(program, ["x"], "y")
    with pytest.raises(ValueError, match="'x' is a site of the program"):
        Auxiliary(program, ["x"], name="x")
