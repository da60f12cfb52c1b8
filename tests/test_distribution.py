"""What is published holds the library, and none of the texts and models beside it."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_only_the_library_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
        "setuptools"
    ]
    assert settings["packages"]["find"] == {"include": ["kashin_jax*"]}
    assert settings["package-data"] == {"kashin_jax": ["py.typed"]}
    pruned = (ROOT / "MANIFEST.in").read_text().split()
    assert {"experiments", "notebooks", "results"} <= set(pruned)
    assert "include" not in pruned and "graft" not in pruned


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Names of the files in the source archive and in the wheel made from it."""
    # A copy: building writes into the tree.
    tree = tmp_path_factory.mktemp("tree") / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "runs")
    )
    out = tmp_path_factory.mktemp("built")
    subprocess.run(
        [sys.executable, "-m", "build", f"--outdir={out}", tree],
        check=True, capture_output=True,
    )  # fmt: skip
    (archive,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(archive) as file:
        inside = [Path(*Path(m.name).parts[1:]) for m in file if m.isfile()]
    with zipfile.ZipFile(wheel) as file:
        return [path.as_posix() for path in inside], file.namelist()


@pytest.mark.slow
def test_neither_archive_holds_a_text_or_a_model(built):
    """Some embedded texts are under licences of their own."""
    archive, wheel = built
    assert "kashin_jax/py.typed" in archive and "kashin_jax/py.typed" in wheel
    metadata = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml"}
    beside = {"setup.cfg"} | metadata
    for name in (*archive, *wheel):
        first, *rest = PurePosixPath(name).parts
        if first == "kashin_jax":
            assert rest[-1].endswith((".py", "py.typed")), name
        else:
            assert name in beside or first.endswith((".egg-info", ".dist-info")), name
