"""What a fit watches: figures against numbers by hand, and that watching changes nothing."""

import functools
import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrozoo.inference import Batch, EnumELBO, Tracker, evaluate, fit, staging
from pyrozoo.inference.modes import seeded
from pyrozoo.inference.training.rows import epoch_order
from pyrozoo.inference.training.tracking import Norms, Watch, is_watched

pytestmark = pytest.mark.usefixtures("double")
QUIET = {"progress": False, "device": "cpu"}


class Mixture(nn.Module):
    """y of 3 values, z | y of 3 dimensions, x | z."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))
        self.loc = nn.Parameter(torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 9, 9]]))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample(
                "y", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"}
            )
            z = pyro.sample("z", dist.Normal(self.loc[y], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


class Linear(nn.Module):
    """z is a multiple of x, with or without noise."""

    def __init__(self, factor, noise=0.0):
        super().__init__()
        self.factor, self.noise = nn.Parameter(torch.as_tensor(factor)), noise

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            mean = batch["x"] * self.factor
            if self.noise:
                pyro.sample("z", dist.Normal(mean, self.noise).to_event(1))
            else:
                pyro.sample("z", dist.Delta(mean, event_dim=1))


class Classes(nn.Module):
    """q(y | x) is enumerated, and z is placed by y."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.shift = nn.Parameter(torch.tensor([[0.0, 0, 0], [5, 0, 0], [0, 5, 0]]))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            logits = self.head(batch["x"])
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(self.shift[y] + batch["x"], 0.3).to_event(1))


def rows(count=40):
    """Columns of variance one, and rows near all three components but the last."""
    x = torch.randn(count, 3)
    return (x - x.mean(0)) / x.std(0, correction=0)


def entropy(probs):
    return float(-(probs * probs.log()).sum(1).mean())


def plain(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def test_a_summed_site_and_active_units_by_hand():
    program, guide, x = Mixture(), Linear([1.0, 0.1001, 0.0999]), rows()
    watch = Watch()
    with torch.no_grad():
        found = evaluate(program, guide, {"x": x}, watch=watch)
        z = x * guide.factor
        joint = program.logits.log_softmax(0) - 0.5 * (z[:, None] - program.loc).square().sum(2)
        probs = joint.softmax(1)
    assert found == evaluate(program, guide, {"x": x})
    sizes = probs.argmax(1).bincount(minlength=3)
    assert sizes.tolist()[2] == 0
    assert watch.figures() == pytest.approx(
        {
            "used_y": 2,
            "largest_y": int(sizes.max()) / 40,
            "entropy_y": entropy(probs),
            "active_z": 2,
        }
    )
    torch.testing.assert_close(watch.probs["y"], probs)
    torch.testing.assert_close(watch.means["z"], z)


def test_a_proposed_site_by_hand_and_known_rows_are_left_out():
    program, guide, x = Mixture(), Classes(), rows()
    known = torch.arange(40) < 15
    watch = Watch()
    evaluate(program, guide, {"x": x, "y": (torch.zeros(40).long(), known)}, watch=watch)
    with torch.no_grad():
        probs = guide.head(x).softmax(1)
        means = probs @ guide.shift + x
    some, sizes = probs[~known], probs[~known].argmax(1).bincount(minlength=3)
    figures = watch.figures()
    assert figures["entropy_y"] == pytest.approx(entropy(some))
    assert figures["used_y"] == (sizes > 0).sum()
    assert figures["largest_y"] == pytest.approx(float(sizes.max()) / 25)
    assert watch.counted["y"].tolist() == (~known).tolist()
    torch.testing.assert_close(watch.means["z"][~known], means[~known])
    watch.clear()
    evaluate(program, guide, {"x": x, "y": torch.zeros(40).long()}, watch=watch)
    assert set(watch.figures()) == {"active_z"}


def test_slices_are_the_whole_and_rows_with_nothing_observed_do_not_count():
    program, guide, x = Mixture(), Linear([1.0, 1.0, 0.0]), rows()
    data = {"x": (x, torch.arange(40) % 4 > 0)}
    watch, sliced = Watch(), Watch()
    evaluate(program, guide, data, watch=watch)
    evaluate(program, guide, data, watch=sliced, batch_size=7)
    assert watch.figures() == pytest.approx(sliced.figures())
    assert int(watch.counted["z"].sum()) == 30
    assert watch.figures()["active_z"] == 2


def test_inner_plates_flows_and_a_data_plate_further_left():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([-1.0, 1.0]))

        def forward(self, batch):
            data = pyro.plate("data", len(batch), dim=-2)
            with data:
                y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])))
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with data, pyro.plate("views", 2, dim=-1):
                pyro.sample("x", dist.Normal(self.loc[y], 1.0))

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self, batch):
            with pyro.plate("data", len(batch), dim=-2):
                base = dist.Normal(self.loc, 1.0).to_event(1)
                flow = dist.TransformedDistribution(base, [dist.transforms.TanhTransform()])
                pyro.sample("z", flow)

    x, watch = torch.randn(8, 2), Watch()
    program = Nested()
    with torch.no_grad():
        pair = (program, Flow())
        evaluate(*pair, {"x": x}, watch=watch)
        probs = (-0.5 * (x[:, :, None] - program.loc).square().sum(1)).softmax(1)
    torch.testing.assert_close(watch.probs["y"], probs)
    assert set(watch.figures()) == {"used_y", "largest_y", "entropy_y"}  # z is pruned


