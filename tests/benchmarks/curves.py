"""How the time of a step grows: with clusters, rows, particles and modalities.

    python tests/benchmarks curves

All sizes of a curve take turns.  The exponent is the slope of log time on log size; cost that does
not depend on the size keeps it below what it is in the end, so that the slope between the two
largest sizes is printed too.
"""

import torch
from measuring import Case, measure
from models import DEEP, m2, mvae, vade
from steps import eager, staged_step

from pyrozoo.inference import Batch, EnumELBO

CLUSTERS = (5, 10, 20, 40, 80, 160)
CLASSES = (2, 4, 8, 16)
ROWS = (64, 128, 256, 512, 1024, 2048)
PARTICLES = (1, 2, 4, 8, 16)
MODALITIES = (1, 2, 4, 8)


def with_particles(number, hidden):
    model = vade(64, hidden)
    model.objective = EnumELBO(number)
    return model


def curve(title, make, sizes, options, how, usual=15):
    """One case: ``make(size)`` is a model; ``how`` is eager or staged."""
    notes, steps = [], {}
    torch.manual_seed(0)
    for size in sizes[:3] if options.tiny else sizes:
        model = make(size)
        batch = Batch.of(model.data).to(dtype=torch.float32)
        if how == "staged":
            steps[str(size)] = staged_step(model, batch, options.compile, say=notes.append)
        else:
            steps[str(size)] = eager(model, batch)
    times = measure(steps, options.times(usual))
    named = {name: float(name) for name in steps}
    return Case(f"{title}, {how}", "ms a step", times, notes=notes, sizes=named)


def curves(options):
    """Step time against clusters, classes, rows, particles and modalities, with exponents."""
    hidden, one = ((8,), (8,)) if options.tiny else (DEEP, (500,))
    makers = {
        "VaDE, batch 256, clusters": (lambda k: vade(256, hidden, num_clusters=k), CLUSTERS),
        "M2, batch 64, classes": (lambda k: m2(64, one, num_classes=k), CLASSES),
        "VaDE, rows of a batch": (lambda n: vade(n, hidden), ROWS),
        "VaDE, batch 64, particles": (lambda n: with_particles(n, hidden), PARTICLES),
        "MVAE, batch 128, modalities, their joint bound": (
            lambda n: mvae(128, (98,) * n, one, subsets=False), MODALITIES,
        ),
        "MVAE, batch 128, modalities, with the bound of each": (
            lambda n: mvae(128, (98,) * n, one), MODALITIES,
        ),
    }  # fmt: skip
    for title, (make, sizes) in makers.items():
        for how in ("staged", "eager"):
            yield curve(title, make, sizes, options, how)
