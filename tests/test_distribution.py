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
    """The source archive, and the wheel made from it."""
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
    return archive, wheel


@pytest.mark.slow
def test_neither_archive_holds_a_text_or_a_model(built):
    """Some embedded texts are under licences of their own."""
    with tarfile.open(built[0]) as file:
        inside = [Path(*Path(m.name).parts[1:]) for m in file if m.isfile()]
    archive = [path.as_posix() for path in inside]
    with zipfile.ZipFile(built[1]) as file:
        wheel = file.namelist()
    assert "kashin_jax/py.typed" in archive and "kashin_jax/py.typed" in wheel
    metadata = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml"}
    beside = {"setup.cfg", "setup.py"} | metadata
    sources = (".cc", ".h", "README.md", "flags.txt", "xla/LICENSE")
    for name in (*archive, *wheel):
        first, *rest = PurePosixPath(name).parts
        if rest and rest[0] == "csrc":
            assert name not in wheel and name.endswith(sources), name
        elif first == "kashin_jax":
            assert rest[-1].endswith((".py", "py.typed", ".so")), name
        else:
            assert name in beside or first.endswith((".egg-info", ".dist-info")), name


USE = """
import json, sys, warnings
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
import kashin_jax
from kashin_jax.cli import main
from kashin_jax.io import open_checkpoint

source, target = Path("source"), Path("target")
source.mkdir()
matrix = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")
save_file({"block.fc1.weight": matrix}, source / "model.safetensors")
(source / "config.json").write_text("{}")
assert main(["quantize", str(source), str(target), "--bits=4"]) == 0
tensor = open_checkpoint(target).load("block.fc1.weight")
lost = np.sum((np.asarray(tensor.decode()).T - matrix) ** 2) / np.sum(matrix**2)
assert lost < 0.01, lost
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert kashin_jax.RTNConfig is kashin_jax.RTN
(found,) = caught
assert found.category is DeprecationWarning and found.filename == "<string>", found
print(kashin_jax.__version__, Path(kashin_jax.__file__).parent)
"""


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_of_the_project_is(built, tmp_path):
    """Guards against modules, dependencies or names that only the tree has."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", built[1]], check=True)
    environment = {"PATH": str(home / "bin"), "HOME": str(tmp_path)}

    def run(*command):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "quantize" in run(home / "bin" / "kashin", "--help")
    version, place = run(python, "-c", USE).split()[-2:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version == project["version"]
    assert Path(place).is_relative_to(home)
