"""Make the stored draws again: ``python -m pyrozoo.zoo.truth.references FOLDER``.

Four chains of NUTS for each program, finite sites summed exactly and drawn afterwards; an R-hat
above 1.01, fewer than 400 effective draws or more than one divergence in a thousand draws raise,
and nothing is written.  Every 10th draw is kept.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from safetensors.torch import save_file

from pyrozoo.inference.comparison.references import nuts
from pyrozoo.zoo.truth import RUNGS
from pyrozoo.zoo.truth.sampled import CHAINS, KEPT, SAMPLES, WARMUP

R_HAT, ESS, DIVERGENCES = 1.01, 400, 1e-3


def make(name: str, folder: Path) -> None:
    """Run the chains of one program and store every so many draws.

    Raises:
        RuntimeError: the chains do not agree, or are too short.
    """
    rung, started = RUNGS[name](), time.perf_counter()
    found = nuts(
        rung.program, rung.data, num_samples=SAMPLES, warmup_steps=WARMUP, num_chains=CHAINS,
        inputs=rung.inputs, target_accept_prob=0.95,
    )  # fmt: skip
    worst, least = max(found.r_hat.values()), min(found.ess.values())
    words = (
        f"{name}: R-hat {worst:.4f}, effective draws {least:.0f}, {found.divergences} divergences"
        f" of {CHAINS * SAMPLES} draws, {time.perf_counter() - started:.0f} seconds"
    )
    if worst > R_HAT or least < ESS or found.divergences > DIVERGENCES * CHAINS * SAMPLES:
        raise RuntimeError(f"not good enough: {words}")
    print(words)
    every = CHAINS * SAMPLES // KEPT
    kept = {n: v[::every].float() if v.is_floating_point() else v[::every].byte()
            for n, v in found.draws.items()}  # fmt: skip
    save_file({n: v.contiguous() for n, v in kept.items()}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    for rung_name, builder in RUNGS.items():
        if builder().how == "NUTS" and rung_name in (sys.argv[2:] or RUNGS):
            make(rung_name, Path(sys.argv[1]))
