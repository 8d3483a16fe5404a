"""Posteriors against exact answers: enumeration, conjugate Gaussians, and known values."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, FactorAnalysis
from torch import nn

from pyrozoo.guides import Amortized, Classifier, ProductOfExperts, Sequential
from pyrozoo.inference import Batch, posterior, predict, responsibilities
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.multimodal import MVAE
from pyrozoo.zoo.semisupervised import M2

ROWS, WIDTH, K = 7, 5, 3


class Nothing(nn.Module):
    def forward(self, batch):
        pass


class Mixture(nn.Module):
    """A finite mixture without any continuous latent: everything is exact."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.2, -0.5, 0.9], dtype=torch.float64))
        self.loc = nn.Parameter(torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(self.loc[y], 0.7))

    def exact(self, x):
        joint = self.logits.log_softmax(0) + dist.Normal(self.loc, 0.7).log_prob(x[:, None])
        return joint.softmax(-1)


class Chain(nn.Module):
    """Two summed sites, one above the other, seen through one number each."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(2, generator=generator).double())
        self.b = nn.Parameter(torch.randn(2, 3, generator=generator).double())
        self.loc = nn.Parameter(torch.randn(3, generator=generator).double())

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            a = pyro.sample("a", dist.Categorical(logits=self.a))
            y = pyro.sample("y", dist.Categorical(logits=self.b[a]))
            pyro.sample("x", dist.Normal(self.loc[y] + a, 1.0))

    def exact(self, x):
        """The joint posterior, ``(rows, 2, 3)``."""
        loc = self.loc[None, :] + torch.arange(2)[:, None]
        joint = self.a.log_softmax(0)[:, None] + self.b.log_softmax(-1)
        joint = joint + dist.Normal(loc, 1.0).log_prob(x[:, None, None])
        return joint.flatten(1).softmax(-1).reshape(-1, 2, 3)


class Linear(nn.Module):
    """z ~ N(0, 1), x | z ~ N(2 z, 1): the posterior is N(0.4 x, 0.2)."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(2 * z, 1.0).to_event(1))


class LinearGuide(nn.Module):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.Normal(0.4 * batch["x"], math.sqrt(0.2)).to_event(1))


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(ROWS, dtype=torch.float64)


def test_responsibilities_of_a_finite_mixture_are_exact(x):
    program = Mixture()
    torch.testing.assert_close(
        responsibilities(program, Nothing(), {"x": x}), program.exact(x).detach()
    )


def test_responsibilities_keep_known_labels_and_fall_back_to_the_prior(x):
    program = Mixture()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    known = torch.tensor([True, False, True, False, False, False, False])
    seen = torch.tensor([True, True, True, True, False, False, True])
    found = responsibilities(program, Nothing(), {"x": (x, seen), "y": (labels, known)})
    exact = program.exact(x).detach()
    prior = program.logits.softmax(0).detach()
    for row in range(ROWS):
        if known[row]:
            expected = torch.eye(K, dtype=torch.float64)[labels[row]]
        else:
            expected = exact[row] if seen[row] else prior
        torch.testing.assert_close(found[row], expected)


def test_marginals_of_a_chain_and_its_draws(x):
    program = Chain()
    exact = program.exact(x).detach()
    torch.testing.assert_close(responsibilities(program, Nothing(), {"x": x}), exact.sum(1))
    torch.testing.assert_close(responsibilities(program, Nothing(), {"x": x}, "a"), exact.sum(2))
    torch.manual_seed(1)
    draws = posterior(program, Nothing(), {"x": x}, 4000)
    joint = draws["a"] * 3 + draws["y"]
    share = torch.stack([(joint == k).double().mean(0) for k in range(6)], -1)
    error = (share - exact.flatten(1)).abs()
    assert error.max() < 5 * math.sqrt(0.25 / 4000)


def test_one_site_of_a_chain_may_be_known(x):
    program = Chain()
    a = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    exact = program.exact(x).detach()
    expected = torch.stack([exact[i, a[i]] / exact[i, a[i]].sum() for i in range(ROWS)])
    torch.testing.assert_close(responsibilities(program, Nothing(), {"x": x, "a": a}), expected)


