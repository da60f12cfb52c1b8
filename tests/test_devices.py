"""Packed matrices on several devices: one process with four of them, made of the CPU.

Guards against loops whose sums vary over fewer axes than what is added to them, and
against kernels that cannot be cut into blocks where they are sharded.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CODE = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from kashin_jax import RTN, JointKashin, KMeans, Rotated, matmul, quantize

found = {}
rng = np.random.default_rng(0)
weight = rng.standard_normal((64, 32)).astype(np.float32)
x = rng.standard_normal((8, 64)).astype(np.float32)
methods = {
    "joint": JointKashin(effort="fast", block_shape=(32, 32)),
    "half": JointKashin(bits=2.5, effort="fast", block_shape=(32, 32)),
    "rotated": Rotated(RTN(group_size=16)),
    "groups": RTN(group_size=12, bits=3),
    "levels": KMeans(bits=2, num_restarts=1),
}
packed = {name: quantize(weight, config)[0] for name, config in methods.items()}
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    rows = jax.device_put(x, NamedSharding(mesh, P("data", None)))
    for name, tensor in packed.items():
        tensor = jax.device_put(tensor, NamedSharding(mesh, P()))
        specs = dict(mesh=mesh, in_specs=(P("data", None), P()), out_specs=P("data"))
        for many in (320, 1):
            product = lambda x, q: matmul(x, q, many_rows=many, max_tile=512)
            y = jax.jit(jax.shard_map(product, **specs))(rows, tensor)
            error = np.abs(np.asarray(y) - x @ np.asarray(tensor.decode())).max()
            found[f"{kind.name} {name} {many}"] = float(error)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
    for spec in (P("model", None), P(None, "model")):
        sharded = jax.device_put(weight, NamedSharding(mesh, spec))
        for name, config in methods.items():
            tensor, _ = quantize(sharded, config)
            there = {leaf.sharding.spec for leaf in jax.tree.leaves(tensor)}
            equal = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), tensor,
                                 jax.tree.map(np.asarray, packed[name]))
            same = jax.tree.all(equal) and there == {P()}
            found[f"{kind.name} {spec} {name}"] = 0.0 if same else 1.0
        # Activations may be sharded in the same way, outside of any map.
        rows = jax.device_put(x, NamedSharding(mesh, spec))
        y = rows @ tensor
        error = np.abs(np.asarray(y) - x @ np.asarray(packed[name].decode())).max()
        found[f"{kind.name} {spec} product"] = float(error > 1e-3)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_products_inside_shard_map_are_those_of_the_matrix(found):
    errors = {name: error for name, error in found.items() if "P(" not in name}
    assert len(errors) == 20
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.slow
def test_a_kernel_that_is_sharded_has_the_same_codes_on_all_its_devices(found):
    differ = {name: flag for name, flag in found.items() if "P(" in name}
    assert len(differ) == 24
    assert not any(differ.values()), differ
