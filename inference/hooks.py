"""What is relied on of Pyro and torch beyond their documented interfaces, in one place.

Every line has a test of its name in ``tests/test_private_hooks.py``, so that a release that changes
one of them fails there, with this text, before anything else gets to be wrong.
"""

from __future__ import annotations

HOOKS = {
    "enumerate_dim": "EnumMessenger writes infer['_enumerate_dim'], the dim of an enumerated site,"
    " counted from first_available_dim to the left",
    "enumerate_support_shape": "enumerated values have 1 + batch + event dims, batch dims of size"
    " one unless they differ, and are moved to _enumerate_dim as they are",
    "enum_total": "sequential enumeration writes infer['_enum_total']",
    "replay_infer": "replay gives the program's site the infer dictionary of the guide's site, and"
    " leaves observed sites alone",
    "deterministic": "pyro.deterministic is an observed sample with infer['_deterministic']",
    "factor": "pyro.factor is an observed sample of distributions.Unit",
    "markov_depth": "sites in pyro.markov have infer['_markov_depth']",
    "subsample": "site_is_subsample recognises the site of a plate itself",
    "plates": "cond_indep_stack lists the outermost plate first; frames have name, dim, size and"
    " vectorized; plates have broadcast fn when a handler around the program sees it",
    "handler_order": "_pyro_sample runs from the innermost handler outwards, _pyro_post_sample from"
    " the outermost inwards; a trace keeps the same fn object",
    "own_value": "a message observed by obs= or condition is free again with is_observed and done"
    " False and value None",
    "handler_partial": "a handler applied to a module is a functools.partial that holds the module",
    "provenance": "provenance tensors: track, get and detach; they follow every torch function",
    "rebuilt": "Pyro rebuilds enumerated distributions as type(fn)(logits=...)",
    "base_dist": "masked, expanded and independent distributions hold base_dist; Independent has"
    " reinterpreted_batch_ndims",
    "validate_args": "a distribution made with validate_args=False has _validate_args False",
    "particles": "vectorised particles are a plate num_particles_vectorized left of all others",
    "pytree": "torch.utils._pytree has register_pytree_node, tree_flatten, tree_unflatten and"
    " tree_map",
}
