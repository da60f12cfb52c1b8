"""Strings for methods and lists for rules end in a sentence, not deep in the code.

In a process of its own: in this one types are checked before our code sees them.
"""

import subprocess
import sys

import pytest

CODE = """
import numpy as np
from flax import nnx
from kashin_jax import RTN, Rule, Rules, quantize, quantize_model, quantize_params
layer, w = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), np.ones((8, 8), np.float32)
for wrong in (
    lambda: quantize(w, "rtn"),
    lambda: quantize(w, RTN),
    lambda: quantize_model(layer, "rtn"),
    lambda: Rules(config="rtn"),
    lambda: Rule("x", "rtn"),
    lambda: quantize_model(layer, rules=[Rule("x", RTN())]),
    lambda: quantize_params({"a": 1.0}, RTN()),
):
    try:
        wrong()
    except (TypeError, ValueError) as error:
        print(error)
"""


@pytest.fixture(scope="module")
def messages():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_wrong_kinds_are_named_with_the_remedy(messages):
    assert len(messages) == 7
    for message in messages[:5]:
        assert message.startswith("`config` must be a method such as RTN(bits=4). Got ")
    assert messages[5].startswith("`rules` must be Rules, as Rules(rules=[...]). Got [")


def test_a_tree_without_kernels_does_not_blame_the_rules(messages):
    assert messages[6] == "There are no kernels: nothing is to be quantized."
