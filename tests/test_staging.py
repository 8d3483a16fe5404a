"""Staged and eager losses agree, with their gradients; what cannot be staged falls back."""

import contextlib
import random
import warnings
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, ROWS, Empty, Mixture, elbo
from torch import nn

from pyrozoo import zoo
from pyrozoo.guides import Amortized, Classifier, Part, Sequential
from pyrozoo.inference import Batch, EnumELBO, SubsetELBO, fit, schedules, stage
from pyrozoo.inference.staging.capture import Captured, capturable
from pyrozoo.inference.staging.staged import MOST_GRAPHS
from pyrozoo.inference.staging.tracing import Traced
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.networks import Decoder, batched
from pyrozoo.zoo.semisupervised import M2

INPUTS = ("noise",)


pytestmark = pytest.mark.usefixtures("double")


def get(case, pattern, seed=0):
    return next(d for n, d in CASES[case].patterns(seed) if n == pattern)


def eager(staged, data):
    """The loss of the objective, and its gradients."""
    staged.module.zero_grad()
    loss = staged.objective.differentiable_loss(staged.p, staged.q, data)
    loss.backward()
    return [loss.detach(), *(x.grad for x in staged.module.parameters())]


def run(staged, data):
    loss = staged(data)
    return [loss.detach(), *(x.grad for x in staged.module.parameters())]


def check(staged, data, seed=3, rtol=1e-10, atol=1e-12):
    """The same loss and gradients from the same seed."""
    torch.manual_seed(seed)
    found = run(staged, data)
    torch.manual_seed(seed)
    for a, b in zip(found, eager(staged, data), strict=True):
        a, b = (torch.zeros(1) if x is None else x for x in (a, b))
        torch.testing.assert_close(a, b.expand_as(a) if b.dim() < a.dim() else b, rtol=rtol, atol=atol)  # fmt: skip


def staged_graph(objective, p, q, data):
    """Uncompiled, and without any fallback."""
    staged = stage(objective, p, q, data, compile=False)
    assert (staged.how, staged.graphs, staged.reason) == ("graph", 1, "")
    return staged


# ---- the law ----------------------------------------------------------------------------------------

PATTERNS = [(name, "some of all") for name in CASES]
PATTERNS += [("vade", "complete"), ("m2", "no y"), ("vade, q(y|x)", "no y"), ("mvae", "no x_a")]


@pytest.mark.parametrize(("case", "pattern"), PATTERNS)
def test_the_graph_is_the_program(case, pattern):
    p, q = CASES[case].pair()
    labels = ["y"] if CASES[case].labels and "y" in dict.fromkeys(CASES[case].widths) else []
    alpha = {n: 0.3 for n in labels if case not in ("mixture", "globals")}
    split = "auto" if case in ("m2", "mixture") else False
    objective = elbo(inputs=INPUTS, num_rows=50, observed_guide_weights=alpha, split=split)
    data = Batch.of(get(case, pattern))
    staged = staged_graph(objective, p, q, data)
    check(staged, data)
    other = Batch.of(get(case, pattern, seed=7))
    check(staged, other)
    for x in staged.module.parameters():  # the optimiser's steps are seen
        x.data.mul_(1.1)
    check(staged, other)
    for x in staged.module.parameters():
        x.data.div_(1.1)
    check(staged, other[:5])  # padded
    check(staged, other[torch.arange(2 * ROWS + 4) % ROWS])  # several passes
    assert (staged.graphs, staged.eager_calls) == (1, 0)


DATA = {
    "vade": lambda: {"x": torch.rand(8, 6), "y": (torch.arange(8) % 3, torch.arange(8) < 3)},
    "m2": lambda: {"x": torch.rand(8, 6), "y": (torch.arange(8) % 3, torch.arange(8) < 3)},
    "mvae": lambda: {
        "x_a": (torch.rand(8, 6), torch.arange(8) < 5),
        "x_b": (torch.rand(8, 4), torch.arange(8) > 2),
    },
    "hivae": lambda: {"x": (torch.rand(8, 3), torch.rand(8, 3) < 0.7)},
    "mfcvae": lambda: {"x": torch.rand(8, 6)},
    "vae": lambda: {"x": torch.rand(8, 6)},
}


