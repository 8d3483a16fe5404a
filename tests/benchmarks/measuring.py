"""What all benchmarks share: taking turns, medians with quartiles, tables, stored results.

A piece of work gives :class:`Case` after case.  Contestants of a case run in one process and take
turns, so that whatever else the machine does hits all of them; a ratio compares two of them within
the same round.
"""

import importlib
import json
import math
import os
import platform
import statistics
import threading
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
VERSIONED = (
    "torch", "pyro-ppl", "numpy", "clustpy", "pythae", "multivae", "jax", "numpyro", "funsor",
    "genjax",
)  # fmt: skip


@dataclass
class Options:
    """How the works are run.

    Attributes:
        rounds: how often each contestant has its turn; None: as many as the work sees fit.
        threads: of all contestants.
        tiny: small networks and data, to see that the work runs.
        compile: compile what can be compiled.
        root: folder of the data sets.
    """

    rounds: int | None = None
    threads: int = 2
    tiny: bool = False
    compile: bool = True
    root: str | None = None

    def times(self, usual):
        return self.rounds or (2 if self.tiny else usual)


@dataclass
class Case:
    """Measured times.

    Attributes:
        title: the work, with network and batch size.
        unit: of the times.
        times: contestant -> one time a round.
        ratios: (ours, rival, most) with the ratio of their times that is aimed at, or None.
        rows: data per time, where data a second is of interest.
        notes: what a reader must know beside.
        sizes: contestant -> size, where the work is a curve; see :func:`exponent`.
    """

    title: str
    unit: str
    times: dict[str, list[float]]
    ratios: list[tuple[str, str, float | None]] = field(default_factory=list)
    rows: int | None = None
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, float] = field(default_factory=dict)

    def record(self):
        """Everything but the single times."""
        found = {
            "title": self.title,
            "unit": self.unit,
            "contestants": {name: quartiles(times) for name, times in self.times.items()},
            "ratios": [
                {"ours": a, "rival": b, "most": most, **ratio(self.times[a], self.times[b])}
                for a, b, most in self.ratios
                if a in self.times and b in self.times
            ],
            "notes": self.notes,
        }
        if self.rows:
            for cells in found["contestants"].values():
                cells["rows_a_second"] = self.rows / seconds(cells["median"], self.unit)
        if self.sizes:
            medians = [statistics.median(self.times[name]) for name in self.sizes]
            found["sizes"] = self.sizes
            found["exponent"] = exponent(list(self.sizes.values()), medians)
        return found


def seconds(value, unit):
    return value / 1e3 if unit.startswith("ms") else value


def quartiles(values):
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratio(ours, rivals):
    """Quartiles of the ratio within each round."""
    return quartiles([a / b for a, b in zip(ours, rivals, strict=True)])


def exponent(sizes, times):
    """The slope of log time on log size by least squares, its standard error, and the slope
    between the two largest sizes."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in times]
    slope, start = statistics.linear_regression(x, y)
    centre = statistics.fmean(x)
    spread = sum((v - centre) ** 2 for v in x)
    off = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(off / (len(x) - 2) / spread) if len(x) > 2 else None
    return {"slope": slope, "error": error, "last": (y[-1] - y[-2]) / (x[-1] - x[-2])}


def measure(steps, rounds, warm_up=3, inner=1, scale=1e3):
    """Time of each step, by name: the contestants take turns in a rotating order.

    A turn is ``inner`` calls, and its time divided by that; ``scale`` 1e3 gives milliseconds.
    """
    times = {name: [] for name in steps}
    names = list(steps)
    for i in range(warm_up + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            for _ in range(inner):
                steps[name]()
            if i >= warm_up:
                times[name].append(scale * (time.perf_counter() - start) / inner)
    return times


def stepper(loss, *modules, lr=1e-4):
    """One step of torch's fused Adam on what ``loss()`` returns."""
    parameters = [x for module in modules for x in module.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=lr, fused=True)

    def step():
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        optimiser.step()

    return step


class Turns:
    """A loop of its own, such as a fit, that stands still between two epochs.

    ``run(pause)`` runs in a thread and calls ``pause()`` after each epoch; every call of the object
    lets it do one epoch.  The first includes all that comes before.
    """

    def __init__(self, run):
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error, self._stop = None, False

        def work():
            self._go.acquire()
            try:
                if not self._stop:
                    run(self._pause)
            except BaseException as error:
                self._error = error
            self._done.release()

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def _pause(self, *_):
        self._done.release()
        self._go.acquire()
        return self._stop

    def __call__(self):
        if not self._thread.is_alive():
            raise RuntimeError("the loop is over")
        self._go.release()
        self._done.acquire()
        if self._error:
            raise self._error

    def close(self):
        self._stop = True
        self._go.release()
        self._thread.join()


def absent(*packages, how):
    """A sentence about the first package that cannot be imported; '' if all can."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return (
                f"{name} is left out ({error}); pip install --no-deps --target FOLDER {how}, and"
                " name FOLDER in PYTHONPATH"
            )
    return ""


# ---- the machine ---------------------------------------------------------------------------------


def circumstances(options):
    """Machine, versions, threads and load, without names of hosts or folders."""
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: v for name in VERSIONED if (v := version(name))},
        "threads": options.threads,
        "cores_used": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def store(path, record):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
