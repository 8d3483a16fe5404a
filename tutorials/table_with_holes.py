# %% [markdown]
# # A table with holes
#
# A file with missing entries goes in; a completed table, with intervals, and clusters come out.  The
# table is scikit-learn's wine data: 178 bottles, 13 measurements.  A fifth of its entries are deleted
# here at random, so that we know the answers.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from pyrozoo import zoo
from pyrozoo.inference import metrics
from pyrozoo.zoo import baselines, datasets, tables

SMOKE = "SMOKE" in os.environ  # a short run, for the tests
folder = Path(tempfile.mkdtemp())

# %%
complete, label = datasets.table("wine")
truth, cultivar = complete.drop(columns=label), complete[label]
holes = np.random.default_rng(0).random(truth.shape) < 0.2
truth.mask(holes).rename_axis("bottle").to_csv(folder / "wine.csv")
print((folder / "wine.csv").read_text()[:320])

# %% [markdown]
# ## From the file to a table
#
# The kind of each column is learnt from its type and its values: real, positive, count, binary,
# categorical or ordered.  `columns={"ash": "student_t"}` would change it.  Nothing is scaled: each
# column's likelihood holds its location and scale, so all that comes out is in the units of the file.

# %%
table = tables.read(folder / "wine.csv", index="bottle")
print(*table.summary(), sep="\n")
for field in table.schema.site("x").columns:
    print(f"{field.name:30s} {field.kind:9s} {field.likelihood}")

# %% [markdown]
# ## A program for tables
#
# HI-VAE is a mixture of clusters, a latent vector and one likelihood a column.  A missing entry is
# left out of the bound, exactly.  The clusters are summed.

# %%
model = zoo.create("hivae", table.data, columns=table.schema.likelihoods(), num_clusters=3, seed=0)
result = model.fit(table.data, progress=False, **({"epochs": 3} if SMOKE else {}))
print(*result.sites, sep="\n")

# %%
epochs = [record["epoch"] for record in result.history]
figure, axes = plt.subplots(figsize=(5, 2.8), layout="constrained")
axes.plot(epochs, [record["bound"] for record in result.history])
axes.set_xlabel("epoch")
axes.set_ylabel("bound, nats per bottle")
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## The completed table
#
# Draws of the posterior, drawn again by their importance weights, give a mean and a central 90 %
# interval for every missing entry; what was known stays as it was.  The parameters are one point, so
# on a table as small as this one the intervals are too narrow: the share inside is printed below.

# %%
draws = result.posterior(table.data, 200, predictive=True, importance=True, seed=0)["x"]
filled = table.schema.summarise("x", draws, known=table.data["x"], index=table.index)
tables.write(filled.value, folder / "filled.csv")
first = table.index[holes[:, 0]][:5]
pd.DataFrame(
    {
        "lower": filled.lower.loc[first, "alcohol"],
        "filled in": filled.value.loc[first, "alcohol"],
        "upper": filled.upper.loc[first, "alcohol"],
        "truth": truth.loc[first, "alcohol"],
    }
)

# %%
spread = truth.mask(holes).std()
inside = (truth >= filled.lower) & (truth <= filled.upper)
print(f"share of the missing entries in their 90 % interval: {inside.to_numpy()[holes].mean():.3f}")


def error(guess) -> float:
    """Root mean squared error of missing entries, in standard deviations of their column."""
    return float(np.sqrt((((guess - truth) / spread).to_numpy()[holes] ** 2).mean()))


print(f"HI-VAE              {error(filled.value):.3f}")
for name, guess in baselines.imputers(truth.mask(holes).to_numpy(), seed=0).items():
    print(f"{name + ' imputer':19s} {error(guess):.3f}")

# %%
chosen = ["alcohol", "flavanoids", "color_intensity", "proline"]
figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained")
for axis, column in zip(axes, chosen, strict=True):
    rows = holes[:, truth.columns.get_loc(column)]
    x, y = truth[column][rows], filled.value[column][rows]
    bars = np.abs(np.stack([filled.lower[column][rows] - y, filled.upper[column][rows] - y]))
    axis.errorbar(x, y, bars, fmt="o", ms=3, lw=0.7, alpha=0.8)
    ends = [x.min(), x.max()]
    axis.plot(ends, ends, color="0.5", lw=1, zorder=0)
    axis.set_title(column)
    axis.set_xlabel("truth")
_ = axes[0].set_ylabel("filled in, 90 % interval")

# %% [markdown]
# ## The clusters
#
# The cultivar of a bottle was never shown.  The clusters are matched with the cultivars one to one.

# %%
probabilities = result.responsibilities(table.data, seed=0)
names, codes = np.unique(cultivar, return_inverse=True)
report = metrics.clustering_report(codes, probabilities)
print(f"one-to-one accuracy {report['hungarian_accuracy']:.3f}")
print(pd.crosstab(cultivar.to_numpy(), probabilities.argmax(1).numpy()))

# %% [markdown]
# ## How many clusters?
#
# From a shell, with the held-out bound and the agreement between seeds as guides:
#
# ```bash
# pyrozoo sweep hivae --data wine.csv --index bottle --values 2-6
# ```
#
# ## The same from a shell
#
# ```bash
# pyrozoo train hivae --data wine.csv --index bottle --set num_clusters=3 --out run
# pyrozoo predict run --data wine.csv --out filled.csv
# pyrozoo sample run --rows 10 --given y=1 --out new_bottles.csv
# ```
