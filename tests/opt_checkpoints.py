"""Small OPT checkpoints for tests: made, written, loaded and compared."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, serialization, traverse_util

from kashin_jax.errors import CheckpointError
from kashin_jax.models.loading import load_opt

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden" / "opt"
WIKI = HERE.parent / "experiments" / "assets" / "opt-wiki-18m"
EMBEDDING = "model.decoder.embed_tokens.weight"
FC1 = "model.decoder.layers.1.fc1.weight"


def flax_tree():
    """The small pre-norm model as Hugging Face's Flax code saved it."""
    path = GOLDEN / "prenorm" / "flax_model.msgpack"
    return serialization.msgpack_restore(path.read_bytes())


@pytest.fixture(scope="module")
def tensors():
    """The same model as PyTorch would name and lay it out."""
    result = {}
    for path, value in traverse_util.flatten_dict(flax_tree()).items():
        name = ".".join((*path[:-1], "bias" if path[-1] == "bias" else "weight"))
        value = value.T if path[-1] == "kernel" else value
        result[name] = np.array(value, np.float32, order="C")
    return result


@pytest.fixture
def directory(tmp_path):
    """A directory with the configuration and no weights yet."""
    shutil.copy(GOLDEN / "prenorm" / "config.json", tmp_path)
    return tmp_path


def parameters(model):
    flat = nnx.to_flat_state(nnx.state(model))
    return {path: np.asarray(variable[...]) for path, variable in flat}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=str(path))


def write(directory, tensors, name="model.safetensors"):
    safetensors.numpy.save_file(tensors, directory / name, {"format": "pt"})


def write_shards(directory, tensors, names, **index):
    weight_map = {}
    for i, name in enumerate(names):
        part = dict(list(tensors.items())[i :: len(names)])
        write(directory, part, name)
        weight_map |= dict.fromkeys(part, name)
    content = {"metadata": {}, "weight_map": weight_map | index}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(content))
    return path


def message(directory, error=CheckpointError):
    with pytest.raises(error) as caught:
        load_opt(str(directory))
    text = str(caught.value)
    assert "\n" not in text
    return text
