"""Evidence against exact answers: closed forms, enumeration and quadrature; and how it is computed."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from cases import CASES, ROWS, Empty, FactorAnalysis, Mixture
from torch import nn

from pyrozoo.guides import Amortized, Classifier, Mean, Sequential
from pyrozoo.inference import (
    Batch,
    EnumELBO,
    Result,
    evidence,
    log_evidence,
    posterior,
    predict,
    responsibilities,
)
from pyrozoo.inference.comparison.importance import importance_weights, joint_log_weights
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.semisupervised import M2

WIDE = [name for name, case in CASES.items() if not case.globals]


class Exact(nn.Module):
    """The posterior of a factor analysis, its standard deviations times ``stretch``."""

    def __init__(self, program, stretch=1.0):
        super().__init__()
        self.program, self.stretch = (program,), stretch

    def forward(self, batch):
        p = self.program[0]
        weight, x = p.linear.weight, batch["x"] - p.linear.bias
        present = batch.present("x")
        present = present if present.dim() == 2 else present.unsqueeze(1).expand_as(x)
        precision = present * (-2 * p.log_scale).exp()
        gram = torch.eye(2).double() + (weight.T * precision.unsqueeze(1)) @ weight
        cov = gram.inverse()
        loc = (cov @ ((precision * x) @ weight).unsqueeze(-1)).squeeze(-1)
        scale = self.stretch * torch.linalg.cholesky(cov)
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale))


class Prior(nn.Module):
    """Proposes z from its prior, but wider."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            zero = torch.zeros(2, dtype=torch.float64)
            pyro.sample("z", dist.Normal(zero, 1.3).to_event(1))


def factor_analysis(seed=0):
    torch.manual_seed(seed)
    return FactorAnalysis().double()


def grid(per_row, width=9.0, steps=181):
    """log of the integral of ``exp(per_row(z))`` over the plane, ``(rows,)``."""
    axis = torch.linspace(-width, width, steps, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis).unsqueeze(1)  # (steps^2, 1, 2)
    return per_row(z).logsumexp(0) + 2 * math.log(axis[1] - axis[0])


def small_vade():
    torch.manual_seed(1)
    program = VaDE(4, 3, 2, (6,))
    guide = Amortized(program, ["x"], (6,), init_scale=1.4)
    with torch.no_grad():
        program.loc.mul_(1.5)
        program.logits.copy_(torch.tensor([0.5, -0.3, 0.1]))
    return program.double(), guide.double(), torch.rand(5, 4, dtype=torch.float64)


def vade_by_class(program, x):
    """log p(x, y) of every class, ``(rows, K)``."""

    def joint(z, k):
        density = program.decoder(z).log_prob(x)
        return density + dist.Normal(program.loc[k], program.scale[k]).to_event(1).log_prob(z)

    parts = [grid(lambda z, k=k: joint(z, k)) for k in range(3)]
    return (torch.stack(parts, -1) + program.logits.log_softmax(-1)).detach()


def small_m2(biased=0.0):
    torch.manual_seed(2)
    program = M2(4, 3, 2, (6,))
    parts = [
        Classifier(program, "y", ["x"], (6,)),
        Amortized(program, ["x", "y"], (6,), "relu", 1.2),
    ]
    with torch.no_grad():
        parts[0].network.mlp.rest[-1].bias[0] += biased
    return program.double(), Sequential(*parts).double(), torch.rand(5, 4, dtype=torch.float64)


def m2_by_class(program, x):
    prior = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)

    def joint(z, k):
        label = torch.eye(3).double()[k]
        return program.decoder(z, label).log_prob(x) + prior.log_prob(z)

    parts = [grid(lambda z, k=k: joint(z, k), 7.0) for k in range(3)]
    return (torch.stack(parts, -1) - math.log(3)).detach()


def close(found, exact, tolerance=0.03):
    torch.testing.assert_close(found, exact, rtol=0, atol=tolerance)


# ---- exact answers ----------------------------------------------------------------------------------


def entries(x):
    torch.manual_seed(5)
    mask = torch.rand(x.shape) < 0.6
    mask[0], mask[1] = False, True
    return mask


