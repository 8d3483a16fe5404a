"""One thread, so that numbers repeat and small networks are fast; no state from test to test."""

import pyro
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    yield
    assert torch.get_default_dtype() == torch.float32
