# %% [markdown]
# # Clustering, from k-means to several facets
#
# Ways to find ten digits that nobody has named, from the plainest on.  The images are
# scikit-learn's digits, 8 by 8 pixels, all 1,797 of them; the last section tints them.
#
# **How it is scored.**  Labels are looked at for scoring only.  Clusters are matched with the digits
# one to one so that most images agree (Hungarian); rows in the wrong one are errors.  Everything is
# done with three seeds.

# %%
import os
from collections import defaultdict

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans

from pyrozoo import zoo
from pyrozoo.guides import Amortized, Classifier
from pyrozoo.inference import Batch, fit, metrics
from pyrozoo.zoo import baselines, datasets
from pyrozoo.zoo.clustering.neighbours import cut_graph, neighbour_graph, normalised_cut
from pyrozoo.zoo.clustering.pretraining import pretrain_autoencoder, start_network

SMOKE = "SMOKE" in os.environ  # a short run, for the tests
SEEDS = [0] if SMOKE else [0, 1, 2]
digits = datasets.load("digits", split="all")
rows = 400 if SMOKE else len(digits)
x, y = digits.x[:rows], digits.y[:rows]
scores: dict[str, list[float]] = defaultdict(list)  # way -> accuracy of each seed


def one_to_one(clusters) -> float:
    """Hungarian accuracy of clusters ``(N,)``."""
    return metrics.hungarian_accuracy(y, clusters)


def say(*names: str) -> None:
    """Mean and standard deviation over seeds."""
    for name in names:
        spread = f" ± {np.std(scores[name], ddof=1):.3f}" if len(SEEDS) > 1 else ""
        print(f"{name:34s} {np.mean(scores[name]):.3f}{spread}")


# %% [markdown]
# ## On pixels
#
# k-means, and a mixture of Gaussians with full covariances that starts from it.

# %%
for seed in SEEDS:
    scores["k-means, pixels"].append(one_to_one(baselines.kmeans(x, 10, seed).argmax(1)))
    mixture = baselines.gmm(x.double().numpy(), 10, seed, "full", 2)
    scores["mixture, pixels"].append(one_to_one(mixture.predict(x.double().numpy())))
say("k-means, pixels", "mixture, pixels")

# %% [markdown]
# k-means is hard to beat here: the images are small, centred and in one scale.
#
# ## On the codes of an autoencoder
#
# VaDE's own encoder and decoder, trained to rebuild the images, make ten numbers of each.  Hidden
# layers, epochs, rate and noise are those of the stored experiment `jiang2017_vade_digits_balanced`.

# %%
data = Batch.of({"x": x})
HIDDEN = (256, 256)
pairs, codes = {}, {}
for seed in SEEDS:
    pairs[seed] = zoo.create("vade", data, hidden=HIDDEN, seed=seed)
    codes[seed] = pretrain_autoencoder(
        pairs[seed].program, pairs[seed].guide, data, seed=seed,
        epochs=1 if SMOKE else 200, lr=2e-3, noise=0.2,
    ).double().numpy()  # fmt: skip

# %%
mixtures = {}
for seed in SEEDS:
    found = KMeans(10, n_init=10, random_state=seed).fit_predict(codes[seed])
    scores["k-means, codes"].append(one_to_one(found))
    mixtures[seed] = baselines.gmm(codes[seed], 10, seed, "full", 10).predict_proba(codes[seed])
    scores["mixture, codes"].append(one_to_one(mixtures[seed].argmax(1)))
say("k-means, codes", "mixture, codes")

# %% [markdown]
# ## Neighbours
#
# A Gaussian asks that a cluster is an ellipsoid.  Images of one digit rather lie along a bent sheet:
# each is close to some others, and the ends are far apart.  So join each code to its ten nearest
# neighbours, and look for the ten parts with the fewest links between them: the least *normalised
# cut*, a number from 0 to 10.  Two cuts may cost nearly the same, one that is right and one that
# splits a digit and leaves two others together; where clusters should be of like sizes, as here,
# `balance` says so.

# %%
parts, graphs = {}, {}
for seed in SEEDS:
    graphs[seed] = neighbour_graph(codes[seed], 10)
    free = cut_graph(graphs[seed], 10, seed=seed)
    scores["graph, codes"].append(one_to_one(free.clusters))
    parts[seed] = cut_graph(graphs[seed], 10, balance=1.0, seed=seed)
    scores["graph, codes, like sizes"].append(one_to_one(parts[seed].clusters))
say("graph, codes", "graph, codes, like sizes")

# %% [markdown]
# The cut can be computed without a label.  Here are forty partitions of the codes of one seed, each
# from one random start.

