"""Every tutorial runs, in its short mode."""

import runpy
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parent.parent / "tutorials").glob("*.py"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial(path, monkeypatch):
    monkeypatch.setenv("SMOKE", "1")
    runpy.run_path(str(path))
