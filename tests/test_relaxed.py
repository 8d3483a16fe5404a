"""Finite sites drawn in place of summed: gradients against those of the exact sum."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrozoo.guides.amortized import Classifier
from pyrozoo.guides.relaxed import Relaxed, Sampled, StraightThrough
from pyrozoo.inference import EnumELBO
from pyrozoo.zoo.semisupervised import M2

pytestmark = pytest.mark.usefixtures("double")

K, ROWS = 3, 2


class OneHot(nn.Module):
    """y one-hot, x normal around a location for each class."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(1.5 * torch.randn(K, 2))
        self.logits = nn.Parameter(torch.randn(K))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.logits))
            pyro.sample("x", dist.Normal(y @ self.loc, 1.0).to_event(1))


class Summed(nn.Module):
    """The same proposal as another guide's, enumerated."""

    def __init__(self, guide):
        super().__init__()
        self.guide = guide

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            logits = self.guide.distribution(batch).logits
            pyro.sample("y", dist.OneHotCategorical(logits=logits))


def gradients(objective, program, guide, data, parameter, draws):
    losses, grads = [], []
    for _ in range(draws):
        loss = objective.differentiable_loss(program, guide, data)
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, parameter)[0].flatten())
    return torch.stack(losses), torch.stack(grads)


@pytest.mark.filterwarnings("ignore:falling back")
def test_values_are_unbiased_and_only_the_score_functions_gradient_is():
    program, data = OneHot(), {"x": 2 * torch.randn(ROWS, 2)}
    relaxed = Relaxed(program, "y", ["x"], 0.5, (4,))
    exact = Summed(relaxed)
    parameter = relaxed.network.rest[-1].bias
    right, gradient = gradients(EnumELBO(), program, exact, data, parameter, 2)
    torch.testing.assert_close(gradient[0], gradient[1])  # no noise at all
    many = {"relaxed": (EnumELBO(2000), relaxed), "sampled": (EnumELBO(2000), Sampled(exact))}
    for name, (objective, guide) in many.items():
        losses, grads = gradients(objective, program, guide, data, parameter, 40)
        spread = losses.std() / 40**0.5
        assert (losses.mean() - right[0]).abs() < 4 * spread + 1e-3
        error = (grads.mean(0) - gradient[0]).abs()
        sure = 4 * grads.std(0) / 40**0.5
        assert (grads.std(0) > 1e-4).all()
        if name == "sampled":
            assert (error < sure).all()
        else:
            assert (error > 2 * sure).any()  # straight-through is biased
            assert nn.functional.cosine_similarity(grads.mean(0), gradient[0], dim=0) > 0.5


def test_draws_are_exact_and_the_density_is_linear():
    logits = torch.randn(4, K)
    fn = StraightThrough(0.5, logits)
    draws = fn.rsample(torch.Size([20_000]))
    assert ((draws == 0) | (draws == 1)).all()
    torch.testing.assert_close(draws.mean(0), logits.softmax(-1), rtol=0, atol=0.02)
    torch.testing.assert_close(
        fn.log_prob(draws), dist.OneHotCategorical(logits=logits).log_prob(draws)
    )
    assert fn.expand((5, 4)).rsample().shape == (5, 4, K)


@pytest.mark.filterwarnings("ignore:falling back")
def test_some_sites_or_all():
    program = M2(5, K, 2, (4,))
    with pytest.raises(ValueError, match="'y' is Categorical: the program reads it as a number"):
        Relaxed(program, "y", ["x"])
    with pytest.raises(ValueError, match="'z' is OneHotCategorical, not Independent"):
        Relaxed(program, "z", ["x"])
    with pytest.raises(ValueError, match="temperature is positive"):
        Relaxed(program, "y", ["x"], 0.0)
    from pyrozoo.guides.amortized import Amortized, Sequential

    parts = Classifier(program, "y", ["x"], (4,)), Amortized(program, ["x", "y"], (4,))
    guide, data = Sequential(*parts), {"x": torch.rand(ROWS, 5)}
    exact = torch.stack([EnumELBO(500).differentiable_loss(program, guide, data) for _ in range(4)])
    drawn = EnumELBO(2000)
    found = torch.stack(
        [drawn.differentiable_loss(program, Sampled(guide, ["y"]), data) for _ in range(4)]
    )
    torch.testing.assert_close(found.mean(), exact.mean(), rtol=0, atol=0.1)
    untouched = EnumELBO(500).differentiable_loss(program, Sampled(guide, ["other"]), data)
    torch.testing.assert_close(untouched, exact.mean(), rtol=0, atol=0.1)
