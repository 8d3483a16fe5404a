# %% [markdown]
# # From one thread to many processes
#
# A probabilistic program is convenient to write and, run naively, slow: handlers, distributions and
# checks cost Python time in every step.  None of it has to be paid more than once.  This page goes
# from one thread of a laptop to many processes, and measures on the way.

# %%
import json
import os
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from pyrozoo import zoo
from pyrozoo.inference import EnumELBO, Stored, fit, fit_seeds, log_evidence, stage
from pyrozoo.zoo import datasets

SMOKE = "SMOKE" in os.environ  # a short run, for the tests
x = datasets.load("digits", split="all").x
images = torch.rand(1000, 784, generator=torch.Generator().manual_seed(0))  # for timing alone
print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")

# %% [markdown]
# ## A step without Pyro
#
# `stage` runs program, guide and objective once and writes down what they do to tensors: the loss
# and its gradient become one graph, which is compiled.  Random draws stay in the graph and come from
# torch's generator; weights, masks and parameters are inputs.


# %%
def time_of(step, rounds=3 if SMOKE else 100):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times))


batch = {"x": images[:64]}
model = zoo.create("vade", batch, hidden=(128,), latent_dim=16)
objective = EnumELBO()
optimizer = torch.optim.Adam(
    [*model.program.parameters(), *model.guide.parameters()], lr=1e-3, fused=True
)


def eager_step():
    optimizer.zero_grad()
    objective.differentiable_loss(model.program, model.guide, batch).backward()
    optimizer.step()


staged = stage(objective, model.program, model.guide, batch, compile=not SMOKE)
print(staged.describe())
before, after = time_of(eager_step), time_of(lambda: staged.step(batch, optimizer))
print(f"a step of VaDE 784-128-16 on 64 rows: {before:.1f} ms, staged {after:.1f} ms")

# %% [markdown]
# What the profiler of torch sees in the two steps (`pyrozoo bench flame` draws it).  Above, the
# handlers of Pyro, distributions and autograd surround a little arithmetic; below, the arithmetic is
# left, and the optimiser.  Python is slower under the profiler than without it, so the upper panel
# looks worse than the milliseconds in its title.
#
# ![One step before and after staging](step.png)
#
# In a fit it is one argument.  What cannot be staged (a value that decides what happens next, say)
# runs as before, and a warning names the line.

# %%
epochs = 2 if SMOKE else 20
for compile in (False, not SMOKE):
    model = zoo.create("vade", {"x": x}, hidden=(256, 256), seed=0)
    start = {"epochs": 1, "num_starts": 1}
    result = model.fit({"x": x}, epochs=epochs, compile=compile, start=start, progress=False)
    seconds = np.median([record["seconds"] for record in result.history])
    how = "compiled" if compile else "eager"
    print(
        f"{how}: {seconds:.3f} s an epoch, bound {result.history[-1]['bound']:.2f} nats per datum"
    )

# %% [markdown]
# ## Against other software
#
# `pyrozoo bench` measures steps, epochs, memory and evidence beside named rivals, on the same
# networks, taking turns in one process.  Here are the stored results of one machine: each dot is the
# median ratio of times in the same round, each bar its quartiles; left of one is faster than the
# rival.  The README has the table with what was aimed at.

# %%
folder = Path(zoo.__file__).parents[1] / "tests" / "benchmarks" / "results"
records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
found = [
    (f"{case['title'].removesuffix(', binary pixels')}: {ratio['ours']} / {ratio['rival']}", ratio)
    for record in records
    for case in record["cases"]
    for ratio in case["ratios"]
    if ratio["most"] is not None and "bf16" not in ratio["ours"]
]
figure, axis = plt.subplots(figsize=(12, 0.3 * len(found) + 1), layout="constrained")
for place, (_, ratio) in enumerate(found):
    reached = ratio["median"] <= ratio["most"]
    colour = "#228833" if reached else "#EE6677"
    axis.plot([ratio["low"], ratio["high"]], [place, place], color=colour, linewidth=3, alpha=0.5)
    axis.plot(ratio["median"], place, "o", color=colour)
    axis.plot(ratio["most"], place, "|", color="black", markersize=12)
axis.axvline(1, color="grey", linewidth=1)
axis.set_xscale("log")
axis.set_xticks([0.25, 0.5, 1, 2], ["1/4", "1/2", "1", "2"], minor=False)
axis.minorticks_off()
axis.set_yticks(range(len(found)), [name for name, _ in found], fontsize=8)
axis.invert_yaxis()
axis.spines[["top", "right"]].set_visible(False)
axis.set_xlabel("time of ours / time of the rival; black: what was aimed at, red: missed")
plt.show()

# %% [markdown]
# ## Many seeds at once
#
# One seed tells little.  Small models leave most of a processor idle, so `fit_seeds` stacks the
# parameters of several and makes their steps one step.  Each seed keeps its own draws, permutations
# and held-out rows: its numbers are those that it has alone.