@pytest.mark.parametrize("name", zoo.list_methods())
def test_every_entry_of_the_catalogue_is_staged_and_draws_the_same(name):
    data = Batch.of(DATA.get(name, DATA["vade"])())
    options = {"num_random": 2} if name == "mvae" else {"hidden": (8,)}
    model = zoo.create(name, data, **options)
    if model.prepare is not None:
        data, _ = model.prepare(data)
        model.objective.inputs = tuple(model.settings.get("inputs", ()))
    program, guide = model.program.double(), model.guide.double()
    model.objective.split = False  # the split pass draws in another order
    staged = staged_graph(model.objective, program, guide, data)
    check(staged, data, seed=3)
    check(staged, data, seed=4)
    first, second = (staged(data).item() for _ in range(2))
    assert (first == second) is (name in ("dec", "idec", "dcn"))  # their guides have no noise


@pytest.mark.parametrize("options", [{"num_particles": 3}, {"kl": "sampled"}, {"free_bits": {"z": 0.5}}])  # fmt: skip
def test_options_of_the_objective(options):
    p, q = CASES["vade, q(y|x)"].pair()
    data = {n: v for n, v in get("vade, q(y|x)", "some y").items() if n != "noise"}
    objective = EnumELBO(split=False, **options)
    check(staged_graph(objective, p, q.guide, data), data)


def test_subsets_are_staged_with_their_random_choice():
    p, q = CASES["mvae"].pair()
    weight = torch.tensor(0.2)
    objective = SubsetELBO([["x_a"]], num_random=2, weights={"z": weight})
    data = {n: v for n, v in get("mvae", "some of all").items() if n != "noise"}
    staged = staged_graph(objective, p, q.guide, data)
    for value in (0.2, 0.9):
        weight.fill_(value)
        check(staged, data)
    assert staged.graphs == 1


# ---- patterns ---------------------------------------------------------------------------------------


def test_one_graph_serves_all_patterns_of_a_run():
    case = CASES["mvae"]
    p, q = case.pair()
    generator = torch.Generator().manual_seed(0)
    data = Batch.of(get("mvae", "complete"))
    for name in ("x_a", "x_b"):
        data = data.hide(name, torch.rand(ROWS, generator=generator) < 0.5)
    staged = staged_graph(elbo(inputs=INPUTS), p, q, data)
    for _ in range(6):
        check(staged, data[torch.randint(ROWS, (ROWS,), generator=generator)])
    assert (staged.graphs, staged.eager_calls) == (1, 0)
    check(staged, data.drop("x_a"))  # another kind of data is another graph, once
    check(staged, data.drop("x_a")[:4])
    assert (staged.graphs, staged.eager_calls) == (2, 0)


def test_split_rows_have_groups_of_fixed_sizes():
    p, q = CASES["m2"].pair()
    data = get("m2", "complete")
    batch = Batch.of({**data, "y": (data["y"], torch.arange(ROWS) < 4)})
    objective = elbo(inputs=INPUTS, observed_guide_weights={"y": 0.3})
    staged = staged_graph(objective, p, q, batch)
    (step,) = staged._steps.values()
    assert set(step.layout.sizes) == {(), ("y",)}
    for known in (0, 1, 4, ROWS):
        check(staged, batch[torch.arange(ROWS) % max(known, 1)])
        check(staged, Batch.of(data).hide("y", torch.arange(ROWS) < known))
    assert (staged.graphs, staged.eager_calls) == (1, 0)


def test_padding_has_no_gradient_even_at_impossible_values():
    """A row that serves as padding may be impossible in the group that it pads."""
    p = Mixture().double()
    with torch.no_grad():
        p.logits[0] = -torch.inf
    data = {"x": torch.randn(4, 4), "y": (torch.tensor([1, 2, 0, 0]), torch.arange(4) < 2)}
    staged = staged_graph(EnumELBO(split=True), p, Empty(), data)
    unknown = Batch.of(data)[[2, 3, 2, 3]]
    loss, *grads = run(staged, unknown)
    assert loss.isfinite()
    torch.testing.assert_close(grads[1], eager(staged, unknown)[2])


# ---- weights and modes ------------------------------------------------------------------------------


def test_weights_are_no_constants():
    p, q = CASES["m2"].pair()
    data = get("m2", "some y")
    weights = {"weights": {"z": 0.1}, "observed_guide_weights": {"y": 0.3}}
    objective = elbo(inputs=INPUTS, split=False, **weights)
    staged = staged_graph(objective, p, q, data)
    for weight, alpha in [(0.5, 0.3), (2.0, torch.tensor(1.7)), (torch.tensor(1.0), 0.0)]:
        objective.weights["z"], objective.observed_guide_weights["y"] = weight, alpha
        check(staged, data)
    assert staged.graphs == 1
    objective.weights["z"] = 1  # no weight at all: a simpler graph
    check(staged, data)
    objective.weights["z"] = 0.5
    check(staged, data)
    assert staged.graphs == 2


