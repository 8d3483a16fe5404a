# %% [markdown]
# # From a thousand labels to none
#
# A classifier needs labels, a clustering needs none.  As a generative program they are the same
# thing: a class, an embedding, an image.  Where the class of a row is known it is observed; where it
# is not, it is summed over.  So the number of labels is a property of the *data*, and one program
# covers the whole range.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from pyrozoo import zoo
from pyrozoo.inference import metrics
from pyrozoo.zoo import datasets, scoring

SMOKE = "SMOKE" in os.environ  # a short run, for the tests
train, test = datasets.load("digits", split="train"), datasets.load("digits", split="test")
print(f"{len(train)} training and {len(test)} test images of 8 by 8 pixels")

# %% [markdown]
# ## The program
#
# `pyrozoo show vade` prints its equations.  Here is the heart of it:
#
# ```python
# with pyro.plate("data", len(batch)):
#     y = pyro.sample("y", dist.Categorical(logits=self.logits))
#     z = pyro.sample("z", dist.Normal(self.loc[y], self.scale[y]).to_event(1))
#     pyro.sample("x", self.decoder(z))
# ```
#
# One function fits it to whatever it is given.  Nothing in it mentions labels.


# %%
def vade(data: dict, seed: int = 0):
    model = zoo.create("vade", data, seed=seed, hidden=(256, 256))
    epochs = 1 if SMOKE else 100
    start = {"epochs": epochs, "lr": 2e-3, "noise": 0.2, "num_starts": 1 if SMOKE else 10}
    return model.fit(data, seed=seed, epochs=epochs, progress=False, start=start)


# %% [markdown]
# ## What was missing, and what was done about it
#
# `hide_labels` returns a pair: labels, and a mask of those that are shown.  Every fit says per site
# what it found.

# %%
few = datasets.hide_labels(train.y, 100, seed=0)
result = vade({"x": train.x, "y": few})
print(*result.sites, sep="\n")

# %% [markdown]
# ## Fewer and fewer labels
#
# With labels, a test image is right if its most probable class is its label.  Without any label the
# clusters have no names: they are matched with the classes one to one (Hungarian), which is the only
# place where labels of the unlabelled run are looked at.  Logistic regression sees the same labelled
# images, and nothing else.

# %%
counts = [100, 0] if SMOKE else [1000, 300, 100, 50, 20, 10, 0]
ours, plain = {}, {}
for count in counts:
    data = {"x": train.x}
    if count:
        labels, known = datasets.hide_labels(train.y, count, seed=0)
        data["y"] = (labels, known)
        rival = LogisticRegression(max_iter=2000).fit(train.x[known], train.y[known])
        plain[count] = rival.score(test.x, test.y)
    fitted = vade(data)
    guess = fitted.responsibilities({"x": test.x}, seed=0).argmax(1)
    score = metrics.accuracy if count else metrics.hungarian_accuracy
    ours[count] = score(test.y, guess)
    print(f"{count:5d} labels: VaDE {ours[count]:.3f}", end="")
    print(
        f", logistic regression {plain[count]:.3f}" if count else " (clusters matched one to one)"
    )

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
places = range(len(counts))
axes.plot(places, [ours[c] for c in counts], "o-", label="VaDE, labelled and unlabelled images")
axes.plot(places, [plain.get(c, np.nan) for c in counts], "s--", label="logistic regression")
axes.set_xticks(places, [str(c) for c in counts])
axes.set_xlabel("labels shown")
axes.set_ylabel("accuracy on test images")
axes.spines[["top", "right"]].set_visible(False)
_ = axes.legend(frameon=False)

# %% [markdown]
# Down to fifty labels the two are close, with the larger gain of the unlabelled images at fifty.  One
# or two labels a class do harm: the mixture starts at their means, and a single row is visited a
# hundred times an epoch, so that no label at all does better than ten.
#
# One seed and one draw of the labels: enough for a picture, not for a claim.  `pyrozoo reproduce`
# runs the stored experiments over seeds.
#
# ## Classes that nobody has labelled
#
# Now the labels cover the digits 0 to 6 only.  Three values of `y` are left over, and what does not
# look like a known digit goes there.

# %%
known_digits = train.y < 7
labels, kept = datasets.hide_labels(train.y[known_digits], 70, seed=0)
shown = torch.zeros(len(train), dtype=torch.bool)
shown[known_digits.nonzero().squeeze(-1)[kept]] = True
open_set = vade({"x": train.x, "y": (train.y, shown)})
probabilities = open_set.responsibilities({"x": test.x}, seed=0)
for name, value in scoring.open_set(test.y, probabilities, known_classes=7).items():
    print(f"{name.replace('_', ' '):15s} {value:.3f}")

# %%
table = metrics.confusion(test.y, probabilities.argmax(1))
found = np.unique(probabilities.argmax(1))
figure, axes = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
axes.imshow(table, cmap="Blues")
for i, j in zip(*table.nonzero(), strict=True):
    axes.text(j, i, table[i, j], ha="center", va="center", fontsize=8,
              color="white" if table[i, j] > 18 else "black")  # fmt: skip
axes.set_xticks(
    range(len(found)), [str(k) if k < 7 else f"new {k - 6}" for k in found], rotation=60
)
axes.set_yticks(range(10))
axes.set_xlabel("most probable value of y")
_ = axes.set_ylabel("digit (7, 8, 9 have no label)")
