"""The bound that one process reaches, and that two reach which share every batch.

    python tests/benchmarks/processes.py [--seeds 5] [--devices 2] [--epochs 20]

VaDE 64-64-10 on digits without pretraining, batches of 64; the bound of all rows is taken with ten
particles.  Each fit is a command of its own, one after another.
"""

import argparse
import os
import statistics
import subprocess
import sys

import torch


def bound(seed, devices, epochs):
    """The bound after a fit, in nats per datum; in the first process."""
    from pyrozoo import zoo
    from pyrozoo.inference import evaluate, fit, processes
    from pyrozoo.zoo import datasets

    torch.set_num_threads(1)
    data = {"x": datasets.load("digits", split="all").x}
    model = zoo.create("vade", data, hidden=(64,), seed=seed)
    fit(
        model.program, model.guide, data, epochs=epochs, batch_size=64, seed=seed, device="cpu",
        devices=devices, progress=False,
    )  # fmt: skip
    if processes.rank() == 0:
        return evaluate(model.program, model.guide, data, num_particles=10)["bound"]
    return None


def of_a_command(seed, devices, epochs):
    numbers = [f"--{k}={v}" for k, v in (("one", seed), ("devices", devices), ("epochs", epochs))]
    done = subprocess.run(
        [sys.executable, __file__, *numbers], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def spread(values):
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main(seeds, devices, epochs):
    alone = [of_a_command(seed, 1, epochs) for seed in range(seeds)]
    shared = [of_a_command(seed, devices, epochs) for seed in range(seeds)]
    print(f"VaDE on digits, {epochs} epochs, {seeds} seeds; bound in nats per datum")
    print(f"  one process   {spread(alone)}")
    print(f"  {devices} processes   {spread(shared)}")
    print(f"  difference    {spread([b - a for a, b in zip(alone, shared, strict=True)])}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is None:
        main(given.seeds, given.devices, given.epochs)
    elif (found := bound(given.one, given.devices, given.epochs)) is not None:
        print(found)