class Plain(nn.Module):
    """z ~ N(0, 1), x | z with a net of one's own; ``temperature`` is a number."""

    def __init__(self, net, latent_dim=2):
        super().__init__()
        self.net, self.latent_dim, self.temperature = net, latent_dim, 1.0

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            zero = torch.zeros(self.latent_dim)
            z = pyro.sample("z", dist.Normal(zero, self.temperature).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1))


def plain(*layers, kind=Plain):
    program = kind(nn.Sequential(nn.Linear(2, 5), *layers, nn.Linear(5, 3)))
    return program, Amortized(program, ["x"], (4,)), {"x": torch.randn(6, 3)}


def test_dropout_and_the_mode_of_the_modules():
    program, guide, data = plain(nn.Dropout(0.5))
    staged = staged_graph(EnumELBO(), program, guide, data)
    check(staged, data)
    program.eval()
    check(staged, data)
    program.train()
    check(staged, data)
    assert staged.graphs == 2


def test_numbers_of_modules_are_looked_at():
    program, guide, data = plain()
    staged = staged_graph(EnumELBO(), program, guide, data)
    program.temperature = 2.0
    check(staged, data)
    assert staged.graphs == 2
    for i in range(2, MOST_GRAPHS):
        program.temperature = 1.0 + i
        check(staged, data)
    program.temperature = 0.5
    with pytest.warns(UserWarning, match="change again and again"):
        staged(data)
    check(staged, data)
    assert (staged.graphs, staged.eager_calls) == (MOST_GRAPHS, 2)
    program.temperature = 1.0
    check(staged, data)  # this graph is still at hand
    assert staged.eager_calls == 2
    program.net[0].weight.requires_grad_(False)
    fresh = staged_graph(EnumELBO(), program, guide, data)
    check(fresh, data)
    assert program.net[0].weight.grad is None


def test_batch_statistics_move_with_the_calls_alone():
    program, guide, data = plain(nn.BatchNorm1d(5))
    norm = program.net[1]
    staged = staged_graph(EnumELBO(), program, guide, data)
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
    check(staged, data)
    assert norm.num_batches_tracked == 2
    before = norm.running_mean.clone()
    staged(data)
    assert not torch.equal(norm.running_mean, before)
    check(staged, {"x": data["x"][:4]})  # no row can be added: left to the objective
    assert staged.eager_calls == 1


def test_bytes_and_nets_with_one_batch_dimension():
    net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2), nn.Flatten())
    program = VaDE(6, 3, 2, (8,))
    program.decoder = Decoder(4, (5,), 6)
    program.decoder.mlp = nn.Sequential(nn.Linear(2, 4), batched(net), nn.Linear(2, 6))
    data = {"x": torch.randint(256, (7, 6), dtype=torch.uint8)}
    check(staged_graph(EnumELBO(), program, Amortized(program, ["x"], (8,)), data), data)


# ---- what it leaves behind --------------------------------------------------------------------------


