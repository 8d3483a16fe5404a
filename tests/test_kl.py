"""Where a closed-form divergence is valid, and what goes wrong where it is not."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from cases import CASES, Hierarchy, Ladder
from torch import nn

from pyrozoo.guides import Amortized, Classifier, Mean, Sequential
from pyrozoo.inference import Batch, EnumELBO
from pyrozoo.inference.bounds.kl import closed_form_sites
from pyrozoo.zoo.clustering import VaDE

ROWS = 7


pytestmark = pytest.mark.usefixtures("double")


def reasons(p, q, data):
    objective = EnumELBO()
    halves = objective.pair(p, q)
    batch = Batch.of(data)
    return closed_form_sites(halves[0].pairing.plan(batch), *halves, batch)


def bias(p, q, data, closed, particles=20_000):
    """The distance, in standard errors, of forced closed forms from the sampled bound."""
    objective = EnumELBO(particles, kl="sampled")
    halves = objective.pair(p, q)
    batch = Batch.of(data).to(dtype=torch.float64)
    plan = halves[0].pairing.plan(batch)
    found = []
    for reason in (None, "forced"):
        with torch.no_grad():
            if reason:
                objective.kl = "closed"
                plan.cache["closed_form"] = dict.fromkeys(closed, "")
            found.append(objective._evaluate_whole(*halves, batch).rows.mean(1))
    a, b = found
    return (a.mean() - b.mean()).abs().item() / math.sqrt((a.var() + b.var()).item() / particles)


def vade(guide):
    program = VaDE(5, 3, 2, (6,))
    with torch.no_grad():
        program.loc.mul_(2)
    x, y = torch.rand(ROWS, 5), torch.randint(3, (ROWS,))
    return program, guide(program), x, y


def test_vade():
    p, q, x, y = vade(lambda program: Amortized(program, ["x"], (6,)))
    assert "y, which is summed" in reasons(p, q, {"x": x})["z"]
    assert "y, which is summed" in reasons(p, q, {"x": x, "y": (y, y > 0)})["z"]
    assert reasons(p, q, {"x": x, "y": y}) == {"z": ""}
    assert reasons(p, q, {"y": y}) == {}  # z drops out


def test_vade_with_an_independent_classifier_is_valid():
    parts = lambda p: (Classifier(p, "y", ["x"], (6,)), Amortized(p, ["x"], (6,)))  # noqa: E731
    p, q, x, y = vade(lambda program: Sequential(*parts(program)))
    for data in ({"x": x}, {"x": x, "y": (y, y > 0)}, {"x": x, "y": y}):
        assert reasons(p, q, data) == {"z": ""}
    assert bias(p, q, {"x": x}, ["z"]) < 4


def test_forced_closed_form_with_y_drawn_from_z_is_wrong():
    class Posterior(nn.Module):
        """q(z | x), and y from its exact conditional given z."""

        def __init__(self, program):
            super().__init__()
            self.first = Amortized(program, ["x"], (6,))
            self.program = (program,)

        def forward(self, batch):
            (program,) = self.program
            density = dist.Normal(program.loc, program.scale).to_event(1)
            with pyro.plate("data", len(batch)):
                z = pyro.sample("z", self.first.distribution("z", batch))
                logits = program.logits + density.log_prob(z.unsqueeze(-2))
                pyro.sample("y", dist.Categorical(logits=logits))

    p, q, x, y = vade(Posterior)
    assert "y, which the guide draws from z" in reasons(p, q, {"x": x})["z"]
    assert reasons(p, q, {"x": x, "y": y}) == {"z": ""}
    assert bias(p, q, {"x": x}, ["z"]) > 10
    assert bias(p, q, {"x": x, "y": y}, ["z"]) < 4


def test_forcing_the_closed_form_under_a_sum_is_wrong():
    p, q, x, _ = vade(lambda program: Amortized(program, ["x"], (6,)))
    exact = EnumELBO(20_000, kl="sampled").loss(p, q, {"x": x})
    # log sum_y p(y) exp(-KL(q || p(.|y))) in place of E log sum_y p(y) p(z|y) - log q(z)
    normal = q.distribution("z", Batch.of({"x": x}))
    part = dist.Normal(p.loc.unsqueeze(1), p.scale.unsqueeze(1)).to_event(1)
    kl = torch.distributions.kl_divergence(normal, part)
    prior = (p.logits.log_softmax(0).unsqueeze(1) - kl).logsumexp(0)
    z = normal.sample((20_000,))
    wrong = -(prior + p.decoder(z).log_prob(x).mean(0)).mean().item()
    assert abs(wrong - exact) > 0.05


def test_ladders():
    data = {"x": torch.randn(ROWS, 5)}
    p = Hierarchy()
    down, up = Ladder(top_down=True), Ladder(top_down=False)
    with torch.no_grad():  # z_1 and z_2 are far from independent
        p.prior.weight.copy_(2 * torch.eye(3, 2))
        up.second.weight.copy_(2 * torch.eye(2, 3))
        up.log_scales.copy_(torch.tensor([0.0, -2.0]))
    assert reasons(p, down, data) == {"z_2": "", "z_1": ""}
    found = reasons(p, up, data)
    assert found["z_2"] == ""
    assert "z_2, which the guide draws from z_1" in found["z_1"]  # though all sites are Gaussian
    assert bias(p, down, data, ["z_1", "z_2"]) < 4
    assert bias(p, up, data, ["z_2"]) < 4
    assert bias(p, up, data, ["z_1", "z_2"]) > 10


class One(nn.Module):
    """z ~ N(0, 1), x | z, each half wrapped at z by a handler or a change of its distribution."""

    def __init__(self, loc, handler=None, change=None, observe=True):
        super().__init__()
        self.loc = nn.Parameter(torch.as_tensor(loc))
        self.handler, self.change, self.observe = handler, change, observe

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            fn = dist.Normal(self.loc, 1.0)
            fn = self.change(fn) if self.change else fn
            if self.handler:
                with self.handler:
                    z = pyro.sample("z", fn)
            else:
                z = pyro.sample("z", fn)
            if self.observe:
                pyro.sample("x", dist.Normal(z, 1.0))


def one(program=None, guide=None, **changes):
    p = One(0.0, program, changes.get("program_change"))
    q = One(0.5, guide, changes.get("guide_change"), observe=False)
    return p, q, {"x": torch.randn(ROWS)}


MASK = torch.arange(ROWS) % 2 == 0


@pytest.mark.parametrize(
    ("program", "guide", "reason"),
    [
        (None, None, ""),
        (lambda: poutine.scale(scale=2.0), None, "scaled differently"),
        (None, lambda: poutine.scale(scale=2.0), "scaled differently"),
        (lambda: poutine.scale(scale=2.0), lambda: poutine.scale(scale=2.0), ""),
        (lambda: poutine.mask(mask=MASK), None, "masked"),
        (None, lambda: poutine.mask(mask=MASK), "masked"),
        (lambda: poutine.mask(mask=MASK), lambda: poutine.mask(mask=~MASK), "masked"),
    ],
)
def test_scales_and_masks_of_the_user(program, guide, reason):
    p, q, data = one(program and program(), guide and guide())
    found = reasons(p, q, data)["z"]
    assert (reason in found) if reason else found == ""
    torch.manual_seed(1)
    closed = EnumELBO().differentiable_loss(p, q, data)
    torch.manual_seed(1)
    sampled = EnumELBO(kl="sampled").differentiable_loss(p, q, data)
    assert torch.equal(closed, sampled) == bool(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"program_change": lambda fn: fn.mask(MASK)}, "masked"),
        ({"guide_change": lambda fn: fn.mask(MASK)}, "masked"),
        ({"program_change": lambda fn: dist.StudentT(3.0, fn.loc, fn.scale)}, "no closed form"),
        ({"guide_change": lambda fn: dist.Delta(fn.loc, log_density=fn.loc)}, "point mass"),
    ],
)
def test_distributions_without_a_closed_form(change, reason):
    p, q, data = one(**change)
    assert reason in reasons(p, q, data)["z"]
    assert math.isfinite(EnumELBO().loss(p, q, data))


def test_parents_are_found_through_point_masses():
    class Through(nn.Module):
        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])))
                mean = pyro.sample("mean", dist.Delta(torch.tensor([-2.0, 2.0])[y]))
                z = pyro.sample("z", dist.Normal(mean, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0))

    p, q, data = Through(), One(0.5, observe=False), {"x": torch.randn(ROWS)}
    y = torch.randint(2, (ROWS,))
    assert "y, which is summed" in reasons(p, q, data)["z"]
    assert reasons(p, q, {**data, "y": y}) == {"z": ""}
    each = []
    for known in ({}, *({"y": torch.full((ROWS,), k)} for k in (0, 1))):
        torch.manual_seed(1)
        each.append(EnumELBO(kl="sampled").per_row(p, q, {**data, **known}))
    torch.testing.assert_close(each[0], torch.stack(each[1:]).logsumexp(0))


def test_masks_of_missing_rows_are_no_masks_of_the_user():
    p, q, data = one()
    assert reasons(p, q, {"x": (data["x"], MASK)}) == {"z": ""}
    rows = EnumELBO().per_row(p, q, {"x": (data["x"], MASK)})
    assert not rows[~MASK].any()


def test_a_site_that_is_partly_observed_is_sampled():
    p, q, data = one()
    assert reasons(p, q, {**data, "z": (torch.randn(ROWS), MASK)}) == {}


def test_mean_of_a_guide_is_its_own_draw():
    case = CASES["mvae"]
    p, replay = case.pair()
    data = {n: v for n, v in case.data().items() if n != "noise"}
    assert "point mass" in reasons(p, Mean(replay.guide), data)["z"]


def test_looking_for_closed_forms_changes_nothing():
    p, q, x, _ = vade(lambda program: Amortized(program, ["x"], (6,)))
    q.networks["z"].trunk = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5))
    objective = EnumELBO()
    objective.loss(p, q, {"x": x})
    state = torch.random.get_rng_state()
    reasons(p, q, {"x": x})
    assert torch.equal(state, torch.random.get_rng_state())
    assert q.training
    assert p.training
