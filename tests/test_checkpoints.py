"""A checkpoint quantized on disk is the model quantized in memory."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from opt_checkpoints import WIKI
from quantized_sources import RTN_RULES, edit_json, every_method, make_source, method
from tiny_classifier import make_classifier

from kashin_jax import Rule, Rules, quantize_model
from kashin_jax.errors import CheckpointError
from kashin_jax.io import open_checkpoint, save_checkpoint
from kashin_jax.layers import QuantizedEmbed, QuantizedLinear
from kashin_jax.methods import config_to_json, method_names
from kashin_jax.models import load_classifier
from kashin_jax.models.loading import load_opt
from kashin_jax.pipeline import (
    REPORT_NAME,
    dequantize_checkpoint,
    inspect_checkpoint,
    load_quantized,
    packed_layers,
    plan_checkpoint,
    quantize_checkpoint,
    selected_kernels,
)
from kashin_jax.tensors import stored_bits

SEED = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("checkpoints") / "source")


def packed_in(model):
    """The packed matrices of a model by path of their layer."""
    found = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, QuantizedLinear | QuantizedEmbed):
            variable = node.kernel if isinstance(node, QuantizedLinear) else node.table
            found["/".join(map(str, path))] = variable.get_value()
    return found


def assert_same_layers(found, expected):
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        # What was stored in half precision is loaded in single.
        layout = dataclasses.replace(found[path].layout, dtype=tensor.layout.dtype)
        assert layout == tensor.layout
        for ours, theirs in zip(
            jax.tree.leaves(found[path]), jax.tree.leaves(tensor), strict=True
        ):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs, err_msg=path)


class Both:
    """One checkpoint quantized on disk, and in memory."""

    def __init__(self, source, target, rules, load):
        self.result = quantize_checkpoint(source, target, rules, seed=SEED)
        self.target, self.rules = target, rules
        self.loaded = load_quantized(target)
        self.dense = load(source)
        self.in_memory, self.reports = quantize_model(
            self.dense.model, key=jax.random.key(SEED), rules=rules
        )


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    directory = tmp_path_factory.mktemp("opt")
    # In the type that it is loaded in, so that both compile the same programs.
    source = make_source(directory / "source", dtype="float32")
    paths = sorted(selected_kernels(load_opt(source).model), key=len)[::-1]
    return Both(source, directory / "quantized", every_method(paths), load_opt)


def test_every_method_finds_the_codes_on_disk_that_it_finds_in_memory(opt):
    reports = opt.result.reports.values()
    used = {config_to_json(report.config)["method"] for report in reports}
    assert used == set(method_names())
    found = packed_layers(open_checkpoint(opt.target))
    assert len(found) == 12
    assert_same_layers(found, packed_in(opt.in_memory))


def test_the_report_on_disk_is_that_of_quantize_model(opt):
    lines = (opt.target / REPORT_NAME).read_text().splitlines()
    records = {record["path"]: record for record in map(json.loads, lines)}
    assert [
        {"tensor": name, **report.to_json()}
        for name, report in opt.result.reports.items()
    ] == list(records.values())
    assert records.keys() == opt.reports.keys()
    for path, report in opt.reports.items():
        expected = float(report.relative_squared_error)
        assert records[path]["relative_squared_error"] == expected
        assert 0 < expected < 0.1
    assert "residual" in next(r for r in records.values() if r["method"] == "kashin")


@jax.jit(static_argnums=0)
def logits(graphdef, state, inputs):
    return nnx.merge(graphdef, state)(*inputs)


def outputs(model, *inputs):
    graphdef, state = nnx.split(model)
    return np.asarray(logits(graphdef, state, inputs))


def test_a_quantized_opt_has_the_logits_of_quantizing_in_memory(opt):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 320, (2, 33)))
    found = outputs(opt.loaded.model, tokens)
    np.testing.assert_array_equal(found, outputs(opt.in_memory, tokens))
    assert np.abs(found - outputs(opt.dense.model, tokens)).max() > 1e-3


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bert")
    source = make_classifier(directory / "source", "sst2", intermediate_size=128)
    rules = Rules(config=method("kashin-joint"), rules=[Rule("pooler", method("nf4"))])
    return Both(source, directory / "quantized", rules, load_classifier)


def test_a_quantized_classifier_is_the_one_quantized_in_memory(classifier):
    found = packed_layers(open_checkpoint(classifier.target))
    assert "pooler" in found and len(found) == 13
    expected = packed_in(classifier.in_memory)
    assert found.keys() == expected.keys()
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 44, (3, 16)))
    mask = jnp.ones_like(ids)
    ours = outputs(classifier.loaded.model, ids, mask)
    np.testing.assert_array_equal(ours, outputs(classifier.in_memory, ids, mask))
    assert not np.array_equal(ours, outputs(classifier.dense.model, ids, mask))


def test_embeddings_that_a_rule_names_are_quantized_as_in_memory(source, tmp_path):
    rules = Rules(config=method("rtn"), rules=[Rule("embed_tokens", method("nf4"))])
    both = Both(source, tmp_path / "q", rules, load_opt)
    found = packed_layers(open_checkpoint(both.target))
    assert found["decoder/embed_tokens"].shape == (320, 64)
    assert_same_layers(found, packed_in(both.in_memory))
    tokens = jnp.arange(20)[None]
    np.testing.assert_array_equal(
        outputs(both.loaded.model, tokens), outputs(both.in_memory, tokens)
    )


EMBEDDING = "model.decoder.embed_tokens.weight"


def with_tied_head(source, directory, head="lm_head.weight", change=0):
    """A copy of a checkpoint that also stores the head that config.json ties."""
    before = open_checkpoint(source)
    tensors = {name: before.load(name) for name in before.names()}
    copy = tensors[EMBEDDING] + np.float16(change)
    tensors[head] = np.ascontiguousarray(copy.T if "kernel" in head else copy)
    save_checkpoint(directory, tensors, before.config)
    return directory


@pytest.mark.parametrize(
    ("head", "named"),
    [
        ("lm_head.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("lm_head.kernel", "embed_tokens|lm_head"),
    ],
)
def test_a_tied_head_that_is_stored_too_is_packed_once_and_stays_tied(
    source, tmp_path, head, named
):
    # Each of the two was quantized alone: the result, or what was decoded from it,
    # could not be loaded.
    rules = Rules(config=method("rtn"), rules=[Rule(named, method("nf4"))])
    quantize_checkpoint(
        with_tied_head(source, tmp_path / "s", head), tmp_path / "q", rules
    )
    found = open_checkpoint(tmp_path / "q")
    assert head not in found.names() and found.is_packed(EMBEDDING)
    loaded = load_quantized(tmp_path / "q")
    assert "decoder/embed_tokens" in packed_in(loaded.model)
    dequantize_checkpoint(tmp_path / "q", tmp_path / "back")
    tokens = jnp.arange(20)[None]
    np.testing.assert_allclose(
        outputs(loaded.model, tokens),
        outputs(load_opt(tmp_path / "back").model, tokens),
        atol=2e-2,
    )


def test_a_tied_head_that_is_to_be_skipped_keeps_the_embedding(source, tmp_path):
    rules = Rules(
        config=method("rtn"), rules=[Rule("embed", method("nf4"))], skip=["lm_head"]
    )
    copy = open_checkpoint(with_tied_head(source, tmp_path / "s"))
    plan = plan_checkpoint(copy, rules)
    reasons = {layer.choice.name: layer.choice.reason for layer in plan.layers}
    assert reasons[EMBEDDING] == "tied to lm_head"


def test_a_head_that_is_not_the_embedding_is_not_dropped(source, tmp_path):
    copy = with_tied_head(source, tmp_path / "s", change=1)
    with pytest.raises(
        CheckpointError, match="`lm_head.weight` differs from the token"
    ):
        quantize_checkpoint(copy, tmp_path / "q", RTN_RULES)
    edit_json(copy / "config.json", lambda c: c.update(tie_word_embeddings=False))
    quantize_checkpoint(copy, tmp_path / "q", RTN_RULES)
    assert "lm_head.weight" in open_checkpoint(tmp_path / "q").names()


def test_packed_tensors_that_the_model_has_no_place_for_are_left_alone(tmp_path):
    # RoBERTa's pooler is stored by some versions of transformers, and used by none.
    make_classifier(tmp_path / "own", "sst2", kind="roberta")
    before = open_checkpoint(tmp_path / "own")
    tensors = {name: before.load(name) for name in before.names()}
    tensors["roberta.pooler.dense.weight"] = np.ones((64, 64), np.float32)
    save_checkpoint(tmp_path / "source", tensors, before.config)
    quantize_checkpoint(tmp_path / "source", tmp_path / "q", RTN_RULES)
    assert open_checkpoint(tmp_path / "q").is_packed("roberta.pooler.dense.weight")
    assert len(packed_in(load_quantized(tmp_path / "q").model)) == 12


def test_what_the_rules_leave_is_copied_byte_for_byte(source, tmp_path):
    rules = Rules(config=method("rtn"), skip=["fc1"])
    quantize_checkpoint(source, tmp_path / "q", rules)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "q")
    assert set(after.names()) == set(before.names())
    kept = [name for name in before.names() if not after.is_packed(name)]
    assert sum(name.endswith("fc1.weight") for name in kept) == 2
    for name in kept:
        assert after.load(name).dtype == before.load(name).dtype
        np.testing.assert_array_equal(after.load(name), before.load(name))


def test_files_that_are_no_weights_go_along(source, tmp_path):
    copied = tmp_path / "source"
    copied.mkdir()
    for path in source.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    (copied / "LICENSE").write_text("free")
    (copied / "pytorch_model.bin").write_bytes(b"weights once more")
    (copied / ".cache").mkdir()
    quantize_checkpoint(copied, tmp_path / "q", RTN_RULES)
    assert {path.name for path in (tmp_path / "q").iterdir()} == {
        "LICENSE", "config.json", "tokenizer.json", "model.safetensors",
        "model.safetensors.index.json", REPORT_NAME,
    }  # fmt: skip
    for name in ("LICENSE", "tokenizer.json"):
        assert (tmp_path / "q" / name).read_bytes() == (copied / name).read_bytes()


def test_subfolders_go_along_and_weights_of_other_programs_do_not(source, tmp_path):
    """Pooling settings stayed behind; weights for Rust or TensorFlow came along."""
    copied = tmp_path / "source"
    copied.mkdir()
    for path in source.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    wanted = {
        "modules.json": json.dumps(modules),
        "1_Pooling/config.json": "{}",
        "2_Dense/model.safetensors": "a part of the model",
        "chat_templates/deep/tool.jinja": "{{ tool }}",
        "spiece.model": "of a tokenizer",
        "onnx/config.json": "{}",
    }
    unwanted = ["rust_model.ot", "model.ckpt", "model.onnx_data", "model.npz",
                "tf_model.h5", "onnx/model.onnx", "model.ckpt.data-00000-of-00001",
                "model.ckpt.index", "flax_model.msgpack.index.json",
                "old/quantization_report.jsonl", "old/notes.txt"]  # fmt: skip
    for name, text in {**wanted, **dict.fromkeys(unwanted, "x")}.items():
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text(text)
    target = copied / "inside" / "q"
    quantize_checkpoint(copied, target, RTN_RULES)
    for name, text in wanted.items():
        assert (target / name).read_text() == text
    files = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert not files & set(unwanted)
    assert not any(name.startswith("inside") for name in files)


def test_the_configuration_says_how_it_was_quantized(opt):
    described = open_checkpoint(opt.target).quantization
    assert described["quant_method"] == "kashin"
    assert described["seed"] == SEED
    packed = packed_layers(open_checkpoint(opt.target)).values()
    assert described["tensors"]["packed_bits"] == sum(map(stored_bits, packed))
    assert len(described["rules"]["rules"]) == len(method_names())


def test_the_plan_has_the_sizes_that_are_written(opt):
    plan = plan_checkpoint(open_checkpoint(opt.dense.directory), opt.rules)
    written = open_checkpoint(opt.target)
    for tensor in plan.tensors:
        file = written.file_of(tensor.name)
        for name, spec in tensor.specs.items():
            assert file.spec(name) == spec
    assert {layer.choice.path for layer in plan.quantized} == opt.reports.keys()


def test_the_files_are_as_large_as_the_stored_bits_claim(tmp_path):
    result = quantize_checkpoint(
        WIKI, tmp_path / "q", Rules(config=method("rtn", bits=2, group_size=128))
    )
    found = inspect_checkpoint(result.directory)
    source = open_checkpoint(WIKI)
    kept = sum(
        source.spec(row.name).size
        for row in found.tensors
        if row.relative_squared_error is None
    )
    claimed = found.packed_bits / 8
    # Headers, index and configuration are the price of the packed matrices here.
    names = ("config.json", "model.safetensors.index.json", "model.safetensors")
    taken = sum((result.directory / name).stat().st_size for name in names) - kept
    assert claimed < taken < 1.02 * claimed
    assert 2 < found.bits_per_weight < 2.2
    assert found.damaged == ()
