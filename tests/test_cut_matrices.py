"""Matrices cut over eight devices: what is sent, and that products are those of one.

Guards against loops over rows of codes that partitioners can only run by gathering the
codes, and against static shapes of the whole where a device has a part.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from packed_matrices import random_tensor

from kashin_jax.errors import UsageError
from kashin_jax.methods import RTN, AlternatingKashin, JointKashin, Rotated

TESTS = Path(__file__).parent

CODE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from packed_matrices import random_tensor
from kashin_jax.methods import (
    NF4, RTN, AlternatingKashin, ChannelKMeans, JointKashin, KMeans
)
from kashin_jax.tensors.kernels.library import TARGET, instruction_set

METHODS = {
    "joint": JointKashin(block_shape=(32, 32)),
    "groups": RTN(group_size=32, bits=3),
    "half": JointKashin(bits=2.5, block_shape=(32, 32)),
    "three": JointKashin(bits=3, block_shape=(32, 32)),
    "levels": KMeans(bits=2),
    "channels": ChannelKMeans(bits=2),
    "nf4": NF4(group_size=64),
    "columns": AlternatingKashin(),
    "rows": AlternatingKashin(axis=1),
}
CUTS = ({"inputs": "a"}, {"outputs": "a"}, {"inputs": "b", "outputs": "a"})
SENT = ("all-reduce", "all-gather", "all-to-all", "collective-permute")


def sent(text):
    return {kind: text.count(kind + "(") for kind in SENT if kind + "(" in text}


def put(tensor, mesh, **cut):
    specs = tensor.partition_specs(**cut)
    lies = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.device_put(tensor, lies), specs


def error(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


found = []
x = jax.random.normal(jax.random.key(0), (4, 256))
for name in sys.argv[1].split(","):
    tensor = random_tensor(METHODS[name], (256, 512))
    whole = x @ tensor
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
        for cut in CUTS:
            most = dict(zip(("inputs", "outputs"), tensor.cuts()))
            if any(most[side] == 1 for side in cut):
                # Vectors are cut between them only.
                continue
            own, specs = put(tensor, mesh, **cut)
            # Compiled once, to be read and to be run.
            product = jax.jit(lambda x, q: x @ q).lower(x, own).compile()
            text, y = product.as_text(), product(x, own)
            inputs, outputs = cut.get("inputs"), cut.get("outputs")

            def part(x, q):
                y = x @ q
                return y if inputs is None else jax.lax.psum(y, inputs)

            parts = jax.shard_map(part, mesh=mesh, out_specs=P(None, outputs),
                                  in_specs=(P(None, inputs), specs))
            rows = jax.device_put(x, NamedSharding(mesh, P(None, inputs)))
            found.append({
                "case": f"{name} {kind.name} {cut}",
                "inputs": inputs is not None,
                "sent": sent(text),
                "by_kernel": TARGET in text,
                "has_kernel": instruction_set() is not None,
                "lies": outputs == (*y.sharding.spec, None, None)[1],
                "errors": [error(y, whole), error(jax.jit(parts)(rows, own), whole)],
            })
mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
up = random_tensor(METHODS["joint"], (256, 512))
down = random_tensor(METHODS["joint"], (512, 256))
(cut_up, _), (cut_down, _) = put(up, mesh, outputs="model"), put(
    down, mesh, inputs="model")
mlp = lambda x, up, down: jax.nn.relu(x @ up) @ down
cut_mlp = jax.jit(mlp).lower(x, cut_up, cut_down).compile()
chain = {
    "sent": sent(cut_mlp.as_text()),
    "error": error(cut_mlp(x, cut_up, cut_down), mlp(x, up, down)),
}
loss = lambda x, q: jnp.sum(jnp.square(x @ q))
both = jax.vmap(lambda x, q: x @ q)
stack = lambda leaf: jnp.stack([leaf, leaf])
transforms = {
    "grad": error(jax.grad(loss)(x, cut_up),
                  jax.grad(loss)(x, up)),
    "jvp": error(*(jax.jvp(lambda x: x @ q, (x,), (x + 1,))[1]
                   for q in (cut_up, up))),
    "vmap": error(jax.vmap(lambda x: x @ cut_up)(stack(x)), stack(x @ up)),
    "vmap of matrices": error(both(stack(x), jax.tree.map(stack, up)),
                              stack(x @ up)),
    "scan": error(jax.lax.scan(lambda c, x: (c, x @ cut_up), 0, stack(x))[1],
                  stack(x @ up)),
}
print(json.dumps({"cases": found, "chain": chain, "transforms": transforms}))
"""


