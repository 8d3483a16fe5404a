"""Objectives against closed forms: values, gradients draw for draw and on average, and refusals.

Gradients are looked at one draw at a time: where the parameters of a guide belong to the rows, and
all rows are equal, the gradient by a parameter is a sample for each row.
"""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from cases import CASES, ROWS, Empty
from torch import nn

from pyrozoo.guides import Amortized, Classifier, Sequential
from pyrozoo.inference import Batch, EnumELBO, evaluate, fit, log_evidence, register, stage
from pyrozoo.inference.bounds.importance import IWELBO, RenyiBound
from pyrozoo.inference.bounds.wake import ReweightedWakeSleep
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.semisupervised import M2

pytestmark = pytest.mark.usefixtures("double")

X, K = 1.7, 3  # what is observed in every row; classes
MANY = 10_000


# ---- programs of which the evidence is known, and guides with parameters for each row ----------------


class Toy(nn.Module):
    """z ~ N(0, 1), x | z ~ N(2 z, 1): the posterior is N(0.4 x, 0.2)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.weight * z, 1.0))

    def by_class(self):
        return dist.Normal(0.0, math.sqrt(5)).log_prob(torch.tensor([X]))


class ToyGuide(nn.Module):
    def __init__(self, rows, exact=False):
        super().__init__()
        loc, scale = (0.4 * X, math.sqrt(0.2)) if exact else (0.3, 0.8)
        self.loc = nn.Parameter(torch.full((rows,), loc))
        self.raw = nn.Parameter(torch.full((rows,), math.log(scale)))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            self.drawn = pyro.sample("z", self.propose())

    def propose(self):
        return dist.Normal(self.loc, self.raw.exp())


class Flow(ToyGuide):
    """The same density, through a map that remembers what it has drawn."""

    def propose(self):
        base = dist.Normal(torch.zeros_like(self.loc), 1.0)
        map = dist.transforms.AffineTransform(self.loc, self.raw.exp(), cache_size=1)
        return dist.TransformedDistribution(base, [map])


class Lifted(ToyGuide):
    """The same density, computed from noise that is a site of the guide alone."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            z = self.loc + self.raw.exp() * a
            pyro.sample("z", dist.Delta(z, -self.raw.expand(z.shape)))


class Chain(nn.Module):
    """z_1 ~ N(0, 1), z_2 | z_1 ~ N(z_1, 1), x | z_2 ~ N(z_2, 1)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z_1 = pyro.sample("z_1", dist.Normal(0.0, 1.0))
            z_2 = pyro.sample("z_2", dist.Normal(self.weight * z_1, 1.0))
            pyro.sample("x", dist.Normal(z_2, 1.0))

    def by_class(self):
        return dist.Normal(0.0, math.sqrt(3)).log_prob(torch.tensor([X]))


class ChainGuide(nn.Module):
    """q(z_2 | x) q(z_1 | z_2, x)."""

    def __init__(self, rows, exact=False):
        super().__init__()
        values = [2 / 3, math.log(2 / 3) / 2, 0.5, 0.0, math.log(0.5) / 2]
        if not exact:
            values = [0.5, -0.1, 0.3, 0.2, -0.2]
        names = ["a", "s", "b", "c", "t"]
        pairs = zip(names, values, strict=True)
        self.raw = nn.ParameterDict({n: nn.Parameter(torch.full((rows,), v)) for n, v in pairs})

    def forward(self, batch):
        r, x = self.raw, batch["x"]
        with pyro.plate("data", len(batch)):
            z_2 = pyro.sample("z_2", dist.Normal(r["a"] * x, r["s"].exp()))
            pyro.sample("z_1", dist.Normal(r["b"] * z_2 + r["c"] * x, r["t"].exp()))


class Labelled(nn.Module):
    """y ~ Categorical, z ~ N(0, 1), x | y, z ~ N(m_y + 2 z, 1)."""

    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(torch.tensor([-1.0, 0.5, 3.0]))
        self.logits = nn.Parameter(torch.tensor([0.4, 0.0, -0.5]))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.means[y] + 2 * z, 1.0))

    def by_class(self):
        density = dist.Normal(self.means, math.sqrt(5)).log_prob(torch.tensor(X))
        return (density + self.logits.log_softmax(-1)).detach()


class EarlyLabel(nn.Module):
    """q(y | x) q(z | x, y)."""

    def __init__(self, rows, exact=False):
        super().__init__()
        program = Labelled()
        logits, loc = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.9, 0.5, -0.6])
        scale = 0.6
        if exact:
            logits, loc = program.by_class(), 0.4 * (X - program.means.detach())
            scale = math.sqrt(0.2)
        self.logits = nn.Parameter(logits.expand(rows, K).clone())
        self.loc = nn.Parameter(loc.expand(rows, K).clone())
        self.raw = nn.Parameter(torch.full((rows,), math.log(scale)))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            loc = (torch.eye(K)[y] * self.loc).sum(-1)
            self.drawn = pyro.sample("z", dist.Normal(loc, self.raw.exp()))


class LateLabel(EarlyLabel):
    """q(z | x) q(y | z)."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(self.loc[:, 0], self.raw.exp()))
            logits = self.logits + self.loc * z.unsqueeze(-1)
            pyro.sample("y", dist.Categorical(logits=logits))


