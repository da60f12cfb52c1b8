"""`kashin --help` and wrong use answer at once: nothing heavy is imported for them."""

import json
import subprocess
import sys
from importlib import metadata

import pytest

from kashin_jax.cli import main
from kashin_jax.cli.program import Methods
from kashin_jax.methods import method_names

CODE = """
import json, sys
from kashin_jax.cli import main
code = main(json.loads(sys.argv[1]))
heavy = {"jax", "jaxlib", "flax", "numpy", "tqdm"} & set(sys.modules)
print("code", code, *sorted(heavy))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["inspect", "--help"], 0),
        (["eval", "--help"], 0),
        ([], 2),
        (["quantize", "a"], 2),
        (["quantize", "a", "b", "--bits=x"], 2),
        (["quantize", "a", "--method"], 2),
    ],
)
def test_help_and_wrong_use_do_not_import_jax(arguments, code):
    command = [sys.executable, "-c", CODE, json.dumps(arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == f"code {code}"


def test_the_methods_of_the_command_are_those_of_the_library(capsys):
    assert tuple(Methods()) == method_names()
    assert "rtn" in Methods() and "gptq" not in Methods()
    assert main(["quantize", "--help"]) == 0
    assert f"Methods: {', '.join(method_names())}." in " ".join(
        capsys.readouterr().out.split()
    )


def test_the_version_is_known_without_importing_jax():
    code = "import kashin_jax, sys; print(kashin_jax.__version__, 'jax' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [metadata.version("kashin_jax"), "False"]
