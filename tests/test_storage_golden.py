"""Files of every schema version load for ever, and mean what they meant."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kashin_jax.errors import CheckpointError
from kashin_jax.io import Described, open_checkpoint, save_checkpoint, to_leaves
from kashin_jax.io.format import TYPES, describe, from_leaves
from kashin_jax.tensors import dequantize

STORAGE = Path(__file__).parent / "golden" / "storage"
V1, V2, V3 = (STORAGE / f"v{version}" for version in (1, 2, 3))
DECODED, STACKS, VECTORS = (
    json.loads((version / "decoded.json").read_text()) for version in (V1, V2, V3)
)

# Bits, or numbers that another program made, are compared.
pytestmark = pytest.mark.optimized


def test_the_golden_files_hold_every_type_of_tensor():
    found = set()
    for source, names in ((V1, DECODED), (V3, VECTORS)):
        checkpoint = open_checkpoint(source)
        described = [checkpoint.described(name) for name in names]
        assert all(isinstance(one, Described) for one in described)
        found |= {one.type for one in described}
        assert sorted(checkpoint.names()) == sorted([*names, "bias"])
    assert found == TYPES.keys()


@pytest.mark.parametrize("name", DECODED)
def test_a_golden_tensor_decodes_to_what_numpy_made_of_it(name):
    expected = np.array(DECODED[name])
    tensor = open_checkpoint(V1).load(name)
    assert tensor.shape == expected.shape
    decoded = jax.jit(lambda t: t.decode())(tensor)
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=2e-5)
    assert len(to_leaves(tensor)) >= 2


LATER = [(V2, name, STACKS[name]) for name in STACKS]
LATER += [(V3, name, VECTORS[name]) for name in VECTORS]


@pytest.mark.parametrize(("files", "name", "decoded"), LATER)
def test_golden_stacks_and_vectors_decode_to_what_numpy_made_of_them(
    files, name, decoded
):
    expected = np.array(decoded)
    checkpoint = open_checkpoint(files)
    tensor = checkpoint.load(name)
    assert tensor.full_shape == expected.shape
    np.testing.assert_allclose(dequantize(tensor), expected, rtol=0, atol=2e-5)
    described = checkpoint.described(name)
    again = describe(tensor, is_transposed=described.is_transposed)
    assert again == checkpoint.descriptions[name]
    transposed = expected.swapaxes(-1, -2) if described.is_transposed else expected
    assert checkpoint.spec(name).shape == transposed.shape


@pytest.mark.parametrize("stack", [[], [0], [-1], [2.0], 2, "2", None, [2**40], [3]])
def test_a_stack_that_cannot_be_is_refused(stack):
    content = dict(open_checkpoint(V2).descriptions["affine"]) | {"stack": stack}
    leaves = to_leaves(open_checkpoint(V2).load("affine"))
    with pytest.raises(CheckpointError, match="stack|leaf"):
        from_leaves(content, leaves)


def test_what_old_readers_know_is_written_for_them(tmp_path):
    for version, source in enumerate((V1, V2, V3), 1):
        checkpoint = open_checkpoint(source)
        tensors = {name: checkpoint.load(name) for name in checkpoint.names()}
        target = tmp_path / str(version)
        save_checkpoint(target, tensors, {}, rules={})
        written = open_checkpoint(target)
        assert written.quantization["schema_version"] == version
        for file in written.files.values():
            described = json.loads(file.metadata["kashin_jax"])
            assert described["schema_version"] == version


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
