"""DEC, IDEC and DCN: their gradients, targets and centres, resuming, and the start they build on."""

from itertools import pairwise

import pytest
import torch

from pyrozoo import zoo
from pyrozoo.guides import Mean
from pyrozoo.inference import Batch, EnumELBO, metrics, predict, responsibilities
from pyrozoo.inference.staging.staged import Staged
from pyrozoo.zoo import catalogue, datasets
from pyrozoo.zoo.clustering import DEC
from pyrozoo.zoo.clustering.dcn import move_centres
from pyrozoo.zoo.clustering.dec import follow_targets, set_target, sharpen
from pyrozoo.zoo.clustering.pretraining import start_centres

NAMES = ["dec", "idec", "dcn"]
SMALL = {"hidden": (16,), "latent_dim": 3, "num_clusters": 4}


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", split="test")


def small(name, rows=30, seed=0, **options):
    data = {"x": torch.rand(rows, 6, generator=torch.Generator().manual_seed(seed))}
    return zoo.create(name, data, **SMALL, **options), data


# ---- DEC --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dof", [1.0, 2.5])
def test_the_gradient_is_that_of_the_paper(dof, double):
    program = DEC(6, 4, 3, (8,), dof=dof, rows=5).double()
    z = torch.randn(5, 3, requires_grad=True)
    p = sharpen(torch.rand(5, 4).softmax(-1))
    q = program.assign(z).probs
    loss = -(p * program.assign(z).logits).sum()
    over_z, over_loc = torch.autograd.grad(loss, [z, program.loc])
    difference = z.unsqueeze(1) - program.loc
    distance = difference.square().sum(-1)
    pull = (dof + 1) / dof * (p - q) / (1 + distance / dof)
    by_hand = (pull.unsqueeze(-1) * difference).detach()
    torch.testing.assert_close(over_z, by_hand.sum(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(over_loc, -by_hand.sum(0), rtol=1e-10, atol=1e-12)


def test_the_kernel_is_the_t_distribution_only_in_one_dimension(double):
    program = DEC(6, 4, 1, (8,), dof=3.0).double()
    z = torch.randn(7, 1)
    mixture = torch.distributions.StudentT(3.0, program.loc[:, 0])
    expected = mixture.log_prob(z).softmax(-1)
    torch.testing.assert_close(program.assign(z).probs, expected, rtol=1e-10, atol=1e-12)


def test_targets_are_distributions_and_sharper(double):
    q = torch.randn(50, 4).softmax(-1)
    p = sharpen(q)
    torch.testing.assert_close(p.sum(1), torch.ones(50))
    by_hand = q**2 / q.sum(0)
    torch.testing.assert_close(p, by_hand / by_hand.sum(1, keepdim=True))
    assert (p * p.log()).sum(1).mean() > (q * q.log()).sum(1).mean()
    q[:, 0] = 0  # nobody is there
    assert sharpen(q).isfinite().all()


def test_the_objective_is_the_soft_labels_and_the_likelihood(double):
    model, data = small("idec", gamma=0.3)
    program, guide = model.program.double(), model.guide.double()
    batch, _ = follow_targets(program, guide, Batch.of(data))
    set_target(program, guide, Batch.of(data))
    z = predict(program, guide, data, "z", num_samples=1)
    soft = (program.target * program.assign(z).logits.detach()).sum(-1)
    squares = (predict(program, guide, data, "x", num_samples=1) - data["x"]).square().sum(-1)
    constant = -6 * (torch.tensor(0.7071).log() + 0.5 * torch.tensor(2 * torch.pi).log())
    by_hand = -(0.3 * 6 * soft - squares / (2 * 0.7071**2) + constant).mean()
    objective = EnumELBO(weights=model.objective.weights, inputs=("row",))
    assert objective.loss(program, guide, batch) == pytest.approx(by_hand.item(), rel=1e-6)
    assert not objective.is_bound
    assert model.objective.weights == {"y": pytest.approx(1.8), "target": pytest.approx(1.8)}
    alone = EnumELBO(weights={"x": 0.0}, inputs=("row",))
    assert alone.loss(program, guide, batch) == pytest.approx(-soft.mean().item(), rel=1e-9)


def test_targets_belong_to_their_rows_and_wait_for_their_turn():
    model, data = small("dec", update_every=3)
    seen = []
    model.fit(
        data, epochs=6, batch_size=7, progress=False, start={"epochs": 1, "num_starts": 1},
        lr=1e-2, callbacks=[lambda result: seen.append(result.program.target.clone())],
    )  # fmt: skip
    assert [bool((a != b).any()) for a, b in pairwise(seen)] == [
        False, True, False, False, True
    ]  # fmt: skip
    torch.testing.assert_close(seen[-1].sum(1), torch.ones(30))
    share = responsibilities(model.program, model.guide, data, num_samples=1)
    torch.testing.assert_close(seen[-1], sharpen(share))
    model, data = small("dec", rows=30)
    batch, _ = follow_targets(model.program, model.guide, Batch.of(data))
    with torch.no_grad():
        model.program.target.copy_(torch.rand(30, 4))
    objective = EnumELBO(weights={"x": 0.0}, inputs=("row",))
    rows = objective.per_row(model.program, model.guide, batch)
    some = torch.tensor([4, 0, 9])
    torch.testing.assert_close(
        objective.per_row(model.program, model.guide, batch[some]), rows[some]
    )


def test_a_known_label_is_a_certain_target():
    model, data = small("dec")
    data["y"] = (torch.arange(30) % 4, torch.arange(30) < 8)
    result = model.fit(data, epochs=2, progress=False, start={"epochs": 1, "num_starts": 1})
    expected = torch.eye(4)[torch.arange(8) % 4]
    torch.testing.assert_close(model.program.target[:8], expected)
    torch.testing.assert_close(result.responsibilities(data)[:8], expected)


@pytest.mark.parametrize("labelled", [0, 100])
def test_centres_start_at_the_parts_of_the_graph(labelled):
    """Two long clusters side by side, which k-means cuts across."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    z = torch.randn(400, 2, generator=generator) * torch.tensor([3.0, 0.1])
    z[:, 1] += 3.0 * y
    batch = Batch.of({"x": z, "y": (y, torch.arange(400) < labelled)} if labelled else {"x": z})
    program = torch.nn.Module()
    program.loc = torch.nn.Parameter(torch.zeros(2, 2))
    codes = "pyrozoo.zoo.clustering.pretraining.pretrain_autoencoder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, lambda *args, **options: z)
        start_centres(program, Mean(program), batch, clusters="neighbours", num_neighbors=15)
    means = torch.stack([z[y == k].mean(0) for k in range(2)])
    found = program.loc.detach()
    if not labelled:  # parts have no names
        found = found[found[:, 1].argsort()]
    torch.testing.assert_close(found, means, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_named():
    model, data = small("dec")
    with pytest.raises(ValueError, match="'kmeans' or 'neighbours', got 'mixture'"):
        model.start(Batch.of(data), epochs=1, clusters="mixture")
    with pytest.raises(ValueError, match="has 30 targets, got 5 rows"):
        set_target(
            model.program, model.guide, Batch.of({"x": data["x"][:5], "row": torch.arange(5)})
        )
    with pytest.raises(ValueError, match="every 1 epoch or more, got 0"):
        follow_targets(model.program, model.guide, Batch.of(data), 0)
    with pytest.raises(ValueError, match="dof is positive, got 0"):
        small("idec", dof=0.0)
    with pytest.raises(ValueError, match=r"weight is positive, got -1\.0"):
        small("dcn", weight=-1.0)
    with pytest.raises(ValueError, match="'hard' or 'soft', got 'fuzzy'"):
        small("dcn", assignment="fuzzy")


# ---- DCN --------------------------------------------------------------------------------------------


def test_soft_becomes_hard_as_the_spread_vanishes(double):
    values = {}
    for assignment in ("hard", "soft"):
        model, data = small("dcn", assignment=assignment, weight=1e4)
        inner = model.guide.guide
        encoder = inner.guide if assignment == "hard" else inner
        if assignment == "hard":
            state = encoder.state_dict(), model.program.state_dict()
        encoder.load_state_dict(state[0])
        model.program.load_state_dict(state[1])
        share = responsibilities(model.program, model.guide, data)
        values[assignment] = share, model.objective.per_row(model.program, model.guide, data)
    z = predict(model.program, model.guide, data, "z")
    nearest = torch.cdist(z, model.program.loc).argmin(1)
    for share, _ in values.values():
        torch.testing.assert_close(share, torch.eye(4)[nearest], rtol=0, atol=1e-6)
    torch.testing.assert_close(values["hard"][1], values["soft"][1], rtol=1e-9, atol=1e-9)


def test_hard_is_the_squared_distance_to_the_nearest_centre(double):
    model, data = small("dcn", weight=0.7)
    terms = model.objective.terms(model.program, model.guide, data)
    z = predict(model.program, model.guide, data, "z", num_samples=1)
    distance = torch.cdist(z, model.program.loc).min(1).values.square()
    constant = 1.5 * torch.tensor(0.7 / torch.pi).log()  # three dimensions
    expected = constant - 0.7 * distance - torch.tensor(4.0).log()
    torch.testing.assert_close(terms["y"] + terms["z"], expected, rtol=1e-8, atol=1e-8)


def test_centres_are_running_means(double):
    model, data = small("dcn")
    program = model.program
    z = predict(program, model.guide, data, "z", num_samples=1)
    nearest = torch.cdist(z, program.loc).argmin(1)
    loc, count = program.loc.clone(), program.count.clone()
    for row, k in zip(z, nearest, strict=True):  # as the authors write it
        count[k] += 1
        loc[k] += (row - loc[k]) / count[k]
    move_centres(program, model.guide, Batch.of(data))
    torch.testing.assert_close(program.loc, loc, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(program.count, count)
    assert not any(name in ("loc", "count") for name, _ in program.named_parameters())


# ---- all of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_resuming_is_bit_equal(name, tmp_path):
    start = {"epochs": 2, "num_starts": 1}
    options = {"progress": False, "start": start, "batch_size": 8}
    some = {} if name == "dcn" else {"update_every": 2}
    model, data = small(name, **some)
    whole = model.fit(data, epochs=5, folder=tmp_path / "a", **options).parameters
    model, data = small(name, **some)
    model.fit(data, epochs=3, folder=tmp_path / "b", **options)
    model, data = small(name, **some)
    again = model.fit(data, epochs=5, folder=tmp_path / "b", resume=True, **options).parameters
    assert whole.keys() == again.keys()
    assert ("program.target" in whole) == (name != "dcn")
    for key, value in whole.items():
        assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("name", ["idec", "dcn"])
def test_staged_sees_what_is_changed_between_steps(name):
    model, data = small(name)
    batch, _ = model.prepare(Batch.of(data))
    objective = EnumELBO(weights=model.objective.weights, inputs=("row",))
    staged = Staged(objective, model.program, model.guide, compile=False)
    before = float(staged(batch))
    assert staged.how == "graph"
    with torch.no_grad():
        if name == "dcn":
            model.program.loc.add_(1.0)
        else:
            model.program.target.copy_(torch.eye(4)[torch.arange(30) % 4])
    after = float(staged(batch))
    assert staged.graphs == 1
    assert after != before
    expected = objective.loss(model.program, model.guide, batch)
    assert after == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_digits_keep_what_the_start_had(name, digits):
    """Law: against autoencoder + k-means, its own start, after a short run.

    Accuracy may fall by 0.03 and NMI by 0.02, or both rise.
    """
    data = {"x": digits.x}
    model = zoo.create(name, data, hidden=(64,), latent_dim=10)
    begin, found = model.start, {}

    def start(batch, **options):
        begin(batch, **options)
        found["start"] = responsibilities(model.program, model.guide, data)

    model.start = start
    options = {"epochs": 40, "lr": 3e-3, "noise": 0.2, "num_starts": 5}
    result = model.fit(data, epochs=12, lr=1e-3, progress=False, start=options)
    found["end"] = result.responsibilities(data)
    scores = {k: metrics.clustering_report(digits.y, v) for k, v in found.items()}
    assert scores["end"]["nmi"] > scores["start"]["nmi"] - 0.02
    accuracy = {k: v["hungarian_accuracy"] for k, v in scores.items()}
    assert accuracy["end"] > accuracy["start"] - 0.03
    assert any(line.startswith("y: ") for line in result.sites)
    assert catalogue.method(name).tier == "reference"
