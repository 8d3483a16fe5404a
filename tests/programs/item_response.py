"""Item response theory with two parameters an item.

    difficulty_j ~ N(0, 1),  discrimination_j ~ LogNormal(0, 0.5)
    ability_i ~ N(0, 1)
    answer_ij ~ Bernoulli(sigmoid(discrimination_j (ability_i - difficulty_j)))

Some answers are missing.

Source: Allan Birnbaum, "Some latent trait models and their use in inferring an examinee's ability"
(1968).
"""

import pyro
import pyro.distributions as dist
import torch

ITEMS = 12


def program(batch):
    items = pyro.plate("items", ITEMS, dim=-2)
    persons = pyro.plate("data", len(batch), dim=-1)
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
        discrimination = pyro.sample("discrimination", dist.LogNormal(0.0, 0.5))
    with persons:
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with items, persons:
        logits = discrimination * (ability - difficulty)
        pyro.sample("answer", dist.Bernoulli(logits=logits))


def simulate(rows, seed, missing=0.2):
    g = torch.Generator().manual_seed(seed)
    difficulty = torch.linspace(-1.5, 1.5, ITEMS)
    discrimination = torch.tensor([0.8, 2.0] * (ITEMS // 2))
    ability = torch.randn(rows, generator=g)
    logits = discrimination * (ability.unsqueeze(-1) - difficulty)
    answer = (torch.rand(rows, ITEMS, generator=g) < logits.sigmoid()).float()
    present = torch.rand(rows, ITEMS, generator=g) > missing
    truth = {"difficulty": difficulty, "discrimination": discrimination, "ability": ability}
    return {"answer": (answer, present)}, truth
