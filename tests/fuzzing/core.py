"""The oracle of the fuzzer, and what its targets draw from."""

import contextlib
import linecache
import math
import os
from pathlib import Path

import numpy as np
import pyro
import torch

import pyrozoo.inference

PACKAGES = tuple(
    str(Path(pyrozoo.inference.__file__).resolve().parents[1] / name) + os.sep
    for name in ("guides", "inference", "zoo")
)
EXPECTED = (
    ValueError, TypeError, OSError, FloatingPointError, ImportError, MemoryError
)  # fmt: skip


class Bad(Exception):
    """A law is broken, an error does not help, or a spoilt input is accepted."""


class Refused(Exception):
    """An input was refused by an error that helps."""


def must(holds, law):
    """The oracle."""
    if not holds:
        raise Bad(law)


def attempt(call, *names, spoilt=None, also=()):
    """What a call returns; raises Refused if an error that helps says that the input is spoilt.

    Args:
        call: a function without arguments.
        names: the error has to contain one of them; without any it has to be one of pyrozoo's own.
        spoilt: a text if the input has to be refused, False if it has to work, None if either.
        also: further types of errors that are raised on purpose.
    """
    try:
        found = call()
    except (Bad, Refused):
        raise
    except (*EXPECTED, *also) as error:
        text = str(error)
        if spoilt is False:
            raise Bad(f"a sound input was refused: {error!r}") from error
        named = any(name in text for name in names) if names else on_purpose(error)
        if not named or len(text) < 12:
            says = f"does not say any of {names}" if names else "is none of pyrozoo's own"
            raise Bad(f"the error {says} ({spoilt or 'perhaps sound'}): {error!r}") from error
        raise Refused(f"{type(error).__name__}: {text}") from error
    except Exception as error:
        raise Bad(f"{spoilt or 'perhaps sound'}: {error!r}") from error
    must(not spoilt, f"accepted in spite of: {spoilt}")
    return found


def on_purpose(error):
    """Whether an error comes from a ``raise`` in the package."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    file = frame.tb_frame.f_code.co_filename
    line = linecache.getline(file, frame.tb_lineno)
    return os.path.realpath(file).startswith(PACKAGES) and line.strip().startswith("raise ")


@contextlib.contextmanager
def untouched():
    """Check that the global random states, the default type and Pyro's settings stay as they are."""
    before = _state()
    try:
        yield
    finally:
        must(before == _state(), "global state was changed")


def _state():
    return (
        torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(),  # noqa: NPY002
        torch.get_default_dtype(), torch.is_grad_enabled(), len(pyro.get_param_store()),
        tuple(pyro.settings.get().values()),
    )  # fmt: skip


#: Spoilt inputs that are not refused yet, or by an error that does not help: target -> names.
OPEN = {
    "data": [
        "pixels that are not divided", "whole pixels", "below 0",
        "integers that floats cannot tell apart",
    ],
    "objective": [
        "free_bits=['y']", "num_particles='2'", "num_particles=2.5", "num_particles=None",
        "num_particles=True", "num_particles=nan", "num_rows='9'", "num_rows=-5", "num_rows=0",
        "num_rows=2.5", "num_rows=nan", "observed_guide_weights=3",
        "observed_guide_weights={'y': 'a'}", "weights='x'", "weights=[1.0]", "weights={'x': None}",
    ],
    "fit": [
        "batch_size=2.5", "batch_size=True", "batch_size=['1']", "callbacks=3",
        "callbacks=[\"'a'\"]", "callbacks=['1']", "callbacks=lambda", "clip=-1.0", "clip=0.0",
        "device='gpu'", "epochs=1.5", "epochs=True", "epochs=['1']", "folder='\\x00'", "folder=3",
        "inputs='noise'", "inputs=3", "lr=['1']", "lr_schedule='cosine'", "lr_schedule=0.5",
        "objective='elbo'", "objective=3", "objective=EnumELBO", "optimizer='adam'", "optimizer=3",
        "optimizer=lambda", "patience=1.5", "patience=nan", "repeat=[\"'x'\"]", "repeat={x: 'a'}",
        "save_every='a'", "save_every=-1", "save_every=0", "save_every=1.5", "seed='a'", "seed=1.5",
        "seed=1180591620717411303424", "seed=None", "seed=nan", "start='yes'", "start=3",
        "validation=1", "validation=True", "validation=['0.1']", "validation={}",
        "weights=[\"'x'\"]", "weights={x: 1.0}", "weights={x: None}",
    ],
}  # fmt: skip
SHOWN = set()  # with --open: the targets whose open inputs are drawn too


def closed(target, wrong):
    """The spoilt inputs that have to be refused: those not open, or with --open all."""
    return {k: v for k, v in wrong.items() if k not in OPEN[target] or target in SHOWN}


