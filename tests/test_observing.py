"""Observing: what is known decides, row by row, and every value and gradient is exact."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

from pyrozoo.inference import Batch, EnumELBO, observe, pair

N, K = 6, 3
KNOWN = torch.tensor([True, False, True, False, False, True])
LABELS = torch.tensor([2, 0, 1, 1, 2, 0])


pytestmark = pytest.mark.usefixtures("double")


def normal(loc: Any, scale: Any = 1.0) -> Any:
    return dist.Normal(loc, scale).to_event(1)


def empty(batch: Batch) -> None:
    """Propose nothing."""


def result(
    program: Any, guide: Any, data: Any, seed: int = 0, stock: bool = False, **kwargs: Any
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients, with the noise of a seed."""
    p, q = pair(program, guide, **kwargs)
    nets = [net for net in (program, guide) if isinstance(net, nn.Module)]
    params = [v for net in nets for v in net.parameters()]
    batch = Batch.of(data)
    elbo: Any = (
        TraceEnum_ELBO(max_plate_nesting=2, strict_enumeration_warning=False)
        if stock
        else EnumELBO(kl="sampled", split=False)
    )
    p.pairing.plan(p.pairing.prepare(batch))
    torch.manual_seed(seed)
    loss = elbo.differentiable_loss(p, q, batch) / (len(batch) if stock else 1)
    if not params or not loss.requires_grad:
        return loss, [torch.zeros_like(v) for v in params]
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return loss.detach(), [
        torch.zeros_like(v) if g is None else g for v, g in zip(params, grads, strict=True)
    ]


def assert_close(
    a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]], tol: float = 1e-10
) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=tol, atol=tol)
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol)