def measured(names):
    done = subprocess.run(
        [sys.executable, "-c", CODE, names],
        env=os.environ
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
        | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check_cases(cases):
    for case in cases:
        # Results of parts of the inputs are added up, and nothing else is sent.
        assert case["sent"] == ({"all-reduce": 1} if case["inputs"] else {}), case
        assert case["lies"], case
        # Levels of every column and of every row are left to XLA.
        plain = case["case"].startswith(("channels", "columns", "rows"))
        has_kernel = case["has_kernel"] and not plain
        assert case["by_kernel"] == has_kernel, case
        assert max(case["errors"]) < 1e-6, case


@pytest.fixture(scope="module")
def found():
    return measured("joint")


@pytest.mark.slow
def test_products_stay_where_the_matrix_lies_and_are_those_of_one_device(found):
    assert len(found["cases"]) == 6
    check_cases(found["cases"])


@pytest.mark.slow
def test_two_layers_cut_as_usual_add_up_once(found):
    assert found["chain"]["sent"] == {"all-reduce": 1}
    assert found["chain"]["error"] < 1e-6


@pytest.mark.slow
def test_cut_products_are_differentiated_and_mapped(found):
    assert max(found["transforms"].values()) < 1e-5, found["transforms"]


@pytest.mark.slow
def test_other_methods_are_cut_as_well():
    found = measured("groups,half,three,levels,channels,nf4,columns,rows")
    assert len(found["cases"]) == 40
    check_cases(found["cases"])


@pytest.mark.parametrize(
    ("config", "shape", "cuts"),
    [
        (JointKashin(block_shape=(32, 32)), (64, 96), (2, 3)),
        # Rows end within bytes.
        (JointKashin(bits=3, block_shape=(32, 3)), (64, 9), (1, 1)),
        # Two blocks of codes fill whole bytes.
        (JointKashin(bits=3, block_shape=(32, 4)), (64, 16), (2, 2)),
        (RTN(group_size=16), (48, 6), (3, 3)),
        (RTN(group_size=20), (48, 6), (1, 3)),
        (Rotated(RTN(group_size=16)), (48, 6), (1, 1)),
        (AlternatingKashin(), (48, 6), (1, 3)),
        (AlternatingKashin(bits=3, axis=1), (48, 6), (1, 1)),
        (Rotated(AlternatingKashin()), (48, 6), (1, 1)),
    ],
)
def test_whole_blocks_and_whole_bytes_are_cut(config, shape, cuts):
    tensor = random_tensor(config, shape)
    assert tensor.cuts() == cuts
    if max(cuts) == 1:
        with pytest.raises(UsageError, match="cannot be cut over its inputs"):
            tensor.partition_specs(inputs="a")
    else:
        specs = tensor.partition_specs(outputs="a")
        assert tuple(specs.packed_codes) == (None, "a")


def test_a_part_has_the_shape_of_its_leaves():
    tensor = random_tensor(JointKashin(block_shape=(32, 32)), (64, 96))
    part = tensor.replace(
        packed_codes=tensor.packed_codes[:32], scale=tensor.scale[:1],
        in_scale=tensor.in_scale[:32],
    )  # fmt: skip
    assert part.shape == (32, 96) and part.full_shape == (32, 96)
    assert jnp.array_equal(part.decode(), tensor.decode()[:32])
