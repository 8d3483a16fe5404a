"""The laws that every program with its guide obeys, whatever is observed."""

import math

import pyro
import pyro.poutine as poutine
import pytest
import torch
from cases import CASES, NOISE, ROWS, Replay, elbo

from pyrozoo.guides import Amortized, Classifier, Sequential
from pyrozoo.inference import Batch
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.semisupervised import M2

INPUTS = ("noise",)
ALL = list(CASES)
PATTERNS = [(c.name, name) for c in CASES.values() for name, _ in c.patterns()]
SPLITS = [False, "auto"]


pytestmark = pytest.mark.usefixtures("double")


def get(case, pattern="complete", fresh=False):
    case = CASES[case]
    return (*case.pair(fresh), next(d for n, d in case.patterns() if n == pattern))


def evaluate(p, q, data, **options):
    """Loss, rows and the gradient of every parameter (zero where the loss does not depend on it)."""
    objective = elbo(inputs=INPUTS, **options)
    rows = objective.per_row(p, q, data)
    loss = objective.differentiable_loss(p, q, data)
    parameters = [x for net in (p, q) for x in net.parameters()]
    grads = [None] * len(parameters)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    grads = [
        torch.zeros_like(x) if g is None else g for g, x in zip(grads, parameters, strict=True)
    ]
    return loss.detach(), rows.detach(), *grads


def same(a, b, exactly=False, rtol=1e-10, atol=1e-12):
    for x, y in zip(a, b, strict=True):
        if exactly:
            assert torch.equal(x, y)
        else:
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


# ---- 1. the prior, and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("case", ALL)
def test_prior_samples_have_the_declared_shapes(case, rows):
    p, _ = CASES[case].pair()
    trace = poutine.trace(p).get_trace(Batch.of(rows))
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and n != "data"}
    for name, width in CASES[case].widths.items():
        expected = (rows, width) if width else (rows,)
        assert sites[name]["value"].shape == expected
    for site in sites.values():
        local = any(f.name == "data" for f in site["cond_indep_stack"])
        assert site["fn"].batch_shape == ((rows,) if local else ())


@pytest.mark.parametrize("case", ALL)
def test_every_parameter_gets_a_finite_gradient(case):
    p, q, data = get(case, fresh=True)
    if CASES[case].labels:
        data["y"] = (data["y"], torch.arange(ROWS) % 2 == 0)
    loss = elbo(inputs=INPUTS, observed_guide_weights={"y": 1.0} if "y" in data else {})
    module = loss(p, q)
    module(data).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# ---- 2. the bound -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["vade", "m2, y summed", "mixture", "globals"])