def assert_bit_equal(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(a[0], b[0])
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


class Modalities(nn.Module):
    """z -> x_1; z, w -> x_2, with w private to x_2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(2)) for _ in range(3))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            w = pyro.sample("w", normal(self.c))
            pyro.sample("x_1", normal(z * self.a))
            pyro.sample("x_2", normal(z + w * self.b))


class Guide(nn.Module):
    """Independent normals with parameters, for sites of event shape (2,)."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.loc = nn.ParameterDict({n: nn.Parameter(torch.randn(2)) for n in names})

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            for n in self.names:
                pyro.sample(n, normal(self.loc[n].expand(len(batch), 2), 0.7))


X1, X2 = torch.randn(N, 2).double(), torch.randn(N, 2).double()


def terms(program: Any, guide: Any, data: Any, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return EnumELBO(kl="sampled", split=False).terms(program, guide, data)


# ---- 1: observed everywhere ------------------------------------------------------------------------


def test_observed_everywhere_is_plain_conditioning() -> None:
    program, guide = Modalities(), Guide("z", "w")
    params = [*program.parameters(), *guide.parameters()]
    loss, grads = result(program, guide, {"x_1": X1, "x_2": X2})
    torch.manual_seed(0)
    conditioned = poutine.condition(program, data={"x_1": X1, "x_2": X2})
    by_hand = (
        TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False).differentiable_loss(
            conditioned, guide, Batch.of(N)
        )
        / N
    )
    assert_close((loss, grads), (by_hand.detach(), list(torch.autograd.grad(by_hand, params))))


# ---- 2: what counts --------------------------------------------------------------------------------


def test_a_missing_modality_takes_its_private_latent_along() -> None:
    program, guide = Modalities(), Guide("z", "w")
    found = terms(program, guide, {"x_1": X1, "x_2": (X2, KNOWN)})
    full = terms(program, guide, {"x_1": X1, "x_2": X2})
    for name in ("w", "x_2"):
        assert torch.equal(found[name] == 0, ~KNOWN)
        torch.testing.assert_close(found[name][KNOWN], full[name][KNOWN])
    for name in ("z", "x_1"):
        torch.testing.assert_close(found[name], full[name])


def test_a_latent_counts_where_a_single_entry_below_it_is_known() -> None:
    entries = torch.tensor([[True, False], [False, False], [True, True]] * 2)
    found = terms(Modalities(), Guide("z", "w"), {"x_2": (X2, entries)})
    for name in ("z", "w", "x_2"):
        assert torch.equal(found[name] != 0, entries.any(-1))


def test_latents_of_an_absent_modality_get_no_gradient() -> None:
    program, guide = Modalities(), Guide("z", "w")
    loss, _ = result(program, guide, {"x_1": X1})
    p, q = pair(program, guide)
    EnumELBO(kl="sampled").loss_and_grads(p, q, {"x_1": X1})
    assert loss > 0
    assert guide.loc["w"].grad is None or not guide.loc["w"].grad.any()
    assert program.b.grad is None or not program.b.grad.any()
    assert program.a.grad is not None
    assert program.a.grad.any()


def test_a_chain_counts_as_long_as_its_end_is_observed() -> None:
    def program(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            z2 = pyro.sample("z2", normal(torch.zeros(2)))
            z1 = pyro.sample("z1", normal(z2))
            pyro.sample("t", normal(z2))
            pyro.sample("x", normal(z1))

    guide = Guide("z2", "z1")
    found = terms(program, guide, {"x": (X1, KNOWN)})
    assert all(torch.equal(found[n] != 0, KNOWN) for n in ("z2", "z1", "x"))
    found = terms(program, guide, {"t": X2, "x": (X1, KNOWN)})
    assert torch.equal(found["z1"] != 0, KNOWN)
    assert (found["z2"] != 0).all()


def test_a_factor_counts_as_observed() -> None:
    def program(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            u = pyro.sample("u", normal(torch.zeros(2)))
            pyro.factor("f", -z.square().sum(-1))
            pyro.sample("x", normal(z + u))

    found = terms(program, Guide("z", "u"), {"x": (X1, KNOWN)})
    assert (found["z"] != 0).all()
    assert (found["f"] != 0).all()
    assert torch.equal(found["u"] != 0, KNOWN)


def test_a_row_with_nothing_observed_contributes_zero() -> None:
    program, guide = Modalities(), Guide("z", "w")
    other = torch.tensor([True, False, False, True, False, True])
    data = {"x_1": (X1, KNOWN), "x_2": (X2, other)}
    some = KNOWN | other
    torch.manual_seed(0)
    rows = EnumELBO(kl="sampled").per_row(program, guide, data)
    assert torch.equal(rows == 0, ~some)
    p, q = pair(program, guide)
    torch.manual_seed(0)
    rows = EnumELBO(kl="sampled").per_row(p, q, data)
    grads = torch.autograd.grad(
        rows[~some].sum(), [*program.parameters(), *guide.parameters()], allow_unused=True
    )
    assert all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize("summed", [True, False])
def test_a_row_with_nothing_observed_contributes_zero_with_labels(summed: bool) -> None:
    program, guide = (Mixture(), Guide("z")) if summed else (M2(), M2Guide())
    known = KNOWN & torch.tensor([True] * 3 + [False] * 3)
    data = {"x": (X1, KNOWN), "y": (LABELS, known)}
    p, q = pair(program, guide)
    rows = EnumELBO(kl="sampled", split=False).per_row(p, q, data)
    assert torch.equal(rows == 0, ~KNOWN)
    grads = torch.autograd.grad(
        rows[~KNOWN].sum(), [*program.parameters(), *guide.parameters()], allow_unused=True
    )
    assert all(g is None or not g.any() for g in grads)


def test_absent_none_and_all_rows_missing_are_the_same() -> None:
    program, guide = Modalities(), Guide("z", "w")
    reference = result(program, guide, {"x_1": X1})
    nowhere = torch.zeros(N, dtype=torch.bool)
    for missing in (
        None,
        (X2, nowhere),
        (X2, torch.zeros(N, 2, dtype=torch.bool)),
        (X2 * float("nan"), nowhere),
    ):
        assert_bit_equal(result(program, guide, {"x_1": X1, "x_2": missing}), reference)
    hidden = Batch.of({"x_1": X1, "x_2": X2}).hide("x_2", nowhere)  # a mask that is all false
    assert_close(result(program, guide, hidden), reference)


def test_fillers_change_no_bit() -> None:
    program, guide = Modalities(), Guide("z", "w")
    entries = torch.rand(N, 2) > 0.4
    results = []
    for filler in (0.0, 1e30, float("nan"), -float("inf")):
        x1, x2 = torch.where(KNOWN.unsqueeze(-1), X1, filler), torch.where(entries, X2, filler)
        results.append(result(program, guide, {"x_1": (x1, KNOWN), "x_2": (x2, entries)}))
    for other in results[1:]:
        assert_bit_equal(results[0], other)


# ---- single entries --------------------------------------------------------------------------------


def one_leaf(fn: Callable[[], Any]) -> Callable[[Batch], None]:
    def program(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            pyro.sample("x", fn())

    return program


ENTRIES = torch.tensor(
    [
        [True, True, False],
        [False, True, True],
        [True, False, False],
        [False] * 3,
        [True] * 3,
        [False, True, False],
    ]
)


def test_missing_entries_of_factorised_events_are_left_out() -> None:
    loc, scale = torch.randn(3), torch.rand(3) + 0.5
    x = torch.randn(N, 3)
    rows = EnumELBO().per_row(one_leaf(lambda: normal(loc, scale)), empty, {"x": (x, ENTRIES)})
    density = dist.Normal(loc, scale).log_prob(x)
    torch.testing.assert_close(rows, torch.where(ENTRIES, density, 0.0).sum(-1))
    assert rows[3] == 0


def test_missing_rows_and_columns_of_images() -> None:
    x = torch.randn(N, 3, 4)
    rows = EnumELBO().per_row(
        one_leaf(lambda: dist.Normal(torch.zeros(3, 4), 1.0).to_event(2)),
        empty,
        {"x": (x, ENTRIES)},
    )
    density = dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(rows, torch.where(ENTRIES, density, 0.0).sum(-1))


def test_missing_entries_of_a_multivariate_normal_are_marginalised() -> None:
    root = torch.randn(3, 3)
    cov = (root @ root.T + torch.eye(3)).requires_grad_()
    loc = torch.randn(3, requires_grad=True)
    x = torch.randn(N, 3)
    p, q = pair(one_leaf(lambda: dist.MultivariateNormal(loc, cov)), empty)
    rows = EnumELBO().per_row(p, q, {"x": (x, ENTRIES)})
    exact = []
    for value, known in zip(x, ENTRIES, strict=True):
        i = known.nonzero().squeeze(-1)
        marginal = (
            dist.MultivariateNormal(loc[i], cov[i][:, i], validate_args=False) if len(i) else None
        )
        exact.append(marginal.log_prob(value[i]) if marginal else torch.zeros(()))
    torch.testing.assert_close(rows, torch.stack(exact))
    weights = torch.randn(N)
    for a, b in zip(
        torch.autograd.grad((rows * weights).sum(), [loc, cov]),
        torch.autograd.grad((torch.stack(exact) * weights).sum(), [loc, cov]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "fn",
    [
        lambda: dist.Dirichlet(torch.ones(3)),
        lambda: dist.LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.ones(3)),
        lambda: dist.OneHotCategorical(torch.ones(3)),
        lambda: dist.TransformedDistribution(
            normal(torch.zeros(3)), [dist.transforms.ExpTransform()]
        ),
    ],
    ids=["dirichlet", "low-rank", "one-hot", "transformed"],
)
def test_entries_of_other_events_cannot_be_missing_but_rows_can(fn: Callable[[], Any]) -> None:
    x = fn().expand([N]).sample()
    with pytest.raises(
        ValueError, match=r"site 'x': single entries of a .* event cannot be missing"
    ):
        EnumELBO().loss(one_leaf(fn), empty, {"x": (x, ENTRIES)})
    rows = EnumELBO().per_row(one_leaf(fn), empty, {"x": (x, KNOWN)})
    torch.testing.assert_close(rows, torch.where(KNOWN, fn().log_prob(x), 0.0))


@pytest.mark.parametrize(
    "fn",
    [
        lambda s: dist.Gamma(1 + s, 2.0),
        lambda s: dist.Beta(1 + s, 2.0),
        lambda s: dist.Poisson(1 + s),
        lambda s: dist.LogNormal(s, 1.0),
        lambda s: dist.Uniform(-1 - s, 2.0 + s),
        lambda s: dist.Pareto(1.0 + s, 2.0),
        lambda s: dist.Geometric(torch.sigmoid(s)),
        lambda s: dist.VonMises(s, 1.0),
    ],
    ids=["gamma", "beta", "poisson", "lognormal", "uniform", "pareto", "geometric", "vonmises"],
)
def test_fillers_lie_in_the_support(fn: Callable[[Tensor], Any]) -> None:
    class Leaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.full((3,), 0.3))

        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", len(batch)):
                pyro.sample("x", fn(self.s).to_event(1))

    program = Leaf()
    x = fn(program.s.detach()).sample((N,))
    for known in (KNOWN, ENTRIES):
        loss, (grad,) = result(program, empty, {"x": (x, known)})
        density = fn(program.s).log_prob(x)
        by_hand = -torch.where(known.reshape(N, -1), density, 0.0).sum() / N
        assert_close(
            (loss, [grad]), (by_hand.detach(), list(torch.autograd.grad(by_hand, [program.s])))
        )


# ---- 3: a partly known discrete site ---------------------------------------------------------------


class Mixture(nn.Module):
    """y -> z -> x, as in VaDE: y is summed in the program."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.loc = nn.Parameter(torch.randn(K)), nn.Parameter(torch.randn(K, 2))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", normal(self.loc[y], 0.5))
            pyro.sample("x", normal(z, 0.8))


class M2(Mixture):
    """y, z -> x, as in M2: y is summed over the guide's probabilities."""

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(z + self.loc[y], 0.8))


class M2Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.shift = nn.Parameter(torch.randn(2, K)), nn.Parameter(torch.randn(K, 2))

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.head

    def forward(self, batch: Batch) -> None:
        x = batch["x"]
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits(x)))
            pyro.sample("z", normal(x * 0.3 + self.shift[y], 0.6))


