"""The registry of architectures: names both ways, and one loader for all."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from decoders import make
from flax import nnx
from opt_checkpoints import GOLDEN as OPT_GOLDEN
from opt_checkpoints import HERE, assert_same, parameters
from quantized_sources import RTN_RULES

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import open_checkpoint
from kashin_jax.models import (
    LoadedClassifier,
    LoadedModel,
    load_classifier,
    load_model,
    load_opt,
    save_model,
)
from kashin_jax.models.architecture import abstract_state
from kashin_jax.models.registry import ARCHITECTURES, names_of, tied_copy
from kashin_jax.models.tensor_roles import FAMILIES, tensor_roles
from kashin_jax.pipeline import quantize_checkpoint

CLASSIFIERS = HERE / "golden" / "classifier"
ENCODERS = ("bert", "roberta", "distilbert")
DIRECTORIES = (
    {"opt": OPT_GOLDEN / "untied"}
    | {name: CLASSIFIERS / name for name in ENCODERS}
    | {name: HERE / "golden" / "decoder" / name for name in make.FAMILIES}
)


def test_every_architecture_is_tested_here():
    assert DIRECTORIES.keys() == ARCHITECTURES.keys()


def layer(stored, config):
    """The path and the orientation of a matrix."""
    role = tensor_roles(config).of(stored, (4, 6))
    assert role.is_matrix, stored
    return role.path, role.is_transposed


def config_of(name):
    content = json.loads((DIRECTORIES[name] / "config.json").read_text())
    return ARCHITECTURES[name].config.from_dict(content, name)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_published_names_lead_back_to_parameters_and_layers(name):
    entry, config = ARCHITECTURES[name], config_of(name)
    _, state = abstract_state(entry.model, config, np.dtype("float32"))
    paths = [path for path, _ in nnx.to_flat_state(state)]
    published = {path: entry.names.published(path) for path in paths}
    assert len(set(published.values())) == len(paths) > 14
    for path, stored in published.items():
        assert entry.names.parse(stored).name == entry.names.stem(path)
        if path[-1] in ("kernel", "embedding"):
            # GPT-2's Conv1D.
            is_transposed = path[-1] == "kernel" and name != "gpt2"
            expected = ("/".join(map(str, path[:-1])), is_transposed)
            assert layer(stored, {"model_type": name}) == expected


@pytest.mark.parametrize("name", DIRECTORIES)
def test_one_loader_and_one_saver_do_for_all(name, tmp_path):
    loaded = load_model(open_checkpoint(DIRECTORIES[name]))
    kind = LoadedClassifier if name in ENCODERS else LoadedModel
    assert isinstance(loaded, kind) and loaded.config == config_of(name)
    expected = parameters(loaded.model)
    if load := {"opt": load_opt, "bert": load_classifier}.get(name):
        assert_same(parameters(load(DIRECTORIES[name]).model), expected)
    save_model(loaded.model, loaded.config, tmp_path, dtype="float32")
    again = load_model(tmp_path)
    assert again.config == loaded.config
    assert_same(parameters(again.model), expected)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == name and len(written["architectures"]) == 1


def test_layers_of_unknown_architectures_are_called_by_their_stored_names():
    unknown = {"model_type": "unheard-of"}
    for stored, expected in [
        ("model.layers.0.self_attn.q_proj.weight", ("layers/0/self_attn/q_proj", True)),
        ("transformer.wte.weight", ("transformer/wte", False)),
        ("encoder/block_0/dense/kernel", ("encoder/block_0/dense", False)),
    ]:
        assert layer(stored, unknown) == expected
    assert not tensor_roles(unknown).of("model.norm.bias", (4,)).is_matrix
    gpt = layer("h.0.attn.c_attn.weight", {"model_type": "imagegpt"})
    assert gpt == ("h/0/attn/c_attn", False)
    assert names_of("unheard-of").published(("lm_head", "kernel")) == "lm_head.weight"


@pytest.mark.parametrize("model_type", ["mamba", None, ["opt"]])
def test_an_architecture_that_is_not_registered_is_refused(tmp_path, model_type):
    shutil.copytree(OPT_GOLDEN / "prenorm", tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    content = json.loads(path.read_text()) | {"model_type": model_type}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="distilbert, opt, roberta, llama"):
        load_model(path.parent)


def test_a_head_of_a_language_model_is_refused():
    with pytest.raises(UsageError, match="`head`='rte' is for classifiers"):
        load_model(OPT_GOLDEN / "prenorm", head="rte")


def test_what_is_packed_stays_a_shape_and_is_loaded_by_load_quantized(tmp_path):
    quantize_checkpoint(OPT_GOLDEN / "prenorm", tmp_path / "q", RTN_RULES)
    with pytest.raises(CheckpointError, match="`load_quantized`") as caught:
        load_opt(tmp_path / "q")
    assert "\n" not in str(caught.value) and str(tmp_path / "q") in str(caught.value)
    model = load_model(tmp_path / "q").model
    kernel = model.decoder.layers[0].fc1.kernel.get_value()
    bias = model.decoder.layers[0].fc1.bias.get_value()
    assert not isinstance(kernel, jnp.ndarray) and kernel.shape == (32, 48)
    assert isinstance(bias, jnp.ndarray)


def test_the_weights_of_another_architecture_are_refused(tmp_path):
    loaded = load_opt(OPT_GOLDEN / "prenorm")
    save_model(loaded.model, loaded.config, tmp_path, dtype="float32")
    shutil.copy(CLASSIFIERS / "bert" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="is not part of the model"):
        load_model(tmp_path)


def test_conv1d_is_untransposed_by_name_and_family_and_nothing_else():
    """Heads of GPT-2 are ordinary linears; so is all of another family's c_attn."""
    conv, head = "encoder.h.0.attn.c_attn.weight", "predict_action.0.weight"
    transformer = {"model_type": "decision_transformer"}
    assert not layer(conv, transformer)[1] and layer(head, transformer)[1]
    parts = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
    assert not layer(conv, parts)[1]
    assert layer(conv, {"model_type": "gpt_bigcode"})[1]
    neox = {"model_type": "gpt_neox"}
    assert not layer("gpt_neox.embed_in.weight", neox)[1]
    assert layer("embed_out.weight", neox)[1]


def test_what_runs_here_has_no_kinds_of_its_own():
    """A model in memory knows no family: both have to be quantized alike."""
    for name in ARCHITECTURES.keys() & FAMILIES.keys():
        row = FAMILIES[name]
        assert not (row.kinds or row.matrices or row.experts), name


@pytest.mark.parametrize(("model_type", "embedding", "is_tied"), [
    ("gemma2", "model.embed_tokens", True), ("llama", "model.embed_tokens", False),
    ("gpt2", "transformer.wte", True), ("opt", "model.decoder.embed_tokens", True),
])  # fmt: skip
def test_a_head_is_tied_by_the_familys_default(model_type, embedding, is_tied):
    """Published configurations leave the field out where it has the default."""
    stored = [f"{embedding}.weight", "lm_head.weight"]
    found = tied_copy(stored, {"model_type": model_type})
    assert found == (("lm_head.weight", stored[0]) if is_tied else None)
    chosen = {"model_type": model_type, "tie_word_embeddings": not is_tied}
    assert (tied_copy(stored, chosen) is None) == is_tied
