# %% [markdown]
# # Write your own model
#
# Twenty lines of Pyro, no guide, no loss. The model here is of an exam: 400 students, 24 questions with four
# answers each. Some students know things, some guess. Nobody tells us who.

# %%
import os

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

from pyrozoo.guides import Amortized
from pyrozoo.inference import Batch, fit, to_arviz

SMOKE = "SMOKE" in os.environ  # a short run, for the tests
STUDENTS = 40 if SMOKE else 400


class Exam(torch.nn.Module):
    """Question j is right with probability sigmoid(a_j (z - b_j)), or 1/4 if the student guesses."""

    def forward(self, batch):
        b = pyro.sample(
            "b", dist.Normal(torch.zeros(24), 1.0).to_event(1)
        )  # how hard a question is
        a = pyro.sample("a", dist.LogNormal(torch.zeros(24), 0.5).to_event(1))  # how well it tells
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.7, 0.3])))  # 1: guesses
            z = pyro.sample("z", dist.Normal(0.0, 1.0))  # what the student knows
            knows = a * (z.unsqueeze(-1) - b)
            logits = torch.where(y.unsqueeze(-1) == 0, knows, torch.tensor(1 / 3).log())
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1))


# %% [markdown]
# ## Data
#
# The program generates them: an empty batch of 400 rows is a draw from the prior. A fifth of the answers are then
# lost; they are handed over as a pair `(value, present)`.

# %%
program = Exam()
pyro.set_rng_seed(1)
truth = pyro.poutine.trace(program).get_trace(Batch.of(STUDENTS)).nodes
x, present = truth["x"]["value"], torch.rand(STUDENTS, 24) > 0.2
data = {"x": (x, present)}

# %% [markdown]
# ## A guide
#
# `Amortized` reads the program's graph and inverts it. `print` says what it made of it, and why.

# %%
guide = Amortized(program)
print(guide.factorisation)

# %% [markdown]
# `y` is not in it: a finite site that nobody proposes is summed exactly.

# %% [markdown]
# ## A fit

# %%
result = fit(
    program, guide, data, epochs=2 if SMOKE else 1000, batch_size=STUDENTS, lr=1e-2,
    lr_schedule="cosine", progress=False,
)  # fmt: skip
print(*result.sites, sep="\n")

# %% [markdown]
# ## Is it right?
#
# We know the truth, so we can look.

# %%
draws = result.posterior(data, num_samples=200, batch_size=STUDENTS, seed=0)
guesses = result.responsibilities(data, "y", seed=0)[:, 1]

fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
for ax, site, title in zip(axes, ("b", "z"), ("difficulty", "ability"), strict=False):
    ax.errorbar(
        truth[site]["value"],
        draws[site].mean(0),
        yerr=1.64 * draws[site].std(0),
        fmt="o",
        ms=3,
        lw=0.6,
        alpha=0.5,
    )
    ax.axline((0, 0), slope=1, color="grey", lw=0.8)
    ax.set(xlabel=f"true {title}", ylabel="posterior mean, 90 %", title=title)
for value, name in ((0, "knows"), (1, "guesses")):
    axes[2].hist(
        guesses[truth["y"]["value"] == value], bins=20, range=(0, 1), alpha=0.6, label=name
    )
axes[2].set(xlabel="probability that a student guesses", ylabel="students", title="who guesses")
_ = axes[2].legend(frameon=False)

# %%
right = ((guesses > 0.5) == (truth["y"]["value"] == 1)).float().mean()
print(
    f"guessers told from others: {right:.1%} right; always 'knows' would be {1 - truth['y']['value'].float().mean():.1%}"
)

# %%
inside = {
    site: ((truth[site]["value"] - draws[site].mean(0)).abs() < 1.64 * draws[site].std(0)).float()
    for site in ("b", "z")
}
for site, title in (("b", "difficulties"), ("z", "abilities")):
    print(f"{title} inside their 90 % interval: {inside[site].mean():.0%}")

# %% [markdown]
# Of a student who guesses nothing is learnt of the ability: it stays where the prior has it, around zero,
# with a wide interval.  Too few difficulties are inside of theirs.  That is the usual price of a guide that
# proposes what all students share apart from the abilities: it is too sure of it.
#
# ## Can it be trusted?
#
# Pareto k-hat, calibration, gaps against other guides: the notebook `which_guide` does that for any program.
#
# ## Hand it over
#
# ArviZ has the plots and checks that Bayesian statisticians use.  `to_arviz` works with both of its
# generations (below, 0.x, the one for Python 3.11).

# %%
idata = to_arviz(program, guide, data, num_draws=5 if SMOKE else 200, num_particles=50, seed=0)
list(idata.groups())

# %%
_ = az.plot_forest(idata, var_names=["b"], combined=True, figsize=(6, 8), textsize=9)

# %% [markdown]
# Rows are independent given the questions, so leaving one out can be estimated from the draws alone:

# %%
az.loo(idata) if not SMOKE else None
