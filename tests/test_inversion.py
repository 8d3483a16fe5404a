"""The inverse of a graph: what it claims is true of the posterior, and nothing is lost."""

import itertools
import random

import networkx
import pyro.distributions as dist
import pytest
import torch

from pyrozoo.guides.inversion import Factorisation, invert
from pyrozoo.inference.graph import Graph, Site

NORMAL = dist.Normal(torch.zeros(1), 1.0).to_event(1)
FINITE = dist.Categorical(torch.ones(3))


def site(name, parents=(), fn=NORMAL, plates=("data",), kind="sample"):
    dims = {p: -1 - i for i, p in enumerate(plates)}
    return Site(
        name, fn, dims, dict.fromkeys(dims, 2), frozenset(parents), kind, {}, 1.0, torch.float64
    )


def graph(**parents):
    """Sites by name; a tuple of parents, or a site."""
    made = {n: p if isinstance(p, Site) else site(n, p) for n, p in parents.items()}
    return Graph(made)


def parents(g, given, proposed, structure="inverse"):
    return invert(g, given, proposed, structure).parents


# ---- shapes that can be checked by eye ---------------------------------------------------------------


def test_a_hierarchy_is_inverted_from_the_bottom_up():
    g = graph(z_2=(), z_1=["z_2"], x=["z_1"])
    found = invert(g, ["x"], ["z_1", "z_2"])
    assert found.order == ("z_1", "z_2")
    assert found.parents == {"z_1": ("x",), "z_2": ("z_1",)}
    assert str(found).splitlines()[0] == "q(z_1 | x) q(z_2 | z_1)"
    assert "z_2: reads z_1 (z_1 depends on z_2)" in str(found)


def test_explaining_away_joins_the_causes():
    g = graph(a=(), b=(), x=["a", "b"])
    assert parents(g, ["x"], ["a", "b"]) == {"b": ("x",), "a": ("x", "b")}
    assert parents(g, ["x"], ["a", "b"], "independent") == {"a": ("x",), "b": ("x",)}
    assert parents(g, ["x"], ["a", "b"], "topological") == {"a": ("x",), "b": ("x",)}


def test_topological_reads_what_lies_above():
    g = graph(z_2=(), z_1=["z_2"], x=["z_1"])
    found = parents(g, ["x"], ["z_1", "z_2"], "topological")
    assert found == {"z_2": ("x",), "z_1": ("x", "z_2")}


def test_what_is_summed_joins_its_neighbours():
    g = graph(y=site("y", fn=FINITE), z=["y"], w=["y"], x=["z"], t=["w"])
    found = invert(g, ["x", "t"], ["z", "w"])
    assert found.parents == {"w": ("x", "t"), "z": ("x", "w")}
    assert found.notes["y"] == "summed; joins z, w"
    assert found.reads["z"]["w"].why == "joined as y is summed"
    known = parents(g, ["x", "t", "y"], ["z", "w"])  # y may be missing: the link stays
    assert known == {"w": ("x", "t", "y"), "z": ("x", "y", "w")}


def test_a_label_that_may_be_missing_does_not_hide_what_is_behind_it():
    g = graph(z=(), y=site("y", ["z"], FINITE), x=["y"])
    assert parents(g, ["x", "y"], ["z"]) == {"z": ("x", "y")}


def test_barren_sites_and_points_leave_no_trace():
    point = site("d", ["z"], dist.Delta(torch.zeros(1), event_dim=1))
    g = graph(z=(), d=point, a=["d"], b=["d"], c=["a", "b", "z"], v=["z"])
    found = invert(g, ["a", "b"], ["z"])
    assert found.parents == {"z": ("a", "b")}
    assert found.reads["z"]["a"].why == "a depends on z"
    assert not found.notes


def test_a_factor_joins_what_it_reads():
    g = graph(a=(), b=(), x=["a"], t=["b"], f=site("f", ["a", "b"], kind="factor"))
    assert parents(g, ["x", "t"], ["a", "b"]) == {"b": ("x", "t"), "a": ("x", "b")}


def test_globals_are_drawn_first_and_read_no_data():
    mu, tau = site("mu", plates=()), site("tau", plates=())
    g = graph(mu=mu, tau=tau, z=["mu", "tau"], x=["z"])
    found = invert(g, ["x"], ["mu", "tau", "z"])
    assert found.parents == {"tau": (), "mu": ("tau",), "z": ("x", "mu", "tau")}
    few = found.without(["mu", "tau"], "too wide")
    assert few.parents == {"tau": (), "mu": (), "z": ("x",)}
    assert "mu: " in str(few)
    assert "too wide" in str(few)


def test_an_outer_site_is_drawn_before_the_inner_ones_and_reads_all_their_data():
    inner = ("data", "words")
    g = graph(theta=(), z=site("z", ["theta"], plates=inner), x=site("x", ["z"], plates=inner))
    found = invert(g, ["x"], ["theta", "z"])
    assert found.parents == {"theta": ("x",), "z": ("x", "theta")}
    assert found.reads["theta"]["x"].across == {"words"}
    assert not found.reads["z"]["x"].across
    assert "all entries of plate words" in str(found)


