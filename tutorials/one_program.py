# %% [markdown]
# # One program, four data sets
#
# VaDE is a program: a cluster, an embedding, an image.  Below it is fitted four times.  The
# program, the guide and the objective stay as they are; only what is observed changes, and with it
# what is learnt: clusters, clusters that know a few labels, a classifier, and a model that fills in
# missing pixels.

# %%
import os

import matplotlib.pyplot as plt
import torch
from sklearn.manifold import TSNE

from pyrozoo import zoo
from pyrozoo.inference import Result, metrics
from pyrozoo.zoo import datasets

SMOKE = "SMOKE" in os.environ  # a short run, for the tests

# %% [markdown]
# The data are scikit-learn's digits, 8 by 8 pixels, with a fixed split.

# %%
train, test = datasets.load("digits", split="train"), datasets.load("digits", split="test")
x, y = train.x, train.y
few = datasets.hide_labels(y, 100, seed=0)  # (labels, known), ten of each class
torch.manual_seed(0)
seen = torch.rand(x.shape) > 0.5  # half of the pixels


def vade(data: dict) -> Result:
    """Pretrain and fit VaDE on whatever is observed.

    It starts as an autoencoder; the parts of the graph that joins its codes to their nearest
    neighbours are the first clusters, along which labels spread.
    """
    model = zoo.create("vade", data, hidden=(256, 256), covariance="full")
    start = {"epochs": 2 if SMOKE else 200, "lr": 2e-3, "noise": 0.2}
    start |= {"clusters": "neighbours", "num_neighbors": 10, "balance": 1.0}
    return model.fit(data, epochs=2 if SMOKE else 10, progress=False, start=start)


# %% [markdown]
# ## Nothing but images: clusters

# %%
clusters = vade({"x": x})
found = clusters.responsibilities({"x": x}).argmax(1)
print(f"Hungarian accuracy, training rows: {metrics.hungarian_accuracy(y, found):.3f}")

# %% [markdown]
# ## A hundred labels

# %%
semi = vade({"x": x, "y": few})
guess = semi.responsibilities({"x": test.x}).argmax(1)
print(f"test error with 100 labels: {1 - metrics.accuracy(test.y, guess):.3f}")

# %% [markdown]
# ## All labels

# %%
supervised = vade({"x": x, "y": y})
guess = supervised.responsibilities({"x": test.x}).argmax(1)
print(f"test error with all labels: {1 - metrics.accuracy(test.y, guess):.3f}")

# %% [markdown]
# ## Half of the pixels, no label

# %%
holes = vade({"x": (x, seen)})
torch.manual_seed(1)
test_seen = torch.rand(test.x.shape) > 0.5
filled = holes.predict({"x": (test.x, test_seen)}, "x")
error = (filled - test.x).square()[~test_seen].mean()
mean = (x * seen).sum(0) / seen.sum(0)
plain = (mean - test.x).square()[~test_seen].mean()
print(f"squared error of the hidden pixels: {error:.4f} (mean image: {plain:.4f})")

# %% [markdown]
# ## The picture


# %%
def grid(images: torch.Tensor, columns: int) -> torch.Tensor:
    """Images ``(n, 8, 8)`` as one picture with a light gap between them."""
    padded = torch.nn.functional.pad(images.clamp(0, 1), (0, 1, 0, 1), value=0.5)
    rows = len(images) // columns
    return padded.reshape(rows, columns, 9, 9).permute(0, 2, 1, 3).reshape(rows * 9, columns * 9)


figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained", dpi=150)
ks = torch.arange(10).repeat_interleave(10)
samples = clusters.posterior({"y": ks}, predictive=True)["z"]
torch.manual_seed(2)
drawn = clusters.predict({"y": ks}, "x", num_samples=1).reshape(-1, 8, 8)
axes[0].imshow(grid(drawn, 10).numpy(), cmap="gray_r")
axes[0].set_title("{x}: a row per cluster")
z = semi.predict({"x": test.x}, "z", num_samples=4)
point = TSNE(random_state=0, perplexity=10 if SMOKE else 30).fit_transform(z.numpy())
axes[1].scatter(*point.T, c=test.y.numpy(), cmap="tab10", s=8)
axes[1].set_title("{x, 100 labels}: latents, t-SNE")
table = metrics.confusion(test.y, guess)
axes[2].imshow(table, cmap="Blues")
for i, j in zip(*table.nonzero(), strict=True):
    axes[2].text(j, i, table[i, j], ha="center", va="center", fontsize=7,
                 color="white" if i == j else "black")  # fmt: skip
axes[2].set_title("{x, y}: true label, predicted label")
shown = torch.where(test_seen, test.x, torch.tensor(0.5))[:30]
triples = torch.stack([shown, filled[:30], test.x[:30]], 1).reshape(-1, 8, 8)
axes[3].imshow(grid(triples, 9).numpy(), cmap="gray_r")
axes[3].set_title("{half of x}: seen, filled in, truth")
for axis in axes:
    axis.set_xticks([])
    axis.set_yticks([])
if not SMOKE:
    figure.savefig("one_program.png")
