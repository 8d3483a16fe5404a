"""The private parts of Pyro and torch that are relied on, one test each; see inference/hooks.py."""

import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.enum import iter_discrete_traces
from pyro.infer.traceenum_elbo import _make_dist
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import nn
from torch.utils import _pytree

from pyrozoo.inference.hooks import HOOKS

CHECKS: dict[str, Callable[[], bool]] = {}


def check(f: Callable[[], bool]) -> Callable[[], bool]:
    CHECKS[f.__name__] = f
    return f


def model(enumerate_: str = "parallel") -> Any:
    with pyro.plate("rows", 2):
        y = pyro.sample("y", dist.Categorical(torch.ones(3)), infer={"enumerate": enumerate_})
        u = pyro.sample("u", dist.Categorical(torch.eye(3)[y] + 1), infer={"enumerate": enumerate_})
    return y, u


class Spy(Messenger):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def _pyro_sample(self, msg: Any) -> None:
        self.seen.append(("before", msg.copy()))

    def _pyro_post_sample(self, msg: Any) -> None:
        self.seen.append(("after", msg.copy()))

    def at(self, name: str) -> Any:
        return next(msg for when, msg in self.seen if when == "before" and msg["name"] == name)


@check
def enumerate_dim() -> bool:
    nodes = poutine.trace(EnumMessenger(-2)(model)).get_trace().nodes
    return [nodes[n]["infer"]["_enumerate_dim"] for n in "yu"] == [-2, -3]


@check
def enumerate_support_shape() -> bool:
    class Mixed(dist.Categorical):
        def enumerate_support(self, expand: bool = True) -> Any:
            return torch.tensor([[0, 1], [1, 1], [2, 1]])

    def mixed() -> None:
        with pyro.plate("rows", 2):
            pyro.sample("y", Mixed(torch.ones(2, 3)), infer={"enumerate": "parallel"})

    plain = poutine.trace(EnumMessenger(-2)(model)).get_trace().nodes
    value = poutine.trace(EnumMessenger(-3)(mixed)).get_trace().nodes["y"]["value"]
    support = dist.Categorical(torch.ones(2, 3)).enumerate_support(expand=False)
    return (
        plain["y"]["value"].shape == (3, 1)
        and plain["u"]["value"].shape == (3, 1, 1)
        and support.shape == (3, 1)
        and value.squeeze(1).tolist() == [[0, 1], [1, 1], [2, 1]]
    )


@check
def enum_total() -> bool:
    traces = list(
        iter_discrete_traces(
            "flat", lambda: pyro.sample("y", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})
        )
    )
    return len(traces) == 2 and all(t.nodes["y"]["infer"]["_enum_total"] == 2 for t in traces)


@check
def replay_infer() -> bool:
    guide = poutine.trace(
        lambda: pyro.sample("z", dist.Normal(0, 1), infer={"mark": 1})
    ).get_trace()
    free = poutine.trace(
        poutine.replay(lambda: pyro.sample("z", dist.Normal(0, 1)), guide)
    ).get_trace()
    one = torch.tensor(1.0)
    fixed = poutine.trace(
        poutine.replay(lambda: pyro.sample("z", dist.Normal(0, 1), obs=one), guide)
    ).get_trace()
    return (
        free.nodes["z"]["infer"].get("mark") == 1
        and free.nodes["z"]["value"] is guide.nodes["z"]["value"]
        and fixed.nodes["z"]["value"] is one
        and "mark" not in fixed.nodes["z"]["infer"]
    )


@check
def deterministic() -> bool:
    with Spy() as spy:
        pyro.deterministic("d", torch.ones(2))
    msg = spy.at("d")
    return bool(msg["type"] == "sample" and msg["is_observed"] and msg["infer"]["_deterministic"])


@check
def factor() -> bool:
    with Spy() as spy:
        pyro.factor("f", torch.tensor(2.0))
    msg = spy.at("f")
    return bool(
        isinstance(msg["fn"], dist.Unit)
        and msg["is_observed"]
        and msg["fn"].log_prob(msg["value"]) == 2
    )


@check
def markov_depth() -> bool:
    with Spy() as spy:
        pyro.sample("out", dist.Normal(0, 1))
        for t in pyro.markov(range(2)):
            pyro.sample(f"in{t}", dist.Normal(0, 1))
    return (
        bool(spy.at("in1")["infer"]["_markov_depth"])
        and "_markov_depth" not in spy.at("out")["infer"]
    )


@check
def subsample() -> bool:
    with Spy() as spy, pyro.plate("rows", 3, subsample_size=2):
        pyro.sample("x", dist.Normal(0, 1))
    return site_is_subsample(spy.at("rows")) and not site_is_subsample(spy.at("x"))


