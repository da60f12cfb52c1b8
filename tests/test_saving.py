"""Saving: what was loaded comes back, whole or not at all."""

import json

import jax.numpy as jnp
import pytest
from flax import nnx
from opt_checkpoints import FC1, GOLDEN, WIKI, assert_same, parameters

from kashin_jax.errors import CheckpointError, NonFiniteError, UsageError
from kashin_jax.io import TensorWriter
from kashin_jax.models.loading import load_opt
from kashin_jax.models.saving import save_opt


@pytest.mark.parametrize("name", ["prenorm", "postnorm", "untied"])
def test_what_is_saved_in_full_precision_loads_back_unchanged(tmp_path, name):
    loaded = load_opt(str(GOLDEN / name))
    save_opt(loaded.model, loaded.config, tmp_path / "new", dtype="float32")
    again = load_opt(str(tmp_path / "new"))
    assert again.config == loaded.config
    assert again.stored_dtype == "float32"
    assert_same(parameters(again.model), parameters(loaded.model))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_the_embedded_checkpoint_saves_to_the_very_same_file(tmp_path):
    loaded = load_opt(str(WIKI))
    assert loaded.stored_dtype == "float16"
    save_opt(loaded.model, loaded.config, tmp_path)
    saved = (tmp_path / "model.safetensors").read_bytes()
    assert saved == (WIKI / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((WIKI / "config.json").read_text())
    shared = config.keys() & published.keys()
    assert {"model_type", "torch_dtype", "hidden_size"} <= shared
    assert {k: config[k] for k in shared} == {k: published[k] for k in shared}


def test_saving_over_a_checkpoint_replaces_it_and_keeps_the_rest(tmp_path):
    loaded = load_opt(str(GOLDEN / "prenorm"))
    (tmp_path / "model.safetensors").write_bytes(b"old")
    (tmp_path / "tokenizer.json").write_text("{}")
    save_opt(loaded.model, loaded.config, str(tmp_path), dtype="bfloat16")
    assert load_opt(str(tmp_path)).stored_dtype == "bfloat16"
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


class Packed(nnx.Module):
    """Stands for a quantized layer: not the parameters of a linear."""

    def __init__(self):
        self.codes = nnx.Param(jnp.zeros(3, jnp.uint8))


def test_a_model_that_cannot_be_saved_leaves_the_old_checkpoint_alone(tmp_path):
    loaded = load_opt(str(GOLDEN / "prenorm"))
    save_opt(loaded.model, loaded.config, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    kernel = loaded.model.decoder.layers[1].fc1.kernel
    kernel[...] = kernel[...].at[0, 0].set(1e6)
    with pytest.raises(NonFiniteError, match=f"`{FC1}` is not finite in float16"):
        save_opt(loaded.model, loaded.config, tmp_path)
    loaded.model.decoder.layers[1].fc1 = Packed()
    with pytest.raises(UsageError, match=r"`decoder.layers.1.fc1.\w+`; save dense"):
        save_opt(loaded.model, loaded.config, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failing_disk_leaves_no_partial_file(tmp_path, monkeypatch):
    loaded = load_opt(str(GOLDEN / "prenorm"))

    def failing(writer, name, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorWriter, "append", failing)
    with pytest.raises(CheckpointError, match="cannot be written .No space left"):
        save_opt(loaded.model, loaded.config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    loaded = load_opt(str(GOLDEN / "prenorm"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/new: cannot be written") as caught:
        save_opt(loaded.model, loaded.config, tmp_path / "file" / "new")
    assert "\n" not in str(caught.value)


def test_a_config_of_other_sizes_is_not_saved(tmp_path):
    loaded = load_opt(str(GOLDEN / "prenorm"))
    other = load_opt(str(GOLDEN / "postnorm")).config
    with pytest.raises(UsageError, match="`model` and `config` differ in parameter"):
        save_opt(loaded.model, other, tmp_path)
    assert list(tmp_path.iterdir()) == []