def test_a_sum_in_the_program_is_the_sum_over_all_values(case):
    p, q, data = get(case)
    values = torch.arange(CASES[case].labels["y"])
    data = {n: v for n, v in data.items() if n != "y"}
    summed = elbo(kl="sampled", inputs=INPUTS).per_row(p, q, data)
    each = [
        elbo(kl="sampled", inputs=INPUTS).per_row(p, q, {**data, "y": k.expand(ROWS)})
        for k in values
    ]
    torch.testing.assert_close(summed, torch.stack(each).logsumexp(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kl", ["closed", "sampled"])
@pytest.mark.parametrize("case", ["vade, q(y|x)", "m2"])
def test_a_sum_in_the_guide_is_the_expectation_over_all_values(case, kl):
    p, q, data = get(case)
    data = {n: v for n, v in data.items() if n != "y"}
    objective = elbo(kl=kl, inputs=INPUTS)
    summed = objective.per_row(p, q, data)
    log_q = q.guide.parts[0].distribution(Batch.of(data)).logits
    each = torch.stack(
        [
            elbo(kl=kl, inputs=INPUTS).per_row(
                p, q, {**data, "y": torch.full((ROWS,), k, dtype=torch.long)}
            )
            for k in range(log_q.shape[1])
        ],
        1,
    )
    right = (log_q.exp() * (each - log_q)).sum(1)
    torch.testing.assert_close(summed, right, rtol=1e-10, atol=1e-12)


def check_below(p, guide, data, evidence, draws=2000, **options):
    """The mean bound of no row lies above its evidence; returns the mean gap."""
    objective = elbo(draws, inputs=INPUTS, **options)
    halves = objective.pair(p, guide)
    batch = halves[0].pairing.prepare(data)
    with torch.no_grad():
        rows = objective._evaluate(*halves, batch, halves[0].pairing.plan(batch)).rows
        mean, error = rows.mean(0), rows.std(0) / math.sqrt(draws)
        gap = evidence - mean
        assert (gap > -4 * error - 1e-9).all()
        total = rows.mean(1)
        assert evidence.mean() - total.mean() > -4 * total.std() / math.sqrt(draws) - 1e-9
    return gap.mean()


@pytest.mark.parametrize("kl", ["closed", "sampled"])
@pytest.mark.parametrize("missing", ["none", "rows", "entries"])
def test_never_above_the_evidence_of_factor_analysis(missing, kl):
    p, q, data = get("factor analysis")
    shape = {"none": None, "rows": (ROWS,), "entries": (ROWS, 5)}[missing]
    if shape:
        data["x"] = (data["x"], torch.rand(shape) < 0.6)
    evidence = p.evidence(Batch.of(data)).detach()
    assert check_below(p, q.guide, data, evidence, kl=kl) > 0


def test_the_exact_posterior_of_factor_analysis_has_no_gap():
    p, _, data = get("factor analysis", fresh=True)
    guide = Amortized(p, ["x"], ()).double()
    weight, noise = p.linear.weight, (2 * p.log_scale).exp()
    precision = torch.eye(2) + weight.T @ (weight / noise.unsqueeze(1))
    basis = torch.linalg.eigh(precision).eigenvectors
    with torch.no_grad():  # rotate z so that its posterior factorises, then set the encoder to it
        p.linear.weight.copy_(weight @ basis)
        precision = torch.eye(2) + p.linear.weight.T @ (p.linear.weight / noise.unsqueeze(1))
        gain = precision.inverse() @ (p.linear.weight / noise.unsqueeze(1)).T
        encoder = guide.networks["z"]
        encoder.loc.weight.copy_(gain)
        encoder.loc.bias.copy_(-gain @ p.linear.bias)
        encoder.raw_scale.weight.zero_()
        encoder.raw_scale.bias.copy_((precision.diagonal().rsqrt() - 1e-4).expm1().log())
    evidence = p.evidence(Batch.of(data))
    rows = elbo(kl="sampled", inputs=INPUTS).per_row(p, guide, data)
    torch.testing.assert_close(rows, evidence, rtol=1e-9, atol=1e-9)  # at every single draw


@pytest.mark.parametrize("pattern", [n for n, _ in CASES["mixture"].patterns()])
def test_a_finite_mixture_is_exact(pattern):
    p, q, data = get("mixture", pattern)
    rows = elbo(inputs=INPUTS).per_row(p, q, data)
    torch.testing.assert_close(rows, p.evidence(Batch.of(data)), rtol=1e-10, atol=1e-12)


def quadrature(log_joint, size=161, limit=8.0):
    """The log of the integral over a plane; ``log_joint`` maps points (n, 2) to (n, rows)."""
    axis = torch.linspace(-limit, limit, size)
    points = torch.cartesian_prod(axis, axis)
    return log_joint(points).logsumexp(0) + 2 * math.log(2 * limit / (size - 1))


@pytest.mark.parametrize("pattern", ["no y", "some y", "complete"])
@pytest.mark.parametrize("make", ["vade", "m2", "m2, q(y|x)"])
def test_never_above_the_evidence_of_a_two_dimensional_latent(make, pattern):
    p = VaDE(6, 3, 2, (8,)) if make == "vade" else M2(6, 3, 2, (8,))
    if make == "m2, q(y|x)":
        q = Sequential(Classifier(p, "y", ["x"], (8,)), Amortized(p, ["x", "y"], (8,)))
    else:
        q = Amortized(p, ["x"], (8,))
    data = next(d for n, d in CASES["vade"].patterns() if n == pattern)
    batch = Batch.of(data)

    def log_joint(z):
        if make == "vade":
            component = torch.distributions.Normal(p.loc, p.scale)
            prior = p.logits.log_softmax(-1) + component.log_prob(z.unsqueeze(1)).sum(-1)
            density = p.decoder(z.unsqueeze(1)).log_prob(batch["x"]).unsqueeze(-1)  # n, rows, 1
            joint = prior.unsqueeze(1) + density
        else:
            prior = -0.5 * (z**2).sum(-1) - math.log(2 * math.pi) - math.log(3)
            given = p.decoder(z.reshape(-1, 1, 1, 2), torch.eye(3)).log_prob(
                batch["x"].unsqueeze(1)
            )
            joint = prior.reshape(-1, 1, 1) + given
        if "y" in batch:
            label = torch.nn.functional.one_hot(batch["y"], 3).bool()
            joint = joint.masked_fill(~(label | ~batch.present("y").unsqueeze(1)), -torch.inf)
        return joint.logsumexp(-1)

    with torch.no_grad():
        evidence = quadrature(log_joint)
    assert check_below(p, q, data, evidence, draws=1000) > 0


# ---- 3. ways of saying the same ---------------------------------------------------------------------

LABELLED = [c.name for c in CASES.values() if c.labels]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", LABELLED)
def test_fully_labelled_through_the_partial_path(case, split):
    p, q, data = get(case)
    known = Batch.of(data).hide("y", torch.ones(ROWS, dtype=torch.bool))
    assert known.partly("y")
    same(
        evaluate(p, q, known, split=split, kl="sampled"),
        evaluate(p, q, data, kl="sampled"),
    )


@pytest.mark.parametrize("case", ALL)
def test_absent_none_and_all_missing_are_the_same(case):
    names = list(CASES[case].widths)
    for name in names:
        p, q, data = get(case)
        if len(names) == 1:
            continue
        nothing = torch.zeros(ROWS, dtype=torch.bool)
        absent = {n: v for n, v in data.items() if n != name}
        first = evaluate(p, q, absent)
        same(first, evaluate(p, q, {**absent, name: None}), exactly=True)
        same(first, evaluate(p, q, {**data, name: (data[name], nothing)}), exactly=True)
        if CASES[case].globals:  # which have to be paid for in every minibatch
            continue
        hidden = Batch.of(data).hide(name, nothing)  # a minibatch in which nobody knows it
        same(
            evaluate(p, q, absent, kl="sampled", split=False),
            evaluate(p, q, hidden, kl="sampled", split=False),
        )


# ---- 4. fillers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("case", "pattern"), [x for x in PATTERNS if "some" in x[1]])
def test_fillers_change_no_bit(case, pattern, split):
    p, q, data = get(case, pattern)
    first = evaluate(p, q, data, split=split)
    other = dict(data)
    for name, value in data.items():
        if isinstance(value, tuple):
            value, known = value
            junk = torch.full_like(value, 1 if value.dtype == torch.long else 0.123)
            mask = known.reshape(known.shape + (1,) * (value.dim() - known.dim()))
            other[name] = (torch.where(mask, value, junk), known)
    same(first, evaluate(p, q, other, split=split), exactly=True)
    unclean = Batch.of(data).to(dtype=torch.float64)  # past the door, where fillers are zeroed
    for name, value in other.items():
        if isinstance(value, tuple):
            unclean._values[name] = value[0]
    same(first, evaluate(p, q, unclean, split=split), exactly=True)


# ---- 5. rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("case", "pattern"), PATTERNS)
def test_rows_are_exchangeable_and_independent(case, pattern, split):
    p, q, data = get(case, pattern)
    batch = Batch.of(data)
    objective = elbo(inputs=INPUTS, split=split)
    rows = objective.per_row(p, q, batch)
    order = torch.randperm(ROWS)
    permuted = objective.per_row(p, q, batch[order])
    torch.testing.assert_close(permuted, rows[order], rtol=1e-10, atol=1e-12)
    some = torch.tensor([0, 1, 5])
    alone = objective.per_row(p, q, batch[some])
    torch.testing.assert_close(alone, rows[some], rtol=1e-10, atol=1e-12)
    names = CASES[case].widths
    known = torch.stack([batch.present(n) for n in names]).any(0)
    assert not rows[~known].any()
    assert rows[known].all()


@pytest.mark.parametrize("case", [c for c in ALL if not CASES[c].globals])
def test_rows_of_which_nothing_is_known_add_nothing(case):
    p, q, data = get(case)
    first = evaluate(p, q, data, kl="sampled", split=False)
    padded = {}
    for name, value in data.items():
        blank = torch.zeros((3, *value.shape[1:]), dtype=value.dtype)
        if name == "noise":
            padded[name] = torch.cat([value, torch.randn(3, NOISE)])
        else:
            padded[name] = (torch.cat([value, blank]), torch.arange(ROWS + 3) < ROWS)
    loss, rows, *grads = evaluate(p, q, padded, kl="sampled", split=False)
    scale = (ROWS + 3) / ROWS
    same(first, [loss * scale, rows[:ROWS], *(g * scale for g in grads)])
    assert not rows[ROWS:].any()


# ---- 6. minibatches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "pattern"), PATTERNS)
def test_minibatches_average_to_the_full_batch(case, pattern):
    p, q, data = get(case, pattern)
    batch = Batch.of(data)
    full = evaluate(p, q, batch, num_rows=ROWS)
    parts = [evaluate(p, q, batch[i : i + 3], num_rows=ROWS) for i in range(0, ROWS, 3)]
    mean = [torch.stack([part[i] for part in parts]).mean(0) for i in range(len(full)) if i != 1]
    same([x for i, x in enumerate(full) if i != 1], mean, rtol=1e-9)
    assert torch.cat([part[1] for part in parts]).shape == full[1].shape


@pytest.mark.parametrize("case", ALL)
def test_evaluation_leaves_no_trace(case):
    p, q, data = get(case)
    state = {k: v.clone() for k, v in [*p.state_dict().items(), *q.state_dict().items()]}
    elbo(inputs=INPUTS).loss(p, q, data)
    for key, value in [*p.state_dict().items(), *q.state_dict().items()]:
        assert torch.equal(state[key], value)
    assert not pyro.get_param_store().keys()
    assert isinstance(q, Replay)
