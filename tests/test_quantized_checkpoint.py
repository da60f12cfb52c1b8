"""Quantized classifiers on disk: in the library's format, read by all that knows it."""

import contextlib
import io
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed_matrices import random_tensor, random_words
from tiny_finetuning import write_model

from experiments.classification.quantized import load_classifier_packed, save_quantized
from experiments.common.checkpoints import dense_directory, is_quantized
from experiments.common.methods import METHODS
from experiments.common.quantized_layers import decode
from kashin_jax import BasisSpec, Rule, Rules, quantize, stored_bits
from kashin_jax.cli import main as kashin_main
from kashin_jax.errors import CheckpointError, NonFiniteError, UsageError
from kashin_jax.models import load_classifier
from kashin_jax.pipeline import (
    dequantize_checkpoint,
    inspect_checkpoint,
    load_quantized,
    quantize_checkpoint,
    replace_kernels,
    rules_to_json,
    selected_kernels,
)

NAMES = [
    "kashin", "kashin-joint", "uniform", "k-means", "rtn-g128", "nf4-g64", "hqq-g64",
    "rotate-rtn-g64", "k-means-channel", "rotate-k-means", "kashin-dct",
]  # fmt: skip


def config_of(name, bits=4):
    return METHODS[name].make(bits, BasisSpec.parse("hadamard"), 1e-3, 50)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_model(directory, id2label=("negative", "positive"))
    return load_classifier(directory)


def packed(loaded, name, bits=4):
    """Random codes: what a coder would find makes no difference to a file."""
    make = random_words if name == "kashin-joint" else random_tensor
    config = config_of(name, bits)
    return {
        path: make(config, kernel.shape)
        for path, kernel in selected_kernels(loaded.model).items()
    }


def save(loaded, tensors, directory, name="kashin", **options):
    save_quantized(
        directory, loaded.model, tensors, loaded.config, tokenizer=loaded.directory,
        rules=Rules(config=config_of(name)), seed=3, **options,
    )  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def kashin(loaded):
    return packed(loaded, "kashin")


@pytest.fixture
def written(loaded, kashin, tmp_path):
    return save(loaded, kashin, tmp_path / "q")


def edit(directory, change):
    path = directory / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def message(directory, error=CheckpointError):
    with pytest.raises(error) as caught:
        load_classifier_packed(directory)
    text = str(caught.value)
    assert "\n" not in text
    assert str(directory) in text
    return text


