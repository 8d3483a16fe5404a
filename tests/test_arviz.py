"""The ArviZ object of a pair, of both generations of ArviZ: what it holds, against exact answers."""

import math
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

arviz = pytest.importorskip("arviz")
matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from cases import Empty, FactorAnalysis, Globals, GlobalsGuide, Mixture  # noqa: E402

from pyrozoo.inference.arviz_export import to_arviz  # noqa: E402
from pyrozoo.inference.evidence import log_evidence  # noqa: E402

NEW = "InferenceData" not in vars(arviz)
F64 = torch.float64


def values(tree, group, name):
    """A variable without its chain, as a tensor."""
    array = tree[group][name]
    assert array.dims[:2] == ("chain", "draw") or group in ("observed_data", "constant_data")
    array = array.isel(chain=0) if "chain" in array.dims else array
    return torch.as_tensor(np.array(array.values))


def groups(tree):
    return {g.strip("/") for g in (tree.groups if NEW else tree.groups())} - {""}


def pointwise(tree):
    """Leave-one-out densities by ``az.loo``: sum and one a row, and the Pareto shapes."""
    found = arviz.loo(tree, pointwise=True)
    if NEW:
        return float(found.elpd), found.elpd_i.values, found.pareto_k.values
    return float(found.elpd_loo), found.loo_i.values, found.pareto_k.values


# ---- one mean for all rows --------------------------------------------------------------------------


class Mean(nn.Module):
    """m ~ N(0, 2), z_n ~ N(m, t) if there is a t, x_n ~ N(z_n or m, s)."""

    def __init__(self, noise=1.0, spread=0.0):
        super().__init__()
        self.noise, self.spread = noise, spread

    @property
    def scale(self):
        """Standard deviation of x_n given m."""
        return math.hypot(self.noise, self.spread)

    def forward(self, batch):
        zero = torch.zeros((), dtype=F64)
        m = pyro.sample("m", dist.Normal(zero, 2.0))
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(m, self.spread)) if self.spread else m
            pyro.sample("x", dist.Normal(z, self.noise))

    def posterior(self, x):
        precision = 1 / 4 + x.shape[-1] / self.scale**2
        return x.sum(-1) / self.scale**2 / precision, precision**-0.5

    def leave_one_out(self, x):
        """log p(x_n | all other rows), in closed form."""
        rest = torch.stack([torch.cat([x[:n], x[n + 1 :]]) for n in range(len(x))])
        loc, scale = self.posterior(rest)
        return dist.Normal(loc, math.hypot(scale, self.scale)).log_prob(x)


class MeanGuide(nn.Module):
    """The exact posterior of m, perhaps too wide; z_n | x_n, m is right but for its scale."""

    def __init__(self, program, x, wide=1.0):
        super().__init__()
        self.program, self.wide = program, wide
        self.loc, self.scale = program.posterior(x)

    def forward(self, batch):
        m = pyro.sample("m", dist.Normal(self.loc, self.wide * self.scale))
        with pyro.plate("data", len(batch)):
            if self.program.spread:
                s, t = self.program.noise, self.program.spread
                precision = 1 / s**2 + 1 / t**2
                loc = (batch["x"] / s**2 + m / t**2) / precision
                pyro.sample("z", dist.Normal(loc, 1.2 * precision**-0.5))


def sample(rows=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 1.0 + 1.3 * torch.randn(rows, generator=generator, dtype=F64)


@pytest.mark.parametrize("spread", [0.0, 0.8])
def test_leaving_one_row_out_is_right_to_a_hundredth_of_a_nat(spread):
    x = sample()
    program = Mean(1.0, spread)
    tree = to_arviz(program, MeanGuide(program, x), {"x": x}, 2000, batch_size=5)
    m, found = values(tree, "posterior", "m"), values(tree, "log_likelihood", "x")
    exact = dist.Normal(m[:, None], program.scale).log_prob(x)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.5 if spread else 1e-10)
    assert (found - exact).abs().mean() < 0.05
    assert ("integrated" in tree.attrs["log_likelihood"]) == bool(spread)
    total, rows, shapes = pointwise(tree)
    exact = program.leave_one_out(x)
    torch.testing.assert_close(torch.as_tensor(rows), exact, rtol=0, atol=0.03)
    assert abs(total - float(exact.sum())) < 0.06
    assert shapes.max() < 0.7


