"""Checkpoints once more as Hugging Face's Flax code wrote them."""

import json
import shutil

import numpy as np
from flax import serialization, traverse_util
from safetensors.numpy import load_file

NAME = "flax_model.msgpack"


def flax_arrays(directory):
    """The arrays of a checkpoint by the names of Flax, kernels as `[in, out]`."""
    found = {}
    for name, value in load_file(directory / "model.safetensors").items():
        *modules, leaf = name.split(".")
        if leaf == "weight" and value.ndim == 1:
            leaf = "scale"
        elif leaf == "weight" and "embed" in modules[-1]:
            leaf = "embedding"
        elif leaf == "weight":
            leaf, value = "kernel", np.ascontiguousarray(value.T)
        found["/".join([*modules, leaf])] = value
    return found


def write_flax(path, arrays):
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    path.write_bytes(serialization.to_bytes(tree))


def make_flax_copy(source, target, *, shards=1):
    """The same model without safetensors."""
    shutil.copytree(source, target)
    arrays = flax_arrays(source)
    (target / "model.safetensors").unlink()
    if shards == 1:
        write_flax(target / NAME, arrays)
        return target
    places = {}
    for i in range(shards):
        file = f"flax_model-{i + 1:05}-of-{shards:05}.msgpack"
        part = dict(list(arrays.items())[i::shards])
        write_flax(target / file, part)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (target / f"{NAME}.index.json").write_text(json.dumps(index))
    return target