def explicit_mixture(
    program: Mixture, guide: Guide, known: Tensor, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(seed)
    q = normal(guide.loc["z"].expand(N, 2), 0.7)
    z = q.rsample()
    joint = torch.stack(
        [
            program.logits.log_softmax(-1)[k] + normal(program.loc[k], 0.5).log_prob(z)
            for k in range(K)
        ]
    )
    prior = torch.where(known, joint[LABELS, torch.arange(N)], joint.logsumexp(0))
    loss = -(prior + normal(z, 0.8).log_prob(X1) - q.log_prob(z)).mean()
    params = [*program.parameters(), *guide.parameters()]
    return loss.detach(), list(torch.autograd.grad(loss, params))


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize(
    "known", [KNOWN, torch.ones(N).bool(), torch.zeros(N).bool()], ids=["some", "all", "none"]
)
def test_program_summed_labels_equal_the_loop(known: Tensor, stock: bool) -> None:
    program, guide = Mixture(), Guide("z")
    found = result(program, guide, {"x": X1, "y": (LABELS, known)}, stock=stock)
    assert_close(found, explicit_mixture(program, guide, known))


@pytest.mark.parametrize("stock", [False, True])
def test_a_fully_labelled_batch_through_the_partial_path(stock: bool) -> None:
    program, guide = Mixture(), Guide("z")
    partial = Batch.of({"x": X1, "y": LABELS}).hide("y", torch.ones(N).bool())
    assert partial.partly("y")
    assert_close(
        result(program, guide, partial, stock=stock), result(program, guide, {"x": X1, "y": LABELS})
    )


def explicit_m2(
    program: M2, guide: M2Guide, known: Tensor, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(seed)
    noise = torch.randn(K, N, 2)
    log_w = guide.logits(X1).log_softmax(-1)
    rows = []
    for k in range(K):
        # Where the label is known every enumerated value equals it; which noise is used there is
        # the mean over all K draws.
        y = torch.where(known, LABELS, k)
        q = normal(X1 * 0.3 + guide.shift[y], 0.6)
        z = q.mean + 0.6 * noise[k]
        value = (
            program.logits.log_softmax(-1)[y]
            + normal(torch.zeros(2)).log_prob(z)
            + normal(z + program.loc[y], 0.8).log_prob(X1)
            - q.log_prob(z)
        )
        rows.append(torch.where(known, value / K, log_w[:, k].exp() * (value - log_w[:, k])))
    loss = -sum(rows).mean()  # type: ignore[union-attr]
    params = [*program.parameters(), *guide.parameters()]
    return loss.detach(), [
        torch.zeros_like(v) if g is None else g
        for v, g in zip(params, torch.autograd.grad(loss, params), strict=True)
    ]


@pytest.mark.parametrize("stock", [False, True])
def test_guide_summed_labels_equal_the_loop(stock: bool) -> None:
    program, guide = M2(), M2Guide()
    found = result(program, guide, {"x": X1, "y": (LABELS, KNOWN)}, stock=stock)
    assert_close(found, explicit_m2(program, guide, KNOWN))
    unknown = torch.zeros(N).bool()
    assert_close(
        result(program, guide, {"x": X1}, stock=stock), explicit_m2(program, guide, unknown)
    )


@pytest.mark.parametrize("stock", [False, True])
def test_known_labels_ask_nothing_of_the_classifier(stock: bool) -> None:
    program, guide = M2(), M2Guide()
    for y in (LABELS, Batch.of({"y": LABELS}).hide("y", torch.ones(N).bool())["y"]):
        _, grads = result(program, guide, {"x": X1, "y": y}, stock=stock)
        assert not grads[2].any()
        assert grads[3].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "float"])
