"""Seeds fitted at once have the numbers of fits of their own; what cannot be is fitted alone."""

import functools
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import Empty, Mixture
from torch import nn

from pyrozoo import zoo
from pyrozoo.guides import Amortized, Part, Sequential
from pyrozoo.inference import Batch, EnumELBO, fit, fit_seeds, schedules
from pyrozoo.inference.seeds import fit_seeds as module
from pyrozoo.inference.seeds.together import NotTraced, Together
from pyrozoo.inference.staging import staged as staging
from pyrozoo.inference.staging.staged import Staged

QUIET = {"progress": False, "lr": 0.02}


pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def uncompiled(monkeypatch):
    """What ``fit(compile=True)`` stages is not compiled."""
    make = functools.partial(staging.stage, compile=False)
    monkeypatch.setattr(sys.modules["pyrozoo.inference.training.fit"], "stage", make)


def check(found, make, data, rtol=1e-9, **options):
    """Results of seeds 0, 1, .. are those of fits of their own (None: not looked at)."""
    for seed, result in enumerate(found):
        if result is None:
            continue
        own = fit(*make(seed), data, seed=seed, **options)
        assert [list(r) for r in result.history] == [list(r) for r in own.history]
        for a, b in zip(result.history, own.history, strict=True):
            names = set(a) - {"seconds"}
            assert {n: a[n] for n in names} == pytest.approx({n: b[n] for n in names}, rel=rtol)
        facts = ("sites", "best_epoch", "stopped")
        assert [getattr(result, n) for n in facts] == [getattr(own, n) for n in facts]
        for name, x in own.parameters.items():
            torch.testing.assert_close(result.parameters[name], x, rtol=rtol, atol=rtol)


# ---- the law ----------------------------------------------------------------------------------------

KNOWN = torch.arange(30) % 3 > 0
DATA = {
    "vade": lambda: {"x": torch.rand(30, 6), "y": (torch.arange(30) % 3, KNOWN)},
    "m2": lambda: {"x": torch.rand(30, 6), "y": (torch.arange(30) % 3, KNOWN)},
    "mvae": lambda: {"x_a": (torch.rand(30, 6), KNOWN), "x_b": (torch.rand(30, 4), ~KNOWN)},
}
OPTIONS = {"vade": {"num_clusters": 3}, "m2": {"num_classes": 3}, "mvae": {"num_random": 1}}


@pytest.mark.parametrize("name", DATA)
def test_at_once_is_one_after_another_draw_for_draw(name, uncompiled):
    data, options = DATA[name](), {"hidden": (5,), "latent_dim": 2, **OPTIONS[name]}

    def make(seed):
        model = zoo.create(name, data, seed=seed, **options)
        return model.program.double(), model.guide.double()

    model = zoo.create(name, data, **options)
    model.objective.split = False  # groups of rows have sizes that each fit takes from its own rows
    settings = {**model.settings, **QUIET, "objective": model.objective, "epochs": 2}
    settings |= {"batch_size": 8, "clip": 0.5, "lr_schedule": schedules.steps(0.5, 1)}
    settings |= {"validation": 0.2} if name == "m2" else {}
    settings.pop("repeat", None)
    found = fit_seeds(make, data, seeds=range(2), together=True, **settings)
    assert found[0].history[0]["loss"] != found[1].history[0]["loss"]
    check([None, found[1]], make, data, compile=True, **settings)


def test_steps_of_split_rows():
    """The rows of each seed fall into groups of their own."""
    pairs, objective = [mixture(i) for i in range(3)], EnumELBO(split=True, num_rows=50)
    whole = Batch.of({"x": torch.randn(9, 4), "y": (torch.arange(9) % 3, torch.arange(9) < 4)})
    staged = [Staged(objective, *pair, compile=False) for pair in pairs]
    steps = Together(staged, [whole] * 3, range(3))
    assert steps.layout.names == ("y",)
    assert not steps.draws
    generators = [torch.Generator()] * 3
    with steps:
        for index in (
            torch.tensor([[0] * 9, [8] * 9, list(range(9))]),  # one pass, or several
            torch.tensor([[5, 1, 8], [0, 1, 2], [6, 7, 8]]),
        ):
            losses, squares = steps.gradients(whole, index, generators)
            for i, s in enumerate(staged):
                steps.gradients_of(i)
                found = {n: x.grad for n, x in s.module.named_parameters()}
                for x in s.module.parameters():
                    x.grad = None
                loss = objective.differentiable_loss(s.p, s.q, whole[index[i]])
                loss.backward()
                torch.testing.assert_close(losses[i], loss.detach(), rtol=1e-10, atol=0)
                for n, x in s.module.named_parameters():
                    torch.testing.assert_close(found[n], x.grad, rtol=1e-6, atol=1e-12)
                norm = nn.utils.get_total_norm([x.grad for x in s.module.parameters()])
                assert squares[i].sqrt().item() == pytest.approx(norm.item())


class Plain(nn.Module):
    """z ~ N(0, 1), x | z with a net of one's own; ``temperature`` is a number."""

    def __init__(self, *layers):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), *layers, nn.Linear(5, 3))
        self.temperature = 1.0

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), self.temperature).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1))


