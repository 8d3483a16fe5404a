"""Peak memory of training: the objective, staged and not, against a hand-written loop.

    python tests/benchmarks peak

Every contestant trains in a process of its own, after the same imports.  What is reported is how
far the resident memory goes beyond them: in the steps once all is compiled, and on the whole, where
the compiler counts too.  Linux only.
"""

import subprocess
import sys
from pathlib import Path

from measuring import Case

HERE = Path(__file__).resolve().parent
CONTESTANTS = ("by hand", "by hand, torch.compile", "EnumELBO", "staged")
STEPS = 8


def resident(field="VmRSS"):
    """Resident memory of this process, or its peak (VmHWM), in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field + ":")) / 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def child(contestant, kind, tiny, threads):
    """Train, and print the MB beyond the imports: of steps, and of everything."""
    import torch

    torch.set_num_threads(threads)
    import pyro
    import torch._inductor.compile_fx  # every contestant has the compiler in its memory
    from models import m2, vade
    from steps import by_hand, eager, staged_step

    from pyrozoo.inference import Batch

    if kind == "vade":
        model = vade(7, (8,), 3, 12) if tiny else vade(1024)
    else:
        model = m2(8, (8,), 3, 12, 4) if tiny else m2(200)
    batch = Batch.of(model.data).to(dtype=torch.float32)
    loss = next(iter(model.by_hand.values()))
    makers = {
        "by hand": lambda: by_hand(model, loss),
        "by hand, torch.compile": lambda: by_hand(model, loss, compile=True),
        "EnumELBO": lambda: eager(model, batch),
        "staged": lambda: staged_step(model, batch, compile=not tiny, say=lambda _: None),
    }
    before = resident()
    forget_peak()
    with pyro.validation_enabled(False):
        step = makers[contestant]()
        for _ in range(3):
            step()
        whole = resident("VmHWM") - before
        forget_peak()
        for _ in range(STEPS):
            step()
    print(resident("VmHWM") - before, whole)


def peak(options):
    """Peak memory of training VaDE (batch 1024) and M2 (batch 200), against a hand-written loop."""
    if not Path("/proc/self/clear_refs").exists():
        raise OSError("the peak of a process is read from /proc, which is not here")
    titles = {"vade": "VaDE, batch 1024", "m2": "M2, batch 200, no labels"}
    for kind, title in titles.items():
        title = f"{title}, tiny" if options.tiny else title
        steps, whole = {}, {}
        for _ in range(options.times(3)):
            for name in CONTESTANTS:
                if name.endswith("compile") and (options.tiny or not options.compile):
                    continue
                given = [name, kind, str(int(options.tiny)), str(options.threads)]
                run = subprocess.run(
                    [sys.executable, __file__, *given],
                    capture_output=True, text=True, check=True, cwd=HERE,
                )  # fmt: skip
                small, large = map(float, run.stdout.split()[-2:])
                steps.setdefault(name, []).append(small)
                whole.setdefault(name, []).append(large)
        rival = "by hand, x repeated" if kind == "m2" else "by hand"
        ratios = [("staged", "by hand", 1.1), ("EnumELBO", "by hand", 1.1)]
        notes = [f"the loop by hand is: {rival}"]
        yield Case(f"{title}, in the steps", "MB beyond the imports", steps, ratios, notes=notes)
        without = [(a, b, None) for a, b, _ in ratios]
        yield Case(f"{title}, with compiling", "MB beyond the imports", whole, without)


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], sys.argv[3] == "1", int(sys.argv[4]))
