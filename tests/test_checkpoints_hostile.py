"""Damaged and hostile checkpoints end in one line that names the file."""

import json
import re
import shutil

import pytest
from quantized_sources import (
    RTN_RULES,
    content,
    edit_header,
    edit_json,
    make_source,
    method,
)

from kashin_jax import Rules
from kashin_jax.cli import main
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import open_checkpoint
from kashin_jax.pipeline import (
    REPORT_NAME,
    dequantize_checkpoint,
    inspect_checkpoint,
    load_quantized,
    packed_layers,
    quantize_checkpoint,
)

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
LAYER = "model.decoder.layers.{}.{}.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    make_source(directory / "source")
    return quantize_checkpoint(
        directory / "source", directory / "q", RTN_RULES
    ).directory


@pytest.fixture
def quantized(whole, tmp_path):
    """A checkpoint that a test may damage."""
    return shutil.copytree(whole, tmp_path / "quantized")


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def message(function, *args, error=CheckpointError):
    with pytest.raises(error) as caught:
        function(*args)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000
    return text


def refused_by_all(directory, tmp_path, error=CheckpointError):
    """The message that loading, inspecting and undoing agree on."""
    text = message(load_quantized, directory, error=error)
    assert message(inspect_checkpoint, directory, error=error) == text
    target = tmp_path / "new"
    assert message(dequantize_checkpoint, directory, target, error=error) == text
    assert not target.exists()
    return text


@pytest.mark.parametrize("place", [-1, -3000, -70_000])
def test_a_flipped_bit_is_found_by_its_hash(quantized, capsys, place):
    assert inspect_checkpoint(quantized).damaged == ()
    flip(quantized / WEIGHTS, place)
    assert inspect_checkpoint(quantized).damaged == (WEIGHTS,)
    assert inspect_checkpoint(quantized, verify=False).damaged is None
    assert main(["inspect", str(quantized)]) == 1
    assert capsys.readouterr().err == f"Changed since they were written: {WEIGHTS}.\n"
    assert main(["inspect", str(quantized), "--no-verify"]) == 0


@pytest.mark.parametrize("place", [0, 3, 7, 8, 40])
def test_a_flipped_bit_in_a_header_is_an_error_or_found(quantized, place):
    flip(quantized / WEIGHTS, place)
    try:
        found = inspect_checkpoint(quantized)
    except CheckpointError as error:
        assert str(quantized) in str(error) and "\n" not in str(error)
    else:
        assert found.damaged == (WEIGHTS,)


def test_truncated_files_are_refused(quantized, tmp_path):
    path = quantized / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    assert WEIGHTS in refused_by_all(quantized, tmp_path)


@pytest.mark.parametrize("name", ["../q/model.safetensors", "/etc/passwd", "a/../b"])
def test_an_index_cannot_lead_out_of_its_directory(quantized, tmp_path, name):
    edit_json(
        quantized / INDEX,
        lambda c: c["weight_map"].update({"model.decoder.layers.0.fc1.bias": name}),
    )
    assert "not a .safetensors file of its own" in refused_by_all(quantized, tmp_path)


def test_a_description_of_another_shape_is_refused(quantized, tmp_path):
    def change(header):
        described = json.loads(header["__metadata__"]["kashin_jax"])
        layout = described["tensors"][LAYER.format(0, "fc1")]["layout"]
        layout["shape"] = [2**20, 2**20]
        header["__metadata__"]["kashin_jax"] = json.dumps(described)

    edit_header(quantized / WEIGHTS, change)
    assert "fc1" in refused_by_all(quantized, tmp_path)


@pytest.mark.parametrize("version", [0, 4, "1", None])
def test_another_schema_is_refused(quantized, tmp_path, version):
    edit_json(
        quantized / "config.json",
        lambda c: c["quantization_config"].update(schema_version=version),
    )
    assert "schema" in refused_by_all(quantized, tmp_path)


def test_lost_descriptions_are_noticed(quantized, tmp_path):
    edit_header(
        quantized / WEIGHTS, lambda header: header["__metadata__"].pop("kashin_jax")
    )
    assert "12 packed tensors" in refused_by_all(quantized, tmp_path)


def rename(directory, names):
    """Gives packed tensors other names, everywhere consistently."""
    pattern = re.compile("|".join(map(re.escape, names)))

    def renamed(text):
        return pattern.sub(lambda match: names[match[0]], text)

    def change(header):
        found = json.loads(renamed(json.dumps(header)))
        header.clear()
        header.update(found)

    edit_header(directory / WEIGHTS, change)
    index = directory / INDEX
    index.write_text(renamed(index.read_text()))


def test_packed_matrices_of_other_layers_do_not_fit(quantized):
    fc1, fc2 = (LAYER.format(0, name) for name in ("fc1", "fc2"))
    rename(quantized, {fc1: fc2, fc2: fc1})
    text = message(load_quantized, quantized)
    assert "decoder/layers/0/fc" in text and "written together" in text


def test_packed_matrices_of_no_layer_are_refused(quantized):
    rename(quantized, {LAYER.format(0, "fc1"): LAYER.format(7, "fc1")})
    assert "fc1" in message(load_quantized, quantized)


def test_packed_tensors_that_are_no_matrices_are_refused(quantized):
    rename(quantized, {LAYER.format(0, "fc1"): "model.decoder.layers.0.fc1.packed"})
    text = message(packed_layers, open_checkpoint(quantized))
    assert "no layer's matrix" in text


@pytest.mark.parametrize("function", ["load", "undo", "quantize"])
def test_what_other_libraries_quantized_is_refused(quantized, tmp_path, function):
    edit_json(
        quantized / "config.json",
        lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}),
    )
    text = {
        "load": lambda: message(load_quantized, quantized, error=UsageError),
        "undo": lambda: message(
            dequantize_checkpoint, quantized, tmp_path / "new", error=UsageError
        ),
        "quantize": lambda: message(
            quantize_checkpoint, quantized, tmp_path / "new", error=UsageError
        ),
    }[function]()
    assert "'gptq'" in text
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"tensor": "x"}', "[" * 5000, '{"tensor":1e999}', "\x00"]
)
def test_a_damaged_report_is_named(quantized, line):
    (quantized / REPORT_NAME).write_text(line)
    assert REPORT_NAME in message(inspect_checkpoint, quantized)


def test_without_its_report_a_checkpoint_is_whole(quantized):
    (quantized / REPORT_NAME).unlink()
    found = inspect_checkpoint(quantized)
    assert {row.relative_squared_error for row in found.tensors} == {None}
    assert found.bits_per_weight is not None and found.damaged == ()


def test_an_unfinished_run_is_no_checkpoint(quantized):
    for name in (INDEX, "config.json"):
        (quantized / name).unlink()
    shutil.move(quantized / WEIGHTS, quantized / "model-00001-of-00002.safetensors")
    assert "holds no weights" in message(load_quantized, quantized)
    assert "holds no weights" in message(inspect_checkpoint, quantized)


def test_nothing_is_written_beside_the_target(quantized, tmp_path):
    before = content(quantized)
    dequantize_checkpoint(quantized, tmp_path / "new")
    assert content(quantized) == before
    assert {path.name for path in tmp_path.iterdir()} == {"quantized", "new"}


def test_a_configuration_of_another_size_is_refused(quantized):
    edit_json(quantized / "config.json", lambda c: c.update(ffn_dim=64))
    assert "config.json asks for" in message(load_quantized, quantized)


def test_the_default_method_is_the_joint_one_at_four_bits():
    assert Rules().config == method("kashin-joint", effort="default", bits=4)