@check
def plates() -> bool:
    with (
        Spy() as spy,
        pyro.plate("a", 3),
        pyro.plate("b", 2),
        poutine.mask(mask=torch.ones(2, 3).bool()),
    ):
        pyro.sample("x", dist.Normal(0, 1))
    msg = spy.at("x")
    frames = [(f.name, f.dim, f.size, f.vectorized) for f in msg["cond_indep_stack"]]
    return (
        frames == [("a", -1, 3, True), ("b", -2, 2, True)]
        and msg["fn"].batch_shape == (2, 3)
        and msg["mask"].shape == (2, 3)
    )


@check
def handler_order() -> bool:
    order = []

    class Log(Spy):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def _pyro_sample(self, msg: Any) -> None:
            order.append(f"{self.name} before")

        def _pyro_post_sample(self, msg: Any) -> None:
            order.append(f"{self.name} after")
            msg["fn"].marked = True

    with poutine.trace() as trace, Log("outer"), Log("inner"):
        pyro.sample("x", dist.Normal(0, 1))
    return (
        order == ["inner before", "outer before", "outer after", "inner after"]
        and trace.trace.nodes["x"]["fn"].marked
    )


@check
def own_value() -> bool:
    class Free(Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            msg["is_observed"], msg["done"], msg["value"] = False, False, None

    value = torch.tensor(100.0)
    programs = (
        lambda: pyro.sample("x", dist.Normal(0, 1), obs=value),
        poutine.condition(lambda: pyro.sample("x", dist.Normal(0, 1)), data={"x": value}),
    )
    nodes = [poutine.trace(Free()(f)).get_trace().nodes["x"] for f in programs]
    return all(not n["is_observed"] and n["value"] < 50 for n in nodes)


@check
def handler_partial() -> bool:
    class Inside(nn.Module):
        def forward(self) -> None:
            return None

    net = Inside()
    wrapped = poutine.scale(net, scale=2.0)
    return isinstance(wrapped, functools.partial) and net in [
        *wrapped.args,
        *wrapped.keywords.values(),
    ]


@check
def provenance() -> bool:
    y = track_provenance(torch.tensor([1, 0]), frozenset({"y"}))
    table = torch.eye(2)[y]
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU()).eval()
    return (
        get_provenance(net(table)) == {"y"}
        and get_provenance(dist.Normal(table, 1).log_prob(torch.zeros(2, 2))) == {"y"}
        and get_provenance(nn.Embedding(2, 2)(y)) == {"y"}
        and type(detach_provenance(y)) is torch.Tensor
        and get_provenance(1.0) == frozenset()
    )


@check
def rebuilt() -> bool:
    class Mine(dist.Categorical):
        pass

    return type(_make_dist(Mine(torch.ones(3)), torch.zeros(3))) is Mine


@check
def base_dist() -> bool:
    normal = dist.Normal(torch.zeros(3), 1.0)
    nested = normal.to_event(1).mask(torch.tensor(True)).expand_by([2])
    while hasattr(nested, "base_dist"):
        nested = nested.base_dist
    return isinstance(nested, dist.Normal) and normal.to_event(1).reinterpreted_batch_ndims == 1


@check
def validate_args() -> bool:
    loose = dist.Bernoulli(torch.tensor(0.5), validate_args=False)
    return (
        loose._validate_args is False and dist.Bernoulli(torch.tensor(0.5))._validate_args is True
    )


@check
def particles() -> bool:
    spy = Spy()

    def program() -> None:
        with pyro.plate("rows", 2):
            pyro.sample("x", dist.Normal(0, 1), obs=torch.zeros(2))

    elbo = TraceEnum_ELBO(
        num_particles=4,
        vectorize_particles=True,
        max_plate_nesting=1,
        strict_enumeration_warning=False,
    )
    elbo.loss(lambda: spy(program)(), lambda: None)
    frames = next(m for when, m in reversed(spy.seen) if m["name"] == "x")["cond_indep_stack"]
    return [(f.name, f.dim, f.size) for f in frames] == [
        ("num_particles_vectorized", -2, 4),
        ("rows", -1, 2),
    ]


@check
def pytree() -> bool:
    leaves, spec = _pytree.tree_flatten({"a": [torch.ones(1)], "b": 2})
    back = _pytree.tree_unflatten(leaves, spec)
    return (
        len(leaves) == 2
        and back["b"] == 2
        and _pytree.tree_map(str, [1]) == ["1"]
        and callable(_pytree.register_pytree_node)
    )


@pytest.mark.parametrize("name", HOOKS)
def test_hook(name: str) -> None:
    torch.manual_seed(0)
    assert CHECKS[name](), (
        f"no longer true of pyro-ppl {pyro.__version__}, torch {torch.__version__}: {HOOKS[name]}"
    )


def test_every_check_is_listed() -> None:
    assert set(CHECKS) == set(HOOKS)