def test_staging_leaves_no_trace():
    program, guide, data = plain(nn.Dropout(0.5))
    state = torch.get_rng_state()
    staged = stage(EnumELBO(), program, guide, data, compile=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(x.grad is None for x in staged.module.parameters())
    assert not pyro.get_param_store().keys()
    assert torch.distributions.Distribution._validate_args
    staged.objective.loss(staged.p, staged.q, data)


def test_gradients_are_overwritten_and_own_their_memory():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.idle = (nn.Parameter(torch.ones(3)) for _ in range(3))

        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                pyro.sample("x", dist.Normal(self.a + self.b, 1.0).to_event(1))

    program, data = Sum(), {"x": torch.randn(4, 3)}
    staged = staged_graph(EnumELBO(), program, Empty(), data)
    check(staged, data)
    program.idle.grad = torch.ones(3)
    staged(data)
    staged(data)
    before = program.b.grad.clone()
    assert program.idle.grad is None
    assert torch.equal(program.a.grad, before)
    program.a.grad.zero_()
    assert torch.equal(program.b.grad, before)
    assert before.any()


def test_training_gives_the_same_parameters():
    data = get("factor analysis", "some x")
    trained = []
    for staging in (False, True):
        p, q = CASES["factor analysis"].pair(fresh=True)
        objective = elbo(inputs=INPUTS)
        staged = stage(objective, p, q, data, compile=False)
        optimizer = torch.optim.Adam(staged.module.parameters(), lr=0.01, fused=True)
        for _ in range(5):
            if staging:
                loss = staged.step(data, optimizer, clip=0.5)
            else:
                loss = eager(staged, data)[0]
                nn.utils.clip_grad_norm_(staged.module.parameters(), 0.5)
                optimizer.step()
        assert not loss.requires_grad
        trained.append([loss, *staged.module.parameters()])
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_what_is_captured_on_a_gpu(monkeypatch):
    """What stands in for the capture here runs its body; a replay does nothing."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    x = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adam([x], lr=0.1, fused=True)
    x.grad = torch.ones(4)
    optimizer.step()
    assert capturable(optimizer)
    assert not capturable(torch.optim.Adam([x]))
    assert not capturable(torch.optim.SGD([x], lr=0.1, fused=True))
    traced = Traced(None, [x], [0])

    def capture(value):
        loss = lambda p, v: [(p * v).sum(), v.expand(4).clone()]  # noqa: E731
        with torch.no_grad():
            return Captured(loss, traced, [x], [torch.tensor(value)], optimizer, 0.5)

    before = x.detach().clone()
    capture(torch.nan)
    assert torch.equal(x, before)
    step = capture(3.0)
    assert not torch.equal(x, before)
    assert x.grad.norm().item() == pytest.approx(0.5)
    (group,) = optimizer.param_groups
    rate = group["lr"]
    group["lr"] = 0.01
    assert step([torch.tensor(5.0)]) == step.loss
    assert step.inputs[0] == 5
    assert group["lr"] is rate
    assert rate == 0.01
    x.grad = torch.ones(4)
    before = x.detach().clone()
    optimizer.step()  # nothing of the capture is left in its way
    assert not torch.equal(x, before)


# ---- falling back -----------------------------------------------------------------------------------


class Branch(Plain):
    def forward(self, batch):
        if "x" in batch and batch["x"].mean() > 100:
            raise ValueError("never")
        super().forward(batch)


class Random(Plain):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z) * random.random(), 1.0).to_event(1))


class Counting(Plain):
    calls = 0

    def __init__(self, net):
        super().__init__(net)
        self.calls = 0

    def forward(self, batch):
        self.calls += 1
        super().forward(batch)


class Stray(Plain):
    outside = torch.ones(3, requires_grad=True)

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.outside).to_event(1))


class NotSummed(Plain):
    """An integer that is neither summed nor reparameterised: outside the row-wise class."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            n = pyro.sample("n", dist.Poisson(torch.ones(())))
            loc = self.net(z) + 0.1 * n.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))


