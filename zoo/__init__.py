"""The zoo: programs by task, networks, data sets, baselines, the catalogue and the command.

The catalogue is loaded when it is first asked for, because guides are built from ``zoo.networks``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrozoo.zoo.catalogue import Model, citation, create, list_methods, method

__all__ = ["Model", "citation", "create", "list_methods", "method"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pyrozoo.zoo import catalogue

        return getattr(catalogue, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
