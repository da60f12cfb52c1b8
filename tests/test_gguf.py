"""GGUF files are the checkpoints that they were made of.

The package `gguf` writes them and says what their quantized tensors decode to. Queries
and keys are put in llama.cpp's order by the words of its converter.
"""

import shutil
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
from decoders import GOLDEN
from gguf_files import byte_level, fields_of, of_checkpoint, write_gguf

from experiments import opt_ppl
from experiments.common.results import read_jsonl
from kashin_jax.cli import main
from kashin_jax.io import (
    checkpoint_directory,
    hash_file,
    open_checkpoint,
    quantized_before,
)
from kashin_jax.models.chat import chat_prompt
from kashin_jax.models.decoder_config import DecoderConfig
from kashin_jax.models.tokenizer import load_tokenizer

SIZES = {
    "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64,
    "num_hidden_layers": 1, "max_position_embeddings": 32, "intermediate_size": 96,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kashin_jax" / "gguf"


def tiny(seed=0, vocab=64):
    """Arrays of a model of one layer, by llama.cpp's names; biases none, head tied."""
    rng = np.random.default_rng(seed)
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes = {
        "token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,), "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (hidden, hidden), "blk.0.attn_k.weight": (32, hidden),
        "blk.0.attn_v.weight": (32, hidden), "blk.0.attn_output.weight": (hidden,) * 2,
        "blk.0.ffn_gate.weight": (inner, hidden),
        "blk.0.ffn_up.weight": (inner, hidden),
        "blk.0.ffn_down.weight": (hidden, inner),
    }  # fmt: skip
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_tiny(path, tensors=None, *, kinds=None, more=None, tokenizer=None, **fields):
    return write_gguf(
        path,
        tiny() if tensors is None else tensors,
        fields_of(SIZES, **fields),
        tokenizer or byte_level(64),
        kinds=kinds,
        more=more,
    )


@pytest.fixture
def refused(capsys):
    """The one line that the command says of a file, which leaves nothing behind."""

    def say(path, code=1):
        target = path.with_suffix(".quantized")
        found = main(["quantize", str(path), str(target), "--method=rtn", "--bits=3"])
        out, err = capsys.readouterr()
        assert (found, out, err.count("\n")) == (code, "", 1), err
        assert not target.exists()
        return err

    return say


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tensors_and_configuration_are_those_of_the_source(tmp_path, family):
    source = tmp_path / family
    shutil.copytree(GOLDEN / family, source)
    if family == "qwen2":
        # llama.cpp has no windows in these.
        content = (source / "config.json").read_text()
        (source / "config.json").write_text(content.replace("true", "false"))
    path = of_checkpoint(source, tmp_path / "model.gguf")
    expected, found = open_checkpoint(source), open_checkpoint(path)
    assert found.names() == expected.names()
    for name in expected.names():
        np.testing.assert_array_equal(found.load(name), expected.load(name))
    ours, theirs = (
        DecoderConfig.from_dict(each.config, "") for each in (found, expected)
    )
    assert ours == theirs
    assert quantized_before(found.config) is None


def test_a_quantized_file_is_that_of_the_directory_byte_for_byte(tmp_path):
    path = of_checkpoint(GOLDEN / "llama", tmp_path / "model.gguf")
    for source, target in ((GOLDEN / "llama", "a"), (path, "b")):
        flags = ["--method=rtn", "--bits=3", "--set", "group_size=8"]
        assert main(["quantize", str(source), str(tmp_path / target), *flags]) == 0
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "b" / "tokenizer.json").is_file()
    assert not list((tmp_path / "b").glob(".gguf*"))
    # Whoever reads the result can see where it is from.
    entry = open_checkpoint(tmp_path / "b").config["gguf"]
    assert entry == {
        "file": "model.gguf", "types": {"F32": 35}, "sha256": hash_file(path)
    }  # fmt: skip


KINDS = {
    "token_embd.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_1",
    "blk.0.attn_k.weight": "Q4_0", "blk.0.attn_v.weight": "F16",
    "blk.0.attn_output.weight": "BF16",
}  # fmt: skip
PUBLISHED = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
}


