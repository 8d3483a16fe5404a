"""Every tutorial runs, in its short mode, and its notebook was made from it."""

import runpy
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.py"))
paths = pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)


@paths
def test_tutorial_runs(path, monkeypatch, tmp_path):
    monkeypatch.setenv("SMOKE", "1")
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    runpy.run_path(str(path))
    plt.close("all")


@paths
def test_the_notebook_is_its_text_executed(path):
    """Made by ``jupytext --to notebook --set-kernel python3 --execute tutorials/NAME.py``."""
    source = jupytext.read(path).cells
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4).cells
    assert [(c.cell_type, c.source) for c in notebook] == [(c.cell_type, c.source) for c in source]
    code = [c for c in notebook if c.cell_type == "code"]
    assert all(c.execution_count for c in code)
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for o in outputs)


def test_no_notebook_is_without_a_text():
    assert {p.stem for p in FOLDER.glob("*.ipynb")} == {p.stem for p in TUTORIALS}
