"""Four treatments of VaDE's cluster: summed, geometric, arithmetic, a network; and their order."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from pyrozoo import zoo
from pyrozoo.guides import Amortized, Classifier, Mean, MixturePosterior, Sequential
from pyrozoo.inference import Batch, EnumELBO, fit, metrics, responsibilities
from pyrozoo.inference.staging.staged import Staged
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.multimodal import MVAE

K = 3


# ---- by hand, for log pi (K), components (K, D), q(z | x) (rows, D) and points z (n, rows, D) --------


def nodes(q, count=40):
    """Points and log weights of a quadrature under a factorised normal, ``(n, rows, D)``."""
    x, w = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(count))
    dim = q.loc.shape[-1]
    grid = torch.cartesian_prod(*[x] * dim).reshape(-1, 1, dim)
    logs = torch.cartesian_prod(*[(w / w.sum()).log()] * dim).reshape(-1, dim).sum(-1)
    return q.loc + q.scale * grid, logs


def densities(log_pi, components, z):
    return log_pi + components.log_prob(z.unsqueeze(-2)).sum(-1)


def expected(log_pi, components, q):
    """log pi + E_q log p(z | y), ``(rows, K)``."""
    square = ((q.loc.unsqueeze(-2) - components.loc) ** 2 + q.scale.unsqueeze(-2) ** 2).div(
        components.scale**2
    )
    constant = components.scale.log() + 0.5 * np.log(2 * np.pi)
    return log_pi - (constant + square / 2).sum(-1)


def given(share, mean):
    """E_share[mean - log share]."""
    return (share * mean - torch.special.xlogy(share, share)).sum(-1)


def exact(log_pi, components, q, z, logs):
    return (logs.exp().unsqueeze(-1) * densities(log_pi, components, z).logsumexp(-1)).sum(0)


def geometric(log_pi, components, q, z, logs):
    return expected(log_pi, components, q).logsumexp(-1)


def arithmetic(log_pi, components, q, z, logs):
    share = densities(log_pi, components, z).softmax(-1)
    return given((logs.exp().reshape(-1, 1, 1) * share).sum(0), expected(log_pi, components, q))


def hybrid(log_pi, components, q, z, logs):
    """VaDE's released loss without the slip in its mixing weights: p(y | z) at one draw, the rest in
    closed form."""
    share = densities(log_pi, components, z).softmax(-1)
    return (logs.exp().unsqueeze(-1) * given(share, expected(log_pi, components, q))).sum(0)


ORDER = [hybrid, arithmetic, geometric, exact]


def make(seed=0, dim=2, covariance="diag", spread=1.5):
    torch.manual_seed(seed)
    program = VaDE(6, K, dim, (4,), covariance=covariance).double()
    with torch.no_grad():
        program.logits.normal_()
        program.loc.mul_(spread)
        program.raw_scale.add_(torch.randn_like(program.raw_scale))
        if program.raw_lower is not None:
            program.raw_lower.normal_()
    return program, Amortized(program, ["x"], (4,)).double(), {"x": torch.rand(9, 6)}


def parts(program, encoder, data):
    q = encoder.distribution("z", Batch.of(data)).base_dist
    return program.logits.log_softmax(-1), Normal(program.loc, program.scale), q


def mixture_terms(program, guide, data, num_particles=1, **options):
    """What y and z add to the bound of every row."""
    terms = EnumELBO(num_particles, **options).terms(program, guide, data)
    return sum(value for name, value in terms.items() if name != "x")


pytestmark = pytest.mark.usefixtures("double")


# ---- the order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
def test_hybrid_arithmetic_geometric_exact(dim):
    gaps = []
    for _ in range(20):
        log_pi = torch.randn(5).log_softmax(-1)
        components = Normal(2 * torch.randn(5, dim), torch.rand(5, dim) + 0.4)
        q = Normal(torch.randn(8, dim), torch.rand(8, dim) + 0.1)
        values = [bound(log_pi, components, q, *nodes(q)) for bound in ORDER]
        gaps.append(torch.stack([b - a for a, b in pairwise(values)]))
    gaps = torch.stack(gaps)  # cases, 3, rows
    assert (gaps > -1e-6).all()  # what the quadrature errs
    assert (gaps.mean((0, 2)) > 1e-3).all()


def test_the_guides_are_in_this_order():
    for seed in range(5):
        program, encoder, data = make(seed)
        n = 2000
        torch.manual_seed(seed)
        summed = EnumELBO(n, kl="sampled").trace(
            *(pair := EnumELBO().pair(program, encoder)), pair[0].pairing.prepare(data)
        )
        own = summed.by_row()
        top = torch.stack([v for k, v in own.items() if k != "x"]).sum(0).detach()
        error = top.std(0) / n**0.5
        middle = mixture_terms(program, MixturePosterior(program, encoder), data).detach()
        arith = MixturePosterior(program, encoder, kind="arithmetic", num_draws=4000)
        low = mixture_terms(program, arith, data).detach()
        assert (top.mean(0) - middle > -4 * error).all()
        assert (middle - low > -1e-9).all()  # whatever was drawn: geometric is the optimum


# ---- each of them -----------------------------------------------------------------------------------


def test_exact_is_a_logsumexp_at_every_draw():
    program, encoder, data = make()
    log_pi, components, q = parts(program, encoder, data)
    torch.manual_seed(1)
    found = mixture_terms(program, encoder, data, kl="sampled")
    torch.manual_seed(1)
    z = q.rsample()
    by_hand = densities(log_pi, components, z).logsumexp(-1) - q.log_prob(z).sum(-1)
    torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-12)


def test_geometric_is_its_closed_form_and_its_gradient_is_not_missed():
    program, encoder, data = make()
    guide = MixturePosterior(program, encoder)
    assert any("KL in closed form" in x for x in EnumELBO().explain(program, guide, data))
    log_pi, components, q = parts(program, encoder, data)
    by_hand = geometric(log_pi, components, q, None, None) + q.entropy().sum(-1)
    found = mixture_terms(program, guide, data)
    torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-12)
    inputs = [program.logits, program.loc, program.raw_scale, *encoder.parameters()]
    whole = torch.autograd.grad(by_hand.sum(), inputs)  # through q(y | x)
    held = torch.autograd.grad(found.sum(), inputs)  # q(y | x) is held fixed
    torch.testing.assert_close(held, whole, rtol=1e-9, atol=1e-11)


def test_arithmetic_is_the_mean_of_responsibilities_with_gradients():
    program, encoder, data = make()
    guide = MixturePosterior(program, encoder, kind="arithmetic", num_draws=20000)
    log_pi, components, q = parts(program, encoder, data)
    z, logs = nodes(q)
    share = (logs.exp().reshape(-1, 1, 1) * densities(log_pi, components, z).softmax(-1)).sum(0)
    fn = guide.distribution(Batch.of(data), encoder.distribution("z", Batch.of(data)), {})
    torch.testing.assert_close(fn.probs, share, rtol=0, atol=4 * 0.5 / 20000**0.5)
    assert fn.logits.requires_grad
    by_hand = arithmetic(log_pi, components, q, z, logs) + q.entropy().sum(-1)
    torch.testing.assert_close(mixture_terms(program, guide, data), by_hand, rtol=0.03, atol=0)


def test_nearest_is_the_largest_of_the_geometric():
    program, encoder, data = make()
    fns = [
        MixturePosterior(program, encoder, kind=kind).distribution(
            Batch.of(data), encoder.distribution("z", Batch.of(data)), {}
        )
        for kind in ("geometric", "nearest")
    ]
    assert torch.equal(fns[0].probs.argmax(-1), fns[1].probs.argmax(-1))
    torch.testing.assert_close(fns[1].probs.max(-1).values, torch.ones(9), rtol=0, atol=1e-12)


def test_at_a_point_geometric_is_the_posterior():
    program, encoder, data = make()
    guide = Mean(MixturePosterior(program, encoder))
    log_pi, components, q = parts(program, encoder, data)
    share = densities(log_pi, components, q.loc).softmax(-1)
    torch.testing.assert_close(responsibilities(program, guide, data), share)
    torch.testing.assert_close(responsibilities(program, Mean(encoder), data), share)


def test_geometric_with_full_covariances():
    program, encoder, data = make(covariance="full")
    batch = Batch.of(data)
    q = encoder.distribution("z", batch)
    found = MixturePosterior(program, encoder).distribution(batch, q, {}).probs
    component = program.component(torch.arange(K))
    spread = component.precision_matrix.diagonal(dim1=-2, dim2=-1)  # of the trace, q is diagonal
    trace = (q.variance.unsqueeze(-2) * spread).sum(-1)
    mean = program.logits + component.log_prob(q.mean.unsqueeze(-2)) - trace / 2
    torch.testing.assert_close(found, mean.softmax(-1).detach(), rtol=1e-10, atol=1e-12)


# ---- as any other guide -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["geometric", "arithmetic"])
def test_labels_in_part_and_particles(kind):
    program, encoder, data = make()
    guide = MixturePosterior(program, encoder, kind=kind, num_draws=3)
    label = torch.arange(9) % K
    known = torch.arange(9) < 4
    torch.manual_seed(0)
    some = EnumELBO(4).per_row(program, guide, {**data, "y": (label, known)})
    torch.manual_seed(0)
    whole = EnumELBO(4).per_row(program, guide, {**data, "y": label})
    torch.testing.assert_close(some[known], whole[known], rtol=1e-10, atol=1e-12)
    share = responsibilities(program, guide, {**data, "y": (label, known)})
    assert torch.equal(share[known].argmax(-1), label[known])
    result = fit(program, guide, {**data, "y": (label, known)}, epochs=2, progress=False)
    assert torch.isfinite(torch.tensor(result.history[-1]["loss"]))


def test_the_program_is_held_and_not_owned():
    program, encoder, _ = make()
    guide = MixturePosterior(program, encoder)
    assert [id(x) for x in guide.parameters()] == [id(x) for x in encoder.parameters()]


@pytest.mark.parametrize("kind", ["geometric", "arithmetic", "nearest"])
def test_staged_equals_eager(kind):
    program, encoder, data = make()
    guide = MixturePosterior(program, encoder, kind=kind, num_draws=3)
    objective = EnumELBO()
    staged = Staged(objective, program, guide, compile=False)
    torch.manual_seed(3)
    loss = staged(data)
    assert staged.how == "graph"
    grads = [None if x.grad is None else x.grad.clone() for x in program.parameters()]
    torch.manual_seed(3)
    eager = objective.differentiable_loss(program, guide, data)
    torch.testing.assert_close(loss, eager.detach(), rtol=1e-12, atol=0)
    again = torch.autograd.grad(eager, list(program.parameters()), allow_unused=True)
    torch.testing.assert_close(grads, list(again), rtol=1e-10, atol=1e-12)


def test_what_does_not_fit_is_named():
    program, encoder, data = make()
    with pytest.raises(ValueError, match="kind is one of geometric, arithmetic, nearest, got 'a'"):
        MixturePosterior(program, encoder, kind="a")
    with pytest.raises(ValueError, match="num_draws is at least 1, got 0"):
        MixturePosterior(program, encoder, num_draws=0)
    with pytest.raises(ValueError, match="'z' is expected to be Categorical, not Independent"):
        MixturePosterior(program, encoder, site="z")
    with pytest.raises(ValueError, match="'x' is expected to depend on 'y', but does not"):
        MixturePosterior(program, encoder, latent="x")
    other = MVAE({"x_a": 6, "x_b": 4}, 3, (8,))
    with pytest.raises(ValueError, match="'y' is not a site of the program"):
        MixturePosterior(other, encoder)
    lonely = MixturePosterior(program, Classifier(program, "y", ["x"], (4,)))
    with pytest.raises(ValueError, match="the guide does not propose 'z'"):
        lonely(Batch.of(data))


# ---- the catalogue's option -------------------------------------------------------------------------


@pytest.fixture
def single():
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("cluster", ["exact", "geometric", "arithmetic", "network"])
def test_vade_with_each_treatment_finds_what_is_apart(cluster, single):
    label = torch.arange(90) % K
    centre = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.1, 0.9, 0.9, 0.1], [0.1, 0.1, 0.9, 0.9]])
    data = {"x": (centre[label] + 0.05 * torch.randn(90, 4)).clamp(0, 1)}
    options = {"hidden": (16,), "latent_dim": 2, "num_clusters": K, "cluster": cluster}
    model = zoo.create("vade", data, **options)
    start = {"epochs": 60, "lr": 2e-2, "num_starts": 1}
    result = model.fit(data, epochs=5, progress=False, start=start)
    line = "y: summed over 3" if cluster == "exact" else "y: proposed by the guide, summed over 3"
    assert result.sites[0].startswith(line)
    found = result.responsibilities(data, seed=0)
    assert metrics.hungarian_accuracy(label, found.argmax(1)) > 0.95
    assert found.max(1).values.mean() > 0.8


def test_unknown_treatments_are_named():
    with pytest.raises(ValueError, match="'arithmetic' or 'network', got 'hybrid'"):
        zoo.create("vade", {"x": torch.rand(4, 3)}, hidden=(4,), cluster="hybrid")


def test_the_network_learns_from_labels(single):
    x, y = torch.rand(8, 3), torch.arange(8) % 2
    data = {"x": x, "y": (y, torch.arange(8) < 4)}
    model = zoo.create("vade", data, num_clusters=2, hidden=(4,), cluster="network")
    assert (
        model.objective.observed_guide_weights["y"]
        == 2.0 / model.settings.get("repeat", {"y": 1})["y"]
    )
    assert isinstance(model.guide, Sequential)
    assert isinstance(model.guide.parts[0], Classifier)