@pytest.mark.skipif(not NEW, reason="ArviZ 0.x has no correction for a guide")
def test_a_wide_guide_is_corrected_by_log_p_and_log_q():
    x, program = sample(), Mean()
    tree = to_arviz(program, MeanGuide(program, x, 2.0), {"x": x}, 4000)
    stats = tree["sample_stats"]
    found = arviz.loo_approximate_posterior(tree, stats["log_p"], stats["log_q"])
    exact = float(program.leave_one_out(x).sum())
    assert abs(float(found.elpd) - exact) < 0.05
    with pytest.warns(UserWarning, match="Pareto"):
        assert abs(pointwise(tree)[0] - exact) > 0.2


def test_the_right_noise_wins_the_comparison():
    x = sample(40)
    trees, exact = {}, {}
    for name, noise in (("right", 1.3), ("wrong", 3.0)):
        program = Mean(noise)
        trees[name] = to_arviz(program, MeanGuide(program, x), {"x": x}, 1000)
        exact[name] = float(program.leave_one_out(x).sum())
    table = arviz.compare(trees)
    assert list(table.index) == ["right", "wrong"]
    for name in exact:
        assert abs(pointwise(trees[name])[0] - exact[name]) < 0.1
        elpd = table.loc[name, "elpd" if NEW else "elpd_loo"]
        assert abs(float(elpd) - exact[name]) < 0.6  # 1.x rounds it
    assert exact["right"] - exact["wrong"] > 3


# ---- densities of the draws -------------------------------------------------------------------------


def test_summed_labels_shared_means_and_rows_without_anything():
    torch.manual_seed(0)
    program, guide = Globals().double(), GlobalsGuide().double()
    x = torch.randn(9, 4, dtype=F64)
    known = torch.arange(9) != 3
    tree = to_arviz(program, guide, {"x": (x, known)}, 60, batch_size=4)
    means = values(tree, "posterior", "means")
    assert means.shape == (60, 3, 4)
    prior = program.logits.log_softmax(-1).detach()
    joint = dist.Normal(means[:, None], 0.7).to_event(1).log_prob(x[None, :, None]) + prior
    exact = joint.logsumexp(-1)
    found = tree["log_likelihood"]["x"]
    assert found.dims == ("chain", "draw", "data")
    assert list(found["data"].values) == [n for n in range(9) if n != 3]
    torch.testing.assert_close(values(tree, "log_likelihood", "x"), exact[:, known])
    scale = program.spread.exp().detach()
    prior = dist.Normal(torch.zeros(3, 4, dtype=F64), scale).to_event(2).log_prob(means)
    log_p = values(tree, "sample_stats", "log_p")
    torch.testing.assert_close(log_p, prior + exact[:, known].sum(1))
    fn = dist.Normal(guide.loc, guide.log_scale.exp()).to_event(2)
    torch.testing.assert_close(values(tree, "sample_stats", "log_q"), fn.log_prob(means).detach())
    y = values(tree, "posterior", "y")
    probs = joint.softmax(-1)
    probs[:, 3] = program.logits.softmax(-1).detach()
    often = torch.nn.functional.one_hot(y, 3).double().mean(0)
    torch.testing.assert_close(often, probs.mean(0), rtol=0, atol=4 * 0.5 / math.sqrt(60))
    seen = values(tree, "observed_data", "x")
    assert bool(seen[3].isnan().all())
    torch.testing.assert_close(seen[known], x[known])
    assert "summed: y" in tree.attrs["log_likelihood"]
    assert tree.attrs["program"] == "Globals"


def test_shared_sites_that_no_row_tells_of_are_drawn_from_the_prior_once():
    torch.manual_seed(0)
    program, y = Globals().double(), torch.arange(9) % 3
    program.spread.data.fill_(4.0)  # means far apart, so that x tells which they are
    tree = to_arviz(program, GlobalsGuide().double(), {"y": y}, 20, batch_size=4)
    means, x = values(tree, "posterior", "means"), values(tree, "posterior_predictive", "x")
    assert bool(((x - means[:, y]).abs() < 0.7 * 5.5).all())  # in every slice of rows
    evidence = program.logits.log_softmax(-1).detach()[y]
    torch.testing.assert_close(values(tree, "constant_data", "log_evidence"), evidence)


def test_draws_that_do_not_fit_at_once_are_of_the_same_shared_values(monkeypatch):
    monkeypatch.setattr("pyrozoo.inference.comparison.densities.LARGER", 1e-6)
    x, program = sample(), Mean(1.0, 0.8)
    tree = to_arviz(program, MeanGuide(program, x), {"x": x}, 5, num_particles=400, batch_size=5)
    m = values(tree, "posterior", "m")
    assert len(m.unique()) == 5
    exact = dist.Normal(m[:, None], program.scale).log_prob(x)
    torch.testing.assert_close(values(tree, "log_likelihood", "x"), exact, rtol=0, atol=0.2)


