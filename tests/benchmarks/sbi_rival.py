"""What sbi says of given draws: ranks, coverage, C2ST, MMD; kept to be compared with ours.

    python tests/benchmarks/sbi_rival.py     # with sbi installed (0.27 was); writes tests/data

The draws are made of one seed by :func:`draws`, which the tests call again, so that both sides see
the same.  ``run_sbc`` and ``run_tarp`` ask a posterior object for draws and hand them to the
functions called here.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

KEPT = Path(__file__).parents[1] / "data" / "sbi_rival.json"
DATASETS, DRAWS, SCALE, WRONG = 300, 99, 0.5, 0.7
BINS = 30


def draws():
    """Truths ``t ~ N(0, I)``, data ``x ~ N(t, s^2)``, draws of posteriors that are too narrow."""
    rng = np.random.RandomState(20)
    truth = rng.randn(DATASETS, 2)
    x = truth + SCALE * rng.randn(DATASETS, 2)
    loc, scale = posterior(x)
    found = loc + scale * rng.randn(DRAWS, DATASETS, 2)
    references = rng.uniform(truth.min(0), truth.max(0), truth.shape)
    a, b = rng.randn(250, 3), rng.randn(200, 3) * [1.0, 1.3, 1.0] + [0.5, 0.0, 0.0]
    uniform = rng.uniform(0, DRAWS, (DATASETS, 1))
    return {
        "truth": truth, "x": x, "draws": found, "references": references, "a": a, "b": b,
        "uniform": uniform,
    }  # fmt: skip


def posterior(x):
    """Location and scale of the draws: the exact ones, but 0.7 times as wide."""
    return x / (1 + SCALE**2), WRONG * SCALE / (1 + SCALE**2) ** 0.5


def main():
    """Run sbi's functions and write what they return."""
    import torch
    from sbi.diagnostics.sbc import _run_sbc, check_uniformity_frequentist
    from sbi.diagnostics.tarp import _run_tarp
    from sbi.utils.metrics import c2st, unbiased_mmd_squared

    made = {name: torch.as_tensor(value) for name, value in draws().items()}

    def log_prob(theta, x):
        loc, scale = posterior(x)
        return torch.distributions.Normal(loc, scale).log_prob(theta).sum(-1)

    truth, x, found, a, b = (made[n] for n in ("truth", "x", "draws", "a", "b"))
    ranks = _run_sbc(truth, x, found, "marginals", False)
    density = _run_sbc(truth, x, found, log_prob, False)
    references = made["references"]
    ecp, alpha = _run_tarp(found, truth, references, num_bins=BINS, z_score_theta=True)
    kept = {
        "versions": {n: version(n) for n in ("sbi", "scikit-learn", "numpy")},
        "ranks": ranks.long().T.tolist(),
        "density_ranks": density[:, 0].long().tolist(),
        "ks_p_values": check_uniformity_frequentist(ranks, DRAWS).tolist(),
        "c2st_ranks": [
            c2st(r.unsqueeze(1).double(), made["uniform"]).item() for r in ranks.T
        ],
        "tarp_ecp": ecp.tolist(),
        "tarp_alpha": alpha.tolist(),
        "c2st_forest": c2st(a, b, seed=1).item(),
        "c2st_mlp": c2st(a, b, seed=1, classifier="mlp").item(),
        "mmd2": unbiased_mmd_squared(a, b).item(),
        "mmd2_scale_1": unbiased_mmd_squared(a, b, 1.0).item(),
    }  # fmt: skip
    KEPT.parent.mkdir(exist_ok=True)
    lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in kept.items())
    KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