class Words(nn.Module):
    """z ~ N(0, 1); of J words y_j ~ Bernoulli(sigmoid(z)), x_j ~ N(2 y_j, 1)."""

    def forward(self, batch):
        data, words = pyro.plate("data", len(batch), dim=-1), pyro.plate("words", 2, dim=-2)
        with data:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with words:
                y = pyro.sample("y", dist.Bernoulli(logits=z))
                pyro.sample("x", dist.Normal(2 * y, 1.0))

    def by_class(self):
        z = torch.linspace(-9, 9, 2001).unsqueeze(1)
        x = torch.tensor([X, X])
        joint = [dist.Bernoulli(logits=z).log_prob(torch.tensor(y)) for y in (0.0, 1.0)]
        each = [a + dist.Normal(2.0 * y, 1.0).log_prob(x) for y, a in enumerate(joint)]
        total = torch.logaddexp(*each).sum(-1) + dist.Normal(0.0, 1.0).log_prob(z[:, 0])
        return total.logsumexp(0, keepdim=True) + math.log(18 / 2000)


class WordsGuide(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.loc = nn.Parameter(torch.full((rows,), 0.4))
        self.raw = nn.Parameter(torch.full((rows,), -0.1))
        self.logits = nn.Parameter(torch.tensor([[0.6], [0.9]]).expand(2, rows).clone())

    def forward(self, batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(self.loc, self.raw.exp()))
            with pyro.plate("words", 2, dim=-2):
                pyro.sample("y", dist.Bernoulli(logits=self.logits))


class Counts(nn.Module):
    """n ~ Poisson(2), x | n ~ N(n, 1)."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            n = pyro.sample("n", dist.Poisson(self.rate))
            pyro.sample("x", dist.Normal(n, 1.0))

    def by_class(self):
        n = torch.arange(60.0)
        joint = dist.Poisson(self.rate).log_prob(n) + dist.Normal(n, 1.0).log_prob(torch.tensor(X))
        return joint.detach()


class CountsGuide(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.raw = nn.Parameter(torch.full((rows,), 0.6))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            rate = self.raw.exp().expand(len(batch))
            self.drawn = pyro.sample("n", dist.Poisson(rate))


PAIRS = {
    "toy": (Toy, ToyGuide),
    "flow": (Toy, Flow),
    "lifted": (Toy, Lifted),
    "chain": (Chain, ChainGuide),
    "summed": (Labelled, ToyGuide),
    "early label": (Labelled, EarlyLabel),
    "late label": (Labelled, LateLabel),
    "words": (Words, WordsGuide),
}
OBJECTIVES = {
    "elbo, stl": lambda n=3, **o: EnumELBO(n, gradient="stl", **o),
    "iwelbo": IWELBO,
    "iwelbo, stl": lambda n=3, **o: IWELBO(n, gradient="stl", **o),
    "iwelbo, dreg": lambda n=3, **o: IWELBO(n, gradient="dreg", **o),
    "renyi": lambda n=3, **o: RenyiBound(0.4, n, **o),
    "wake": lambda n=3, **o: ReweightedWakeSleep(n, **o),
    "wake-sleep": lambda n=3, **o: ReweightedWakeSleep(n, 0.5, **o),
}
SEVERAL = [name for name in OBJECTIVES if name != "elbo, stl"]


def made(name, rows, **options):
    program, guide = PAIRS[name]
    data = {"x": torch.full((rows, 2) if name == "words" else (rows,), X)}
    return program(), guide(rows, **options), data


def values(objective, program, guide, data, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return objective.per_row(program, guide, data)


def gradients(objective, program, guide, data, seed=0):
    """Of the bound, by every parameter; one sample for each row where a parameter has rows."""
    torch.manual_seed(seed)
    loss = objective.differentiable_loss(program, guide, data)
    names = {f"p.{n}": x for n, x in program.named_parameters()}
    names |= {f"q.{n}": x for n, x in guide.named_parameters()}
    rows = len(next(iter(data.values())))
    grads = torch.autograd.grad(-loss * rows, list(names.values()), allow_unused=True)
    return dict(zip(names, grads, strict=True))


def error(samples):
    return samples.std(0) / math.sqrt(len(samples))


def same_mean(a, b, errors=4.5):
    limit = errors * (error(a) ** 2 + error(b) ** 2).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() <= limit).all(), (a.mean(0), b.mean(0), limit)


# ---- values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_one_draw_is_the_evidence_bound(name):
    pair = made(name, 7)
    right = values(EnumELBO(kl="sampled"), *pair)
    found = [EnumELBO(gradient="stl"), RenyiBound(0.3, 1)]
    found += [IWELBO(1, gradient=g) for g in ("total", "stl", "dreg")]
    found += [ReweightedWakeSleep(1)] if name in ("toy", "flow", "chain", "summed") else []
    for objective in found:
        torch.testing.assert_close(values(objective, *pair), right, rtol=1e-12, atol=1e-12)
        torch.manual_seed(0)
        loss = objective.differentiable_loss(*pair).detach()
        torch.testing.assert_close(loss, -right.mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_the_bound_lies_between_that_of_one_draw_and_the_evidence(name):
    program, *_ = pair = made(name, MANY)
    exact = program.by_class().logsumexp(0).item()
    one, several = (values(IWELBO(n), *pair) for n in (1, 8))
    assert several.mean() <= exact + 4.5 * error(several)
    assert several.mean() - one.mean() > 4.5 * error(one)
    if name == "toy":
        mean, scale = 0.3, 0.8
        second = mean**2 + scale**2
        elbo = -0.5 * (X**2 - 4 * X * mean + 5 * second) - math.log(2 * math.pi) / 2
        elbo += math.log(scale) + 0.5
        assert abs(one.mean() - elbo) < 4.5 * error(one)


@pytest.mark.parametrize("name", ["toy", "lifted", "chain", "summed", "early label", "late label"])
def test_the_weights_have_the_mean_of_the_evidence(name):
    program, guide, data = made(name, MANY)
    objectives = [] if name == "lifted" else [ReweightedWakeSleep(4)]
    objectives += [] if "label" in name else [IWELBO(4), IWELBO(4, gradient="dreg")]
    for objective in objectives:
        weights = values(objective, program, guide, data).exp()
        same_mean(weights, program.by_class().logsumexp(0).exp().expand(2))


def test_many_draws_leave_the_gap_of_the_classifier():
    program, guide, data = made("early label", 4)
    by_class = program.by_class()
    log_q = guide.logits[0].detach().log_softmax(-1)
    gap = (log_q.exp() * (log_q - by_class.log_softmax(-1))).sum()
    limit = by_class.logsumexp(0) - gap
    found = values(IWELBO(40_000), program, guide, data)
    torch.testing.assert_close(found, limit.expand(4), rtol=0, atol=0.01)
    found = values(ReweightedWakeSleep(40_000), program, guide, data)
    torch.testing.assert_close(found, by_class.logsumexp(0).expand(4), rtol=0, atol=0.01)


@pytest.mark.parametrize("name", ["toy", "summed", "early label", "late label"])
def test_the_order_leads_from_the_evidence_bound_to_the_weighted_one(name):
    pair = made(name, 30)
    orders = [-1.0, 0.0, 0.4, 1 - 1e-7, 1.0, 1 + 1e-7, 2.0, 8.0]
    found = torch.stack([values(RenyiBound(a, 5), *pair) for a in orders])
    torch.testing.assert_close(found[1], values(IWELBO(5), *pair))
    torch.testing.assert_close(found[4], values(EnumELBO(5, kl="sampled"), *pair))
    torch.testing.assert_close(found[3], found[4], rtol=1e-5, atol=1e-5)
    assert (found.diff(dim=0) <= 1e-8).all()
    assert (found[0] - found[-1]).min() > 1e-3


def test_what_is_a_bound():
    assert IWELBO().is_bound
    assert RenyiBound(0.0).is_bound
    assert RenyiBound(3).is_bound
    assert not RenyiBound(-0.1).is_bound
    assert not IWELBO(observed_guide_weights={"y": 1.0}).is_bound
    assert ReweightedWakeSleep().is_bound  # its value


def test_a_negative_order_exceeds_the_evidence():
    program, *rest = made("toy", MANY)
    found = values(RenyiBound(-1.0, 50), program, *rest)
    assert found.mean() > program.by_class().logsumexp(0) + 9 * error(found)


# ---- gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_the_doubly_reparameterised_gradient_has_the_mean_of_the_total_one(name):
    program, guide, data = made(name, MANY)
    total = gradients(IWELBO(3), program, guide, data, seed=1)
    dreg = gradients(IWELBO(3, gradient="dreg"), program, guide, data, seed=2)
    for parameter in [n for n in total if n.startswith("q.")]:
        a, b = (g[parameter] for g in (total, dreg))
        if name == "words" and parameter == "q.logits":
            a, b = a.T, b.T
        same_mean(a, b)
        assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("name", PAIRS)
def test_sticking_the_landing_has_the_mean_of_the_total_gradient_of_the_evidence_bound(name):
    program, guide, data = made(name, MANY)
    total = gradients(EnumELBO(2, kl="sampled"), program, guide, data, seed=1)
    path = gradients(EnumELBO(2, gradient="stl"), program, guide, data, seed=2)
    for parameter in [n for n in total if n.startswith("q.")]:
        a, b = (g[parameter] for g in (total, path))
        if name == "words" and parameter == "q.logits":
            a, b = a.T, b.T
        same_mean(a, b)


def test_sticking_the_landing_is_biased_for_several_draws():
    program, guide, data = made("toy", MANY)
    total = gradients(IWELBO(3), program, guide, data, seed=1)["q.raw"]
    path = gradients(IWELBO(3, gradient="stl"), program, guide, data, seed=2)["q.raw"]
    assert (total.mean() - path.mean()).abs() > 9 * (error(total) + error(path))


def test_of_one_draw_both_are_the_same():
    for name in ("chain", "early label", "late label"):
        pair = made(name, 50)
        found = [IWELBO(1, gradient="dreg"), IWELBO(1, gradient="stl"), EnumELBO(gradient="stl")]
        first, *others = (gradients(objective, *pair) for objective in found)
        for other in others:
            for parameter, grad in first.items():
                torch.testing.assert_close(other[parameter], grad)


@pytest.mark.parametrize("name", ["toy", "chain", "early label"])
@pytest.mark.parametrize("objective", ["elbo, stl", "iwelbo, stl", "iwelbo, dreg"])
def test_the_gradient_vanishes_at_the_exact_posterior(name, objective):
    pair = made(name, 200, exact=True)
    for draws in (1, 3):
        found = gradients(OBJECTIVES[objective](draws), *pair)
        noisy = gradients(EnumELBO(draws, kl="sampled"), *pair)
        own = [n for n in found if n.startswith("q.")]
        assert max(found[n].abs().max() for n in own) < 1e-12
        assert max(noisy[n].std() for n in own) > 0.1


def test_a_map_that_remembers_is_the_density_all_the_same():
    for objective in (
        EnumELBO(2, gradient="stl"),
        IWELBO(3, gradient="dreg"),
        ReweightedWakeSleep(3),
    ):
        plain, flow = (gradients(objective, *made(name, 40)) for name in ("toy", "flow"))
        for parameter, grad in plain.items():
            torch.testing.assert_close(flow[parameter], grad)


@pytest.mark.parametrize("name", PAIRS)
def test_the_gradient_by_the_program_is_that_of_the_bound(name):
    pair = made(name, 50)
    total = gradients(IWELBO(3), *pair)
    others = [IWELBO(3, gradient="dreg"), IWELBO(3, gradient="stl")]
    others += [ReweightedWakeSleep(3)] if name in ("toy", "chain", "summed") else []
    for objective in others:
        found = gradients(objective, *pair)
        for parameter in [n for n in total if n.startswith("p.")]:
            torch.testing.assert_close(found[parameter], total[parameter])


def test_the_signal_of_the_doubly_reparameterised_gradient_does_not_drown():
    program, guide, data = made("toy", 4000)
    ratio = {}
    for kind in ("total", "dreg"):
        for draws in (4, 64):
            samples = gradients(IWELBO(draws, gradient=kind), program, guide, data)["q.loc"]
            ratio[kind, draws] = (samples.mean().abs() / samples.std()).item()
    assert ratio["total", 64] < 0.5 * ratio["total", 4]
    assert ratio["dreg", 64] > ratio["dreg", 4]
    assert ratio["dreg", 64] > 5 * ratio["total", 64]


def test_every_parameter_has_a_gradient():
    for name in PAIRS:
        for kind in ("total", "stl", "dreg"):
            found = gradients(IWELBO(3, gradient=kind), *made(name, 5))
            assert all(g is not None and bool((g != 0).all()) for g in found.values()), (name, kind)


# ---- wake and sleep ---------------------------------------------------------------------------------


def test_the_wake_phase_by_hand():
    program, guide, data = made("toy", 30)
    found = gradients(ReweightedWakeSleep(4), program, guide, data)
    z = guide.drawn.detach()
    log_q = guide.propose().log_prob(z)
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(2 * z, 1.0).log_prob(data["x"])
    share = (log_p - log_q).detach().softmax(0)
    right = torch.autograd.grad((share * log_q).sum(), [guide.loc, guide.raw])
    torch.testing.assert_close(found["q.loc"], right[0])
    torch.testing.assert_close(found["q.raw"], right[1])


def test_the_wake_phase_with_classes_by_hand():
    program, guide, data = made("early label", 30)
    found = gradients(ReweightedWakeSleep(4, 0.25), program, guide, data)
    slept = gradients(ReweightedWakeSleep(4, 0.0), program, guide, data)
    values(ReweightedWakeSleep(4), program, guide, data)  # the same draws, and no dream after them
    z = guide.drawn.detach()  # (K, 4, 30)
    log_q = dist.Normal(guide.loc.T.unsqueeze(1), guide.raw.exp()).log_prob(z)
    likelihood = dist.Normal(program.means.reshape(K, 1, 1) + 2 * z, 1.0).log_prob(data["x"])
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + likelihood
    log_p = log_p + program.logits.log_softmax(-1).reshape(K, 1, 1)
    share = (log_p - log_q).detach().transpose(0, 1).reshape(4 * K, -1).softmax(0)
    share = share.reshape(4, K, -1).transpose(0, 1)
    log_q = log_q + guide.logits.log_softmax(-1).T.unsqueeze(1)
    names = ["logits", "loc", "raw"]
    right = torch.autograd.grad((share * log_q).sum(), [getattr(guide, n) for n in names])
    for name, grad in zip(names, right, strict=True):
        mixed = 0.25 * grad + 0.75 * slept[f"q.{name}"]
        torch.testing.assert_close(found[f"q.{name}"], mixed)


class Linear(nn.Module):
    """q(z | x) = N(a x + b, s)."""

    def __init__(self, rows):
        super().__init__()
        values = {"a": 0.7, "b": -0.3, "s": 0.2}
        self.raw = nn.ParameterDict(
            {n: nn.Parameter(torch.full((rows,), v)) for n, v in values.items()}
        )

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            loc = self.raw["a"] * batch["x"] + self.raw["b"]
            pyro.sample("z", dist.Normal(loc, self.raw["s"].exp()))


def test_the_sleep_phase_in_closed_form():
    program, guide, data = Toy(), Linear(MANY), {"x": torch.full((MANY,), X)}
    found = gradients(ReweightedWakeSleep(2, 0.0), program, guide, data)
    a, b, variance = 0.7, -0.3, math.exp(0.4)
    square = 1 - 4 * a + 5 * a**2 + b**2
    right = {"a": -(5 * a - 2) / variance, "b": -b / variance, "s": square / variance - 1}
    for name, exact in right.items():
        samples = found[f"q.raw.{name}"]
        assert (samples.mean() - exact).abs() < 4.5 * error(samples), name


def test_classes_are_dreamed_too():
    program, guide, data = made("early label", MANY)
    found = gradients(ReweightedWakeSleep(2, 0.0), program, guide, data)["q.logits"]
    exact = program.logits.softmax(-1) - guide.logits[0].softmax(-1)  # x is not read
    assert ((found.mean(0) - exact).abs() < 4.5 * error(found)).all()


def test_dreams_miss_what_the_rows_miss():
    guide, seen = Linear(MANY), torch.arange(MANY) % 2 == 0
    data = {"x": torch.full((MANY,), X)}
    data["x"] = (data["x"], seen)
    torch.manual_seed(0)
    loss = ReweightedWakeSleep(2, 0.0).differentiable_loss(Toy(), guide, Batch.of(data))
    (grad,) = torch.autograd.grad(-loss * MANY, [guide.raw["b"]])
    assert (grad[~seen] == 0).all()
    assert (grad[seen].mean() - 0.3 / math.exp(0.4)).abs() < 4.5 * error(grad[seen])


def test_draws_need_no_reparameterisation():
    program, guide, data = Counts(), CountsGuide(MANY), {"x": torch.full((MANY,), X)}
    exact = program.by_class()
    weights = values(ReweightedWakeSleep(4), program, guide, data).exp()
    same_mean(weights, exact.logsumexp(0).exp().expand(2))
    found = gradients(ReweightedWakeSleep(300, 0.5), program, guide, data)["q.raw"]
    mean = (exact.softmax(0) * torch.arange(60.0)).sum()
    right = 0.5 * (mean - math.exp(0.6)) + 0.5 * (2 - math.exp(0.6))
    assert (found.mean() - right).abs() < 4.5 * error(found) + 0.01  # and the bias of the weights
    few = {"x": torch.full((6,), X)}
    guide = CountsGuide(1)
    fit(program, guide, few, objective=ReweightedWakeSleep(5, 0.5), epochs=2, batch_size=6,
        progress=False)  # fmt: skip
    found = log_evidence(program, guide, few, 20_000)
    torch.testing.assert_close(found, program.by_class().logsumexp(0).expand(6), rtol=0, atol=0.05)
    for objective in (IWELBO(2), EnumELBO(gradient="stl")):
        with pytest.raises(ValueError, match="'n' of the guide is neither summed nor reparam"):
            objective.differentiable_loss(program, guide, few)


# ---- what is missing, and what is known in part -----------------------------------------------------


@pytest.mark.parametrize("name", ["m2", "vade, q(y|x)", "mvae", "hivae, y summed"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_in_part(name, objective):
    program, guide = CASES[name].pair()
    objective = OBJECTIVES[objective](2, inputs=("noise",))
    for pattern, data in CASES[name].patterns():
        if not pattern.startswith("some"):
            continue
        torch.manual_seed(0)
        rows = objective.per_row(program, guide, Batch.of(data, ROWS))
        assert rows.isfinite().all()
        if pattern == "some of all":
            assert rows[0] == 0
        if rows.requires_grad:
            parameters = [*program.parameters(), *guide.parameters()]
            for grad in torch.autograd.grad(rows.sum(), parameters, allow_unused=True):
                assert grad is None or grad.isfinite().all()


@pytest.mark.parametrize("name", ["m2", "vade, q(y|x)", "vade", "hivae, y summed"])
@pytest.mark.parametrize("objective", SEVERAL[:-1])
def test_a_label_known_in_part_is_one_known_where_it_is_known(name, objective):
    case = CASES[name]
    program, guide = case.pair()
    known = torch.arange(ROWS) % 2 == 0
    data = case.data()
    objective = OBJECTIVES[objective](2, inputs=("noise",), split=False)
    with torch.no_grad():
        some = objective.per_row(program, guide, {**data, "y": (data["y"], known)})
        every = objective.per_row(program, guide, data)
        none = objective.per_row(program, guide, {n: v for n, v in data.items() if n != "y"})
    torch.testing.assert_close(some, torch.where(known, every, none))


def test_the_classification_term_comes_on_top():
    case = CASES["m2"]
    program, guide = case.pair()
    data = case.data()
    plain = IWELBO(3, inputs=("noise",))
    more = IWELBO(3, inputs=("noise",), observed_guide_weights={"y": 2.0})
    with torch.no_grad():
        batch = Batch.of(data)
        log_q = guide.guide.parts[0].distribution(batch).log_prob(batch["y"])
        found = plain.loss(program, guide, data) - more.loss(program, guide, data)
    assert abs(found - 2 * log_q.mean()) < 1e-12


# ---- fitting, staging, evaluating -------------------------------------------------------------------


def small(name):
    torch.manual_seed(3)
    program = {"vade": VaDE, "m2": M2}[name](4, K, 2, (5,))
    guide = Amortized(program, ["x"], (5,))
    if name == "m2":
        parts = Classifier(program, "y", ["x"], (5,)), Amortized(program, ["x", "y"], (5,))
        guide = Sequential(*parts)
    y, known = torch.randint(K, (12,)), torch.arange(12) < 5
    return program, guide, {"x": torch.rand(12, 4), "y": (y, known)}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fits_run(objective, tmp_path):
    program, guide, data = small("m2")
    before = [x.clone() for x in (*program.parameters(), *guide.parameters())]
    options = {"batch_size": 6, "progress": False, "folder": tmp_path}
    fit(program, guide, data, objective=OBJECTIVES[objective](2), epochs=1, **options)
    again = OBJECTIVES[objective](2)
    result = fit(program, guide, data, objective=again, epochs=2, resume=True, **options)
    assert result.epoch == 2
    after = [*program.parameters(), *guide.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(ValueError, match="other settings"):
        fit(program, guide, data, objective=IWELBO(7), epochs=3, resume=True, **options)


@pytest.mark.parametrize("objective", ["elbo, stl", "iwelbo, dreg", "wake-sleep"])
def test_staged_losses_are_those_of_the_objective(objective):
    program, guide, data = small("m2")
    objective = OBJECTIVES[objective](2, split=False)
    staged = stage(objective, program, guide, data, compile=False)
    assert staged.how == "graph", staged.reason
    right = gradients(objective, program, guide, {"x": data["x"], "y": data["y"]}, seed=5)
    torch.manual_seed(5)
    loss = staged(data)
    torch.manual_seed(5)
    eager = objective.differentiable_loss(program, guide, data)
    torch.testing.assert_close(loss.detach(), eager.detach())
    for half, net in (("p", program), ("q", guide)):
        for parameter, x in net.named_parameters():
            grad = right[f"{half}.{parameter}"]
            torch.testing.assert_close(x.grad, -grad / 12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evaluation_does_not_depend_on_the_objective(objective):
    program, guide, data = small("vade")
    right = evaluate(program, guide, data)
    assert evaluate(program, guide, data, OBJECTIVES[objective](4)) == right


def test_stock_optimisation():
    program, guide, data = small("m2")
    p, q = register(program, "program"), register(guide, "guide")
    before = [x.clone() for x in guide.parameters()]
    for objective in (EnumELBO(gradient="stl"), IWELBO(2, gradient="dreg")):
        pyro.infer.SVI(p, q, pyro.optim.Adam({"lr": 0.01}), objective).step(data)
    assert all(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


# ---- what is refused --------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.Normal(self.net(batch["x"]), 1.0).to_event(1))


def test_noise_that_is_no_site_is_refused_where_the_guide_runs_twice():
    program, _, data = small("vade")
    guide = Noisy()
    for objective in (EnumELBO(gradient="stl"), IWELBO(2, gradient="dreg")):
        guide.train()
        with pytest.raises(ValueError, match=r"draws noise that is no site \(Dropout"):
            objective.differentiable_loss(program, guide, data)
        guide.eval()
        objective.differentiable_loss(program, guide, data).backward()
    IWELBO(2).differentiable_loss(program, guide.train(), data)


class Markov(nn.Module):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = 0
            for t in pyro.markov(range(2)):
                y = pyro.sample(
                    f"y_{t}", dist.Categorical(torch.tensor([[0.3, 0.7], [0.6, 0.4]])[y])
                )
            pyro.sample("x", dist.Normal(y.double(), 1.0))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_has_no_bound_of_rows(objective):
    objective = OBJECTIVES[objective](2)
    with pytest.raises(ValueError, match="not available here: site 'y_0' lies in a markov context"):
        objective.differentiable_loss(Markov(), Empty(), {"x": torch.randn(3)})


@pytest.mark.parametrize("objective", SEVERAL)
def test_sites_that_all_rows_share(objective):
    case = CASES["globals"]
    objective = OBJECTIVES[objective](2, inputs=("noise",))
    with pytest.raises(ValueError, match=r"'means' is shared by all rows.*EnumELBO"):
        objective.differentiable_loss(*case.pair(), case.data())


def test_sticking_the_landing_takes_sites_that_all_rows_share():
    case = CASES["globals"]
    program, guide = case.pair()
    plain = EnumELBO(2, kl="sampled", inputs=("noise",))
    path = EnumELBO(2, gradient="stl", inputs=("noise",))
    assert (
        abs(path.loss(program, guide, case.data()) - plain.loss(program, guide, case.data()))
        < 1e-12
    )
    path.differentiable_loss(program, guide, case.data()).backward()


class Observing(Toy):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.weight * z, 1.0), obs=torch.ones(len(batch)))


def test_wrong_options():
    program, guide, data = small("vade")
    with pytest.raises(ValueError, match="gradient is one of total, stl, dreg, got 'path'"):
        IWELBO(gradient="path")
    with pytest.raises(ValueError, match="gradient is one of total, stl, got 'dreg'"):
        EnumELBO(gradient="dreg")
    with pytest.raises(ValueError, match="gradient is one of total, got 'stl'"):
        ReweightedWakeSleep(gradient="stl")
    with pytest.raises(ValueError, match="alpha is a finite number, got inf"):
        RenyiBound(math.inf)
    with pytest.raises(ValueError, match=r"insomnia is a number in \[0, 1\], got 1.5"):
        ReweightedWakeSleep(insomnia=1.5)
    with pytest.raises(TypeError, match="kl"):
        IWELBO(kl="closed")
    objective = IWELBO(2)
    objective.weights["z"] = 0.5
    with pytest.raises(ValueError, match="term of 'z' has a weight"):
        objective.loss(program, guide, data)
    scaled = poutine.scale(program, scale=0.5)
    with pytest.raises(ValueError, match=r"'y' has a poutine\.scale"):
        IWELBO(2).loss(scaled, guide, data)


def test_what_reweighted_wake_sleep_cannot_do():
    few = {"x": torch.ones(4)}
    with pytest.raises(ValueError, match=r"computes site 'z' \(a Delta\)"):
        ReweightedWakeSleep(2).loss(Toy(), Lifted(4), few)
    with pytest.raises(ValueError, match="observes 'x' itself"):
        ReweightedWakeSleep(2, 0.5).loss(Observing(), ToyGuide(4), Batch.of(4))
    awake = ReweightedWakeSleep(2).loss(Observing(), ToyGuide(4), Batch.of(4))
    assert math.isfinite(awake)
