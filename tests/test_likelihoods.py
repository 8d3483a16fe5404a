"""Likelihoods against closed forms, for extreme outputs, under masks and in draws."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats
from torch import nn

from pyrozoo.guides import Amortized
from pyrozoo.inference import Batch, EnumELBO
from pyrozoo.zoo import networks
from pyrozoo.zoo.networks import densities

F64 = torch.float64
COUNTS = torch.tensor([0.0, 1.0, 2.0, 7.0, 40.0, 900.0], dtype=F64)
UNIT = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999], dtype=F64)
REAL = torch.tensor([-40.0, -1.0, 0.0, 0.3, 90.0], dtype=F64)
MAKERS = {
    "normal": lambda shape: networks.Normal(shape, "predicted"),
    "student_t": lambda shape: networks.StudentT(shape, "predicted", "predicted"),
    "log_normal": lambda shape: networks.LogNormal(shape, "predicted"),
    "beta": lambda shape: networks.Beta(shape, "predicted"),
    "continuous_bernoulli": networks.ContinuousBernoulli,
    "poisson": networks.Poisson,
    "negative_binomial": lambda shape: networks.NegativeBinomial(shape, "predicted"),
    "zero_inflated_negative_binomial": lambda shape: networks.ZeroInflatedNegativeBinomial(
        shape, "predicted"
    ),
}
VALUES = {
    "normal": REAL,
    "student_t": REAL,
    "log_normal": REAL.abs() + 0.01,
    "beta": UNIT,
    "continuous_bernoulli": torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0], dtype=F64),
    **dict.fromkeys(
        ["poisson", "negative_binomial", "zero_inflated_negative_binomial"], COUNTS[:5]
    ),
}
NAMES = list(MAKERS)


def softplus(x):
    return math.log1p(math.exp(x)) + networks.MIN_SCALE


# ---- closed forms -----------------------------------------------------------------------------------


def closed_form(name, a, b, c):
    """scipy's distribution with the parameters that outputs a, b and c stand for."""
    if name == "normal":
        return stats.norm(a, softplus(b))
    if name == "student_t":
        return stats.t(2 + softplus(c), a, softplus(b))
    if name == "log_normal":
        return stats.lognorm(softplus(b), scale=math.exp(a))
    if name == "beta":
        mean, size = special.expit(a), softplus(b)
        return stats.beta(mean * size, (1 - mean) * size)
    if name == "poisson":
        return stats.poisson(math.exp(a))
    total, mean = math.exp(-b), math.exp(a)
    return stats.nbinom(total, total / (total + mean))


CLOSED = ["normal", "student_t", "log_normal", "beta", "poisson", "negative_binomial"]
PARAMS = {"student_t": 3, "poisson": 1}


@pytest.mark.parametrize("outputs", [(0.0, 0.0, 0.0), (1.3, -2.0, 1.0), (-2.5, 3.0, -3.0)])
@pytest.mark.parametrize("name", CLOSED)
def test_density_and_moments_are_those_of_scipy(name, outputs):
    value = VALUES[name]
    params = torch.tensor(outputs[: PARAMS.get(name, 2)], dtype=F64)
    fn = MAKERS[name](())(params)
    other = closed_form(name, *outputs)
    density = getattr(other, "logpmf" if hasattr(other.dist, "pmf") else "logpdf")
    expected = torch.from_numpy(density(value.numpy()))
    torch.testing.assert_close(fn.log_prob(value), expected, rtol=1e-9, atol=1e-9)
    assert fn.mean.item() == pytest.approx(other.mean(), rel=1e-6)
    assert fn.variance.item() == pytest.approx(other.var(), rel=1e-6)


