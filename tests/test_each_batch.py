"""Calibration on several devices: the bytes of one, whatever their number.

One process with three devices, made of the CPU, which eight batches do not divide over.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kashin_jax.pipeline.each_batch import Call, each_batch

ROOT = Path(__file__).resolve().parent.parent

CODE = """
import hashlib, json, sys
from pathlib import Path
import jax
import numpy as np
from test_calibration import GPTQ, TEXT, WEIGHTED
from test_each_batch import products
from tiny_checkpoint import make_checkpoint
from kashin_jax.pipeline import quantize_checkpoint

work = Path(sys.argv[1])
make_checkpoint(work / "tiny")
devices = jax.local_devices()
found = {"devices": len(devices), "used": []}
device_put = jax.device_put

def seen(x, where=None, **options):
    if isinstance(where, jax.Device):
        found["used"].append(where.id)
    return device_put(x, where, **options)

jax.device_put = seen
found["products"] = products()
jax.device_put = device_put
for count in (len(devices), 1):
    jax.local_devices = lambda: devices[:count]
    for text in (TEXT, WEIGHTED):
        target = work / f"{count}-{text.weighting}"
        quantize_checkpoint(work / "tiny", target, GPTQ, calibration=text)
        files = sorted(target.glob("*.safetensors"))
        found[target.name] = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
print(json.dumps(found))
"""


@jax.jit
def times(shared, own):
    return {"sum": shared["a"] @ own[0], "plain": own[1]}


def products():
    """Of four batches; the fourth is alone in its round where there are three."""
    shared = {"a": jnp.arange(6.0).reshape(2, 3)}
    batches = [((np.full((3, 2), float(k)), np.int32(k)),) for k in range(4)]
    found = each_batch(Call(times, (), (shared,)), iter(batches))
    return [{k: np.asarray(v).tolist() for k, v in each.items()} for each in found]


def test_one_device_gives_batches_in_order():
    found = products()
    assert [each["plain"] for each in found] == [0, 1, 2, 3]
    assert found[2]["sum"] == [[6.0, 6.0], [24.0, 24.0]]
    assert list(each_batch(Call(times, (), ({},)), [])) == []


@pytest.mark.slow
def test_devices_have_a_batch_each_and_change_no_byte(tmp_path):
    """Guards sums across devices, whose rounding would depend on their number."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        },
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["devices"] == 3 and set(found["used"]) == {0, 1, 2}
    assert found["products"] == products()
    for weighting in ("None", "gradient"):
        assert found[f"3-{weighting}"] == found[f"1-{weighting}"] != []
    assert found["1-None"] != found["1-gradient"]
