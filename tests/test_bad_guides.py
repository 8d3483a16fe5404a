"""Programs, guides and data that do not fit: what is wrong, where, and what to write instead."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import nn
from torch.distributions import biject_to, constraints

from pyrozoo.inference import Batch, EnumELBO, fit
from pyrozoo.inference.graph import read_graph

N = 6
X = torch.linspace(-1, 1, N)


def normal(loc, scale=1.0):
    return dist.Normal(loc, scale).to_event(1)


def program(batch):
    """Globals g and (in a plate) c, locals z, t and p; x is observed."""
    g = pyro.sample("g", dist.Gamma(2.0, 1.0))
    with pyro.plate("groups", 3, dim=-2):
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(batch)):
        z = pyro.sample("z", normal(torch.zeros(2)))
        t = pyro.sample("t", dist.Beta(2.0, torch.full((2,), 2.0)).to_event(1))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        mean = z.sum(-1) * g + c.sum() + (t.sum(-1) + p[..., 0])
        pyro.sample("x", dist.Normal(mean, 1.0))


def onto(support, *shape):
    base = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
    return dist.TransformedDistribution(base, [biject_to(support)])


GOOD = {
    "g": lambda: dist.LogNormal(0.0, 1.0),
    "c": lambda: dist.Normal(0.0, 1.0),
    "z": lambda: normal(torch.zeros(2)),
    "t": lambda: dist.Uniform(torch.zeros(2), 1.0).to_event(1),
    "p": lambda: onto(constraints.simplex, 2),
}


def guide(groups=3, plates=("groups", "data"), rows=None, **changed):
    """The good guide with some proposals replaced; None leaves one out."""
    fns = {**GOOD, **changed}

    def draw(*names):
        for name in names:
            if name in fns and fns[name] is not None:
                pyro.sample(name, fns[name]())

    def run(batch):
        draw("g")
        with pyro.plate(plates[0], groups, dim=-2):
            draw("c")
        with pyro.plate(plates[1], rows or len(batch)):
            draw("z", "t", "p", "other")

    return run


def loss(p, q, data=None, **options):
    return EnumELBO(**options).loss(p, q, {"x": X} if data is None else data)


FINE = {
    "as it is": {},
    "a smaller support": {"g": lambda: dist.Uniform(1.0, 2.0)},
    "positive for real": {"z": lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1)},
    "a point mass": {"g": lambda: dist.Delta(torch.tensor(1.0))},
    "a point mass on a simplex": {"p": lambda: dist.Delta(torch.full((3,), 1 / 3), event_dim=1)},
    "transformed": {"t": lambda: onto(constraints.unit_interval, 2)},
    "scaled into it": {
        "t": lambda: dist.TransformedDistribution(
            onto(constraints.unit_interval, 2), [dist.transforms.AffineTransform(0.25, 0.5)]
        )
    },
    "joint": {"z": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2))},
    "masked": {"g": lambda: dist.LogNormal(0.0, 1.0).mask(torch.tensor(True))},
}


@pytest.mark.parametrize("name", FINE)
def test_supports_that_fit(name):
    assert torch.isfinite(torch.tensor(loss(program, guide(**FINE[name]))))


WRONG = {
    r"site 'g' \(Gamma\) takes values in GreaterThanEq.*proposes Normal.*biject_to": {
        "g": lambda: dist.Normal(5.0, 0.01)  # no draw would show it
    },
    r"site 't' \(Beta\) takes values in \[0, 1\].*proposes Normal, with values in Real": {
        "t": lambda: normal(torch.full((2,), 0.5), 0.01)
    },
    r"site 't' \(Beta\).*proposes Uniform, with values in Interval.*upper_bound=2": {
        "t": lambda: dist.Uniform(torch.zeros(2), 2.0).to_event(1)
    },
    r"site 'p' \(Dirichlet\) takes values in Simplex.*proposes Normal.*and drew \[": {
        "p": lambda: normal(torch.zeros(3))
    },
    r"site 'g' \(Gamma\).*proposes Delta.*and drew \[-1\.0\]$": {
        "g": lambda: dist.Delta(torch.tensor(-1.0))
    },
    r"site 'g' .*proposes Poisson, with values in whole numbers from 0$": {
        "g": lambda: dist.Poisson(3.0)
    },
    r"site 't' .*proposes TransformedDistribution.*and drew \[[123]\.": {
        "t": lambda: dist.TransformedDistribution(
            onto(constraints.unit_interval, 2), [dist.transforms.AffineTransform(1.0, 2.0)]
        )
    },
    r"'z' has event shape \(2,\) in the program, but \(3,\) in the guide.*to_event": {
        "z": lambda: normal(torch.zeros(3))
    },
    r"'z' has event shape \(2,\) in the program, but \(\) in the guide": {
        "z": lambda: dist.Normal(torch.zeros(N), 1.0)
    },
    r"'z' \(Independent\) is not observed everywhere.*which proposes: g, c, t, p\).*sample\('z'": {
        "z": None
    },
    r"'g' \(Gamma\) is not observed everywhere.*which proposes: c, z, t, p\)": {"g": None},
    r"draws 'other', which is not a site of the program \(sites: g, c, z, t, p, x\)": {
        "other": lambda: dist.Normal(0.0, 1.0)
    },
    r"'c' lies in plates of sizes \{'groups': 3\} in the program, but \{'groups': 4\}": {
        "groups": 4
    },
    r"'c' lies in plates \{'groups': -2\} .* but \{'teams': -2\} in the guide": {
        "plates": ("teams", "data")
    },
    r"'z' lies in plates \{'data': -1\} .* but \{'rows': -1\} in the guide": {
        "plates": ("groups", "rows")
    },
    r"plate 'data' has 4 rows at site 'z', but the batch has 6: write pyro\.plate\(": {"rows": 4},
    r"Shape mismatch inside plate\('data'\) at site z dim -1, 6 vs 4": {
        "z": lambda: normal(torch.zeros(4, 2))
    },
}


@pytest.mark.parametrize("text", WRONG)
def test_guides_that_do_not_fit(text):
    with pytest.raises(ValueError, match=text):
        loss(program, guide(**WRONG[text]))


def test_what_depends_on_a_drawn_bound_is_not_compared():
    def bounded(batch):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(()), top))
            pyro.sample("x", dist.Normal(z, 1.0))

    def q(batch):
        top = pyro.sample("top", dist.LogNormal(1.0, 1.0))
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.Uniform(torch.zeros(()), top))

    for _ in range(5):
        assert loss(bounded, q) < float("inf")


@pytest.mark.parametrize("auto", [AutoNormal, AutoDelta])
def test_guides_of_pyro_fit(auto):
    q = auto(pyro.poutine.block(program, hide=["x"]))
    assert loss(program, q, kl="sampled") < float("inf")


@pytest.mark.parametrize("values", [3, 5])
def test_finite_proposals(values):
    def finite(batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(torch.arange(3.0)[y], 1.0))

    def q(batch):
        with pyro.plate("data", len(batch)):
            pyro.sample("y", dist.Categorical(torch.ones(values)))

    if values == 3:
        assert loss(finite, q) < float("inf")
        return
    with pytest.raises(
        ValueError, match=r"'y' \(Categorical\) takes values in 0\.\.2.* in 0\.\.4$"
    ):
        loss(finite, q)


def test_plates_in_another_order():
    def grid(batch):
        with pyro.plate("items", 4, dim=-2), pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def q(batch):
        with pyro.plate("data", len(batch), dim=-2), pyro.plate("items", 4, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    text = r"'z' lies in plates \{'items': -2, 'data': -1\}.*\{'data': -2, 'items': -1\}.*same dim="
    with pytest.raises(ValueError, match=text):
        loss(grid, q, {"x": torch.zeros(N, 4)})


# ---- programs whose structure depends on chance ------------------------------------------------


def empty(batch):
    pass


def only_z(batch):
    with pyro.plate("data", len(batch)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def with_z(inside):
    """A program in which x depends on z as ``inside`` says."""

    def run(batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(inside(z), 1.0))

    return run


@pytest.mark.parametrize("first", [True, False])
def test_a_site_that_is_drawn_only_sometimes(first):
    runs = []

    def sometimes(z):
        runs.append(0)  # the first run is that in which the graph is read
        return z + pyro.sample("e", dist.Bernoulli(0.5)) if (len(runs) == 1) == first else z

    text = "site 'e' is not drawn in every run; which sites there are.*torch.where or poutine.mask"
    with pytest.raises(ValueError, match=text):
        loss(with_z(sometimes), only_z)


def test_a_guide_that_draws_a_site_only_sometimes():
    runs = []

    def q(batch):
        runs.append(0)
        with pyro.plate("data", len(batch)):
            if len(runs) < 2:
                pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site 'z' is not drawn in every run"):
        loss(with_z(lambda z: z), q)


def test_a_plate_whose_size_changes():
    sizes = []

    def inner(z):
        sizes.append(2 + len(sizes))
        with pyro.plate("inner", sizes[-1]):
            return z + pyro.sample("e", dist.Bernoulli(0.5)).sum(0)

    with pytest.raises(
        ValueError, match=r"plate 'inner' at site 'e' had size 2 in one run and has [345]"
    ):
        loss(with_z(inner), only_z)


def sign(z):
    return 1.0 if z.sum() > 0 else -1.0


def each_sign(z):
    return 1.0 if z > 0 else -1.0


PYTHON = {
    "a branch": sign,
    "a branch by row": each_sign,
    "a number": lambda z: z.mean().item(),
    "a float": lambda z: float(z[0]),
    "a list": lambda z: torch.tensor(z.tolist()),
    "an array": lambda z: torch.as_tensor(z.numpy()),
}


@pytest.mark.parametrize("name", PYTHON)
def test_values_that_leave_the_tensors_are_found(name):
    text = r"site 'z' becomes a Python number or decides a branch \(test_bad_guides\.py, line \d+\)"
    with pytest.raises(ValueError, match=text + ".*torch.where"):
        loss(with_z(PYTHON[name]), only_z)


def test_looking_at_a_value_is_no_offence():
    def checked(z):
        assert z.isfinite().all()
        return z

    def q(batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            float(z.mean())

    assert loss(with_z(checked), q) < float("inf")
    assert read_graph(with_z(sign), Batch.of(2)).turned.keys() == {"z"}


# ---- the plate over the data ---------------------------------------------------------------------


def test_the_plate_over_the_data_is_forgotten():
    def forgotten(batch):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(batch)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))

    def misnamed(batch):
        with pyro.plate("rows", len(batch)):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    for p, plates in ((forgotten, "none"), (misnamed, "'rows'")):
        text = rf"'x' is not in plate 'data', and neither .*\(plates: {plates}\).*len\(batch\)"
        with pytest.raises(ValueError, match=text):
            loss(p, empty)


def plates():
    def fixed(batch):
        with pyro.plate("data", 100):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    def subsampled(batch):
        with pyro.plate("data", 60, subsample_size=len(batch)):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    def iterated(batch):
        for i in pyro.plate("data", len(batch)):
            pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))

    return {
        r"has 100 rows at site 'x', but the batch has 6: write pyro\.plate": fixed,
        r"draws 6 of 60 rows at site 'x', which would count them 10 times each.*num_rows": subsampled,
        r"is iterated over at site 'x_0'.*draw all rows at once": iterated,
    }


@pytest.mark.parametrize("text", plates())
def test_plates_over_the_data_that_are_none(text):
    with pytest.raises(ValueError, match=f"plate 'data' {text}"):
        loss(plates()[text], empty)


def test_a_dimension_that_is_not_declared():
    def undeclared(batch):
        with pyro.plate("data", len(batch)):
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0))

    with pytest.raises(ValueError, match="at site x dim -1, 6 vs 2") as caught:
        loss(undeclared, empty, {"x": torch.zeros(N, 2)})
    (note,) = caught.value.__notes__
    assert note.startswith("undeclared was run as undeclared(batch), on Batch(6 rows; x: (6, 2)")
    assert ".to_event(n)" in note


# ---- what is called, and with what -----------------------------------------------------------------


def reads(batch):
    with pyro.plate("data", len(batch)):
        pyro.sample("x", dist.Normal(batch["se"], 1.0))


def test_a_value_that_is_read_but_not_there():
    text = r"reads batch\['se'\], but the batch has x; .*inputs=\['se'\].*example="
    with pytest.raises(ValueError, match=text):
        loss(reads, empty)
    with pytest.raises(ValueError, match=r"'se' is not a site of the program.*inputs=\['se'\]"):
        loss(reads, empty, {"x": X, "se": X})
    assert loss(reads, empty, {"x": X, "se": X}, inputs=("se",)) < float("inf")


def test_a_program_that_observes_by_itself():
    def own(value):
        def run(batch):
            with pyro.plate("data", len(batch)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=value(batch))

        return run

    torch.manual_seed(0)
    expected = loss(with_z(lambda z: z), only_z)
    torch.manual_seed(0)
    assert loss(own(lambda batch: batch["x"]), only_z) == expected
    with pytest.raises(ValueError, match=r"already observes 'x'; drop the key.*replace=\['x'\]"):
        loss(own(lambda batch: X + 1), only_z)


class NoForward(nn.Module):
    def model(self, batch):
        pass


def test_what_cannot_be_called():
    for p, q, text in (
        (nn.Linear, empty, r"the program is the class Linear; pass an instance, Linear\(\.\.\.\)"),
        (reads, NoForward(), r"the guide .* with a batch, but NoForward has no forward\(batch\)"),
        (3, empty, r"the program is to be called with a batch, but int has no forward\(batch\)"),
    ):
        with pytest.raises(TypeError, match=text):
            loss(p, q)

    def two(x, y):
        pass

    with pytest.raises(TypeError, match=r"two\(x, y\) was called with one batch.*argument: 'y'"):
        loss(two, empty)

    def one(batch):
        raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own") as caught:
        loss(one, empty)
    assert "one was run as one(batch)" in caught.value.__notes__[0]


def test_data_that_cannot_be_read():
    for value, kind, text in (
        (torch.where(X > 0, X, torch.nan), ValueError, r"'x': 3 NaN entries in 3 of 6 rows.*pair"),
        (["a"] * N, TypeError, "'x': expected a tensor, an array"),
        (np.array(["a"] * N), TypeError, "'x': cannot read an array of type <U1"),
    ):
        with pytest.raises(kind, match=text):
            loss(with_z(lambda z: z), only_z, {"x": value})
    with pytest.raises(TypeError, match="dictionary of site name -> values, got Tensor"):
        loss(with_z(lambda z: z), only_z, X)


def test_parameters_that_would_not_be_trained():
    def stored(batch):
        w = pyro.param("w", torch.tensor(0.0))
        with pyro.plate("data", len(batch)):
            pyro.sample("x", dist.Normal(w, 1.0))

    with pytest.raises(ValueError, match="parameter"):
        fit(stored, empty, {"x": X}, epochs=1, progress=False, device="cpu")
