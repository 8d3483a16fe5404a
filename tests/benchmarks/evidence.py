"""Time of the evidence of 10,000 images by 1,000 draws each: ``log_evidence`` against pythae.

    PYTHONPATH=FOLDER python tests/benchmarks/evidence.py [--rounds 12] [--threads 1] [--tiny]

The model is a VAE 784-200-200-50 with Bernoulli pixels; both contestants use the same networks.
Every turn takes some of the images, more for us than for the rival, whose turn would be long; times
are milliseconds an image.  ``log_evidence`` writes its graph down once a call, so that a longer turn
is nearer to what all images take; compiling, too, is in the time of every turn (from the compiler's
cache on disk after the first).  The rival is pythae's own ``VAE.get_nll``, 100 draws at a time as is
its default; FOLDER holds pythae, see the message where it is missing.
"""

import argparse
import time
from functools import partial

import torch
from epochs import PYTHAE, coders
from measuring import Case, Options, absent, circumstances
from models import VAE, pixels
from showing import show, under

from pyrozoo.guides import Amortized
from pyrozoo.inference import log_evidence

AIM = 1 / 4
OURS, COMPILED, RIVAL = "log_evidence", "log_evidence, compiled", "pythae VAE.get_nll"


def evidence(options, particles=1000):
    """Time of the evidence of a VAE by importance sampling, ours against pythae's."""
    x_dim, latent_dim, hidden = (12, 3, (8,)) if options.tiny else (784, 50, (200, 200))
    particles = 300 if options.tiny else particles
    torch.manual_seed(0)
    program = VAE(x_dim, latent_dim, hidden)
    guide = Amortized(program, ["x"], hidden)
    x = pixels(40 if options.tiny else 10_000, x_dim, binary=True)

    def ours(rows, compile=False):
        found = log_evidence(program, guide, {"x": rows}, particles, compile=compile)
        return float(found.mean())

    turns = {OURS: (ours, 512)}
    if options.compile:
        turns[COMPILED] = (partial(ours, compile=True), 1024)
    reason = absent("pythae", how=PYTHAE)
    if not reason:
        rival = pythae_evidence(program, guide, x_dim, latent_dim)
        turns[RIVAL] = (lambda rows: rival(rows, particles, min(100, particles)), 64)
    if options.tiny:
        turns = {name: (function, 10) for name, (function, _) in turns.items()}
    times, notes = take_turns(turns, x, options.times(12))
    aims = [(name, RIVAL, AIM) for name in (OURS, COMPILED)]
    title = f"evidence, VAE {x_dim}-{'-'.join(map(str, hidden))}-{latent_dim}, {particles} draws"
    yield Case(title, "ms an image", times, aims, 1, [reason, *notes] if reason else notes)


def pythae_evidence(program, guide, x_dim, latent_dim):
    """pythae's estimate, averaged over images, on our networks; it is not negative log evidence."""
    from pythae.models import VAE as Rival
    from pythae.models import VAEConfig

    encoder, decoder = coders(guide.networks["z"], program.decoder)
    settings = VAEConfig(
        input_dim=(x_dim,), latent_dim=latent_dim, reconstruction_loss="bce"
    )  # fmt: skip
    rival = Rival(settings, encoder, decoder(squash=True)).eval()
    return torch.no_grad()(rival.get_nll)


def take_turns(turns, x, rounds):
    """Milliseconds an image of every turn after the first; and what the same images gave each."""
    times = {name: [] for name in turns}
    names, start = list(turns), 0
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            function, rows = turns[name]
            first = start % max(1, len(x) - rows + 1)
            before = time.perf_counter()
            function(x[first : first + rows])
            if i:
                times[name].append(1e3 * (time.perf_counter() - before) / rows)
        start += max(rows for _, rows in turns.values())
    same = x[:10]
    found = [f"{name} {function(same):.2f}" for name, (function, _) in turns.items()]
    return times, [f"nats an image on the same {len(same)} images: {', '.join(found)}"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="only see that it runs")
    parser.add_argument("--no-compile", action="store_true", help="skip what is compiled")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = Options(given.rounds, given.threads, given.tiny, not given.no_compile)
    print(*under([circumstances(options)]), sep="\n")
    for case in evidence(options):
        show(case.record())