def test_a_posterior_without_a_mean_has_no_active_units():
    class Squashed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)

        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                base = dist.Normal(self.net(batch["x"]), 1.0)
                flow = dist.TransformedDistribution(base, [dist.transforms.TanhTransform()])
                pyro.sample("z", flow.to_event(1))

    watch = Watch()
    evaluate(Mixture(), Squashed(), {"x": rows()}, watch=watch)
    assert "active_z" not in watch.figures()
    assert watch.means["z"].shape == (40, 3)


@pytest.mark.parametrize("how", ["eager", "clipped", "staged"])
def test_the_norm_of_the_gradient_is_that_of_autograd(how, monkeypatch):
    make = functools.partial(staging.staged.stage, compile=False)
    monkeypatch.setattr(sys.modules["pyrozoo.inference.training.fit"], "stage", make)
    program, guide, x = Mixture(), Linear([1.0, 0.5, 0.2]), rows(20)
    parameters = [*program.parameters(), *guide.parameters()]

    def norm(some):
        loss = EnumELBO(num_rows=20).differentiable_loss(program, guide, {"x": some})
        grads = torch.autograd.grad(loss, parameters)
        return math.sqrt(sum(float(g.square().sum()) for g in grads))

    options = {"clip": 1e-3} if how == "clipped" else {"compile": how == "staged"}
    result = fit(program, guide, {"x": x}, epochs=1, batch_size=20, lr=1e-9, **options, **QUIET)
    record = result.history[0]
    assert record["grad_norm"] == pytest.approx(norm(x), rel=1e-6)
    assert record["grad_norm_max"] == record["grad_norm"]
    order = epoch_order(Batch.of({"x": x}), torch.arange(20), torch.Generator().manual_seed(0))
    halves = [norm(x[index]) for index in order.split(10)]
    result = fit(program, guide, {"x": x}, epochs=1, batch_size=10, lr=1e-9, **options, **QUIET)
    assert result.history[0]["grad_norm"] == pytest.approx(sum(halves) / 2, rel=1e-6)
    assert result.history[0]["grad_norm_max"] == pytest.approx(max(halves), rel=1e-6)


