"""Packed tensors of every method, small and quick to make."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from kashin_jax.bases import BasisSpec
from kashin_jax.io import open_checkpoint, save_checkpoint
from kashin_jax.methods import (
    HQQ,
    NF4,
    RTN,
    AlternatingKashin,
    ChannelKMeans,
    GreedyKashin,
    JointKashin,
    KMeans,
    Rotated,
    Uniform,
    quantize,
)
from kashin_jax.pipeline.rules import Rules, rules_to_json

SHAPE = (24, 10)
FAST = {"max_steps": 5, "num_restarts": 1, "codebook_steps": 3, "polish_steps": 1}
CONFIGS = {
    "kashin": GreedyKashin(
        bits=3, block_shape=(8, 5), basis=BasisSpec.parse("dct:haar"), **FAST
    ),
    "joint": JointKashin(bits=4.0, effort="fast"),
    "joint-half": JointKashin(bits=2.5, effort="fast", block_shape=(12, 5)),
    "joint-plain": JointKashin(effort="fast", balance=0.0, rotation=False),
    "uniform": Uniform(bits=3),
    "rtn": RTN(bits=4),
    "rtn-groups": RTN(bits=3, group_size=7),
    "hqq": HQQ(bits=2, group_size=12),
    "nf4": NF4(group_size=8),
    "k-means": KMeans(bits=3, num_restarts=1),
    "k-means-channel": ChannelKMeans(bits=2, num_restarts=1),
    "kashin-dct": AlternatingKashin(bits=5),
    "kashin-dct-rows": AlternatingKashin(bits=2, axis=1),
    "rotate-kashin-dct": Rotated(AlternatingKashin(bits=3)),
    "rotate-rtn": Rotated(
        RTN(bits=5, group_size=64), BasisSpec.parse("hadamard:identity")
    ),
    "rotate-k-means": Rotated(KMeans(bits=1, num_restarts=1)),
}


@functools.cache
def packed(name, dtype="float32"):
    """The same tensor whoever asks first."""
    if name == "joint-plain":
        # Another program to compile, for the same codes and fewer leaves.
        tensor = packed("joint")
        layout = dataclasses.replace(tensor.layout, rotation=None)
        return tensor.replace(in_scale=None, layout=layout)
    weight = jax.random.normal(jax.random.key(1), SHAPE).astype(dtype)
    return quantize(weight, CONFIGS[name], jax.random.key(2))[0]


V1 = Path(__file__).parent / "golden" / "storage" / "v1"
GOLDEN = open_checkpoint(V1)
INDEX = "model.safetensors.index.json"
RNG = np.random.default_rng(0)
PLAIN = {
    "embed.weight": RNG.normal(size=(50, 10)).astype(ml_dtypes.bfloat16),
    "norm.weight": np.ones(10, np.float32),
    "steps": np.array(3),
}
CONFIG = {"model_type": "tiny", "quantization_config": {"quant_method": "older"}}


@functools.cache
def golden(name):
    """A packed tensor of the golden checkpoint, which costs no compiling."""
    return GOLDEN.load(name)


def every_type():
    return {f"layers.{name}.weight": golden(name) for name in GOLDEN.descriptions}


def save(directory, **options):
    tensors = PLAIN | every_type()
    rules = rules_to_json(Rules())
    options = {"rules": rules, "seed": 7, "max_shard_bytes": 1000} | options
    transposed = {name for name in tensors if "joint" in name}
    save_checkpoint(directory, tensors, CONFIG, transposed=transposed, **options)
    return directory


def sharded(directory, **changes):
    """A plain checkpoint of two shards as model hubs have them."""
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, tensor in zip(names, ("a", "b"), strict=True):
        safetensors.numpy.save_file({tensor: np.zeros(3)}, directory / name)
    weight_map = dict(zip("ab", names, strict=True))
    content = {"metadata": {"total_size": 48}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(content | changes))
    return names


def copy(source, target):
    """The files of a directory in another one, to be damaged."""
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
