"""Memory and speed of a fit on a file that is larger than memory.

    python tests/benchmarks/memory.py [--rows 5000000] [--steps 400] [--formats npy zarr ..]

For every format a file of rows of 784 bytes is written to a temporary folder, and removed again
afterwards. A process of its own opens it, checks all rows as every fit does, and makes some steps of
a small VaDE. Printed are anonymous resident memory (RssAnon of /proc/self/status, every 10 ms; pages
of the file that the system keeps are not counted, it takes them back when somebody needs them) after
the imports and at its peak, and rows per second of the check and of the steps. The format "memory"
reads the same file as a whole, for comparison.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

WIDTH, PART = 784, 10_000
FORMATS = ("npy", "h5", "h5 chunks", "zarr", "parquet", "memory")
ENDS = {"h5 chunks": ".h5", "memory": ".npy"}


def parts(rows):
    """Rows of bytes, some at a time, cheaply: one part of noise that is changed a little."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (PART, WIDTH), dtype=np.uint8)
    noise[rng.random((PART, WIDTH)) < 0.8] = 0
    for first in range(0, rows, PART):
        yield first, np.roll(noise, first // PART, 1)[: rows - first]


def write(path, kind, rows):
    """A file of the site x, ``(rows, 784)``."""
    if kind in ("npy", "memory"):
        file = np.lib.format.open_memmap(path, "w+", np.uint8, (rows, WIDTH))
        for first, part in parts(rows):
            file[first : first + len(part)] = part
        file.flush()
    elif kind.startswith("h5"):
        import h5py

        how = (
            {"chunks": (min(1000, rows), WIDTH), "compression": "gzip"} if "chunks" in kind else {}
        )
        with h5py.File(path, "w") as file:
            data = file.create_dataset("x", (rows, WIDTH), np.uint8, **how)
            for first, part in parts(rows):
                data[first : first + len(part)] = part
    elif kind == "zarr":
        import zarr

        group = zarr.open_group(str(path), mode="w")
        data = group.create_array("x", shape=(rows, WIDTH), dtype="uint8", chunks=(1000, WIDTH))
        for first, part in parts(rows):
            data[first : first + len(part)] = part
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kind = pa.list_(pa.uint8(), WIDTH)
        with pq.ParquetWriter(path, pa.schema({"x": kind})) as file:
            for _, part in parts(rows):
                column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), WIDTH)
                file.write_table(pa.table({"x": column}))


def anonymous():
    """Anonymous resident memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon")


class Peak(threading.Thread):
    """The largest anonymous memory while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self.done = anonymous(), threading.Event()

    def run(self):
        while not self.done.wait(0.01):
            self.bytes = max(self.bytes, anonymous())


class Enough(Exception):
    """The steps that were asked for are made."""


def measure(path, kind, steps, batch_size=256):
    """Figures of one format."""
    import torch

    from pyrozoo.guides import Amortized
    from pyrozoo.inference import fit
    from pyrozoo.zoo import tables
    from pyrozoo.zoo.clustering import VaDE

    torch.manual_seed(0)
    program = VaDE(WIDTH, 10, 10, (64,))
    guide = Amortized(program, ["x"], (64,))
    before, times = anonymous(), []

    def count(epoch):
        times.append(time.perf_counter())
        if len(times) > steps:
            raise Enough
        return 1.0

    peak = Peak()
    peak.start()
    start = time.perf_counter()
    if kind == "memory":
        data = {"x": np.load(path)}
    else:
        sites = {"x": "x"} if kind == "parquet" else None
        data = tables.open_rows(path, sites).data
    rows = len(data["x"]) if kind == "memory" else len(data)
    with contextlib.suppress(Enough):
        fit(program, guide, data, batch_size=batch_size, lr_schedule=count, progress=False)
    peak.done.set()
    peak.join()
    mixed = "blocks" if getattr(data, "by_blocks", False) else "rows"
    return {
        "format": kind, "rows": rows, "mixed": mixed, "MiB before": before / 2**20,
        "MiB peak": peak.bytes / 2**20, "check, rows/s": rows / (times[0] - start),
        "steps, rows/s": batch_size * (len(times) - 1) / (times[-1] - times[0]),
    }  # fmt: skip


def main(rows, steps, formats, folder=None):
    """Write, measure and remove a file of every format."""
    found = []
    print(f"{'':12s}{'rows':>10s}  mixed   MiB before  MiB peak   check, rows/s  steps, rows/s")
    for kind in formats:
        with tempfile.TemporaryDirectory(dir=folder) as where:
            path = Path(where) / f"rows{ENDS.get(kind, '.' + kind)}"
            write(path, kind, rows)
            command = [sys.executable, __file__, "--measure", kind, "--file", str(path)]
            command += ["--steps", str(steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        record = json.loads(done.stdout.splitlines()[-1])
        found.append(record)
        print(
            f"{kind:12s}{record['rows']:10,d}  {record['mixed']:6s}{record['MiB before']:12.0f}"
            f"{record['MiB peak']:10.0f}{record['check, rows/s']:16,.0f}"
            f"{record['steps, rows/s']:15,.0f}",
            flush=True,
        )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS[:-1])
    parser.add_argument("--folder", help="where the files are written; default: the system's")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.file, options.measure, options.steps)))
    else:
        main(options.rows, options.steps, options.formats, options.folder)