@pytest.mark.parametrize(
    "slope", [-700.0, -30.0, -3.0, -0.31, -0.29, -1e-4, 0.0, 1e-9, 0.02, 5.0, 90.0]
)
def test_the_continuous_bernoulli_is_a_density(slope):
    fn = densities.ContinuousBernoulli(torch.tensor(slope, dtype=F64))
    value = torch.linspace(0, 1, 5, dtype=F64)
    if abs(slope) > 1e-3:  # slope e^(slope x) / (e^slope - 1), in an order that does not overflow
        size = abs(slope)
        far = value if slope > 0 else 1 - value
        expected = math.log(size) - size * (1 - far) - math.log(-math.expm1(-size))
    else:
        expected = slope * (value - 0.5)
    torch.testing.assert_close(
        fn.log_prob(value), expected, rtol=1e-9, atol=1e-6 * (abs(slope) < 1e-3) + 1e-11
    )
    if abs(slope) < 100:
        grid = torch.from_numpy(np.polynomial.legendre.leggauss(200)[0]).add(1) / 2
        weight = torch.from_numpy(np.polynomial.legendre.leggauss(200)[1]) / 2
        density = fn.log_prob(grid).exp() * weight
        assert density.sum().item() == pytest.approx(1, abs=1e-10)
        assert (density * grid).sum().item() == pytest.approx(fn.mean.item(), abs=1e-10)


def test_counts_sum_to_one():
    value = torch.arange(20000, dtype=F64).unsqueeze(-1)
    outputs = torch.randn(7, 3, dtype=F64)
    for name, width in (("negative_binomial", 2), ("zero_inflated_negative_binomial", 3)):
        fn = MAKERS[name](())(outputs[:, :width])
        mass = fn.log_prob(value).exp()
        torch.testing.assert_close(mass.sum(0), torch.ones(7, dtype=F64), rtol=1e-9, atol=0)
        torch.testing.assert_close((mass * value).sum(0), fn.mean, rtol=1e-7, atol=0)


def test_zero_inflation_in_closed_form():
    fn = MAKERS["zero_inflated_negative_binomial"](())(torch.tensor([0.4, -1.0, 0.7], dtype=F64))
    counts = MAKERS["negative_binomial"](())(torch.tensor([0.4, -1.0], dtype=F64))
    value = COUNTS[:5]
    gate = 1 / (1 + math.exp(-0.7))
    expected = (1 - gate) * counts.log_prob(value).exp() + gate * (value == 0).double()
    torch.testing.assert_close(fn.log_prob(value).exp(), expected, rtol=1e-10, atol=0)
    one_sided = MAKERS["zero_inflated_negative_binomial"](())(
        torch.tensor([0.4, -1.0, -40.0], dtype=F64)
    )
    torch.testing.assert_close(one_sided.log_prob(value), counts.log_prob(value))