def plain(seed, *layers, kind=Plain):
    torch.manual_seed(seed)
    program = kind(*(layer() for layer in layers))
    return program, Amortized(program, ["x"], (4,))


@pytest.mark.parametrize("layer", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(5)])
def test_dropout_and_batch_statistics_without_staging(layer):
    """Batches of one size: draws and statistics are those of fits that are not staged."""
    data, make = {"x": torch.randn(12, 3)}, functools.partial(plain)
    options = {**QUIET, "epochs": 2, "batch_size": 6}
    found = fit_seeds(lambda s: make(s, layer), data, seeds=range(2), together=True, **options)
    check(found, lambda s: make(s, layer), data, rtol=1e-6, **options)


def mixture(seed):
    torch.manual_seed(seed)
    return Mixture(), Empty()


def test_seeds_stop_for_themselves():
    data = {"x": torch.randn(20, 4), "y": (torch.arange(20) % 3, torch.arange(20) < 9)}
    options = {**QUIET, "epochs": 20, "batch_size": 14, "validation": 0.3, "patience": 2, "lr": 0.2}
    found = fit_seeds(mixture, data, seeds=range(3), together=True, **options)
    assert len({r.epoch for r in found}) > 1
    check(found, mixture, data, **options)
    for r in found:  # the modules have memory of their own again
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in r.program.parameters())


def test_twice_the_same_and_the_random_state_is_left_alone():
    data, runs = {"x": torch.randn(9, 3)}, []
    state = torch.get_rng_state()
    options = {**QUIET, "epochs": 2, "batch_size": 4, "together": True}
    for seeds in ((3, 5), (5, 3)):
        runs.append(fit_seeds(plain_at, data, seeds=seeds, **options))
    assert torch.equal(torch.get_rng_state(), state)
    assert not pyro.get_param_store().keys()
    for a, b in zip(runs[0], reversed(runs[1]), strict=True):
        assert a.history[-1]["loss"] == pytest.approx(b.history[-1]["loss"], rel=1e-12)
    assert runs[0][0].history[-1]["loss"] != runs[0][1].history[-1]["loss"]


def plain_at(_):
    """Initial parameters come from the random state that ``fit_seeds`` has set."""
    program = Plain()
    return program, Amortized(program, ["x"], (4,))


def test_start_comes_first_once_for_each_seed():
    calls = []

    def start(seed, program, guide):
        calls.append((seed, type(program).__name__, type(guide).__name__))
        with torch.no_grad():
            program.loc.fill_(float(seed))

    data = {"x": torch.zeros(4, 4)}
    options = {"progress": False, "lr": 1e-9, "epochs": 1, "start": start}
    found = fit_seeds(mixture, data, seeds=(4, 2), together=True, **options)
    assert calls == [(4, "Mixture", "Empty"), (2, "Mixture", "Empty")]
    assert [r.program.loc.mean().item() for r in found] == pytest.approx([4, 2], abs=1e-6)
    fit_seeds(mixture, data, seeds=(7, 8), together=False, **options)
    assert [c[0] for c in calls] == [4, 2, 7, 8]


# ---- compiled, and when --------------------------------------------------------------------------


def test_compiled():
    data = {"x": torch.randn(10, 4)}
    options = {**QUIET, "epochs": 2, "batch_size": 4, "together": True, "seeds": range(2)}
    with torch._inductor.config.patch(compile_threads=1), warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = fit_seeds(mixture, data, compile=True, **options)
    for a, b in zip(compiled, fit_seeds(mixture, data, **options), strict=True):
        assert a.history[-1]["loss"] == pytest.approx(b.history[-1]["loss"], rel=1e-9)


def test_large_steps_are_left_to_fits_of_their_own(monkeypatch):
    ran = []
    monkeypatch.setattr(module, "run", lambda *a: ran.append(a[2].flops))
    data, options = {"x": torch.randn(6, 3)}, {**QUIET, "epochs": 1, "seeds": range(2)}
    fit_seeds(plain_at, data, **options)
    weights = 3 * 4 + 2 * 4 * 2 + 2 * 5 + 5 * 3  # products forward, and by each weight
    assert ran[0] >= 2 * 6 * 2 * weights
    monkeypatch.setattr(module, "MOST_FLOPS", ran[0] - 1)
    assert all(r.epoch == 1 for r in fit_seeds(plain_at, data, **options))
    assert len(ran) == 1
    fit_seeds(plain_at, data, **options | {"seeds": [3]}, together=True)
    assert len(ran) == 1


# ---- falling back --------------------------------------------------------------------------------


class Branch(Plain):
    def forward(self, batch):
        if "x" in batch and batch["x"].mean() > 100:
            raise ValueError("never")
        super().forward(batch)


