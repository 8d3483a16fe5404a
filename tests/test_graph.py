"""The graph of a program: what depends on what, and that looking changes nothing."""

import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from pyrozoo.inference import Batch, EnumELBO, pair
from pyrozoo.inference.graph import modules_of, read_graph

TABLE = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
EMBEDDING = nn.Embedding(3, 2)
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "table": lambda y, z: TABLE[y],
    "vindex": lambda y, z: Vindex(TABLE)[y, :],
    "embedding": lambda y, z: EMBEDDING(y),
    "gather": lambda y, z: TABLE.index_select(0, y),
    "detach": lambda y, z: z.detach(),
    "where": lambda y, z: torch.where((y > 1).unsqueeze(-1), 1.0, 0.0).expand(-1, 2),
    "deterministic": lambda y, z: pyro.deterministic("d", z * 2),
    "delta": lambda y, z: pyro.sample("d", dist.Delta(z * 2, event_dim=1)),
    "cat": lambda y, z: torch.cat([z[:, :1], torch.zeros(2, 1)], -1),
    "matmul": lambda y, z: z @ torch.ones(2, 2),
}


@pytest.mark.parametrize("step", STEPS)
def test_edges_survive(step: str) -> None:
    def program(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(STEPS[step](y, z), 1.0).to_event(1))

    graph = read_graph(program, Batch.of(2))
    used = "y" if step in ("table", "vindex", "embedding", "gather", "where") else "z"
    below = {"x", "d"} if step == "delta" else {"x"}
    assert graph.descendants(used) == below
    assert graph.descendants({"y": "z", "z": "y"}[used]) == set()
    if step == "delta":
        assert graph.sites["x"].parents == {"d"}
        assert graph.sites["d"].fixed


