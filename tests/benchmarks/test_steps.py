"""The benchmark runs, at a tiny size; nothing is asserted of its times."""

import steps
import torch


def test_the_benchmark_runs(capsys):
    results = steps.main(rounds=2, tiny=True)
    assert len(results) == 5
    assert all(len(times) == 2 for case in results.values() for times in case.values())
    assert "EnumELBO" in capsys.readouterr().out


def test_the_contestants_compute_the_same_loss():
    torch.manual_seed(0)
    program, guide, data, hand = steps.m2(2000, True, 12, (8,))
    objective = steps.EnumELBO(observed_guide_weights={"y": 0.1})
    with torch.no_grad():
        assert abs(hand(program, guide).item() - objective.loss(program, guide, data)) < 0.1
