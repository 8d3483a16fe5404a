"""Programs that are written in another way than most: what they depend on, and where they live."""

import contextlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineTransform
from torch import nn

from pyrozoo.guides import Amortized
from pyrozoo.inference import (
    Batch,
    EnumELBO,
    fit,
    log_evidence,
    posterior,
    predict,
    responsibilities,
    to_arviz,
)
from pyrozoo.inference.graph import read_graph


def in_plate(body):
    def program(batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            body(z)

    return program


def write_item(z):
    loc = torch.zeros(len(z), 3)
    loc[..., 0] = z[..., 1]
    pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))


def write_view(z):
    loc = torch.zeros(len(z), 3)
    loc[..., :2].copy_(z)
    pyro.sample("x", dist.Normal(2 * loc, 1.0).to_event(1))


def write_added(z):
    loc = torch.zeros(len(z), 2)
    loc.add_(z)
    pyro.sample("x", dist.Normal(loc.tanh(), 1.0).to_event(1))


def write_out(z):
    loc = torch.empty(len(z), 2)
    torch.exp(z, out=loc)
    pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))


def write_second(z):
    """Into a tensor that is itself computed from a draw."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    both = w * 1.0
    both[..., 0] = z[..., 0]
    pyro.sample("x", dist.Normal(both, 1.0).to_event(1))


def ordered(z):
    cuts = torch.tensor([-1.0, 1.0])
    pyro.sample("x", dist.OrderedLogistic(z.sum(-1), cuts))


@pytest.mark.parametrize(
    "body", [write_item, write_view, write_added, write_out, write_second, ordered]
)
def test_what_is_written_in_place_is_followed(body):
    sites = read_graph(in_plate(body), Batch.of(5)).sites
    assert sites["x"].parents == ({"z", "w"} if body is write_second else {"z"})


def test_numbers_made_of_draws_are_noted():
    def body(z):
        loc = torch.tensor([z[0, 0], z[0, 1]])
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))

    assert "test_unusual.py" in read_graph(in_plate(body), Batch.of(5)).turned["z"]


class Shares(nn.Module):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Multinomial(20, p))


def test_multinomials_and_their_sizes():
    program = Shares()
    x = dist.Multinomial(20, torch.tensor([0.2, 0.3, 0.5])).sample((40,))
    guide = Amortized(program, ["x"], hidden=(16,))
    fit(program, guide, {"x": x}, epochs=150, lr=0.02, batch_size=40, progress=False)
    exact = dist.DirichletMultinomial(torch.ones(3), 20).log_prob(x)
    found = log_evidence(program, guide, {"x": x}, 2000)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1)


class Circle(nn.Module):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.VonMises(0.5, 2.0))
            pyro.sample("x", dist.Normal(torch.stack([z.cos(), z.sin()], -1), 0.5).to_event(1))


class Scaled(nn.Module):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            fn = dist.TransformedDistribution(dist.Beta(2.0, 3.0), [AffineTransform(-1.0, 2.0)])
            z = pyro.sample("z", fn)
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 0.5).to_event(1))


@pytest.mark.parametrize(("program", "reach"), [(Circle(), math.pi), (Scaled(), 1.0)])
def test_supports_that_are_less_than_declared(program, reach):
    x = torch.randn(30, 2 if isinstance(program, Circle) else 1) * 0.5
    guide = Amortized(program, ["x"], hidden=(16,))
    fit(program, guide, {"x": x}, epochs=150, lr=0.02, batch_size=30, progress=False)
    draws = posterior(program, guide, {"x": x}, 100, seed=0)["z"]
    assert draws.abs().max() < reach
    line = torch.linspace(-reach, reach, 4001)[1:-1]
    given = pyro.poutine.condition(program, {"z": line})
    nodes = pyro.poutine.trace(given).get_trace(Batch.of(len(line))).nodes
    joint = nodes["z"]["fn"].log_prob(line) + nodes["x"]["fn"].log_prob(x.unsqueeze(1))
    exact = joint.logsumexp(-1) + math.log(2 * reach / 4000)
    found = log_evidence(program, guide, {"x": x}, 2000)
    # a mode at the seam of the circle is cut in two, and one part found late
    assert (found - exact).mean().abs() < 0.03
    assert (found - exact).abs().max() < 0.3


class Correlated(nn.Module):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            low = torch.tensor([[1.0, 0.0], [0.5, 0.8]])
            a = pyro.sample("a", dist.MultivariateNormal(torch.zeros(2), scale_tril=low))
            b = pyro.sample("b", dist.MultivariateNormal(a, scale_tril=low))
            pyro.sample("x", dist.Normal(b, 1.0).to_event(1))


def test_a_full_guide_of_a_correlated_prior():
    program, x = Correlated(), torch.randn(20, 2)
    guide = Amortized(program, ["x"], hidden=(8,), family="full")
    fit(program, guide, {"x": x}, epochs=2, progress=False)
    lines = EnumELBO().explain(program, guide, {"x": x})
    assert any("closed form" in line for line in lines)


class Counted(nn.Module):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            c = pyro.sample("c", dist.Poisson(3.0))
            pyro.sample("x", dist.Normal(c, 0.5))


def test_counts_that_are_proposed_can_be_drawn():
    program, x = Counted(), torch.tensor([1.0, 4.0, 6.0])
    guide = Amortized(program, ["x"], hidden=(8,))
    draws = posterior(program, guide, {"x": x}, 5, seed=0)["c"]
    assert draws.shape == (5, 3)
    assert (draws == draws.round()).all()
    assert predict(program, guide, {"x": x}, "c", seed=0).shape == (3,)
    assert predict(program, guide, {"x": x}, "x", seed=0).shape == (3,)


class Computed(nn.Module):
    """Deterministic sites of a row, of all rows, of a plate, and of both, before and after x."""

    def forward(self, batch):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("parts", 3):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.deterministic("doubled", 2 * w)
        pyro.deterministic("shares", w.softmax(-1))
        pyro.deterministic("root", rate.sqrt())
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            pyro.deterministic("level", 2.0 * k)
            pyro.deterministic("pair", torch.cat([z, z], -1))
            total = pyro.deterministic("total", z.sum(-1), event_dim=0)
            pyro.sample("x", dist.Normal(total + k + w[..., :1] + rate, 0.3))


def test_what_is_deterministic_is_in_posteriors_predictions_and_arviz():
    program, x = Computed(), torch.randn(7)
    guide = Amortized(program, ["x"], hidden=(8,))
    draws = posterior(program, guide, {"x": x}, 5, seed=0)
    assert torch.allclose(draws["doubled"], 2 * draws["w"])
    assert torch.allclose(draws["shares"], draws["w"].softmax(-1))
    assert torch.allclose(draws["root"], draws["rate"].sqrt())
    assert torch.allclose(draws["level"], 2.0 * draws["k"])
    assert torch.allclose(draws["pair"], draws["z"].repeat(1, 1, 2))
    assert torch.allclose(draws["total"], draws["z"].sum(-1))
    one = posterior(program, guide, {"x": x}, 1, seed=0)
    assert {n: v.shape[1:] for n, v in one.items()} == {n: v.shape[1:] for n, v in draws.items()}
    z, pair = (
        predict(program, guide, {"x": x}, n, num_samples=4000, seed=0) for n in ("z", "pair")
    )
    assert torch.allclose(pair, z.repeat(1, 2), atol=0.1)
    pytest.importorskip("arviz")
    found = to_arviz(program, guide, {"x": x}, 4, num_particles=4, seed=0)
    assert {n: v.shape[2:] for n, v in found["posterior"].data_vars.items()} == {
        "rate": (), "w": (3,), "doubled": (3,), "shares": (3,), "root": (), "z": (7, 2), "k": (7,),
        "level": (7,), "pair": (7, 4), "total": (7,),
    }  # fmt: skip
    assert set(found["posterior_predictive"].data_vars) == {"x"}
    with pytest.raises(ValueError, match="is not a finite site"):
        responsibilities(program, guide, {"x": x}, "level")


def process(batch):
    t = batch["t"]
    kernel = torch.exp(-2 * (t[:, None] - t).abs())
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(t)), kernel))
    with pyro.plate("data", len(batch)):
        pyro.sample("x", dist.Normal(f, 0.3))


def test_a_shared_site_with_an_entry_for_each_row():
    t = torch.linspace(0.0, 3.0, 20)
    data = {"x": t.sin() + 0.1 * torch.randn(20), "t": t}
    guide = Amortized(process, example=data, family="full")
    result = fit(process, guide, data, inputs=["t"], epochs=800, lr=0.03, progress=False)
    kernel = torch.exp(-2 * (t[:, None] - t).abs())
    exact = kernel @ torch.linalg.solve(kernel + 0.09 * torch.eye(20), data["x"])
    assert (result.posterior(data, 500, seed=0)["f"].mean(0) - exact).abs().max() < 0.1
    short = Amortized(process, example={n: v[:5] for n, v in data.items()})
    with pytest.raises(
        ValueError, match=r"'f' .*\(20,\) .*\(5,\) .*all rows have to be taken at once"
    ):
        fit(process, short, data, inputs=["t"], epochs=1, progress=False)


def test_a_plate_that_takes_a_part_of_the_rows_says_what_to_write():
    def program(batch):
        with pyro.plate("data", len(batch), subsample_size=10):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    with pytest.raises(ValueError, match=r"subsample_size=\): write .*fit\(batch_size=\)"):
        Amortized(program, ["x"])


# ---- counts whose number of trials differs from row to row -----------------------------------------

TRIALS = torch.tensor([5.0, 7.0, 9.0, 4.0])


def trials(batch):
    m = pyro.sample("m", dist.Beta(1.0, 1.0))
    with pyro.plate("data", len(batch)):
        k = pyro.sample("k", dist.Binomial(batch["n"], m))
        if "x" in batch:
            pyro.sample("x", dist.Normal(k, 1.0))


@pytest.mark.parametrize("known", [[True] * 4, [True, True, False, True]])
def test_counts_of_differing_trials_are_observed(known):
    present, k = torch.tensor(known), torch.tensor([1.0, 2.0, 8.0, 0.0])
    data = {"n": TRIALS, "k": (k, present)}
    guide = Amortized(trials, example=data)
    result = fit(
        trials, guide, data, inputs=["n"], epochs=400, lr=5e-2, lr_schedule="cosine", progress=False
    )
    a, b = 1 + k[present].sum(), 1 + (TRIALS - k)[present].sum()
    draws = result.posterior(data, num_samples=1000, seed=0)["m"]
    exact = dist.Beta(a, b)
    assert draws.mean() == pytest.approx(exact.mean.item(), abs=0.02)
    assert draws.std() == pytest.approx(exact.stddev.item(), abs=0.02)


def test_counts_of_differing_trials_are_not_summed():
    data = {"n": TRIALS, "x": torch.ones(4)}
    guide = Amortized(trials, example=data)
    with pytest.raises(ValueError, match=r"'k' \(Binomial\).*different numbers of values"):
        fit(trials, guide, data, inputs=["n"], epochs=1, progress=False)


# ---- one draw at a time, beside plates left of the summed site's own --------------------------------


class Linear(nn.Module):
    """``F.linear(h, w)`` with a drawn w takes one draw; t lies in plate data alone."""

    def __init__(self, depth):
        super().__init__()
        self.depth, self.shift = depth, nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
        outer = [pyro.plate(f"outer{i}", 2 + i, dim=-2 - i) for i in range(self.depth)]
        with pyro.plate("data", len(batch)), contextlib.ExitStack() as stack:
            t = pyro.sample("t", dist.Bernoulli(0.4))
            mean = nn.functional.linear(batch["h"], w).squeeze(-1) + 3 * t + self.shift
            for plate in outer:
                stack.enter_context(plate)
            pyro.sample("x", dist.Normal(mean, 0.3))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_sums_are_drawn_one_at_a_time_in_their_own_plates(depth):
    h, t = torch.zeros(5, 2), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    x = (3 * t).reshape(5, *(1,) * depth).expand(5, *range(2, 2 + depth))
    data, program = {"h": h, "x": x}, Linear(depth)
    guide = Amortized(program, example=data)
    draws = posterior(program, guide, data, num_samples=20, inputs=["h"], seed=0)
    assert draws["w"].shape == (20, 1, 2)
    assert torch.equal(draws["t"], t.expand(20, 5))
    exported = to_arviz(program, guide, data, 4, num_particles=3, inputs=["h"], seed=0)
    assert exported.posterior["t"].shape == (1, 4, 5)


# ---- programs as plain Pyro has them ----------------------------------------------------------------


def tutorial(x, y=None):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(b * x, 1.0), obs=y)


def required(x, y):
    tutorial(x, y)


@pytest.mark.parametrize("program", [tutorial, required])
def test_programs_with_arguments_are_told_what_to_write(program):
    data = {"x": torch.ones(3), "y": torch.ones(3)}
    with pytest.raises(TypeError, match=r"\(x, y\) was called with one batch.*batch\['x'\]"):
        Amortized(program, example=data)


def test_an_option_of_a_program_is_no_argument_of_plain_pyro():
    def program(batch, shift=0.0):
        with pyro.plate("data", len(batch)):
            raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own") as caught:
        Amortized(program)
    assert "was run as program(batch)" in caught.value.__notes__[0]


def test_entries_of_a_summed_site_cannot_be_gathered():
    """Blocks of nodes: Pyro sums them all at once, and the error says what that means."""

    def blocks(batch):
        with pyro.plate("nodes", 3):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5])))
        with pyro.plate("data", len(batch)):
            pyro.sample("x", dist.Normal(c[..., batch["end"]].float(), 1.0))

    data = {"x": torch.ones(4), "end": torch.tensor([0, 1, 2, 0])}
    guide = Amortized(blocks, example=data)
    with (
        pytest.warns(UserWarning, match="falling back to Pyro's TraceEnum_ELBO"),
        pytest.raises((IndexError, RuntimeError, ValueError)) as caught,
    ):
        EnumELBO(inputs=("end",)).loss(blocks, guide, data)
    assert any("cannot pick entries of the plate" in note for note in caught.value.__notes__)


def test_a_width_is_no_sequence():
    with pytest.raises(TypeError, match=r"hidden is a sequence of widths, such as \(8,\), got 8"):
        Amortized(in_plate(write_item), hidden=8)
