"""Programs unlike the catalogue: each gets a guide, is fitted, and what is true is found again.

Nobody writes a guide here: ``Amortized(program)`` makes it from the program.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import (
    abundance,
    bayesian_network,
    change_point,
    errors_in_variables,
    factor_analysers,
    hidden_markov,
    item_response,
    meta_analysis,
    regression,
    state_space,
    survival_times,
    topics,
    two_views,
    zero_inflated,
)
from pyro.infer import SVI, Predictive, TraceEnum_ELBO
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import nn

from pyrozoo.guides.amortized import Amortized
from pyrozoo.inference import Batch, EnumELBO, fit, pair, register


def fitted(
    program,
    data,
    epochs=40,
    lr=0.03,
    inputs=(),
    batch_size=64,
    gain=0.1,
    hidden=(16,),
    start=None,
    **options,
):
    """The result of a fit with the default guide; the bound has to grow by ``gain`` nats a row."""
    example = {"example": data} if inputs else {}
    guide = Amortized(program, hidden=hidden, **example, **options)
    if start is not None:
        start(guide)
    result = fit(
        program, guide, data, epochs=epochs, lr=lr, lr_schedule=lambda t: 1 - 0.9 * t / epochs,
        batch_size=batch_size, inputs=inputs, progress=False, device="cpu",
    )  # fmt: skip
    first, last = (
        sum(r["bound"] for r in part) for part in (result.history[:3], result.history[-3:])
    )
    assert last > first + 3 * gain
    return result


def draws(result, data, count=300):
    """Means of what the guide draws, by site, with the shapes of the program."""
    batch = Batch.of(data)
    with torch.no_grad():
        found = [result.guide(batch) for _ in range(count)]
    return {name: torch.stack([f[name] for f in found]).mean(0) for name in found[0]}


def accuracy(found, truth, count):
    """Share of rows whose cluster is the true one, under the best naming of the clusters."""
    table = torch.zeros(count, count)
    for a, b in zip(found.tolist(), truth.tolist(), strict=True):
        table[a, b] += 1
    rows, columns = linear_sum_assignment(-table.numpy())
    return float(table[rows, columns].sum() / len(truth))


# ---- programs with globals -----------------------------------------------------------------------


def test_regression_with_missing_covariates():
    data, truth = regression.simulate(300, 0)
    result = fitted(regression.Regression(), data, 60, inputs=regression.INPUTS, gain=1.0)
    means = draws(result, data)
    x, present = data["x"]
    missing = ~present
    rival = (x * present).sum(0) / present.sum(0)
    error = (means["x"] - truth["x"])[missing].square().mean()
    torch.testing.assert_close(means["slope"], truth["slope"], rtol=0, atol=0.25)
    assert abs(float(means["b"]) - truth["b"]) < 0.2
    assert error < 0.6 * (rival - truth["x"])[missing].square().mean()


@pytest.mark.parametrize("name", ["program", "collapsed"])
def test_topics(name):
    data, truth = topics.simulate(150, 0)
    result = fitted(
        getattr(topics, name), data, 100, 0.05, gain=1.0, read_globals=False,
        start=lambda guide: nn.init.normal_(guide.raw["topic_loc"]),  # else topics start too alike
    )  # fmt: skip
    found = draws(result, data, 30)["topic"]
    distance = (found.unsqueeze(1) - truth["topic"]).abs().sum(-1) / 2
    rows, columns = linear_sum_assignment(distance.numpy())
    assert distance[rows, columns].max() < 0.25  # two topics are 0.97 apart


def test_item_response():
    data, truth = item_response.simulate(300, 0)
    result = fitted(item_response.program, data, 60, 0.05, gain=0.5)
    means = draws(result, data, 50)
    error = (means["difficulty"].squeeze() - truth["difficulty"]).square().mean().sqrt()
    low, high = means["discrimination"].squeeze().reshape(-1, 2).mean(0)
    answer, present = data["answer"]
    rival = -torch.logit((answer * present).sum(0) / present.sum(0))
    of_rival = (rival - truth["difficulty"]).square().mean().sqrt()
    raw = (answer * present).sum(-1) / present.sum(-1)
    with_model, with_scores = (
        torch.corrcoef(torch.stack([v, truth["ability"]]))[0, 1] for v in (means["ability"], raw)
    )
    assert error < of_rival
    assert low < high - 0.3  # 0.8 and 2.0
    assert with_model > with_scores


def test_bayesian_network():
    data, truth = bayesian_network.simulate(100, 0)
    program = bayesian_network.BayesianNetwork()
    result = fitted(program, data, 100, inputs=bayesian_network.INPUTS, gain=1.0)
    sampled = Predictive(program, guide=result.guide, num_samples=50, return_sites=["_RETURN"])
    mean = sampled(Batch.of(data))["_RETURN"].mean(0)
    drawn = result.posterior(data, 50, predictive=True, seed=0)  # one by one: layers take no plates
    assert drawn["hidden.weight"].shape == (50, 8, 1)
    assert (drawn["y"].mean(0) - mean).abs().mean() < 0.1
    line = torch.stack([data["x"], torch.ones(100)], -1)
    line = line @ torch.linalg.lstsq(line, data["y"].unsqueeze(-1)).solution
    assert (mean - truth["f"]).square().mean() < 0.03
    assert (line.squeeze() - truth["f"]).square().mean() > 0.3


def grid_means(log_p, *values):
    weight = (log_p - log_p.logsumexp((0, 1))).exp()
    return [float((weight * v).sum()) for v in values]


@pytest.mark.parametrize("name", ["program", "factored"])
def test_censored_survival_times(name):
    data, _ = survival_times.simulate(150, 0)
    inputs = survival_times.INPUTS
    if name == "factored":
        data, inputs = {**data, "followed": data["t"]}, [*inputs, "followed"]
    result = fitted(getattr(survival_times, name), data, inputs=inputs)
    b, shape = torch.meshgrid(torch.linspace(0, 2, 200), torch.linspace(0.5, 3, 200), indexing="ij")
    log_p = dist.Normal(0.0, 1.0).log_prob(b) + dist.LogNormal(0.0, 0.5).log_prob(shape)
    hazard = (data["t"] / (b.unsqueeze(-1) * data["c"]).exp()) ** shape.unsqueeze(-1)
    event = (shape.unsqueeze(-1) * hazard / data["t"]).log() * ~data["censored"]
    exact = grid_means(log_p + (event - hazard).sum(-1), b, shape)
    means = draws(result, data)
    assert [float(means["b"]), float(means["shape"])] == pytest.approx(exact, abs=0.06)


def test_errors_in_variables():
    data, _ = errors_in_variables.simulate(150, 0)
    means = draws(fitted(errors_in_variables.program, data, 60, 0.1, gain=1.0), data)
    grid = torch.meshgrid(torch.linspace(-1, 2, 200), torch.linspace(0.3, 3, 200), indexing="ij")
    a, b = (v.double() for v in grid)
    exact = grid_means(errors_in_variables.log_posterior(data, a, b), a, b)
    assert [float(means["a"]), float(means["b"])] == pytest.approx(exact, abs=0.1)
    squares = torch.cov(torch.stack([data["x"], data["y"]]))
    assert squares[0, 1] / squares[0, 0] < exact[1] - 0.3


def test_meta_analysis():
    data, _ = meta_analysis.simulate(20, 0)
    result = fitted(meta_analysis.program, data, 300, inputs=meta_analysis.INPUTS)
    means = draws(result, data)
    mu, tau = meta_analysis.exact_means(data)
    assert float(means["mu"]) == pytest.approx(mu, abs=0.15)
    assert float(means["tau"]) == pytest.approx(tau, abs=0.3)


# ---- programs with finite sites --------------------------------------------------------------------


def test_mixture_of_factor_analysers():
    data, truth = factor_analysers.simulate(300, 0)
    program = factor_analysers.FactorAnalysers()
    result = fitted(program, data, gain=0.5)
    bound = result.evaluate(data, num_particles=50)["bound"]
    with torch.no_grad():
        exact = float(program.log_evidence(data["x"]).mean())
    found = result.responsibilities(data).argmax(-1)
    rival = torch.as_tensor(KMeans(3, n_init=3, random_state=0).fit_predict(data["x"].numpy()))
    assert exact - 0.3 < bound < exact + 0.02
    assert accuracy(found, truth["y"], 3) > accuracy(rival, truth["y"], 3)


def test_two_views():
    data, truth = two_views.simulate(300, 0)
    result = fitted(two_views.TwoViews(), data, gain=0.3)
    found = result.responsibilities(data).argmax(-1)
    assert accuracy(found, truth["y"], 3) > 0.85  # under one naming for all rows


def test_zero_inflated_counts():
    data, truth = zero_inflated.simulate(500, 0)
    program = zero_inflated.ZeroInflated()
    result = fitted(program, data, inputs=zero_inflated.INPUTS)
    found = torch.stack(
        [program.gate.bias, program.gate.weight[0], program.rate.bias, program.rate.weight[0]]
    )
    expected = torch.cat([truth["a"], truth["b"]]).unsqueeze(-1)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=0.3)
    idle = result.responsibilities(data, "idle")[:, 1]
    assert (idle[data["x"] > 0] < 1e-3).all()
    assert torch.corrcoef(torch.stack([idle, truth["idle"].float()]))[0, 1] > 0.7


def test_parameters_of_pyro_are_trained_by_pyro():
    data, truth = zero_inflated.simulate(500, 0)
    guide = Amortized(zero_inflated.program, example=data)
    with pytest.raises(ValueError, match="parameter to train"):
        fit(zero_inflated.program, guide, data, inputs=["c"], progress=False, device="cpu")
    p, q = pair(zero_inflated.program, guide, inputs=["c"])
    svi = SVI(register(p), register(q), pyro.optim.Adam({"lr": 0.05}), EnumELBO())
    for _ in range(150):
        svi.step(data)
    found = torch.stack([pyro.param("a").detach(), pyro.param("b").detach()])
    torch.testing.assert_close(found, torch.stack([truth["a"], truth["b"]]), rtol=0, atol=0.3)


def test_hidden_markov_model():
    data, truth = hidden_markov.simulate(200, 0)
    program = hidden_markov.HiddenMarkov()
    result = fitted(program, data, 20, gain=0.3)
    with torch.no_grad():
        exact = float(program.log_evidence(truth["x"]).mean())
    assert result.evaluate(data)["bound"] == pytest.approx(exact, abs=1e-4)
    stay = program.transition.softmax(-1).diag().detach()
    torch.testing.assert_close(stay, truth["transition"].diag(), rtol=0, atol=0.12)
    found = torch.stack([result.responsibilities(data, f"y_{t}")[:, 1] for t in range(6)], -1) > 0.5
    apart = truth["x"] > 0
    smoothed, alone = ((v == truth["y"]).float().mean() for v in (found, apart))
    assert smoothed > alone


def test_markov_context():
    data, truth = hidden_markov.simulate(100, 0)
    program = hidden_markov.HiddenMarkov(markov=True)
    with pytest.warns(UserWarning, match="TraceEnum_ELBO: site 'y_0' lies in a markov context"):
        result = fitted(program, data, 60, batch_size=100, gain=0.3)
    with torch.no_grad():
        exact = float(program.log_evidence(truth["x"]).mean())
    with pytest.warns(UserWarning, match="falling back"):
        assert -EnumELBO().loss(program, result.guide, data) == pytest.approx(exact, abs=1e-4)


def test_state_space_model():
    data, truth = state_space.simulate(300, 0)
    program = state_space.StateSpace()
    result = fitted(program, data, 40, gain=0.1)
    bound = result.evaluate(data, num_particles=50)["bound"]
    with torch.no_grad():
        exact = float(program.log_evidence(truth["x"]).mean())
    assert exact - 0.1 < bound < exact + 0.02
    assert program.phi.item() == pytest.approx(truth["phi"], abs=0.12)


def test_change_point_of_all_rows():
    data, _ = change_point.simulate(0)
    with pytest.warns(UserWarning, match="'change' is outside the plate over the data"):
        result = fitted(change_point.program, data, 150, 0.1, inputs=change_point.INPUTS)
    p, q = pair(change_point.program, result.guide, inputs=change_point.INPUTS)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    probs = elbo.compute_marginals(p, q, Batch.of(data))["change"].probs.squeeze()
    exact = change_point.log_joint(data["x"]).softmax(-1)
    assert (probs - exact).abs().sum() / 2 < 0.3


def test_change_point_of_each_row():
    rows = [change_point.simulate(seed, 4 + seed % 22)[0]["x"] for seed in range(128)]
    data = {"x": torch.stack(rows)}
    result = fitted(change_point.series, data, 120, 0.01, hidden=(32,), gain=3.0)
    probs = result.responsibilities(data, "change")
    exact = torch.stack([change_point.log_joint(x).softmax(-1) for x in rows])
    time = torch.arange(change_point.LENGTH, dtype=torch.float)
    assert (probs @ time - exact @ time).abs().mean() < 1.0


def test_abundance():
    data, truth = abundance.simulate(200, 0)
    program = abundance.Abundance()
    result = fitted(program, data, 40, 0.1, gain=0.05)
    with torch.no_grad():
        exact = float(program.log_evidence(data["x"]).mean())
        found = (program.log_rate.exp() * program.logit.sigmoid()).item()
    assert result.evaluate(data)["bound"] == pytest.approx(exact, abs=1e-4)
    assert found == pytest.approx(truth["rate"] * truth["p"], abs=0.15)
    counts = torch.arange(abundance.LARGEST + 1.0)
    expected = result.responsibilities(data, "n") @ counts
    fewest = data["x"].amax(-1)
    assert (expected - truth["n"]).abs().mean() < 0.75 * (fewest - truth["n"]).abs().mean()


def test_abundance_without_a_largest_number():
    data, _ = abundance.simulate(200, 0)
    program = abundance.Abundance(truncated=False)
    guide = Amortized(program, hidden=(16,))  # proposes counts below those that were seen
    with (
        pytest.warns(UserWarning, match="site 'n' of the guide is neither summed nor repara"),
        pytest.raises(FloatingPointError, match="the loss is inf"),
    ):
        fit(program, guide, data, batch_size=200, progress=False, device="cpu")
