"""The two GMVAEs: their bounds written by hand, and that x is decoded once a row."""

import math

import pytest
import test_laws as laws
import torch
import torch.nn.functional as F
from cases import Case, Replay, elbo
from twins import encode, kl_to_standard, log_bernoulli, log_normal

from pyrozoo import zoo
from pyrozoo.guides import Amortized, Classifier, Sequential
from pyrozoo.inference import Batch, metrics
from pyrozoo.zoo import datasets
from pyrozoo.zoo.clustering import GMVAE, VaDE

ROWS, K = 7, 3


def check_laws(monkeypatch, case):
    """The laws of test_laws for a case that is not among theirs."""
    monkeypatch.setitem(laws.CASES, case.name, case)
    laws.test_prior_samples_have_the_declared_shapes(case.name, 4)
    laws.test_every_parameter_gets_a_finite_gradient(case.name)
    laws.test_absent_none_and_all_missing_are_the_same(case.name)
    laws.test_rows_of_which_nothing_is_known_add_nothing(case.name)
    for split in (False, "auto"):
        laws.test_fully_labelled_through_the_partial_path(case.name, split)
    for pattern, _ in case.patterns():
        laws.test_rows_are_exchangeable_and_independent(case.name, pattern, False)
        laws.test_minibatches_average_to_the_full_batch(case.name, pattern)
        if "some" in pattern:
            laws.test_fillers_change_no_bit(case.name, pattern, "auto")


def make(cluster="exact"):
    """A GMVAE of x_dim 6, its guide with replayed noise, and a batch with that noise."""
    program = GMVAE(6, K, 2, 3, (8,), (4,))
    guide = Amortized(program, ["x"], (8,), structure="independent")
    if cluster == "network":
        guide = Sequential(Classifier(program, "y", ["x"], (8,)), guide)
    data = {"x": torch.rand(ROWS, 6), "noise": torch.randn(ROWS, 5)}
    return program, Replay(guide), data


def count_rows(network, found):
    """Append to ``found`` how many rows each run of a network with one input takes."""
    network.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][..., 0].numel()))


def by_hand(program, guide, data, closed):
    """log p(z | w, k) of all clusters, ``(rows, K)``, everything else, and KLs at z ``(rows, K)``."""
    networks = guide.networks
    x, noise_w, noise_z = data["x"], data["noise"][:, :3], data["noise"][:, 3:]
    (loc_w, scale_w), (loc_z, scale_z) = (encode(networks[n], x) for n in ("w", "z"))
    w, z = loc_w + scale_w * noise_w, loc_z + scale_z * noise_z
    net = program.components
    h = torch.tanh(w @ net.first.weight.T + net.first.bias)
    density, divergence = [], []
    for k in range(K):
        part = slice(4 * k, 4 * k + 4)  # location and raw scale of two latent dimensions
        out = h @ net.rest[-1].weight[part].T + net.rest[-1].bias[part]
        loc, scale = out[:, :2], F.softplus(out[:, 2:]) + 1e-4
        density.append(log_normal(z, loc, scale))
        ratio = (scale_z / scale) ** 2
        terms = ratio + ((loc_z - loc) / scale) ** 2 - 1 - ratio.log()
        divergence.append(0.5 * terms.sum(-1))
    zero = torch.zeros_like(w)
    kl_w = log_normal(w, loc_w, scale_w) - log_normal(w, zero, zero + 1)
    kl_w = kl_to_standard(loc_w, scale_w) if closed else kl_w
    rest = log_bernoulli(x, program.decoder.mlp(z)) - kl_w
    log_q = log_normal(z, loc_z, scale_z)
    return torch.stack(density, 1), rest, log_q, torch.stack(divergence, 1)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kl", ["closed", "sampled"])
