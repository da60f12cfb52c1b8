"""The architecture, read from the source: who imports whom, and what nobody does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Imports run from right to left only: a layer may import itself and those before it.
LAYERS = [
    "bases",
    "decomposition",
    "theory",
    "codebooks",
    "coding",
    "packing",
    "quantized",
    "storage",
    "layers",
]
# Beside the layers. Models know nothing of quantization; only experiments, and the
# users of the library, bring the two together.
ALLOWED = {layer: {"errors", *LAYERS[: i + 1]} for i, layer in enumerate(LAYERS)}
ALLOWED |= {
    "errors": {"errors"},
    "evaluation": {"errors", "evaluation"},
    "models": {"errors", "models"},
    "checkpoints": {"errors", "models", "checkpoints", *LAYERS},
    "cli": {"errors", "models", "evaluation", "checkpoints", "cli", *LAYERS},
    "__init__": {"errors", *LAYERS},
}
FLAX = {"layers", "models", "checkpoints", "cli"}
LIBRARY = sorted((ROOT / "kashin_jax").rglob("*.py"))
SOURCES = LIBRARY + sorted((ROOT / "experiments").rglob("*.py"))
HEAVY = {
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "orbax",
    "scipy.optimize",
    "sklearn",
    "tokenizers",
    "torch",
    "transformers",
}


def name_of(path):
    return str(path.relative_to(ROOT))


def part_of(path):
    """The layer that a file of the library belongs to."""
    return path.relative_to(ROOT / "kashin_jax").parts[0].removesuffix(".py")


def imported(path):
    """Dotted names of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node):
    """`jax._src.core` for the expression that says so, else the end of it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def within(name, package):
    return name == package or name.startswith(package + ".")


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_part_of_the_library_has_a_place_in_the_table():
    assert {part_of(path) for path in LIBRARY} == ALLOWED.keys()


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_run_one_way(path):
    parts = {
        name.split(".")[1] for name in imported(path) if name.startswith("kashin_jax.")
    }
    # `from kashin_jax import x` would reach over all layers.
    assert "kashin_jax" not in imported(path)
    assert parts <= ALLOWED[part_of(path)]


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library_knows_no_experiments(path):
    assert not [name for name in imported(path) if within(name, "experiments")]


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_flax_is_imported_by_layers_and_models_only(path):
    if part_of(path) not in FLAX:
        assert not [name for name in imported(path) if within(name, "flax")]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_public_and_lasting_names_of_jax_are_used(path):
    tree = ast.parse(path.read_text())
    names = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= set(imported(path))
    banned = ["jax.core", "jax._src", "jnp.empty", "jax.numpy.empty"]
    banned += ["jnp.empty_like", "jax.numpy.empty_like", "__future__.annotations"]
    assert not [name for name in names for bad in banned if within(name, bad)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_longer_than_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in LIBRARY
]


def test_importing_the_library_leaves_the_settings_of_jax_alone():
    code = f"""
import importlib, os, jax, flax
before, environment = dict(jax.config.values), dict(os.environ)
for module in {MODULES!r}:
    importlib.import_module(module)
changed = {{k for k, v in jax.config.values.items() if before.get(k, v) != v}}
print(len(before), sorted(changed), os.environ == environment)
"""
    count, rest = run(code).split(maxsplit=1)
    assert int(count) > 50
    assert rest.strip() == "[] True"


def test_importing_the_library_loads_no_optional_package():
    # optax is not in the list: flax itself imports it.
    code = f"""
import sys, importlib
for module in {MODULES!r}:
    importlib.import_module(module)
print(*sorted({HEAVY!r} & set(sys.modules)))
"""
    assert run(code).split() == []


def test_importing_the_library_prints_nothing():
    assert run("import kashin_jax") == ""
