"""Time of one optimiser step: hand-written PyTorch, stock ``TraceEnum_ELBO`` and ``EnumELBO``.

    python tests/benchmarks/steps.py [--rounds 30] [--only VaDE]

All three train copies of the same networks on the same rows with torch's fused Adam, in one process,
taking turns, with validation switched off.  Printed are median milliseconds, and the median over
rounds of the ratio to the rival in the same round, with its quartiles.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import pyro
import torch
from pyro.infer import TraceEnum_ELBO

from pyrozoo.guides import Amortized, Classifier, Sequential
from pyrozoo.inference import Batch, EnumELBO
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.semisupervised import M2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import twins


def vade(rows, x_dim=784, hidden=(500, 500, 2000)):
    program = VaDE(x_dim, 10, 10, hidden)
    guide = Amortized(program, ["x"], hidden)
    data = {"x": torch.rand(rows, x_dim)}

    def hand(program, guide):
        noise = torch.randn(rows, 10)
        return -twins.vade(program, guide, data["x"], noise).mean()

    return program, guide, data, hand


def m2(rows, labelled, x_dim=784, hidden=(500,)):
    program = M2(x_dim, 10, 50, hidden)
    parts = [Classifier(program, "y", ["x"], hidden), Amortized(program, ["x", "y"], hidden)]
    guide = Sequential(*parts)
    x, y, known = torch.rand(rows, x_dim), torch.randint(10, (rows,)), torch.arange(rows) % 2 == 0
    data = {"x": x, "y": (y, known)} if labelled else {"x": x}
    some = known if labelled else None

    def hand(program, guide):
        noise = torch.randn(rows, 50)
        return -twins.m2(program, guide, x, noise, y if labelled else None, some, alpha=0.1).mean()

    return program, guide, data, hand


def contestants(program, guide, data, hand):
    """Name -> a function that does one step."""
    batch = Batch.of(data).to(dtype=torch.float32)
    objective = EnumELBO(observed_guide_weights={"y": 0.1} if "y" in data else None)

    def by_hand(p, q):
        return lambda: hand(p, q)

    def stock(p, q):
        module = TraceEnum_ELBO(max_plate_nesting=1)(*objective.pair(p, q))
        return lambda: module(batch) / len(batch)

    def ours(p, q):
        module = objective(p, q)
        return lambda: module(batch)

    makers = {"by hand": by_hand, "TraceEnum_ELBO": stock, "EnumELBO": ours}
    return {name: stepper(make, *copy.deepcopy((program, guide))) for name, make in makers.items()}


def stepper(make, program, guide):
    """One step of torch's fused Adam on the loss that ``make`` returns."""
    loss = make(program, guide)
    parameters = [*program.parameters(), *guide.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def step():
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        optimiser.step()

    return step


def measure(steps, rounds, warm_up=3):
    """Milliseconds of every step, by name, the contestants taking turns in a rotating order."""
    times = {name: [] for name in steps}
    names = list(steps)
    for i in range(warm_up + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            steps[name]()
            if i >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(times, name, rival):
    """The ratio in each round: median and quartiles."""
    ratios = [a / b for a, b in zip(times[name], times[rival], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def report(title, times):
    cells = [f"{statistics.median(times[name]):8.2f}" for name in times]
    for rival in ("TraceEnum_ELBO", "by hand"):
        cells.append("{:.3f} ({:.3f}..{:.3f})".format(*ratio(times, "EnumELBO", rival)))
    print(f"{title:28s}" + "  ".join(cells), flush=True)


def main(rounds=30, only="", tiny=False):
    sizes = {"x_dim": 12, "hidden": (8,)} if tiny else {}
    cases = {f"VaDE, batch {n}": lambda n=n: vade(n, **sizes) for n in (100, 256, 1024)}
    cases |= {
        "M2, batch 200, no labels": lambda: m2(200, False, **sizes),
        "M2, batch 200, half labelled": lambda: m2(200, True, **sizes),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; median ms a step")
    print(f"{'':28s} by hand  TraceEnum  EnumELBO  EnumELBO / TraceEnum   EnumELBO / by hand")
    results = {}
    with pyro.validation_enabled(False):
        for title, make in cases.items():
            if only in title:
                torch.manual_seed(0)
                results[title] = measure(contestants(*make()), rounds)
                report(title, results[title])
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="")
    parser.add_argument("--tiny", action="store_true", help="tiny networks: Python time alone")
    options = parser.parse_args()
    main(options.rounds, options.only, options.tiny)
