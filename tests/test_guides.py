"""Guides: what they read, what they propose, and closed forms of what they compute."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrozoo.guides import Amortized, Classifier, Mean, ProductOfExperts, Sequential
from pyrozoo.inference import Batch, EnumELBO
from pyrozoo.inference.graph import read_graph
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.multimodal import MVAE
from pyrozoo.zoo.semisupervised import M2

ROWS, WIDTH, K = 6, 5, 3


pytestmark = pytest.mark.usefixtures("double")


def rows():
    return torch.rand(ROWS, WIDTH)


def test_parameters_do_not_depend_on_what_is_observed():
    names = set()
    for data in ({"x": rows()}, {"x": rows(), "y": torch.zeros(ROWS, dtype=torch.long)}):
        program = VaDE(WIDTH, K, 2, (4,))
        guide = Amortized(program, ["x", "y"], (4,))
        EnumELBO()(program, guide)(data)
        names.add(tuple(f"{n}{tuple(p.shape)}" for n, p in guide.named_parameters()))
    assert len(names) == 1


def test_what_is_missing_is_zero_and_flagged():
    program = VaDE(WIDTH, K, 2, (4,))
    inputs = Amortized(program, ["x", "y"], (4,)).inputs["z"]
    assert inputs.widths == [WIDTH, K]  # x must be there for z to matter; y is all zeros if missing
    x, seen = rows(), torch.arange(ROWS) < 3
    y = torch.arange(ROWS) % K
    left, label = inputs(Batch.of({"x": x, "y": (y, seen)}), {}, torch.float64)
    assert torch.equal(left, x)
    assert torch.equal(label, nn.functional.one_hot(y, K) * seen[:, None].double())
    both = MVAE({"x_a": WIDTH, "x_b": 2}, 2, (4,))
    inputs = Amortized(both, ["x_a", "x_b"], (4,)).inputs["z"]
    assert inputs.widths == [WIDTH, 2, 2]
    *_, flags = inputs(Batch.of({"x_a": (x, seen)}), {}, torch.float64)
    assert torch.equal(flags, torch.stack([seen, torch.zeros(ROWS).bool()], -1).double())


def test_a_missing_key_is_the_same_as_all_rows_missing():
    program = VaDE(WIDTH, K, 2, (4,))
    guide = Amortized(program, ["x", "y"], (4,))
    a = guide.distribution("z", Batch.of({"x": rows()})).mean
    torch.manual_seed(0)
    b = guide.distribution("z", Batch.of({"y": torch.zeros(ROWS, dtype=torch.long)})).mean
    assert a.shape == b.shape == (ROWS, 2)


def test_sequential_passes_enumerated_values_on():
    program = M2(WIDTH, K, 2, (4,))
    guide = Sequential(Classifier(program, "y", ["x"], (4,)), Amortized(program, ["x", "y"], (4,)))
    x = rows()
    graph = read_graph(guide, Batch.of({"x": x}))
    assert graph.sites["z"].parents == {"y"}
    assert list(graph.sites) == ["y", "z"]
    with pytest.raises(TypeError, match="Part, not Linear"):
        Sequential(nn.Linear(2, 2))


def test_product_of_experts_in_closed_form():
    program = MVAE({"x_a": WIDTH, "x_b": 2}, 3, (4,))
    guide = ProductOfExperts(program, ["x_a", "x_b"], hidden=(4,))
    a, b = rows(), torch.rand(ROWS, 2)
    seen = torch.arange(ROWS) < 4
    found = guide.distribution(Batch.of({"x_a": a, "x_b": (b, seen)})).base_dist
    experts = [guide.experts["x_a"](a).base_dist, guide.experts["x_b"](b * seen[:, None]).base_dist]
    for row in range(ROWS):
        used = experts if seen[row] else experts[:1]
        precision = 1 + sum(e.scale[row] ** -2 for e in used)
        mean = sum(e.loc[row] * e.scale[row] ** -2 for e in used) / precision
        torch.testing.assert_close(found.loc[row], mean)
        torch.testing.assert_close(found.scale[row], precision**-0.5)
    nothing = guide.distribution(Batch.of({"x_a": (a, seen)}))
    torch.testing.assert_close(nothing.mean[5], torch.zeros(3))
    torch.testing.assert_close(nothing.variance[5], torch.ones(3))


def test_mean_is_the_guide_without_noise_and_shares_its_parameters():
    program = VaDE(WIDTH, K, 2, (4,))
    guide = Amortized(program, ["x"], (4,))
    mean = Mean(guide)
    batch = Batch.of({"x": rows()})
    assert torch.equal(mean(batch)["z"], guide.distribution("z", batch).mean)
    assert {id(p) for p in mean.parameters()} == {id(p) for p in guide.parameters()}


class Positive(nn.Module):
    """Latent sites on other supports, and a global one."""

    def forward(self, batch):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("data", len(batch)):
            s = pyro.sample("s", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal((s.sum(-1) + p[..., 0]) * rate, 1.0))


def test_constrained_and_global_latents():
    program = Positive()
    guide = Amortized(program, ["x"], (4,))
    x = torch.randn(ROWS)
    values = guide(Batch.of({"x": x}))
    assert values["rate"] > 0
    assert (values["s"] > 0).all()
    torch.testing.assert_close(values["p"].sum(-1), torch.ones(ROWS))
    loss = EnumELBO()(program, guide)({"x": x})
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


def test_networks_of_ones_own():
    program = VaDE(WIDTH, K, 2, (4,))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, 2)

        def forward(self, x):
            return dist.Normal(self.linear(x), 1.0).to_event(1)

    net = Net()
    guide = Amortized(program, ["x"], network={"z": net})
    x = rows()
    assert torch.equal(guide.distribution("z", Batch.of({"x": x})).mean, net.linear(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: Amortized(p, ["q"]), "'q' is not a site of the program.*y, z, x"),
        (lambda p: Amortized(p, "x"), "list of at least one site"),
        (lambda p: Amortized(p, ["x"], sites=["y"]), "no continuous latent site is called y"),
        (lambda p: Classifier(p, "z", ["x"]), "'z' is expected to be Categorical"),
        (lambda p: ProductOfExperts(p, ["x"], site="w"), "'w' is not a site"),
    ],
)
def test_wrong_guides(build, message):
    with pytest.raises(ValueError, match=message):
        build(VaDE(WIDTH, K, 2, (4,)))
