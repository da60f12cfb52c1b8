"""Small checkpoints to quantize, and ways to damage and compare directories."""

import json

from tiny_checkpoint import make_checkpoint

from kashin_jax import RTN, Rule, Rules
from kashin_jax.methods import config_from_json, method_names
from kashin_jax.models import save_opt
from kashin_jax.models.loading import load_opt

# What a test asks of a method beyond its defaults, to be quick on 64 x 64.
FIELDS = {
    "kashin-joint": {"effort": "fast"},
    "kashin": {"num_restarts": 1, "rtol": 1e-2},
    "k-means-channel": {"num_restarts": 1},
    "rotate-k-means": {"num_restarts": 1},
    "k-means": {"num_restarts": 1},
    "rtn": {"group_size": 32},
}


def method(name, **fields):
    return config_from_json({"method": name, **FIELDS.get(name, {}), **fields})


RTN_RULES = Rules(config=method("rtn"))
# Two matrices of the second block alone: for runs that are repeated many times.
FEW = Rules(
    config=RTN(group_size=32),
    skip=(r"layers/0/", r"(q|k|v|out)_proj"),
)


def every_method(paths):
    """A method of its own for each of the layers; joint coding with 3.5 bits."""
    widths = {"kashin-joint": {"bits": 3.5}}
    configs = [method(name, **widths.get(name, {})) for name in method_names()]
    rules = [
        Rule(f"^{path}$", config) for path, config in zip(paths, configs, strict=False)
    ]
    assert len(rules) == len(configs)
    return Rules(config=method("rtn"), rules=rules)


def make_source(directory, *, dtype="float16", seed=0):
    """An OPT of two blocks, 64 wide inside and 128 in between, with a tokenizer."""
    make_checkpoint(directory, seed=seed, ffn_dim=128)
    if dtype != "float16":
        loaded = load_opt(directory)
        save_opt(loaded.model, loaded.config, directory, dtype=dtype)
    return directory


def content(directory):
    """All files of a directory, hidden ones too, as bytes by name."""
    assert not any(path.is_dir() for path in directory.iterdir())
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def edit_json(path, change):
    found = json.loads(path.read_text("utf-8"))
    change(found)
    path.write_text(json.dumps(found), "utf-8")


def edit_header(path, change):
    """Changes the JSON header of a safetensors file; the data stay."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
