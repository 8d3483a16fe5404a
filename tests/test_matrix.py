"""The matrix methods x guides: made once, gone on with, empty cells with reasons."""

import json
from pathlib import Path

import pytest

from pyrozoo.inference.comparison.measuring import Effort
from pyrozoo.zoo import comparing, matrix

TINY = Effort(20, 10, 0, sbc_datasets=0, reference_rows=0)


def test_matrix_is_resumed_and_says_why_cells_are_empty(tmp_path, monkeypatch):
    options = {"effort": TINY, "epochs": 1, "options": {"hidden": [8]}}
    methods, guides = ["vae", "dec"], ["default", "full", "delta"]
    table = matrix.markdown(matrix.matrix(tmp_path, methods, guides, **options))
    lines = table.splitlines()
    assert lines[0] == "| method | default | full | delta |"
    assert lines[2].startswith("| vae | -")
    assert lines[2].endswith(" | [1] |")
    assert lines[3] == "| dec | [2] | [2] | [2] |"
    assert "[1] the guide proposes 'z' as a point mass, which has no density." in table
    assert "[2] the method makes its targets or centres anew in every epoch" in table
    cell = json.loads((tmp_path / "vae-full.json").read_text())
    assert cell["figures"]["elbo"] <= cell["figures"]["iwae_20"] + 1
    assert len(list(tmp_path.iterdir())) == 6

    def never(*args, **options):
        raise AssertionError("a cell was made again")

    monkeypatch.setattr(comparing, "compare_method", never)
    assert matrix.markdown(matrix.matrix(tmp_path, methods, guides, **options)) == table
    with pytest.raises(AssertionError, match="made again"):
        matrix.matrix(tmp_path, methods, ["student"], **options)


def test_ladder_shows_gaps_and_two_sample_tests(tmp_path):
    effort = Effort(20, 10, 0, sbc_datasets=0, reference_rows=1, reference_draws=40)
    cells = matrix.ladder(
        tmp_path, ["mixture", "logistic"], ["full", "auto_mvn"], epochs=1, effort=effort
    )
    lines = matrix.markdown(cells).splitlines()
    assert lines[0] == "| program | full | auto_mvn |"
    assert lines[2].startswith("| mixture | 0.0000")
    assert lines[2].endswith(" | [1] |")
    gap, told = map(float, lines[3].split("|")[2].split("/"))
    assert gap > 0
    assert 0.3 < told <= 1
    assert "no continuous latent site" in lines[-1]


def test_stored_tables_are_those_of_the_readme():
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    for name in ("matrix", "ladder"):
        assert matrix.markdown(matrix.stored(name)) in text


def test_objectives_and_guides_have_names():
    found = comparing.named_objectives(["elbo", "stl", "iwae:3", "dreg:2", "renyi:0.5:4", "rws:2"])
    assert list(found) == ["ELBO", "STL", "IWAE 3", "DREG 2", "RENYI 0.5 4", "RWS 2"]
    assert [make().num_particles for make in found.values()] == [1, 1, 3, 2, 4, 2]
    assert comparing.named_objectives(["elbo"], 16)["ELBO"]().num_particles == 16
    for text in ("best", "iwae", "iwae:x", "elbo:3", "renyi:3"):
        with pytest.raises(ValueError, match=f"an objective is elbo, .*, got '{text}'"):
            comparing.named_objectives([text])
    with pytest.raises(ValueError, match=r"no guide is called 'fulll' .* did you mean 'full'"):
        comparing.named_guides(["fulll"], {})
