"""The benchmark of the evidence runs, at a tiny size; nothing is asserted of its times."""

import evidence
from measuring import Options


def test_the_benchmark_runs_and_the_contestants_agree():
    (case,) = evidence.evidence(Options(tiny=True, compile=False))
    assert all(len(times) == 2 for times in case.times.values())
    found = [float(cell.split()[-1]) for cell in case.notes[-1].split(": ")[1].split(", ")]
    assert max(found) - min(found) < 0.5
