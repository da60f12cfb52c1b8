"""A quantization method defined outside the library, through all that takes methods.

Guards against closed lists of methods: whatever the library does with its own it does
with a user's, once it is registered.
"""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed_matrices import random_tensor
from quantized_sources import make_source

from kashin_jax import (
    RTN,
    AffineTensor,
    GreedyKashin,
    Method,
    Rotated,
    Rule,
    Rules,
    dequantize,
    quantize,
    quantize_model,
    quantize_params,
    register,
)
from kashin_jax.io import open_checkpoint
from kashin_jax.methods import (
    Encoded,
    base,
    config_from_json,
    config_to_json,
    method_names,
)
from kashin_jax.pipeline import quantize_checkpoint
from kashin_jax.tensors.grouped import GroupLayout

KEY = jax.random.key(0)


@register("sign")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sign(Method):
    """Every weight as its sign, with the mean magnitude of its output channel."""

    default_skip = (r"norm", r"fc2")

    bits: int = 1
    gain: float = 1.0

    def encode(self, weight, key):
        step = (2 * self.gain * jnp.mean(jnp.abs(weight), axis=0)).astype(jnp.float16)
        layout = GroupLayout.of(weight, weight.shape[0], self.bits)
        codes = layout.pack((weight > 0).astype(jnp.uint8))
        half = jnp.full((1, 1, weight.shape[1]), 0.5, jnp.float16)
        return Encoded(AffineTensor(codes, step[None, None], half, layout))


# Only while tests of this file run: others go through all that are registered.
OWN = base._METHODS.pop("sign")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(base._METHODS, "sign", OWN)


def kernel(shape=(32, 24), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def expected(w, gain=1.0):
    mean = (2 * gain * jnp.abs(w).mean(axis=0)).astype(jnp.float16).astype(jnp.float32)
    return jnp.where(w > 0, mean / 2, -mean / 2)


def test_it_quantizes_one_matrix():
    w = kernel()
    q, report = quantize(w, Sign(gain=0.5), KEY)
    np.testing.assert_allclose(q.decode(), expected(w, 0.5), rtol=1e-6)
    lost = jnp.sum((w - q.decode()) ** 2) / jnp.sum(w**2)
    np.testing.assert_allclose(report.relative_squared_error, lost, rtol=1e-5)
    assert report.decomposition is None
    np.testing.assert_allclose(kernel((3, 32)) @ q, kernel((3, 32)) @ q.decode(), 1e-5)


def test_it_has_a_name_in_json_and_among_all_methods():
    assert "sign" in method_names()
    written = config_to_json(Sign(gain=2.0))
    assert written == {"method": "sign", "bits": 1, "gain": 2.0}
    assert config_from_json(written) == Sign(gain=2.0)


def test_it_is_rotated_like_the_methods_of_the_library():
    w = kernel()
    q, _ = quantize(w, Rotated(Sign()), KEY)
    pair = q.derive_bases().basis
    np.testing.assert_allclose(
        pair.analysis(q.decode()), expected(pair.analysis(w)), atol=1e-4
    )
    with pytest.raises(TypeError, match="GreedyKashin does not"):
        quantize(w, Rotated(GreedyKashin(num_restarts=1)), KEY)


def test_it_quantizes_the_layers_of_a_model_but_those_that_it_skips():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.fc1 = nnx.Linear(32, 24, rngs=rngs)
            self.fc2 = nnx.Linear(24, 8, rngs=rngs)

        def __call__(self, x):
            return self.fc2(self.fc1(x))

    model = Network(nnx.Rngs(0))
    found = quantize_model(model, Sign())
    assert found.reports.keys() == {"fc1"}
    w = model.fc1.kernel.get_value()
    np.testing.assert_allclose(
        dequantize(found.model.fc1.kernel.get_value()), expected(w), rtol=1e-6
    )
    named = Rules(config=Sign(), rules=[Rule("fc2", Sign(gain=2.0))])
    assert quantize_model(model, rules=named).reports.keys() == {"fc1", "fc2"}


def test_it_quantizes_a_tree_of_parameters():
    w = kernel()
    found = quantize_params({"params": {"dense": {"kernel": w}}}, Sign())
    packed = found.params["params"]["dense"]["kernel"]
    np.testing.assert_allclose(dequantize(packed), expected(w), rtol=1e-6)


def test_it_goes_to_disk_and_comes_back(tmp_path):
    make_source(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "q", Rules(config=Sign()))
    original, stored = (
        open_checkpoint(tmp_path / "source"),
        open_checkpoint(tmp_path / "q"),
    )
    assert stored.descriptions
    for name in stored.descriptions:
        packed, described = stored.load(name), stored.described(name)
        w = jnp.asarray(original.load(name), jnp.float32)
        w = w.T if described.is_transposed else w
        np.testing.assert_allclose(packed.decode(), expected(w), rtol=2e-3)


def test_the_command_takes_its_name(tmp_path, capsys):
    from kashin_jax.cli import main

    make_source(tmp_path / "source")
    target = tmp_path / "q"
    assert (
        main(["quantize", str(tmp_path / "source"), str(target), "--method=sign"]) == 0
    )
    assert open_checkpoint(target).quantization["rules"]["config"]["method"] == "sign"
    assert main(["quantize", "--help"]) == 0
    assert "sign" in capsys.readouterr().out


def test_a_name_belongs_to_one_class():
    with pytest.raises(ValueError, match="'rtn' exists already, as RTN"):

        @register("rtn")
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Other(Method):
            bits: int = 4


def test_a_packed_matrix_says_what_it_is():
    q = random_tensor(RTN(bits=4, group_size=16), (64, 32))
    assert repr(q) == (
        "AffineTensor(64 x 32, 5.250 bits per weight, 4-bit affine codes, groups of "
        "16, 1,344 bytes)"
    )


@pytest.mark.slow
def test_numbers_of_numpy_become_pythons():
    """`for bits in np.arange(2, 5)` gave configurations that no file could hold.

    In a process of its own, where nobody checks the types of fields.
    """
    code = "import numpy as np; from kashin_jax import RTN, JointKashin as J; print("
    code += (
        "type(RTN(group_size=np.int64(9)).group_size), type(J(bits=np.int64(3)).bits))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == "<class 'int'> <class 'int'>"
