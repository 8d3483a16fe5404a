# %% [markdown]
# # One program, from all labels to none
#
# Below two programs are fitted to the same images with all labels, with a hundred, with twenty, with
# labels of some classes only, and with none.  Program, guide and call stay as they are; what changes is
# the dictionary of data.  One of the programs survives without labels.  The other does not, and its
# history says so.

# %%
import math
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression

from pyrozoo import zoo
from pyrozoo.inference import Result, metrics
from pyrozoo.inference.reports.diagnosis import diagnose
from pyrozoo.zoo import datasets, scoring

SMOKE = "SMOKE" in os.environ  # a short run, for the tests
SEEDS = [0] if SMOKE else [0, 1]
train, test = datasets.load("digits", split="train"), datasets.load("digits", split="test")
rows = 300 if SMOKE else len(train)
x, y = train.x[:rows], train.y[:rows]

# %% [markdown]
# ## The dictionaries
#
# A value that is known in some rows is a pair: labels, and a mask of those that are shown.  What hides
# behind the mask is zero.


# %%
def regimes(seed: int) -> dict[str, dict]:
    """The same images with fewer and fewer labels; the seed draws which are shown."""
    low = (y < 7).nonzero().squeeze(-1)
    shown = torch.zeros(len(y), dtype=torch.bool)
    shown[low[datasets.hide_labels(y[low], 70, seed)[1]]] = True
    return {
        "all": {"x": x, "y": y},
        "100": {"x": x, "y": datasets.hide_labels(y, 100, seed)},
        "20": {"x": x, "y": datasets.hide_labels(y, 20, seed)},
        "0 to 6": {"x": x, "y": (y * shown, shown)},  # ten of each, none of 7, 8 and 9
        "none": {"x": x},
    }


for name, data in regimes(0).items():
    if "y" not in data:
        count = 0
    else:
        count = int(data["y"][1].sum()) if isinstance(data["y"], tuple) else len(data["y"])
    print(f"{name:7s} {len(x)} images, {count} labels")

# %% [markdown]
# ## The programs
#
# In **VaDE** the class decides where the embedding lies, and the embedding makes the image.  The class
# is read off the embedding: p(y | z) is Bayes' rule.
#
# ```python
# y = pyro.sample("y", dist.Categorical(logits=self.logits))
# z = pyro.sample("z", dist.MultivariateNormal(self.loc[y], scale_tril=self.scale[y]))
# pyro.sample("x", self.decoder(z))
# ```
#
# It starts from the graph of neighbours of an autoencoder's codes: labels, where there are some, spread
# along it.  The recipe is that of the stored experiments (`pyrozoo reproduce
# jiang2017_vade_digits_100labels`), with half the epochs of the autoencoder.
#
# In **M2** the class and a style, independent of it, make the image together.  The class is read off
# the image by a network q(y | x), which is part of the guide.
#
# ```python
# y = pyro.sample("y", dist.Categorical(logits=uniform))
# z = pyro.sample("z", dist.Normal(self.zeros, 1.0).to_event(1))     # the style
# pyro.sample("x", self.decoder(z, one_hot(y, self.num_classes, z.dtype)))
# ```
#
# Where `y` is known it is observed; where it is not, it is summed.


# %%
def vade(data: dict, seed: int) -> Result:
    model = zoo.create("vade", data, hidden=(256, 256), covariance="full", seed=seed)
    start = {"epochs": 1 if SMOKE else 100, "lr": 2e-3, "noise": 0.2}  # an autoencoder
    start |= {"clusters": "neighbours", "num_neighbors": 10, "balance": 1.0}  # a graph of its codes
    return model.fit(data, seed=seed, epochs=1 if SMOKE else 10, progress=False, start=start)


def m2(data: dict, seed: int) -> Result:
    model = zoo.create("m2", data, hidden=(128,), latent_dim=20, seed=seed)
    return model.fit(
        data, seed=seed, epochs=1 if SMOKE else 40, batch_size=200, lr=2e-3, progress=False
    )


# %%
programs = {"VaDE": vade, "M2": m2}
fitted, guesses = {}, {}
for seed in SEEDS:
    for regime, data in regimes(seed).items():
        for name, program in programs.items():
            result = program(data, seed)
            fitted[name, regime, seed] = result
            guesses[name, regime, seed] = result.responsibilities({"x": test.x}, seed=0)
