"""bfloat16 inside networks, and nowhere else.

Only the layers of :class:`.MLP` and :class:`.Batched` compute in low precision; what they return is
float32 again before it becomes a distribution, so that densities, sums and divergences are not
affected.  Parameters, gradients and the optimiser stay float32.
"""

import contextlib
import warnings
from contextlib import AbstractContextManager

import torch
from torch import nn

PRECISIONS = ("float32", "bf16")


def set_precision(net: nn.Module, precision: str) -> None:
    """Let the layers in ``net`` compute in ``"bf16"`` (by autocast) or ``"float32"``.

    Raises:
        ValueError: another precision is asked for.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "bf16" and not is_fast():
        warnings.warn(
            "this processor has no bfloat16 arithmetic, so that bf16 is slower than float32",
            stacklevel=2,
        )
    for layers in net.modules():
        if "precision" in layers.__dict__:
            layers.__dict__["precision"] = precision


def computing_in(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """A context in which layers compute in a precision."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def is_fast() -> bool:
    """Whether this machine has arithmetic for bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # older than torch 2.11
        return True
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
