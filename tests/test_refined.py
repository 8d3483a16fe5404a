"""Refined guides: the closed-form best of their family, and exact posteriors given a label."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from cases import FactorAnalysis
from torch import nn
from torch.distributions import kl_divergence

from pyrozoo.guides.families import make
from pyrozoo.inference import Batch, EnumELBO, log_evidence, stage
from pyrozoo.inference.comparison.refined import Refined, refine
from pyrozoo.inference.graph import read_graph

pytestmark = pytest.mark.usefixtures("double")

ROWS = 5


class Proposal(nn.Module):
    """q(z | x), from a map of one number of x: a bad amortisation on purpose."""

    def __init__(self, family="mean_field", size=2, positive=False):
        super().__init__()
        self.module = make(family, [1], size, init_scale=0.8)
        self.positive = positive

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            fn = self.module(batch["x"][:, :1])
            if self.positive:
                fn = dist.TransformedDistribution(fn, [dist.transforms.ExpTransform()])
            pyro.sample("z", fn)


def exact_posterior(program, x):
    weight = program.linear.weight
    precision = (-2 * program.log_scale).exp()
    cov = (torch.eye(2) + (weight.T * precision) @ weight).inverse()
    loc = ((x - program.linear.bias) * precision) @ weight @ cov
    return dist.MultivariateNormal(loc.detach(), cov.detach())


def proposed(guide, batch):
    with torch.no_grad():
        return poutine.trace(guide).get_trace(batch).nodes["z"]["fn"]


def as_full(fn):
    return (
        fn
        if hasattr(fn, "scale_tril")
        else dist.MultivariateNormal(fn.mean, fn.variance.diag_embed())
    )


def test_refined_is_the_best_of_its_family_and_the_gaps_add_up():
    program, guide = FactorAnalysis(), Proposal()
    batch = Batch.of({"x": torch.randn(ROWS, 5)})
    exact = exact_posterior(program, batch["x"])
    before = {n: p.clone() for n, p in guide.named_parameters()}
    refined = refine(program, guide, batch, 300, num_particles=16)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in guide.named_parameters())
    variance = 1 / exact.precision_matrix.diagonal(dim1=-2, dim2=-1)
    approximation = 0.5 * (torch.logdet(exact.covariance_matrix) - variance.log().sum(-1))
    found = kl_divergence(as_full(proposed(refined, batch)), exact)  # log p(x) - L[q_n]
    torch.testing.assert_close(found, approximation, rtol=0, atol=1e-3)
    whole = kl_divergence(as_full(proposed(guide, batch)), exact)  # log p(x) - L[q]
    assert (whole - found > 0.01).all()
    with torch.no_grad():
        bound = EnumELBO(4000)
        old, new = (bound.per_row(program, g, batch) for g in (guide, refined))
        torch.testing.assert_close(program.evidence(batch) - new, found, rtol=0, atol=0.15)
        torch.testing.assert_close(new - old, whole - found, rtol=0, atol=0.3)


@pytest.mark.parametrize("family", ["low_rank", "student", "autoregressive"])
def test_other_families_gain_and_stay_below_the_evidence(family):
    program, guide = FactorAnalysis(), Proposal(family)
    batch, bound = Batch.of({"x": torch.randn(ROWS, 5)}), EnumELBO(2000, kl="sampled")
    refined = refine(program, guide, batch, 60)
    with torch.no_grad():
        evidence = program.evidence(batch)
        old, new = (bound.per_row(program, g, batch) for g in (guide, refined))
    assert (new > old - 0.1).all()
    assert new.mean() > old.mean() + 0.2
    torch.testing.assert_close(new, evidence, rtol=0, atol=0.15)


class Labelled(nn.Module):
    """y of three, z given y on the plane, x given z and y: given y the posterior is normal."""

    def __init__(self):
        super().__init__()
        self.loc, self.weight = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4, 2))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(3)))
            z = pyro.sample("z", dist.Normal(self.loc[y], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, 0.7).to_event(1))

    def evidence(self, x):
        cov = self.weight @ self.weight.T + 0.49 * torch.eye(4)
        each = dist.MultivariateNormal(self.loc @ self.weight.T, cov).log_prob(x.unsqueeze(1))
        return each.logsumexp(1) - torch.log(torch.tensor(3.0))


class LabelledGuide(nn.Module):
    """q(y | x) q(z | y), which hardly look at x."""

    def __init__(self):
        super().__init__()
        self.module = make("full", [3], 2, init_scale=0.5)

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=0.1 * batch["x"][:, :3]))
            pyro.sample("z", self.module(torch.eye(3)[y]))


def test_a_site_is_corrected_for_each_value_of_what_it_depends_on():
    program, guide = Labelled(), LabelledGuide()
    data = {"x": torch.randn(ROWS, 4)}
    refined = refine(program, guide, data, 220)
    assert refined.offsets["z_loc"].shape == (3, ROWS, 2)
    assert refined.offsets["y_logits"].shape == (ROWS, 3)
    bound = EnumELBO(300, kl="sampled")
    exact = program.evidence(data["x"]).detach()
    found = bound.per_row(program, refined, data).detach()
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02)
    assert (exact - bound.per_row(program, guide, data).detach()).mean() > 0.3
    found = log_evidence(program, refined, data, 50, chunk_size=50 * ROWS)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02)
    known = {**data, "y": torch.arange(ROWS) % 3}
    assert EnumELBO().per_row(program, refined, known).isfinite().all()
    assert read_graph(refined, Batch.of(data)).sites["z"].parents == {"y"}


def test_without_steps_it_is_the_guide():
    program, guide = Labelled(), LabelledGuide()
    data, bound = {"x": torch.randn(ROWS, 4)}, EnumELBO(2)
    values = []
    for each in (guide, Refined(guide, data)):
        torch.manual_seed(0)
        values.append(bound.per_row(program, each, data))
    torch.testing.assert_close(*values)


class Positive(nn.Module):
    """s positive and global, z positive given s, x: two levels on other supports."""

    def forward(self, batch):
        s = pyro.sample("s", dist.LogNormal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2), s.unsqueeze(-1)).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1))


class PositiveGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.local = nn.Parameter(torch.tensor(0.3)), Proposal("mean_field", 2, True)

    def forward(self, batch):
        pyro.sample("s", dist.LogNormal(self.loc, 0.4))
        self.local(batch)


def test_other_supports_and_global_sites():
    program, guide = Positive(), PositiveGuide()
    data = {"x": torch.randn(ROWS, 2).exp()}
    refined = refine(program, guide, data, 80)
    assert refined.offsets["s_loc"].shape == ()
    assert refined(Batch.of(data)) is None
    with torch.no_grad():
        old, new = (EnumELBO(500).differentiable_loss(program, g, data) for g in (guide, refined))
    assert new < old - 0.3
    with torch.no_grad():
        draws = poutine.trace(refined).get_trace(Batch.of(data)).nodes
    assert (draws["z"]["value"] > 0).all()
    assert draws["s"]["value"] > 0


def test_rows_are_told_by_position_or_by_name():
    program, guide = Labelled(), LabelledGuide()
    data = {"x": torch.randn(ROWS, 4)}
    refined = refine(program, guide, data, 20)
    with pytest.raises(ValueError, match="refined for 5 rows, but the batch has 2"):
        EnumELBO().loss(program, refined, {"x": data["x"][:2]})
    named, index = {**data, "row": torch.arange(ROWS)}, torch.tensor([3, 1])
    batch = Batch.of(named)
    whole, part = proposed(refined, batch), proposed(refined, batch[index])
    whole, part = (
        poutine.trace(poutine.condition(refined, {"y": torch.zeros(n, dtype=torch.long)}))
        .get_trace(b)
        .nodes["z"]["fn"]
        for n, b in ((ROWS, batch), (2, batch[index]))
    )
    torch.testing.assert_close(whole.loc[index], part.loc)
    found = log_evidence(program, refined, named, 50, inputs=["row"], chunk_size=100)
    assert found.shape == (ROWS,)
    staged = stage(EnumELBO(), program, refined, data, compile=False)
    staged(data)
    assert staged.eager_calls == 0


def test_what_cannot_be_refined():
    class Odd(nn.Module):
        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                pyro.sample("z", dist.Laplace(torch.zeros(2), 1.0).to_event(1))

    class Nothing(nn.Module):
        def forward(self, batch):
            return {}

    data = {"x": torch.randn(ROWS, 5)}
    with pytest.raises(ValueError, match=r"'z'.*cannot be refined"):
        Refined(Odd(), data)
    with pytest.raises(ValueError, match="no site that could be refined"):
        refine(FactorAnalysis(), Nothing(), data)
