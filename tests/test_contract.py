"""Variable elimination against brute force over all assignments."""

import itertools

import pytest
import torch

from pyrozoo.inference.bounds.contract import Factor, components, contract, expectations, spread

DATA, INNER, OTHER = -1, -2, -3  # plates; enumerated dims lie to the left
ROWS, SENSORS = 3, 2
K = {-4: 2, -5: 3, -6: 2, -7: 4}


pytestmark = pytest.mark.usefixtures("double")


def factor(name, sums, plates=(DATA,), scale=3.0):
    sizes = {DATA: ROWS, INNER: SENSORS, OTHER: 2}
    shape = [1] * 7
    for dim in plates:
        shape[dim] = sizes[dim]
    for dim in sums:
        shape[dim] = K[dim]
    return Factor(
        name, (scale * torch.randn(shape)).requires_grad_(), frozenset(plates), frozenset(sums)
    )


def brute_force(factors, sites):
    """The log of the sum over all joint assignments, row by row, in plain Python loops."""
    total = []
    for row in range(ROWS):
        places = [  # a variable of its own for every entry of its inner plates
            (dim, sensor)
            for dim, plates in sites.items()
            for sensor in (range(SENSORS) if INNER in plates else [None])
        ]
        terms = []
        for values in itertools.product(*(range(K[dim]) for dim, _ in places)):
            chosen = dict(zip(places, values, strict=True))
            value = 0.0
            for f in factors:
                for sensor in range(SENSORS) if INNER in f.plates else [None]:
                    index = [0] * 7
                    index[DATA] = row if DATA in f.plates else 0
                    index[INNER] = sensor or 0
                    for dim in f.sums:
                        index[dim] = chosen[dim, sensor if INNER in sites[dim] else None]
                    value = value + f.value[tuple(index)]
            terms.append(value)
        total.append(torch.stack(terms).logsumexp(0))
    return torch.stack(total)


def on(*dims, plates=(DATA,)):
    return {dim: frozenset(plates) for dim in dims}


def cases():
    yield "one site", [factor("y", [-4]), factor("x", [-4])], on(-4)
    yield "chain", [factor("a", [-4]), factor("b", [-4, -5]), factor("c", [-5, -6])], on(-4, -5, -6)
    yield (
        "hidden Markov",
        [
            factor("a", [-4]),
            *(factor(f"x{d}", [d]) for d in (-4, -5, -6, -7)),
            *(factor(f"t{d}", [d, d - 1]) for d in (-4, -5, -6)),
        ],
        on(-4, -5, -6, -7),
    )
    yield (
        "tree",
        [factor("root", [-4]), factor("l", [-4, -5]), factor("r", [-4, -6]), factor("x", [-6])],
        on(-4, -5, -6),
    )
    yield (
        "two facets",
        [factor("a", [-4]), factor("b", [-5]), factor("x", [-4, -5]), factor("w", [-5])],
        on(-4, -5),
    )
    yield (
        "loop",
        [factor("ab", [-4, -5]), factor("bc", [-5, -6]), factor("ca", [-4, -6])],
        on(-4, -5, -6),
    )
    inner = (DATA, INNER)
    yield (
        "a site in an inner plate",
        [factor("s", [-4], inner), factor("x", [-4], inner)],
        on(-4, plates=inner),
    )
    yield (
        "a site outside and one inside an inner plate",
        [
            factor("y", [-4]),
            factor("s", [-4, -5], inner),
            factor("x", [-5], inner),
            factor("w", [-4], inner),
            factor("v", [-4]),
        ],
        on(-4) | on(-5, plates=inner),
    )


@pytest.mark.parametrize("name", [name for name, *_ in cases()])
def test_contraction_and_gradient_equal_brute_force(name):
    factors, sites = next((f, s) for n, f, s in cases() if n == name)
    value = contract(factors, sites, frozenset({DATA}))
    right = brute_force(factors, sites)
    assert value.numel() == ROWS
    torch.testing.assert_close(value.reshape(ROWS), right, rtol=1e-12, atol=1e-12)
    leaves = [f.value for f in factors]
    weight = torch.randn(ROWS)
    mine = torch.autograd.grad((value.reshape(ROWS) * weight).sum(), leaves)
    others = torch.autograd.grad((right * weight).sum(), leaves)
    for a, b in zip(mine, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, *_ in cases()])
@pytest.mark.parametrize("grad", [True, False])
def test_expectations_are_the_exact_marginals(name, grad):
    factors, sites = next((f, s) for n, f, s in cases() if n == name)
    right = torch.autograd.grad(brute_force(factors, sites).sum(), [f.value for f in factors])
    with torch.set_grad_enabled(grad):
        total, weights = expectations(factors, sites, frozenset({DATA}))
    torch.testing.assert_close(total, contract(factors, sites, frozenset({DATA})))
    for f, weight, marginal in zip(factors, weights, right, strict=True):
        torch.testing.assert_close(weight.reshape(marginal.shape), marginal)
        assert weight.min() >= 0
        over = weight.sum(sorted(f.sums))
        torch.testing.assert_close(over, torch.ones_like(over))
        assert weight.requires_grad == grad


def test_expectations_can_be_differentiated_again():
    prior, density = factor("y", [-4]), factor("x", [-4])

    def entropy(a, b):
        fs = [
            Factor("y", a, prior.plates, prior.sums),
            Factor("x", b, density.plates, density.sums),
        ]
        _, (r, _) = expectations(fs, on(-4), frozenset({DATA}))
        return -(r * r.log()).sum()

    assert torch.autograd.gradcheck(entropy, (prior.value, density.value))


def test_expectations_do_not_mix_factors_that_share_a_tensor():
    shared = factor("y", [-4])
    twice = [shared, Factor("x", shared.value, shared.plates, shared.sums)]
    _, weights = expectations(twice, on(-4), frozenset({DATA}))
    right = (2 * shared.value).softmax(-4)
    for weight in weights:
        torch.testing.assert_close(weight, right)


def test_a_factor_of_all_rows_has_a_weight_in_each():
    prior = Factor("y", torch.randn(2, 1, 1, 1), frozenset({DATA}), frozenset({-4}))
    density = factor("x", [-4])
    _, weights = expectations([prior, density], on(-4), frozenset({DATA}))
    torch.testing.assert_close(weights[0].reshape(2, ROWS), weights[1].reshape(2, ROWS))


def test_components_are_connected_through_sums():
    factors = [factor("a", [-4]), factor("b", [-5]), factor("ab", [-4, -5]), factor("c", [-6])]
    groups = components(factors)
    assert sorted(sorted(f.name for f in g) for g in groups) == [["a", "ab", "b"], ["c"]]


def test_sites_of_plates_that_cross_are_refused():
    factors = [
        factor("a", [-4], (DATA, INNER)),
        factor("b", [-5], (DATA, OTHER)),
        factor("x", [-4, -5], (DATA, INNER, OTHER)),
    ]
    sites = {-4: frozenset({DATA, INNER}), -5: frozenset({DATA, OTHER})}
    with pytest.raises(NotImplementedError, match="cross"):
        contract(factors, sites, frozenset({DATA}))


def test_weights_of_zero_silence_infinite_values_and_their_gradients():
    value = torch.tensor([1.0, -torch.inf, 2.0], requires_grad=True)
    weight = torch.tensor([0.5, 0.0, 0.5], requires_grad=True)
    out = spread(value, weight).sum()
    assert out.item() == 1.5
    for gradient in torch.autograd.grad(out, (value, weight)):
        assert gradient.isfinite().all()