def pick(rng, options):
    """One of the options, which may be of different types."""
    options = list(options)
    return options[int(rng.integers(len(options)))]


def chance(rng, share):
    return bool(rng.random() < share)


KINDS = ["f2", "f4", "f8", ">f4", ">f8", "g", "i1", "i2", ">i4", "i8", "u2", "u4", "u8", "u1", "?"]


def numbers(rng, shape, kind):
    """A numpy array of small values."""
    if kind == "?":
        return rng.random(shape) < 0.5
    if kind[-2:-1] in "iu" or kind in ("i1", "u1"):
        top = 256 if kind == "u1" else 9
        return rng.integers(0, top, shape).astype(kind)
    return rng.normal(size=shape).astype(kind)


def laid_out(rng, values):
    """The same values in another memory layout, read-only, or as a tensor."""
    how = pick(rng, ["c", "fortran", "reversed", "strided", "read-only", "tensor", "t", "grad"])
    if how == "fortran":
        return np.asfortranarray(values)
    if how == "reversed":
        return values[::-1].copy()[::-1]
    if how == "strided" and values.ndim > 1:
        return np.repeat(values, 2, axis=-1)[..., ::2]
    if how == "read-only":
        values = values.copy()
        values.flags.writeable = False
    if how in ("tensor", "t", "grad") and values.dtype.isnative and values.dtype.kind != "V":
        if values.dtype == np.longdouble:
            return values
        tensor = torch.from_numpy(values.copy())
        if how == "t":
            return tensor.T.contiguous().T if tensor.dim() == 2 else tensor
        return tensor.requires_grad_() if how == "grad" and values.dtype.kind == "f" else tensor
    return values


def a_mask(rng, shape):
    """A mask of rows, of some leading dimensions or of entries, and the same over all entries."""
    rank = int(rng.integers(1, len(shape) + 1))
    mask = rng.random(shape[:rank]) < pick(rng, [0.0, 0.3, 0.8, 1.0])
    return mask, np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - rank)), shape)


def copied(value):
    if isinstance(value, tuple):
        return tuple(map(copied, value))
    return value.detach().clone() if isinstance(value, torch.Tensor) else value.copy()


def same(a, b):
    if isinstance(a, tuple):
        return all(map(same, a, b))
    if isinstance(a, np.ma.MaskedArray):
        return same(a.data, b.data) and same(np.ma.getmaskarray(a), np.ma.getmaskarray(b))
    a, b = (v.detach().numpy() if isinstance(v, torch.Tensor) else v for v in (a, b))
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def mutated(rng, raw):
    """Other bytes in place of some: changed, cut, added, swapped."""
    raw, new = bytes(raw), bytearray(raw)
    how = pick(rng, ["flip", "flip", "bytes", "cut", "add", "swap", "zeros", "empty", "foreign"])
    at = int(rng.integers(0, max(1, len(raw))))
    if how == "flip" and raw:
        new[at] ^= 1 << int(rng.integers(8))
    elif how == "bytes":
        for place in rng.integers(0, max(1, len(raw)), 5):
            new[place : place + 1] = bytes([int(rng.integers(256))])
    elif how == "cut":
        new = new[:at]
    elif how == "add":
        new[at:at] = bytes(rng.integers(0, 256, 9, dtype=np.uint8))
    elif how == "swap":
        new = new[at:] + new[:at]
    elif how == "zeros":
        new[at : at + 40] = bytes(len(new[at : at + 40]))
    elif how == "empty":
        new = bytearray()
    else:
        new = bytearray(
            pick(rng, [b"\x80\x04]\x94.", b"PK\x03\x04", b"[]", b"\0" * 64, b"\xff" * 64])
        )
    if bytes(new) == raw:
        return raw[:-1], "cut by one byte"
    return bytes(new), how


def spoil_json(rng, data):
    """Change one value, somewhere inside; gives the path to it."""
    where, path = data, []
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        if not keys:
            break
        key = pick(rng, keys)
        path.append(key)
        if isinstance(where[key], dict | list) and where[key] and chance(rng, 0.8):
            where = where[key]
            continue
        if chance(rng, 0.15):
            del where[key]
        else:
            where[key] = pick(rng, ODD)
        break
    return path


#: Values that no place expects.
ODD = [
    None, True, -1, 0, 1.5, 1e400, math.nan, 2**70, "", "x", "../../etc/passwd", "/dev/zero", [], {},
    [[]], {"a": {}}, "normal", "ü\0", ["a", 1], "http://127.0.0.1:9/x", "real", 10**6,
]  # fmt: skip


NO_COUNT = [0, -1, 2.5, math.nan, "3", None, True]