def test_types_are_decoded_as_the_package_decodes_them(tmp_path):
    found = open_checkpoint(write_tiny(tmp_path / "model.gguf", kinds=KINDS))
    types = {"Q8_0": np.float16, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
             "F32": np.float32}  # fmt: skip
    for name, stored in PUBLISHED.items():
        kind = gguf.GGMLQuantizationType[KINDS.get(stored, "F32")]
        values = gguf.quants.dequantize(
            gguf.quants.quantize(tiny()[stored], kind), kind
        )
        array = found.load(name)
        assert array.dtype == types[kind.name]
        np.testing.assert_array_equal(array, values.astype(array.dtype))
    assert quantized_before(found.config) == "Q8_0, Q4_1, Q4_0"


def test_parts_of_tensors_are_parts_of_the_whole(tmp_path):
    found = open_checkpoint(write_tiny(tmp_path / "model.gguf", kinds=KINDS))
    for name in found.names():
        file, whole = found.file_of(name), found.load(name)
        np.testing.assert_array_equal(file.read_rows(name, 1, 3), whole[1:3])
        with (tmp_path / "bytes").open("wb") as sink:
            # A chunk of less than a row, so that there are several.
            file.copy(name, sink, chunk=100)
        assert (tmp_path / "bytes").read_bytes() == whole.tobytes()


def test_the_directory_is_made_once_and_anew_for_another_file(tmp_path, cache):
    path = write_tiny(tmp_path / "model.gguf")
    first = checkpoint_directory(path)
    before = (first / "config.json").stat().st_mtime_ns
    assert checkpoint_directory(path) == first
    assert (first / "config.json").stat().st_mtime_ns == before
    opened = open_checkpoint(path)
    write_tiny(path, tiny(seed=1))
    other = open_checkpoint(path)
    name = "model.norm.weight"
    assert other.directory != first
    np.testing.assert_array_equal(other.load(name), tiny(seed=1)["output_norm.weight"])
    assert opened.verify() == ["model.gguf"] and other.verify() == []
    with pytest.raises(ValueError, match="has changed while in use"):
        open_checkpoint(first)


def test_a_damaged_table_says_what_to_do(tmp_path):
    path = write_tiny(tmp_path / "model.gguf")
    table = checkpoint_directory(path) / ".gguf.json"
    table.write_text(table.read_text().replace('"F32"', "3", 1))
    with pytest.raises(ValueError, match="is damaged; delete it"):
        open_checkpoint(path)


def test_a_table_outside_of_the_cache_names_no_file(tmp_path):
    # It could name any file of the machine.
    directory = checkpoint_directory(write_tiny(tmp_path / "model.gguf"))
    shutil.copytree(directory, tmp_path / "downloaded")
    with pytest.raises(ValueError, match="holds no weights"):
        open_checkpoint(tmp_path / "downloaded")


def test_what_was_quantized_before_is_said(tmp_path, capsys):
    path = write_tiny(tmp_path / "model.gguf", kinds=KINDS)
    assert main(["quantize", str(path), "none", "--method=rtn", "--dry-run"]) == 0
    assert "model.gguf holds Q8_0, Q4_1, Q4_0: weights" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_says_that_it_is_of_what_was_quantized_before(tmp_path, capsys):
    path = write_tiny(tmp_path / "tiny.gguf", kinds=KINDS)
    (tmp_path / "text.txt").write_text("abc a12 " * 20)
    flags = ["--bits=4", "--methods=rtn-channel", "--context=16", "--max_tokens=40",
             f"--text_file={tmp_path / 'text.txt'}", f"--out={tmp_path}"]  # fmt: skip
    assert opt_ppl.main([f"--model={path}", *flags]) == 0
    assert "the GGUF file holds Q8_0, Q4_1, Q4_0" in capsys.readouterr().out
    records = read_jsonl(tmp_path / "table2_opt.jsonl")
    assert [each["quantized_before"] for each in records] == ["Q8_0, Q4_1, Q4_0"] * 2
    assert {each["model"] for each in records} == {"tiny"}
    assert "decoded from Q8_0, Q4_1, Q4_0" in records[0]["note"]


# --- Rotary positions


def llama3_factors(factor, head_dim=32, theta=10_000.0):
    """As llama.cpp's converter computes them, pair by pair."""
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4.0:
            found.append(1.0)
        elif wavelength > 8192 / 1.0:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(found, np.float32)


def test_factors_of_llama_3_become_its_scaling(tmp_path):
    tensors = tiny() | {"rope_freqs.weight": llama3_factors(8.0)}
    found = open_checkpoint(write_tiny(tmp_path / "model.gguf", tensors)).config
    assert found["rope_scaling"] == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip


def test_linear_scaling_is_read(tmp_path):
    fields = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    found = open_checkpoint(write_tiny(tmp_path / "model.gguf", **fields)).config
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