def test_entries_that_are_coupled_read_each_other_pooled():
    inner = ("data", "words")
    y = site("y", fn=FINITE)
    g = graph(y=y, z=site("z", ["y"], plates=inner), x=site("x", ["z"], plates=inner))
    assert invert(g, ["x"], ["z"]).reads["z"]["x"].across == {"words"}


def test_a_given_site_that_is_proposed_too_is_drawn_first_and_reads_itself():
    g = graph(a=(), v=(), x=["a", "v"])
    assert parents(g, ["x", "v"], ["a", "v"]) == {"v": ("x", "v"), "a": ("x", "v")}


def test_a_chain_is_inverted_into_a_chain():
    sites = {}
    steps = 60
    for t in range(steps):
        sites[f"z_{t}"] = [f"z_{t - 1}"] if t else ()
        sites[f"x_{t}"] = [f"z_{t}"]
    latent, given = [f"z_{t}" for t in range(steps)], [f"x_{t}" for t in range(steps)]
    found = parents(graph(**sites), given, latent)
    assert list(found) == latent[::-1]
    for t, name in enumerate(latent):
        above = {f"z_{t + 1}"} if t + 1 < steps else set()
        assert set(found[name]) - set(given) == above
        assert set(found[name]) & set(given) == set(given[: t + 1])


def test_wrong_structure():
    with pytest.raises(ValueError, match=r"structure is one of inverse, .*, got 'upside'"):
        invert(graph(z=(), x=["z"]), ["x"], ["z"], "upside")


# ---- random graphs -----------------------------------------------------------------------------------


def random_graph(seed):
    """A linear-Gaussian program: its graph, weights, observed leaves, hidden and proposed sites."""
    random.seed(seed)
    n = random.randint(4, 8)
    names = [f"v{i}" for i in range(n)]
    above = {b: [a for a in names[:i] if random.random() < 0.45] for i, b in enumerate(names)}
    g = graph(**above)
    given = [a for a in names if not g.descendants(a)]
    given = [a for a in given if above[a]]
    latent = [a for a in names if g.descendants(a) & set(given)]
    hidden = [a for a in latent if random.random() < 0.15]
    return g, above, given, [a for a in latent if a not in hidden], names


def covariance(above, names):
    weight = torch.zeros(len(names), len(names), dtype=torch.float64)
    for i, name in enumerate(names):
        for parent in above[name]:
            weight[i, names.index(parent)] = torch.randn((), dtype=torch.float64) + 0.3
    solve = torch.linalg.inv(torch.eye(len(names), dtype=torch.float64) - weight)
    return solve @ solve.mT


def conditional(cov, name, others, names):
    """Weights and variance of one site given others."""
    i, j = names.index(name), [names.index(o) for o in others]
    gain = torch.linalg.solve(cov[j][:, j], cov[j, i]) if j else cov.new_zeros(0)
    return gain, cov[i, i] - (gain @ cov[j, i] if j else 0.0)


def divergence(found: Factorisation, cov, given, names):
    """E_x KL(p(z | x) || q(z | x)) of the best guide that factorises so, in closed form.

    For Gaussians the best factors are the conditionals of the joint distribution, and what is lost
    is a difference of entropies.
    """
    total, before = cov.new_zeros(()), list(given)
    for name in found.order:
        reads = found.parents[name]
        _, mine = conditional(cov, name, reads, names)
        _, full = conditional(cov, name, before, names)
        total += 0.5 * (mine / full).log()
        before.append(name)
    return total


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_lost_in_gaussian_programs(seed):
    torch.manual_seed(seed)
    g, above, given, proposed, names = random_graph(seed)
    cov = covariance(above, names)
    loss = {
        s: divergence(invert(g, given, proposed, s), cov, given, names)
        for s in ("inverse", "topological", "independent")
    }
    assert abs(loss["inverse"]) < 1e-10
    assert loss["topological"] > -1e-10
    assert loss["inverse"] <= loss["topological"] + 1e-10
    assert loss["topological"] <= loss["independent"] + 1e-10


def test_the_naive_order_does_lose():
    g = graph(a=(), b=(), x=["a", "b"])
    cov = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 3.0]], dtype=torch.float64)
    found = invert(g, ["x"], ["a", "b"], "topological")
    lost = divergence(found, cov, ["x"], ["a", "b", "x"])
    torch.testing.assert_close(lost, 0.5 * torch.tensor(4 / 3, dtype=torch.float64).log())


@pytest.mark.parametrize("seed", range(60))
def test_every_independence_holds_in_the_posterior(seed):
    g, above, given, proposed, names = random_graph(seed)
    dag = networkx.DiGraph()
    dag.add_nodes_from(names)
    dag.add_edges_from((p, c) for c in names for p in above[c])
    found = invert(g, given, proposed)
    before = set(given)
    for name in found.order:
        reads = set(found.parents[name])
        assert reads <= before
        if rest := before - reads:
            assert networkx.is_d_separator(dag, {name}, rest, reads)
        for other in reads:  # and it reads nothing in vain
            assert not networkx.is_d_separator(dag, {name}, {other}, reads - {other})
        before.add(name)
    assert set(found.order) == set(proposed)


def test_the_result_does_not_depend_on_hashes():
    g, _, given, proposed, _ = random_graph(3)
    for order in itertools.islice(itertools.permutations(proposed), 6):
        assert invert(g, given, order) == invert(g, given, proposed)
