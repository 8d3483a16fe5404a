"""EnumELBO against stock Pyro, its terms and weights, staging, splitting, minibatches, fall-backs."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from cases import CASES, ROWS, Empty, Globals, GlobalsGuide, Mixture, elbo
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyrozoo.guides import Amortized, Classifier, Sequential
from pyrozoo.inference import Batch, EnumELBO, register
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.semisupervised import M2

INPUTS = ("noise",)
PATTERNS = [(c.name, name) for c in CASES.values() for name, _ in c.patterns()]


pytestmark = pytest.mark.usefixtures("double")


def get(case, pattern="complete", fresh=False):
    case = CASES[case]
    return (*case.pair(fresh), next(d for n, d in case.patterns() if n == pattern))


def stock(objective, p, q, data, particles=1):
    pair = objective.pair(p, q)
    traced = TraceEnum_ELBO(
        num_particles=particles,
        vectorize_particles=particles > 1,
        max_plate_nesting=1,
        strict_enumeration_warning=False,
    )
    batch = Batch.of(data)
    if "y" in batch and "x" not in batch and not any(x.requires_grad for x in _prior(p)):
        return torch.tensor(traced.loss(*pair, batch) / len(batch))  # a constant, which it refuses
    return traced.differentiable_loss(*pair, batch) / len(batch)


def _prior(program):
    return [x for name, x in program.named_parameters() if name == "logits"]


def gradients(loss, *nets):
    parameters = [x for net in nets for x in net.parameters()]
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in parameters]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, parameters, strict=True)]


def close(a, b, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---- against stock Pyro -----------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize(("case", "pattern"), PATTERNS)
def test_sampled_equals_stock_draw_for_draw(case, pattern, particles):
    p, replay, data = get(case, pattern)
    q = replay.guide  # with its own noise
    objective = elbo(particles, kl="sampled", split=False, inputs=INPUTS)
    torch.manual_seed(1)
    mine = objective.differentiable_loss(p, q, data)
    torch.manual_seed(1)
    right = stock(objective, p, q, data, particles)
    close(mine, right)
    for a, b in zip(gradients(mine, p, q), gradients(right, p, q), strict=True):
        close(a, b, 1e-9, 1e-11)
    torch.manual_seed(1)
    assert objective.loss(p, q, data) == mine.item()
    torch.manual_seed(1)
    rows = objective.per_row(p, q, data)
    assert rows.shape == (ROWS,)
    torch.manual_seed(1)
    terms = objective.terms(p, q, data)
    total = sum(t.mean() if t.dim() else t / ROWS for t in terms.values())
    close(-total, mine, 1e-9, 1e-11)
    local = sum(t for t in terms.values() if t.dim())
    close(local, rows, 1e-9, 1e-11)


CLOSED = ["m2", "vade, q(y|x)", "mvae", "factor analysis", "globals", "hierarchy"]


@pytest.mark.parametrize("case", CLOSED)
def test_closed_equals_sampled_in_expectation_with_less_variance(case):
    pattern = {"m2": "some y", "mvae": "some x_a"}.get(case, "complete")
    if case == "vade, q(y|x)":
        pattern = "no y"
    p, replay, data = get(case, pattern)
    draws = {}
    for kl in ("closed", "sampled"):
        objective = elbo(kl=kl, split=False, inputs=INPUTS)
        with torch.no_grad(), pyro.validation_enabled(False):
            if case == "globals":  # whose draw moves all rows together
                module, batch = objective(p, replay.guide), Batch.of(data)
                draws[kl] = torch.stack([module(batch) for _ in range(200)])
            else:
                many = Batch.of(data)[torch.arange(ROWS).repeat(500)]
                rows = objective.per_row(p, replay.guide, many)
                draws[kl] = rows.reshape(500, ROWS).mean(1)
    error = math.sqrt(sum(d.var().item() / len(d) for d in draws.values()))
    assert abs(draws["closed"].mean() - draws["sampled"].mean()) < 4 * error
    if case != "globals":
        assert draws["closed"].std() < draws["sampled"].std()


# ---- terms, weights, free bits ----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["vade", "m2", "mvae", "globals"])
def test_weights_of_one_change_no_bit(case):
    p, q, data = get(case)
    name = {"mvae": "x_a", "globals": "means"}.get(case, "z")
    plain = elbo(inputs=INPUTS)
    for one in (1, 1.0):
        weighted = elbo(inputs=INPUTS, weights={name: one})
        assert weighted.is_bound
        a, b = (e.differentiable_loss(p, q, data) for e in (plain, weighted))
        assert torch.equal(a, b)
        for x, y in zip(gradients(a, p, q), gradients(b, p, q), strict=True):
            assert torch.equal(x, y)
    tensor = elbo(inputs=INPUTS, weights={name: torch.tensor(1.0)})
    assert not tensor.is_bound  # it may be a schedule
    close(tensor.differentiable_loss(p, q, data), plain.differentiable_loss(p, q, data))


@pytest.mark.parametrize("weight", [0.3, torch.tensor(0.3, dtype=torch.float64)])
def test_a_weight_on_z_with_y_summed_is_an_expectation_under_responsibilities(weight):
    p, q, data = get("vade", "no y")
    data = {n: v for n, v in data.items() if n != "y"}
    objective = elbo(weights={"z": weight, "y": 2.0}, inputs=INPUTS)
    assert not objective.is_bound
    x, noise = data["x"], data["noise"]
    normal = q.guide.distribution("z", Batch.of({"x": x})).base_dist
    z = normal.loc + normal.scale * noise[:, :2]
    prior = p.logits.log_softmax(-1)
    density = dist.Normal(p.loc, p.scale).to_event(1).log_prob(z.unsqueeze(1))
    r = (prior + density).softmax(-1)
    term_z = (r * density).sum(-1) - normal.log_prob(z).sum(-1)
    term_y = (r * (prior - r.log())).sum(-1)
    term_x = p.decoder(z).log_prob(x)
    right = -(0.3 * term_z + 2 * term_y + term_x).mean()
    mine = objective.differentiable_loss(p, q, data)
    close(mine, right)
    for a, b in zip(gradients(mine, p, q), gradients(right, p, q), strict=True):
        close(a, b, 1e-9, 1e-11)
    terms = objective.terms(p, q, data)
    close(terms["z"], term_z, 1e-9)
    close(terms["y"], term_y, 1e-9)


def test_weights_of_a_site_that_the_guide_enumerates():
    p, q, data = get("m2", "no y")
    terms = elbo(inputs=INPUTS).terms(p, q, data)
    objective = elbo(weights={"y": 0.5, "z": 3.0}, inputs=INPUTS)
    right = -(0.5 * terms["y"] + 3 * terms["z"] + terms["x"]).mean()
    close(objective.differentiable_loss(p, q, data), right)
    log_q = q.guide.parts[0].distribution(Batch.of({"x": data["x"]})).logits
    entropy = -(log_q.exp() * log_q).sum(-1)
    close(terms["y"], entropy - math.log(4), 1e-9)


def test_schedules_are_tensors_that_are_read_at_every_call():
    p, q, data = get("mvae")
    beta = torch.tensor(0.0)
    objective = elbo(weights={"z": beta}, inputs=INPUTS)
    terms = objective.terms(p, q, data)
    for value in (0.0, 0.4, 1.0):
        beta.fill_(value)
        right = -(terms["x_a"] + terms["x_b"] + value * terms["z"]).mean()
        close(objective.differentiable_loss(p, q, data), right)


def test_free_bits_hold_each_row_at_its_level():
    p, q, data = get("mvae")
    terms = elbo(inputs=INPUTS).terms(p, q, data)
    level = -terms["z"].median().item()
    objective = elbo(free_bits={"z": level}, inputs=INPUTS)
    assert objective.is_bound  # lower than the bound, where it differs
    right = -(terms["x_a"] + terms["x_b"] + terms["z"].clamp(max=-level)).mean()
    close(objective.differentiable_loss(p, q, data), right)
    high = elbo(free_bits={"z": 1e3}, inputs=INPUTS).differentiable_loss(p, q, data)
    close(high, -(terms["x_a"] + terms["x_b"]).mean() + 1e3)


def test_is_bound():
    assert elbo().is_bound
    assert elbo(observed_guide_weights={"y": 0}).is_bound
    assert not elbo(observed_guide_weights={"y": 0.1}).is_bound
    assert not elbo(weights={"z": 0.5}).is_bound
    assert elbo(weights={"z": 1}, num_particles=5, kl="sampled").is_bound


@pytest.mark.parametrize("pattern", ["complete", "some y", "some of all"])
@pytest.mark.parametrize("split", [True, False])
def test_the_classification_term_by_hand(pattern, split):
    p, q, data = get("m2", pattern)
    plain = elbo(split=split, inputs=INPUTS).differentiable_loss(p, q, data)
    objective = elbo(split=split, inputs=INPUTS, observed_guide_weights={"y": 2.5})
    mine = objective.differentiable_loss(p, q, data)
    batch = Batch.of(data)
    log_q = q.guide.parts[0].distribution(batch).log_prob(batch["y"])
    term = torch.where(batch.present("y"), log_q, 0.0).sum() / ROWS
    right = plain - 2.5 * term
    close(mine, right)
    for a, b in zip(gradients(mine, p, q), gradients(right, p, q), strict=True):
        close(a, b, 1e-9, 1e-11)
    rows = objective.per_row(p, q, data)  # is the bound without it
    close(-rows.mean(), plain)


def test_without_the_term_the_classifier_is_not_trained_by_labels():
    p, q, data = get("m2", "complete")
    loss = elbo(inputs=INPUTS).differentiable_loss(p, q, data)
    for g in gradients(loss, q.guide.parts[0]):
        assert not g.any()


# ---- exact programs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [n for n, _ in CASES["mixture"].patterns()])
def test_an_all_discrete_program_with_an_empty_guide_is_the_exact_evidence(pattern):
    p, q, data = get("mixture", pattern)
    rows = elbo(inputs=INPUTS).per_row(p, q, data)
    close(rows, p.evidence(Batch.of(data)))


def test_a_single_class():
    for program in (VaDE(6, 1, 2, (8,)), M2(6, 1, 3, (8,))):
        guide = Amortized(program, ["x"], (8,))
        x = torch.rand(ROWS, 6)
        objective = elbo(kl="sampled")
        torch.manual_seed(1)
        mine = objective.differentiable_loss(program, guide, {"x": x})
        torch.manual_seed(1)
        close(mine, stock(objective, program, guide, {"x": x}))
        torch.manual_seed(1)
        labelled = objective.differentiable_loss(
            program, guide, {"x": x, "y": torch.zeros(ROWS, dtype=torch.long)}
        )
        close(mine, labelled)
        assert elbo(weights={"z": 0.5}).loss(program, guide, {"x": x})
    program = M2(6, 1, 3, (8,))
    parts = [Classifier(program, "y", ["x"], (8,)), Amortized(program, ["x", "y"], (8,))]
    objective = elbo()
    torch.manual_seed(1)
    unknown = objective.loss(program, Sequential(*parts), {"x": x})
    torch.manual_seed(1)
    known = objective.loss(
        program, Sequential(*parts), {"x": x, "y": torch.zeros(ROWS, dtype=torch.long)}
    )
    assert unknown == pytest.approx(known, rel=1e-12)


class Sensors(nn.Module):
    """y ~ Categorical; s_j | y ~ Categorical and x_j | s_j ~ Normal for each of three sensors."""

    def __init__(self):
        super().__init__()
        self.y = nn.Parameter(torch.randn(2))
        self.s = nn.Parameter(torch.randn(2, 3))
        self.loc = nn.Parameter(torch.randn(3))

    def forward(self, batch):
        rows = pyro.plate("data", len(batch), dim=-1)
        sensors = pyro.plate("sensors", 3, dim=-2)
        with rows:
            y = pyro.sample("y", dist.Categorical(logits=self.y))
        with rows, sensors:
            s = pyro.sample("s", dist.Categorical(logits=self.s[y]))
            pyro.sample("x", dist.Normal(self.loc[s], 1.0))

    def evidence(self, x, known):
        value = dist.Normal(self.loc, 1.0).log_prob(x.unsqueeze(-1))  # rows, sensors, s
        value = torch.where(known.unsqueeze(-1), value, 0.0).unsqueeze(-2)
        value = (value + self.s.log_softmax(-1)).logsumexp(-1)  # rows, sensors, y
        return (value.sum(1) + self.y.log_softmax(-1)).logsumexp(-1)


def test_sums_in_an_inner_plate_are_exact_with_missing_entries():
    p = Sensors()
    x = torch.randn(ROWS, 3)
    known = torch.rand(ROWS, 3) < 0.5
    known[0], known[1] = False, True
    for data, mask in ((x, torch.ones_like(known)), ((x, known), known)):
        right = p.evidence(x, mask)
        rows = elbo().per_row(p, Empty(), {"x": data})
        close(rows, right)
        mine = gradients(rows.sum(), p)
        for a, b in zip(mine, gradients(right.sum(), p), strict=True):
            close(a, b, 1e-9, 1e-11)
        terms = elbo().terms(p, Empty(), {"x": data})
        assert all(t.shape == (ROWS,) for t in terms.values())
        close(sum(terms.values()), right)


class Two(nn.Module):
    """a ~ Categorical, b | a ~ Categorical, and x | b; as a guide, without x and reading it."""

    def __init__(self, of_guide):
        super().__init__()
        self.a = nn.Parameter(torch.randn(2))
        self.b = nn.Parameter(torch.randn(2, 3))
        self.loc = nn.Parameter(torch.randn(3))
        self.of_guide = of_guide

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            logits = self.a * batch["x"].unsqueeze(-1) if self.of_guide else self.a
            a = pyro.sample("a", dist.Categorical(logits=logits))
            b = pyro.sample("b", dist.Categorical(logits=self.b[a]))
            if not self.of_guide:
                pyro.sample("x", dist.Normal(self.loc[b], 1.0))


def test_expectations_over_two_sites_of_the_guide():
    p, q, data = Two(False), Two(True), {"x": torch.randn(ROWS)}
    objective = EnumELBO()
    mine = objective.differentiable_loss(p, q, data)
    close(mine, stock(objective, p, q, data))
    log_q = (q.a * data["x"].unsqueeze(-1)).log_softmax(-1).unsqueeze(-1) + q.b.log_softmax(-1)
    log_p = p.a.log_softmax(-1).unsqueeze(-1) + p.b.log_softmax(-1)
    density = dist.Normal(p.loc, 1.0).log_prob(data["x"].unsqueeze(-1)).unsqueeze(-2)
    right = -(log_q.exp() * (log_p + density - log_q)).sum((-1, -2)).mean()
    close(mine, right)
    for a, b in zip(gradients(mine, p, q), gradients(right, p, q), strict=True):
        close(a, b, 1e-9, 1e-11)


# ---- scales in a program ----------------------------------------------------------------------------


class Scaled(nn.Module):
    """A program, or some sites of it, under ``poutine.scale``."""

    def __init__(self, program, scale, sites=None):
        super().__init__()
        self.program, self.scale, self.sites = program, scale, sites

    def forward(self, batch):
        some = self.sites and _ScaleSites(self.sites, self.scale)
        with some or poutine.scale(scale=self.scale):
            return self.program(batch)


class _ScaleSites(pyro.poutine.messenger.Messenger):
    def __init__(self, sites, scale):
        super().__init__()
        self.sites, self.scale = sites, scale

    def _pyro_sample(self, msg):
        if msg["name"] in self.sites:
            msg["scale"] = self.scale * msg["scale"]


@pytest.mark.parametrize("kl", ["closed", "sampled"])
@pytest.mark.parametrize("case", ["vade", "m2"])
def test_scales_of_whole_programs(case, kl):
    p, q, data = get(case, "some y")
    plain = elbo(kl=kl, inputs=INPUTS, split=False).differentiable_loss(p, q, data)
    objective = elbo(kl=kl, inputs=INPUTS, split=False)
    scaled = objective.differentiable_loss(Scaled(p, 0.25), Scaled(q, 0.25), data)
    close(scaled, 0.25 * plain)
    if kl == "sampled":
        pair = Scaled(p, 0.25), Scaled(q, 0.25)
        close(objective.differentiable_loss(*pair, data), stock(objective, *pair, data))


def test_scales_of_single_sites_are_weights_or_refused():
    p, q, data = get("m2", "no y")
    objective = elbo(kl="sampled", inputs=INPUTS)
    pair = Scaled(p, 3.0, ["x"]), q
    mine = objective.differentiable_loss(*pair, data)
    close(
        mine, elbo(kl="sampled", weights={"x": 3.0}, inputs=INPUTS).differentiable_loss(p, q, data)
    )
    close(mine, stock(objective, *pair, data))
    p, q, data = get("vade", "no y")
    with pytest.raises(ValueError, match=r"one poutine.scale.*weights"):
        objective.loss(Scaled(p, 3.0, ["z"]), q, data)


# ---- global latents and minibatches -----------------------------------------------------------------


@pytest.mark.parametrize("kl", ["closed", "sampled"])
@pytest.mark.parametrize("case", ["globals", "vade", "m2"])
def test_minibatches_average_to_the_full_batch(case, kl):
    p, q, data = get(case, "some y")
    full = elbo(kl=kl, inputs=INPUTS).differentiable_loss(p, q, data)
    batch = Batch.of(data)
    objective = elbo(kl=kl, inputs=INPUTS, num_rows=ROWS)
    parts = [objective.differentiable_loss(p, q, batch[i : i + 3]) for i in range(0, ROWS, 3)]
    mean = torch.stack(parts).mean()
    close(mean, full)
    for a, b in zip(gradients(mean, p, q), gradients(full, p, q), strict=True):
        close(a, b, 1e-9, 1e-11)


def test_rows_are_not_split_where_a_global_latent_is_drawn():
    p, q = Globals(), GlobalsGuide()
    data = {"x": torch.randn(4, 4), "y": (torch.tensor([0, 1, 2, 0]), torch.arange(4) < 2)}
    assert math.isfinite(elbo().loss(p, q, data))
    with pytest.raises(ValueError, match=r"cannot be split.*global"):
        elbo(split=True).loss(p, q, data)


def test_a_row_of_a_program_with_globals_is_conditional_on_one_draw():
    p, q, data = get("globals", "complete")
    rows = elbo(inputs=INPUTS).per_row(p, q, data)
    terms = elbo(inputs=INPUTS).terms(p, q, data)
    assert terms["means"].shape == ()
    close(rows, terms["x"] + terms["y"])


# ---- splitting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("kl", ["closed", "sampled"])
@pytest.mark.parametrize("pattern", ["some y", "some of all"])
@pytest.mark.parametrize("case", ["vade", "vade, q(y|x)", "m2", "m2, y summed"])
def test_splitting_equals_the_masked_pass(case, pattern, kl, particles):
    p, q, data = get(case, pattern)
    found = []
    for split in (True, False):
        options = {"kl": kl, "split": split, "inputs": INPUTS, "num_particles": particles}
        objective = elbo(observed_guide_weights={"y": 0.3} if "q" in case else {}, **options)
        rows = objective.per_row(p, q, data)
        loss = objective.differentiable_loss(p, q, data)
        found.append([rows, loss, *gradients(loss, p, q)])
    if "vade" in case and kl == "closed":  # more closed forms are valid in rows that know y
        unknown = ~Batch.of(data).present("y")
        close(found[0][0][unknown], found[1][0][unknown])
        return
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-10, 1e-12)


def test_known_rows_are_decoded_once():
    p, q, data = get("m2", "some y")
    known = int(Batch.of(data).present("y").sum())
    seen = []
    hook = p.decoder.likelihood.register_forward_hook(
        lambda module, inputs, out: seen.append(math.prod(inputs[0].shape[:-1]))
    )
    elbo(inputs=INPUTS, split=False).loss(p, q, data)  # the first call looks at the graph
    elbo(inputs=INPUTS).loss(p, q, data)
    counts = {}
    for split in (False, True, "auto"):
        objective = elbo(inputs=INPUTS, split=split)
        objective.loss(p, q, data)
        seen.clear()
        objective.loss(p, q, data)
        counts[split] = sum(seen)
    hook.remove()
    assert counts[False] == 4 * ROWS
    assert counts[True] == counts["auto"] == known + 4 * (ROWS - known)


def test_automatic_splitting_leaves_vade_alone():
    p, q, data = get("vade", "some y")
    objective = elbo(inputs=INPUTS)
    observed = objective.pair(p, q)
    plan = observed[0].pairing.plan(Batch.of(data))
    assert objective._split_sites(*observed, plan) == []


def test_rows_of_coupled_layers_are_not_split():
    p, q, data = get("m2", "some y", fresh=True)
    q.guide.parts[0].network = nn.Sequential(nn.BatchNorm1d(6), q.guide.parts[0].network)
    assert elbo(inputs=INPUTS).pair(p, q)
    with pytest.raises(ValueError, match="BatchNorm1d"):
        elbo(inputs=INPUTS, split=True).loss(p, q, data)


# ---- staging ----------------------------------------------------------------------------------------

STAGED = [
    ("vade", "no y"),
    ("vade", "some y"),
    ("m2", "no y"),
    ("m2", "some y"),
    ("m2", "some of all"),
    ("mvae", "complete"),
    ("mvae", "some of all"),
    ("globals", "some y"),
]


@pytest.mark.parametrize(("particles", "weighted"), [(1, False), (2, True)])
@pytest.mark.parametrize(("case", "pattern"), STAGED)
def test_the_loss_can_be_traced_and_reads_new_values_and_masks(case, pattern, particles, weighted):
    case_ = CASES[case]
    p, q, data = get(case, pattern)
    beta = torch.tensor(0.7)
    name = "means" if case == "globals" else "z"
    objective = elbo(
        particles, split=False, inputs=INPUTS, weights={name: beta} if weighted else None
    )
    first = Batch.of(data).to(dtype=torch.float64)
    other = next(d for n, d in case_.patterns(seed=7) if n == pattern)
    new = Batch.of(other).to(dtype=torch.float64)
    leaves, spec = torch.utils._pytree.tree_flatten(first)
    new_leaves, new_spec = torch.utils._pytree.tree_flatten(new)
    assert str(spec) == str(new_spec)

    def loss(beta, *values):
        objective.weights = {name: beta} if weighted else {}
        batch = torch.utils._pytree.tree_unflatten(list(values), spec)
        return objective.differentiable_loss(p, q, batch)

    with pyro.validation_enabled(False):
        loss(beta, *leaves)  # reads the graph, once
        staged = make_fx(loss)(beta, *leaves)
        for weight in (beta, torch.tensor(0.2)):
            right = loss(weight, *new_leaves)
            mine = staged(weight, *new_leaves)
            assert torch.equal(mine, right)
            pairs = (gradients(mine, p, q), gradients(right, p, q))
            for a, b in zip(*pairs, strict=True):
                assert torch.equal(a, b)


# ---- SVI and modules --------------------------------------------------------------------------------


def test_the_module_has_the_parameters_of_both_halves_and_svi_trains_them():
    p, q, data = get("vade", fresh=True)
    objective = elbo(inputs=INPUTS)
    module = objective(p, q)
    assert {id(x) for x in module.parameters()} == {id(x) for n in (p, q) for x in n.parameters()}
    close(module(data), objective.differentiable_loss(p, q, data))
    pyro.clear_param_store()
    pair = objective.pair(p, q)
    svi = SVI(*(register(half) for half in pair), pyro.optim.Adam({"lr": 0.01}), objective)
    losses = [svi.step(data) for _ in range(5)]
    assert losses[-1] < losses[0]
    pyro.clear_param_store()


def test_loss_and_grads_of_a_constant():
    p, q, data = get("m2", "no x")
    assert elbo(inputs=INPUTS).loss_and_grads(p, q, data) == pytest.approx(math.log(4))


# ---- the stock objective where ours does not apply --------------------------------------------------


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.randn(2))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            state = torch.zeros(len(batch), dtype=torch.long)
            for t in pyro.markov(range(3)):
                probs = torch.tensor([[0.9, 0.1], [0.3, 0.7]])[state]
                state = pyro.sample(f"s_{t}", dist.Categorical(probs))
                pyro.sample(f"x_{t}", dist.Normal(self.loc[state], 1.0))


class Sequentially(nn.Module):
    """A guide that runs once for each value of y."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(1, 3))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            pyro.sample(
                "y", dist.Categorical(logits=self.logits), infer={"enumerate": "sequential"}
            )


