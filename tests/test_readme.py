"""Every Python snippet of the README runs, and its tables are what is stored."""

import re
from pathlib import Path

import pytest

from pyrozoo import inference
from pyrozoo.zoo import reproduction

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def quick(monkeypatch):
    """The fits of the README, one epoch long."""
    real = inference.fit
    from pyrozoo.inference.comparison import compare, measuring
    from pyrozoo.zoo import model
    from pyrozoo.zoo.clustering import pretraining

    little = inference.Effort(50, 2, gap_rows=5, gap_steps=3, sbc_datasets=20, sbc_draws=9)
    monkeypatch.setattr(measuring, "Effort", lambda: little)

    def short(*args, **options):
        return real(*args, **{**options, "epochs": 1, "progress": False, "compile": False})

    for module in (inference, model, pretraining, compare):
        monkeypatch.setattr(module, "fit", short)


def test_snippets_run(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SNIPPETS
    names = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)


def test_the_table_is_what_is_stored():
    shown = re.search(r"<!-- results -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert shown is not None
    assert shown.group(1) == reproduction.markdown(reproduction.stored())
