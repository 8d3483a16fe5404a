"""Amortized: guides for programs of any shape, against closed forms."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from test_inversion import conditional, covariance, random_graph
from torch import nn
from torch.autograd.functional import jacobian

from pyrozoo.guides.amortized import Amortized, Classifier, Sequential
from pyrozoo.guides.inputs import Inputs
from pyrozoo.guides.supports import LowerCholesky, PositiveDefinite
from pyrozoo.inference import Batch, EnumELBO
from pyrozoo.inference.graph import innermost, read_graph
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.networks import Encoder, inverse_positive_scale

ROWS = 4

pytestmark = pytest.mark.usefixtures("double")


def normal(loc, scale=1.0):
    return dist.Normal(loc, scale).to_event(1)


# ---- linear-Gaussian programs: no gap at any draw -----------------------------------------------------


class Linear(nn.Module):
    """Scalar sites with unit noise, each a weighted sum of its parents."""

    def __init__(self, above, cov, names):
        super().__init__()
        self.above = above
        self.gains = {n: conditional(cov, n, above[n], names)[0] for n in names}

    def forward(self, batch):
        values = {}
        with pyro.plate("data", len(batch)):
            for name, above in self.above.items():
                loc = torch.zeros(1)
                for gain, parent in zip(self.gains[name], above, strict=True):
                    loc = loc + gain * values[parent]
                values[name] = pyro.sample(name, normal(loc))


def set_linear(net, gain, variance):
    """Let an encoder without hidden layers have these weights; flags count nothing."""
    with torch.no_grad():
        net.loc.weight.zero_()
        net.loc.weight[0, : len(gain)] = gain
        net.loc.bias.zero_()
        net.raw_scale.weight.zero_()
        net.raw_scale.bias.fill_(inverse_positive_scale(math.sqrt(variance)))


def check_exact(above, given, structure="inverse", exact=True):
    """The bound of the best linear guide is the evidence, whatever is drawn."""
    names = list(above)
    cov = covariance(above, names)
    program = Linear(above, cov, names)
    guide = Amortized(program, given, (), structure=structure)
    for name in guide.factorisation.order:
        gain, variance = conditional(cov, name, guide.factorisation.parents[name], names)
        set_linear(guide.networks[name], gain, float(variance))
    index = [names.index(g) for g in given]
    evidence = dist.MultivariateNormal(torch.zeros(len(given)), cov[index][:, index])
    x = evidence.sample((ROWS,))
    data = {g: x[:, i : i + 1] for i, g in enumerate(given)}
    rows = EnumELBO(kl="sampled").per_row(program, guide, data)
    if exact:
        torch.testing.assert_close(rows, evidence.log_prob(x), rtol=1e-9, atol=1e-9)
    else:
        assert (rows - evidence.log_prob(x)).abs().max() > 1e-3
    return guide


def test_three_levels_are_recovered_exactly():
    torch.manual_seed(0)
    above = {"z_2": [], "z_1": ["z_2"], "x": ["z_1"]}
    guide = check_exact(above, ["x"])
    assert str(guide).splitlines()[0] == "q(z_1 | x) q(z_2 | z_1)"
    check_exact(above, ["x"], "independent", exact=False)


def test_a_kalman_model_is_exact():
    torch.manual_seed(0)
    above = {}
    for t in range(5):
        above |= {f"z_{t}": [f"z_{t - 1}"] if t else [], f"x_{t}": [f"z_{t}"]}
    guide = check_exact(above, [f"x_{t}" for t in range(5)])
    latent = [set(p) & {f"z_{t}" for t in range(5)} for p in guide.factorisation.parents.values()]
    assert [len(p) for p in latent] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("seed", [1, 3, 5, 8])
def test_random_gaussian_programs_are_exact(seed):
    torch.manual_seed(seed)
    _, above, given, proposed, _ = random_graph(seed)
    assert proposed
    check_exact(above, given)


# ---- plates inside the data --------------------------------------------------------------------------


class Words(nn.Module):
    """theta ~ N(0, 1), z_w ~ N(theta, 1), x_w ~ N(z_w, 1)."""

    def __init__(self, size=3, outer=False):
        super().__init__()
        self.size, self.dims = size, (-2, -1) if outer else (-1, -2)

    def forward(self, batch):
        size = batch.shape("x")[1] if "x" in batch else self.size
        with pyro.plate("data", len(batch), dim=self.dims[0]):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("words", size, dim=self.dims[1]):
                z = pyro.sample("z", dist.Normal(theta, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0))


def exact_words(program, size):
    """theta | x ~ N(s m / (s + 2), 2 / (s + 2)), z | x, theta ~ N((x + theta) / 2, 1/2)."""
    guide = Amortized(program, ["x"], ())
    assert guide.factorisation.parents == {"theta": ("x",), "z": ("x", "theta")}
    pool = guide.inputs["theta"].pools["words"]
    with torch.no_grad():
        pool.mlp.first.weight.copy_(torch.eye(2))  # the value, and its flag
        pool.mlp.first.bias.zero_()
    set_linear(guide.networks["theta"], torch.tensor([size / (size + 2)]), 2 / (size + 2))
    set_linear(guide.networks["z"], torch.tensor([0.5, 0.5]), 0.5)
    return guide


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("outer", [False, True])
def test_pooled_reads_are_exact(outer, particles):
    program = Words(outer=outer)
    guide = exact_words(program, 3)
    x = torch.randn(ROWS, 3)
    evidence = dist.MultivariateNormal(torch.zeros(3), torch.ones(3, 3) + 2 * torch.eye(3))
    rows = EnumELBO(particles, kl="sampled").per_row(program, guide, {"x": x})
    torch.testing.assert_close(rows, evidence.log_prob(x), rtol=1e-9, atol=1e-9)
    shapes = {n: v.shape for n, v in guide(Batch.of({"x": x})).items()}
    assert shapes["z"] == ((ROWS, 3) if outer else (3, ROWS))


def test_pooling_leaves_out_what_is_missing():
    program = Words()
    guide = Amortized(program, ["x"], (5,))
    x = torch.randn(ROWS, 3)
    known = torch.tensor([True, False, True]).expand(ROWS, 3)

    def loc(data):
        return guide.distribution("theta", Batch.of(data)).mean

    few = loc({"x": x[:, [0, 2]]})
    torch.testing.assert_close(loc({"x": (x, known)}), few)
    torch.testing.assert_close(loc({"x": x[:, [2, 0]]}), few)  # and the order does not matter
    assert (loc({"x": x}) - few).abs().min() > 0
    assert loc({"x": x}).shape == (ROWS,)
    halves = EnumELBO()(program, guide)
    halves({"x": (x, known)}).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


class Topics(nn.Module):
    """A topic model: topics outside the data, proportions of a document, words of a document."""

    def forward(self, batch):
        topics = pyro.sample("topics", dist.Dirichlet(torch.ones(2, 6)).to_event(1))
        with pyro.plate("data", len(batch)):
            share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
            with pyro.plate("words", 5):
                y = pyro.sample("y", dist.Categorical(share))
                pyro.sample("w", dist.Categorical(Vindex(topics)[..., y, :]))


def test_a_topic_model():
    program = Topics()
    guide = Amortized(program, hidden=(4,))
    assert guide.given == ("w",)
    text = str(guide)
    assert text.startswith("q(topics) q(share | w, topics)")
    assert "y: summed; joins " in text
    loss = EnumELBO()(program, guide)
    loss({"w": torch.randint(6, (ROWS, 5))}).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


class Items(nn.Module):
    """Item response: difficulties outside the data, abilities inside, answers in both plates."""

    def forward(self, batch):
        items = pyro.plate("items", 3, dim=-2)
        with items:
            hard = pyro.sample("hard", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(batch), dim=-1):
            ability = pyro.sample("ability", dist.Normal(torch.zeros(()), 1.0))
            with items:
                pyro.sample("x", dist.Bernoulli(logits=ability - hard))


def test_entries_with_parameters_of_their_own_are_told_apart():
    program = Items()
    guide = Amortized(program, ["x"], (4,))
    inputs = guide.inputs["ability"]
    assert inputs.widths == [3 * 2, 3]  # answers and flags, difficulties; no pool
    assert guide.raw["hard_loc"].shape == (3,)
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    hard = {"hard": torch.zeros(3, 1)}
    first, second = guide.distribution("ability", Batch.of({"x": x}), hard).mean
    assert first != second
    loss = EnumELBO(2)(program, guide)
    loss({"x": x}).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


# ---- globals -----------------------------------------------------------------------------------------


class TwoGlobals(nn.Module):
    """a, b ~ N(0, 1), x_i ~ N(a + b, 1): a and b are correlated given x."""

    def forward(self, batch):
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(batch)):
            pyro.sample("x", dist.Normal(a + b, 1.0))


def test_globals_that_read_each_other_are_exact():
    program = TwoGlobals()
    guide = Amortized(program, init_scale=1.0)
    assert guide.factorisation.parents == {"b": (), "a": ("b",)}
    assert not guide.raw.read["a"].weight.any()
    x = torch.randn(ROWS)
    n, total = ROWS, x.sum()
    # b | x has variance (n + 1) / (2 n + 1) and mean total / (2 n + 1); a | b, x: n + 1 observations
    values = {
        "b": (total / (2 * n + 1), (n + 1) / (2 * n + 1)),
        "a": (total / (n + 1), 1 / (n + 1)),
    }
    with torch.no_grad():
        for name, (loc, variance) in values.items():
            guide.raw[f"{name}_loc"].fill_(loc)
            guide.raw[f"{name}_scale"].fill_(inverse_positive_scale(math.sqrt(variance)))
        guide.raw.read["a"].weight.fill_(-n / (n + 1))
    evidence = dist.MultivariateNormal(torch.zeros(n), 2 * torch.ones(n, n) + torch.eye(n))
    loss = EnumELBO(kl="sampled").loss(program, guide, {"x": x})
    assert loss * n == pytest.approx(-float(evidence.log_prob(x)), rel=1e-9)
    for family in ("full", "delta"):
        other = Amortized(program, family=family)
        with torch.no_grad():
            other.raw.read["a"].weight.fill_(1.0)
        far = other.raw.distribution("a", {"b": torch.tensor(1.5)}).rsample()
        near = other.raw.distribution("a", {"b": torch.tensor(0.0)}).rsample()
        assert (far.shape, near.shape) == ((), ())
        if family == "delta":
            torch.testing.assert_close(far - near, torch.tensor(1.5))


def many(size):
    def program(batch):
        weight = pyro.sample("weight.0", normal(torch.zeros(size)))
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(weight.sum(-1), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    return program


def test_wide_globals_are_not_read():
    reads = lambda size, **options: Amortized(many(size), **options).factorisation  # noqa: E731
    assert reads(64).parents["z"] == ("x", "weight.0")
    wide = reads(65)
    assert wide.parents["z"] == ("x",)
    assert "globals are 65 numbers, more than 64" in str(wide)
    assert reads(65, read_globals=True).parents["z"] == ("x", "weight.0")
    assert reads(2, read_globals=False).parents["z"] == ("x",)
    assert reads(2, structure="independent").parents["z"] == ("x",)
    names = {n for n, _ in Amortized(many(2), hidden=()).named_parameters()}
    assert {"raw.weight_0_loc", "raw.weight_0_scale"} <= names


# ---- supports ----------------------------------------------------------------------------------------

ORDERED = dist.TransformedDistribution(
    dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
)
SUPPORTS = {
    "real": dist.Normal(torch.zeros(2, 3), 1.0).to_event(2),
    "positive": dist.Gamma(2.0, 1.0),
    "interval": dist.Uniform(-1.0, 2.0),
    "half-open": dist.Pareto(2.0, 3.0),
    "one bound an entry": dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1),
    "simplex": dist.Dirichlet(torch.ones(3)),
    "ordered": ORDERED,
    "correlation": dist.LKJCholesky(3, 1.0),
    "positive definite": dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), [PositiveDefinite()]
    ),
}


@pytest.mark.parametrize("family", ["mean_field", "full"])
@pytest.mark.parametrize("kind", SUPPORTS)
def test_supports(kind, family):
    fn = SUPPORTS[kind]

    def program(batch):
        pyro.sample("g", fn)
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", fn)
            size = len(fn.event_shape)
            pyro.sample("x", dist.Normal(z.flatten(-size).sum(-1) if size else z, 1.0))

    guide = Amortized(program, ["x"], (3,), family=family)
    values = guide(Batch.of({"x": torch.randn(ROWS)}))
    assert values["z"].shape == (ROWS, *fn.event_shape)
    assert fn.support.check(values["z"]).all()
    loss = EnumELBO()(program, guide)
    loss({"x": torch.randn(ROWS)}).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


def test_a_proposal_on_an_interval_integrates_to_one():
    def program(batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Uniform(-1.0, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    fn = Amortized(program, ["x"], (3,)).distribution("z", Batch.of({"x": torch.randn(1)}))
    points = torch.linspace(-1, 2, 20001)[1:-1].unsqueeze(-1)
    total = fn.log_prob(points).exp().sum() * 3 / 20000
    torch.testing.assert_close(total, torch.tensor(1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("transform", [LowerCholesky(), PositiveDefinite()])
def test_jacobians_of_matrices(transform):
    u = torch.randn(6)
    rows, columns = torch.tril_indices(3, 3)
    matrix = jacobian(lambda v: transform(v)[rows, columns], u)
    found = transform.log_abs_det_jacobian(u, transform(u))
    torch.testing.assert_close(found, matrix.det().abs().log())
    torch.testing.assert_close(transform.inv(transform(u)), u)


class Count(nn.Module):
    """n ~ Poisson(3), x ~ N(n, 1)."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            n = pyro.sample("n", dist.Poisson(3.0))
            pyro.sample("x", dist.Normal(n, 1.0))