class GlobalLabel(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.randn(2))

    def forward(self, batch):
        y = pyro.sample("y", dist.Categorical(logits=self.loc.new_zeros(2)))
        with pyro.plate("data", len(batch)):
            pyro.sample("x", dist.Normal(self.loc[y], 1.0))


class Rough(nn.Module):
    """z by a distribution without reparameterised draws."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.Poisson(self.rate.exp()))


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Poisson(torch.tensor(2.0)))
            pyro.sample("x", dist.Normal(z, self.scale.exp()))


FALL_BACK = {
    "markov": (Chain, Empty, {f"x_{t}": torch.tensor([0.1, -1.0, 2.0, 0.3]) for t in range(3)}),
    "one value at a time": (Mixture, Sequentially, {"x": torch.randn(1, 4)}),
    "outside the plate": (GlobalLabel, Empty, {"x": torch.randn(4)}),
    "neither summed nor reparameterised": (Counts, Rough, {"x": torch.randn(4)}),
}


@pytest.mark.parametrize("reason", FALL_BACK)
def test_falls_back_to_stock_and_says_so_once(reason):
    program, guide, data = FALL_BACK[reason]
    p, q = program(), guide()
    objective = EnumELBO()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=f"falling back.*{reason}"):
        mine = objective.differentiable_loss(p, q, data)
    torch.manual_seed(1)
    right = stock(objective, p, q, data)
    close(mine, right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(1)
        assert objective.loss(p, q, data) == pytest.approx(right.item())
        torch.manual_seed(1)
        assert objective.loss_and_grads(p, q, data) == pytest.approx(right.item())
    for call in (objective.per_row, objective.terms):
        with pytest.raises(ValueError, match=reason):
            call(p, q, data)
    for options in (
        {"weights": {"x": 0.5}},
        {"free_bits": {"x": 0.5}},
        {"observed_guide_weights": {"x": 1}},
        {"num_rows": 100},
    ):
        if "markov" in reason:
            options = {k: v if k == "num_rows" else {"x_0": 1.5} for k, v in options.items()}
        with pytest.raises(ValueError, match=reason):
            elbo(**options).loss(p, q, data)


# ---- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"num_particles": 0}, {"kl": "exact"}, {"split": "always"}],
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        elbo(**options)


@pytest.mark.parametrize("option", ["weights", "free_bits", "observed_guide_weights"])
def test_names_of_terms_are_checked(option):
    p, q, data = get("mvae")
    objective = elbo(inputs=INPUTS, **{option: {"x_lefy": 1.0}})
    with pytest.raises(ValueError, match=r"'x_lefy'.*sites: z, x_a, x_b"):
        objective.loss(p, q, data)
    near = elbo(inputs=INPUTS, **{option: {"x_aa": 1.0}})
    with pytest.raises(ValueError, match=r"did you mean 'x_a'"):
        near.loss(p, q, data)


def test_a_weight_of_a_site_that_drops_out_is_no_error():
    p, q, data = get("vade", "no x")
    assert math.isfinite(elbo(inputs=INPUTS, weights={"z": 0.5}).loss(p, q, data))


def test_halves_of_different_pairs():
    p, q, data = get("mvae")
    a, b = EnumELBO(inputs=INPUTS), EnumELBO(inputs=INPUTS)
    with pytest.raises(ValueError, match="one call"):
        a.loss(a.pair(p, q)[0], b.pair(p, q)[1], data)
    with pytest.raises(ValueError, match="only one of them"):
        a.loss(a.pair(p, q)[0], q, data)
    with pytest.raises(ValueError, match="one call"):
        a.loss(*reversed(a.pair(p, q)), data)


def test_a_latent_that_nobody_proposes():
    p, _, data = get("hierarchy")
    with pytest.raises(ValueError, match="'z_2'"):
        elbo(inputs=INPUTS).loss(p, Empty(), data)


def test_pyros_own_guides():
    program = CASES["factor analysis"].pair()[0]
    guide = AutoNormal(poutine.block(program, hide=["x"]))
    objective = EnumELBO()
    loss = objective.loss(program, guide, {"x": torch.randn(ROWS, 5)})
    assert math.isfinite(loss)
    pyro.clear_param_store()


def test_explain_says_how_divergences_are_taken():
    p, q, data = get("hierarchy")
    lines = elbo(inputs=INPUTS).explain(p, q, data)
    assert any("z_1" in line and "closed form" in line for line in lines)
    sampled = elbo(inputs=INPUTS, kl="sampled").explain(p, q, data)
    assert not any("closed form" in line for line in sampled)
