"""Classifier checkpoints: every layout is read, every defect is named, heads apart."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict

from kashin_jax.errors import CheckpointError, NonFiniteError, UsageError
from kashin_jax.models import head_names, load_classifier
from kashin_jax.models.saving import save_classifier

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden" / "classifier"
MINILM = HERE.parent / "experiments" / "assets" / "minilm-glue"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
NORM = "bert.embeddings.LayerNorm"


def parameters(model):
    return {
        ".".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def torch_tensors(name="bert"):
    """A golden checkpoint as PyTorch would name and lay it out."""
    path = GOLDEN / name / "flax_model.msgpack"
    result = {}
    for key, value in flatten_dict(msgpack_restore(path.read_bytes())).items():
        leaf = "bias" if key[-1] == "bias" else "weight"
        value = value.T if key[-1] == "kernel" else value
        result[".".join((*key[:-1], leaf))] = np.array(value, np.float32, order="C")
    return result


@pytest.fixture
def directory(tmp_path):
    shutil.copy(GOLDEN / "bert" / "config.json", tmp_path)
    return tmp_path


def write(directory, tensors, name="model.safetensors"):
    safetensors.numpy.save_file(tensors, directory / name, {"format": "pt"})
    return directory


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def message(directory, error=CheckpointError, **options):
    with pytest.raises(error) as caught:
        load_classifier(directory, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def original():
    return parameters(load_classifier(GOLDEN / "bert").model)


def test_pytorchs_layout_gives_the_same_parameters(directory, original):
    write(directory, torch_tensors())
    assert_same(parameters(load_classifier(directory).model), original)


def test_gamma_and_beta_of_the_first_checkpoints_are_read(directory, original):
    tensors = torch_tensors()
    for old, new in (("weight", "gamma"), ("bias", "beta")):
        tensors[f"{NORM}.{new}"] = tensors.pop(f"{NORM}.{old}")
    write(directory, tensors)
    assert_same(parameters(load_classifier(directory).model), original)


def test_buffers_and_pretraining_heads_are_left_alone(directory, original):
    extra = {
        "bert.embeddings.position_ids": np.arange(40)[None],
        "cls.predictions.bias": np.zeros(61, np.float32),
        "cls.seq_relationship.weight": np.zeros((2, 32), np.float32),
    }
    write(directory, torch_tensors() | extra)
    assert_same(parameters(load_classifier(directory).model), original)


@pytest.mark.parametrize("name", ["bert", "bert-regression", "roberta", "distilbert"])
def test_saving_and_loading_returns_the_same_model(name, tmp_path):
    loaded = load_classifier(GOLDEN / name)
    save_classifier(
        loaded.model, loaded.config, tmp_path, extra={"finetuning_task": "rte"}
    )
    again = load_classifier(tmp_path)
    assert_same(parameters(again.model), parameters(loaded.model))
    assert again.config == loaded.config
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["finetuning_task"] == "rte"
    assert content["label2id"] == {x: i for i, x in enumerate(loaded.config.id2label)}


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_saved_names_are_those_that_transformers_expects(name, tmp_path):
    loaded = load_classifier(GOLDEN / name)
    save_classifier(loaded.model, loaded.config, tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        names = set(file.keys())
    source = GOLDEN / name
    if (source / "flax_model.msgpack").exists():
        expected = set(torch_tensors(name))
    else:
        flax = safetensors.numpy.load_file(source / "model.safetensors")
        expected = {
            key.replace("kernel", "weight")
            .replace("scale", "weight")
            .replace("_embeddings.embedding", "_embeddings.weight")
            for key in flax
        }
    assert names == expected


def test_a_quantized_model_is_not_saved_as_a_dense_one(tmp_path):
    loaded = load_classifier(GOLDEN / "bert")
    other = load_classifier(GOLDEN / "distilbert")
    with pytest.raises(UsageError, match="save dense models only"):
        save_classifier(other.model, loaded.config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_heads_of_the_embedded_checkpoint_share_their_encoder():
    assert head_names(MINILM) == ("cola", "mrpc", "rte", "sst2", "stsb")
    sst2, stsb = (load_classifier(MINILM, head=head) for head in ("sst2", "stsb"))
    assert sst2.config.id2label == ("negative", "positive")
    assert not sst2.config.is_regression
    assert (stsb.config.num_labels, stsb.config.is_regression) == (1, True)
    left, right = parameters(sst2.model), parameters(stsb.model)
    different = {key for key in left if not np.array_equal(left[key], right[key])}
    assert different == {"classifier.out_proj.bias", "classifier.out_proj.kernel"}


def test_a_checkpoint_with_one_head_names_none():
    assert head_names(GOLDEN / "bert") == ()


@pytest.mark.parametrize("head", [None, "qnli"])
def test_a_head_has_to_be_chosen_among_those_there_are(head):
    text = message(MINILM, head=head)
    assert "cola, mrpc, rte, sst2, stsb" in text


def test_a_head_is_not_chosen_where_there_is_one():
    assert "has no head 'rte'" in message(GOLDEN / "bert", head="rte")


def test_a_fresh_head_leaves_the_encoder_as_it_is(original):
    labels = ("a", "b", "c", "d")
    fresh, again = (
        load_classifier(GOLDEN / "bert", labels=labels, key=jax.random.key(3))
        for _ in range(2)
    )
    assert fresh.config.id2label == labels
    found = parameters(fresh.model)
    assert_same(parameters(again.model), found)
    assert found["classifier.out_proj.kernel"].shape == (32, 4)
    assert not found["classifier.out_proj.bias"].any()
    for path in original:
        if not path.startswith("classifier"):
            np.testing.assert_array_equal(found[path], original[path], err_msg=path)


def test_other_keys_draw_other_heads():
    models = [
        load_classifier(GOLDEN / "roberta", labels=(), key=jax.random.key(i))
        for i in range(2)
    ]
    assert all(m.config.is_regression for m in models)
    kernels = [
        parameters(m.model)[f"classifier.{name}.kernel"]
        for m in models
        for name in ("dense", "out_proj")
    ]
    assert kernels[1].shape == (32, 1)
    assert not np.array_equal(kernels[0], kernels[2])
    assert 0.01 < kernels[0].std() < 0.03


@pytest.mark.parametrize("with_prefix", [True, False], ids=["prefix", "bare"])
def test_a_bare_encoder_takes_a_fresh_head(directory, original, with_prefix):
    tensors = {
        name if with_prefix else name.removeprefix("bert."): value
        for name, value in torch_tensors().items()
        if not name.startswith(("classifier", "bert.pooler"))
    }
    write(directory, tensors)
    assert "an encoder without a head" in message(directory)
    model = load_classifier(directory, labels=("x", "y")).model
    found = parameters(model)
    np.testing.assert_array_equal(
        found["encoder.layers.0.query.kernel"],
        original["encoder.layers.0.query.kernel"],
    )
    assert found["pooler.kernel"].shape == (32, 32)


def test_head_and_labels_exclude_each_other():
    assert "exclude each other" in message(
        MINILM, UsageError, head="rte", labels=("a", "b")
    )


def test_a_missing_tensor_is_named_as_published(directory):
    tensors = torch_tensors()
    del tensors[QUERY]
    write(directory, tensors)
    text = message(directory)
    assert QUERY in text
    assert "1 tensors are missing" in text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (QUERY, np.zeros((32, 31), np.float32), "has shape (32, 31)"),
        (QUERY, np.full((32, 32), np.nan, np.float32), "NaN or infinite"),
        (QUERY, np.zeros((32, 32), np.int32), "stored as int32"),
        ("bert.more.weight", np.zeros(3, np.float32), "is not part of the model"),
    ],
)
def test_a_defective_tensor_is_named(directory, name, value, words):
    write(directory, torch_tensors() | {name: value})
    error = NonFiniteError if "NaN" in words else CheckpointError
    text = message(directory, error)
    assert name in text
    assert words in text


def test_a_head_with_another_number_of_outputs_than_its_labels_is_refused(directory):
    write(directory, torch_tensors())
    edit_config(directory, id2label={"0": "no", "1": "yes"})
    text = message(directory)
    assert "classifier" in text
    assert "config.json asks for (2" in text


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ([], "not an object of objects"),
        ({"rte": ["a"]}, "not an object of objects"),
        ({"rte": {"labels": "yes"}}, "expected a list"),
        ({"rte": {}}, "neither `labels` nor `problem_type`"),
        ({"rte": {"labels": ["a", "b"]}}, "heads.safetensors: is missing"),
    ],
)
def test_a_damaged_description_of_heads_is_refused(directory, heads, words):
    write(directory, {k: v for k, v in torch_tensors().items() if "classif" not in k})
    edit_config(directory, glue_heads=heads)
    assert words in message(directory, head="rte")


def test_a_truncated_file_of_heads_is_named(tmp_path):
    for file in MINILM.iterdir():
        if file.name != "heads.safetensors":
            (tmp_path / file.name).symlink_to(file)
    whole = (MINILM / "heads.safetensors").read_bytes()
    (tmp_path / "heads.safetensors").write_bytes(whole[:-100])
    assert "heads.safetensors: is truncated" in message(tmp_path, head="rte")


def test_an_unsupported_dtype_is_refused():
    with pytest.raises(UsageError, match="`dtype` must be one of"):
        load_classifier(GOLDEN / "bert", dtype=jnp.int8)
