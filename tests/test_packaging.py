"""The wheel holds every module under the name pyrozoo, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("zoo", "guides", "inference")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    subprocess.run(
        [
            sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target),
            str(source),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return zipfile.ZipFile(next(target.glob("*.whl")))


def test_the_wheel_holds_every_file(wheel):
    held = {n for n in wheel.namelist() if ".dist-info" not in n}
    wanted = {
        f"pyrozoo/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted


def test_no_module_is_installed_under_a_bare_name(wheel):
    assert {n.split("/")[0] for n in wheel.namelist() if ".dist-info" not in n} == {"pyrozoo"}


def test_inference_and_guides_keep_their_places():
    for path in (ROOT / "inference").rglob("*.py"):
        text = path.read_text()
        assert "pyrozoo.zoo" not in text or path.name == "report.py", path
        assert "pyrozoo.guides" not in text, path
    for path in (ROOT / "guides").rglob("*.py"):
        lines = [x for x in path.read_text().splitlines() if "import" in x and "pyrozoo.zoo" in x]
        assert all("networks" in x for x in lines) or all(
            "networks" in x or x.strip() == "from pyrozoo.zoo import networks" for x in lines
        ), path
