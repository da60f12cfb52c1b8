"""Chat templates, stop tokens and drawing: what `kashin generate` adds to a model."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from decoders import GOLDEN

from kashin_jax.cli import main
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models import generate, load_model
from kashin_jax.models.chat import chat_prompt
from kashin_jax.models.generation import likeliest, stop_tokens
from kashin_jax.models.tokenizer import load_tokenizer, prefix_token_id

TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] not in ('user', 'assistant') %}
{{ raise_exception('Only user and assistant speak.') }}
{% endif %}
{% if loop.index > 9 %}{% break %}{% endif %}
{{ message['role'] + ' ' + message['content'] | trim + ' ' }}
{% generation %}{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}
"""
USER = [{"role": "user", "content": " w5 w6 "}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A small Llama with a tokenizer of words and a chat template."""
    path = tmp_path_factory.mktemp("chat") / "llama"
    shutil.copytree(GOLDEN / "llama", path)
    words = ["<pad>", "<s>", "</s>", "user", "assistant"]
    words += [f"w{i}" for i in range(len(words), 61)]
    model = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token="<pad>"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(path / "tokenizer.json"))
    write(path / "tokenizer_config.json", bos_token={"content": "<s>"},
          chat_template=[{"name": "default", "template": TEMPLATE}])  # fmt: skip
    return path


def write(path, **content):
    path.write_text(json.dumps(content))


def test_a_conversation_becomes_text_as_in_transformers(directory, tmp_path):
    from transformers.utils.chat_template_utils import render_jinja_template

    two = [*USER, {"role": "assistant", "content": "w7"}, *USER]
    for messages in (USER, two):
        (theirs,), _ = render_jinja_template(
            [messages], chat_template=TEMPLATE, add_generation_prompt=True,
            bos_token="<s>",
        )  # fmt: skip
        assert chat_prompt(directory, messages) == theirs
        assert theirs.startswith("<s>user w5 w6 ") and theirs.endswith("assistant ")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0] | tojson }}é")
    text = chat_prompt(tmp_path, [{"role": "user", "content": "<ü>"}])
    assert text == '{"role": "user", "content": "<ü>"}é'
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') | length }}")
    assert chat_prompt(tmp_path, USER) == "4"


@pytest.mark.parametrize(("template", "words"), [
    ("{% if %}", "Expected an expression"),
    ("{{ messages.nothing.at.all }}", "has no attribute 'nothing'"),
    ("{{ messages.append(1) }}", "access to attribute 'append'"),
    ("{{ ''.__class__.__mro__ }}", "is unsafe"),
    ("{{ raise_exception('Not you.') }}", "(Not you.)"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
])  # fmt: skip
def test_a_template_that_fails_or_reaches_out_is_named_in_a_line(
    tmp_path, template, words
):
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError) as caught:
        chat_prompt(tmp_path, USER)
    text = str(caught.value)
    assert words in text and "chat_template.jinja: the chat" in text
    assert "\n" not in text


def test_a_model_that_was_not_taught_to_chat_is_refused(tmp_path):
    with pytest.raises(UsageError, match="has no chat template; leave out `--chat`"):
        chat_prompt(tmp_path, USER)


def test_stop_tokens_are_those_of_the_generation_config(directory, tmp_path):
    config = load_model(directory).config
    assert stop_tokens(tmp_path, config) == (2,)
    for found, expected in ((7, (7,)), ([7, 8], (7, 8)), (None, (2,))):
        write(tmp_path / "generation_config.json", eos_token_id=found)
        assert stop_tokens(tmp_path, config) == expected
    write(tmp_path / "generation_config.json", eos_token_id=["</s>"])
    with pytest.raises(CheckpointError, match="expected tokens' numbers"):
        stop_tokens(tmp_path, config)


@pytest.mark.parametrize(("model", "tokenizer", "bos"), [
    ({"model_type": "llama", "bos_token_id": 1}, {}, 1),
    ({"model_type": "llama", "bos_token_id": 1}, {"add_bos_token": False}, None),
    # SmolLM2's begins a message, Qwen's separates texts.
    ({"model_type": "llama", "bos_token_id": 3}, {}, None),
    ({"model_type": "qwen2"}, {}, None),
    ({"model_type": "opt"}, {}, 2),
    # A file that asks for one of its own tokens in front, as texts or with its flags.
    ({"model_type": "qwen2"}, {"add_bos_token": True, "bos_token": "<s>"}, 1),
    ({"model_type": "qwen2"},
     {"add_bos_token": True, "bos_token": {"content": "user"}}, 3),
    ({"model_type": "qwen2"}, {"add_bos_token": True, "bos_token": None}, None),
    ({"model_type": "qwen2"}, {"bos_token": "<s>"}, None),
])  # fmt: skip
def test_a_text_begins_as_the_model_was_taught(
    directory, tmp_path, model, tokenizer, bos
):
    shutil.copy(directory / "tokenizer.json", tmp_path)
    write(tmp_path / "config.json", **model)
    write(tmp_path / "tokenizer_config.json", **tokenizer)
    assert load_tokenizer(tmp_path).bos_id == bos


@pytest.mark.parametrize(("template", "bos"), [("<s> $A", 1), ("$A </s>", None)])
def test_a_tokenizer_may_put_a_token_on_either_side(directory, tmp_path, template, bos):
    """Guards against an end of text that is taken for what texts begin with."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", model_type="qwen2")
    assert load_tokenizer(tmp_path).bos_id == bos


