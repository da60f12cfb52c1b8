"""What the notebooks may hold and import; slow tests run them."""

import ast
import importlib
import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OURS = ("kashin_jax", "experiments")
ABSOLUTE = re.compile(r"(?<![\w.:/])(?:/\w[\w.-]*/\w|[A-Z]:\\)")


def parsed(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_of(notebook):
    """One module of all code cells."""
    sources = [
        "".join(cell["source"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]
    return ast.parse("\n".join(sources))


def outputs_of(notebook):
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [output for cell in cells for output in cell["outputs"]]


def data_of(output):
    return output.get("data", {})


def text_of(output):
    """What an output shows in words."""
    shown = [output.get("text", ""), data_of(output).get("text/plain", "")]
    return "".join("".join(part) for part in shown)


def faults_of(notebook):
    """Outputs that nobody should read: errors, warnings, paths of a machine."""
    return [
        output
        for output in outputs_of(notebook)
        if output["output_type"] == "error"
        or output.get("name") == "stderr"
        or ABSOLUTE.findall(text_of(output))
    ]


def is_ours(module):
    return module.split(".")[0] in OURS


def private_uses(tree):
    """What of this project is imported or used without being offered."""
    found, modules = [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if is_ours(alias.name)]
        elif isinstance(node, ast.ImportFrom) and is_ours(node.module or ""):
            package = importlib.import_module(node.module)
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if alias.name in getattr(package, "__all__", ()):
                    continue
                try:
                    modules[alias.asname or alias.name] = importlib.import_module(full)
                except ModuleNotFoundError:
                    found.append(full)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and node.attr not in module.__all__:
                found.append(f"{node.value.id}.{node.attr}")
    return found


def underscored(tree):
    """Private names that are imported or reached by a dot; `_` alone is none."""
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names += (node.module or "").split(".")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [part for a in node.names for part in a.name.split(".")]
    return [name for name in names if re.match(r"_\w", name)]


def test_the_three_notebooks_are_there():
    assert [path.name for path in NOTEBOOKS] == [
        "01_kashin_in_five_minutes.ipynb",
        "02_paper_figures.ipynb",
        "03_quantize_your_flax_model.ipynb",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_can_be_read_without_running_it(path):
    notebook = parsed(path)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # All cells ran, in order, in one kernel.
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert faults_of(notebook) == []
    # Printed or drawn, by all cells but those that only import or define.
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 2
    assert any("image/png" in data_of(output) for output in outputs_of(notebook))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_without_a_warning(path):
    run = runpy.run_path(str(ROOT / "notebooks" / "execute.py"))["run"]
    notebook, faults = run(path)
    assert faults == []
    assert all(cell.execution_count for cell in notebook.cells if "outputs" in cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_of_the_machine_is_kept(path):
    notebook = parsed(path)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert path.stat().st_size < 800_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_numbered_in_order_and_none_is_empty(path):
    cells = parsed(path)["cells"]
    assert [cell["id"] for cell in cells] == [f"cell-{i}" for i in range(len(cells))]
    assert all("".join(cell["source"]).strip() for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_absolute_path_is_named(path):
    text = "\n".join("".join(cell["source"]) for cell in parsed(path)["cells"])
    assert not ABSOLUTE.findall(text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_only_public_names_are_used(path):
    tree = code_of(parsed(path))
    assert private_uses(tree) == []
    assert underscored(tree) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_checks_what_it_shows(path):
    checks = [node for node in ast.walk(code_of(parsed(path)))
              if isinstance(node, ast.Assert)]  # fmt: skip
    assert len(checks) >= 5


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("from kashin_jax import quantize", []),
        ("from kashin_jax import nonsense", ["kashin_jax.nonsense"]),
        ("import kashin_jax", ["kashin_jax"]),
        ("from kashin_jax.bases.costs import math", ["kashin_jax.bases.costs.math"]),
        ("from kashin_jax import theory\ntheory.l1_ratio", []),
        ("from kashin_jax import theory\ntheory.jax", ["theory.jax"]),
        ("from experiments.common.methods import METHODS", []),
        ("from experiments.common.figures import ASSETS",
         ["experiments.common.figures.ASSETS"]),
    ],
)  # fmt: skip
def test_the_search_for_private_uses_finds_them(code, named):
    assert private_uses(ast.parse(code)) == named


@pytest.mark.parametrize(
    ("output", "is_fault"),
    [
        ({"output_type": "stream", "name": "stdout", "text": ["30 steps\n"]}, False),
        ({"output_type": "display_data", "data": {"text/plain": ["<Figure>"]}}, False),
        ({"output_type": "stream", "name": "stdout", "text": ["/home/me/x\n"]}, True),
        ({"output_type": "stream", "name": "stderr", "text": ["a warning"]}, True),
        ({"output_type": "execute_result", "data": {"text/plain": "/root/x/y"}}, True),
        ({"output_type": "error", "ename": "ValueError", "evalue": "no"}, True),
    ],
)  # fmt: skip
def test_the_search_for_faults_in_outputs_finds_them(output, is_fault):
    notebook = {"cells": [{"cell_type": "code", "outputs": [output]}]}
    assert bool(faults_of(notebook)) is is_fault


def test_the_search_for_underscores_and_paths_finds_them():
    code = "from a import _b\nimport c._d\ne._f\nfor _ in g: h"
    assert sorted(underscored(ast.parse(code))) == ["_b", "_d", "_f"]
    assert ABSOLUTE.findall('open("/home/me/x")') and ABSOLUTE.findall("C:\\x")
    assert not ABSOLUTE.findall("max(|x|, |y|)/(N) and https://a.org/b/c, u/v/w")