# --- Tokenizers


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["ab", "'", "S", "1234"]),
        ("smollm", ["ab", "'", "S", "1", "2", "3", "4"]),
        ("qwen2", ["ab", "'S", "1", "2", "3", "4"]),
        ("llama-bpe", ["ab", "'S", "123", "4"]),
    ],
)
def test_texts_are_cut_into_words_as_the_name_says(tmp_path, pre, words):
    vocabulary = byte_level(64, pre)
    path = write_tiny(tmp_path / "model.gguf", tokenizer=vocabulary)
    tokenizer = load_tokenizer(checkpoint_directory(path))
    ids = tokenizer.encode("ab'S1234<|end|> abc")
    assert [vocabulary["tokens"][i] for i in ids] == [
        *words,
        "<|end|>",
        "\u0120",
        "abc",
    ]
    assert tokenizer.decode(ids) == "ab'S1234<|end|> abc"


@pytest.mark.parametrize(("says", "expected"), [(True, 1), (False, None), (None, None)])
def test_texts_begin_with_a_token_where_the_file_says_so(tmp_path, says, expected):
    vocabulary = byte_level(64) | {"add_bos_token": says}
    path = write_tiny(tmp_path / "model.gguf", tokenizer=vocabulary)
    assert load_tokenizer(checkpoint_directory(path)).bos_id == expected


def sentence_piece(**more):
    """Pieces with scores; all bytes, as in every such vocabulary."""
    pieces = ["\u2581", "a", "b", "c", "ab", "bc", "abc", "\u2581a", "\u2581abc"]
    scores = [-9.0, -9.0, -9.0, -9.0, -3.0, -2.0, -4.0, -5.0, -6.0]
    data = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *data, *pieces]
    return {
        "model": "llama", "tokens": tokens,
        "scores": [0.0] * 259 + scores, "token_type": [2, 3, 3] + [6] * 256 + [1] * 9,
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "text", "words"),
    [
        # The best pair is joined first: "bc" before "ab".
        (True, "abc", ["\u2581abc"]),
        (False, "abc", ["abc"]),
        (False, "ab a", ["ab", "\u2581a"]),
        (True, "a\u00e9", ["\u2581a", "<0xC3>", "<0xA9>"]),
        (False, "bcab</s>", ["bc", "ab", "</s>"]),
    ],
)
def test_pieces_are_joined_by_their_scores(tmp_path, prefix, text, words):
    vocabulary = sentence_piece(add_space_prefix=prefix)
    tensors = tiny(vocab=len(vocabulary["tokens"]))
    path = write_tiny(tmp_path / "model.gguf", tensors, tokenizer=vocabulary)
    tokenizer = load_tokenizer(checkpoint_directory(path))
    ids = tokenizer.encode(text)
    assert [vocabulary["tokens"][i] for i in ids] == words
    assert tokenizer.decode(ids) == text
    # llama.cpp's default for such vocabularies.
    assert tokenizer.bos_id == 1


def test_a_chat_template_goes_along(tmp_path):
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    more = {"tokenizer.chat_template": template}
    directory = checkpoint_directory(write_tiny(tmp_path / "model.gguf", more=more))
    message = [{"role": "user", "content": "Hello"}]
    assert chat_prompt(directory, message) == "Hello<|end|>"


# --- What is not read


def test_a_file_cut_anywhere_ends_in_one_line(tmp_path, cache, refused):
    whole = write_tiny(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "model.gguf"
    head = 40, 200, 700, 1500, 2500
    for length in (0, 3, 7, 12, 23, *head, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        assert str(path) in refused(path)
    assert not cache.exists()


def test_no_flipped_byte_of_the_head_ends_in_a_traceback(tmp_path):
    whole = bytearray(write_tiny(tmp_path / "whole.gguf").read_bytes())
    path = tmp_path / "model.gguf"
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 4000, 25):
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            open_checkpoint(path)
        except ValueError as error:
            assert len(str(error)) < 1000


def patched(path, offset, data):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("offset", "data", "expected"),
    [
        (0, b"GGML", "is no GGUF file"),
        (4, b"\0\0\0\3", "big-endian"),
        (4, b"\1\0\0\0", "version 1 of GGUF; 2 and 3 are read"),
        (8, b"\xff" * 8, "truncated or damaged"),
        (16, b"\xff" * 8, "truncated or damaged"),
        (24, b"\xff" * 8, "it ends before what it announces"),
    ],
    ids=["magic", "endian", "version", "tensors", "fields", "key"],
)
def test_a_hostile_beginning_ends_in_one_line(
    tmp_path, refused, offset, data, expected
):
    assert expected in refused(
        patched(write_tiny(tmp_path / "model.gguf"), offset, data)
    )


