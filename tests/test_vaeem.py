"""VAE+EM: the stack of networks, the bound as a log-sum-exp, and the M-step's gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Replay, elbo
from test_gmvae import check_laws
from twins import kl_to_standard, log_bernoulli

from pyrozoo import zoo
from pyrozoo.guides import Amortized, Sequential
from pyrozoo.inference import Batch, metrics
from pyrozoo.zoo import baselines, datasets
from pyrozoo.zoo.clustering import VAEEM
from pyrozoo.zoo.clustering.vaeem import EStep, Stack, StackEncoder, start_kmeans

ROWS, K = 7, 3


def make(num_draws=1):
    program = VAEEM(6, K, 2, (8,), activation="tanh")
    encoder = StackEncoder(K, 6, (8,), 2, "tanh")
    step = EStep(program, encoder, num_draws)
    return program, Sequential(step, Amortized(program, ["x", "y"], network={"z": encoder}))


def layers(stack, k, x):
    """The network of cluster k, one layer after the other."""
    for i, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        x = torch.tanh(x) if i else x
        x = x @ weight[k] + bias[k]
    return x


def bound_of(program, encoder, k, x, noise):
    """log p(x | z, k) - KL(q(z | x, k) || p(z)) at one draw."""
    loc, raw_scale = layers(encoder.stack, k, x).chunk(2, -1)
    scale = F.softplus(raw_scale) + 1e-4
    logits = layers(program.decoders, k, loc + scale * noise)
    return log_bernoulli(x, logits) - kl_to_standard(loc, scale)


@pytest.mark.usefixtures("double")
def test_a_stack_runs_the_network_of_each_cluster():
    stack = Stack(K, 4, (5,), 2, "tanh")
    x, every = torch.randn(ROWS, 4), torch.arange(K).unsqueeze(1)
    right = torch.stack([layers(stack, k, x) for k in range(K)])
    torch.testing.assert_close(stack(x, every), right)
    order = torch.tensor([[2], [0], [1]])
    torch.testing.assert_close(stack(x, order), right[order[:, 0]])
    y = torch.randint(K, (ROWS,))
    torch.testing.assert_close(stack(x, y), right[y, torch.arange(ROWS)])
    both = torch.randint(K, (K, ROWS))
    torch.testing.assert_close(stack(x, both), right[both, torch.arange(ROWS)])
    draws = torch.randn(5, ROWS, 4)
    found = stack(draws, every.unsqueeze(1))
    assert found.shape == (K, 5, ROWS, 2)
    torch.testing.assert_close(found[1, 3], layers(stack, 1, draws[3]))
    torch.testing.assert_close(stack(torch.randn(K, 1, 4), order).shape, torch.Size([K, 1, 2]))


@pytest.mark.usefixtures("double")
def test_the_bound_is_a_log_sum_exp_and_its_gradient_the_m_step(monkeypatch):
    program, guide = make()
    noise = torch.randn(ROWS, 2)
    monkeypatch.setattr(EStep, "noise", lambda self, shape: noise.expand(*shape))
    data = {"x": torch.rand(ROWS, 6), "noise": noise}
    rows = elbo(inputs=("noise",)).per_row(program, Replay(guide), data)
    encoder = guide.parts[0].encoder
    each = [bound_of(program, encoder, k, data["x"], noise) for k in range(K)]
    joint = torch.stack(each, 1) - math.log(K)
    right = joint.logsumexp(1)
    torch.testing.assert_close(rows, right, rtol=1e-10, atol=1e-12)
    q = guide.parts[0].bounds(Batch.of(data)).softmax(1)
    torch.testing.assert_close(q, joint.softmax(1), rtol=1e-10, atol=1e-12)
    parameters = [*program.parameters(), *encoder.parameters()]
    found, expected = (torch.autograd.grad(v.sum(), parameters) for v in (rows, right))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("num_draws", [0, 1, 4])
def test_other_noise_of_the_e_step_is_no_more_than_the_log_sum_exp(num_draws):
    program, guide = make(num_draws)
    data = {"x": torch.rand(ROWS, 6), "noise": torch.randn(ROWS, 2)}
    rows = elbo(inputs=("noise",)).per_row(program, Replay(guide), data)
    encoder = guide.parts[0].encoder
    each = [bound_of(program, encoder, k, data["x"], data["noise"]) for k in range(K)]
    assert (rows <= (torch.stack(each, 1) - math.log(K)).logsumexp(1) + 1e-12).all()


@pytest.mark.usefixtures("double")
def test_a_known_row_trains_the_networks_of_its_cluster_alone():
    program, guide = make()
    data = {"x": torch.rand(ROWS, 6), "y": torch.full((ROWS,), 1)}
    elbo().differentiable_loss(program, guide, data).backward()
    for parameter in [*program.parameters(), *guide.parts[0].encoder.parameters()]:
        assert parameter.grad[1].any()
        assert not parameter.grad[[0, 2]].any()


@pytest.mark.usefixtures("double")
def test_missing_pixels_are_left_out_of_the_e_step():
    program, guide = make(0)
    x, known = torch.rand(ROWS, 6), torch.rand(ROWS, 6) < 0.5
    known[0] = False
    data = Batch.of({"x": (x, known)})
    found = guide.parts[0].bounds(data)
    assert not found[0].any()
    clean = torch.where(known, x, 0.0)
    loc, raw_scale = layers(guide.parts[0].encoder.stack, 2, clean).chunk(2, -1)
    logits = layers(program.decoders, 2, loc)
    density = -F.binary_cross_entropy_with_logits(logits, x, reduction="none") * known
    right = density.sum(1) - kl_to_standard(loc, F.softplus(raw_scale) + 1e-4)
    torch.testing.assert_close(found[1:, 2], right[1:])
    elbo().differentiable_loss(program, guide, data).backward()


@pytest.mark.usefixtures("double")
def test_laws(monkeypatch):
    check_laws(monkeypatch, Case("vae_em", lambda: make(0), {"x": 6, "y": 0}, {"y": K}))


def test_the_start_keeps_labels_and_names_clusters_by_them():
    torch.manual_seed(0)
    centre = torch.eye(3, 6)[torch.arange(30) % 3]
    labels = (torch.arange(30) + 1) % 3  # named in another order than k-means would
    known = torch.arange(30) < 6
    data = Batch.of({"x": (centre + 0.02 * torch.randn(30, 6)).clamp(0, 1), "y": (labels, known)})
    program = VAEEM(6, K, 2, (8,))
    encoder = StackEncoder(K, 6, (8,), 2)
    parts = [EStep(program, encoder), Amortized(program, ["x", "y"], network={"z": encoder})]
    guide = Sequential(*parts)
    start_kmeans(program, guide, data, epochs=20, batch_size=10, lr=2e-2)
    found = guide.parts[0].bounds(data.drop("y")).argmax(1)
    assert torch.equal(found, labels)
    with pytest.raises(ValueError, match="num_draws is zero or more, got -1"):
        EStep(program, encoder, -1)


def test_beats_k_means_on_digits():
    """Law: every entry clears a rival that is computed in the same test."""
    digits = datasets.load("digits", split="all")
    data = {"x": digits.x}
    model = zoo.create("vae_em", data, hidden=(64,), latent_dim=4, likelihood="normal(0.2)")
    start = {"epochs": 20, "lr": 3e-3}
    result = model.fit(data, epochs=40, lr=3e-3, progress=False, start=start)
    found = result.responsibilities(data, seed=0)
    rival = baselines.kmeans(digits.x, 10, 0).argmax(1)
    accuracy = metrics.hungarian_accuracy(digits.y, found.argmax(1))
    assert accuracy > metrics.hungarian_accuracy(digits.y, rival) + 0.02