class Exact(nn.Module):
    """The exact posterior of factor analysis."""

    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, batch):
        weight, noise = self.program.linear.weight, (2 * self.program.log_scale).exp()
        precision = torch.eye(2, dtype=F64) + weight.T @ (weight / noise.unsqueeze(1))
        loc = (batch["x"] - self.program.linear.bias) @ (weight / noise.unsqueeze(1))
        loc = torch.linalg.solve(precision, loc.T).T
        with pyro.plate("data", len(batch)):
            fn = dist.MultivariateNormal(loc, precision_matrix=precision)
            pyro.sample("z", fn)


def factor_analysis():
    torch.manual_seed(1)
    program = FactorAnalysis().double()
    return program, Exact(program), {"x": torch.randn(7, 5, dtype=F64)}


def test_rows_that_share_nothing_have_an_evidence_and_no_log_likelihood():
    program, guide, data = factor_analysis()
    tree = to_arviz(program, guide, data, 20, batch_size=3, dims={"z": ["factor"]})
    assert groups(tree) == {
        "posterior", "posterior_predictive", "sample_stats", "observed_data", "constant_data"
    }  # fmt: skip
    evidence = log_evidence(program, guide, data, 2)
    torch.testing.assert_close(values(tree, "constant_data", "log_evidence"), evidence)
    ratio = values(tree, "sample_stats", "log_p") - values(tree, "sample_stats", "log_q")
    torch.testing.assert_close(ratio, evidence.expand(20, 7))  # the guide is the posterior
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data", "factor")
    assert tree["posterior_predictive"]["x"].shape == (1, 20, 7, 5)
    assert "log_evidence" in tree.attrs["log_likelihood"]
    with pytest.raises((TypeError, AttributeError, KeyError, ValueError)):
        arviz.loo(tree)


def test_generated_values_have_the_moments_of_the_posterior_predictive():
    program, guide, data = factor_analysis()
    tree = to_arviz(program, guide, data, 4000)
    fn, weight = guide.program, program.linear.weight
    noise = (2 * fn.log_scale).exp()
    precision = torch.eye(2, dtype=F64) + weight.T @ (weight / noise.unsqueeze(1))
    loc = (data["x"] - program.linear.bias) @ (weight / noise.unsqueeze(1))
    loc = torch.linalg.solve(precision, loc.T).T @ weight.T + program.linear.bias
    scale = (noise + (weight @ precision.inverse() @ weight.T).diagonal()).sqrt()
    x = values(tree, "posterior_predictive", "x")
    assert bool(((x.mean(0) - loc).abs() < 4.5 * scale / math.sqrt(4000)).all())
    assert bool(((x.std(0) / scale - 1).abs() < 4.5 / math.sqrt(8000)).all())


def test_what_is_known_of_a_label_is_kept():
    torch.manual_seed(0)
    program = Mixture().double()
    x, y = torch.randn(6, 4, dtype=F64), torch.tensor([0, 2, 1, 1, 0, 2])
    known = torch.arange(6) % 2 == 0
    tree = to_arviz(program, Empty(), {"x": x, "y": (y, known)}, 30)
    drawn = values(tree, "posterior", "y")
    assert bool((drawn[:, known] == y[known]).all())
    assert len(drawn[:, ~known].unique()) > 1
    seen = values(tree, "observed_data", "y")
    torch.testing.assert_close(seen[known], y[known].double())
    assert bool(seen[~known].isnan().all())
    tree = to_arviz(program, Empty(), {"x": x, "y": y}, 4)
    assert "posterior" not in groups(tree)
    assert set(tree["posterior_predictive"].data_vars) == {"x"}  # y is known, and x follows it
    assert not np.isnan(tree["observed_data"]["y"].values).any()


# ---- plates, inputs, what the program observes itself -----------------------------------------------


class Topics(nn.Module):
    """A shared mean of each topic, loadings of each sensor in a row, a covariate, own data."""

    def __init__(self, own=None):
        super().__init__()
        self.own = own

    def forward(self, batch):
        with pyro.plate("topics", 3, dim=-2):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        covariate = batch["t"] if "t" in batch.names else 0.0
        with pyro.plate("data", len(batch), dim=-1):
            shift = a.sum(-1).sum(-2, keepdim=True) + covariate
            with pyro.plate("sensors", 4, dim=-2):
                y = pyro.sample("y", dist.Bernoulli(0.3))
                pyro.sample("x", dist.Normal(shift + y, 0.5), obs=self.own)


