"""Quantized classifiers on disk: what is written is read, what is damaged is named."""

import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from tiny_finetuning import write_model

from experiments.methods import METHODS
from experiments.quantized_checkpoint import load_quantized, save_quantized
from kashin_jax import BasisSpec, quantize
from kashin_jax.errors import CheckpointError, NonFiniteError
from kashin_jax.layers import replace_kernels, selected_kernels
from kashin_jax.models.classifier_loading import load_classifier

NAMES = [
    "kashin", "uniform", "k-means", "rtn-g128", "nf4-g64", "hqq-g64", "rotate-rtn-g64",
    "k-means-channel", "rotate-k-means",
]  # fmt: skip
CODES = "bert.pooler.dense.weight.packed_codes"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_model(directory, id2label=("negative", "positive"))
    return load_classifier(directory)


def packed(loaded, name, bits=4):
    config = METHODS[name].make(bits, BasisSpec.parse("hadamard"), 1e-3, 50)
    return {
        path: quantize(kernel, config, jax.random.key(0))[0]
        for path, kernel in selected_kernels(loaded.model).items()
    }


def save(loaded, tensors, directory, **options):
    save_quantized(
        directory, loaded.model, tensors, loaded.config,
        tokenizer=loaded.directory, described={"method": "x", "bits": 4}, **options,
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


def rewrite(directory, change):
    path = directory / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def message(directory):
    with pytest.raises(CheckpointError) as caught:
        load_quantized(directory)
    text = str(caught.value)
    assert "\n" not in text
    assert str(directory) in text
    return text


@pytest.mark.parametrize("name", NAMES)
def test_packed_tensors_come_back_with_every_bit(loaded, tmp_path, name):
    tensors = packed(loaded, name)
    found = load_quantized(save(loaded, tensors, tmp_path, dtype="float32"))
    assert found.tensors.keys() == tensors.keys()
    for path, tensor in tensors.items():
        assert jax.tree.structure(found.tensors[path]) == jax.tree.structure(tensor)
        for ours, theirs in zip(
            jax.tree.leaves(found.tensors[path]), jax.tree.leaves(tensor), strict=True
        ):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
    kernels = {path: tensor.decode() for path, tensor in tensors.items()}
    expected = nnx.state(replace_kernels(loaded.model, kernels))
    decoded = {path: tensor.decode() for path, tensor in found.tensors.items()}
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(replace_kernels(found.model, decoded))),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_what_the_maker_said_is_kept(written, loaded):
    found = load_quantized(written)
    assert found.described == {"method": "x", "bits": 4}
    assert found.config == loaded.config
    assert (written / "tokenizer.json").read_bytes() == (
        loaded.directory / "tokenizer.json"
    ).read_bytes()


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
    assert abs(sizes[1] - sizes[0] - weights * 2 / 8 - centroids) < 100


def test_parameters_that_overflow_are_named_and_nothing_is_written(loaded, tmp_path):
    graphdef, state = nnx.split(loaded.model)
    huge = nnx.merge(graphdef, jax.tree.map(lambda x: x + 1e6, state))
    with pytest.raises(NonFiniteError, match="is not finite in float16"):
        save_quantized(
            tmp_path / "q", huge, {}, loaded.config,
            tokenizer=loaded.directory, described={},
        )  # fmt: skip
    assert not (tmp_path / "q").exists()


def test_a_dense_checkpoint_is_refused(loaded):
    assert "experiments.glue --save=" in message(loaded.directory)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["quantization"]["layers"]["pooler"].update(type="Pickle"),
        lambda c: c["quantization"]["layers"]["pooler"]["layout"].update(bits=3),
        lambda c: c["quantization"]["layers"]["pooler"]["layout"].update(
            shape=[32, 16]
        ),
        lambda c: c["quantization"]["layers"]["pooler"]["layout"].update(basis="magic"),
        lambda c: c["quantization"]["layers"]["pooler"]["layout"].pop("dtype"),
        lambda c: c["quantization"]["layers"].pop("pooler"),
        lambda c: c["quantization"]["layers"].update(
            other=c["quantization"]["layers"]["pooler"]
        ),
        lambda c: c.update(hidden_size=64),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(written, change):
    edit(written, change)
    assert "do not belong together" in message(written)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(CODES),
        lambda t: t.update({CODES: t[CODES][:-1]}),
        lambda t: t.update({"more": np.zeros(3)}),
        lambda t: t.pop("classifier.bias"),
        lambda t: t.update({"classifier.bias": np.zeros(5, np.float16)}),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(written, change):
    rewrite(written, change)
    assert "do not belong together" in message(written)


def test_a_truncated_file_is_named(written):
    path = written / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    assert "truncated or damaged" in message(written)