class Count(Part):
    """q(n), Poisson."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.ones(()))

    def inside(self, batch, drawn):
        return {"n": pyro.sample("n", dist.Poisson(self.rate.exp()))}


class OwnLoss(EnumELBO):
    def differentiable_loss(self, program, guide, batch):
        return 2 * super().differentiable_loss(program, guide, batch)


FALLBACKS = {
    Branch: r"a value decides what happens next \(test_staging.py, line \d+: if \"x\" in batch",
    Random: "the graph differs from the program: is Python drawing at random",
    Counting: "attribute 'calls' of Counting changes whenever it runs",
    Stray: r"tensors of shape \(3,\) ask for a gradient, but are no parameters",
    NotSummed: "site 'n' of the guide is neither summed nor reparameterised",
}


@pytest.mark.parametrize("kind", FALLBACKS)
def test_what_cannot_be_staged_runs_with_pyro_and_says_why(kind):
    program, guide, data = plain(kind=kind)
    if kind is NotSummed:
        guide = Sequential(Amortized(program, ["x"], (4,), sites=["z"]), Count())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "falling back to Pyro's")
        with pytest.warns(UserWarning, match="not compiled: every step runs with Pyro: " + FALLBACKS[kind]):  # fmt: skip
            staged = stage(EnumELBO(), program, guide, data)
        assert (staged.how, staged.graphs) == ("eager", 0)
        assert staged.reason in staged.describe()
        random.seed(0)
        torch.manual_seed(3)
        found = run(staged, data)  # no second warning
        random.seed(0)
        torch.manual_seed(3)
        for a, b in zip(found, eager(staged, data), strict=True):
            assert torch.equal(a, b)
    assert staged.eager_calls == 1


def test_a_loss_of_its_own_is_left_alone():
    program, guide, data = plain()
    with pytest.warns(UserWarning, match="OwnLoss computes its loss in a way of its own"):
        staged = stage(OwnLoss(), program, guide, data)
    check(staged, data)


def test_errors_are_those_of_the_objective():
    program, guide, data = plain()
    with pytest.raises(ValueError, match="Did you mean 'x'"):
        stage(EnumELBO(), program, guide, {"X": data["x"]})
    with pytest.raises(ValueError, match="no rows"):
        stage(EnumELBO(), program, guide, {"x": data["x"][:0]})


def test_without_a_compiler_it_is_staged_but_not_compiled():
    program, data = Mixture(), {"x": torch.randn(6, 4)}
    options = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(options),
        pytest.warns(UserWarning, match=r"not compiled: there is no C\+\+ compiler"),
    ):
        staged = stage(EnumELBO(), program, Empty(), data)
    assert staged.how == "graph"
    assert "staged:" in staged.describe()
    check(staged, data)
    assert (staged.graphs, staged.compilations, staged.eager_calls) == (1, 0, 0)


# ---- compiled ---------------------------------------------------------------------------------------


def _tiny(name):
    if name == "vade":
        program = VaDE(12, 3, 2, ())
        return program, Amortized(program, ["x"], ())
    program = M2(12, 3, 2, ())
    return program, Sequential(
        Classifier(program, "y", ["x"], ()), Amortized(program, ["x", "y"], ())
    )


@pytest.mark.parametrize("name", ["vade", "m2"])
def test_compiled_once_for_a_run_over_half_labelled_rows(name, monkeypatch):
    torch.set_default_dtype(torch.float32)
    program, guide = _tiny(name)
    data = Batch.of({"x": torch.rand(70, 12), "y": (torch.randint(3, (70,)), torch.rand(70) < 0.5)})
    calls = []
    compiler = torch._inductor.compile
    monkeypatch.setattr(
        torch._inductor, "compile", lambda *a, **o: calls.append(1) or compiler(*a, **o)
    )
    weight = torch.tensor(0.1)
    options = {"weights": {"z": weight}, "observed_guide_weights": {"y": 0.2}}
    objective = EnumELBO(split=False, **(options if name == "m2" else {}))
    with torch._inductor.config.patch(compile_threads=1):
        staged = stage(objective, program, guide, data[:16])
    assert (staged.how, staged.reason) == ("compiled", "")
    for i, index in enumerate(torch.randperm(70).split(16)):  # the last has six rows
        weight.fill_(0.1 * (i + 1))
        if len(index) == 16:
            check(staged, data[index], rtol=1e-4, atol=1e-5)
        else:
            assert staged(data[index]).isfinite()
    assert len(calls) == staged.compilations == staged.graphs == 1
    assert staged.eager_calls == 0
    assert torch.distributions.Distribution._validate_args
    graph = stage(objective, program, guide, data[:16], compile=False)
    losses = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        losses.append(staged(data[index]).item())  # padded
        torch.manual_seed(seed)
        assert abs(graph(data[index]).item() - losses[-1]) < 1e-4
    assert losses[0] == losses[1] != losses[2]


# ---- in a fit ---------------------------------------------------------------------------------------


def _fit(kind=Plain, epochs=3, **options):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    program, guide, _ = plain(kind=kind)
    data = {"x": torch.randn(40, 3, generator=torch.Generator().manual_seed(1))}
    settings = {"batch_size": 20, "progress": False, "weights": {"z": schedules.linear(0.1, 1, 2)}}
    with torch._inductor.config.patch(compile_threads=1):
        return fit(program, guide, data, epochs=epochs, **settings, **options)


def test_a_compiled_fit_is_the_fit_and_resumes_bit_for_bit(tmp_path):
    eager, whole = _fit(), _fit(compile=True, folder=tmp_path / "whole")
    for a, b in zip(eager.history, whole.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["bound"] == pytest.approx(b["bound"], rel=1e-4)
    _fit(epochs=1, compile=True, folder=tmp_path / "part")
    again = _fit(compile=True, folder=tmp_path / "part", resume=True)
    for name, value in whole.parameters.items():
        assert torch.equal(value, again.parameters[name])
    with pytest.raises(ValueError, match="compile"):
        _fit(epochs=5, folder=tmp_path / "part", resume=True)


def test_a_fit_that_cannot_be_staged_says_why_and_goes_on():
    with pytest.warns(UserWarning, match="a value decides what happens next"):
        result = _fit(kind=Branch, epochs=1, compile=True)
    assert result.history[0]["loss"] == pytest.approx(
        _fit(kind=Branch, epochs=1).history[0]["loss"]
    )