# %%
starts = range(2 if SMOKE else 20)
tried = {
    "k-means of codes": [
        KMeans(10, n_init=1, init="random", random_state=s).fit_predict(codes[0]) for s in starts
    ],
    "cut of the graph": [cut_graph(graphs[0], 10, num_starts=1, seed=s).clusters for s in starts],
}
figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
cuts, rights = [], []
for (name, partitions), colour in zip(tried.items(), ["C0", "C1"], strict=True):
    cut = [normalised_cut(graphs[0], p, 10) for p in partitions]
    right = [one_to_one(p) for p in partitions]
    axes.scatter(cut, right, s=26, color=colour, alpha=0.7, lw=0, label=name)
    cuts, rights = cuts + cut, rights + right
axes.scatter(
    parts[0].cut, one_to_one(parts[0].clusters), s=130, fc="none", ec="black", label="taken"
)
axes.set_xlabel("normalised cut (no label needed)")
axes.set_ylabel("one-to-one accuracy")
axes.spines[["top", "right"]].set_visible(False)
_ = axes.legend(frameon=False)
ranks = pd.Series(cuts).corr(pd.Series(rights), "spearman")
print(f"rank correlation of cut and accuracy: {ranks:.2f}")

# %% [markdown]
# Between the two ways a smaller cut goes with accuracy.  Among the cuts of the graph the cheapest are
# not the best, which is why like sizes are asked for as well.

# %% [markdown]
# ## VaDE
#
# VaDE puts the mixture into the model, and trains it together with the encoder and the decoder:
#
# ```python
# y = pyro.sample("y", dist.Categorical(logits=self.logits))         # summed exactly
# z = pyro.sample("z", self.component(y))                            # diagonal or full covariance
# pyro.sample("x", self.decoder(z))
# ```
#
# It needs a start.  Usually one writes
#
# ```python
# model = zoo.create("vade", {"x": x}, covariance="full")
# start = {"clusters": "neighbours", "num_neighbors": 10, "balance": 1.0, "epochs": 200}
# result = model.fit({"x": x}, start=start, epochs=10)
# ```
#
# which pretrains, finds clusters (`"mixture"` or `"neighbours"`), puts the components there and
# fits.  Below the same is done by hand, so that all runs of a seed share their autoencoder, and what
# differs is what comes after.

# %%
EPOCHS = 1 if SMOKE else 10
LOOKS = {1, 2, 3, 5, 7, 10}
paths: dict[str, list[list[tuple[float, ...]]]] = defaultdict(list)  # epoch, bound, accuracy


def encoder(model) -> Amortized:
    """The part of the guide that proposes z."""
    return next(part for part in model.guide.modules() if isinstance(part, Amortized))


def vade(name: str, seed: int, share, **options):
    """Fit VaDE from responsibilities ``(N, 10)`` of the codes."""
    model, old = zoo.create("vade", data, hidden=HIDDEN, seed=seed, **options), pairs[seed]
    model.program.decoder.load_state_dict(old.program.decoder.state_dict())
    encoder(model).load_state_dict(old_encoders[seed])
    model.program.set_mixture(share, codes[seed])
    for network in [part for part in model.guide.modules() if isinstance(part, Classifier)]:
        start_network(
            model.program, model.guide, network, encoder(model), data, seed=seed,
            steps=1 if SMOKE else 200,
        )  # fmt: skip
    path = []

    def look(result) -> None:
        if result.epoch in LOOKS:
            found = result.responsibilities(data, seed=0).argmax(1)
            path.append((result.epoch, result.history[-1]["bound"], one_to_one(found)))

    settings = {**model.settings, "epochs": EPOCHS, "callbacks": [look]}
    result = fit(
        model.program, model.guide, data, objective=model.objective, seed=seed, progress=False,
        **settings,
    )  # fmt: skip
    paths[name].append(path)
    scores[name].append(path[-1][-1])
    return result


old_encoders = {seed: encoder(pairs[seed]).state_dict() for seed in SEEDS}
fitted = {}
for start in ("mixture", "neighbours"):
    for covariance in ("diag", "full"):
        name = f"VaDE, {start}, {covariance}"
        for seed in SEEDS:
            share = mixtures[seed] if start == "mixture" else np.eye(10)[parts[seed].clusters]
            fitted[name, seed] = vade(name, seed, share, covariance=covariance)
        say(name)

# %% [markdown]
# ## What training does
#
# The bound is what training sees.  The accuracy is what we would like.  They need not agree: full
# covariances keep more of what the start had right, and their bound is a nat below that of diagonal
# ones.  What a run keeps is mostly decided by its start.


# %%
def draw(names: list[str]) -> None:
    """Bound and accuracy over epochs: means over seeds, and each seed as a thin line."""
    _, axes = plt.subplots(1, 2, figsize=(9.5, 3.5), layout="constrained")
    for i, name in enumerate(names):
        values = np.array(paths[name])  # seed, look, (epoch, bound, accuracy)
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot(values[0, :, 0], values[:, :, column].T, color=f"C{i}", lw=0.7, alpha=0.4)
            axis.plot(values[0, :, 0], values[:, :, column].mean(0), "o-", ms=4, color=f"C{i}",
                      label=name.removeprefix("VaDE, "))  # fmt: skip
    axes[0].set_ylabel("bound, nats per image")
    axes[1].set_ylabel("one-to-one accuracy")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)


