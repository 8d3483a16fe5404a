"""One thread, so that numbers repeat and small networks are fast; no state from test to test."""

import pyro
import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests that fork come first: after a graph was traced, no child can compute gradients."""
    items.sort(key=lambda item: item.path.name != "test_survival.py")


@pytest.fixture
def double():
    """Float64 throughout, from one seed."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_collectstart(collector):
    """What a module draws while it is imported does not depend on the modules before it."""
    if isinstance(collector, pytest.Module):
        pyro.set_rng_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _seed_module():
    pyro.set_rng_seed(0)


@pytest.fixture(autouse=True)
def _clean():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    assert torch.get_default_dtype() == torch.float32
