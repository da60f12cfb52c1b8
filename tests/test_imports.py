"""The architecture, read from the source: who imports whom, and what nobody does."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The page is the only place that says who may import whom.
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \|[^|]*\| ([^|]+) \| (yes|no) \|$", re.MULTILINE)
ROWS = {name: (set(re.findall(r"`(\w+)`", imports)), flax)
        for name, imports, flax in ROW.findall(PAGE)}  # fmt: skip
ALLOWED = {name: {"errors", name} | imports for name, (imports, _) in ROWS.items()}
FLAX = {name for name, (_, flax) in ROWS.items() if flax == "yes"}
LIBRARY = sorted((ROOT / "kashin_jax").rglob("*.py"))
LIBRARY_INIT = ROOT / "kashin_jax" / "__init__.py"
SOURCES = LIBRARY + sorted((ROOT / "experiments").rglob("*.py"))
HEAVY = {
    "datasets",
    "evaluate",
    "huggingface_hub",
    "lm_eval",
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


@cache
def parsed(path):
    return ast.parse(path.read_text())


@cache
def imported(path):
    """Dotted names of everything that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names.add(node.module)
    return names


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


def test_the_table_runs_one_way():
    """A row names rows above it alone: what the tests below compare with is sound."""
    above = set()
    for name, imports in ALLOWED.items():
        assert imports - {name, "errors"} <= above, name
        above.add(name)


def test_the_library_lists_its_packages_in_the_order_of_the_table():
    listed = re.findall(r"`(\w+)`", ast.get_docstring(parsed(LIBRARY_INIT)))
    order = [name for name in ALLOWED if name in listed]
    assert listed[: len(order)] == order and len(order) > 10


def test_imports_run_one_way():
    wrong = {}
    for path in LIBRARY:
        names = imported(path)
        parts = {n.split(".")[1] for n in names if n.startswith("kashin_jax.")}
        # `from kashin_jax import x` would reach over all layers.
        whole = {"kashin_jax"} & names
        wrong[name_of(path)] = (parts - ALLOWED[part_of(path)]) | whole
    assert not filled(wrong)


def test_the_library_knows_no_experiments():
    assert not filled({
        name_of(path): [n for n in imported(path) if within(n, "experiments")]
        for path in LIBRARY
    })  # fmt: skip


# What programs share imports from left to right; programs and documents import all.
SHARED = {
    "common": {"common"},
    "classification": {"common", "classification"},
    "train": {"common", "train"},
    "finetuning": {"common", "classification", "train", "finetuning"},
}


def test_what_experiments_share_knows_no_program():
    wrong = {}
    for package, allowed in SHARED.items():
        for path in sorted((ROOT / "experiments" / package).glob("*.py")):
            names = imported(path)
            parts = {n.split(".")[1] for n in names if n.startswith("experiments.")}
            wrong[name_of(path)] = parts - allowed
    assert len(wrong) > len(SHARED)
    assert not filled(wrong)


def test_flax_is_imported_by_files_layers_and_models_only():
    assert not filled({
        name_of(path): [n for n in imported(path) if within(n, "flax")]
        for path in LIBRARY
        if part_of(path) not in FLAX
    })  # fmt: skip


BANNED = [
    "jax.core", "jax._src", "jnp.empty", "jax.numpy.empty", "jnp.empty_like",
    "jax.numpy.empty_like", "__future__.annotations",
]  # fmt: skip


def test_only_public_and_lasting_names_of_jax_are_used():
    wrong = {}
    for path in SOURCES:
        nodes = ast.walk(parsed(path))
        names = {dotted(node) for node in nodes if isinstance(node, ast.Attribute)}
        names |= imported(path)
        wrong[name_of(path)] = [n for n in names for bad in BANNED if within(n, bad)]
    assert not filled(wrong)


def filled(found):
    """What was found wrong, by file."""
    return {name: sorted(items) for name, items in found.items() if items}


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
