"""Users' own tables: files and data frames in, batches and a schema; posterior draws back out.

::

    table = tables.read("patients.csv", label="diagnosis", drop=["name"], index="id")
    model = create(method, table.data, likelihood=table.schema.likelihoods(), ...)
    new = table.schema.encode("new_patients.csv", absent="missing")
    filled = table.schema.summarise("x", draws, known=new.data["x"], index=new.index)
    tables.write(filled.value, "filled.csv")

Files that are larger than memory are opened by :func:`open_rows`, see :mod:`.lazy`.

They need pandas and pyarrow, ``pip install "pyrozoo[tables]"``; ``.h5ad`` files need anndata,
``pip install "pyrozoo[anndata]"``. None of these is imported before it is needed.
"""

from pyrozoo.zoo.tables.decode import Summary
from pyrozoo.zoo.tables.files import load, write
from pyrozoo.zoo.tables.kinds import KINDS
from pyrozoo.zoo.tables.lazy import Opened, open_rows
from pyrozoo.zoo.tables.learn import read
from pyrozoo.zoo.tables.schema import Field, Label, Schema, Site
from pyrozoo.zoo.tables.sources import Source
from pyrozoo.zoo.tables.table import Table

__all__ = [
    "KINDS",
    "Field",
    "Label",
    "Opened",
    "Schema",
    "Site",
    "Source",
    "Summary",
    "Table",
    "load",
    "open_rows",
    "read",
    "write",
]
