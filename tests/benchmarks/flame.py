"""Where the time of a step goes: Pyro's handlers and autograd, or one compiled graph.

    python tests/benchmarks/flame.py [--out step.png]

Draws what runs inside what during one step of VaDE 784-128-16 on 64 rows, as the profiler of torch
saw it: first the objective itself, then the same step staged.  The profiler makes Python slower than
it is; the milliseconds in the titles are medians without it.
"""

import argparse
import copy
import functools
import statistics
import time
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pyro
import torch
from models import vade
from steps import contestants
from torch.profiler import ProfilerActivity, profile

from pyrozoo import zoo
from pyrozoo.inference import EnumELBO, stage

LAYERS = {  # what a frame belongs to, by a part of its name; the first that fits
    "matrix products": ("addmm", "aten::mm", "aten::matmul", "aten::linear", "aten::bmm"),
    "optimiser": ("Optimizer", "_fused_adam", "adam"),
    "compiled graph": ("Compiled", "cpp_fused", "torchinductor", "call(", "CompiledFx"),
    "handlers of Pyro": ("pyro/", "poutine"),
    "torch.distributions": ("torch/distributions",),
    "pyrozoo": ("pyrozoo", "inference/", "guides/", "zoo/"),
    "operations of torch": ("aten::", "autograd", "Backward"),
}
COLOURS = dict(
    zip(
        LAYERS,
        ("#4477AA", "#CCBB44", "#228833", "#EE6677", "#AA3377", "#66CCEE", "#BBBBBB"),
        strict=True,
    )
)
OTHER = "#E6E6E6"


def steps(rows=64, hidden=(128,), latent_dim=16):
    """Name -> a function that does one step."""
    data = {"x": torch.rand(rows, 784)}
    model = zoo.create("vade", data, hidden=hidden, latent_dim=latent_dim)
    found = {}
    for name in ("eager: the handlers run in every step", "staged: they ran once"):
        program, guide = copy.deepcopy((model.program, model.guide))
        parameters = [*program.parameters(), *guide.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
        if name.startswith("staged"):
            staged = stage(EnumELBO(), program, guide, data)
            batch = staged.p.pairing.prepare(data)
            found[name] = functools.partial(staged.step, batch, optimizer)
        else:
            module = EnumELBO()(program, guide)
            batch = module.model.pairing.prepare(data)

            def eager(module=module, batch=batch, optimizer=optimizer):
                optimizer.zero_grad(set_to_none=True)
                module(batch).backward()
                optimizer.step()

            found[name] = eager
    return found


def spans(step):
    """What ran in a step: (start, end, depth, name), times in milliseconds."""
    with profile(activities=[ProfilerActivity.CPU], with_stack=True) as prof:
        for _ in range(3):
            with torch.profiler.record_function("one step"):
                step()
    events = prof.profiler.kineto_results.events()
    (*_, last) = [e for e in events if e.name() == "one step"]
    begin, end = last.start_ns(), last.end_ns()
    inside = [(e.start_ns(), e.end_ns(), e.name()) for e in events if begin <= e.start_ns() <= end]
    inside.sort(key=lambda e: (e[0], -e[1]))
    found, open_until = [], []
    for a, b, name in inside:
        while open_until and open_until[-1] <= a:
            open_until.pop()
        if name != "one step":
            found.append(((a - begin) / 1e6, (b - begin) / 1e6, len(open_until), name))
        open_until.append(b)
    return found


def layer_of(name):
    return next((layer for layer, parts in LAYERS.items() if any(p in name for p in parts)), "")


def median_ms(step, rounds=50):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def draw(found, out):
    """One panel a step, on one axis of time."""
    figure, axes = plt.subplots(len(found), 1, figsize=(11, 7), sharex=True, layout="constrained")
    for axis, (title, step) in zip(axes, found.items(), strict=True):
        milliseconds, frames = median_ms(step), spans(step)
        for a, b, depth, name in frames:
            colour = COLOURS.get(layer_of(name), OTHER)
            axis.barh(depth, b - a, left=a, height=1, color=colour, linewidth=0, align="edge")
        axis.set_title(f"{title}: {milliseconds:.1f} ms", loc="left", fontsize=11)
        axis.set_ylabel("what runs inside what")
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds, under the profiler")
    handles = [matplotlib.patches.Patch(color=c, label=name) for name, c in COLOURS.items()]
    handles.append(matplotlib.patches.Patch(color=OTHER, label="other Python"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(out):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with pyro.validation_enabled(False):
        found = steps()
        for step in found.values():
            median_ms(step, 5)
        draw(found, out)
    print(out)


def share(step, rounds=10):
    """The share of matrix products in the time of a step."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        for _ in range(rounds):
            step()
    events = prof.key_averages()
    products = sum(e.self_cpu_time_total for e in events if e.key in ("aten::mm", "aten::addmm"))
    return products / sum(e.self_cpu_time_total for e in events)


def shares():
    """Print what matrix products take of a large step, by hand and staged."""
    torch.set_num_threads(1)
    with pyro.validation_enabled(False):
        found = contestants(vade(256), pyro=False)
        for name in ("by hand", "staged"):
            print(f"matrix products in VaDE 784-500-500-2000-10, {name}: {share(found[name]):.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("step.png"))
    parser.add_argument("--shares", action="store_true", help="of matrix products, instead")
    given = parser.parse_args()
    if given.shares:
        shares()
    else:
        main(given.out)
