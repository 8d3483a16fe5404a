"""Columns of different kinds as one event: densities, draws, features, masks and messages."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyrozoo.guides import Amortized, Sequential
from pyrozoo.inference import Batch, EnumELBO, fit, predict
from pyrozoo.inference.graph import read_graph
from pyrozoo.zoo import networks
from pyrozoo.zoo.networks import Column, Columns, Mixed
from pyrozoo.zoo.networks.column import KINDS

F64 = torch.float64
TABLE = [
    Column("age", "normal", center=40.0, spread=12.0),
    Column("group", "categorical", 3),
    Column("visits", "poisson", center=1.2, spread=0.5),
    Column("pain", "ordered", 4),
    Column("income", "log_normal", center=10.0, spread=0.7),
    Column("smoker", "bernoulli", center=0.2, spread=0.4),
    Column("grade", "ordered", 3),
    Column("share", "beta", center=-1.0, spread=0.8),
    Column("reads", "negative_binomial", center=2.0, spread=1.1),
    Column("town", "categorical", 4),
    Column("umi", "zero_inflated_negative_binomial", center=0.7, spread=0.9),
    Column("grey", "continuous_bernoulli", center=0.3, spread=0.3),
    Column("shock", "student_t", center=-2.0, spread=3.0),
    Column("weight", "normal", center=70.0, spread=15.0),
    Column("level", "categorical", 7),
]
ROW = [52.0, 2, 0, 1, 25000.0, 1, 2, 0.4, 12, 3, 0, 0.9, 4.0, 61.0, 6]
ROWS = torch.tensor(
    [ROW, [30.0, 0, 5, 3, 9000.0, 0, 0, 0.1, 0, 0, 3, 0.2, -9.0, 88.0, 0]], dtype=F64
)
NAMES = [column.name for column in TABLE]


def table():
    columns = Columns(TABLE).double()
    with torch.no_grad():
        for parameter in columns.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter).clamp(-1, 1))
    return columns


# ---- densities --------------------------------------------------------------------------------------


def test_every_kind_has_a_column_here():
    assert {column.likelihood for column in TABLE} == set(KINDS)


def softplus(x):
    return math.log1p(math.exp(x))


def expected_density(columns, params, value):
    """The log-density of each column by scipy, from the formulas in the docstring of `Columns`."""
    f, start, groups = {}, 0, columns.features.groups
    for group, members in groups.items():
        sizes = [
            TABLE[i].num_values if TABLE[i].likelihood == "categorical" else 1 for i in members
        ]
        for i, size in zip(members, sizes, strict=True):
            f[i] = params[start : start + size].numpy()
            start += size
        if columns.features.kind(group) == "zero_inflated_negative_binomial":
            f |= {i: np.append(f[i], params[start + j].item()) for j, i in enumerate(members)}
            start += len(members)
    assert start == len(params)
    found = []
    for i, column in enumerate(TABLE):
        group = next(g for g, members in groups.items() if i in members)
        place = groups[group].index(i)
        kind, c, s, x, raw = column.likelihood, column.center, column.spread, value[i].item(), f[i]
        if group in columns.raw_scale and kind not in (
            "negative_binomial",
            "zero_inflated_negative_binomial",
        ):
            scale = s * (0.03 + softplus(columns.raw_scale[group][place].item()))
        if kind == "normal":
            found.append(stats.norm(c + s * raw[0], scale).logpdf(x))
        elif kind == "student_t":
            df = 2.0001 + softplus(columns.raw_df[group][place].item())
            found.append(stats.t(df, c + s * raw[0], scale).logpdf(x))
        elif kind == "log_normal":
            found.append(stats.lognorm(scale, scale=math.exp(c + s * raw[0])).logpdf(x))
        elif kind == "beta":
            mean, size = special.expit(c + s * raw[0]), 4 / scale**2 + 1 / scale
            found.append(stats.beta(mean * size, (1 - mean) * size).logpdf(x))
        elif kind == "bernoulli":
            found.append(stats.bernoulli(special.expit(raw[0] + special.logit(c))).logpmf(x))
        elif kind == "continuous_bernoulli":
            tilt = 2 * c - 1
            slope = raw[0] + 2 * tilt * (3 - tilt**2) / (1 - tilt**2)
            found.append(slope * x + math.log(slope / math.expm1(slope)))
        elif kind == "categorical":
            found.append(special.log_softmax(raw)[int(x)])
        elif kind == "ordered":
            points = columns.raw_cutpoints[group][place].detach()
            gaps = nn.functional.softplus(points[1:]) + 1e-4
            points = torch.cat([points[:1], points[:1] + gaps.cumsum(0)])[: column.num_values - 1]
            below = np.concatenate([[0], special.expit(points.numpy() - raw[0]), [1]])
            found.append(math.log(np.diff(below)[int(x)]))
        else:
            mean = math.expm1(c) * math.exp(s * raw[0])
            if kind == "poisson":
                found.append(stats.poisson(mean).logpmf(x))
                continue
            total = math.exp(-columns.raw_scale[group][place].item()) / s**2
            log_prob = stats.nbinom(total, total / (total + mean)).logpmf(x)
            if kind == "zero_inflated_negative_binomial":
                gate = special.expit(raw[1] - 2)
                log_prob = math.log((1 - gate) * math.exp(log_prob) + gate * (x == 0))
            found.append(log_prob)
    return torch.tensor(found, dtype=F64)


def test_densities_are_those_of_scipy():
    columns = table()
    params = torch.randn(2, columns.num_params, dtype=F64)
    fn = columns(params)
    assert isinstance(fn.base_dist, Mixed)
    got = fn.base_dist.log_prob(ROWS)
    for row in range(2):
        expected = expected_density(columns, params[row], ROWS[row])
        torch.testing.assert_close(got[row], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fn.log_prob(ROWS), got.sum(-1))


@pytest.mark.parametrize("lead", [(), (5,), (3, 1, 5)])
def test_leading_dimensions_draws_and_expansion(lead):
    columns = table()
    params = torch.randn(*lead, columns.num_params, dtype=F64)
    fn = columns(params)
    assert fn.batch_shape == lead
    assert fn.event_shape == (len(TABLE),)
    draws = fn.sample((4,))
    assert draws.shape == (4, *lead, len(TABLE))
    assert draws.dtype == F64
    assert fn.support.check(draws).all()
    assert fn.log_prob(draws).shape == (4, *lead)
    assert fn.mean.shape == (*lead, len(TABLE))
    wide = fn.expand((2, *lead))
    torch.testing.assert_close(wide.log_prob(draws[0]), fn.log_prob(draws[0]).expand(2, *lead))
    assert wide.mean.shape == wide.sample().shape == (2, *lead, len(TABLE))
    with pytest.raises(ValueError, match=r"\(\*, 15\)"):
        fn.base_dist.expand((2, 3))


def test_hypotheses_and_rows_broadcast():
    columns = table()
    params = torch.randn(3, 1, columns.num_params, dtype=F64)
    got = columns(params).base_dist.log_prob(ROWS)
    assert got.shape == (3, 2, len(TABLE))
    for k in range(3):
        for row in range(2):
            one = columns(params[k, 0]).base_dist.log_prob(ROWS[row])
            torch.testing.assert_close(got[k, row], one)


def test_means():
    columns = table()
    params = torch.randn(columns.num_params, dtype=F64) / 2
    fn = columns(params)
    draws = fn.sample((20000,))
    error = draws.std(0) / math.sqrt(len(draws))
    for i, column in enumerate(TABLE):
        if column.num_values:  # the most probable code
            assert fn.mean[i] == draws[:, i].long().bincount().argmax()
        else:
            assert abs(draws[:, i].mean() - fn.mean[i]) < 5 * error[i], column.name


def test_a_table_is_a_handful_of_operations():
    many = [
        Column(f"{c.name}{i}", c.likelihood, c.num_values, c.center, c.spread)
        for i in range(20)
        for c in TABLE
    ]
    columns = Columns(many)
    assert len(columns.features.groups) == len(Columns(TABLE).features.groups)
    fn = columns(torch.zeros(2, columns.num_params))
    assert len(fn.base_dist.parts) == 12
    single = Columns([Column(str(i), "normal") for i in range(50)])
    value = torch.randn(4, 50)
    plain = dist.Normal(torch.zeros(50), single(torch.zeros(50)).base_dist.parts[0].scale)
    torch.testing.assert_close(
        single(torch.zeros(50)).base_dist.log_prob(value), plain.log_prob(value)
    )


def test_an_untrained_table_is_near_the_marginals():
    generator = np.random.default_rng(0)
    values = {
        "normal": generator.normal(300, 20, 2000),
        "student_t": 5 + 3 * generator.standard_t(4, 2000),
        "log_normal": generator.lognormal(3, 1.5, 2000),
        "poisson": generator.poisson(4, 2000),
        "negative_binomial": generator.negative_binomial(2, 0.02, 2000),
        "beta": generator.beta(2, 6, 2000),
        "bernoulli": generator.random(2000) < 0.1,
        "continuous_bernoulli": densities_draw(-3.0),
    }
    best = {
        "normal": stats.norm(300, 20), "student_t": stats.t(4, 5, 3), "log_normal": stats.lognorm(1.5, scale=math.exp(3)),
        "poisson": stats.poisson(4), "negative_binomial": stats.nbinom(2, 0.02), "beta": stats.beta(2, 6),
        "bernoulli": stats.bernoulli(0.1),
    }  # fmt: skip
    columns = Columns([Column.of(kind, kind, torch.as_tensor(v)) for kind, v in values.items()])
    rows = torch.tensor(np.stack(list(values.values()), 1), dtype=torch.float32)
    score = columns(torch.zeros(columns.num_params)).base_dist.log_prob(rows).mean(0)
    for (kind, x), got in zip(values.items(), score.tolist(), strict=True):
        if kind in best:
            known = best[kind]
            most = (known.logpmf(x) if hasattr(known.dist, "pmf") else known.logpdf(x)).mean()
            assert most - 0.35 < got < most + 0.1, kind
    fn = columns(torch.zeros(columns.num_params))
    assert fn.mean[-1].item() == pytest.approx(
        float(values["continuous_bernoulli"].mean()), abs=0.03
    )


def densities_draw(slope):
    return networks.ContinuousBernoulli(())(torch.tensor([slope])).sample((2000,)).double().numpy()


def test_extreme_outputs_are_finite_in_single_precision():
    columns = Columns(TABLE)
    for params in (30.0, -30.0):
        raw = torch.full((2, columns.num_params), params).requires_grad_()
        density = columns(raw).base_dist.log_prob(ROWS.float())
        assert density.isfinite().all()
        wanted = [raw, *columns.parameters()]
        for gradient in torch.autograd.grad(density.sum(), wanted):
            assert gradient.isfinite().all()


def test_no_density_explodes():
    columns = Columns([Column("a", "normal", center=5.0, spread=2.0)])
    with torch.no_grad():
        columns.raw_scale["normal"].fill_(-1e4)
    assert columns(torch.zeros(1)).base_dist.parts[0].scale.item() == pytest.approx(0.03 * 2)


def test_center_and_spread_are_stored_with_the_parameters():
    state = table().state_dict()
    assert state["features.center"].tolist() == pytest.approx([c.center for c in TABLE])
    other = Columns([Column(c.name, c.likelihood, c.num_values) for c in TABLE]).double()
    other.load_state_dict(state)
    params = torch.randn(2, other.num_params, dtype=F64)
    torch.manual_seed(0)
    torch.testing.assert_close(other(params).log_prob(ROWS), table()(params).log_prob(ROWS))


def test_make_fx_trace_equals_eager():
    columns = Columns(TABLE)
    first, second = torch.randn(2, 2, columns.num_params)
    rows = ROWS.float()

    def call(params, rows):
        fn = columns(params)
        return fn.log_prob(rows), columns.features(rows), fn.mean

    with pyro.validation_enabled(False):
        traced = make_fx(call)(first, rows)
        for got, expected in zip(traced(second, rows), call(second, rows), strict=True):
            torch.testing.assert_close(got, expected)


# ---- features ---------------------------------------------------------------------------------------


def test_features_of_a_row():
    features = Columns(TABLE).double().features
    got = features(ROWS)
    assert got.shape == (2, features.num_features) == (2, len(features.owners))
    by_column = {name: got[:, features.owners == i] for i, name in enumerate(NAMES)}
    x = dict(zip(NAMES, ROWS.T, strict=True))
    assert torch.equal(by_column["age"].T[0], (x["age"] - 40) / 12)
    torch.testing.assert_close(by_column["income"].T[0], (x["income"].log() - 10) / 0.7)
    torch.testing.assert_close(
        by_column["visits"].T[0], (x["visits"].log1p() - 1.2) / 0.5, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        by_column["share"].T[0], (x["share"].logit() + 1) / 0.8, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(by_column["shock"].T[0], ((x["shock"] + 2) / 3).asinh())
    assert by_column["smoker"].tolist() == [[1], [-1]]
    assert by_column["group"].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert by_column["town"].tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert by_column["level"].tolist() == [[0, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0]]
    assert by_column["pain"].tolist() == [[1, -1, -1], [1, 1, 1]]
    assert by_column["grade"].tolist() == [[1, 1], [-1, -1]]


class Table(nn.Module):
    """z ~ Normal(0, I), x | z ~ Columns, and a second view."""

    def __init__(self, columns=TABLE):
        super().__init__()
        self.first = networks.Decoder(2, (4,), len(columns), Columns(columns))
        self.second = networks.Decoder(2, (4,), 2, "normal")

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample(
                "z", dist.Normal(self.first.mlp.first.weight.new_zeros(2), 1.0).to_event(1)
            )
            pyro.sample("x_a", self.first(z))
            pyro.sample("x_b", self.second(z))


def test_a_guide_reads_features_and_what_is_missing():
    program = Table().double()
    inputs = Amortized(program, ["x_a", "x_b"], (4,)).double().inputs["z"]
    features, count = program.first.likelihood.features, len(TABLE)
    assert inputs.widths == [features.num_features + count, 2, 1]
    known = torch.ones(2, count, dtype=torch.bool)
    known[0, [0, 4, 9]] = False
    for filler in (0.0, -3.7):
        rows = torch.where(known, ROWS, filler)
        batch = Batch.of({"x_a": (rows, known)})
        got, second, flags = inputs(batch, {}, F64)
        assert torch.equal(got[:, -count:], known.double())
        expected = features(ROWS) * known[:, features.owners]
        assert torch.equal(got[:, :-count], expected)
        assert not second.any()
        assert not flags.any()
    whole, *_ = inputs(Batch.of({"x_a": ROWS}), {}, F64)
    assert torch.equal(whole, torch.cat([features(ROWS), torch.ones(2, count)], -1))
    some, *_ = inputs(Batch.of({"x_a": (ROWS, torch.tensor([True, False]))}), {}, F64)
    assert torch.equal(some, whole * torch.tensor([[1.0], [0.0]]))
    none, *_ = inputs(Batch.of({"x_b": torch.zeros(2, 2)}), {}, F64)
    assert torch.equal(none, torch.zeros_like(whole))


def test_a_guide_keeps_its_own_scales_and_no_others_change():
    program = Table()
    guide = Amortized(program, ["x_a"], (4,))
    names = {n for n in guide.state_dict() if "tables" in n}
    assert names == {"inputs.z.tables.x_a.center", "inputs.z.tables.x_a.spread"}
    assert not [n for n in Amortized(program, ["x_b"], (4,)).state_dict() if "inputs" in n]
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in program.parameters()}


def test_values_drawn_by_an_earlier_part_are_read_as_known():
    class First(Sequential):
        def inside(self, batch, drawn):
            return {"x_a": ROWS.expand(3, 2, len(TABLE))}

    program = Table().double()
    inputs = Amortized(program, ["x_a"], (4,)).double().inputs["z"]
    got, *_ = inputs(Batch.of(2), First().inside(None, {}), F64)
    assert got.shape == (3, 2, inputs.widths[0])
    assert (got[..., -len(TABLE) :] == 1).all()


# ---- as a site of a program -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["rows", "entries"])
def test_missing_entries_add_nothing_and_fillers_change_no_bit(shape):
    program = Table().double()
    guide = Amortized(program, ["x_a"], (4,)).double()
    known = torch.rand(2, len(TABLE)) < 0.6
    known[1] = shape == "rows"
    if shape == "rows":
        known = torch.tensor([False, True])
    results = []
    for filler in (0.0, 0.123, -5.0):
        full = known.reshape(2, -1).expand(2, len(TABLE))
        batch = Batch.of({"x_a": (torch.where(full, ROWS, filler), known)})
        batch._values["x_a"] = torch.where(full, ROWS, filler)  # past the door, where it is zeroed
        torch.manual_seed(1)
        objective = EnumELBO()
        loss = objective.differentiable_loss(program, guide, batch)
        gradient = torch.autograd.grad(
            loss, [*program.parameters(), *guide.parameters()], allow_unused=True
        )
        results.append([loss, *(g for g in gradient if g is not None)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    if shape == "entries":
        fn = program.first(torch.zeros(2, 2, dtype=F64))
        whole = fn.base_dist.log_prob(ROWS)
        masked = fn.base_dist.mask(known).to_event(1).log_prob(ROWS)
        torch.testing.assert_close(masked, (whole * known).sum(-1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"visits": -3.0},
            r"column 'visits' \(poisson\) takes whole numbers from 0, got -3 in 2 rows",
        ),
        (
            {"reads": 0.5},
            r"column 'reads' \(negative_binomial\) takes whole numbers from 0, got 0.5 in 2 rows",
        ),
        (
            {"share": 1.0},
            r"column 'share' \(beta\) takes numbers above 0 and below 1, got 1 in 2 rows",
        ),
        ({"income": 0.0}, r"column 'income' \(log_normal\) takes numbers above 0, got 0 in 2 rows"),
        ({"smoker": 2.0}, r"column 'smoker' \(bernoulli\) takes 0 or 1, got 2 in 2 rows"),
        (
            {"town": 4.0},
            r"column 'town' \(categorical\) takes whole numbers from 0 to 3, got 4 in 2 rows",
        ),
        (
            {"grade": -1.0},
            r"column 'grade' \(ordered\) takes whole numbers from 0 to 2, got -1 in 2 rows",
        ),
        (
            {"grey": 1.1},
            r"column 'grey' \(continuous_bernoulli\) takes numbers from 0 to 1, got 1.1 in 2 rows",
        ),
        (
            {"visits": 0.5, "share": 0.0, "town": 9.0, "grade": 5.0, "umi": -1.0},
            r"column 'visits' .*; column 'grade' .*; column 'share' .*; and 2 more columns",
        ),
    ],
)
@pytest.mark.parametrize("path", ["guide reads it", "check_values"])
def test_wrong_values_are_named_by_site_and_column(changes, message, path):
    program = Table().double()
    rows = ROWS.clone()
    for name, value in changes.items():
        rows[:, NAMES.index(name)] = value
    guide = Amortized(program, ["x_a" if path == "guide reads it" else "x_b"], (4,)).double()
    data = {"x_a": rows, "x_b": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="site 'x_a', " + message + ".*said with a pair"):
        EnumELBO().loss(program, guide, data)
    with pytest.raises(ValueError, match="site 'x_a', " + message):
        fit(program, guide, data, epochs=1, progress=False, device="cpu")


def test_wrong_values_in_some_rows_among_missing_ones():
    program = Table().double()
    guide = Amortized(program, ["x_b"], (4,)).double()
    rows = torch.cat([ROWS, ROWS])
    rows[:, NAMES.index("visits")] = torch.tensor([-1.0, -2.0, 3.0, -4.0])
    known = torch.ones_like(rows).bool()
    known[0, NAMES.index("visits")] = False
    data = {"x_a": (rows, known), "x_b": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match=r"got -4, -2 in 2 rows"):
        EnumELBO().loss(program, guide, data)


def test_the_graph_of_a_table():
    graph = read_graph(Table(), Batch.of(2))
    site = graph.sites["x_a"]
    assert site.parents == {"z"}
    assert site.event_shape == (len(TABLE),)
    assert not site.summable
    assert "15 columns (normal, categorical" in str(site.fn.base_dist.support)


# ---- what columns are -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "gamma"), "column 'a': expected a likelihood of normal, .*; got 'gamma'"),
        (("a", "categorical"), "column 'a' .categorical. wants num_values of at least 2, got 0"),
        (("a", "ordered", 1), "num_values of at least 2, got 1"),
        (("a", "normal", 3), "has no levels, got num_values=3"),
        (("a", "normal", 0, 1.0, 0.0), "spread above 0"),
        (("a", "normal", 0, math.nan), "center is finite"),
    ],
)
def test_columns_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Column(*arguments)


def test_tables_are_checked():
    with pytest.raises(ValueError, match="distinct names, got none"):
        Columns([])
    with pytest.raises(ValueError, match=r"distinct names, got \['a'\]"):
        Columns([Column("a", "normal"), Column("a", "poisson")])
    assert networks.likelihood(Columns(TABLE), 15).num_features == Columns(TABLE).num_features
    with pytest.raises(ValueError, match=r"\(15,\), expected \(3,\)"):
        networks.likelihood(Columns(TABLE), 3)


def test_a_column_of_values():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=F64)
    normal = Column.of("a", "normal", values)
    assert (normal.center, normal.spread) == pytest.approx((3.0, math.sqrt(3.5)))
    size = Column.of("a", "log_normal", values)
    assert size.center == pytest.approx(values.log().mean().item())
    count = Column.of("a", "poisson", values)
    assert count.spread == pytest.approx(values.log1p().std(correction=0).item())
    heavy = Column.of("a", "student_t", torch.tensor([0.0, 1.0, 2.0, 3.0, 1e6]))
    assert (heavy.center, heavy.spread) == pytest.approx((2.0, 1 / 0.6745))
    assert Column.of("a", "categorical", values, 7) == Column("a", "categorical", 7)
    for constant in (torch.ones(3), torch.ones(0)):
        assert Column.of("a", "normal", constant).spread == 1
    with pytest.raises(
        ValueError, match=r"column 'a' \(beta\) takes .* got 1, 2, 3, \.\. in 4 rows"
    ):
        Column.of("a", "beta", values)


def test_predicting_a_category_takes_the_most_probable_of_the_averaged_probabilities():
    """Two clusters, of codes 0 and 2: the mean of the codes, 1, is what nobody says."""

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.columns = Columns([Column("c", "categorical", 3), Column("n", "normal")])
            self.raw = nn.Parameter(torch.zeros(self.columns.num_params))

        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                ends = torch.tensor([5.0, -5.0, 4.8, 0.0])[: len(self.raw)]
                far = torch.tensor([-5.0, -5.0, 5.0, 0.0])[: len(self.raw)]
                raw = torch.where((z > 0).unsqueeze(-1), ends, far)
                pyro.sample("x", self.columns(raw + self.raw))

    class Guide(nn.Module):
        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                pyro.sample("z", dist.Normal(0.0, 1.0))

    found = predict(Program(), Guide(), Batch.of(4), "x", num_samples=200, seed=0)
    assert found.shape == (4, 2)
    assert (found[:, 0] == 2).all()
