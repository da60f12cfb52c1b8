"""Our answers to lm-evaluation-harness against its own backend (make oracle-torch)."""

import json

import numpy as np
import pytest
import tokenizers
from decoders import make

from kashin_jax.cli.harness import HarnessModel, template_model
from kashin_jax.models import load_model
from kashin_jax.models.tokenizer import load_tokenizer

pytestmark = [pytest.mark.oracle]

# Longer texts are cut, and read in several windows.
MAX_LENGTH = 24
BATCH = 3
WORDS = 61
# What separates texts does not begin them.
FIRST = {True: "<s>", False: "<|endoftext|>"}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def both(request, tmp_path_factory):
    """Our answers and theirs of one model; Llama's texts begin with a token."""
    directory = tmp_path_factory.mktemp("harness") / request.param
    directory.mkdir()
    begins = request.param == "llama"
    theirs = make.random_model(request.param, seed=200)
    make.save(theirs, request.param, directory)
    write_tokenizer(directory, begins)
    ours = HarnessModel(
        loaded=load_model(directory), tokenizer=load_tokenizer(directory),
        max_length=MAX_LENGTH, batch_size=BATCH,
    )  # fmt: skip
    assert (ours.tokenizer.bos_id is not None) == begins
    return template_model(ours), backend(theirs, directory), begins


def write_tokenizer(directory, begins):
    first = FIRST[begins]
    words = ["<pad>", first, "</s>", *(f"w{i}" for i in range(3, WORDS))]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<pad>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    if begins:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>",
              "bos_token": first, "eos_token": "</s>"}  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(stated))


def backend(model, directory, **options):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    return HFLM(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(directory),
        max_length=MAX_LENGTH, batch_size=BATCH, device="cpu", **options,
    )  # fmt: skip


class Request:
    def __init__(self, *args):
        self.args = args
        self.task_name = "made up"


def text(rng, size):
    return " ".join(f"w{i}" for i in rng.integers(3, WORDS, size))


def requests(first):
    """Empty, short and long contexts, answers of one token and more, and spaces."""
    rng = np.random.default_rng(0)
    found = [Request("", " w5 w6"), Request("", f"{first} w7"), Request("w3 ", "w9")]
    for size in (1, 5, 22, 23, 24, 25, 40):
        context = text(rng, size)
        found += [Request(context, f" w{answer}") for answer in (4, 5, 6)]
        found += [Request(context, f" {text(rng, length)}") for length in (2, 3, 9)]
    found.append(Request(f"{first} w4 w5", " w6"))
    found.append(Request(text(rng, 2), f" {text(rng, MAX_LENGTH)}"))
    return found


def test_log_likelihoods_are_those_of_their_backend(both):
    ours, theirs, begins = both
    asked = requests(FIRST[begins])
    found = ours.loglikelihood(asked, disable_tqdm=True)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    gap = max(abs(f[0] - e[0]) for f, e in zip(found, expected, strict=True))
    print(f"largest difference of {len(asked)} log likelihoods: {gap:.1e}")
    assert gap < 2e-4
    assert [f[1] for f in found] == [e[1] for e in expected]


def test_likeliest_continuations_are_greedy_in_both(both):
    """Most answers above are not: these are, by the model itself."""
    ours, theirs, _ = both
    rng = np.random.default_rng(1)
    prompts = [text(rng, size) for size in (2, 7, 13)]
    arguments = {"until": [], "max_gen_toks": 8, "do_sample": False}
    written = ours.generate_until([Request(p, arguments) for p in prompts])
    asked = [Request(p, f" {w}") for p, w in zip(prompts, written, strict=True)]
    for lm in (ours, theirs):
        assert all(greedy for _, greedy in lm.loglikelihood(asked, disable_tqdm=True))


def test_texts_as_a_whole_are_those_of_their_backend(both):
    """But for what begins a text, which theirs predicts from itself."""
    ours, theirs, begins = both
    rng = np.random.default_rng(2)
    texts = [text(rng, size) for size in (1, 5, 23, 24, 25, 47, 48, 49, 100)]
    asked = [Request(one) for one in texts]
    found = np.asarray(ours.loglikelihood_rolling(asked, disable_tqdm=True))
    if begins:
        theirs = backend(theirs.model, ours_directory(theirs), add_bos_token=False)
    expected = np.asarray(theirs.loglikelihood_rolling(asked, disable_tqdm=True))
    print(f"largest difference: {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-4)


def ours_directory(theirs):
    return theirs.tokenizer.name_or_path


@pytest.mark.parametrize("until", [["w7"], ["w1", "w30 w"], []])
def test_continuations_are_those_of_their_backend(both, until):
    ours, theirs, _ = both
    rng = np.random.default_rng(3)
    asked = [
        Request(text(rng, size), {"until": until, "max_gen_toks": 10})
        for size in (1, 4, 9, 14, 20)
    ]
    found = ours.generate_until(asked, disable_tqdm=True)
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert [*map(str.strip, found)] == [*map(str.strip, expected)]
