"""What `import kashin_jax` offers."""

import ast
import importlib
import importlib.metadata
import inspect
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import kashin_jax

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [
    "kashin_jax",
    "kashin_jax.bases",
    "kashin_jax.codebooks",
    "kashin_jax.layers",
    "kashin_jax.models",
    "kashin_jax.methods",
    "kashin_jax.pipeline",
    "kashin_jax.tensors",
    "kashin_jax.theory",
]


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_exactly_those_listed(name):
    package = importlib.import_module(name)
    tree = ast.parse(Path(package.__file__).read_text())
    # `X as X` is how a package says that a name is its own to offer.
    public = [
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname is not None
    ]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    public += [node.name for node in functions if not node.name.startswith("_")]
    assert sorted(public) == sorted(package.__all__)
    assert all(hasattr(package, key) for key in package.__all__)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_function_and_class_says_what_it_is_for(name):
    package = importlib.import_module(name)
    for key in package.__all__:
        value = getattr(package, key)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), key


def test_the_names_of_the_readme_example_are_there():
    for name in ("GreedyKashin", "quantize", "matmul", "dequantize", "stored_bits"):
        assert callable(getattr(kashin_jax, name))
    assert callable(kashin_jax.quantize_model)


def test_the_library_is_typed_and_its_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata.version("kashin_jax") == project["version"]
    assert kashin_jax.__version__ == project["version"]
    assert "__version__" in dir(kashin_jax)
    assert (ROOT / "kashin_jax" / "py.typed").exists()


def test_a_source_tree_that_is_not_installed_has_a_version_too(monkeypatch):
    """`kashin --help` failed in a clone, for want of the version."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    version = kashin_jax.__version__
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert kashin_jax.__version__ == version
    monkeypatch.setattr("kashin_jax.version.__file__", "/nowhere/kashin_jax/version.py")
    assert kashin_jax.__version__ == "0+unknown"
