"""A fuzzer: random inputs, sound and spoilt, for the public functions and the command.

::

    python tests/fuzz.py --inputs 10000 --seed 0
    python tests/fuzz.py --seed 0 --only tables --repeat 1234    # one input again, with a traceback

Every input either works, and then obeys the laws, or is refused by an error that says what is wrong
with it: by its name where it has one.  What is known to be spoilt has to be refused, what is known
to be sound has to work, and neither may touch the global random state.  An input is drawn from a
generator of its own, seeded by the seed, the name of the target and the number of the input.

``--open`` draws the inputs in ``fuzzing.core.OPEN`` too, which are not mended yet.
"""

import argparse
import contextlib
import signal
import sys
import time
import traceback
import warnings
import zlib

import numpy as np
import torch
from fuzzing.answers import posteriors
from fuzzing.batches import batch
from fuzzing.bounds import bound, options
from fuzzing.core import OPEN, SHOWN, Bad, Refused, untouched
from fuzzing.fitting import fits
from fuzzing.frames import frames
from fuzzing.kept import run_folders
from fuzzing.scores import scores
from fuzzing.sets import data_sets
from fuzzing.words import command
from fuzzing.written import checkpoints

SECONDS = 60  # for one input; more is a hang

#: target -> (function, share of the inputs)
TARGETS = {
    "batch": (batch, 0.26),
    "metrics": (scores, 0.20),
    "bound": (bound, 0.12),
    "options": (options, 0.03),
    "fits": (fits, 0.03),
    "posteriors": (posteriors, 0.06),
    "tables": (frames, 0.13),
    "checkpoints": (checkpoints, 0.06),
    "data": (data_sets, 0.05),
    "folders": (run_folders, 0.04),
    "command": (command, 0.02),
}


def draw(name, seed, number):
    """The function of a target with the generator of one of its inputs."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    with untouched(), warnings.catch_warnings(), _watched():
        warnings.simplefilter("error")
        TARGETS[name][0](rng)


def one(name, seed, number):
    """Run one input; gives "worked", "refused" or "BAD", and a text."""
    try:
        draw(name, seed, number)
    except Refused as error:
        return "refused", str(error)
    except Exception as error:
        return "BAD", f"{type(error).__name__}: {error}"
    return "worked", ""


@contextlib.contextmanager
def _watched():
    """Raise an error in an input that hangs, where the system can."""

    def stop(*_):
        raise Bad(f"hangs for {SECONDS} seconds")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(inputs, seed, only=None, say=print):
    """Run all targets, or one; gives target -> how many worked and were refused, and each BAD."""
    found = {}
    for name, (_, share) in TARGETS.items():
        if only not in (None, name):
            continue
        tally, began = {"worked": 0, "refused": 0, "BAD": []}, time.perf_counter()
        for number in range(inputs if only else max(1, round(inputs * share))):
            outcome, text = one(name, seed, number)
            if outcome == "BAD":
                tally["BAD"].append((number, text))
                say(f"BAD  --seed {seed} --only {name} --repeat {number}  {text[:600]}")
            else:
                tally[outcome] += 1
        tally["seconds"] = time.perf_counter() - began
        found[name] = tally
    return found


def table(found):
    """The figures of a run as lines."""
    rows = [
        (name, t["worked"] + t["refused"] + len(t["BAD"]), t["worked"], t["refused"],
         len(t["BAD"]), t["seconds"])
        for name, t in found.items()
    ]  # fmt: skip
    rows.append(("all", *map(sum, list(zip(*rows, strict=True))[1:])))
    head = f"{'target':12}{'inputs':>8}{'worked':>8}{'refused':>9}{'BAD':>6}{'seconds':>9}"
    return [head, *("{:12}{:8}{:8}{:9}{:6}{:9.1f}".format(*row) for row in rows)]


def main():
    parser = argparse.ArgumentParser(description="Fuzz pyrozoo.")
    parser.add_argument("--inputs", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    parser.add_argument("--repeat", type=int, help="the number of one input of --only")
    parser.add_argument("--open", action="store_true", help="draw what is not mended yet, too")
    words = parser.parse_args()
    torch.set_num_threads(1)
    SHOWN.update(OPEN if words.open else ())
    if words.repeat is not None:
        try:
            draw(words.only, words.seed, words.repeat)
        except (Bad, Refused) as error:
            traceback.print_exception(error)
            return int(isinstance(error, Bad))
        return 0
    found = run(words.inputs, words.seed, words.only)
    print(*table(found), sep="\n")
    return int(any(tally["BAD"] for tally in found.values()))


if __name__ == "__main__":
    sys.exit(main())