draw([name for name in paths if "VaDE" in name])

# %%
ks = torch.arange(10).repeat_interleave(12)
torch.manual_seed(0)
drawn = fitted["VaDE, neighbours, diag", 0].predict({"y": ks}, "x", num_samples=1)


def grid(images: torch.Tensor, columns: int) -> np.ndarray:
    """Images ``(n, height, width, ...)`` as one picture with a gap between them."""
    n, height, width, *rest = images.shape
    page = torch.ones(n, height + 1, width + 1, *rest)
    page[:, :-1, :-1] = images.clamp(0, 1)
    page = page.unflatten(0, (n // columns, columns)).transpose(1, 2)
    return page.reshape((n // columns) * (height + 1), columns * (width + 1), *rest).numpy()


figure, axis = plt.subplots(figsize=(4.6, 3.9), layout="constrained")
axis.imshow(grid(1 - drawn.reshape(-1, 8, 8), 12), cmap="gray")
axis.set_title("draws of the program: a row per cluster", fontsize=10)
_ = axis.axis("off")

# %% [markdown]
# ## Another guide, the same program
#
# So far the cluster is summed in the program and the guide is q(z | x).  The guide may propose the
# cluster as well: by the mixture itself, averaged over q(z | x) in the logarithm
# (`cluster="geometric"`), or by a network q(y | x) (`cluster="network"`).  The program is not touched.
# For the same parameters the bound is looser, since such a guide pays for every doubt; fitted, the
# three end within half a nat.

# %%
for kind in ("geometric", "network"):
    name = f"VaDE, neighbours, full, {kind}"
    for seed in SEEDS:
        vade(name, seed, np.eye(10)[parts[seed].clusters], covariance="full", cluster=kind)
draw([f"VaDE, neighbours, full{kind}" for kind in ("", ", geometric", ", network")])

# %% [markdown]
# ## All of them

# %%
table = pd.DataFrame.from_dict(scores, orient="index", columns=[f"seed {s}" for s in SEEDS])
table = table.assign(mean=table.mean(1), sd=table.std(1))
table.round(3)

# %% [markdown]
# ## Several facets
#
# What is a cluster of *coloured* digits, the digit or the colour?  MFCVAE does not choose: it has two
# mixtures, each with its latent, and one decoder.  Which facet finds what is seen afterwards.  The
# settings are those of the stored experiment `falck2021_mfcvae_coloured_digits` with fewer epochs and
# ten clusters a facet; its top facet has three dimensions, as colours have.

# %%
train, test = (datasets.load("coloured_digits", split=s) for s in ("train", "test"))
model = zoo.create(
    "mfcvae", {"x": train.x}, num_clusters=(10, 10), latent_dims=(10, 3), hidden=(128, 128),
    likelihood="normal(0.1)", share=1.0, fade=15.0, seed=0,
)  # fmt: skip
short = {"epochs": 1 if SMOKE else 15, "batch_size": 128, "lr": 3e-3}
facets = model.fit(
    {"x": train.x}, seed=0, progress=False, start=short,
    **{**short, "epochs": 1 if SMOKE else 50},
)  # fmt: skip
found = {c: facets.responsibilities({"x": test.x}, c, seed=0).argmax(1) for c in ("c_1", "c_2")}
pd.DataFrame(
    {
        name: {c: metrics.hungarian_accuracy(labels, found[c]) for c in found}
        for name, labels in test.label_sets.items()
    }
).rename_axis("facet").round(3)

# %% [markdown]
# One-to-one accuracies on test images.  Below, each row holds one cluster of one facet fixed, and
# draws everything else: where a row has one digit in all colours its facet is the digit, where it has
# one colour and all digits it is the colour.

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.4, 4.4), layout="constrained")
for axis, c in zip(axes, found, strict=True):
    torch.manual_seed(0)
    images = facets.predict({c: ks[:120]}, "x", num_samples=1)
    images = images.reshape(-1, *train.image_shape).permute(0, 2, 3, 1)
    axis.imshow(grid(images, 12))
    axis.set_title(f"a row per cluster of {c}", fontsize=10)
    axis.axis("off")

# %% [markdown]
# ## Which should I use?
#
# k-means on the pixels first: it takes a second and has nothing to set.  The parts of the graph come
# next, of like sizes if that may be asked for: they have the best mean here.  VaDE is for when a
# generative model is wanted, one that can fill in pixels, take labels, or draw new digits; then start
# it from the graph.  The stored experiment `jiang2017_vade_digits_balanced` is this recipe over five
# seeds, 0.911 ± 0.025; on the 70,000 images of MNIST `jiang2017_vade_mnist_balanced` has 0.961 ± 0.002.
# MFCVAE is for data that can be sorted in more than one way.