class TopicsGuide(nn.Module):
    def forward(self, batch):
        with pyro.plate("topics", 3, dim=-2):
            pyro.sample("a", dist.Normal(torch.zeros(2), 0.5).to_event(1))


@pytest.mark.parametrize("own", [False, True])
def test_plates_give_their_names_to_the_dimensions(own):
    torch.manual_seed(0)
    x, t = torch.randn(5, 4), torch.randn(5)
    data = {"t": t} if own else {"x": x, "t": t}
    program, labels = Topics(x.T if own else None), list("vwxyz")
    options = {"inputs": ["t"], "coords": {"data": labels, "side": ["l", "r"]}}
    tree = to_arviz(program, TopicsGuide(), data, 7, dims={"a": ["side"]}, **options)
    assert tree["posterior"]["a"].dims == ("chain", "draw", "topics", "side")
    assert tree["posterior"]["y"].dims == ("chain", "draw", "data", "sensors")
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "sensors")
    assert list(tree["posterior"]["y"]["data"].values) == labels
    torch.testing.assert_close(values(tree, "observed_data", "x"), x)
    torch.testing.assert_close(values(tree, "constant_data", "t"), t)
    assert len(values(tree, "posterior_predictive", "x").unique()) == 7 * 5 * 4
    a = values(tree, "posterior", "a").double()
    loc = a.sum((1, 2))[:, None] + t
    by_value = [
        math.log(p) + dist.Normal(loc[..., None] + y, 0.5).log_prob(x)
        for y, p in ((0.0, 0.7), (1.0, 0.3))
    ]
    exact = torch.stack(by_value).logsumexp(0).sum(-1)
    torch.testing.assert_close(
        values(tree, "log_likelihood", "x"), exact, rtol=1e-5, atol=1e-4, check_dtype=False
    )


# ---- plots ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["shared", "rows"])
def test_the_plots_of_arviz_run(case):
    if case == "shared":
        x, program = sample(), Mean()
        tree = to_arviz(program, MeanGuide(program, x), {"x": x}, 100)
    else:
        tree = to_arviz(*factor_analysis(), 100, coords={"data": list("abcdefg")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the plots' own
        if NEW:
            arviz.plot_trace(tree, backend="matplotlib")
            arviz.plot_dist(tree, backend="matplotlib")
            arviz.plot_forest(tree, backend="matplotlib")
            arviz.plot_ppc_dist(tree, backend="matplotlib")
        else:
            arviz.plot_trace(tree)
            arviz.plot_posterior(tree)
            arviz.plot_forest(tree)
            arviz.plot_ppc(tree)
        summary = arviz.summary(tree)
    assert len(summary) == (1 if case == "shared" else 14)
    matplotlib.pyplot.close("all")


# ---- what is refused, and what is left alone --------------------------------------------------------


class PointMass(nn.Module):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.Delta(torch.zeros(2, dtype=F64), event_dim=1))


def test_a_point_mass_has_no_densities_and_says_so():
    program, _, data = factor_analysis()
    tree = to_arviz(program, PointMass(), data, 4)
    assert groups(tree) == {"posterior", "posterior_predictive", "observed_data"}
    assert "'z' as a point mass" in tree.attrs["log_likelihood"]


def test_what_is_refused(monkeypatch):
    program, guide, data = factor_analysis()
    with pytest.raises(ValueError, match="num_draws"):
        to_arviz(program, guide, data, 0)
    with pytest.raises(ValueError, match="num_particles"):
        to_arviz(program, guide, data, 2, num_particles=1)
    with pytest.raises(ValueError, match=r"an event of shape \(2,\): 'z' has \['a', 'b'\]"):
        to_arviz(program, guide, data, 2, dims={"z": ["a", "b"]})
    with pytest.raises(ValueError, match="no site: 'v'"):
        to_arviz(program, guide, data, 2, dims={"v": ["a"]})
    with pytest.raises(ValueError, match="3 labels of 'data'"):
        to_arviz(program, guide, data, 2, coords={"data": [1, 2, 3]})
    with pytest.raises(ValueError, match="not a site"):
        to_arviz(program, guide, {**data, "w": data["x"]}, 2)
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install \"pyrozoo\[arviz\]\""):
        to_arviz(program, guide, data, 2)


def test_seeds_repeat_and_the_random_state_is_left_alone():
    x, program = sample(), Mean(1.0, 0.8)
    guide = MeanGuide(program, x)
    state = torch.get_rng_state()
    trees = [to_arviz(program, guide, {"x": x}, 3, seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (values(t, "log_likelihood", "x") for t in trees)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
