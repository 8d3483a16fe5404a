"""Time of one optimiser step: hand-written PyTorch, stock Pyro, and ours, eager and staged.

    python tests/benchmarks vade m2 small

All contestants train copies of the same networks on the same rows with torch's fused Adam, with
validation switched off.  ``bf16`` is the networks in bfloat16 by torch's autocast; by hand, the whole
loss runs under it.
"""

import copy
import time
import warnings

import torch
from measuring import Case, measure, stepper
from models import m2, vade
from pyro.infer import TraceEnum_ELBO

from pyrozoo.inference import Batch
from pyrozoo.inference.staging.staged import stage
from pyrozoo.zoo.networks.precision import is_fast, set_precision

BF16 = ", bf16"


def stock(model, program, guide, batch):
    """The loss of ``TraceEnum_ELBO``, in nats per datum."""
    module = TraceEnum_ELBO(max_plate_nesting=1)(*model.objective.pair(program, guide))
    return lambda: module(batch) / len(batch)


def pair(model, bf16=False):
    """Copies of program and guide."""
    program, guide = copy.deepcopy((model.program, model.guide))
    if bf16:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "this processor has no bfloat16")
            for net in (program, guide):
                set_precision(net, "bf16")
    return program, guide


def staged_step(model, batch, compile=True, bf16=False, lr=1e-4, say=print):
    """A step of a copy of the model through one graph; ``say`` hears what it is."""
    program, guide = pair(model, bf16)
    started = time.perf_counter()
    staged = stage(model.objective, program, guide, batch, compile=compile)
    took = time.perf_counter() - started
    say(f"{model.name}{BF16 if bf16 else ''}: {staged.describe()}, made in {took:.1f} s")
    optimizer = torch.optim.Adam([*program.parameters(), *guide.parameters()], lr=lr, fused=True)
    return lambda: staged.step(batch, optimizer)


def by_hand(model, loss, compile=False, autocast=False):
    program, guide = pair(model)
    run = torch.compile(loss, dynamic=False) if compile else loss

    def value():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return run(program, guide, model.data)

    return stepper(value, program, guide)


def eager(model, batch):
    program, guide = pair(model)
    module = model.objective(program, guide)
    return stepper(lambda: module(batch), program, guide)


def contestants(model, compile=True, bf16=False, compiled_by_hand=True, pyro=True, say=print):
    """Name -> a function that does one step."""
    batch = Batch.of(model.data).to(dtype=torch.float32)
    found = {}
    precisions = ("", BF16) if bf16 else ("",)
    for name, loss in model.by_hand.items():
        for precision in precisions:
            autocast = bool(precision)
            found[name + precision] = by_hand(model, loss, autocast=autocast)
            if compile and compiled_by_hand:
                full = f"{name}, torch.compile{precision}"
                found[full] = by_hand(model, loss, True, autocast)
    if pyro:
        program, guide = pair(model)
        found["TraceEnum_ELBO"] = stepper(stock(model, program, guide, batch), program, guide)
    found["EnumELBO"] = eager(model, batch)
    for precision in precisions:
        found["staged" + precision] = staged_step(model, batch, compile, bool(precision), say=say)
    return found


def has_bf16():
    """Whether the processor computes in bfloat16, which takes ten times as long if it does not."""
    return is_fast()


def case(model, options, ratios, usual=40, inner=1, **choices):
    notes = []
    torch.manual_seed(0)
    steps = contestants(model, options.compile, say=notes.append, **choices)
    if not has_bf16():
        notes.append("this processor has no bfloat16 units")
    times = measure(steps, options.times(usual), warm_up=5, inner=1 if options.tiny else inner)
    return Case(model.name, "ms a step", times, ratios, notes=notes)


def vade_steps(options):
    """VaDE, 784-500-500-2000-10."""
    ratios = [
        ("staged", "by hand", 0.90),
        ("staged, bf16", "by hand", 0.65),
        ("staged", "by hand, torch.compile", 1.05),
        ("staged, bf16", "by hand, torch.compile, bf16", None),
        ("EnumELBO", "by hand", None),
        ("EnumELBO", "TraceEnum_ELBO", None),
    ]
    for rows in (7,) if options.tiny else (256, 1024):
        model = vade(rows, (8,), 3, 12) if options.tiny else vade(rows)
        yield case(model, options, ratios, bf16=has_bf16() or rows <= 256)


def m2_steps(options):
    """M2, 784-500-50, 10 classes, without labels and with half of them."""
    ratios = [
        ("staged", "by hand, x repeated", 0.6),
        ("staged", "by hand, x repeated, torch.compile", None),
        ("staged", "by hand", None),
        ("EnumELBO", "by hand, x repeated", None),
        ("EnumELBO", "TraceEnum_ELBO", None),
    ]
    sizes = (8, (8,), 3, 12, 4) if options.tiny else (200,)
    yield case(m2(*sizes), options, ratios)
    half = m2(*sizes, labelled=True)
    yield case(half, options, ratios, compiled_by_hand=False)


def small_steps(options):
    """VaDE, 784-128-16, batch 64: the overhead rules."""
    model = vade(7, (8,), 3, 12) if options.tiny else vade(64, (128,), 16)
    ratios = [
        ("staged", "by hand", 0.8),
        ("staged", "by hand, torch.compile", None),
        ("EnumELBO", "by hand", None),
        ("EnumELBO", "TraceEnum_ELBO", None),
    ]
    yield case(model, options, ratios, usual=40, inner=10)
