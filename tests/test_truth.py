"""The ladder of truth: each rung against an independent computation, and the guides on it."""

import math
from importlib.resources import files
from itertools import product

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import nn

from pyrozoo.guides import Amortized
from pyrozoo.inference import Batch, log_evidence
from pyrozoo.inference.comparison.measuring import Effort
from pyrozoo.inference.comparison.references import nuts
from pyrozoo.zoo import comparing, truth
from pyrozoo.zoo.truth.exact import generator

TINY = Effort(60, 20, 0, sbc_datasets=0, reference_rows=0)
SAMPLED = ("eight_schools", "logistic", "counts", "unknown_means")


class Nothing(nn.Module):
    def forward(self, batch):
        pass


class Exact(nn.Module):
    """The posterior of factor analysis, by the covariance of x."""

    def __init__(self, program):
        super().__init__()
        w, s = program.weight.double(), program.scale.double()
        self.gain = w.T @ torch.linalg.inv(w @ w.T + torch.diag(s**2))
        self.cov = torch.eye(3).double() - self.gain @ w

    def posterior(self, x):
        return dist.MultivariateNormal(x.double() @ self.gain.T, self.cov)

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            exact = self.posterior(batch["x"])
            pyro.sample("z", dist.MultivariateNormal(exact.mean.float(), self.cov.float()))


def close(found, right, error, bound=5.0):
    """Within so many standard errors."""
    assert ((found - right).abs() <= bound * error + 1e-6).all(), (found - right) / error


def test_factor_evidence_and_draws():
    rung = truth.rung("factor")
    guide = Exact(rung.program)
    # the weight of any draw of the exact posterior is the evidence
    found = log_evidence(rung.program, guide, rung.data, 2)
    torch.testing.assert_close(found.double(), rung.log_evidence, rtol=0, atol=1e-3)
    draws = rung.draws(2000, 0)["z"][:, :20].double()
    exact = guide.posterior(rung.data["x"][:20])
    sd = guide.cov.diagonal().sqrt()
    close(draws.mean(0), exact.mean, sd / math.sqrt(2000))
    centred = (draws - exact.mean).flatten(0, 1)
    outer = sd.unsqueeze(-1) * sd
    cov = centred.T @ centred / len(centred)
    close(cov, guide.cov, math.sqrt(2) * outer / math.sqrt(len(centred)))


def test_mixture_evidence_and_draws():
    rung = truth.rung("mixture")
    program, x = rung.program, rung.data["x"].double()
    found = log_evidence(program, Nothing(), rung.data, 1)
    torch.testing.assert_close(found.double(), rung.log_evidence, rtol=0, atol=1e-4)
    parts = [
        p * (-(((x - m) / s) ** 2).sum(-1) / 2).exp() / (2 * math.pi * s.prod())
        for p, m, s in zip(program.probs, program.loc.double(), program.scale.double(), strict=True)
    ]
    joint = torch.stack(parts, -1)
    torch.testing.assert_close(joint.sum(-1).log(), rung.log_evidence)
    probs = joint / joint.sum(-1, keepdim=True)
    share = nn.functional.one_hot(rung.draws(1000, 1)["y"], 4).double().mean(0)
    close(share, probs, (probs * (1 - probs) / 1000).sqrt() + 1e-3)


def test_hierarchy_evidence_and_draws():
    rung = truth.rung("hierarchy")
    found = log_evidence(rung.program, Nothing(), rung.data, 1)
    torch.testing.assert_close(found.double(), rung.log_evidence, rtol=0, atol=1e-4)
    batch = Batch.of(rung.data)[:3]
    joint = {}
    for c, first, second in product(range(3), range(4), range(4)):
        values = {"c": c, "y_1": first, "y_2": second}
        known = {n: torch.full((3,), v) for n, v in values.items()} | {
            n: batch[n] for n in rung.given
        }
        trace = poutine.trace(poutine.condition(rung.program, known)).get_trace(batch)
        trace.compute_log_prob()
        joint[c, first, second] = sum(trace.nodes[n]["log_prob"] for n in known).double()
    every = torch.stack(list(joint.values()))
    torch.testing.assert_close(every.logsumexp(0), rung.log_evidence[:3], rtol=0, atol=1e-5)
    draws = {n: v[:, :3] for n, v in rung.draws(4000, 2).items()}
    for key, log_joint in joint.items():
        hit = torch.stack([draws[n] == v for n, v in zip(draws, key, strict=True)]).all(0)
        prob = (log_joint - every.logsumexp(0)).exp()
        close(hit.double().mean(0), prob, (prob * (1 - prob) / 4000).sqrt() + 2e-4)