def test_vade_responsibilities_are_those_at_the_draws():
    program = VaDE(WIDTH, K, 2, (4,)).double()
    guide = Amortized(program, ["x"], (4,), init_scale=1.1e-4).double()  # all but a point mass
    data = torch.rand(ROWS, WIDTH, dtype=torch.float64)
    z = guide.distribution("z", Batch.of({"x": data})).mean
    density = dist.Normal(program.loc, program.scale).to_event(1).log_prob(z[:, None])
    expected = (density + program.logits.log_softmax(0)).softmax(-1).detach()
    found = responsibilities(program, guide, {"x": data}, num_samples=8)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_guide_side_responsibilities_are_the_classifier():
    program = M2(WIDTH, K, 2, (4,)).double()
    classifier = Classifier(program, "y", ["x"], (4,))
    guide = Sequential(classifier, Amortized(program, ["x", "y"], (4,))).double()
    data = torch.rand(ROWS, WIDTH, dtype=torch.float64)
    expected = classifier.distribution(Batch.of({"x": data})).probs.detach()
    for samples in (1, 5):
        found = responsibilities(program, guide, {"x": data}, num_samples=samples)
        torch.testing.assert_close(found, expected)


def test_slices_do_not_matter(x):
    program = Chain()
    whole = responsibilities(program, Nothing(), {"x": x})
    torch.testing.assert_close(responsibilities(program, Nothing(), {"x": x}, batch_size=2), whole)


def test_draws_and_predictions_of_a_conjugate_model(x):
    torch.manual_seed(0)
    draws = posterior(Linear(), LinearGuide(), {"x": x[:, None]}, 20000, predictive=True)
    assert draws["z"].shape == (20000, ROWS, 1)
    torch.testing.assert_close(draws["z"].mean(0)[:, 0], 0.4 * x, atol=0.02, rtol=0)
    torch.testing.assert_close(
        draws["x"].var(0)[:, 0], torch.full_like(x, 4 * 0.2 + 1), atol=0.1, rtol=0
    )
    mean = predict(Linear(), LinearGuide(), {"x": x[:, None]}, "x", num_samples=20000)
    torch.testing.assert_close(mean[:, 0], 0.8 * x, atol=0.03, rtol=0)
    exact = predict(Linear(), LinearGuide(), {"x": x[:, None]}, "z", num_samples=1)
    torch.testing.assert_close(exact[:, 0], 0.4 * x)


def test_rows_without_anything_observed_are_drawn_from_the_prior():
    program = VaDE(WIDTH, K, 2, (4,))
    with torch.no_grad():
        program.raw_scale.fill_(-12.0)
    guide = Amortized(program, ["x"], (4,))
    y = torch.arange(K)
    draws = posterior(program, guide, {"y": y}, 4, predictive=True)
    assert draws["x"].shape == (4, K, WIDTH)
    assert (draws["z"] - program.loc.detach()[y]).abs().max() < 1e-2
    seen = torch.tensor([True, False, True])
    mixed = posterior(program, guide, {"y": y, "x": (torch.rand(K, WIDTH), seen)}, 4)
    away = (mixed["z"] - program.loc.detach()[y]).abs().amax((0, 2))
    assert away[1] < 1e-2
    assert away[0] > 1e-2


def test_keep_and_ignore():
    program = MVAE({"x_left": WIDTH, "x_right": 3}, 2, (4,))
    guide = ProductOfExperts(program, ["x_left", "x_right"], hidden=(4,))
    left, right = torch.rand(ROWS, WIDTH), torch.rand(ROWS, 3)

    def guess(data, **options):
        torch.manual_seed(0)
        return predict(program, guide, data, "x_right", **options)

    ignored = guess({"x_left": left, "x_right": right}, observed="ignore")
    torch.testing.assert_close(ignored, guess({"x_left": left}), rtol=0, atol=0)
    kept = guess({"x_left": left, "x_right": right})
    assert not torch.equal(kept, ignored)
    label_program = VaDE(WIDTH, K, 2, (4,))
    label_guide = Amortized(label_program, ["x"], (4,))
    y = torch.randint(0, K, (ROWS,))
    certain = predict(label_program, label_guide, {"x": left, "y": y}, "y")
    assert torch.equal(certain.argmax(1), y)
    assert certain.max() == 1
    asked = predict(label_program, label_guide, {"x": left, "y": y}, "y", observed="ignore")
    assert asked.max() < 1


def test_known_entries_of_an_inner_site_are_kept_in_draws():
    program = VaDE(WIDTH, K, 2, (4,))
    guide = Amortized(program, ["x"], (4,))
    y, known = torch.randint(0, K, (ROWS,)), torch.arange(ROWS) % 2 == 0
    draws = posterior(program, guide, {"x": torch.rand(ROWS, WIDTH), "y": (y, known)}, 9)
    assert torch.equal(draws["y"][:, known], y[known].expand(9, -1))


