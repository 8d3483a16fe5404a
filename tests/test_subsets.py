"""The bound of all modalities plus those of subsets, against separate evaluations."""

import math

import pytest
import torch
from cases import CASES, ROWS, GivenNormal, Replay
from torch import nn

from pyrozoo.guides import ProductOfExperts
from pyrozoo.inference import Batch, EnumELBO
from pyrozoo.inference.bounds.subsets import SubsetELBO
from pyrozoo.zoo.multimodal import MVAE

INPUTS = ("noise",)
NAMES = ["x_a", "x_b", "x_c"]


pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def three():
    program = MVAE({"x_a": 4, "x_b": 3, "x_c": 2}, 3, (6,))
    guide = Replay(ProductOfExperts(program, NAMES, hidden=(6,)))
    data = {"noise": torch.randn(ROWS, 3)}
    data |= {n: torch.rand(ROWS, w) for n, w in zip(NAMES, (4, 3, 2), strict=True)}
    return program, guide, data


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def separate(p, q, data, subsets, present, **options):
    """Row by row, the sum over the different non-empty subsets of what the row knows."""
    objective = EnumELBO(inputs=INPUTS, **options)
    cache = {}

    def bound(known):
        if known not in cache:
            kept = {n: v for n, v in data.items() if n in known or not n.startswith("x_")}
            cache[known] = objective.per_row(p, q, kept)
        return cache[known]

    rows = []
    for row in range(ROWS):
        known = frozenset(n for n in NAMES if n in data and present[n][row])
        wanted = {known, *(known & frozenset(s) for s in subsets)} - {frozenset()}
        rows.append(sum((bound(s)[row] for s in wanted), torch.zeros(())))
    return torch.stack(rows)


def gradients(loss, *nets):
    parameters = [x for net in nets for x in net.parameters()]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


SUBSETS = [["x_a"], ["x_b"], ["x_a", "x_c"], ["x_a", "x_b"]]


@pytest.mark.parametrize("options", [{}, {"kl": "sampled"}, {"weights": {"z": 0.3}}])
def test_complete_rows_equal_separate_evaluations(three, options):
    p, q, data = three
    present = dict.fromkeys(NAMES, torch.ones(ROWS, dtype=torch.bool))
    objective = SubsetELBO(SUBSETS, inputs=INPUTS, **options)
    right = separate(p, q, data, SUBSETS, present, **options)
    close(objective.per_row(p, q, data), right)
    loss = objective.differentiable_loss(p, q, data)
    close(loss, -right.mean())
    for a, b in zip(gradients(loss, p, q), gradients(-right.mean(), p, q), strict=True):
        close(a, b)
    assert objective.loss(p, q, data) == loss.item()
    assert not objective.is_bound
    assert not SubsetELBO().is_bound


def test_incomplete_rows_count_every_subset_once(three):
    p, q, data = three
    present = {n: torch.rand(ROWS) < 0.6 for n in NAMES}
    for i, name in enumerate(NAMES):
        present[name][0] = False  # nothing
        present[name][1] = i == 0  # x_a alone: its subsets repeat it
        present[name][2] = i == 2  # x_c alone: empty and repeated subsets
    right = separate(p, q, data, SUBSETS, present)
    partly = {**data, **{n: (data[n], present[n]) for n in NAMES}}
    objective = SubsetELBO(SUBSETS, inputs=INPUTS)
    rows = objective.per_row(p, q, partly)
    close(rows, right)
    assert rows[0] == 0
    full = EnumELBO(inputs=INPUTS).per_row(p, q, partly)
    close(rows[1:3], full[1:3])
    loss = objective.differentiable_loss(p, q, partly)
    for a, b in zip(gradients(loss, p, q), gradients(-right.mean(), p, q), strict=True):
        close(a, b)


def test_a_modality_that_is_nowhere_observed(three):
    p, q, data = three
    data.pop("x_b")
    present = dict.fromkeys(NAMES, torch.ones(ROWS, dtype=torch.bool))
    right = separate(p, q, data, SUBSETS, present)
    close(SubsetELBO(SUBSETS, inputs=INPUTS).per_row(p, q, data), right)
    only = {"noise": data["noise"], "x_c": data["x_c"]}
    a, b = (
        e.per_row(p, q, only)
        for e in (SubsetELBO([["x_c"]], inputs=INPUTS), EnumELBO(inputs=INPUTS))
    )
    close(a, b)


def test_terms_are_those_of_the_full_bound(three):
    p, q, data = three
    a = SubsetELBO(SUBSETS, inputs=INPUTS).terms(p, q, data)
    b = EnumELBO(inputs=INPUTS).terms(p, q, data)
    assert a.keys() == b.keys()
    for name in a:
        close(a[name], b[name])


def test_particles(three):
    p, q, data = three
    one = SubsetELBO(SUBSETS, inputs=INPUTS).per_row(p, q, data)
    close(SubsetELBO(SUBSETS, num_particles=2, inputs=INPUTS).per_row(p, q, data), one)