@pytest.mark.parametrize("gap", [5.0, 30.0, 120.0, 500.0])
def test_labels_at_extreme_gaps(gap: float, dtype: torch.dtype) -> None:
    """The label and the data disagree by many nats; two factors besides p(y)."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([0.0, math.sqrt(2 * gap)], dtype=dtype))

        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", len(batch)):
                y = pyro.sample("y", dist.Categorical(torch.ones(2, dtype=dtype)))
                pyro.sample("x", dist.Normal(self.loc[y], 1.0))
                pyro.sample("t", dist.Normal(self.loc[1 - y], 1.0))

    program = Two()
    x = torch.zeros(4, dtype=dtype)
    known = torch.tensor([True, True, False, False])
    data = {"x": x, "t": x, "y": (torch.tensor([1, 0, 0, 0]), known)}
    s = math.sqrt(2 * gap)
    # Each row: log p(y) + two densities, whatever the label, since x and t see both locations.
    row = -math.log(2) - math.log(2 * math.pi) - gap
    expected = -(2 * row + 2 * (row + math.log(2))) / 4
    loss, (grad,) = result(program, empty, data)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert grad.tolist() == pytest.approx([0.0, s], rel=1e-5, abs=1e-5)
    stock_loss, (stock_grad,) = result(program, empty, {"x": x, "y": data["y"]}, stock=True)
    alone = [-math.log(2) - 0.5 * math.log(2 * math.pi) - v for v in (gap, 0.0)]
    both = math.log(math.exp(-gap) + 1) + alone[1]
    assert float(stock_loss) == pytest.approx(-(alone[0] + alone[1] + 2 * both) / 4, rel=1e-6)
    weight = 1 / (1 + math.exp(gap)) if gap < 700 else 0.0
    assert stock_grad[1].item() == pytest.approx(s * (1 + 2 * weight) / 4, rel=1e-5)


@pytest.mark.parametrize(
    "fn",
    [
        lambda: dist.Bernoulli(torch.tensor(0.3)),
        lambda: dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])),
        lambda: dist.Binomial(2, torch.tensor(0.4)),
        lambda: dist.Categorical(torch.tensor([0.2, 0.5, 0.3])).mask(torch.tensor(True)),
    ],
    ids=["bernoulli", "one-hot", "binomial", "masked"],
)
def test_other_finite_sites_can_be_partly_known(fn: Callable[[], Any]) -> None:
    def program(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", fn())
            shift = y.sum(-1) + y[..., 0] if fn().event_shape else y
            pyro.sample("x", dist.Normal(shift.to(torch.get_default_dtype()), 1.0))

    values = fn().enumerate_support()
    index = torch.arange(N) % len(values)
    y, x = values[index], torch.randn(N)
    joint = []
    for v in values:
        shift = v.sum(-1) + v[..., 0] if fn().event_shape else v
        joint.append(fn().log_prob(v) + dist.Normal(shift.to(x.dtype), 1.0).log_prob(x))
    table = torch.stack(joint)
    exact = torch.where(KNOWN, table[index, torch.arange(N)], table.logsumexp(0))
    torch.testing.assert_close(
        EnumELBO(split=False).per_row(program, empty, {"x": x, "y": (y, KNOWN)}), exact
    )


def test_entries_of_a_summed_site_cannot_be_missing() -> None:
    def program(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("x", normal(y))

    y = torch.eye(3)[LABELS]
    with pytest.raises(ValueError, match="'y': single entries of a summed site"):
        EnumELBO().loss(program, empty, {"x": torch.zeros(N, 3), "y": (y, ENTRIES)})


def test_labels_in_an_inner_plate() -> None:
    logits, loc = torch.randn(K), torch.randn(K)
    x, labels = torch.randn(N, N), torch.randint(K, (N, N))

    def program(batch: Batch) -> None:
        with pyro.plate("data", len(batch)), pyro.plate("sensors", N):
            y = pyro.sample("y", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(loc[y], 1.0))

    joint = logits.log_softmax(-1) + dist.Normal(loc, 1.0).log_prob(x.unsqueeze(-1))
    chosen = joint.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    entries = torch.rand(N, N) > 0.5
    for known in (entries, KNOWN):
        p, q = pair(program, empty)
        data = {"x": x, "y": (labels, known)}
        wide = known.reshape(N, -1)
        exact = torch.where(wide, chosen, joint.logsumexp(-1)).sum(-1)
        torch.testing.assert_close(EnumELBO(split=False).per_row(p, q, data), exact)
        stock = TraceEnum_ELBO(max_plate_nesting=2).loss(p, q, Batch.of(data))
        assert stock == pytest.approx(-exact.sum().item())


# ---- 4: continuous sites ---------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", normal(self.a))
            pyro.sample("x", normal(z * self.a))


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("known", [KNOWN, torch.rand(N, 2) > 0.5], ids=["rows", "entries"])
def test_a_partly_known_continuous_site(known: Tensor, stock: bool) -> None:
    program, guide = Chain(), Guide("z")
    value = torch.randn(N, 2)
    found = result(program, guide, {"x": X1, "z": (value, known)}, stock=stock)
    torch.manual_seed(0)
    loc = guide.loc["z"].expand(N, 2)
    draw = loc + 0.7 * torch.randn(N, 2)
    mask = known.reshape(N, -1).expand(N, 2)
    z = torch.where(mask, value, draw)
    cost = torch.where(mask, 0.0, dist.Normal(loc, 0.7).log_prob(draw)).sum(-1)
    loss = -(normal(program.a).log_prob(z) + normal(z * program.a).log_prob(X1) - cost).mean()
    params = [*program.parameters(), *guide.parameters()]
    assert_close(found, (loss.detach(), list(torch.autograd.grad(loss, params))))


def test_known_rows_of_a_latent_count_without_data() -> None:
    found = terms(
        Chain(), Guide("z"), {"z": (X2, KNOWN), "x": (X1, torch.tensor([False] * 2 + [True] * 4))}
    )
    assert torch.equal(found["z"] != 0, torch.tensor([True, False, True, True, True, True]))


def test_partly_known_entries_of_a_correlated_proposal() -> None:
    root = torch.randn(2, 2)
    cov = root @ root.T + torch.eye(2)
    known = torch.tensor([[True, False], [False, True]] * 3)

    def guide(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(N, 2), cov))

    program = Chain()
    _, q = pair(program, guide)
    trace = poutine.trace(q).get_trace(Batch.of({"x": X1, "z": (X2, known)}))
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    assert torch.equal(z[known], X2[known])
    exact = dist.Normal(0.0, cov.diag().sqrt()).log_prob(z)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], torch.where(known, 0.0, exact).sum(-1))


def test_an_unproposed_latent_is_named() -> None:
    text = r"site 'w' \(Independent\) is not observed everywhere.*which proposes: z\)"
    with pytest.raises(ValueError, match=text):
        EnumELBO().loss(Modalities(), Guide("z"), {"x_1": X1, "x_2": X2})
    with pytest.raises(ValueError, match=r"site 'z'.*which proposes: nothing"):
        EnumELBO().loss(Chain(), empty, {"x": X1, "z": (X2, KNOWN)})
    with pytest.raises(
        ValueError, match=r"site 'n' \(Poisson\) is not observed everywhere, cannot be summed"
    ):
        EnumELBO().loss(counting, empty, {"x": torch.zeros(N)})
    EnumELBO().loss(Modalities(), Guide("z"), {"x_1": X1})  # w does not matter here


def counting(batch: Batch) -> None:
    with pyro.plate("data", len(batch)):
        n = pyro.sample("n", dist.Poisson(1.0))
        pyro.sample("x", dist.Normal(n, 1.0))


# ---- 5: keys ---------------------------------------------------------------------------------------


def test_wrong_keys() -> None:
    program, guide = Modalities(), Guide("z", "w")
    with pytest.raises(
        ValueError,
        match=r"'x1' is not a site of the program \(sites: z, w, x_1, x_2\)\. Did you mean 'x_1'\?.*inputs=\['x1'\]",
    ):
        EnumELBO().loss(program, guide, {"x1": X1})
    with pytest.raises(ValueError, match="Did you mean 'context'"):
        EnumELBO(inputs=("context",)).loss(program, guide, {"x_1": X1, "contxt": X1})


def test_inputs_are_read_and_not_observed() -> None:
    def program(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            pyro.sample("x", normal(batch["context"]))

    data = {"x": X1, "context": X2}
    exact = normal(X2).log_prob(X1)
    p, q = pair(program, empty, inputs=["context"])
    torch.testing.assert_close(EnumELBO().per_row(p, q, data), exact)
    torch.testing.assert_close(EnumELBO(inputs=("context",)).per_row(program, empty, data), exact)
    trace = poutine.trace(observe(program, inputs=["context"])).get_trace(data)
    torch.testing.assert_close(trace.log_prob_sum(), exact.sum())
    assert "context: input" in EnumELBO().explain(p, q, data)
    with pytest.raises(ValueError, match="'context' is not a site"):
        EnumELBO().loss(program, empty, data)


def test_an_input_that_is_a_site_is_checked_like_one() -> None:
    with pytest.raises(ValueError, match=r"site 'x_1' has rows of shape \(2,\)"):
        EnumELBO(inputs=("x_1",)).loss(Modalities(), Guide("z", "w"), {"x_1": torch.zeros(N, 3)})


def test_what_cannot_be_observed() -> None:
    def program(batch: Batch) -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(batch)):
            x = pyro.sample("x", dist.Normal(g, 1.0))
            pyro.deterministic("d", 2 * x)
            pyro.factor("f", -x)

    value = torch.zeros(N)
    for key, text in {
        "d": "'d' is a deterministic site and cannot be observed",
        "f": "'f' is a factor site and cannot be observed",
        "g": "site 'g' is not in plate 'data'.*poutine.condition",
    }.items():
        with pytest.raises(ValueError, match=text):
            EnumELBO().loss(program, empty, {key: value})
        with pytest.raises(ValueError, match=text):
            observe(program, inputs=[key])({key: value})


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            {"y": torch.tensor([0, 1, 5, 0, -1, 0])},
            r"site 'y' takes values in 0\.\.2, but 2 of 6 lie outside \(smallest -1, largest 5\)",
        ),
        ({"y": torch.zeros(N)}, "site 'y' takes integers, got torch.float"),
        ({"y": torch.zeros(N, 1).long()}, r"site 'y' has rows of shape \(\), got \(1,\)"),
        ({"x": torch.zeros(N)}, r"site 'x' has rows of shape \(2,\), got \(\)"),
        ({"x": torch.zeros(N, 2, 1)}, r"site 'x' has rows of shape \(2,\), got \(2, 1\)"),
        (
            {"b": torch.full((N, 2), 0.5)},
            "site 'b' takes values in .*, but 6 of 6 lie outside .smallest 0.5",
        ),
        ({"b": (torch.full((N, 2), 7.0), torch.rand(N, 2) > 2)}, ""),
        (
            {"b": (torch.full((N, 2), 7.0), torch.eye(6, 2) > 0)},
            "site 'b' .* but 2 of 6 lie outside .*largest 7",
        ),
        ({"y": (torch.full((N,), -1), KNOWN)}, r"site 'y' takes values in 0\.\.2, but 3 of 6"),
        ({"y": (torch.where(KNOWN, LABELS, -1), KNOWN)}, ""),
    ],
)
def test_values_that_do_not_fit(data: Any, text: str) -> None:
    class Program(Mixture):
        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", len(batch)):
                y = pyro.sample("y", dist.Categorical(logits=self.logits))
                pyro.sample("b", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
                pyro.sample("x", normal(self.loc[y]))

    data = {"x": X1, **data}
    if text:
        with pytest.raises(ValueError, match=text):
            EnumELBO().loss(Program(), empty, data)
    else:
        EnumELBO().loss(Program(), empty, data)


def test_grey_pixels_where_validation_is_off() -> None:
    x = torch.rand(N, 2)
    loose = one_leaf(lambda: dist.Bernoulli(torch.full((2,), 0.5), validate_args=False).to_event(1))
    rows = EnumELBO().per_row(loose, empty, {"x": x})
    torch.testing.assert_close(rows, torch.full((N,), 2 * math.log(0.5)))
    x[0, 0], seen = -1.5, torch.ones(N, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"site 'x' takes values in \[0, 1\], but 1 of"):
        EnumELBO().loss(loose, empty, {"x": x})
    seen[0, 0] = False
    EnumELBO().loss(loose, empty, {"x": (x, seen)})


# ---- plates ----------------------------------------------------------------------------------------


class Panel(nn.Module):
    """A latent per row, one per row and sensor, and a crossed latent per sensor."""

    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.crossed, self.a = crossed, nn.Parameter(torch.randn(()))

    def forward(self, batch: Batch) -> None:
        data, sensors = pyro.plate("data", len(batch), dim=-1), pyro.plate("sensors", N, dim=-2)
        g: Any = 0.0
        if self.crossed:
            with sensors:
                g = pyro.sample("g", dist.Normal(self.a, 1.0))
        with data:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with sensors:
                u = pyro.sample("u", dist.Normal(z + g, 1.0))
                pyro.sample("x", dist.Normal(self.a * u, 1.0))


class PanelGuide(nn.Module):
    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.crossed, self.b = crossed, nn.Parameter(torch.randn(3))

    def forward(self, batch: Batch) -> None:
        data, sensors = pyro.plate("data", len(batch), dim=-1), pyro.plate("sensors", N, dim=-2)
        if self.crossed:
            with sensors:
                pyro.sample("g", dist.Normal(self.b[0], 1.0).expand([N, 1]))
        with data:
            pyro.sample("z", dist.Normal(self.b[1], 1.0))
            with sensors:
                pyro.sample("u", dist.Normal(self.b[2], 1.0))


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("missing", ["none", "rows", "entries"])
def test_inner_and_crossed_plates(crossed: bool, missing: str) -> None:
    program, guide = Panel(crossed), PanelGuide(crossed)
    x = torch.randn(N, N)  # (rows, sensors), square on purpose
    entries = torch.rand(N, N) > 0.4
    entries[1] = False
    mask = {
        "none": torch.ones(N, N).bool(),
        "rows": KNOWN.unsqueeze(-1).expand(N, N),
        "entries": entries,
    }[missing]
    data = {"x": (x, KNOWN if missing == "rows" else mask)}
    found = result(program, guide, data)
    assert_close(found, result(program, guide, data, stock=True))
    torch.manual_seed(0)
    g: Any = 0.0
    total: Any = torch.zeros(())
    a, b = program.a, guide.b
    score = lambda loc, v: dist.Normal(loc, 1.0).log_prob(v)  # noqa: E731
    if crossed:
        g = b[0] + torch.randn(N, 1)
        total = (score(a, g) - score(b[0], g)).sum()
    z = b[1] + torch.randn(N)
    u = b[2] + torch.randn(N, N)
    m = mask.T
    total = total + torch.where(m.any(0), score(0.0, z) - score(b[1], z), 0.0).sum()
    total = total + torch.where(m, score(z + g, u) - score(b[2], u) + score(a * u, x.T), 0.0).sum()
    loss = -total / N
    params = [*program.parameters(), *guide.parameters()]
    assert_close(found, (loss.detach(), list(torch.autograd.grad(loss, params))))


# ---- foreign programs ------------------------------------------------------------------------------


def with_obs(batch: Batch) -> None:
    with pyro.plate("data", len(batch)):
        z = pyro.sample("z", normal(torch.zeros(2)))
        pyro.sample("x", normal(z), obs=batch["x"])


def bare(batch: Batch) -> None:
    with pyro.plate("data", len(batch)):
        z = pyro.sample("z", normal(torch.zeros(2)))
        pyro.sample("x", normal(z))


def constant(batch: Batch) -> None:
    with pyro.plate("data", len(batch)):
        z = pyro.sample("z", normal(torch.zeros(2)))
        pyro.sample("x", normal(z), obs=X2[: len(batch)])


def test_models_with_obs() -> None:
    guide = Guide("z")
    expected = result(bare, guide, {"x": X1})
    assert_close(result(with_obs, guide, {"x": X1}), expected)
    assert_close(
        result(with_obs, guide, {"x": (X1, KNOWN)}), result(bare, guide, {"x": (X1, KNOWN)})
    )
    assert_close(result(constant, guide, N), result(bare, guide, {"x": X2}))
    conditioned = poutine.condition(bare, data={"x": X1})
    assert_close(result(conditioned, guide, N), expected)
    assert_close(result(conditioned, guide, {"x": X1}), expected)


def test_a_value_is_replaced_only_on_purpose() -> None:
    guide = Guide("z")
    for program in (constant, poutine.condition(bare, data={"x": X2})):
        with pytest.raises(ValueError, match=r"already observes 'x'.*replace=\['x'\]"):
            EnumELBO().loss(program, guide, {"x": X1})
        assert_close(
            result(program, guide, {"x": X1}, replace=["x"]), result(bare, guide, {"x": X1})
        )
        partly = {"x": (X1, KNOWN)}
        assert_close(result(program, guide, partly, replace=["x"]), result(bare, guide, partly))
        assert EnumELBO(replace=("x",)).loss(program, guide, {"x": X1}) > 0


def test_conditioned_latents_are_not_proposed() -> None:
    fixed = poutine.condition(bare, data={"z": X2})
    rows = EnumELBO().per_row(fixed, empty, {"x": X1})
    torch.testing.assert_close(rows, normal(torch.zeros(2)).log_prob(X2) + normal(X2).log_prob(X1))
    with pytest.raises(
        ValueError, match="the guide proposes 'z', which the program itself observes"
    ):
        EnumELBO().loss(fixed, Guide("z"), {"x": X1})


def test_a_site_that_program_and_batch_observe_may_be_proposed() -> None:
    class Foreign(M2):
        def forward(self, batch: Batch) -> None:
            obs = batch["y"] if "y" in batch else None  # noqa: SIM401
            with pyro.plate("data", len(batch)):
                y = pyro.sample("y", dist.Categorical(logits=self.logits), obs=obs)
                z = pyro.sample("z", normal(torch.zeros(2)))
                pyro.sample("x", normal(z + self.loc[y], 0.8), obs=batch["x"])

    program, guide = Foreign(), M2Guide()
    plain = M2()
    plain.load_state_dict(program.state_dict())
    for data in ({"x": X1}, {"x": X1, "y": LABELS}, {"x": X1, "y": (LABELS, KNOWN)}):
        assert_close(result(program, guide, data), result(plain, guide, data))


def test_delta_and_deterministic_sites() -> None:
    def program(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            d = pyro.sample("d", dist.Delta(2 * z, event_dim=1))
            e = pyro.deterministic("e", d + 1)
            pyro.sample("x", normal(e))

    def plain(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(2 * z + 1))

    guide = Guide("z")
    for data in ({"x": X1}, {"x": (X1, KNOWN)}):
        for stock in (False, True):
            assert_close(result(program, guide, data, stock=stock), result(plain, guide, data))
    p, q = pair(program, guide)
    assert "d: computed by the program" in EnumELBO().explain(p, q, {"x": X1})


def test_programs_that_change_from_run_to_run() -> None:
    runs = []

    def program(batch: Batch) -> None:
        runs.append(0)
        with pyro.plate("data", len(batch)):
            pyro.sample(f"x{len(runs)}", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site 'x2' is not drawn in every run"):
        observe(program)({"x1": torch.zeros(N)})


def test_guides_that_do_not_fit() -> None:
    def misnamed(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            pyro.sample("zz", normal(torch.zeros(2)))

    def other_shape(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            pyro.sample("z", normal(torch.zeros(3)))

    def no_plate(batch: Batch) -> None:
        pyro.sample("z", dist.Normal(torch.zeros(N, 2), 1.0).to_event(2))

    def shared(batch: Batch) -> None:
        pyro.sample("z", normal(torch.zeros(2)))

    for guide, text in {
        misnamed: "the guide draws 'zz', which is not a site of the program.*is_auxiliary",
        other_shape: r"'z' has event shape \(2,\) in the program, but \(3,\)",
        no_plate: r"'z' has event shape \(2,\) in the program, but \(6, 2\)",
        shared: r"'z' lies in plates \{'data': -1\} .* but none in the guide",
    }.items():
        with pytest.raises(ValueError, match=text):
            EnumELBO().loss(bare, guide, {"x": X1})


def test_auxiliary_sites_follow_what_is_drawn_from_them() -> None:
    def guide(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            a = pyro.sample("a", normal(torch.zeros(len(batch), 2)), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(a + 1, event_dim=1))

    for data, rows in (
        ({"x": (X1, KNOWN)}, KNOWN),
        ({"x": X1, "z": (X2, KNOWN)}, ~KNOWN),
        ({"x": X1, "z": X2}, torch.zeros(N).bool()),
        ({"x": X1}, torch.ones(N).bool()),
    ):
        found = terms(bare, guide, data)
        assert torch.equal(found["a"] != 0, rows)


def test_a_joint_proposal_of_all_rows_must_count_everywhere() -> None:
    def guide(batch: Batch) -> None:
        a = pyro.sample(
            "a", dist.Normal(torch.zeros(N, 2), 1.0).to_event(2), infer={"is_auxiliary": True}
        )
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.Delta(a, event_dim=1))

    EnumELBO().loss(bare, guide, {"x": X1})
    with pytest.raises(
        ValueError, match="the guide draws 'a' once for all of plate 'data', but 'z'"
    ):
        EnumELBO().loss(bare, guide, {"x": (X1, KNOWN)})


# ---- the program alone -----------------------------------------------------------------------------


def test_observing_alone_prunes_nothing_and_has_no_offset() -> None:
    program = Mixture()
    data = {"x": X1, "y": (LABELS, KNOWN)}
    trace = poutine.trace(observe(program)).get_trace(data)
    y, z = trace.nodes["y"]["value"], trace.nodes["z"]["value"]
    assert torch.equal(y[KNOWN], LABELS[KNOWN])
    exact = (
        program.logits.log_softmax(-1)[y]
        + normal(program.loc[y], 0.5).log_prob(z)
        + normal(z, 0.8).log_prob(X1)
    )
    torch.testing.assert_close(trace.log_prob_sum(), exact.sum())
    trace = poutine.trace(observe(Modalities())).get_trace({"x_1": X1})
    assert not trace.nodes["w"]["is_observed"]
    assert not trace.nodes["x_2"]["is_observed"]
    assert trace.nodes["w"]["mask"] is None


def test_a_sampler_cannot_move_known_rows() -> None:
    program = observe(Chain())
    data = {"x": X1, "z": (X2, KNOWN)}
    free = poutine.trace(program).get_trace(data).nodes["z"]["value"]
    assert torch.equal(free[KNOWN], X2[KNOWN])
    assert not torch.equal(free[~KNOWN], X2[~KNOWN])
    poutine.trace(poutine.condition(program, data={"z": free})).get_trace(data)
    with pytest.raises(ValueError, match="'z' is known in part, but got another value"):
        poutine.condition(program, data={"z": free + 1})(data)


@pytest.mark.parametrize("form", ["method", "lambda", "handler"])
def test_parameters_are_found_behind_methods_and_handlers(form: str) -> None:
    program, guide = Chain(), Guide("z")
    net: Any = {
        "method": program.forward,
        "lambda": lambda batch: program(batch),
        "handler": poutine.scale(program, scale=1.0),
    }[form]
    p, q = pair(net, guide)
    assert [id(v) for v in p.parameters()] == [id(v) for v in program.parameters()]
    assert [id(v) for v in q.parameters()] == [id(v) for v in guide.parameters()]
    assert len(list(EnumELBO()(p, q).parameters())) == 2


def test_precision_follows_the_parameters() -> None:
    program, guide = Chain().float(), Guide("z").float()
    p, q = pair(program, guide)
    assert EnumELBO().per_row(p, q, {"x": X1}).dtype == torch.float32
    image = torch.tensor([[0, 255]] * N, dtype=torch.uint8)
    exact = poutine.trace(observe(Chain())).get_trace({"x": image}).nodes["x"]["value"]
    assert exact.tolist() == [[0.0, 1.0]] * N
    assert exact.dtype == torch.float64


def test_lines_for_people() -> None:
    p, _ = pair(M2(), M2Guide())
    batch = p.pairing.prepare({"x": X1, "y": (LABELS, KNOWN)})
    lines = p.pairing.plan(batch).describe(batch)
    assert lines == [
        "y: known in 3 of 6 rows, elsewhere proposed by the guide, summed over 3 values",
        "z: proposed by the guide",
        "x: observed",
    ]
    p, _ = pair(Modalities(), Guide("z", "w"))
    batch = p.pairing.prepare({"x_1": (X1, ENTRIES[:, :2])})
    hidden = ~ENTRIES[:, :2]
    assert p.pairing.plan(batch).describe(batch)[1:3] == [
        "w: not observed, nor anything that depends on it: left out",
        f"x_1: observed; {int(hidden.sum())} of 12 entries missing in {int(hidden.any(1).sum())} of 6"
        " rows: left out of the bound",
    ]
    known = torch.tensor([True, True, False, False, True, False])
    batch = p.pairing.prepare({"x_1": (X1, known)})
    lines = p.pairing.plan(batch).describe(batch)
    assert lines[2] == "x_1: observed; missing in 3 of 6 rows: left out of the bound"
    assert lines[-1] == "3 of 6 rows have nothing observed: they count zero"
    batch = p.pairing.prepare({"x_1": (X1, known), "x_2": X2, "z": (X1, ~known)})
    assert p.pairing.plan(batch).describe(batch) == [
        "z: known in 3 of 6 rows, elsewhere proposed by the guide",
        "w: proposed by the guide",
        "x_1: observed; missing in 3 of 6 rows: left out of the bound",
        "x_2: observed",
    ]
