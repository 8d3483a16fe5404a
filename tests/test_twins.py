"""The bounds equal hand-written PyTorch, in value and gradient, for the same noise."""

import pytest
import torch
import twins
from cases import CASES, ROWS, elbo

from pyrozoo.inference import Batch
from pyrozoo.inference.bounds.subsets import SubsetELBO

INPUTS = ("noise",)


pytestmark = pytest.mark.usefixtures("double")


def get(case, pattern):
    case = CASES[case]
    return (*case.pair(), next(d for n, d in case.patterns() if n == pattern))


def check(objective, p, q, data, rows, extra=0.0):
    """Rows, loss and every gradient agree to 1e-12, relative to the largest entry."""
    torch.testing.assert_close(objective.per_row(p, q, data), rows, rtol=1e-12, atol=1e-12)
    mine, right = objective.differentiable_loss(p, q, data), -rows.mean() - extra
    torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
    parameters = {n: x for net in (p, q) for n, x in net.named_parameters()}
    found = [
        torch.autograd.grad(loss, [*parameters.values()], allow_unused=True, retain_graph=True)
        for loss in (mine, right)
    ]
    for name, a, b in zip(parameters, *found, strict=True):
        a, b = (torch.zeros(1) if g is None else g for g in (a, b))
        assert (a - b).abs().max() <= 1e-12 * max(1.0, b.abs().max().item()), name


def test_vade():
    p, q, data = get("vade", "no y")
    rows = twins.vade(p, q.guide, data["x"], data["noise"][:, :2])
    check(elbo(inputs=INPUTS), p, q, data, rows)
    p, q, data = get("vade", "complete")
    rows = twins.vade(p, q.guide, data["x"], data["noise"][:, :2], data["y"])
    check(elbo(kl="sampled", inputs=INPUTS), p, q, data, rows)


def test_semi_supervised_vade():
    p, q, data = get("vade", "some y")
    y, known = data["y"]
    noise = data["noise"][:, :2]
    summed, fixed = (twins.vade(p, q.guide, data["x"], noise, label) for label in (None, y))
    for split in (True, False):
        objective = elbo(kl="sampled", inputs=INPUTS, split=split)
        check(objective, p, q, data, torch.where(known, fixed, summed))


@pytest.mark.parametrize("kl", ["closed", "sampled"])
@pytest.mark.parametrize("pattern", ["complete", "no y", "some y"])
def test_m2(pattern, kl):
    p, q, data = get("m2", pattern)
    noise, batch, alpha = data["noise"][:, :3], Batch.of(data), 1.7
    y, known = (batch["y"], batch.present("y")) if "y" in batch else (None, None)
    rows = twins.m2(p, q.guide, data["x"], noise, y, known, closed=kl == "closed")
    total = twins.m2(p, q.guide, data["x"], noise, y, known, alpha, closed=kl == "closed")
    extra = (total - rows).mean()
    for split in (True, False):
        objective = elbo(kl=kl, split=split, observed_guide_weights={"y": alpha}, inputs=INPUTS)
        check(objective, p, q, data, rows, extra)


@pytest.mark.parametrize("pattern", [n for n, _ in CASES["mvae"].patterns()])
def test_mvae_and_its_subsets(pattern):
    p, q, data = get("mvae", pattern)
    batch = Batch.of(data)
    values = {n: batch[n] for n in ("x_a", "x_b") if n in batch}
    present = {n: batch.present(n) for n in values}
    noise = data["noise"][:, :3]

    def bound(*names):
        seen = {n: present[n] & (n in names) for n in values}
        some = torch.stack(list(seen.values())).any(0)
        return torch.where(some, twins.mvae(p, q.guide, values, seen, noise), 0.0)

    rows = bound(*values)
    check(elbo(inputs=INPUTS), p, q, data, rows)
    both = torch.stack([*present.values()]).all(0) & torch.tensor(len(present) == 2)
    single = sum((bound(n) for n in values), torch.zeros(ROWS))
    objective = elbo([["x_a"], ["x_b"]], kind=SubsetELBO, inputs=INPUTS)
    check(objective, p, q, data, rows + torch.where(both, single, 0.0))