def test_counts_have_unbiased_gradients():
    program = Count()
    guide = Amortized(program, ["x"], ())
    data = {"x": torch.tensor([2.2, 4.0])}
    n = torch.arange(200.0).unsqueeze(-1)
    joint = dist.Poisson(3.0).log_prob(n) + dist.Normal(n, 1.0).log_prob(data["x"])
    q = guide.distribution("n", Batch.of(data))
    bound = (q.log_prob(n).exp() * (joint - q.log_prob(n))).sum(0).mean()
    assert bound < joint.logsumexp(0).mean()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(-bound, guide.parameters())])
    objective, found = EnumELBO(400), []
    with pytest.warns(UserWarning, match="'n' of the guide is neither summed nor reparam"):
        objective.loss(program, guide, data)
    for _ in range(25):
        loss = objective.differentiable_loss(program, guide, data)
        grads = torch.autograd.grad(loss, guide.parameters())
        found.append(torch.cat([loss.detach().reshape(1), *(g.flatten() for g in grads)]))
    found = torch.stack(found)
    error = found.std(0) / 5
    right = torch.cat([-bound.detach().reshape(1), exact])
    assert ((found.mean(0) - right).abs() < 4.5 * error + 1e-9).all()


# ---- what is read and proposed ------------------------------------------------------------------------


