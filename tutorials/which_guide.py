# %% [markdown]
# # Which guide should I trust?
#
# Start with a program of your own. This one is about ships: two stations on the shore hear a ship and say how far away
# it is; one signal in ten is an echo and says little. Where is the ship?

# %%
import functools
import math
import os

import pyro
import pyro.distributions as dist
import torch

from pyrozoo.guides import Amortized
from pyrozoo.inference import Batch, Effort, compare
from pyrozoo.inference.comparison import pictures

SMOKE = "SMOKE" in os.environ  # a short run, for the tests

STATIONS = torch.tensor([[-0.8, -0.3], [0.8, 0.0]])


class Ships(torch.nn.Module):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.9, 0.1])))  # 1: an echo
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))  # where it is
            far = (z.unsqueeze(-2) - STATIONS).norm(dim=-1)
            noise = torch.where(y == 0, 0.2, 1.0).unsqueeze(-1)
            pyro.sample("x", dist.Normal(far, noise).to_event(1))


# %% [markdown]
# Two distances are two circles, and these cross at two points: the posterior has two modes. A guide that is a Gaussian
# has one. That is easy to say of this program because we know its geometry. What if we did not?

# %% [markdown]
# ## Data, and the truth
#
# 2,000 signals to learn from. For two dimensions the exact posterior can be had on a grid, which is how we shall know
# whether what follows is right; `compare` does not need it.

# %%
program = Ships()
pyro.set_rng_seed(0)
trace = pyro.poutine.trace(program).get_trace(Batch.of(240 if SMOKE else 2200))
x = trace.nodes["x"]["value"]
data, test = {"x": x[:-200]}, {"x": x[-200:]}

line = torch.linspace(-5, 5, 51 if SMOKE else 201)
grid = torch.cartesian_prod(line, line)
far = (grid.unsqueeze(-2) - STATIONS).norm(dim=-1)
prior = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1)
log_joint = torch.stack(
    [
        torch.logsumexp(
            torch.stack(
                [
                    math.log(p) + dist.Normal(far, s).log_prob(row).sum(-1)
                    for p, s in ((0.9, 0.2), (0.1, 1.0))
                ]
            ),
            0,
        )
        + prior
        for row in test["x"]
    ]
)
log_evidence = log_joint.logsumexp(-1) + 2 * math.log(float(line[1] - line[0]))


def posterior(count, seed):
    random = torch.Generator().manual_seed(seed)
    cell = torch.multinomial(log_joint.softmax(-1), count, True, generator=random).T
    jitter = (torch.rand(count, len(cell[0]), 2, generator=random) - 0.5) * (line[1] - line[0])
    return {"z": grid[cell] + jitter}


# %% [markdown]
# ## Three guides
#
# One argument. The echo, `y`, is summed exactly whichever it is.

# %%
families = ["mean_field", "full"] if SMOKE else ["mean_field", "full", "coupling"]
guides = {f: functools.partial(Amortized, given=["x"], hidden=(64, 64), family=f) for f in families}
found = compare(
    program,
    guides,
    data,
    test=test,
    epochs=1 if SMOKE else 150,
    batch_size=250,
    lr=2e-3,
    effort=Effort().quick() if SMOKE else None,
    reference=posterior,
    log_evidence=log_evidence,
    say=print,
)

# %% [markdown]
# ## The table
#
# C2ST is the accuracy of a classifier that tells draws of the guide from draws of the posterior (0.5: it cannot),
# MMD² a distance between the two (0: none), `s to target` the seconds until a guide has reached the least of the best
# bounds.

# %%
found

# %%
for note in found.notes():
    print(note)

# %% [markdown]
# ## The picture
#
# Grey is the posterior of one ship, darker where more of it is; orange are draws of each guide.

# %%
cells = {cell.name: cell for cell in found.cells}
pictures.draws(cells)

# %% [markdown]
# The two Gaussians put their mass between the two places where the ship can be.  The flow finds both.
#
# Does one need the truth to see it?  No: the bounds, k-hat and the calibration below use the program and the guide
# alone.  A bound that rises steeply with the number of draws says that single draws miss most of the mass.

# %%
pictures.bounds(cells)

# %% [markdown]
# k-hat asks of each row whether the guide's tails cover the posterior's.  By this alone the flow would be the worst of
# the three, although it is the closest to the posterior: an echo that could come from anywhere has a wide, thin
# posterior beside a sharp one, and a flow's weights are large there.  And k-hat does not see a second place that no
# draw has visited: a Gaussian that sits on one of two looks fine.  A single measure is not enough.

# %%
pictures.khat(cells)

# %% [markdown]
# Simulation asks another question: if nature were the program, would the guide's intervals hold?  Each line is one
# latent, the two coordinates and the echo; one that leaves the band says no.

# %%
pictures.ranks(cells)

# %% [markdown]
# ## What is lost, and where
#
# If refining each row alone (no network) closes the gap, the network was too small; if it does not, the family is wrong.

# %%
pictures.gaps(cells)

# %% [markdown]
# ## All of it on one page
#
# `found.write("compare.html")` is this notebook for any program; `found.to_latex()` and `found.write_csv(...)` are for
# the paper; `pyrozoo compare ./my.py:Model --data my.csv` does it without a line of Python.
