"""The same bounds written by hand in plain PyTorch: no Pyro, no handlers, the same networks.

Every function returns one value per row for given standard normal noise, ``(rows, latent_dim)``.
"""

import math

import torch
import torch.nn.functional as F

LOG_2PI = math.log(2 * math.pi)


def log_normal(x, loc, scale):
    return (-0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * LOG_2PI).sum(-1)


def kl_to_standard(loc, scale):
    return (0.5 * (loc**2 + scale**2 - 1) - scale.log()).sum(-1)


def log_bernoulli(x, logits):
    return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(
        -1
    )


def encode(encoder, *inputs):
    features = encoder.trunk(*inputs)
    return encoder.loc(features), F.softplus(encoder.raw_scale(features)) + 1e-4


def vade(program, guide, x, noise, y=None):
    """log sum_k p(k) p(z|k) + log p(x|z) - log q(z|x); the term of k = y where y is given."""
    loc, scale = encode(guide.networks["z"], x)
    z = loc + scale * noise
    spread = F.softplus(program.raw_scale) + 1e-4
    joint = program.logits.log_softmax(-1) + log_normal(z.unsqueeze(1), program.loc, spread)
    prior = joint.logsumexp(-1) if y is None else joint.gather(1, y.unsqueeze(1)).squeeze(1)
    return prior + log_bernoulli(x, program.decoder.mlp(z)) - log_normal(z, loc, scale)


def m2_labelled(program, encoder, x, y, noise, closed=True):
    """log p(y) + log p(x|y,z) - KL(q(z|x,y) || p(z)), for y a one-hot ``(*, K)``."""
    loc, scale = encode(encoder, x, y)
    z = loc + scale * noise
    if closed:
        divergence = kl_to_standard(loc, scale)
    else:
        zero = torch.zeros_like(loc)
        divergence = log_normal(z, loc, scale) - log_normal(z, zero, zero + 1)
    return log_bernoulli(x, program.decoder.mlp(z, y)) - divergence - math.log(y.shape[-1])


def m2_unlabelled(program, encoder, classifier, x, noise, closed=True):
    """sum_y q(y|x) [labelled(x, y) - log q(y|x)]."""
    log_q = classifier.mlp(x).log_softmax(-1)
    classes = torch.eye(log_q.shape[-1], dtype=x.dtype).unsqueeze(1)
    values = m2_labelled(program, encoder, x, classes, noise, closed).T
    return (log_q.exp() * (values - log_q)).sum(-1)


def m2(program, guide, x, noise, y=None, known=None, alpha=0.0, closed=True):
    """Each row by the formula that applies to it; alpha log q(y|x) where y is known."""
    classifier, encoder = guide.parts[0].network, guide.parts[1].networks["z"]
    if known is None:
        known = torch.full((len(x),), y is not None)
    value = torch.zeros(len(x), dtype=x.dtype)
    no, yes = (~known).nonzero().squeeze(1), known.nonzero().squeeze(1)
    if len(no):
        rows = m2_unlabelled(program, encoder, classifier, x[no], noise[no], closed)
        value = value.index_add(0, no, rows)
    if len(yes):
        one_hot = F.one_hot(y[yes], program.num_classes).to(x.dtype)
        rows = m2_labelled(program, encoder, x[yes], one_hot, noise[yes], closed)
        if alpha:
            rows = rows + alpha * (classifier.mlp(x[yes]).log_softmax(-1) * one_hot).sum(-1)
        value = value.index_add(0, yes, rows)
    return value


def mvae(program, guide, values, present, noise):
    """sum of the log-likelihoods of what is present, minus KL(product of experts || N(0, I))."""
    precision = torch.ones_like(noise)
    weighted = torch.zeros_like(noise)
    for name, x in values.items():
        loc, scale = encode(guide.experts[name], x)
        share = present[name].unsqueeze(1) / scale**2
        precision, weighted = precision + share, weighted + share * loc
    loc, scale = weighted / precision, precision**-0.5
    z = loc + scale * noise
    total = -kl_to_standard(loc, scale)
    for name, x in values.items():
        total = total + present[name] * log_bernoulli(x, program.decoders[name].mlp(z))
    return total