def test_one_latent_has_the_parameters_that_it_always_had():
    program = VaDE(6, 3, 2, (4,))
    torch.manual_seed(0)
    guide = Amortized(program, ["x", "y"], (4,), init_scale=0.5)
    torch.manual_seed(0)
    inputs = Inputs(read_graph(program, Batch.of(2)), ["x", "y"], "z")
    encoder = Encoder(inputs.widths, (4,), 2, "relu", 0.5)
    state = {f"networks.z.{n}": v for n, v in encoder.state_dict().items()}
    assert list(guide.state_dict()) == list(state)
    assert all(torch.equal(v, state[n]) for n, v in guide.state_dict().items())
    by_default = Amortized(program, hidden=(4,))
    assert by_default.given == ("x",)


class Covariates(nn.Module):
    """v ~ N(0, I), y ~ N(v_1 + v_2, 1), with holes in v; a barren site, and a point."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            v = pyro.sample("v", normal(torch.zeros(2)))
            point = pyro.sample("point", dist.Delta(v.sum(-1)))
            pyro.sample("y", dist.Normal(point, 1.0))
            aside = pyro.sample("aside", dist.Normal(v[..., 0], 1.0))
            pyro.sample("below", dist.Normal(aside, 1.0))


def test_holes_in_what_is_given_are_proposed():
    program = Covariates()
    guide = Amortized(program, ["y", "v"], (4,), sites=["v"])
    assert guide.factorisation.parents == {"v": ("y", "v")}
    assert guide.inputs["v"].widths[:3] == [1, 2, 2]  # y, v and which entries of v are known
    v, known = torch.randn(ROWS, 2), torch.rand(ROWS, 2) < 0.5
    data = {"y": torch.randn(ROWS), "v": (v, known)}
    torch.manual_seed(0)
    first = EnumELBO().per_row(program, guide, data)
    data["v"] = (torch.where(known, v, 7.0), known)
    torch.manual_seed(0)
    assert torch.equal(first, EnumELBO().per_row(program, guide, data))
    assert list(Amortized(program, ["y"], (4,)).factorisation.order) == ["v"]
    everything = Amortized(program, hidden=(4,))
    assert everything.given == ("y", "below")
    assert set(everything.factorisation.order) == {"v", "aside"}


def test_parts_share_plates_and_globals():
    program = Words()
    parts = [
        Amortized(program, ["x"], (3,), sites=["theta"]),
        Amortized(program, ["x"], (3,), sites=["z"]),
    ]
    loss = EnumELBO(kl="sampled").loss(program, Sequential(*parts), {"x": torch.randn(ROWS, 3)})
    assert math.isfinite(loss)
    label = VaDE(6, 3, 2, (4,))
    guide = Sequential(Classifier(label, "y", ["x"], (3,)), Amortized(label, ["x", "y"], (3,)))
    assert math.isfinite(EnumELBO().loss(label, guide, {"x": torch.rand(ROWS, 6)}))


def test_values_that_are_no_sites_can_be_read():
    def program(batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(batch["age"], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    data = {"x": torch.randn(ROWS), "age": torch.randn(ROWS)}
    guide = Amortized(program, ["x", "age"], (3,), example=data)
    assert guide.factorisation.parents == {"z": ("x", "age")}
    assert guide.inputs["z"].widths == [1, 1]
    EnumELBO(inputs=("age",))(program, guide)(data).backward()


def test_families_by_site():
    program = Words()
    guide = Amortized(program, ["x"], (3,), family={"theta": "student"})
    batch = Batch.of({"x": torch.randn(ROWS, 3)})
    assert isinstance(innermost(guide.distribution("theta", batch)), dist.StudentT)
    assert isinstance(guide.networks["z"], Encoder)
    with pytest.raises(ValueError, match="family names t, but the guide proposes theta, z"):
        Amortized(program, ["x"], (3,), family={"t": "student"})


# ---- errors ------------------------------------------------------------------------------------------


def with_latent(latent):
    """A program with one latent site z and x that depends on it."""

    def program(batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", latent())
            value = z.to(torch.get_default_dtype())
            pyro.sample("x", dist.Normal(value.reshape(len(batch), -1).sum(-1), 1.0))

    return program


def moving(batch):
    with pyro.plate("data", len(batch)):
        low = pyro.sample("low", dist.Normal(torch.zeros(()), 1.0))
        z = pyro.sample("z", dist.Uniform(low, low + 1))
        pyro.sample("x", dist.Normal(z, 1.0))


def outside(batch):
    g = pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(batch)):
        pyro.sample("x", dist.Normal(g, 1.0))


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (
            with_latent(lambda: dist.Normal(torch.zeros(()), 1.0)),
            {"given": ["X"]},
            "'X' is not a site",
        ),
        (Words(), {"given": ["thetta"]}, "Did you mean 'theta'"),
        (outside, {"given": ["g"]}, "'g' is expected in plate 'data', but its plates are: none"),
        (with_latent(lambda: dist.Multinomial(2, torch.ones(3))), {}, "'z' .Multinomial.*neither"),
        (
            with_latent(lambda: dist.Bernoulli(torch.full((2,), 0.5)).to_event(1)),
            {},
            "'z' .*neither be summed nor proposed.*put its entries into a plate",
        ),
        (moving, {}, "'z': the bounds of its support depend"),
        (Words(), {"structure": "random"}, "structure is one of"),
        (Words(), {"read_globals": "never"}, "read_globals is"),
        (Words(), {"sites": ["y"]}, "no continuous latent site is called y"),
    ],
)
def test_what_cannot_be_inverted_says_why(program, options, message):
    with pytest.raises(ValueError, match=message):
        Amortized(program, **options)


class Fickle(nn.Module):
    """Every other run draws another site."""

    def __init__(self):
        super().__init__()
        self.names = itertools.cycle(["x", "t"])

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample(next(self.names), dist.Normal(z, 1.0))


def test_sites_that_come_and_go():
    with pytest.raises(ValueError, match="site 'x' is not drawn in every run"):
        Amortized(Fickle())


def test_a_proposal_asks_for_what_it_reads():
    guide = Amortized(Words(), ["x"], (3,))
    with pytest.raises(ValueError, match="'theta' is read by this proposal"):
        guide.distribution("z", Batch.of({"x": torch.randn(ROWS, 3)}))


def test_what_the_program_observes_itself_has_to_be_in_the_batch():
    x = torch.randn(ROWS)

    def program(batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[: len(batch)])

    guide = Amortized(program, hidden=(3,))
    assert guide.given == ("x",)
    assert guide(Batch.of({"x": x}))["z"].shape == (ROWS,)
    with pytest.raises(ValueError, match=r"observes 'x' itself, but the batch.*has no 'x'"):
        guide(Batch.of(ROWS))
    with pytest.raises(ValueError, match=r"observes 'x' itself, and the batch has no 'x'"):
        Amortized(program, example={"t": x})


def test_plates_that_cross():
    def program(batch):
        first, second = pyro.plate("i", 2, dim=-2), pyro.plate("j", 3, dim=-3)
        with pyro.plate("data", len(batch), dim=-1):
            with first:
                a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            with second:
                b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
            with first, second:
                pyro.sample("x", dist.Normal(a + b, 1.0))

    guide = Amortized(program, hidden=(3,))
    reads = guide.factorisation.reads
    assert guide.factorisation.parents == {"b": ("x",), "a": ("x", "b")}
    assert (reads["b"]["x"].across, reads["a"]["x"].across) == ({"i", "j"}, {"j"})
    loss = EnumELBO(2)(program, guide)
    loss({"x": torch.randn(ROWS, 2, 3)}).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


def test_globals_stick_the_landing():
    def program(batch):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(batch)):
            pyro.sample("x", dist.Normal(m, 1.0))

    guide = Amortized(program)
    x = torch.tensor([0.5, 1.0, -0.2, 0.9])
    with torch.no_grad():  # the posterior
        guide.raw["m_loc"].fill_(x.sum() / 5)
        guide.raw["m_scale"].fill_(inverse_positive_scale(math.sqrt(1 / 5)))
    EnumELBO(gradient="stl").differentiable_loss(program, guide, {"x": x}).backward()
    for parameter in guide.parameters():
        assert parameter.grad.abs().max() < 1e-12
