"""Plain Pyro: everything that Pyro does to a program works on an observed one, with the same numbers."""

import itertools
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    TraceEnum_ELBO,
    config_enumerate,
    infer_discrete,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.inspect import get_dependencies, get_model_relations
from torch import Tensor, nn

from pyrozoo.inference import Batch, EnumELBO, observe, pair, register

N, K = 5, 3
KNOWN = torch.tensor([True, False, True, False, False])
LABELS = torch.tensor([2, 0, 1, 1, 2])


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


def normal(loc: Any, scale: Any = 1.0) -> Any:
    return dist.Normal(loc, scale).to_event(1)


X, T = torch.randn(N, 2).double(), torch.randn(N, 2).double()


class Program(nn.Module):
    """y -> z -> x, and y -> t; y is summed unless a guide proposes it."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.loc = nn.Parameter(torch.randn(K)), nn.Parameter(torch.randn(K, 2))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", normal(self.loc[y], 0.5))
            pyro.sample("x", normal(z, 0.8))
            pyro.sample("t", normal(-self.loc[y]))


class Guide(nn.Module):
    def __init__(self, labels: bool = False) -> None:
        super().__init__()
        self.labels = labels
        self.loc, self.logits = nn.Parameter(torch.randn(K, 2)), nn.Parameter(torch.randn(K))

    def forward(self, batch: Batch) -> None:
        x = batch["x"] if "x" in batch else torch.zeros(len(batch), 2)
        with pyro.plate("data", len(batch)):
            shift = self.loc[0]
            if self.labels:
                y = pyro.sample("y", dist.Categorical(logits=self.logits + x[:, :1]))
                shift = self.loc[y]
            pyro.sample("z", normal(0.4 * x + shift, 0.6))


def stock(p: Any, q: Any, batch: Batch, particles: int = 1) -> Tensor:
    elbo = TraceEnum_ELBO(
        max_plate_nesting=1,
        num_particles=particles,
        vectorize_particles=particles > 1,
        strict_enumeration_warning=False,
    )
    return elbo.differentiable_loss(p, q, batch)


ENTRIES = torch.tensor([[True, False], [True, True], [False, False], [False, True], [True, True]])
OBSERVED: list[dict[str, Any]] = [
    {"x": X},
    {"x": (X, KNOWN)},
    {"x": (X, ENTRIES)},
    {"x": (X, KNOWN), "t": (T, ~KNOWN)},
    {"x": X, "t": T},
    {"x": X, "y": LABELS},
    {"x": X, "y": (LABELS, KNOWN)},
    {"x": (X, ~KNOWN), "y": (LABELS, KNOWN), "t": (T, ENTRIES)},
    {"t": T, "y": (LABELS, KNOWN)},
    {"x": X, "z": (T, KNOWN)},
    {"x": X, "z": (T, ENTRIES), "y": (LABELS, ~KNOWN)},
    {"y": (LABELS, KNOWN)},
    {"x": X, "z": T, "y": LABELS, "t": T},
]


@pytest.mark.parametrize(
    "data", OBSERVED, ids=lambda d: "-".join(n + "*" * isinstance(v, tuple) for n, v in d.items())
)
@pytest.mark.parametrize("labels", [False, True], ids=["program", "guide"])
@pytest.mark.parametrize("particles", [1, 3])
def test_both_bounds_agree(data: dict[str, Any], labels: bool, particles: int) -> None:
    program, guide = Program(), Guide(labels)
    p, q = pair(program, guide)
    batch = Batch.of(data)
    params = [*program.parameters(), *guide.parameters()]
    found = []
    p.pairing.plan(p.pairing.prepare(batch))
    for ours in (True, False):
        torch.manual_seed(1)
        elbo = EnumELBO(num_particles=particles, kl="sampled", split=False)
        loss = elbo.differentiable_loss(p, q, batch) * N if ours else stock(p, q, batch, particles)
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        found.append(
            (
                loss,
                [
                    torch.zeros_like(v) if g is None else g
                    for v, g in zip(params, grads, strict=True)
                ],
            )
        )
    (loss, grads), (other, others) = found
    torch.testing.assert_close(loss, other, rtol=1e-10, atol=1e-10)
    for g, h in zip(grads, others, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-10)


# ---- SVI -------------------------------------------------------------------------------------------


def weights(net: nn.Module) -> list[Tensor]:
    return [v.detach().clone() for v in net.parameters()]


@pytest.mark.parametrize("elbo", ["stock", "ours", "ours, bare"])
def test_svi_trains_what_is_registered(elbo: str) -> None:
    program, guide = Program(), Guide()
    p: Any
    q: Any
    p, q = (program, guide) if "bare" in elbo else pair(program, guide)
    objective = TraceEnum_ELBO(max_plate_nesting=1) if elbo == "stock" else EnumELBO()
    svi = SVI(register(p), register(q), pyro.optim.Adam({"lr": 0.05}), objective)
    batch = Batch.of({"x": X + 3, "y": (LABELS, KNOWN)})
    before = weights(program) + weights(guide)[:1]
    losses = [svi.step(batch) for _ in range(40)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(
        not torch.equal(a, b)
        for a, b in zip(before, weights(program) + weights(guide)[:1], strict=True)
    )
    names = set(pyro.get_param_store().keys())
    assert len(names) == 4
    if "bare" not in elbo:
        assert {n.split("$$$")[0] for n in names} == {"program", "guide"}


def test_svi_trains_nothing_that_is_not_registered() -> None:
    program, guide = Program(), Guide()
    p, q = pair(program, guide)
    svi = SVI(p, q, pyro.optim.Adam({"lr": 0.05}), EnumELBO())
    before = weights(program)
    svi.step(Batch.of({"x": X}))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(program), strict=True))
    assert not list(pyro.get_param_store().keys())


def test_registered_halves_still_belong_together() -> None:
    p, q = pair(Program(), Guide())
    batch = Batch.of({"x": X})
    torch.manual_seed(0)
    expected = EnumELBO().loss(p, q, batch)
    torch.manual_seed(0)
    assert EnumELBO().loss(register(p, "a"), register(q, "b"), batch) == expected
    module = register(Program(), "mine")
    module(Batch.of(2))
    assert {n.split("$$$")[0] for n in pyro.get_param_store()} == {"a", "b", "mine"}


def test_a_torch_optimiser_needs_no_registration() -> None:
    program, guide = Program(), Guide()
    loss_fn = EnumELBO()(program, guide)
    optimiser = torch.optim.Adam(loss_fn.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = loss_fn({"x": X + 3})
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


# ---- sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel: bool) -> None:
    program = Program()
    prior = Predictive(program, num_samples=7, parallel=parallel)(Batch.of(4))
    assert prior["y"].shape == (7, 4)
    assert prior["x"].shape == (7, 4, 2)
    _, q = pair(program, Guide())
    batch = Batch.of({"x": X, "y": (LABELS, KNOWN)})
    posterior = Predictive(program, guide=q, num_samples=200, parallel=parallel)(batch)
    assert posterior["x"].shape == (200, N, 2)
    spread = posterior["z"].std(0)
    torch.testing.assert_close(spread, torch.full_like(spread, 0.6), rtol=0.3, atol=0)
    # The likelihood's noise on top of the guide's, around the guide's mean.
    torch.testing.assert_close(posterior["x"].mean(0), posterior["z"].mean(0), rtol=0, atol=0.3)
    alone = Predictive(observe(program), num_samples=7, parallel=parallel)(batch)
    known = alone["y"].reshape(7, N)[:, KNOWN]
    assert torch.equal(known, LABELS[KNOWN].expand(7, -1))


def test_predictive_replaces_known_labels() -> None:
    _, q = pair(Program(), Guide(labels=True))
    batch = Batch.of({"x": X, "y": (LABELS, KNOWN)})
    y = Predictive(Program(), guide=q, num_samples=50)(batch)["y"]
    assert torch.equal(y[:, KNOWN], LABELS[KNOWN].expand(50, -1))
    assert y[:, ~KNOWN].unique().numel() > 1


@pytest.mark.parametrize("temperature", [0, 1])
def test_infer_discrete(temperature: int) -> None:
    program = Program()
    with torch.no_grad():
        program.loc.copy_(torch.tensor([[-20.0, 0], [0, 20], [20, 0]]))
    z = program.loc[LABELS].detach() + 0.1
    wrong = (torch.zeros(N).long(), KNOWN)
    batch = Batch.of({"x": X, "t": -program.loc[LABELS], "y": wrong})
    conditioned = poutine.condition(observe(program), data={"z": z})
    inferred = infer_discrete(conditioned, first_available_dim=-2, temperature=temperature)
    y = poutine.trace(inferred).get_trace(batch).nodes["y"]["value"]
    assert y.tolist() == torch.where(KNOWN, 0, LABELS).tolist()


def test_exact_posteriors_of_the_stock_bound() -> None:
    program, guide = Program(), Guide()
    p, q = pair(program, guide)
    batch = Batch.of({"x": X, "t": T, "y": (LABELS, KNOWN)})
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    assert elbo.compute_marginals(p, q, batch)["y"].probs.shape == (N, K)
    draws = torch.stack([_posterior_draw(elbo, p, q, batch) for _ in range(5)])
    assert torch.equal(draws[:, KNOWN], LABELS[KNOWN].expand(5, -1))


def _posterior_draw(elbo: Any, p: Any, q: Any, batch: Batch) -> Tensor:
    with poutine.trace() as trace:
        elbo.sample_posterior(p, q, batch)
    return trace.trace.nodes["y"]["value"]


def test_trace_and_replay() -> None:
    p, q = pair(Program(), Guide(labels=True))
    batch = Batch.of({"x": (X, KNOWN), "y": (LABELS, KNOWN)})
    guide_trace = poutine.trace(q).get_trace(batch)
    trace = poutine.trace(poutine.replay(p, guide_trace)).get_trace(batch)
    assert torch.equal(trace.nodes["z"]["value"], guide_trace.nodes["z"]["value"])
    assert torch.equal(trace.nodes["y"]["value"][KNOWN], LABELS[KNOWN])
    assert trace.nodes["x"]["is_observed"]
    trace.compute_log_prob()
    assert torch.equal(trace.nodes["x"]["log_prob"] != 0, KNOWN)


@pytest.mark.parametrize("merged", [False, True])
def test_without_enumeration_no_known_label_carries_an_offset(merged: bool) -> None:
    program, guide = Program(), Guide(labels=True)
    p, q = pair(program, guide)
    batch = Batch.of({"x": X, "y": LABELS})
    if merged:
        batch = batch.hide("y", torch.ones(N).bool())
    trace = poutine.trace(q).get_trace(batch)
    model = poutine.trace(poutine.replay(p, trace)).get_trace(batch)
    z = trace.nodes["z"]["value"]
    loc = program.loc[LABELS]
    exact = (
        program.logits.log_softmax(-1)[LABELS]
        + normal(loc, 0.5).log_prob(z)
        + normal(z, 0.8).log_prob(X)
    )
    torch.testing.assert_close(model.log_prob_sum(lambda name, _: name != "t"), exact.sum())
    exact = normal(0.4 * X + guide.loc[LABELS], 0.6).log_prob(z)
    torch.testing.assert_close(trace.log_prob_sum(), exact.sum())


def test_relations_can_be_drawn() -> None:
    relations = get_model_relations(Program(), (Batch.of(3),))
    assert relations["sample_sample"]["x"] == ["x", "z"] or "z" in relations["sample_sample"]["x"]
    observed = get_model_relations(observe(Program()), ({"x": X, "t": (T, KNOWN)},))
    assert set(observed["observed"]) == {"x", "t"}
    assert set(observed["plate_sample"]["data"]) == {"y", "z", "x", "t"}
    dependencies = get_dependencies(observe(Program()), ({"x": X},))
    assert set(dependencies["prior_dependencies"]["z"]) == {"y", "z"}


# ---- MCMC ------------------------------------------------------------------------------------------


def test_nuts_recovers_the_posterior_of_a_tiny_mixture() -> None:
    x = torch.tensor([-2.0, -1.5, 1.0, 2.5])
    y, known = torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, False, True])

    def program(batch: Batch) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(m * (2 * y - 1), 1.0))

    grid = torch.linspace(-8, 8, 4001)
    log_p = dist.Normal(0.0, 2.0).log_prob(grid)
    for value, label, sure in zip(x, y, known, strict=True):
        parts = [
            dist.Bernoulli(0.4).log_prob(torch.tensor(float(k)))
            + dist.Normal(grid * (2 * k - 1), 1.0).log_prob(value)
            for k in (0, 1)
        ]
        log_p = log_p + (parts[int(label)] if sure else torch.logaddexp(*parts))
    weight = (log_p - log_p.logsumexp(0)).exp()
    mean = (weight * grid).sum()
    spread = (weight * (grid - mean) ** 2).sum().sqrt()

    kernel = NUTS(observe(program), max_plate_nesting=1)
    chain = MCMC(kernel, num_samples=250, warmup_steps=80, disable_progbar=True)
    chain.run(Batch.of({"x": x, "y": (y, known)}))
    draws = chain.get_samples()["m"]
    assert set(chain.get_samples()) == {"m"}
    assert float(draws.mean()) == pytest.approx(float(mean), abs=0.15)
    assert float(draws.std()) == pytest.approx(float(spread), rel=0.25)


# ---- guides and models from Pyro -------------------------------------------------------------------


@pytest.mark.parametrize("auto", [AutoNormal, AutoDelta, AutoMultivariateNormal])
@pytest.mark.parametrize(
    "data",
    [{"x": X}, {"x": X, "y": (LABELS, KNOWN)}, {"x": X, "z": (T, KNOWN)}],
    ids=["x", "labels", "partly"],
)
def test_autoguides(auto: Any, data: dict[str, Any]) -> None:
    program = Program()
    guide = auto(poutine.block(program, hide=["y", "x", "t"]))
    p, q = pair(program, guide)
    batch = p.pairing.prepare(data)
    if auto is AutoMultivariateNormal and "z" in data:
        with pytest.raises(ValueError, match="_latent' once for all of plate 'data', but 'z'"):
            EnumELBO().loss(p, q, batch)
        return
    p.pairing.plan(batch)  # creates the parameters of an autoguide
    before = {n: v.detach().clone() for n, v in guide.named_parameters()}
    losses = []
    for elbo in (EnumELBO(kl="sampled", split=False), TraceEnum_ELBO(max_plate_nesting=1)):
        torch.manual_seed(2)
        losses.append(elbo.differentiable_loss(p, q, batch))
    torch.testing.assert_close(losses[0] * N, losses[1])
    if "z" in data and auto is AutoNormal:
        scale = (
            guide.scales.z_unconstrained
            if hasattr(guide.scales, "z_unconstrained")
            else guide.scales.z
        )
        (grad,) = torch.autograd.grad(
            EnumELBO(kl="sampled").differentiable_loss(p, q, batch), [scale]
        )
        assert torch.equal(grad.any(-1), ~KNOWN)  # no entropy of rows that are known
    optimiser = torch.optim.Adam(q.parameters(), lr=0.02)
    for _ in range(15):
        optimiser.zero_grad()
        EnumELBO().loss_and_grads(p, q, batch)
        optimiser.step()
    assert any(not torch.equal(before[n], v) for n, v in guide.named_parameters())


def test_models_that_enumerate_by_themselves() -> None:
    program, guide = Program(), Guide(labels=True)
    for expand, data in itertools.product(
        (False, True), ({"x": X, "t": T}, {"x": X, "y": (LABELS, KNOWN)}, {"x": X, "y": LABELS})
    ):
        for proposal in (guide, Guide()):
            results = []
            for model, other in (
                (program, proposal),
                (
                    config_enumerate(program, expand=expand),
                    config_enumerate(proposal, expand=expand),
                ),
            ):
                p, q = pair(model, other)
                p.pairing.plan(p.pairing.prepare(data))
                torch.manual_seed(4)
                loss = EnumELBO(kl="sampled", split=False).differentiable_loss(p, q, data)
                torch.manual_seed(4)
                torch.testing.assert_close(stock(p, q, Batch.of(data)), loss * N)
                results.append((loss, *torch.autograd.grad(loss, [*program.parameters()])))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


def test_a_model_with_obs_mask() -> None:
    def foreign(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(z), obs=X, obs_mask=KNOWN)

    def guide(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            pyro.sample("z", normal(0.3 * X, 0.5))

    rows = []
    for program, data in ((foreign, N), (lambda b: _plain(b), {"x": (X, KNOWN)})):
        p, q = pair(program, guide)
        p.pairing.plan(p.pairing.prepare(data))
        torch.manual_seed(0)
        rows.append(EnumELBO(kl="sampled").per_row(p, q, data))
    # Values that a program brings itself count in every row: its own mask is its own business.
    torch.testing.assert_close(rows[0][KNOWN], rows[1][KNOWN])


def _plain(batch: Batch) -> None:
    with pyro.plate("data", len(batch)):
        z = pyro.sample("z", normal(torch.zeros(2)))
        pyro.sample("x", normal(z))