@pytest.mark.parametrize("missing", ["none", "entries", "rows"])
def test_with_the_exact_posterior_one_draw_is_the_evidence(missing):
    program, x = factor_analysis(), torch.randn(6, 5, dtype=torch.float64)
    rows = torch.arange(6) > 0
    data = {"none": {"x": x}, "entries": {"x": (x, entries(x))}, "rows": {"x": (x, rows)}}[missing]
    batch = Batch.of(data)
    found = log_evidence(program, Exact(program), batch, 1)
    torch.testing.assert_close(found, program.evidence(batch).detach())
    found = log_evidence(program, Exact(program), batch, 9, chunk_size=4)
    torch.testing.assert_close(found, program.evidence(batch).detach())


@pytest.mark.parametrize("missing", [False, True])
def test_factor_analysis_with_a_poor_guide(missing):
    program, x = factor_analysis(), torch.randn(6, 5, dtype=torch.float64)
    batch = Batch.of({"x": (x, entries(x)) if missing else x})
    close(log_evidence(program, Prior(), batch, 20_000), program.evidence(batch).detach(), 0.05)
    found = log_evidence(program, Exact(program, 1.4), batch, 4000)
    close(found, program.evidence(batch).detach())


def test_a_finite_mixture_is_exact_whatever_is_known():
    program, data = Mixture().double(), CASES["mixture"]
    for _, values in data.patterns():
        batch = Batch.of({n: v for n, v in values.items() if n != "noise"}, rows=ROWS)
        found = log_evidence(program, Empty(), batch, 3)
        torch.testing.assert_close(found, program.evidence(batch).detach())


def test_a_mixture_behind_a_decoder():
    program, guide, x = small_vade()
    by_class = vade_by_class(program, x)
    close(log_evidence(program, guide, {"x": x}, 8000), by_class.logsumexp(-1))
    y = torch.tensor([0, 2, 1, 1, 0])
    known = torch.tensor([True, False, True, False, True])
    joint = by_class.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    close(log_evidence(program, guide, {"x": x, "y": y}, 8000), joint)
    some = torch.where(known, joint, by_class.logsumexp(-1))
    close(log_evidence(program, guide, {"x": x, "y": (y, known)}, 8000), some)


@pytest.mark.parametrize("biased", [0.0, -40.0])
def test_a_site_that_the_guide_enumerates_is_summed_without_its_probabilities(biased):
    program, guide, x = small_m2(biased)  # the classifier may deny the first class altogether
    by_class = m2_by_class(program, x)
    close(log_evidence(program, guide, {"x": x}, 8000), by_class.logsumexp(-1))
    y = torch.tensor([0, 2, 1, 1, 0])
    known = torch.tensor([True, False, True, False, True])
    joint = by_class.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    some = torch.where(known, joint, by_class.logsumexp(-1))
    close(log_evidence(program, guide, {"x": x, "y": (y, known)}, 8000), some)