def test_random_subsets_are_drawn_for_every_row_and_call(three):
    p, q, data = three
    objective = SubsetELBO(num_random=2, inputs=INPUTS)
    full = EnumELBO(inputs=INPUTS).per_row(p, q, data)
    batch = Batch.of(data)
    chosen, live = objective._choose(batch, NAMES)
    assert chosen.shape == (3, ROWS, 3)
    assert chosen[0].all()
    assert chosen.any(-1).all()  # never empty
    codes = (chosen * torch.tensor([1, 2, 4])).sum(-1)
    for row in range(ROWS):
        seen = codes[live[:, row], row].tolist()
        assert len(set(seen)) == len(seen)
    many = Batch.of({n: v[:1].expand(4000, -1) for n, v in data.items()})
    chosen, _ = SubsetELBO(num_random=1)._choose(many, NAMES)
    sizes = torch.bincount(chosen[1].sum(-1), minlength=4)[1:] / 4000
    assert (sizes - 1 / 3).abs().max() < 0.04
    assert (chosen[1].double().mean(0) - 2 / 3).abs().max() < 0.04
    draws = torch.stack([objective.per_row(p, q, data) - full for _ in range(3)])
    assert (draws[0] != draws[1]).any()
    torch.manual_seed(5)
    a = objective.per_row(p, q, data)
    torch.manual_seed(5)
    assert torch.equal(a, objective.per_row(p, q, data))


def test_what_random_subsets_are_drawn_from(three):
    p, q, data = three
    plan = EnumELBO(inputs=INPUTS).pair(p, q)[0].pairing.plan(Batch.of(data))
    batch = Batch.of(data)
    assert SubsetELBO(num_random=1)._names(batch, plan) == NAMES
    assert SubsetELBO([["x_a"], ["x_b"]], 1)._names(batch, plan) == ["x_a", "x_b"]
    chosen = SubsetELBO([["x_a"]], 1, modalities=["x_a", "x_c"])
    assert chosen._names(batch, plan) == ["x_a", "x_c"]


@pytest.mark.parametrize("pattern", ["complete", "some y", "some of all"])
def test_labels_stay_in_every_subset(pattern):
    case = CASES["m2"]
    p, q = case.pair()
    data = next(d for n, d in case.patterns() if n == pattern)
    objective = EnumELBO(inputs=INPUTS, observed_guide_weights={"y": 0.7})
    subset = SubsetELBO([["x"]], inputs=INPUTS, observed_guide_weights={"y": 0.7})
    close(subset.per_row(p, q, data), objective.per_row(p, q, data))  # x alone repeats x
    close(subset.differentiable_loss(p, q, data), objective.differentiable_loss(p, q, data))


def test_a_row_that_knows_its_label_alone_keeps_it():
    p, q = CASES["vade"].pair()
    data = CASES["vade"].data()
    known = torch.arange(ROWS) > 2
    data["x"] = (data["x"], known)
    rows = SubsetELBO([["x"]], inputs=INPUTS).per_row(p, q, data)
    close(rows, EnumELBO(inputs=INPUTS).per_row(p, q, data))
    assert rows[:3].all()


def test_global_latents_count_once_for_subsets_that_are_equal():
    case = CASES["globals"]
    p, q = case.pair()
    data = {n: v for n, v in case.data().items() if n != "y"}
    terms = EnumELBO(inputs=INPUTS).terms(p, q, data)
    mine = SubsetELBO([["x"]], inputs=INPUTS, num_rows=50).loss(p, q, data)
    rows = EnumELBO(inputs=INPUTS).per_row(p, q, data)
    assert mine == pytest.approx(-(rows.mean() + terms["means"] / 50).item())


def test_errors(three):
    p, q, data = three
    with pytest.raises(ValueError, match="lists of"):
        SubsetELBO(["x_a"])
    with pytest.raises(ValueError, match="lists of"):
        SubsetELBO([[]])
    with pytest.raises(ValueError, match="num_random"):
        SubsetELBO(num_random=-1)
    with pytest.raises(ValueError, match="'x_d' is not a modality"):
        SubsetELBO([["x_d"]], inputs=INPUTS).loss(p, q, data)
    with pytest.raises(ValueError, match="'x_b' is not a modality"):
        SubsetELBO([["x_b"]], modalities=["x_a"], inputs=INPUTS).loss(p, q, data)
    q.guide.experts["x_a"].trunk = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="BatchNorm"):
        SubsetELBO(SUBSETS, inputs=INPUTS).loss(p, q, data)


def test_given_noise_is_what_it_says():
    fn = GivenNormal(torch.zeros(3), torch.ones(3))
    fn.noise = torch.tensor([0.0, 1.0, -1.0])
    assert fn.expand([2, 3]).rsample().tolist() == [[0.0, 1.0, -1.0]] * 2
    assert math.isclose(fn.log_prob(torch.zeros(3))[0].item(), -0.5 * math.log(2 * math.pi))


def test_experts_run_once_for_all_listed_subsets(three):
    p, q, data = three
    calls = []
    for name, expert in q.guide.experts.items():
        expert.register_forward_hook(lambda *_, name=name: calls.append(name))
    objective = SubsetELBO([[n] for n in NAMES], inputs=INPUTS)
    objective.loss(p, q, data)  # makes the plans
    for _ in range(2):
        calls.clear()
        objective.loss(p, q, data)
        assert sorted(calls) == NAMES