# %%
def make(seed):
    model = zoo.create("vade", {"x": x}, hidden=(64,), seed=seed)
    return model.program, model.guide


for together in (False, True):
    began = time.perf_counter()
    results = fit_seeds(
        make, {"x": x}, seeds=range(5), epochs=epochs, batch_size=64, together=together,
        progress=False,
    )  # fmt: skip
    bounds = [result.history[-1]["bound"] for result in results]
    how = "at once" if together else "one after another"
    print(
        f"five seeds {how}: {time.perf_counter() - began:.1f} s,"
        f" bound {np.mean(bounds):.2f} ± {np.std(bounds, ddof=1):.2f}"
    )

# %% [markdown]
# ## Lower precision
#
# `zoo.create(..., precision="bf16")` computes the layers of the networks in bfloat16, and nothing
# else: parameters of distributions, densities and sums stay float32.  It pays where the hardware has
# bfloat16 units (recent GPUs, processors with AMX or AVX512-BF16), and warns where it has not.
#
# ## Evidence
#
# `log_evidence` estimates log p(x) of every row by importance weighting, exactly over discrete sites.
# The encoder runs once; the decoder sees rows times draws in pieces that fit into the cache.

# %%
began = time.perf_counter()
evidence = log_evidence(result.program, result.guide, {"x": x[:200]}, 10 if SMOKE else 1000)
print(
    f"200 rows with 1000 draws in {time.perf_counter() - began:.1f} s:"
    f" {evidence.mean():.2f} nats per datum, bound {result.evaluate({'x': x[:200]})['bound']:.2f}"
)

# %% [markdown]
# ## More rows than memory
#
# `Stored` takes arrays that are read by rows: memory-mapped `.npy` files, HDF5, Zarr, Parquet and
# AnnData (`zoo.tables.open_rows` opens them).  The next batches are read while a step computes.  A
# fit on them is the fit on the same rows in memory, bit for bit, where rows can be permuted freely.

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "images.npy"
    count = 500 if SMOKE else 20_000
    bytes_of = np.random.default_rng(0).integers(0, 256, (count, 784), dtype=np.uint8)
    np.save(file, bytes_of)
    rows = Stored({"x": np.load(file, mmap_mode="r")})
    model = zoo.create("vade", {"x": images[:10]}, hidden=(32,))
    fitted = fit(model.program, model.guide, rows, epochs=1, progress=False)
    again = zoo.create("vade", {"x": images[:10]}, hidden=(32,))
    whole = fit(again.program, again.guide, {"x": bytes_of}, epochs=1, progress=False)
    same = all(torch.equal(v, whole.parameters[k]) for k, v in fitted.parameters.items())
    print(f"{rows}\nthe same parameters as from memory: {same}")
    del rows

# %% [markdown]
# Five million rows of 784 bytes (3.9 GB) were fitted with a peak of 661 MiB of anonymous memory, of
# which 475 MiB are there once everything is imported (`pyrozoo bench memory`).
#
# ## Several processes
#
# `devices` says how many processes share every batch, one on each device.  `batch_size` is that of
# all together, so the learning rate and the bound are those of one process; only the noise is other.
#
# ```bash
# pyrozoo train vade --data mnist --devices 8          # 8 GPUs of this machine; "auto": all
# pyrozoo train vade --data digits --device cpu --devices 2
# torchrun --nproc-per-node 8 script.py                # fit(...) joins what torchrun has started
# ```
#
# In a script, `fit(..., devices=8)` runs the script again, once for each further process: print and
# save only where `inference.processes.rank() == 0`.  What one process fits for itself goes into
# `with processes.alone():`.  A notebook has one process.
#
# Under SLURM one task is one process, and the number of tasks has to be given:
#
# ```bash
# #!/bin/bash
# #SBATCH --nodes=2
# #SBATCH --ntasks-per-node=8
# #SBATCH --gpus-per-node=8
# #SBATCH --cpus-per-task=4
# export OMP_NUM_THREADS=4
# srun pyrozoo train vade --data mnist --device cuda --out runs/vade
# ```
#
# All nodes have to see the run folder.  The first process alone evaluates and writes.  An error in
# one process is raised in all of them.  Gradients are averaged over each batch after the backward
# pass, or after the staged step, so that processes whose rows know different things never wait for
# each other.  `--resume` needs the same number of processes.
#
# **What has been run.**  Two processes on a CPU, torchrun among them; SLURM by its environment alone.
# On digits, over five seeds, the bound of two processes was -25.680 ± 0.063 and that of one
# -25.646 ± 0.047 nats per datum.  No GPU was at hand: the CUDA graph that a staged step becomes there
# has been tested with a stand-in only, and several GPUs not at all.