@pytest.mark.parametrize("name", [n for n in WIDE if "y" in CASES[n].widths and n != "mixture"])
def test_the_sum_over_labels_is_that_of_the_labelled_rows(name):
    """At the same noise, draw for draw, in rows that know their label and in those that do not."""
    case = CASES[name]
    program, guide = case.pair()
    data = case.data()
    inputs, count = ["noise"], case.labels["y"]
    each = [
        log_evidence(program, guide, {**data, "y": torch.full((ROWS,), k)}, 1, inputs=inputs)
        for k in range(count)
    ]
    joint = torch.stack(each, -1)
    bare = {n: v for n, v in data.items() if n != "y"}
    found = log_evidence(program, guide, bare, 1, inputs=inputs)
    known = torch.arange(ROWS) % 2 == 0
    part = log_evidence(program, guide, {**data, "y": (data["y"], known)}, 1, inputs=inputs)
    own = joint.gather(-1, data["y"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found, joint.logsumexp(-1))
    torch.testing.assert_close(part, torch.where(known, own, joint.logsumexp(-1)))


@pytest.mark.parametrize("name", WIDE)
def test_every_pattern_has_a_value_and_rows_without_any_have_none(name):
    program, guide = CASES[name].pair()
    for pattern, data in CASES[name].patterns():
        found = log_evidence(program, guide, data, 3, inputs=["noise"], chunk_size=ROWS * 3)
        assert found.shape == (ROWS,), pattern
        assert bool(found.isfinite().all()), pattern
        batch = Batch.of(data)
        known = [batch.present(n).reshape(ROWS, -1).any(1) for n in batch.names if n != "noise"]
        empty = ~torch.stack(known).any(0)
        assert bool((found[empty] == 0).all()), pattern
    order = torch.arange(ROWS - 1, -1, -1)  # and no row looks at the others
    again = log_evidence(program, guide, batch[order], 3, inputs=["noise"])
    torch.testing.assert_close(again, found[order])


class Sensors(nn.Module):
    """A state of every sensor of a row, in a plate within the rows."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([-1.0, 0.4, 1.3], dtype=torch.float64))
        self.logits = nn.Parameter(torch.tensor([0.2, -0.4, 0.3], dtype=torch.float64))

    def forward(self, batch):
        sensors = pyro.plate("sensors", 4, dim=-2)
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            with sensors:
                y = pyro.sample("y", dist.Categorical(logits=self.logits))
                pyro.sample("x", dist.Normal(self.loc[y] + z.sum(-1), 0.6))


class SensorsGuide(nn.Module):
    def __init__(self, states):
        super().__init__()
        self.states = states

    def forward(self, batch):
        with pyro.plate("data", len(batch), dim=-1):
            zero = torch.zeros(2, dtype=torch.float64)
            pyro.sample("z", dist.Normal(zero, 1.2).to_event(1))
            if self.states:
                with pyro.plate("sensors", 4, dim=-2):
                    pyro.sample("y", dist.Categorical(logits=torch.tensor([9.0, 0, 0]).double()))


@pytest.mark.parametrize("states", [False, True])
def test_plates_within_the_rows(states):
    torch.manual_seed(3)
    program, x = Sensors(), torch.randn(5, 4, dtype=torch.float64)

    def joint(z):
        loc = program.loc + z.sum(-1)[..., None, None]
        by_state = dist.Normal(loc, 0.6).log_prob(x[..., None]) + program.logits.log_softmax(-1)
        prior = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1).log_prob(z)
        return by_state.logsumexp(-1).sum(-1) + prior

    exact = grid(joint, 6.0, 121).detach()
    close(log_evidence(program, SensorsGuide(states), {"x": x}, 20_000), exact, 0.04)


# ---- a bound that grows -----------------------------------------------------------------------------


def test_the_mean_grows_with_the_particles_and_stays_below_the_evidence():
    program = factor_analysis()
    x = torch.randn(1, 5, dtype=torch.float64)
    exact = program.evidence(Batch.of({"x": x})).item()
    means = []
    for particles in (1, 4, 30):
        found = log_evidence(program, Exact(program, 2.0), {"x": x.repeat(1500, 1)}, particles)
        means.append(found.mean().item())
    assert means[0] + 0.1 < means[1] < means[2] - 0.01
    assert means[2] < exact


def test_one_particle_is_the_sampled_bound_of_summed_sites_draw_for_draw():
    program, guide, x = small_vade()
    found = log_evidence(program, guide, {"x": x}, 1, chunk_size=50, seed=4)
    torch.manual_seed(4)
    bound = EnumELBO(kl="sampled").per_row(program, guide, {"x": x})
    torch.testing.assert_close(found, bound.detach())


def test_one_particle_beats_the_bound_where_the_guide_enumerates():
    program, guide, x = small_m2()
    x = x[:1].repeat(3000, 1)
    found = log_evidence(program, guide, {"x": x}, 1)
    bound = EnumELBO(kl="closed").per_row(program, guide, {"x": x}).mean()
    assert found.mean() > bound


# ---- how it is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 5, 33, 1000])
def test_chunks_give_estimates_of_the_same_distribution(size):
    program = factor_analysis()
    x = torch.randn(1, 5, dtype=torch.float64)
    data = {"x": x.repeat(40, 1)}
    guide = Exact(program, 1.6)
    found = log_evidence(program, guide, data, 5, chunk_size=size)
    whole = log_evidence(program, guide, data, 5, chunk_size=100_000, seed=1)
    error = (found.var() / len(found) + whole.var() / len(whole)).sqrt()
    assert abs(found.mean() - whole.mean()) < 4.5 * error
    torch.testing.assert_close(found, log_evidence(program, guide, data, 5, chunk_size=size))
    assert len(found.unique()) == len(found)


@pytest.mark.parametrize("name", ["vade", "m2", "mvae"])
def test_a_graph_without_handlers_gives_the_same_numbers(name, monkeypatch):
    program, guide = CASES[name].make()
    data = CASES[name].data()
    data = {n: v for n, v in data.items() if n != "noise"}
    monkeypatch.setattr(evidence, "OFTEN", 10**9)
    slow = log_evidence(program, guide, data, 5, chunk_size=10)
    monkeypatch.setattr(evidence, "OFTEN", 1)
    graphs = []
    make = evidence.make_fx
    monkeypatch.setattr(evidence, "make_fx", lambda *a, **k: graphs.append(1) or make(*a, **k))
    assert torch.equal(log_evidence(program, guide, data, 5, chunk_size=10), slow)
    assert len(graphs) == 2  # of two rows, and of the last


class Branching(FactorAnalysis):
    def forward(self, batch):
        if batch["x"].sum() > 0:
            pyro.deterministic("positive", torch.ones(()))
        super().forward(batch)


def test_programs_that_look_at_values_are_run_as_they_are(monkeypatch):
    torch.manual_seed(0)
    program, x = Branching().double(), torch.randn(6, 5, dtype=torch.float64)
    monkeypatch.setattr(evidence, "OFTEN", 1)
    found = log_evidence(program, Exact(program), {"x": x}, 2, chunk_size=4)
    torch.testing.assert_close(found, program.evidence(Batch.of({"x": x})).detach())


def test_what_cannot_be_compiled_says_so_and_runs():
    torch.manual_seed(0)
    program, x = Branching().double(), torch.randn(6, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match="log_evidence is not compiled: program and guide"):
        found = log_evidence(program, Exact(program), {"x": x}, 2, compile=True)
    torch.testing.assert_close(found, program.evidence(Batch.of({"x": x})).detach())


def test_nothing_is_disturbed():
    program, guide, x = small_vade()
    program.train()
    guide.eval()
    torch.manual_seed(9)
    state = torch.get_rng_state()
    with torch.enable_grad():
        found = log_evidence(program, guide, {"x": x}, 4)
    assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert program.training
    assert not guide.training
    assert all(p.grad is None for p in program.parameters())
    assert torch.equal(found, log_evidence(program, guide, {"x": x}, 4))
    assert not torch.equal(found, log_evidence(program, guide, {"x": x}, 4, seed=1))


def test_the_widest_tensor_decides_how_much_is_done_at_once():
    program, guide, x = small_vade()
    p, q = EnumELBO(kl="sampled").pair(program, guide)
    batch = p.pairing.prepare({"x": x})
    p.pairing.plan(batch)
    assert (
        evidence.fitting(p, q, batch[:1]) == evidence.ELEMENTS["cpu"] // 6
    )  # K x latent_dim, hidden


def test_scales_of_training_play_no_part():
    program, x = factor_analysis(), torch.randn(6, 5, dtype=torch.float64)
    exact = program.evidence(Batch.of({"x": x})).detach()
    found = log_evidence(poutine.scale(program, scale=0.3), Exact(program), {"x": x}, 2)
    torch.testing.assert_close(found, exact)


def test_the_shortcut_of_a_result():
    program, guide, x = small_vade()
    found = Result(program, guide, EnumELBO()).log_evidence({"x": x}, 4, seed=3)
    assert torch.equal(found, log_evidence(program, guide, {"x": x}, 4, seed=3))


# ---- what has none ----------------------------------------------------------------------------------


class Lifted(nn.Module):
    """Draws z by way of an auxiliary site: the map of its draws, or something noisy."""

    def __init__(self, noisy):
        super().__init__()
        self.noisy = noisy

    def forward(self, batch):
        zero = torch.zeros(2, dtype=torch.float64)
        with pyro.plate("data", len(batch)):
            fn = dist.Normal(zero, 1.0).to_event(1)
            a = pyro.sample("a", fn, infer={"is_auxiliary": True})
            z, density = 1.3 * a, torch.full(a.shape[:-1], -2 * math.log(1.3)).double()
            exact = dist.Delta(z, density, event_dim=1)
            pyro.sample("z", dist.Normal(z, 0.5).to_event(1) if self.noisy else exact)


def test_auxiliary_sites_of_a_guide():
    program, x = factor_analysis(), torch.randn(4, 5, dtype=torch.float64)
    exact = program.evidence(Batch.of({"x": x})).detach()
    close(log_evidence(program, Lifted(False), {"x": x}, 20_000), exact, 0.06)
    with pytest.raises(ValueError, match="'z' given its auxiliary site 'a'"):
        log_evidence(program, Lifted(True), {"x": x})


class Own(nn.Module):
    """A program with observed values of its own, which cannot be sliced."""

    def __init__(self):
        super().__init__()
        self.x = torch.linspace(-2, 2, 20)

    def forward(self, batch):
        with pyro.plate("data", len(self.x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.x)


class OwnGuide(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.loc = program.x / 2

    def forward(self, batch):
        with pyro.plate("data", len(self.loc)):
            pyro.sample("z", dist.Normal(self.loc, 0.5**0.5))


@pytest.mark.parametrize("chunk_size", [None, 1, 30, 10_000])
def test_observed_values_of_the_program_itself_are_not_sliced(chunk_size):
    program = Own()
    exact = dist.Normal(0.0, 2**0.5).log_prob(program.x)
    options = {"chunk_size": chunk_size}
    found = log_evidence(program, OwnGuide(program), Batch.of(20), 7, **options)
    torch.testing.assert_close(found, exact)
    weights = importance_weights(program, OwnGuide(program), Batch.of(20), 7, **options)
    torch.testing.assert_close(weights, exact.expand(7, 20))
    joint = joint_log_weights(program, OwnGuide(program), Batch.of(20), 7, **options)
    torch.testing.assert_close(joint.float(), exact.sum().expand(7))


def test_what_is_refused():
    program, guide, x = small_vade()
    with pytest.raises(ValueError, match="'z' as a point mass"):
        log_evidence(program, Mean(guide), {"x": x})
    with pytest.raises(ValueError, match="num_particles"):
        log_evidence(program, guide, {"x": x}, 0)
    with pytest.raises(ValueError, match="chunk_size"):
        log_evidence(program, guide, {"x": x}, chunk_size=0)
    with pytest.raises(ValueError, match="seed"):
        log_evidence(program, guide, {"x": x}, seed=0.5)
    with pytest.raises(ValueError, match="no rows"):
        log_evidence(program, guide, {"x": x[:0]})
    with pytest.raises(ValueError, match="not a site"):
        log_evidence(program, guide, {"w": x})
    case = CASES["globals"]
    with pytest.raises(ValueError, match="'means' is shared by all rows"):
        log_evidence(*case.pair(), case.data(), inputs=["noise"])


# ---- posteriors that need no decoder ----------------------------------------------------------------


@pytest.mark.parametrize("importance", [False, True])
def test_codes_and_responsibilities_never_decode(importance):
    program, guide, x = small_vade()
    calls = []
    program.decoder.register_forward_hook(lambda *_: calls.append(1))
    known = torch.tensor([True, False, True, False, True])
    data = {"x": x, "y": (torch.tensor([0, 2, 1, 1, 0]), known)}
    responsibilities(program, guide, data)
    calls.clear()  # the first run of all reads the graph of the program
    for batch in (data, {"x": x}):
        options = {} if not importance else {"importance": True}
        before = len(calls)
        posterior(program, guide, batch, 3, **options)
        predict(program, guide, batch, "z", **options)
        tried = 3  # whether draws can be run at once
        graphs, passes = 2, 2 * (1 + tried) * importance
        assert len(calls) - before == graphs + passes
        before = len(calls)
        responsibilities(program, guide, batch)
        predict(program, guide, batch, "y")
        assert len(calls) - before == graphs
        before = len(calls)
        posterior(program, guide, batch, 3, predictive=True, **options)
        assert len(calls) - before > 1


def test_no_warning_is_raised_by_a_run():
    program, guide, x = small_vade()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_evidence(program, guide, {"x": x}, 3)
