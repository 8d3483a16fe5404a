"""MFCVAE: the released loss, the ladder on both sides, and training that brings in facet by facet."""

import itertools

import cases
import pyro.distributions as dist
import pytest
import test_laws
import torch
from cases import Case
from torch import nn

from pyrozoo import zoo
from pyrozoo.guides import Ladder
from pyrozoo.inference import Batch, EnumELBO, fit
from pyrozoo.inference.staging.staged import stage
from pyrozoo.zoo.clustering import MFCVAE
from pyrozoo.zoo.clustering.mfcvae import fade_in, open_gates, start_facets
from pyrozoo.zoo.networks import LadderDecoder

SMALL = {"num_clusters": (3, 4), "latent_dims": (2, 3), "hidden": (8, 9)}


def make():
    program = MFCVAE(6, **SMALL)
    return program, Ladder(program, ["x"], ["z_1", "z_2"], (8, 9), init_scale=0.5)


def moved(program):
    """The same program, with gates and mixtures that are not where they start."""
    program.decoder.set_gate([0.4, 1.0])
    with torch.no_grad():
        for facet in program.facets:
            facet.logits.normal_()
            facet.raw_scale.normal_()
    return program


# ---- the bound --------------------------------------------------------------------------------------


def released_loss(program, guide, x):
    """The five terms of the released code, with q(c_j | x) = p(c_j | z_j) at the one draw."""
    proposals = guide.distributions(Batch.of({"x": x}))
    draws = {name: fn.rsample() for name, fn in proposals.items()}
    bound = program.decoder(*draws.values()).log_prob(x)
    for facet, (name, z) in zip(program.facets, draws.items(), strict=True):
        component = dist.Normal(facet.loc, facet.scale).to_event(1)
        log_z, log_c = component.log_prob(z.unsqueeze(1)), facet.logits.log_softmax(0)
        q = (log_z + log_c).softmax(1)
        bound = bound + (q * log_z).sum(1) + (q * log_c).sum(1)
        bound = bound - proposals[name].log_prob(z) - (q * q.log()).sum(1)
    return -bound.mean()