@pytest.mark.parametrize("total", [1e-6, 0.3, 5.0, 15.99, 16.01, 300.0, 1e9])
def test_ways_do_not_cancel(total):
    count = torch.tensor([0.0, 1.0, 3.0, 15.0, 17.0, 1e3, 1e6], dtype=F64)
    start = torch.full_like(count, total)
    got = densities.log_ways(start, count)
    if total < 1e8:
        expected = [
            special.loggamma(total + k) - special.loggamma(total) - special.loggamma(k + 1)
            for k in count.tolist()
        ]
        torch.testing.assert_close(got, torch.tensor(expected, dtype=F64), rtol=1e-8, atol=1e-8)
    single = densities.log_ways(start.float(), count.float())
    torch.testing.assert_close(single.double(), got, rtol=1e-5, atol=1e-5)
    for x in (total, total * 3):  # the Poisson limit, where plain differences of gammas are noise
        fn = densities.NegativeBinomial(torch.tensor(1.0), torch.tensor(-math.log(x)))
        if x >= 1e9:
            near = dist.Poisson(math.e).log_prob(count[:4].float())
            torch.testing.assert_close(fn.log_prob(count[:4].float()), near, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("levels", [2, 3, 6])
def test_ordered_levels_are_differences_of_a_distribution_function(levels):
    net = networks.Ordered(levels).double()
    even = net(torch.zeros(1, dtype=F64)).probs
    torch.testing.assert_close(
        even, torch.full((levels,), 1 / levels, dtype=F64), rtol=1e-5, atol=0
    )
    with torch.no_grad():
        net.raw_cutpoints.copy_(torch.randn(levels - 1))
    points = net.raw_cutpoints[:1] + torch.cat(
        [
            torch.zeros(1, dtype=F64),
            (nn.functional.softplus(net.raw_cutpoints[1:]) + 1e-4).cumsum(0),
        ]
    )
    where = torch.tensor([[-3.0], [0.4], [2.0]], dtype=F64)
    below = (points - where).sigmoid()
    edges = torch.cat([torch.zeros(3, 1), below, torch.ones(3, 1)], -1)
    torch.testing.assert_close(net(where).probs, edges.diff(dim=-1), rtol=1e-9, atol=1e-12)
    mean = (net(where).probs * torch.arange(levels)).sum(-1)
    assert (mean.diff() > 0).all()  # larger outputs, higher levels


# ---- robustness -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_extreme_outputs_are_finite_in_single_precision(name):
    net = MAKERS[name](())
    ends = torch.tensor([-30.0, -8.0, 0.0, 8.0, 30.0])
    params = torch.cartesian_prod(*[ends] * net.num_params).reshape(-1, 1, net.num_params)
    params.requires_grad_()
    fn = net(params)
    value = VALUES[name].float().clamp(1e-6, 1 - 1e-6) if name == "beta" else VALUES[name].float()
    density = fn.log_prob(value)
    assert density.isfinite().all()
    (gradient,) = torch.autograd.grad(density.sum(), params)
    assert gradient.isfinite().all()
    assert fn.mean.isfinite().all() or name == "log_normal"
    draws = fn.sample((3,))
    assert draws.shape == (3, len(params), 1)
    if name not in ("log_normal", "student_t"):  # whose draws may be beyond single precision
        assert fn.support.check(draws).all()


def test_extreme_outputs_of_ordered_levels_are_finite():
    net = networks.Ordered(5)
    params = torch.tensor([[-30.0], [0.0], [30.0]], requires_grad=True)
    density = net(params).log_prob(torch.arange(5).unsqueeze(-1))
    assert density.isfinite().all()
    for x in (params, net.raw_cutpoints):
        (gradient,) = torch.autograd.grad(density.sum(), x, retain_graph=True)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("lead", [(), (5,), (2, 1, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_any_leading_dimensions(name, lead, event_shape):
    net = MAKERS[name](event_shape)
    params = torch.randn(*lead, net.num_params)
    fn = net(params)
    assert fn.batch_shape == lead
    assert fn.event_shape == event_shape
    value = fn.sample()
    assert value.shape == lead + event_shape
    assert fn.log_prob(value).shape == lead
    wide = fn.expand((4, *lead))
    torch.testing.assert_close(wide.log_prob(value), fn.log_prob(value).expand(4, *lead))
    assert wide.sample().shape == (4, *lead, *event_shape)


@pytest.mark.parametrize("name", NAMES)
def test_draws_have_the_mean(name):
    net = MAKERS[name](())
    params = torch.full((net.num_params,), 0.4)
    if name == "student_t":
        params[-1] = 3.0
    fn = net(params)
    draws = fn.sample((40000,))
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - fn.mean) < 5 * error


@pytest.mark.parametrize("slope", [-6.0, -1e-5, 0.0, 1.0])
def test_draws_of_the_continuous_bernoulli_follow_its_distribution(slope):
    fn = densities.ContinuousBernoulli(torch.tensor(slope, dtype=F64))
    draws = fn.sample((4000,)).numpy()

    def cdf(x):
        return x if abs(slope) < 1e-3 else np.expm1(slope * x) / np.expm1(slope)

    assert stats.kstest(draws, cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_learnt_and_fixed_numbers(name):
    names = {
        "normal": ["scale"], "student_t": ["scale", "df"], "log_normal": ["scale"], "beta": ["concentration"],
        "negative_binomial": ["dispersion"], "zero_inflated_negative_binomial": ["dispersion"],
    }.get(name, [])  # fmt: skip
    make = type(MAKERS[name](3))
    for number in names:
        for given, shape in (("shared", ()), ("learned", (3,)), ("predicted", None), (2.5, None)):
            net = make(3, **{number: given})
            found = {n: p.shape for n, p in net.named_parameters()}
            assert found.get(f"raw_{number}") == shape
            assert net(torch.randn(5, net.num_params)).batch_shape == (5,)
        for wrong in ("fixed", -1.0, math.inf):
            with pytest.raises(ValueError, match=number):
                make(3, **{number: wrong})
    with pytest.raises(ValueError, match="above 1"):
        networks.StudentT(3, df=0.5)


def test_fixed_numbers_are_what_was_given():
    params = torch.zeros(2)
    assert (networks.StudentT(2, 4.0, 0.5)(params).base_dist.df == 4).all()
    assert (networks.StudentT(2, 4.0, 0.5)(params).base_dist.scale == 0.5).all()
    assert (networks.NegativeBinomial(2, 3.0)(params).variance == 4).all()
    found = networks.Beta(2, 6.0)(params).base_dist
    torch.testing.assert_close(found.concentration1, torch.full((2,), 3.0))


# ---- as sites of a program --------------------------------------------------------------------------


class Program(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.decoder = networks.Decoder(2, (4,), 3, spec)

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.decoder(z))


@pytest.mark.parametrize("name", NAMES)
def test_entries_may_be_missing(name):
    program = Program(name)
    guide = Amortized(program, ["x"], (4,))
    batch = Batch.of(4)
    value = program.decoder(torch.zeros(4, 2)).sample()
    known = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]]).bool()
    bounds = []
    for filler in (0.0, -7.5):  # neither is in every support
        x = torch.where(known, value, filler)
        objective = EnumELBO()
        torch.manual_seed(1)
        bounds.append(objective.per_row(program, guide, {"x": (x, known)}))
        assert bounds[-1][-1] == 0
        loss = objective.differentiable_loss(program, guide, {"x": (x, known)})
        for parameter in torch.autograd.grad(loss, list(program.parameters()), allow_unused=True):
            assert parameter is None or parameter.isfinite().all()
    assert torch.equal(*bounds)
    assert len(batch) == 4


@pytest.mark.parametrize(
    ("spec", "wrong", "message"),
    [
        ("beta", 0.0, "numbers above 0 and below 1, but 4 of 4 lie outside .smallest 0"),
        ("beta", 1.0, "numbers above 0 and below 1, but 4 of 4 lie outside .smallest 1"),
        ("continuous_bernoulli", 1.5, r"\[0, 1\]"),
        ("poisson", 0.5, "whole numbers from 0, but 4 of 4 lie outside .smallest 0.5"),
        ("negative_binomial", -1.0, "whole numbers from 0"),
        ("zero_inflated_negative_binomial", -1.0, "whole numbers from 0"),
        ("log_normal", 0.0, "GreaterThan"),
    ],
)
def test_values_outside_the_support_are_named(spec, wrong, message):
    program = Program(spec)
    guide = Amortized(program, ["x"], (4,))
    with pytest.raises(ValueError, match="site 'x' takes values in " + message):
        EnumELBO().loss(program, guide, {"x": torch.full((4, 3), wrong)})


def test_ordered_values_are_classes_of_a_program():
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = networks.Decoder(2, (4,), (4,), "ordered")

        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", self.decoder(z))

    program = Levels()
    guide = Amortized(program, ["x"], (4,))
    levels = torch.tensor([0, 3, 2, 1])
    known = torch.tensor([True, True, False, True])
    rows = EnumELBO().per_row(program, guide, {"x": (levels, known)})
    assert rows.isfinite().all()
    assert rows[2] == 0
    assert Amortized(program, ["x"], (4,)).inputs["z"].widths == [4]


def test_names():
    for name, make in MAKERS.items():
        assert type(networks.likelihood(name, 3)) is type(make(3))
    assert networks.likelihood("student_t(4)", 3).df == 4
    assert networks.likelihood("log_normal(0.5)", 3).scale == 0.5
    assert networks.likelihood("ordered", (5,)).raw_cutpoints.shape == (4,)
    for wrong in ("poisson(3)", "gamma", "student_t(x)"):
        with pytest.raises(ValueError, match=r'expected .*"poisson"'):
            networks.likelihood(wrong, 3)
    with pytest.raises(ValueError, match="num_classes"):
        networks.likelihood("ordered", (5, 2))
    with pytest.raises(ValueError, match="two levels"):
        networks.likelihood("ordered", 1)
