"""Pyro's autoguides: their bound against plain Pyro, draw for draw, and what they refuse."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, autoguide
from torch import nn

from pyrozoo.guides.auto import AUTOGUIDES, Auto
from pyrozoo.inference import EnumELBO, fit, log_evidence, posterior

pytestmark = pytest.mark.usefixtures("double")

ROWS = 4
DATA = {"x": [[0.3, 1.2], [2.0, -0.4], [0.9, 0.8], [-1.5, 0.1]]}


class Program(nn.Module):
    """A positive global, local z on the plane, y of three that is summed."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([[0.0, 1.0], [2.0, 0.0], [-1.0, -1.0]]))

    def forward(self, batch):
        s = pyro.sample("s", dist.LogNormal(torch.tensor(0.0), 0.5))
        with pyro.plate("data", len(batch)):
            y = pyro.sample(
                "y", dist.Categorical(logits=torch.zeros(3)), infer={"enumerate": "parallel"}
            )
            z = pyro.sample("z", dist.Normal(self.loc[y], s.unsqueeze(-1)).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1))


def data():
    return {"x": torch.tensor(DATA["x"])}


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("kind", AUTOGUIDES)
def test_the_bound_is_that_of_plain_pyro_draw_for_draw(kind, particles):
    program = Program()
    torch.manual_seed(5)
    ours = Auto(program, kind, data())
    assert all(p.dtype == torch.float64 for p in ours.parameters())
    names = [n for n, _ in ours.named_parameters()]
    assert names
    model = poutine.condition(program, data={"x": data()["x"]})
    with pyro.settings.context(module_local_params=True):
        torch.manual_seed(5)
        theirs = getattr(autoguide, kind)(poutine.block(model, hide=["y"]))
        theirs(range(ROWS))
        theirs.load_state_dict(ours.guide.state_dict())
        torch.manual_seed(1)
        stock = TraceEnum_ELBO(particles, max_plate_nesting=1, vectorize_particles=particles > 1)
        right = stock.differentiable_loss(model, theirs, range(ROWS)) / ROWS
    torch.manual_seed(1)
    found = EnumELBO(particles, kl="sampled").differentiable_loss(program, ours, data())
    torch.testing.assert_close(found, right)
    found.backward()
    for parameter, other in zip(
        ours.parameters(),
        torch.autograd.grad(right, list(theirs.parameters()), allow_unused=True),
        strict=True,
    ):
        if other is not None:
            torch.testing.assert_close(parameter.grad, other)


class Conjugate(nn.Module):
    """z and x normal: x has covariance I + I / 4."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1))


def test_two_of_one_kind_do_not_share_parameters_and_rows_have_an_evidence():
    program = Conjugate()
    guides = [Auto(program, "AutoNormal", data()) for _ in range(2)]
    assert len(pyro.get_param_store()) == 0
    with torch.no_grad():
        for parameter in guides[0].parameters():
            parameter.add_(1.0)
    first, second = (torch.cat([p.flatten() for p in g.parameters()]) for g in guides)
    torch.testing.assert_close(first - 1, second)
    exact = dist.Normal(torch.zeros(2), 1.25**0.5).to_event(1).log_prob(data()["x"])
    optimizer = torch.optim.Adam(guides[1].parameters(), 0.1)
    bound = EnumELBO(8)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 120)
        loss = bound.differentiable_loss(program, guides[1], data())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        rows = EnumELBO(1000).per_row(program, guides[1], data())
    torch.testing.assert_close(rows, exact, rtol=0, atol=0.1)
    found = log_evidence(program, guides[1], data(), 500, chunk_size=500 * ROWS)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02)


def test_fit_and_posterior():
    program = Program()
    guide = Auto(program, "AutoMultivariateNormal", data(), init_scale=0.2)
    before = EnumELBO(200).loss(program, guide, data())
    fit(program, guide, data(), epochs=60, batch_size=ROWS, lr=0.05)
    assert EnumELBO(200).loss(program, guide, data()) < before - 0.2
    draws = posterior(program, guide, data(), 7)
    assert draws["z"].shape == (7, ROWS, 2)
    assert draws["s"].shape == (7,)
    assert (draws["s"] > 0).all()
    assert not guide.by_row
    with pytest.raises(ValueError, match="shared by all rows"):
        log_evidence(program, guide, data(), 10)


def test_what_does_not_count_is_not_proposed():
    class Two(nn.Module):
        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                w = pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 0.5).to_event(1))
                pyro.sample("v", dist.Normal(w, 0.5).to_event(1))

    for kind in ("AutoNormal", "AutoDiagonalNormal"):
        guide = Auto(Two(), kind, data())
        assert sum(p.numel() for p in guide.parameters()) == 2 * 2 * ROWS
        assert EnumELBO().loss(Two(), guide, data()) > 0


def test_missing_rows():
    seen = {"x": (data()["x"], torch.arange(ROWS) > 0)}
    program = Conjugate()
    guide = Auto(program, "AutoNormal", seen)
    assert EnumELBO().per_row(program, guide, seen)[0] == 0
    joint = Auto(program, "AutoDiagonalNormal", seen)
    with pytest.raises(ValueError, match="not to be proposed in every row"):
        EnumELBO().loss(program, joint, seen)


def test_what_is_refused():
    program = Program()
    with pytest.raises(ValueError, match="no autoguide is called 'AutoNorml'"):
        Auto(program, "AutoNorml", data())
    guide = Auto(program, "AutoNormal", data())
    with pytest.raises(ValueError, match="each of its 4 rows, but the batch has 2"):
        EnumELBO().loss(program, guide, {"x": data()["x"][:2]})

    class Finite(nn.Module):
        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                y = pyro.sample("y", dist.Categorical(logits=torch.zeros(2)))
                pyro.sample("x", dist.Normal(torch.eye(2)[y], 1.0).to_event(1))

    with pytest.raises(ValueError, match="no continuous latent site"):
        Auto(Finite(), "AutoNormal", data())
    known = {**data(), "z": (data()["x"], torch.arange(ROWS) > 1)}
    with pytest.raises(ValueError, match="'z' is known in some rows only"):
        Auto(Conjugate(), "AutoNormal", known)
