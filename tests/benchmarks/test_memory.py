"""The benchmark runs, at a tiny size; nothing is asserted of its times."""

import memory
import pytest


@pytest.mark.parametrize("kind", memory.FORMATS)
def test_a_file_is_written_and_fitted(tmp_path, kind):
    path = tmp_path / f"rows{memory.ENDS.get(kind, '.' + kind)}"
    memory.write(path, kind, 600)
    found = memory.measure(path, kind, steps=2)
    assert found["rows"] == 600
    assert found["MiB peak"] >= found["MiB before"] > 0


def test_the_table_is_printed(tmp_path, capsys):
    (record,) = memory.main(400, 2, ["npy"], tmp_path)
    assert record["format"] == "npy"
    assert "npy" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
