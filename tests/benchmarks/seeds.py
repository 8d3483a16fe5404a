"""Time of an epoch of five seeds: all at once, and one after another.

python tests/benchmarks seeds
"""

import torch
from epochs import ours, run
from measuring import Turns
from models import vade

from pyrozoo.inference.seeds.fit_seeds import fit_seeds


def at_once(make, data, numbers, epochs, batch_size, compile=True):
    """A fit of all seeds that does an epoch of each whenever it is called."""

    def run(pause):
        done = 0

        def after_one(_):
            nonlocal done
            done += 1
            return pause() if done % len(numbers) == 0 else False

        fit_seeds(
            make, data, seeds=numbers, epochs=epochs, batch_size=batch_size, lr=1e-4,
            callbacks=[after_one], progress=False, compile=compile, together=True,
        )  # fmt: skip

    return Turns(run)


class Following(Turns):
    """Several loops, an epoch of one after an epoch of the other."""

    def __init__(self, loops):
        self.loops = loops

    def __call__(self):
        for loop in self.loops:
            loop()

    def close(self):
        for loop in reversed(self.loops):
            loop.close()


def seeds(options):
    """Five seeds of VaDE 784-128-16, and of VaDE 10-32-4, at once against one after another."""
    if options.tiny:
        yield of(options, 12, (8,), 3, None)
    else:
        yield of(options, 784, (128,), 16, 0.5)
        yield of(options, 10, (32,), 4, 0.5)


def of(options, x_dim, hidden, latent_dim, most):
    """The case of one network."""
    batch_size, rounds, numbers = 64, options.times(7), range(2 if options.tiny else 5)
    x = torch.rand(3 * batch_size if options.tiny else 100 * batch_size, x_dim)
    torch.manual_seed(0)
    models = [vade(1, hidden, latent_dim, x_dim) for _ in numbers]

    def make(seed):
        model = vade(1, hidden, latent_dim, x_dim)
        return model.program, model.guide

    def one_by_one(compile):
        epochs = rounds + 2
        return Following([ours(m, {"x": x}, epochs, batch_size, compile) for m in models])

    loops = {
        "at once": at_once(make, {"x": x}, numbers, rounds + 2, batch_size, options.compile),
        "one after another": one_by_one(options.compile),
    }
    if options.compile:
        loops["one after another, eager"] = one_by_one(False)
    ratios = [("at once", "one after another", most), ("at once", "one after another, eager", None)]
    shape = f"{x_dim}-{hidden[0]}-{latent_dim}"
    title = f"{len(numbers)} seeds of VaDE {shape}, batch {batch_size}, an epoch"
    return run(title, loops, rounds, len(numbers) * len(x), ratios, [f"{len(x):,} rows"])