@pytest.mark.parametrize("name", ["decoder", "modes"])
def test_decoder_evidence_and_draws(name):
    rung = truth.rung(name)
    other = truth.RUNGS[name](points=151, reach=7.0)
    torch.testing.assert_close(other.log_evidence, rung.log_evidence, rtol=0, atol=1e-5)
    # from draws of the prior, weighed by the likelihood
    z = torch.randn(100_000, 2, generator=generator(1), dtype=torch.float64)
    mean = rung.program.mean(z)
    draws = rung.draws(2000, 3)["z"].double()
    for row in range(6):
        x = rung.data["x"][row].double()
        weight = dist.Normal(mean, 0.5).log_prob(x).sum(-1).exp()
        error = weight.std() / len(z) ** 0.5
        close(weight.mean(), rung.log_evidence[row].exp(), error)
        share = weight / weight.sum()
        for moment in (lambda v: v, lambda v: v**2, lambda v: v[..., :1] * v[..., 1:]):
            right = (share.unsqueeze(-1) * moment(z)).sum(0)
            spread = (share.unsqueeze(-1) * (moment(z) - right) ** 2).sum(0).sqrt()
            count = 1 / (1 / (share**2).sum() ** -1 + 1 / 2000)
            close(moment(draws[:, row]).mean(0), right, spread / count**0.5)


@pytest.mark.parametrize("name", ["factor", "mixture", "hierarchy", "decoder", "modes"])
def test_data_are_such_as_the_program_draws(name):
    """Mean log-evidence of the rows, and of rows that the program draws, by the same formula."""
    rung = truth.rung(name)
    torch.manual_seed(0)
    trace = poutine.trace(rung.program).get_trace(Batch.of(4000))
    for site in rung.given:
        drawn, own = trace.nodes[site]["value"], rung.data[site]
        for moment in (lambda v: v, lambda v: v**2):
            a, b = moment(drawn), moment(own)
            close(a.mean(0), b.mean(0), (a.var(0) / len(a) + b.var(0) / len(b)).sqrt())


def test_rungs_say_what_they_are():
    for name, make in truth.RUNGS.items():
        rung = make()
        assert rung.name == name
        assert not [p for p in rung.program.parameters() if p.requires_grad]
        assert set(rung.given) | set(rung.inputs) == set(rung.data)
        again = make()
        assert all(torch.equal(again.data[n], v) for n, v in rung.data.items())
        if rung.log_evidence is not None:
            assert rung.log_evidence.shape == (len(Batch.of(rung.data)),)
    with pytest.raises(ValueError, match="no program of the ladder is called 'ladder'"):
        truth.rung("ladder")


# ---- stored draws --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLED)
def test_stored_draws_have_the_sites_of_the_program(name):
    rung = truth.rung(name)
    trace = poutine.trace(rung.program).get_trace(Batch.of(rung.data))
    draws = rung.draws(100, 0)
    latent = {n for n, s in trace.nodes.items() if s["type"] == "sample" and n not in ("data", "x")}
    assert set(draws) == latent
    for site, value in draws.items():
        assert value.shape == (100, *trace.nodes[site]["value"].shape)
    assert not torch.equal(*(rung.draws(100, seed)[min(latent)] for seed in (0, 1)))
    with pytest.raises(ValueError, match=r"1000 draws .* are stored, got a request for 1001"):
        rung.draws(1001, 0)


def test_stored_eight_schools_agree_with_the_published_posterior():
    """posteriordb, eight_schools_noncentered: mu 4.4 (sd 3.3), tau 3.6 (sd 3.2)."""
    draws = truth.rung("eight_schools").draws(1000, 0)
    assert draws["mu"].mean().item() == pytest.approx(4.4, abs=0.35)
    assert draws["mu"].std().item() == pytest.approx(3.3, abs=0.3)
    assert draws["tau"].mean().item() == pytest.approx(3.6, abs=0.35)
    assert draws["tau"].std().item() == pytest.approx(3.2, abs=0.5)