def test_the_exact_sum_by_hand(kl):
    program, replay, data = make()
    decoded = []
    count_rows(program.decoder.mlp, decoded)
    rows = elbo(kl=kl, inputs=("noise",)).per_row(program, replay, data)
    assert set(decoded[-1:]) == {ROWS}
    density, rest, log_q, _ = by_hand(program, replay.guide, data, kl == "closed")
    right = (density - math.log(K)).logsumexp(1) - log_q + rest
    torch.testing.assert_close(rows, right, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kl", ["closed", "sampled"])
def test_the_network_over_clusters_by_hand_and_below_the_exact_sum(kl):
    program, replay, data = make("network")
    decoded = []
    count_rows(program.decoder.mlp, decoded)
    rows = elbo(kl=kl, inputs=("noise",)).per_row(program, replay, data)
    assert decoded[-1] == ROWS
    classifier, encoders = replay.guide.parts
    density, rest, log_q, divergence = by_hand(program, encoders, data, kl == "closed")
    log_r = classifier.network.mlp(data["x"]).log_softmax(-1)
    term = -divergence if kl == "closed" else density - log_q.unsqueeze(1)
    right = (log_r.exp() * (term - math.log(K) - log_r)).sum(1) + rest
    torch.testing.assert_close(rows, right, rtol=1e-10, atol=1e-12)
    if kl == "sampled":
        alone = Replay(encoders)
        exact = elbo(kl=kl, inputs=("noise",)).per_row(program, alone, data)
        assert (exact >= rows - 1e-12).all()


@pytest.mark.usefixtures("double")
def test_a_known_cluster_picks_its_component():
    program, replay, data = make()
    y = torch.arange(ROWS) % K
    rows = elbo(kl="sampled", inputs=("noise",)).per_row(program, replay, {**data, "y": y})
    density, rest, log_q, _ = by_hand(program, replay.guide, data, False)
    right = density.gather(1, y.unsqueeze(1)).squeeze(1) - math.log(K) - log_q + rest
    torch.testing.assert_close(rows, right, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_two_levels_by_hand():
    """Rui Shu's: sum_k q(k|x) [log p(x|z_k) - KL(q(z|x,k) || p(z|k)) - log q(k|x) / p(k)]."""
    data = {"x": torch.rand(ROWS, 6), "noise": torch.randn(ROWS, 2)}
    model = zoo.create("gmvae_two_level", data, num_clusters=K, latent_dim=2, hidden=(8,))
    program, guide = model.program.double(), model.guide.double()
    assert type(program) is VaDE
    rows = elbo(inputs=("noise",)).per_row(program, Replay(guide), data)
    log_r = guide.parts[0].network.mlp(data["x"]).log_softmax(-1)
    prior = program.logits.log_softmax(-1)
    right = 0.0
    for k in range(K):
        y = torch.eye(K)[k].expand(ROWS, K)
        loc, scale = encode(guide.parts[1].networks["z"], data["x"], y)
        z = loc + scale * data["noise"]
        ratio = (scale / program.scale[k]) ** 2
        shift = ((loc - program.loc[k]) / program.scale[k]) ** 2
        divergence = 0.5 * (ratio + shift - 1 - ratio.log()).sum(-1)
        bound = log_bernoulli(data["x"], program.decoder.mlp(z)) - divergence
        right = right + log_r[:, k].exp() * (prior[k] + bound - log_r[:, k])
    torch.testing.assert_close(rows, right, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("cluster", ["exact", "network"])
def test_laws(monkeypatch, cluster):
    def pair():
        program, replay, _ = make(cluster)
        return program, replay.guide

    check_laws(monkeypatch, Case(f"gmvae, {cluster}", pair, {"x": 6, "y": 0}, {"y": K}))


def test_particles_and_responsibilities():
    program, replay, data = make()
    data = Batch.of({"x": data["x"]})
    rows = elbo(5).per_row(program, replay.guide, data)
    assert rows.shape == (ROWS,)
    model = zoo.create("gmvae", data, num_clusters=K, latent_dim=2, noise_dim=2, hidden=(8,))
    result = model.fit(data, epochs=1, progress=False)
    found = result.responsibilities({"x": data["x"]})
    torch.testing.assert_close(found.sum(1), torch.ones(ROWS))
    with pytest.raises(ValueError, match="'exact' or 'network', got 'both'"):
        zoo.create("gmvae", data, cluster="both")


@pytest.mark.parametrize("name", ["gmvae", "gmvae_two_level"])
def test_beats_the_majority_class_on_digits(name):
    """Law: every entry clears a rival that is computed in the same test."""
    digits = datasets.load("digits", split="test")
    data = {"x": digits.x}
    options = {"hidden": (64,), "latent_dim": 10, "likelihood": "normal(0.2)"}
    model = zoo.create(name, data, **options)
    result = model.fit(data, epochs=20, batch_size=30, lr=4e-3, progress=False)
    found = result.responsibilities(data, seed=0).argmax(1)
    majority = digits.y.bincount().max().item() / len(digits.y)
    print(name, metrics.hungarian_accuracy(digits.y, found))
    assert metrics.hungarian_accuracy(digits.y, found) > 2.5 * majority
