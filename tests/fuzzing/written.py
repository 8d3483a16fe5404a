"""Fuzzing checkpoints."""

import json
import math
import tempfile
from pathlib import Path

import torch

from fuzzing.core import attempt, chance, must, mutated, numbers, pick
from pyrozoo.inference import checkpoint


def checkpoints(rng):
    """Files of tensors and facts: what was written comes back, what was changed is refused."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "sub" / pick(rng, ["a.safetensors", "b", "ü [/x].st"])
        dtypes = [
            torch.float32,
            torch.float64,
            torch.int64,
            torch.uint8,
            torch.bool,
            torch.bfloat16,
        ]
        tensors = {
            pick(rng, ["w", "a.b", "y", "ü"]) + str(i): torch.from_numpy(
                numbers(rng, pick(rng, [(), (3,), (0,), (2, 2)]), "f4")
            ).to(pick(rng, dtypes))
            for i in range(int(rng.integers(0, 4)))
        }
        meta = {"kind": "x", "numbers": [1, 2.5, None, math.inf], "text": 'a":"b' * 3}
        attempt(lambda: checkpoint.save(path, tensors, meta), spoilt=False)
        must(sorted(p.name for p in path.parent.iterdir()) == [path.name], "one file is left")
        raw = path.read_bytes()
        if chance(rng, 0.15):
            found, facts = attempt(lambda: checkpoint.load(path), spoilt=False)
            must(found.keys() == tensors.keys(), "names")
            for name, value in tensors.items():
                same = found[name].dtype == value.dtype and torch.equal(found[name], value)
                must(same, f"tensor {name}")
            must({**facts, **meta} == facts, "facts")
            return
        spoilt, why = mutated(rng, raw)
        if chance(rng, 0.3):
            spoilt, why = _forged(rng, raw)
        path.write_bytes(spoilt)
        attempt(lambda: checkpoint.load(path), str(path), spoilt=why)


def _forged(rng, raw):
    """A file whose header was changed by somebody who knows how."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    meta = header["__metadata__"]
    facts = json.loads(meta["pyrozoo"])
    deep = "[" * 3000 + "]" * 3000
    change = {
        "no metadata": lambda: header.pop("__metadata__"),
        "metadata is a list": lambda: header.update(__metadata__=[1]),
        "no digest": lambda: meta.pop("digest"),
        "another digest": lambda: meta.update(digest="1" * 64),
        "an empty digest": lambda: meta.update(digest=""),
        "no facts": lambda: meta.pop("pyrozoo"),
        "facts are a list": lambda: meta.update(pyrozoo="[]"),
        "facts are deep": lambda: meta.update(pyrozoo=deep),
        "another format": lambda: meta.update(pyrozoo=json.dumps({**facts, "format": 1})),
        "a tensor too many": lambda: header.update(
            z={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
        ),
    }
    why = pick(rng, change)
    change[why]()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + size :], why
