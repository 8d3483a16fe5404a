"""The schema of a table: what every site and column is, learnt once and kept with the model.

Values stay in the user's units: a likelihood holds the location and scale of its columns itself, so
the only thing to translate back are levels, which are codes 0 .. K-1. A schema is written as JSON;
reading it back trusts nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyrozoo.zoo.tables.cells import Level, repeated, some
from pyrozoo.zoo.tables.kinds import KINDS, LEVELLED

if TYPE_CHECKING:
    import pandas as pd

    from pyrozoo.zoo.networks import Columns
    from pyrozoo.zoo.tables.decode import Summary
    from pyrozoo.zoo.tables.table import Table

SITE_NAME = re.compile(r"x(_[A-Za-z0-9_]+)?")


@dataclass(frozen=True)
class Field:
    """A column of a site.

    Attributes:
        name: of the column.
        kind: one of ``kinds.KINDS``.
        likelihood: one that the kind can have.
        levels: what the codes 0 .. K-1 mean; for binary, categorical and ordered columns only.
        center: mean of the training rows, on the scale on which networks see the column.
        spread: standard deviation there.
    """

    name: str
    kind: str
    likelihood: str
    levels: tuple[Level, ...] = ()
    center: float = 0.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a column has an empty name")
        if self.likelihood not in KINDS.get(self.kind, ()):
            raise ValueError(
                f"column {self.name!r}: no kind {self.kind!r} with likelihood {self.likelihood!r}"
            )
        if self.kind in LEVELLED:
            _check_levels(f"column {self.name!r}", self.levels)
        elif self.levels:
            raise ValueError(f"column {self.name!r}: {self.kind} columns have no levels")
        if self.kind == "binary" and len(self.levels) != 2:
            raise ValueError(f"column {self.name!r} is binary, with {len(self.levels)} levels")
        if not (math.isfinite(self.center) and 0 < self.spread < math.inf):
            raise ValueError(
                f"column {self.name!r}: expected a finite center and a finite spread above 0, got"
                f" {self.center} and {self.spread}"
            )


@dataclass(frozen=True)
class Site:
    """An observed site: columns, or pixels (bytes) with the shape of one image."""

    name: str
    columns: tuple[Field, ...] = ()
    image_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not SITE_NAME.fullmatch(self.name):
            raise ValueError(f"a site of columns is called x or x_<view>, got {self.name!r}")
        if bool(self.columns) == (self.image_shape is not None):
            raise ValueError(f"site {self.name!r} has columns, or an image shape")
        if self.image_shape is not None and (
            not 1 <= len(self.image_shape) <= 3 or min(self.image_shape) < 1
        ):
            raise ValueError(f"site {self.name!r} has no image shape {self.image_shape}")

    @property
    def width(self) -> int:
        """Entries of the event."""
        return math.prod(self.image_shape) if self.image_shape else len(self.columns)


@dataclass(frozen=True)
class Label:
    """The column of labels, site ``y``, and what the codes 0 .. K-1 mean."""

    name: str
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        _check_levels(f"label {self.name!r}", self.levels)


@dataclass(frozen=True)
class Schema:
    """Sites, label, and the columns of the training data that were left out.

    ``values`` are columns, or arrays, that were asked for by name: name -> type in training.

    Raises:
        ValueError: there is no site and no value, or a name occurs twice.
    """

    sites: tuple[Site, ...]
    label: Label | None = None
    dropped: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sites and not self.values:
            raise ValueError("a schema has one site or more")
        for what, names in (
            ("sites", [*(s.name for s in self.sites), *self.values]),
            ("columns", [*self.columns, *([self.label.name] if self.label else [])]),
        ):
            if twice := repeated(names):
                raise ValueError(f"two {what} of the schema are called {some(twice)}")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of all sites."""
        return tuple(f.name for site in self.sites for f in site.columns)

    def site(self, name: str) -> Site:
        """A site by its name.

        Raises:
            ValueError: there is no such site.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise ValueError(
            f"the schema has no site {name!r} (sites: {some(s.name for s in self.sites)})"
        )

    def likelihoods(self) -> dict[str, Columns | str]:
        """What to pass as the likelihood of each site to a method of the catalogue."""
        from pyrozoo.zoo.networks import Column, Columns

        def column(f: Field) -> Column:
            num_values = 0 if f.kind == "binary" else len(f.levels)
            return Column(f.name, f.likelihood, num_values, f.center, f.spread)

        return {
            s.name: Columns([column(f) for f in s.columns]) if s.columns else "bernoulli"
            for s in self.sites
        }

    def encode(self, source: Any, **options: Any) -> Table:
        """New data as a table of this schema: see :func:`pyrozoo.zoo.tables.table.encode`."""
        from pyrozoo.zoo.tables.table import encode

        return encode(self, source, **options)

    def decode(self, site: str, values: Any, index: Any = None) -> pd.DataFrame:
        """Values in the user's columns: see :func:`pyrozoo.zoo.tables.decode.decode`."""
        from pyrozoo.zoo.tables.decode import decode

        return decode(self, site, values, index)

    def summarise(
        self, site: str, draws: Any, known: Any = None, level: float = 0.9, index: Any = None
    ) -> Summary:
        """Posterior draws as a table: see :func:`pyrozoo.zoo.tables.decode.summarise`."""
        from pyrozoo.zoo.tables.decode import summarise

        return summarise(self, site, draws, known, level, index)

    def images(self, site: str, values: Any) -> NDArray[np.uint8]:
        """Values of a site of pixels, (N, D) from 0 to 1, as bytes of shape (N, *image_shape)."""
        from pyrozoo.zoo.tables.decode import images

        return images(self, site, values)

    def to_json(self) -> str:
        """The schema as JSON text."""
        from pyrozoo.zoo.tables.stored import to_json

        return to_json(self)

    @staticmethod
    def from_json(text: str) -> Schema:
        """Read what :meth:`to_json` wrote: see :func:`pyrozoo.zoo.tables.stored.from_json`."""
        from pyrozoo.zoo.tables.stored import from_json

        return from_json(text)


def _check_levels(what: str, levels: Sequence[Any]) -> None:
    wrong = [v for v in levels if type(v) not in (str, int, float, bool)]
    wrong += [v for v in levels if isinstance(v, float) and not math.isfinite(v)]
    if wrong:
        raise ValueError(f"{what}: levels are text, finite numbers or booleans, got {wrong[0]!r}")
    if len(levels) < 2 or len(set(levels)) < len(levels):
        raise ValueError(f"{what} needs two or more different levels, got {some(levels)}")