def test_sites_say_what_they_are() -> None:
    def program(batch: Batch) -> None:
        w = pyro.sample("w", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            with pyro.plate("inner", 4), poutine.scale(scale=w):
                x = pyro.sample("x", dist.Normal(y.double(), w).expand([4, len(batch)]))
            pyro.factor("f", (x.sum(0) - 1).square())
            pyro.deterministic("t", 2 * x)

    graph = read_graph(program, Batch.of(5))
    sites = graph.sites
    assert [s.kind for s in sites.values()] == [
        "sample",
        "sample",
        "sample",
        "factor",
        "deterministic",
    ]
    assert not sites["w"].local
    assert sites["y"].summable
    assert not sites["y"].continuous
    assert sites["x"].dims == {"data": -1, "inner": -2}
    assert sites["x"].row_shape == (4,)
    assert sites["x"].parents == {"w", "y"}
    assert graph.descendants("w") == {"x", "f"}
    assert graph.nesting == 2
    assert sites["y"].dtype == torch.int64


def test_a_chain_is_followed_to_its_end() -> None:
    def program(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            c = pyro.sample("c", dist.Normal(b, 1.0))
            with poutine.mask(mask=a > 0):
                pyro.sample("m", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(c, 1.0))

    graph = read_graph(program, Batch.of(3))
    assert graph.sites["c"].parents == {"b"}
    assert graph.descendants("a") == {"b", "c", "x", "m"}
    assert graph.descendants("c") == {"x"}


def test_conditioning_cuts_no_dependency() -> None:
    def program(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            x = pyro.sample("x", dist.Normal(z + w, 1.0), obs=torch.ones(len(batch)))
            pyro.sample("t", dist.Normal(x, 1.0))

    for f in (program, poutine.condition(program, data={"z": torch.zeros(2)})):
        graph = read_graph(f, Batch.of(2))
        assert graph.sites["x"].parents == {"z", "w"}
        assert graph.descendants("z") == {"x", "t"}
        own = graph.sites["x"].own
        assert own is not None
        assert own.tolist() == [1, 1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(2).eval()

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.frozen(self.drop(self.norm(z))), 1.0).to_event(1))


@pytest.mark.parametrize("wrap", ["module", "enumerated", "method", "lambda", "partial"])
def test_looking_changes_nothing(wrap: str) -> None:
    net = Net()
    f: Any = {
        "module": net,
        "enumerated": config_enumerate(net),
        "method": net.forward,
        "lambda": lambda batch: net(batch),
        "partial": functools.partial(net.forward),
    }[wrap]
    before = {n: v.clone() for n, v in net.state_dict().items()}
    state = torch.get_rng_state()
    with poutine.trace() as outside:
        graph = read_graph(f, Batch.of(5))
    assert graph.descendants("z") == {"x"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    assert net.training
    assert net.norm.training
    assert not net.frozen.training
    assert list(outside.trace.nodes) == []
    assert modules_of(f) == [net]


def test_flags_come_back_after_an_error() -> None:
    class Broken(Net):
        def forward(self, batch: Batch) -> None:
            assert not self.training
            raise RuntimeError("broken")

    net = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        read_graph(net, Batch.of(2))
    assert net.training
    assert net.norm.training


def test_a_name_drawn_twice_raises() -> None:
    def program(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(RuntimeError, match="Multiple sample sites named 'x'"):
        read_graph(program, Batch.of(2))


def test_a_plate_of_another_size_raises() -> None:
    def program(batch: Batch) -> None:
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(
        ValueError, match=r"plate 'data' has 3 rows at site 'x', but the batch has 2.*len\(batch\)"
    ):
        read_graph(program, Batch.of(2))


def test_a_plate_over_the_names_of_a_dictionary_cannot_happen() -> None:
    def program(batch: Any) -> None:
        with pyro.plate("data", len(batch)):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    p, q = pair(program, lambda batch: None)
    assert EnumELBO().per_row(p, q, {"x": torch.zeros(30)}).shape == (30,)


def test_the_program_is_looked_at_once_per_pattern() -> None:
    runs = []

    def program(batch: Batch) -> None:
        runs.append(len(batch))
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))
            pyro.sample("t", dist.Normal(z, 1.0))

    def guide(batch: Batch) -> None:
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    p, _ = pair(program, guide)
    value, known = torch.zeros(6), torch.tensor([True, False, True, True, False, True])
    seen = []
    for data in (
        {"x": value},
        {"x": value[:4]},
        {"x": (value, known)},
        {"x": (value[:5], ~known[:5])},
        {"x": value, "t": value},
        {"x": value},
    ):
        runs.clear()
        p(data)
        seen.append(len(runs))
    assert seen == [2, 1, 2, 1, 2, 1]


# ---- plates ----------------------------------------------------------------------------------------


def plated(order: str) -> Callable[[Batch], None]:
    """Sensors inside or outside the data plate, or crossed with it by explicit dims."""

    def program(batch: Batch) -> None:
        n = len(batch)
        data = pyro.plate(
            "data", n, dim=-2 if order == "outer" else -1 if order == "inner" else None
        )
        sensors = pyro.plate(
            "sensors", n, dim=-1 if order == "outer" else -2 if order == "inner" else None
        )
        first, second = (sensors, data) if order == "reverse" else (data, sensors)
        with first, second:
            pyro.sample("x", dist.Normal(0.0, 1.0))

    return program


@pytest.mark.parametrize(
    ("order", "dim"), [("inner", -1), ("outer", -2), ("nested", -1), ("reverse", -2)]
)
def test_square_arrays_are_not_transposed(order: str, dim: int) -> None:
    x = torch.arange(9.0).reshape(3, 3)
    p, q = pair(plated(order), lambda batch: None)
    trace = poutine.trace(p).get_trace({"x": x})
    expected = x if dim == -2 else x.T
    assert torch.equal(trace.nodes["x"]["value"], expected)
    rows = EnumELBO().per_row(p, q, {"x": x})
    assert torch.allclose(rows, dist.Normal(0.0, 1.0).log_prob(x).sum(1))


def test_three_plates_in_the_order_in_which_they_are_entered() -> None:
    def program(batch: Batch) -> None:
        with (
            pyro.plate("data", len(batch), dim=-2),
            pyro.plate("a", 3, dim=-3),
            pyro.plate("b", 4, dim=-1),
        ):
            pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(1))

    site = read_graph(program, Batch.of(2)).sites["x"]
    assert site.row_shape == (3, 4, 5)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(site.to_plates(x, 1), x.permute(1, 0, 2, 3))
    known = torch.rand(2, 3) > 0.5  # a mask may leave out plates at the end
    assert torch.equal(site.to_plates(known, 0), known.T.unsqueeze(-1))
    rows = torch.tensor([True, False])
    assert torch.equal(site.to_plates(rows, 0), rows.reshape(1, 2, 1))