@pytest.mark.usefixtures("double")
def test_the_released_loss_is_the_exact_sum():
    program, guide = make()
    moved(program)
    x = torch.rand(7, 6)
    parameters = [*program.parameters(), *guide.parameters()]
    found = []
    for loss in (
        lambda: EnumELBO().differentiable_loss(program, guide, {"x": x}),
        lambda: released_loss(program, guide, x),
    ):
        torch.manual_seed(3)
        value = loss()
        found.append([value.detach(), *torch.autograd.grad(value, parameters)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all(g.any() for g in found[0][1:])


def test_the_decoder_runs_once_without_cluster_dimensions():
    program, guide = make()
    seen = []
    program.decoder.register_forward_hook(
        lambda _, z, out: seen.append([tuple(v.shape) for v in z])
    )
    objective = EnumELBO()
    objective.loss(program, guide, {"x": torch.rand(5, 6)})  # reads the graphs
    seen.clear()
    objective.loss(program, guide, {"x": torch.rand(5, 6)})
    assert seen == [[(5, 2), (5, 3)]]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("facet", [1, 2])
def test_a_known_facet_is_its_own_component_and_the_other_stays_summed(facet):
    program, guide = make()
    moved(program)
    x, size = torch.rand(5, 6), SMALL["num_clusters"][facet - 1]
    objective = EnumELBO(kl="sampled")

    def rows(**labels):
        torch.manual_seed(1)
        return objective.per_row(program, guide, {"x": x, **labels})

    site = f"c_{facet}"
    each = torch.stack([rows(**{site: torch.full((5,), k)}) for k in range(size)])
    torch.testing.assert_close(each.logsumexp(0), rows(), rtol=1e-10, atol=1e-12)
    labels, known = torch.arange(5) % size, torch.tensor([1, 0, 1, 0, 1]).bool()
    partly = rows(**{site: (labels, known)})
    expected = torch.where(known, each[labels, torch.arange(5)], rows())
    torch.testing.assert_close(partly, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture
def law(monkeypatch):
    case = Case("mfcvae", make, {"x": 6, "c_1": 0, "c_2": 0}, {"c_1": 3, "c_2": 4})
    monkeypatch.setitem(cases.CASES, "mfcvae", case)
    monkeypatch.setattr(cases, "MADE", dict(cases.MADE))
    return case


PATTERNS = ["complete", "no x", "some x", "no c_1", "some c_1", "no c_2", "some c_2", "some of all"]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_laws_of_rows_fillers_and_minibatches(law, pattern):
    assert pattern in [name for name, _ in law.patterns()]
    test_laws.test_rows_are_exchangeable_and_independent("mfcvae", pattern, "auto")
    test_laws.test_minibatches_average_to_the_full_batch("mfcvae", pattern)
    if "some" in pattern:
        test_laws.test_fillers_change_no_bit("mfcvae", pattern, False)


@pytest.mark.usefixtures("double")
def test_laws_of_the_prior_and_of_what_is_absent(law):
    test_laws.test_prior_samples_have_the_declared_shapes("mfcvae", 4)
    test_laws.test_absent_none_and_all_missing_are_the_same("mfcvae")
    test_laws.test_rows_of_which_nothing_is_known_add_nothing("mfcvae")
    test_laws.test_evaluation_leaves_no_trace("mfcvae")


# ---- the ladder -------------------------------------------------------------------------------------


def test_a_closed_gate_keeps_a_latent_out_of_the_data():
    decoder = LadderDecoder((2, 3), (4, 5), 6)
    a, b, top = torch.randn(7, 2), torch.randn(7, 2), torch.randn(7, 3)
    assert not torch.equal(decoder(a, top).mean, decoder(b, top).mean)
    decoder.set_gate([0.0, 1.0])
    assert torch.equal(decoder(a, top).mean, decoder(b, top).mean)
    decoder(a, top).mean.sum().backward()
    assert not any(p.grad.any() for p in decoder.rungs[0].parameters())
    assert all(p.grad.any() for p in decoder.rungs[1].parameters())


def test_latents_of_any_leading_shape():
    decoder = LadderDecoder((2, 3, 1), (4, 5, 6), 6)
    out = decoder(torch.randn(7, 2), torch.randn(3, 1, 3), torch.randn(7, 1))
    assert (out.batch_shape, out.event_shape) == ((3, 7), (6,))
    with pytest.raises(ValueError, match="expected 3 latents, got 2"):
        decoder(torch.randn(7, 2), torch.randn(7, 3))
    with pytest.raises(ValueError, match="expected 3 gates, got 1"):
        decoder.set_gate([1.0])
    with pytest.raises(ValueError, match="one width of a rung for each latent, got 1 for 2"):
        LadderDecoder((2, 3), (4,), 6)


def test_a_higher_rung_reads_what_the_lower_has_made_of_the_data():
    _, guide = make()
    found = guide.distributions(Batch.of({"x": torch.rand(5, 6)}))
    assert [tuple(fn.event_shape) for fn in found.values()] == [(2,), (3,)]
    torch.testing.assert_close(found["z_2"].stddev, torch.full((5, 3), 0.5))
    trunk = list(guide.trunk.parameters())
    for name, used in (("z_1", 2), ("z_2", 4)):
        grads = torch.autograd.grad(
            found[name].mean.sum(), trunk, retain_graph=True, allow_unused=True
        )
        assert sum(g is not None for g in grads) == used
    alone = guide.distribution("z_1", Batch.of({"x": torch.rand(5, 6)}))
    assert tuple(alone.batch_shape) == (5,)


@pytest.mark.parametrize(
    ("sites", "hidden", "message"),
    [
        (["z_1"], (8, 9), "one width for each of its sites"),
        (["z_1", "z_3"], (8, 9), "'z_3' is not a site of the program"),
        (["c_1", "z_2"], (8, 9), "'c_1' is expected to be a real vector"),
    ],
)
def test_ladders_that_do_not_fit(sites, hidden, message):
    with pytest.raises(ValueError, match=message):
        Ladder(MFCVAE(6, **SMALL), ["x"], sites, hidden)


def test_facets_that_do_not_fit():
    with pytest.raises(ValueError, match="num_clusters has one positive number for each of 2"):
        MFCVAE(6, (3, 3, 3), (2, 2))
    with pytest.raises(ValueError, match="for each of 0 facets"):
        MFCVAE(6, 3, ())
    program = MFCVAE(6, 4, (2, 2, 1), (8,))
    assert [tuple(f.loc.shape) for f in program.facets] == [(4, 2), (4, 2), (4, 1)]


# ---- training, facet by facet -----------------------------------------------------------------------


def test_facets_come_in_one_after_the_other():
    weights = fade_in(3, 10.0)
    program = MFCVAE(6, 2, (1, 1, 1), (4,))
    assert set(weights) == {"c_1", "z_1", "c_2", "z_2"}
    for epoch, right in ((0, (0.0, 0.1)), (9, (0.0, 1.0)), (14, (0.5, 1.0)), (30, (1.0, 1.0))):
        open_gates(program, weights, epoch)
        torch.testing.assert_close(program.decoder.gate, torch.tensor([*right, 1.0]))
    assert fade_in(1, 10.0) == {}


def test_the_start_trains_the_top_path_alone_and_puts_mixtures_on_codes():
    program, guide = make()
    x = torch.rand(60, 6)
    nets = nn.ModuleDict({"p": program, "q": guide})
    before = {n: v.clone() for n, v in nets.named_parameters()}
    start_facets(program, guide, Batch.of({"x": x}), epochs=3, batch_size=20)
    assert program.decoder.gate.tolist() == [0.0, 1.0]
    changed = {n for n, v in nets.named_parameters() if not torch.equal(v, before[n])}
    apart = [n for n in before if n not in changed]
    lower = ("p.facets.0.logits", "p.facets.0.raw", "p.decoder.rungs.0", "q.heads.z_1")
    assert apart
    assert [n for n in apart if not n.startswith(lower)] == []
    torch.testing.assert_close(program.facets[0].scale, torch.full((3, 2), 0.1))
    assert program.facets[0].logits.eq(0).all()
    assert "q.trunk.0.first.weight" in changed


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_a_start_from_the_graph_of_the_top_facet(covariance):
    torch.manual_seed(1)
    program = MFCVAE(6, (3, 2), (2, 3), (8, 9), likelihood="normal", covariance=covariance)
    guide = Ladder(program, ["x"], ["z_1", "z_2"], (8, 9), init_scale=0.5)
    which = torch.arange(120) % 2
    x = torch.randn(120, 6) * 0.2 + 3 * which.unsqueeze(-1)
    data, below = Batch.of({"x": x}), program.facets[0].loc.clone()
    start_facets(program, guide, data, epochs=30, batch_size=20, lr=0.01, clusters="neighbours")
    assert program.decoder.gate.tolist() == [0.0, 1.0]
    assert not torch.equal(program.facets[0].loc, below)  # on the codes of the lower facet
    guide.eval()
    codes, top = guide.distribution("z_2", data).mean, program.facets[1]
    found = dist.Categorical(logits=top.logits).probs
    torch.testing.assert_close(found, torch.full((2,), 0.5))
    means = torch.stack([codes[which == k].mean(0) for k in (0, 1)])
    order = [int((top.loc - mean).norm(dim=1).argmin()) for mean in means]
    assert sorted(order) == [0, 1]
    torch.testing.assert_close(top.loc[order], means, rtol=1e-3, atol=1e-4)
    spread = torch.stack([codes[which == k].T.cov(correction=0) for k in (0, 1)])
    scale = top.scale[order]
    if covariance == "full":
        torch.testing.assert_close(scale @ scale.mT, spread, rtol=1e-2, atol=1e-4)
    else:
        torch.testing.assert_close(scale**2, spread.diagonal(dim1=1, dim2=2), rtol=1e-2, atol=1e-4)
    with pytest.raises(ValueError, match="clusters is 'mixture' or 'neighbours', got 'graph'"):
        start_facets(program, guide, data, epochs=1, clusters="graph")


def test_known_clusters_start_at_their_codes():
    program, guide = make()
    x = torch.cat([0.2 * torch.rand(30, 6), 0.8 + 0.2 * torch.rand(30, 6)])
    labels = torch.arange(60) // 30
    known = torch.arange(60) % 3 == 0
    data = Batch.of({"x": x, "c_2": (labels * 3, known)})
    guide.eval()
    codes = guide.distribution("z_2", data).mean
    start_facets(program, guide, data, epochs=1, lr=1e-12)
    for k, name in ((0, 0), (1, 3)):
        right = codes[known & (labels == k)].mean(0)
        torch.testing.assert_close(program.facets[1].loc[name], right, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"'c_1' takes values in 0\.\.2, but 30 of 60"):
        start_facets(program, guide, Batch.of({"x": x, "c_1": labels * 3}), epochs=1)


@pytest.mark.usefixtures("double")
def test_a_staged_loss_sees_the_gate_move():
    program, guide = make()
    moved(program)
    data = {"x": torch.rand(8, 6)}
    objective = EnumELBO(weights={"c_1": torch.tensor(0.3), "z_1": torch.tensor(0.3)})
    staged = stage(objective, program, guide, data, compile=False)
    assert (staged.how, staged.reason) == ("graph", "")
    losses = []
    for gate in (0.0, 0.5, 1.0):
        program.decoder.set_gate([gate, 1.0])
        objective.weights["c_1"].fill_(gate)
        objective.weights["z_1"].fill_(gate)
        torch.manual_seed(5)
        loss = staged(data)
        grads = [x.grad for x in staged.module.parameters()]
        torch.manual_seed(5)
        eager = objective.differentiable_loss(program, guide, data)
        expected = torch.autograd.grad(eager, list(staged.module.parameters()), allow_unused=True)
        torch.testing.assert_close(loss, eager.detach(), rtol=1e-10, atol=1e-12)
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
        losses.append(float(loss))
    assert len(set(losses)) == 3
    assert (staged.graphs, staged.eager_calls) == (1, 0)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    x = torch.rand(64, 6)

    def run(folder, epochs, **options):
        model = zoo.create("mfcvae", {"x": x}, fade=4.0, **SMALL)
        return model.fit(
            {"x": x}, epochs=epochs, batch_size=16, progress=False, device="cpu",
            start={"epochs": 2, "batch_size": 16}, folder=folder, **options,
        )  # fmt: skip

    whole = run(tmp_path / "a", 5)
    run(tmp_path / "b", 2)
    again = run(tmp_path / "b", 5, resume=True)
    assert again.program.decoder.gate.tolist() == [1.0, 1.0]
    for name, value in whole.parameters.items():
        assert torch.equal(value, again.parameters[name]), name
    losses = [[record["loss"] for record in r.history] for r in (whole, again)]
    assert losses[0] == losses[1]


def test_callbacks_of_the_caller_come_after_those_of_the_method():
    x = torch.rand(32, 6)
    model = zoo.create("mfcvae", {"x": x}, fade=2.0, **SMALL)
    seen = []
    model.fit(
        {"x": x}, epochs=3, progress=False, device="cpu", start={"epochs": 1},
        callbacks=[lambda r: seen.append(r.program.decoder.gate[0].item())],
    )  # fmt: skip
    assert seen == [1.0, 1.0, 1.0]


def test_without_a_start_all_facets_are_trained_at_once():
    program, guide = make()
    result = fit(program, guide, {"x": torch.rand(32, 6)}, epochs=1, progress=False, device="cpu")
    assert result.objective.is_bound
    assert program.decoder.gate.tolist() == [1.0, 1.0]
    pairs = itertools.product(("c", "z"), (1, 2))
    assert all(f"{site}_{j}" in result.history[-1] for site, j in pairs)