for regime in regimes(0):
    print(f"{regime:7s}", *[s for s in fitted["VaDE", regime, 0].sites if s.startswith("y")])

# %% [markdown]
# ## Accuracy on test images
#
# With labels of every class an image is right if its most probable class is its label.  Values of `y`
# that no label has named are matched with the classes left over, one to one (Hungarian): three of
# them in `0 to 6`, all ten in `none`.  Labels that are not shown are used for scores and colours only.


# %%
def accuracy(probabilities: torch.Tensor, regime: str) -> float:
    """Of the most probable classes; those that no label has named are matched one to one."""
    if regime == "none":
        return metrics.hungarian_accuracy(test.y, probabilities.argmax(1))
    if regime == "0 to 6":
        return scoring.open_set(test.y, probabilities, known_classes=7)["open_accuracy"]
    return metrics.accuracy(test.y, probabilities.argmax(1))


scores = pd.Series({key: accuracy(p, key[1]) for key, p in guesses.items()})
scores.index.names = ["program", "labels", "seed"]
shown = scores.unstack("labels")[list(regimes(0))]
shown.round(3)

# %%
shown.groupby("program").agg(["mean", "std"]).round(3)

# %% [markdown]
# ## The latents
#
# Test images by z, in the two directions of most variance; colours are digits.  In VaDE z has to hold
# the digit, with labels or without.  In M2 z is what is left when the class is known: where q(y | x)
# works the digits lie over each other, and only without labels, when the decoder has no other place to
# read the digit from, do they come apart in z.

# %%
figure, axes = plt.subplots(2, 5, figsize=(12.5, 5.2), layout="constrained")
for row, name in zip(axes, programs, strict=True):
    for axis, regime in zip(row, regimes(0), strict=True):
        z = fitted[name, regime, 0].predict({"x": test.x}, "z", num_samples=8, seed=0)
        z = z - z.mean(0)
        plane = np.linalg.svd(z.numpy(), full_matrices=False)[2][:2]
        axis.scatter(*(plane @ z.numpy().T), c=test.y.numpy(), cmap="tab10", s=7, lw=0)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(f"labels: {regime}" if name == "VaDE" else "", fontsize=11)
    row[0].set_ylabel(f"{name}: z", fontsize=12)
handles = [plt.Line2D([], [], marker="o", ls="", color=plt.cm.tab10(i), label=i) for i in range(10)]
_ = figure.legend(handles=handles, loc="outside right center", frameon=False)

# %% [markdown]
# How much of the digit is in z can be said without a picture: the error of three nearest neighbours in
# z, training images against test images.

# %%
error = {}
for name in programs:
    for regime in regimes(0):
        z = [
            fitted[name, regime, 0].predict({"x": images}, "z", num_samples=8, seed=0)
            for images in (x, test.x)
        ]
        error[name, regime] = metrics.knn_error(z[0], y, z[1], test.y)
pd.Series(error).unstack()[list(regimes(0))].round(3)

# %% [markdown]
# ## Without labels M2 collapses
#
# Nothing in M2 asks the decoder to use `y`: the style can hold all there is.  Then every class explains
# an image equally well, and the bound is best when q(y | x) is uniform.  Its entropy is then ln 10.

# %%
print(f"ln 10 = {math.log(10):.3f}")
for name in programs:
    for regime in ("100", "20", "0 to 6", "none"):
        p = guesses[name, regime, 0].clamp_min(1e-12)
        entropy = float(-(p * p.log()).sum(1).mean())
        print(f"{name:5s} {regime:7s} mean entropy of the class, test images: {entropy:.3f}")

# %%
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for regime, colour in zip(("100", "20", "none"), ("C0", "C1", "C3"), strict=True):
    history = fitted["M2", regime, 0].history
    axis.plot(
        [r["epoch"] for r in history], [r["entropy_y"] for r in history], color=colour,
        label=f"M2, labels: {regime}",
    )  # fmt: skip
