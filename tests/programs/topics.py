"""Latent Dirichlet allocation: every word has a topic, every document a mixture of topics.

    topic_k ~ Dirichlet(0.5)                                 a distribution over the vocabulary
    theta_d ~ Dirichlet(0.5)
    t_dn ~ Categorical(theta_d),  w_dn ~ Categorical(topic_t_dn)

In ``collapsed`` the topics of the words are summed by hand: w_dn ~ Categorical(theta_d topic).

Source: David Blei, Andrew Ng, Michael Jordan, "Latent Dirichlet allocation" (2003).
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex

TOPICS, VOCABULARY, LENGTH = 3, 9, 16


def program(batch):
    with pyro.plate("topics", TOPICS):
        topic = pyro.sample("topic", dist.Dirichlet(0.5 * torch.ones(VOCABULARY)))
    with pyro.plate("data", len(batch)):
        theta = pyro.sample("theta", dist.Dirichlet(0.5 * torch.ones(TOPICS)))
        with pyro.plate("words", LENGTH):
            t = pyro.sample("t", dist.Categorical(theta))
            pyro.sample("w", dist.Categorical(Vindex(topic)[..., t, :]))


def collapsed(batch):
    with pyro.plate("topics", TOPICS):
        topic = pyro.sample("topic", dist.Dirichlet(0.5 * torch.ones(VOCABULARY)))
    with pyro.plate("data", len(batch)):
        theta = pyro.sample("theta", dist.Dirichlet(0.5 * torch.ones(TOPICS)))
        with pyro.plate("words", LENGTH):
            pyro.sample("w", dist.Categorical(theta @ topic))


def simulate(rows, seed):
    g = torch.Generator().manual_seed(seed)
    topic = 0.01 + 0.97 / 3 * torch.eye(TOPICS).repeat_interleave(3, 1)
    topic = topic / topic.sum(-1, keepdim=True)
    gamma = torch._standard_gamma(0.3 * torch.ones(rows, TOPICS), generator=g)
    theta = gamma / gamma.sum(-1, keepdim=True)
    t = torch.multinomial(theta, LENGTH, replacement=True, generator=g)
    w = torch.multinomial(topic[t.flatten()], 1, generator=g).reshape(rows, LENGTH)
    return {"w": w}, {"topic": topic, "theta": theta, "t": t}
