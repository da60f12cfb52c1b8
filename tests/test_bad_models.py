"""Models that cannot run are one line of the command, and no traceback."""

import json
import re
import shutil

import pytest
import safetensors.numpy
from decoders import GOLDEN
from quantized_sources import edit_json

from kashin_jax.cli import main

QUERY = "model.layers.0.self_attn.q_proj.weight"
FILE = "model.safetensors"


def unknown_rope(directory):
    rope = {"rope_type": "spiral", "rope_theta": 1e4}
    edit_json(directory / "config.json", lambda c: c.update(rope_parameters=rope))


def missing_shard(directory):
    (directory / FILE).rename(directory / "one.safetensors")
    places = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    index = json.dumps({"metadata": {}, "weight_map": places})
    (directory / f"{FILE}.index.json").write_text(index)


def wrong_shape(directory):
    tensors = safetensors.numpy.load_file(directory / FILE)
    tensors[QUERY] = tensors[QUERY][:, :8].copy()
    safetensors.numpy.save_file(tensors, directory / FILE)


def other_architecture(directory):
    edit_json(directory / "config.json", lambda c: c.update(model_type="t5"))


@pytest.mark.parametrize("command", ["eval", "generate"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (unknown_rope, "`rope_type` is 'spiral'; known are default, linear, dynamic"),
        (missing_shard, "names 'two.safetensors', which is missing; copy or download"),
        (wrong_shape, "q_proj.weight` has shape (32, 8), but config.json asks for (32"),
        (other_architecture, "`model_type` is 't5'; models that run here are bert"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, command, damage, words):
    directory = shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    damage(directory)
    rest = ["--text=nothing.txt"] if command == "eval" else ["a prompt"]
    assert main([command, str(directory), *rest]) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"kashin \w+: [^\n]+\n", err)
    assert words in err