def test_norms_begin_anew_and_take_what_has_no_gradient():
    norms, x = Norms(torch.device("cpu")), nn.Parameter(torch.zeros(2))
    assert norms.figures() == {}
    assert float(norms.add([x])) == 0
    x.grad = torch.tensor([3.0, 4.0])
    norms.add([x, nn.Parameter(torch.zeros(1))])
    assert norms.figures() == {"grad_norm": 2.5, "grad_norm_max": 5.0}
    assert norms.figures() == {}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_watching_changes_no_bit(clip):
    def pair():
        return Mixture(), Linear([1.0, 0.5, 0.2], noise=0.4)

    x, found = rows(23), []
    for tracker in (None, Tracker()):
        program, guide = pair()
        state = torch.get_rng_state()
        fit(program, guide, {"x": x}, epochs=3, batch_size=8, clip=clip, tracker=tracker, **QUIET)
        assert torch.equal(state, torch.get_rng_state())
        found.append([*program.parameters(), *guide.parameters()])
    program, guide = pair()  # a loop that watches nothing
    parameters = [*program.parameters(), *guide.parameters()]
    objective, engine = EnumELBO(num_rows=23), torch.optim.Adam(parameters, 1e-3, fused=True)
    generator, batch = torch.Generator().manual_seed(0), Batch.of({"x": x})
    with seeded(0):
        for _ in range(3):
            for index in epoch_order(batch, torch.arange(23), generator).split(8):
                engine.zero_grad()
                objective.differentiable_loss(program, guide, batch[index]).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(parameters, clip)
                engine.step()
    for a, b, c in zip(*found, parameters, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_resumed_histories_are_equal(tmp_path):
    def run(folder, epochs, **options):
        program, guide = Mixture(), Linear([1.0, 0.5, 0.2], noise=0.4)
        tracker = Tracker()
        options |= {"folder": tmp_path / folder, "tracker": tracker, "validation": 0.2, **QUIET}
        return fit(program, guide, {"x": x}, epochs=epochs, batch_size=8, **options), tracker

    x = rows()
    whole, tracked = run("whole", 4)
    run("cut", 2)
    resumed, rest = run("cut", 4, resume=True)
    assert plain(whole.history) == plain(resumed.history)
    assert list(whole.history[0])[:3] == ["epoch", "loss", "bound"]
    assert set(rest.shares["y"]) == {3, 4}
    for epoch in (3, 4):
        assert torch.equal(rest.shares["y"][epoch], tracked.shares["y"][epoch])
    assert torch.equal(rest.codes[4], tracked.codes[4])


def test_a_tracker_keeps_powers_of_two_and_the_last():
    program, guide, x = Mixture(), Linear([1.0, 0.5, 0.2]), rows()
    tracker = Tracker()
    fit(program, guide, {"x": x}, epochs=11, tracker=tracker, validation=0.25, lr=1e-9, **QUIET)
    assert list(tracker.codes) == list(tracker.found["y"]) == [1, 2, 4, 8, 11]
    assert list(tracker.shares["y"]) == list(range(1, 12))
    assert len(tracker.rows) == 30
    assert tracker.site == "z"
    torch.testing.assert_close(tracker.codes[1].double(), (x * guide.factor)[tracker.rows])
    sizes = tracker.found["y"][11].bincount(minlength=3) / 30
    torch.testing.assert_close(tracker.shares["y"][11], sizes)


def test_a_tracker_is_packed_and_read_back():
    tracker = Tracker()
    fit(Mixture(), Classes(), {"x": rows()}, epochs=3, tracker=tracker, **QUIET)
    tracker.labels = torch.arange(40) % 3
    tensors = tracker.pack()
    again = Tracker.unpack(tensors)
    assert (again.site, list(again.codes)) == ("z", [1, 2, 3])
    for key, value in again.pack().items():
        assert torch.equal(value, tensors[key])
    for key, bad in [
        ("rows", tensors["rows"].double()),
        ("rows", tensors["rows"][:-1]),
        ("labels", tensors["labels"][:-1]),
        ("epochs.codes.z", tensors["epochs.codes.z"].flip(0)),
        ("values.codes.z", tensors["values.codes.z"][:, :5]),
        ("values.found.y", tensors["values.found.y"].float()),
        ("values.shares.y", tensors["values.shares.y"][0]),
    ]:
        with pytest.raises(ValueError, match="what was tracked"):
            Tracker.unpack({**tensors, key: bad})
    with pytest.raises(ValueError, match="no numbers of rows"):
        Tracker.unpack({})


def test_entries_of_a_record_are_told_from_terms():
    record = {"y": -1.0, "used_y": 3.0, "active_x": 0.0, "grad_norm": 1.0, "entropy": 2.0}
    assert [n for n in record if is_watched(n, record)] == ["used_y", "grad_norm"]