@pytest.mark.parametrize("name", ["logistic", "unknown_means"])
def test_stored_draws_agree_with_importance_sampling(name):
    """Draws of a wide Student's t around the stored ones, weighed by the joint density."""
    rung = truth.rung(name)
    stored = rung.draws(1000, 0)
    sites = ("a", "w") if name == "logistic" else ("loc", "s", "p")
    free = {"s": torch.log, "p": lambda p: (p[..., :1] / p[..., 1:]).log()}
    columns = [free.get(n, lambda v: v)(stored[n]).reshape(1000, -1) for n in sites]
    points = torch.cat(columns, 1).double()
    scale = torch.linalg.cholesky(points.T.cov()) * 1.3
    proposal = dist.MultivariateStudentT(torch.tensor(5.0).double(), points.mean(0), scale)
    torch.manual_seed(0)
    z = proposal.sample((20_000,))
    x = rung.data["x"].double()
    if name == "logistic":
        logits = z[:, :1] + z[:, 1:] @ rung.data["u"].double().T
        log_joint = dist.Normal(0.0, 2.5).log_prob(z).sum(-1)
        log_joint = log_joint + dist.Bernoulli(logits=logits).log_prob(x).sum(-1)
    else:
        loc, log_s, logit = z[:, :2], z[:, 2], z[:, 3]
        p = torch.stack([logit.sigmoid(), (-logit).sigmoid()], -1)
        log_joint = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).log_prob(loc).sum(-1)
        log_joint = log_joint + dist.Normal(0.0, 0.5).log_prob(log_s)
        log_joint = log_joint + dist.Dirichlet(torch.full((2,), 2.0).double()).log_prob(p)
        log_joint = log_joint + p.log().sum(-1)  # d p / d logit
        parts = dist.Normal(loc.unsqueeze(1), log_s.exp().reshape(-1, 1, 1)).log_prob(
            x.reshape(1, -1, 1)
        )
        log_joint = log_joint + (p.log().unsqueeze(1) + parts).logsumexp(-1).sum(-1)
    share = (log_joint - proposal.log_prob(z)).softmax(0)
    effective = 1 / (share**2).sum()
    assert effective > 2000
    mean = share @ z
    sd = (share @ (z - mean) ** 2).sqrt()
    error = sd * (1 / 1000 + 1 / effective) ** 0.5
    close(points.mean(0), mean, error)
    close(points.std(0), sd, error)


# ---- guides on the ladder ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in truth.RUNGS if n not in ("mixture", "hierarchy")])
def test_every_guide_runs_or_says_why_not(name):
    small = name not in ("factor", "decoder", "modes")
    skipped = () if small else ("auto_mvn", "auto_iaf")  # 400 or more dimensions
    names = [n for n in comparing.guide_names() if n not in skipped]
    found = comparing.compare_rung(name, names, ["elbo"], epochs=1, num_particles=1, effort=TINY)
    assert [c.guide for c in found.cells] == names
    assert len(found.records()) == len(names)
    for cell in found.cells:
        figures, reasons = cell.measures.figures, cell.measures.reasons
        assert not cell.reason
        if "delta" in cell.guide:
            assert "elbo" not in figures
            assert "point mass" in reasons["elbo"]
        else:
            assert math.isfinite(figures["elbo"])
            assert any(k.startswith("iwae_") for k in figures) or reasons["khat_bad"]


@pytest.mark.parametrize("name", ["mixture", "hierarchy"])
def test_nothing_to_propose_has_no_gap(name):
    names = comparing.guide_names()
    found = comparing.compare_rung(name, names, ["elbo"], epochs=1, num_particles=1, effort=TINY)
    for cell in found.cells:
        if cell.guide in comparing.AUTOGUIDES:
            assert "no continuous latent site" in cell.reason
        else:
            assert abs(cell.measures.figures["gap"]) < 1e-5
            assert cell.measures.reasons["approximation_gap"] == "the guide proposes nothing"


def test_full_covariance_reaches_the_evidence_of_factor_analysis():
    """With a linear network, as the posterior mean is linear; sticking the landing by default."""
    found = comparing.compare_rung(
        "factor", ["full"], epochs=300, lr=0.03, num_particles=2, hidden=(), effort=TINY
    )
    assert found.names == ["full, STL"]
    assert abs(found.records()[0]["gap"]) < 0.01


def test_missing_draws_are_an_error_that_says_how_to_make_them(monkeypatch, tmp_path):
    monkeypatch.setattr("pyrozoo.zoo.truth.sampled.files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"python -m pyrozoo\.zoo\.truth\.references"):
        truth.rung("logistic").draws(10, 0)


def test_stored_files_are_there():
    for name in SAMPLED:
        assert (files("pyrozoo.zoo.truth") / f"{name}.safetensors").is_file()


def test_exact_posterior_of_finite_sites_by_the_sampler():
    rung = truth.rung("hierarchy")
    some = {n: v[:5] for n, v in rung.data.items()}
    found = nuts(rung.program, some, num_samples=1000).draws
    exact = rung.draws(1000, 5)
    for site in exact:
        a, b = (nn.functional.one_hot(d[site][:, :5].long(), 4).double().mean(0)
                for d in (found, exact))  # fmt: skip
        close(a, b, torch.tensor(2 * 0.25 / 1000).sqrt())


@pytest.mark.parametrize(
    ("name", "site", "key"), [("eight_schools", "z", "s"), ("counts", "e", "u")]
)
def test_guides_of_a_rung_read_its_inputs(name, site, key, monkeypatch):
    seen = {}
    monkeypatch.setattr(comparing, "compare", lambda program, guides, *_, **__: seen.update(guides))
    comparing.compare_rung(name, ["mean_field"])
    guide = seen["mean_field"](truth.rung(name).program)
    assert key in guide.factorisation.reads[site]
    only = Amortized(truth.rung(name).program, given=["x"], example=truth.rung(name).data)
    assert f"{key}: an input that no site reads" in str(only)