def test_nothing_is_changed(x):
    program = VaDE(WIDTH, K, 2, (4,))
    guide = Amortized(program, ["x"], (4,))
    before = [p.clone() for p in [*program.parameters(), *guide.parameters()]]
    guide.train()
    predict(program, guide, {"x": torch.rand(ROWS, WIDTH)}, "y")
    posterior(program, guide, {"x": torch.rand(ROWS, WIDTH)})
    assert guide.training
    after = [*program.parameters(), *guide.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, g, d: responsibilities(p, g, d, "cluster"), "'cluster' is not a site.*y, z, x"),
        (lambda p, g, d: responsibilities(p, g, d, "z"), "'z'.*not a finite site"),
        (lambda p, g, d: predict(p, g, d, "y", observed="maybe"), "'keep' or 'ignore'"),
        (lambda p, g, d: predict(p, g, d, "w"), "'w' is not a site"),
    ],
)
def test_wrong_questions(call, message):
    program = VaDE(WIDTH, K, 2, (4,))
    guide = Amortized(program, ["x"], (4,))
    with pytest.raises(ValueError, match=message):
        call(program, guide, {"x": torch.rand(ROWS, WIDTH)})


# ---- importance -------------------------------------------------------------------------------------


class _Wide(nn.Module):
    """A guide that ignores the data."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            zero = torch.zeros(2, dtype=torch.float64)
            pyro.sample("z", dist.Normal(zero, 1.3).to_event(1))


def test_importance_turns_a_wrong_guide_into_the_posterior():
    torch.manual_seed(0)
    program = FactorAnalysis().double()
    with torch.no_grad():
        program.log_scale.fill_(0.0)
    x = torch.randn(5, 5, dtype=torch.float64)
    known = torch.rand(5, 5) > 0.3
    known[0] = False
    weight, bias = program.linear.weight, program.linear.bias
    data, draws = {"x": (x, known)}, 40_000
    found = posterior(program, _Wide(), data, draws, predictive=True, importance=True, seed=0)
    mean = predict(program, _Wide(), data, "x", num_samples=draws, importance=True, seed=1)
    plain = posterior(program, _Wide(), data, draws, seed=0)["z"].mean(0)
    assert found["z"].shape == (draws, 5, 2)
    for i, k in enumerate(known):
        cov = torch.linalg.inv(torch.eye(2).double() + weight[k].T @ weight[k])
        exact = cov @ weight[k].T @ (x[i, k] - bias[k])
        close = {"atol": 0.05, "rtol": 0.0}
        torch.testing.assert_close(found["z"][:, i].mean(0), exact, **close)
        torch.testing.assert_close(found["z"][:, i].T.cov(), cov, **close)
        torch.testing.assert_close(found["x"][:, i].mean(0), weight @ exact + bias, **close)
        torch.testing.assert_close(mean[i], weight @ exact + bias, **close)
        if i:
            assert (plain[i] - exact).norm() > 0.1  # the guide alone is wrong


def test_importance_is_exact_for_summed_sites_and_refused_for_shared_ones():
    program, x = Mixture(), torch.tensor([-0.5, 0.3, 1.9], dtype=torch.float64)
    found = posterior(program, Nothing(), {"x": x}, 20_000, importance=True, seed=0)["y"]
    share = torch.stack([(found == k).double().mean(0) for k in range(3)], -1)
    torch.testing.assert_close(share, program.exact(x), atol=0.02, rtol=0)
    case = CASES["globals"]
    with pytest.raises(ValueError, match="'means' is shared by all rows"):
        posterior(*case.pair(), case.data(), 3, importance=True, inputs=["noise"])


def test_responsibilities_with_rows_left_of_another_plate():
    def views(batch):
        rows = pyro.plate("data", len(batch), dim=-2)
        with rows:
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])))
        with rows, pyro.plate("views", 2, dim=-1):
            pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[y], 1.0))

    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    log_joint = -(x.unsqueeze(-1) - torch.tensor([-1.0, 1.0])).square().sum(1) / 2
    exact = (log_joint + torch.tensor([0.3, 0.7]).log()).softmax(1)
    found = responsibilities(views, lambda batch: None, {"x": x})
    torch.testing.assert_close(found, exact)