class Other(Plain):
    """Two programs with the same parameters that are not the same."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.temperature = 1.0 + self.net[0].bias[0].item() ** 2


class Gamma(Plain):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
            pyro.sample(
                "x", dist.Normal(rate.unsqueeze(-1) * self.net[1].weight[0, :3], 1.0).to_event(1)
            )


class GammaGuide(Part):
    def __init__(self):
        super().__init__()
        self.shape = nn.Parameter(torch.ones(()))

    def inside(self, batch, drawn):
        shape = self.shape.exp().expand(len(batch))
        return {"rate": pyro.sample("rate", dist.Gamma(shape, 2.0))}


FALLBACKS = {
    Branch: r"a value decides what happens next \(test_seeds.py, line",
    Other: "seeds 0 and 1 differ in more than their parameters",
    Gamma: "draws of _standard_gamma depend on values",
}


@pytest.mark.parametrize("kind", FALLBACKS)
def test_what_cannot_be_run_at_once_is_fitted_alone_and_says_why(kind):
    def make(seed):
        program, guide = plain(seed, kind=kind)
        return program, Sequential(GammaGuide()) if kind is Gamma else guide

    data, options = {"x": torch.randn(9, 3)}, {**QUIET, "epochs": 1, "batch_size": 4}
    with pytest.warns(UserWarning, match="one after another: .*" + FALLBACKS[kind]):
        found = fit_seeds(make, data, seeds=range(2), **options)
    check(found, make, data, **options)


def test_other_reasons_to_be_fitted_alone():
    data = {"x": torch.randn(10, 3)}
    options = {**QUIET, "epochs": 1, "batch_size": 4, "seeds": range(2)}
    with pytest.warns(UserWarning, match="couples the rows of a batch, and the last batch"):
        fit_seeds(lambda s: plain(s, lambda: nn.BatchNorm1d(5)), data, **options)
    data = {"x": torch.randn(9, 4), "y": (torch.arange(9) % 3, torch.arange(9) < 4)}
    with pytest.warns(UserWarning, match="seeds hold out more or fewer"):
        fit_seeds(mixture, data, repeat={"y": 2}, validation=0.3, **options | {"seeds": range(6)})


# ---- errors --------------------------------------------------------------------------------------


def shapes(seed):
    return plain(seed, *[lambda: nn.Linear(5, 5)] * seed)


def frozen(seed):
    program, guide = plain(seed)
    program.net[0].bias.requires_grad_(seed == 0)
    return program, guide


KEPT = []


def shared(seed):
    KEPT.append(plain(seed)[0])
    program = KEPT[seed and -2]
    return program, Amortized(program, ["x"], (4,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (shapes, r"program.net.1.weight is a trained parameter of shape \(3, 5\) .* for seed 0, but .* \(5, 5\) .* seed 1"),
        (frozen, "program.net.0.bias is a trained .* for seed 0, but a tensor of .* for seed 1"),
        (shared, "seeds 0 and 1 share program.net.0.weight"),
    ],
)  # fmt: skip
def test_pairs_that_do_not_go_together(make, message):
    with pytest.raises(ValueError, match=message):
        fit_seeds(make, {"x": torch.randn(6, 3)}, seeds=range(2), epochs=1, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": []}, ValueError, "no seed"),
        ({"seeds": [1, 1]}, ValueError, "seed 1 is there twice"),
        ({"seeds": [0.5]}, TypeError, "whole numbers, got 0.5"),
        ({"together": "maybe"}, ValueError, "True, False or 'auto', got 'maybe'"),
        ({"epochs": 0}, ValueError, "epochs is at least 1"),
        ({"data": {"X": torch.randn(6, 4)}}, ValueError, "Did you mean 'x'"),
        ({"make": lambda _: Mixture()}, TypeError, "a program and a guide, got Mixture"),
    ],
)
def test_wrong_options(options, error, message):
    given = {"make": mixture, "data": {"x": torch.randn(6, 4)}, "progress": False, **options}
    with pytest.raises(error, match=message):
        fit_seeds(given.pop("make"), given.pop("data"), **given)


def test_the_seed_whose_loss_is_not_finite_is_named():
    def make(seed):
        program, guide = mixture(seed)
        with torch.no_grad():
            program.log_scale.fill_(-400.0 if seed == 8 else 0.0)
        return program, guide

    options = {**QUIET, "epochs": 1, "batch_size": 4, "together": True}
    with pytest.raises(
        FloatingPointError, match=r"seed 8: in epoch 1, step 1: the loss is .*'?x'?"
    ):
        fit_seeds(make, {"x": torch.randn(6, 4)}, seeds=(7, 8), **options)


def test_numbers_that_change_during_the_fit():
    def callback(result):
        result.program.temperature = 2.0

    with pytest.raises(RuntimeError, match="seed 0: a number in a module"):
        fit_seeds(
            plain, {"x": torch.randn(6, 3)}, seeds=range(2), callbacks=[callback], together=True,
            **QUIET, epochs=3,
        )  # fmt: skip


def test_batches_of_different_kinds_are_not_stacked():
    objective = EnumELBO()
    staged = [Staged(objective, *mixture(i), compile=False) for i in range(2)]
    batch = Batch.of({"x": torch.randn(6, 4), "y": torch.arange(6) % 3})
    with pytest.raises(NotTraced, match="different kinds"):
        Together(staged, [batch, batch.drop("y")], range(2))