axis.axhline(math.log(10), color="0.5", lw=1, ls="--")
axis.text(1, math.log(10) - 0.05, "ln 10", va="top", color="0.4")
axis.set_xlabel("epoch")
axis.set_ylabel("entropy of q(y | x), nats")
axis.set_ylim(0, 2.45)
axis.spines[["top", "right"]].set_visible(False)
_ = axis.legend(frameon=False, loc="center right")

# %% [markdown]
# Every fit keeps these figures in its history, and `diagnose` reads them; the report of a run shows
# what it says.  It needs no label.

# %%
for name, dims in (("M2", 20), ("VaDE", 10)):
    for regime in ("20", "none"):
        found = diagnose(fitted[name, regime, 0].history, {"y": 10}, {"z": dims})
        print(f"{name}, labels: {regime}:", "" if found else "nothing looks wrong")
        for finding in found:
            print(f"  {finding.title}\n  {finding.seen}\n  {finding.advice}")

# %% [markdown]
# ## Classes that nobody has labelled
#
# With labels of 0 to 6 only, three values of `y` are left over.  What do the programs do with them?

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axis, name in zip(axes, programs, strict=True):
    guess = guesses[name, "0 to 6", 0].argmax(1)
    counts = np.zeros((10, 10), dtype=int)
    np.add.at(counts, (test.y.numpy(), guess.numpy()), 1)
    axis.imshow(counts, cmap="Blues")
    for i, j in zip(*counts.nonzero(), strict=True):
        axis.text(j, i, counts[i, j], ha="center", va="center", fontsize=8,
                  color="white" if counts[i, j] > 18 else "black")  # fmt: skip
    axis.axvline(6.5, color="0.5", lw=1)
    axis.axhline(6.5, color="0.5", lw=1)
    axis.set_xticks(range(10), [*map(str, range(7)), "new", "new", "new"], fontsize=8)
    axis.set_yticks(range(10))
    axis.set_title(f"{name}, labels of 0 to 6")
    axis.set_xlabel("most probable value of y")
_ = axes[0].set_ylabel("digit")

# %%
for name in programs:
    for seed in SEEDS:
        found = scoring.open_set(test.y, guesses[name, "0 to 6", seed], known_classes=7)
        print(
            f"{name:5s} seed {seed}:",
            *[f"{k.replace('_', ' ')} {v:.3f} " for k, v in found.items()],
        )

# %% [markdown]
# VaDE finds most images of digits that had no label, since p(y | z) is a density in the latent space and
# has components to spare; which of the three they are it may mix up.  M2's classifier q(y | x) never
# names them: its classification term only ever saw seven classes.  With all labels the two are alike,
# with few VaDE is ahead, because its labels spread along a graph of codes that no label was needed for,
# and with none only VaDE is of use.

# %% [markdown]
# ## How many labels?
#
# Logistic regression sees the labelled images alone; the programs see the others, too.

# %%
counts = [100] if SMOKE else [300, 100, 50, 20, 10]
curve = {}
for count in counts:
    labels, known = datasets.hide_labels(y, count, seed=0)
    rival = LogisticRegression(max_iter=2000).fit(x[known], y[known])
    curve["logistic regression", count] = rival.score(test.x, test.y)
    for name, program in programs.items():
        guess = program({"x": x, "y": (labels, known)}, 0).responsibilities({"x": test.x}, seed=0)
        curve[name, count] = metrics.accuracy(test.y, guess.argmax(1))
curve = pd.Series(curve).unstack()[counts]
curve.round(3)

# %%
figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for name, style in (("VaDE", "o-"), ("M2", "o-"), ("logistic regression", "s--")):
    axis.plot(range(len(counts)), curve.loc[name], style, label=name)
axis.set_xticks(range(len(counts)), [str(c) for c in counts])
axis.set_xlabel("labels shown")
axis.set_ylabel("accuracy on test images")
axis.spines[["top", "right"]].set_visible(False)
_ = axis.legend(frameon=False)

# %% [markdown]
# The unlabelled images help VaDE where labels are few: a graph that is right makes ten labels go far, and
# one that is not stays wrong where they do not contradict it.  M2, fitted for so short a time, is hardly
# better than logistic regression.  One seed and one draw of the labels: enough for a picture, not for a
# claim; `pyrozoo reproduce` runs the stored experiments over seeds.