def test_a_list_that_is_too_long_is_not_read(tmp_path, monkeypatch, refused):
    # Each byte of it would take half a kilobyte.
    monkeypatch.setattr("kashin_jax.io.gguf.header._MAX_ITEMS", 1000)
    path = write_tiny(tmp_path / "model.gguf", more={"general.tags": ["x"] * 600})
    assert "it lists more than 1000 items" in refused(path)


def test_a_shape_that_multiplies_to_another_is_refused(tmp_path, refused):
    path = write_tiny(tmp_path / "model.gguf")
    # 2**63 + 1 times 2 is 2 for 64 bits.
    sides = np.asarray([64, 64], "<u8").tobytes()
    place = path.read_bytes().index(sides)
    huge = np.asarray([2**63 + 64, 2**58], "<u8").tobytes()
    assert "truncated or damaged" in refused(patched(path, place, huge))


FIELDS = {
    "block_count": (None, "`llama.block_count` is missing"),
    "attention.head_count": ([2], "a positive whole number is needed"),
    "attention.head_count_kv": (0, "a positive whole number is needed"),
    "rope.freq_base": (float("nan"), "a positive number is needed"),
    "rope.dimension_count": (16, "heads are 32 wide"),
    "rope.scaling.type": ("yarn", "`linear` is known alone"),
    "attention.sliding_window": (8, "that computation is not known here"),
    "expert_count": (8, "that computation is not known here"),
    "a\x1b[2J\nb": (8, r"'llama.a\x1b[2J\nb' is 8, but that computation"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_are_refused_by_name(tmp_path, refused, field):
    value, expected = FIELDS[field]
    path = write_tiny(tmp_path / "model.gguf", **{field: value})
    assert expected in refused(path)


TOKENIZERS = {
    "model": ("bert", "`tokenizer.ggml.model` is 'bert'; read are gpt2, llama"),
    "pre": ("tekken", "`tokenizer.ggml.pre` is 'tekken'; known are"),
    "tokens": (None, "must be a list of texts"),
    "token_type": ([1, 1], "must be a list of 64 whole numbers"),
    "merges": (["zz q"], "its tokenizer is damaged"),
    "eos_token_id": (64, "which is no token"),
}


@pytest.mark.parametrize("field", TOKENIZERS)
def test_tokenizers_are_refused_by_name(tmp_path, refused, field):
    value, expected = TOKENIZERS[field]
    vocabulary = byte_level(64) | {field: value}
    path = write_tiny(tmp_path / "model.gguf", tokenizer=vocabulary)
    assert expected in refused(path)


TENSORS = {
    "blk.0.ffn_gate_exps.weight": (np.ones((2, 4, 32)), "is no part of the models"),
    "blk.0.attn_q.weight": (np.ones((3, 64)), "is not of 2 heads"),
    "rope_freqs.weight": (np.ones(16) * 3, "other factors than those of Llama 3"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_refused_by_name(tmp_path, refused, name):
    value, expected = TENSORS[name]
    tensors = tiny() | {name: value.astype(np.float32)}
    assert expected in refused(write_tiny(tmp_path / "model.gguf", tensors))


def test_parts_are_to_be_joined(tmp_path, refused):
    path = tmp_path / "model-00001-of-00002.gguf"
    write_tiny(path, more={"split.count": 2})
    assert "is one of 2 parts; join them first" in refused(path)


def test_other_architectures_are_named(tmp_path, refused):
    fields, path = fields_of(SIZES), tmp_path / "model.gguf"
    write_gguf(path, tiny(), fields, byte_level(64), architecture="mamba")
    assert "`general.architecture` is 'mamba'; read are llama, qwen2" in refused(path)


def test_types_that_are_not_decoded_are_named(tmp_path, refused):
    tensors = tiny() | {"output_norm.weight": np.ones(64, np.int32)}
    path = write_tiny(tmp_path / "model.gguf", tensors)
    assert "is stored as I32, which the package `gguf` does not decode" in refused(path)


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path, refused, monkeypatch, package
):
    path = write_tiny(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, package, None)
    assert f"needs `{package}`; run: pip install 'kashin_jax[gguf]'" in refused(path, 2)
