"""Files of every schema version load for ever, and mean what they meant."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kashin_jax.io import Described, open_checkpoint, to_leaves
from kashin_jax.io.format import TYPES

V1 = Path(__file__).parent / "golden" / "storage" / "v1"
DECODED = json.loads((V1 / "decoded.json").read_text())

# Bits, or numbers that another program made, are compared.
pytestmark = pytest.mark.optimized


def test_the_golden_files_hold_every_type_of_tensor():
    checkpoint = open_checkpoint(V1)
    described = [checkpoint.described(name) for name in DECODED]
    assert all(isinstance(one, Described) for one in described)
    assert {one.type for one in described} == TYPES.keys()
    assert sorted(checkpoint.names()) == sorted([*DECODED, "bias"])


@pytest.mark.parametrize("name", DECODED)
def test_a_golden_tensor_decodes_to_what_numpy_made_of_it(name):
    expected = np.array(DECODED[name])
    tensor = open_checkpoint(V1).load(name)
    assert tensor.shape == expected.shape
    decoded = jax.jit(lambda t: t.decode())(tensor)
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=2e-5)
    assert len(to_leaves(tensor)) >= 2


def test_the_golden_orientation_and_plain_tensor_are_kept():
    checkpoint = open_checkpoint(V1)
    assert checkpoint.spec("joint-half") == ("float32", (10, 24))
    assert checkpoint.load("joint-half").shape == (24, 10)
    assert not checkpoint.is_packed("bias")
    assert (checkpoint.load("bias") == np.arange(6) / np.float32(4)).all()


def test_the_golden_hashes_are_those_of_the_files():
    assert open_checkpoint(V1).verify() == []


def test_a_golden_tensor_is_on_the_device_after_loading():
    leaf = open_checkpoint(V1).load("kashin").packed_codes
    assert isinstance(leaf, jnp.ndarray)