@pytest.mark.parametrize(("model", "stated", "prefix"), [
    ({"model_type": "llama", "bos_token_id": 1}, {}, 1),
    # The harness's own backend takes these of models that put nothing in front.
    ({"model_type": "gpt2", "bos_token_id": 5}, {"bos_token": "w7"}, 7),
    ({"model_type": "qwen2", "bos_token_id": 5},
     {"bos_token": None, "eos_token": {"content": "w8"}}, 8),
    ({"model_type": "qwen2", "eos_token_id": [6, 9]}, {}, 6),
    ({"model_type": "qwen2"}, {}, None),
])  # fmt: skip
def test_an_empty_context_has_a_token_of_its_own(
    directory, tmp_path, model, stated, prefix
):
    shutil.copy(directory / "tokenizer.json", tmp_path)
    write(tmp_path / "config.json", **model)
    write(tmp_path / "tokenizer_config.json", **stated)
    assert prefix_token_id(tmp_path, load_tokenizer(tmp_path)) == prefix


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [
    (4, 1.0, [3, 1, 0, 2]), (2, 1.0, [3, 1]), (1, 1.0, [3]),
    (4, 0.5, [3]), (4, 0.51, [3, 1]), (4, 0.81, [3, 1, 0]), (4, 1e-6, [3]),
    # Of 5 and 3 tenths the first is more than 0.6.
    (2, 0.6, [3]), (2, 0.63, [3, 1]),
])  # fmt: skip
def test_the_likeliest_tokens_are_kept(top_k, top_p, kept):
    logits = np.log([[0.15, 0.3, 0.05, 0.5]]).astype(np.float32)
    found = likeliest(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p))
    expected = np.full_like(logits, -np.inf)
    expected[0, kept] = logits[0, kept]
    np.testing.assert_array_equal(found, expected)


def test_drawing_from_one_token_is_greedy_and_from_all_is_free(directory):
    model = load_model(directory).model
    ids = jnp.asarray([[1, 5, 6], [1, 7, 8]])
    draw = {"max_new_tokens": 8, "temperature": 5.0, "key": jax.random.key(0)}
    greedy = generate(model, ids, max_new_tokens=8)
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"top_k": 5, "top_p": 1e-6}):
        np.testing.assert_array_equal(generate(model, ids, **draw, **only), greedy)
    free = generate(model, ids, **draw)
    np.testing.assert_array_equal(generate(model, ids, **draw, top_k=61), free)
    assert np.any(np.asarray(free) != np.asarray(greedy))


@pytest.mark.parametrize(("options", "words"), [
    ({"top_k": 0, "temperature": 1.0}, "`top_k` must be at least 1. Got 0"),
    ({"top_p": 0.0, "temperature": 1.0}, r"`top_p` must lie in \(0, 1\]. Got 0"),
    ({"top_p": 0.9}, "`temperature` is 0, which takes the likeliest token"),
    ({"max_new_tokens": 64}, "a prompt of 3 tokens exceed the model's 64 positions"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_named(directory, options, words):
    model, ids = load_model(directory).model, jnp.asarray([[1, 5, 6]])
    options = {"max_new_tokens": 2, "key": jax.random.key(0)} | options
    with pytest.raises(UsageError, match=words):
        generate(model, ids, **options)


def test_a_quantized_llama_is_evaluated_continued_and_answers(
    directory, tmp_path, capsys
):
    """The command line, from a checkpoint to an answer."""
    packed, text = tmp_path / "packed", tmp_path / "text.txt"
    text.write_text(" ".join(f"w{5 + i % 50}" for i in range(100)))
    flags = ["--method=rtn", "--bits=4", "--set", "group_size=8"]
    assert main(["quantize", str(directory), str(packed), *flags]) == 0
    capsys.readouterr()
    assert main(["eval", str(packed), f"--text={text}"]) == 0
    assert " 99 predictions, context 64" in capsys.readouterr().out
    assert main(["generate", str(packed), "w5 w6", "--max-new-tokens=6"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:2] == ["w5", "w6"] and len(words) == 8
    # An answer ends before the token that the file names.
    chat = ["generate", str(packed), "w5 w6", "--chat", "--max-new-tokens=6"]
    assert main(chat) == 0
    answer = capsys.readouterr().out.split()
    assert len(answer) == 6 and "user" not in answer
    write(packed / "generation_config.json", eos_token_id=[int(answer[3][1:])])
    assert main(chat) == 0
    assert capsys.readouterr().out.split() == answer[: answer.index(answer[3])]
    assert main([*chat, "--top-p=0.5"]) == 2
    assert "`temperature` is 0" in capsys.readouterr().err