def assert_equal(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_packed_tensors_come_back_with_every_bit(loaded, tmp_path, name):
    tensors = packed(loaded, name)
    found = load_classifier_packed(save(loaded, tensors, tmp_path, dtype="float32"))
    assert found.tensors.keys() == tensors.keys()
    for path, tensor in tensors.items():
        assert type(found.tensors[path]) is type(tensor)
        assert stored_bits(found.tensors[path]) == stored_bits(tensor)
        assert_equal(found.tensors[path], tensor)
    kernels = {path: decode(tensor) for path, tensor in tensors.items()}
    expected = replace_kernels(loaded.model, kernels)
    decoded = found.decoded().model
    assert nnx.graphdef(decoded) == nnx.graphdef(expected)
    assert_equal(nnx.state(decoded), nnx.state(expected))


def test_what_was_asked_for_and_what_a_model_needs_are_kept(written, loaded):
    found = load_classifier_packed(written)
    assert rules_to_json(found.rules) == rules_to_json(
        Rules(config=config_of("kashin"))
    )
    assert found.seed == 3
    assert found.described["method"] == "kashin"
    assert found.described["bits"] == 4
    assert found.loaded.config == loaded.config
    assert found.loaded.config.id2label == ("negative", "positive")
    assert found.loaded.stored_dtype == "float16"
    assert (written / "tokenizer.json").read_bytes() == (
        loaded.directory / "tokenizer.json"
    ).read_bytes()


def test_the_library_reads_verifies_and_undoes_it(written, kashin, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert kashin_main(["inspect", str(written)]) == 0
    assert "Every file is as it was written." in printed.getvalue()
    found = inspect_checkpoint(written)
    assert found.damaged == ()
    assert found.packed_weights == sum(np.prod(t.shape) for t in kashin.values())
    model = load_quantized(written).model
    ids = jnp.arange(4, 14, dtype=jnp.int32).reshape(2, 5)
    decoded = load_classifier_packed(written).decoded().model
    np.testing.assert_allclose(model(ids), decoded(ids), rtol=0, atol=1e-5)
    with contextlib.redirect_stdout(io.StringIO()):
        back = str(tmp_path / "back")
        assert kashin_main(["dequantize", str(written), back]) == 0
    again = jax.tree.leaves(nnx.state(load_classifier(back).model))
    for one, other in zip(again, jax.tree.leaves(nnx.state(decoded)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


@pytest.mark.oracle
def test_transformers_answers_as_the_undone_checkpoint(written, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    dequantize_checkpoint(written, tmp_path / "back")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "back", dtype=torch.float32
    )
    ids = np.arange(4, 14).reshape(2, 5)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    ours = load_classifier_packed(written).decoded().model(jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_what_kashin_quantize_writes_is_read_too(loaded, tmp_path):
    rules = Rules(config=config_of("rtn-g128"))
    quantize_checkpoint(loaded.directory, tmp_path / "q", rules)
    found = load_classifier_packed(tmp_path / "q")
    kernels = selected_kernels(loaded.model)
    assert found.tensors.keys() == kernels.keys()
    for path, kernel in kernels.items():
        tensor, _ = quantize(kernel, rules.config, jax.random.key(0))
        assert_equal(found.tensors[path], tensor)


def test_packed_embeddings_are_refused(loaded, tmp_path):
    rules = Rules(rules=[Rule("word_embeddings", config_of("rtn-g128"))])
    quantize_checkpoint(loaded.directory, tmp_path / "q", rules)
    assert "word_embeddings/table` packed" in message(tmp_path / "q")


def test_files_are_as_open_as_the_umask_says(loaded, kashin, tmp_path):
    usual = os.umask(0o027)
    try:
        save(loaded, kashin, tmp_path / "q")
    finally:
        os.umask(usual)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "q").iterdir()} == {
        0o640
    }


def test_the_file_is_as_small_as_the_stored_bits_say(loaded, kashin, tmp_path):
    sizes = [
        (save(loaded, tensors, tmp_path / str(i)) / "model.safetensors").stat().st_size
        for i, tensors in enumerate((packed(loaded, "kashin", 2), kashin))
    ]
    weights = sum(kernel.size for kernel in selected_kernels(loaded.model).values())
    centroids = len(kashin) * (16 - 4) * 8
    assert abs(sizes[1] - sizes[0] - weights * 2 / 8 - centroids) < 200


def test_parameters_that_overflow_are_named_and_nothing_is_written(loaded, tmp_path):
    graphdef, state = nnx.split(loaded.model)
    huge = nnx.merge(graphdef, jax.tree.map(lambda x: x + 1e6, state))
    with pytest.raises(NonFiniteError, match="is not finite in float16"):
        save_quantized(
            tmp_path / "q", huge, {}, loaded.config,
            tokenizer=loaded.directory, rules=Rules(), seed=0,
        )  # fmt: skip
    assert not (tmp_path / "q").exists()


def test_a_dense_checkpoint_is_refused(loaded):
    assert not is_quantized(loaded.directory)
    assert "experiments.glue --save=" in message(loaded.directory)


def test_where_a_dense_one_is_needed_a_quantized_one_is_refused(written, loaded):
    assert dense_directory(loaded.directory, instead="") == loaded.directory
    with pytest.raises(UsageError) as caught:
        dense_directory(written, instead="Use another program.")
    text = str(caught.value)
    assert f"`--model={written}` is quantized already" in text
    assert "`kashin dequantize`. Use another program." in text


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["quantization_config"].pop("rules"),
        lambda c: c["quantization_config"].pop("seed"),
        lambda c: c["quantization_config"].update(seed="x"),
        lambda c: c["quantization_config"]["rules"]["config"].update(method="magic"),
    ],
)
def test_a_checkpoint_that_does_not_say_its_rules_is_refused(written, change):
    edit(written, change)
    assert "does not say by what rules" in message(written)


def test_the_quantization_of_another_library_is_named(written):
    edit(written, lambda c: c["quantization_config"].update(quant_method="gptq"))
    assert "'gptq' of another library" in message(written, UsageError)


def test_an_architecture_that_does_not_fit_the_weights_is_refused(written):
    edit(written, lambda c: c.update(hidden_size=64))
    assert "config.json asks for" in message(written)


def test_a_truncated_file_is_named(written):
    path = written / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    assert "model.safetensors" in message(written)
