"""`kashin eval --tasks`: tasks from files, of a model whose scores are known."""

import json
import math
import sys

import numpy as np
import pytest
from bigram_model import BOS, EOS, VOCAB, WORDS, log_likelihood, table, write_model

from kashin_jax.cli import main
from kashin_jax.cli.harness import (
    Drawing,
    HarnessModel,
    cut_at,
    read_drawing,
    template_model,
)
from kashin_jax.continuations import Question
from kashin_jax.errors import UsageError
from kashin_jax.models import load_model
from kashin_jax.models.tokenizer import load_tokenizer

LOGITS = table()
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
{rest}
"""
CHOICES = """\
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}]
"""
ROLLING = """\
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """\
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [w9, w11], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("bigrams") / "model", LOGITS)


@pytest.fixture(scope="module")
def model(directory):
    return HarnessModel(
        loaded=load_model(directory), tokenizer=load_tokenizer(directory),
        max_length=40, batch_size=3,
    )  # fmt: skip


def text(ids):
    return " ".join(WORDS[i] for i in ids)


def some_ids(rng, size):
    return rng.integers(3, VOCAB, size).tolist()


def write_task(folder, name, kind, rest, documents):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    file = TASK.format(
        name=name, kind=kind, rest=rest, data=data, cache=folder / "cache"
    )
    (folder / f"{name}.yaml").write_text(file)


def evaluated(capsys, directory, folder, tasks, *flags):
    """The JSON object that the command prints."""
    names = [f"--tasks={tasks}", f"--tasks-dir={folder}", "--context=40", "--json"]
    assert main(["eval", str(directory), *names, *flags]) == 0
    return json.loads(capsys.readouterr().out)


def likeliest(ids, count):
    """What follows when every token is the likeliest."""
    for _ in range(count):
        ids = [*ids, int(LOGITS[ids[-1]].argmax())]
    return ids


def choice_documents(count=12):
    """Answers of one token and of several; the last ones are wrong on purpose."""
    rng, documents, best = np.random.default_rng(1), [], []
    for i in range(count):
        question = some_ids(rng, 50 if i % 4 == 0 else 5)
        choices = [some_ids(rng, size) for size in (1, 1, 1, 1 + i % 3)]
        scores = [log_likelihood(LOGITS, [question[-1], *c]) for c in choices]
        best.append(int(np.argmax(scores)))
        gold = best[-1] if i < 9 else (best[-1] + 1) % 4
        documents.append(
            {"question": text(question), "choices": [*map(text, choices)], "gold": gold}
        )
    return documents


@pytest.fixture
def tasks(tmp_path):
    rng = np.random.default_rng(2)
    write_task(tmp_path, "choices", "multiple_choice", CHOICES, choice_documents())
    rolled = [{"text": text(some_ids(rng, size))} for size in (1, 39, 40, 41, 150)]
    write_task(tmp_path, "rolled", "loglikelihood_rolling", ROLLING, rolled)
    written = []
    for i in range(5):
        ids = some_ids(rng, 3 + 20 * (i % 2))
        new = likeliest(ids, 12)[len(ids) :]
        new = new[: new.index(EOS)] if EOS in new else new
        right = cut_at(text(new), ["w9", "w11"])
        answer = right if i < 3 else f"{right} w3"
        written.append({"question": text(ids), "answer": answer})
    write_task(tmp_path, "written", "generate_until", WRITING, written)
    return tmp_path, rolled


def test_scores_are_those_of_the_known_model(directory, tasks, capsys):
    """Three kinds of tasks at once, from their files to the printed numbers."""
    folder, rolled = tasks
    found = evaluated(capsys, directory, folder, "choices,rolled,written")
    results = found["tasks"]
    assert results["choices"]["acc,none"] == pytest.approx(9 / 12)
    assert results["written"]["exact_match,none"] == pytest.approx(3 / 5)
    texts = [document["text"] for document in rolled]
    total = sum(
        log_likelihood(LOGITS, [BOS, *map(WORDS.index, t.split())]) for t in texts
    )
    words, size = sum(len(t.split()) for t in texts), sum(map(len, texts))
    assert results["rolled"]["word_perplexity,none"] == pytest.approx(
        math.exp(-total / words), rel=1e-5
    )
    assert results["rolled"]["bits_per_byte,none"] == pytest.approx(
        -total / size / math.log(2), rel=1e-5
    )
    assert (found["context"], found["bos_token"]) == (40, "<s>")
    assert found["model_bits_per_weight"] > 31
    assert found["bits_per_weight"] is None


def test_examples_and_documents_are_as_many_as_asked(directory, tasks, capsys):
    flags = ("--num-fewshot=2", "--limit=4")
    found = evaluated(capsys, directory, tasks[0], "choices", *flags)
    assert found["num_fewshot"] == {"choices": 2}
    assert found["samples"]["choices"] == {"original": 12, "effective": 4}
    assert found["limit"] == 4


def test_the_table_names_tasks_bits_and_what_a_text_begins_with(
    directory, tasks, capsys
):
    command = ["eval", str(directory), "--tasks=choices", f"--tasks-dir={tasks[0]}"]
    assert main([*command, "--bos=none"]) == 0
    head, row, end = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "metric", "shots", "samples", "value", "error"]
    assert row.split()[:5] == ["choices", "acc", "0", "12", "0.7500"]
    assert end.endswith("bits each weight, context 64, begins with no token of its own")


def test_contexts_lose_their_beginning_and_the_command_says_so(model, capsys):
    ids = some_ids(np.random.default_rng(3), 50)
    (score,) = model.score([Question(ids[:-2], ids[-2:])])
    assert score.log_likelihood == pytest.approx(
        log_likelihood(LOGITS, ids[-3:]), rel=1e-5
    )
    assert "1 of 1 contexts lose their beginning: the model reads 40 tokens" in (
        capsys.readouterr().err
    )


def test_an_empty_context_is_the_beginning_of_a_text(model):
    class Request:
        args = ("", "w5 w6")

    class Blank:
        args = (" ", "w5 w6")

    lm = template_model(model)
    (value, _), (blank, _) = lm.loglikelihood([Request, Blank], disable_tqdm=True)
    assert value == pytest.approx(log_likelihood(LOGITS, [BOS, 5, 6]), rel=1e-5)
    assert blank == pytest.approx(value, rel=1e-6)
    assert lm.tok_encode("w5") == [BOS, 5]
    assert lm.tok_encode("<s> w5") == [BOS, 5]
    assert lm.tok_encode("w5", add_special_tokens=False) == [5]


def test_continuations_end_before_their_stops(model):
    """Stops inside of a token, of several tokens, and none; in batches of lengths."""
    rng = np.random.default_rng(4)
    prompts = [some_ids(rng, size) for size in (1, 3, 7, 60, 2)]
    whole = []
    for ids in prompts:
        new = likeliest(ids, 8)[len(ids) :]
        whole.append(new[: new.index(EOS)] if EOS in new else new)
    first = text(whole[0])
    several = text(whole[1][1:3])
    stops = [(), (several,), (WORDS[whole[2][2]],), (), (first[:2],)]
    found = model.continue_texts(
        [*map(text, prompts)], [Drawing(stops=s, max_new_tokens=8) for s in stops]
    )
    expected = [cut_at(text(new), s) for new, s in zip(whole, stops, strict=True)]
    assert [*map(str.strip, found)] == [*map(str.strip, expected)]
    assert found[2] != text(whole[2]) and found[4] != text(whole[4])


@pytest.mark.parametrize(("arguments", "expected"), [
    ({}, Drawing()),
    ({"until": "\n\n", "max_gen_toks": 5}, Drawing(("\n\n",), 5)),
    ({"until": ["a", ""], "do_sample": False, "temperature": 0.8}, Drawing(("a",))),
    ({"do_sample": True, "top_k": 3, "max_new_tokens": 7},
     Drawing((), 7, 1.0, 3)),
    ({"temperature": 0.5, "top_p": 0.9}, Drawing((), 256, 0.5, None, 0.9)),
])  # fmt: skip
def test_what_a_task_asks_of_continuations_is_read(arguments, expected):
    assert read_drawing(arguments) == expected


def test_what_continuations_cannot_do_is_named(model):
    with pytest.raises(UsageError, match="`num_beams` is not known here"):
        read_drawing({"num_beams": 4})
    with pytest.raises(UsageError, match="wants 40 new tokens of a model that reads"):
        model.continue_texts(["w5"], [Drawing(max_new_tokens=40)])


def line(capsys, code, *arguments):
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


def test_wrong_use_is_one_line(directory, tasks, tmp_path, capsys, monkeypatch):
    command = ("eval", directory, f"--tasks-dir={tasks[0]}")
    assert "belongs to `--tasks`" in line(
        capsys, 2, "eval", directory, "--text=a", "--limit=3"
    )
    assert "`--stride` belongs to `--text`" in line(
        capsys, 2, *command, "--tasks=choices", "--stride=3"
    )
    assert "is no directory" in line(
        capsys, 2, "eval", directory, "--tasks=a", f"--tasks-dir={tmp_path / 'none'}"
    )
    assert "`--bos` must be `auto`, `none` or a token" in line(
        capsys, 2, *command, "--tasks=choices", "--bos=<bos>"
    )
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'kashin_jax[eval]'" in line(
        capsys, 2, *command, "--tasks=choices"
    )


@pytest.mark.slow
def test_an_unknown_task_is_one_line_with_what_is_near(directory, tasks, capsys):
    """Lists the harness's own tasks, which takes seconds."""
    found = line(
        capsys, 2, "eval", directory, "--tasks=choices,lambada_openaj",
        f"--tasks-dir={tasks[0]}",
    )  # fmt: skip
    assert "there is no task `lambada_openaj`; near it are lambada_openai" in found
