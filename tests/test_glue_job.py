"""GLUE's table end to end: what it prints and writes is complete and true."""

import json
import math
import re
import statistics

import pytest
from tiny_classifier import (
    BUCKETS,
    EXAMPLES,
    LINEARS,
    MAX_LENGTH,
    SEEDS,
    TASKS_OF_TABLE,
    arguments,
    finished,
    given,
    make_classifier,
    numbers,
    pick,
    table,
    write_rows,
)

from experiments.classification import evaluation
from experiments.classification.tasks import TASKS
from experiments.common.methods import GLUE_METHODS, METHODS
from experiments.glue import GlueConfig, main

__all__ = ["finished", "given"]  # fixtures

# Quantizing takes longer than compiling does.
pytestmark = [pytest.mark.optimized, pytest.mark.slow]

SCHEMA = {
    "method", "bits", "stored_bits_per_weight", "model_bits_per_weight", "task",
    "metric", "value", "seed", "basis", "model", "max_length", "examples", "truncated",
    "flip_rate", "log_loss", "relative_error", "converged_share", "quantize_seconds",
    "published", "data_source", "data_sha256", "weights_sha256", "kashin_jax_version",
    "jax_version", "device", "note", "rtol", "max_steps", "date",
}  # fmt: skip
METRICS = [(name, metric) for name in TASKS_OF_TABLE for metric in TASKS[name].metrics]


def test_a_table_has_each_metric_of_each_method_and_seed(finished):
    rows = [(r["method"], r["seed"], r["task"], r["metric"]) for r in finished.records]
    assert rows == [
        (name, seed, *metric)
        for name in ("full precision", *GLUE_METHODS)
        for seed in ([0, 1] if name in METHODS and METHODS[name].is_random else [None])
        for metric in METRICS
    ]


def test_every_record_has_every_field(finished):
    for record in finished.records:
        assert set(record) == SCHEMA
        assert record["note"]
        assert math.isfinite(record["value"])
        assert record["model"] == "bert-{task}"
        assert record["max_length"] == MAX_LENGTH
        assert record["examples"] == EXAMPLES[record["task"]]
        assert record["truncated"] == 1
        folder = TASKS[record["task"]].folder
        assert record["data_source"] == f"data_dir:{folder}/dev.tsv"
    for field in ("data_sha256", "weights_sha256"):
        assert len({(r["task"], r[field]) for r in finished.records}) == 2
        assert all(re.fullmatch("[0-9a-f]{64}", r[field]) for r in finished.records)


def test_fields_that_mean_nothing_are_null(finished):
    for record in finished.records:
        method = METHODS.get(record["method"])
        assert (record["converged_share"] is not None) == (record["method"] == "kashin")
        assert (record["basis"] is not None) == (
            method is not None and method.has_basis
        )
        assert (record["relative_error"] is None) == (method is None)
        is_compared = method is not None and record["task"] == "sst2"
        assert (record["flip_rate"] is not None) == is_compared
        assert record["published"] is None


def test_deterministic_methods_run_once_and_are_marked_so(finished):
    for record in finished.records[len(METRICS) :]:
        marked = record["note"].endswith("Deterministic: run once.")
        assert marked == (record["seed"] is None)
        assert marked == (not METHODS[record["method"]].is_random)


def test_seeds_change_random_methods(finished):
    for name in ("k-means", "kashin", "rotate-k-means"):
        rows = pick(finished.records, method=name, metric="pearson")
        assert len({r["value"] for r in rows}) == len(rows) == 2


def lines_of(printed):
    """The printed table without heading and rule, and the footnotes."""
    body = printed.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    notes = [line for line in body if re.match(r"\[\d\] ", line)]
    return body[: len(body) - len(notes)], notes


def test_the_printed_table_has_a_line_per_method_with_means_over_seeds(finished):
    (heading, rule, *lines), notes = lines_of(finished.printed)
    assert heading.split()[:5] == ["method", "bits", "bits/weight", "seeds", "SST-2"]
    for name, line in zip(("full precision", *GLUE_METHODS), lines, strict=True):
        assert re.match(rf"{re.escape(name)} \[\d\] ", line)
        for task, metric in METRICS:
            rows = pick(finished.records, method=name, task=task, metric=metric)
            values = [r["value"] for r in rows]
            cell = f"{statistics.fmean(values):.2f}"
            if len(values) > 1:
                cell += f"±{statistics.stdev(values):.1f}"
            assert cell in line.split()
    assert "Deterministic: run once." in notes[1]


def test_the_printed_table_is_aligned(finished):
    (heading, rule, *lines), _ = lines_of(finished.printed)
    starts = [match.start() for match in re.finditer(r"-+", rule)]
    assert len(starts) == len(re.split(r"  +", heading.strip()))
    for line in (heading, *lines):
        assert all(line[start - 2 : start] == "  " for start in starts[1:])


def test_what_was_cut_is_said(finished):
    assert "SST-2 30 (1 cut); STS-B 21 (1 cut); at most 24 tokens" in finished.printed
    assert "Left out" not in finished.printed


def test_results_are_records_a_page_and_a_figure(finished):
    stem = "table3_glue"
    assert {path.name for path in finished.out.iterdir()} == {
        f"{stem}.jsonl", f"{stem}.md", f"{stem}.png"
    }  # fmt: skip
    assert (finished.out / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    page = (finished.out / f"{stem}.md").read_text()
    assert "python -m experiments.glue --bits=4 '--model=" in page
    assert "SST-2 30 (1 cut)" in page and "mean over seeds 0 to 1" in page
    for name in ("full precision", *GLUE_METHODS):
        assert re.search(rf"^\| {re.escape(name)} \[\d\] \|", page, re.MULTILINE)
    for line in (finished.out / f"{stem}.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == SCHEMA


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers_and_figure(finished, given, tmp_path):
    again = table(given.template, given.data, tmp_path, SEEDS)
    assert numbers(again) == numbers(finished.records)
    (ours,), (theirs,) = tmp_path.glob("*.png"), finished.out.glob("*.png")
    assert ours.read_bytes() == theirs.read_bytes()


def test_models_that_differ_in_their_heads_share_a_compilation_per_bucket(
    given, tmp_path
):
    shape = "--batch_tokens=97"  # batches that no other test compiles for
    before = evaluation._first_states._cache_size()
    table(given.template, given.data, tmp_path, shape, "--methods=uniform,kashin")
    assert evaluation._first_states._cache_size() == before + BUCKETS


def test_the_size_of_batches_does_not_matter(finished, given, tmp_path):
    flags = ("--methods=uniform", "--batch_tokens=1")
    records = table(
        given.root / "bert-stsb", given.data, tmp_path, "--tasks=stsb", *flags
    )
    for record in records:
        (usual,) = pick(
            finished.records,
            task="stsb", metric=record["metric"], method=record["method"],
        )  # fmt: skip
        assert record["value"] == pytest.approx(usual["value"], rel=1e-4)


def test_a_roberta_makes_a_table(given, tmp_path):
    flags = ("--tasks=sst2", "--methods=kashin,rtn-g128")
    records = table(given.root / "roberta-sst2", given.data, tmp_path, *flags)
    assert [(r["method"], r["task"], r["seed"]) for r in records] == [
        ("full precision", "sst2", None),
        ("kashin", "sst2", 0),
        ("rtn-g128", "sst2", None),
    ]
    assert {r["model"] for r in records} == {"roberta-sst2"}
    assert all(set(r) == SCHEMA for r in records)


def test_a_checkpoint_with_several_heads_takes_the_tasks_that_have_data(
    given, tmp_path, capsys
):
    model = several_heads(tmp_path / "model", ("rte", "stsb", "cola"))
    write_rows(
        tmp_path / "CoLA" / "dev.tsv",
        ["gj04\t1\t\tw1 w2 w3", "gj04\t0\t*\tw3 w2 w1"],
    )
    records = table(model, tmp_path, tmp_path / "out", "--methods=full precision")
    # CoLA is the user's, RTE and STS-B are nobody's.
    assert [(r["task"], r["metric"], r["examples"]) for r in records] == [
        ("cola", "matthews", 2)
    ]
    printed = capsys.readouterr().out
    assert "Left out: RTE, STS-B, whose files are not at hand" in printed


def several_heads(directory, tasks):
    """One encoder and `heads.safetensors`, as the embedded checkpoint has them."""
    import safetensors.numpy

    heads, described = {}, {}
    for task in tasks:
        make_classifier(directory, task)
        path = directory / "model.safetensors"
        tensors = dict(safetensors.numpy.load_file(path))
        for name in ("classifier.weight", "classifier.bias"):
            heads[f"{task}.{name}"] = tensors.pop(name)
        safetensors.numpy.save_file(tensors, path, {"format": "pt"})
        described[task] = (
            {"problem_type": "regression"}
            if TASKS[task].is_regression
            else {"labels": TASKS[task].labels}
        )
    config = json.loads((directory / "config.json").read_text())
    for name in ("id2label", "label2id"):
        del config[name]
    text = json.dumps(config | {"glue_heads": described})
    (directory / "config.json").write_text(text)
    safetensors.numpy.save_file(heads, directory / "heads.safetensors")
    return directory


def test_a_shared_encoder_is_quantized_once(given, tmp_path, monkeypatch):
    from kashin_jax.pipeline import run

    calls = []
    original = run.quantize_stack
    monkeypatch.setattr(
        run,
        "quantize_stack",
        lambda *a, **k: calls.append(k) or original(*a, **k),
    )
    model = several_heads(tmp_path / "model", TASKS_OF_TABLE)
    records = table(model, given.data, tmp_path / "out", "--methods=uniform")
    assert len(calls) == LINEARS["bert"]
    assert len({r["weights_sha256"] for r in records}) == 1


def test_mnli_in_glues_own_layout_has_two_splits(tmp_path):
    header = "index\tsentence1\tsentence2\tlabel1\tgold_label"
    names = {"dev_matched": "entailment", "dev_mismatched": "contradiction"}
    for split, label in names.items():
        rows = [f"{i}\tw{i} w2\tw3\tneutral\t{label}" for i in range(5)]
        write_rows(tmp_path / "MNLI" / f"{split}.tsv", [header, *rows])
    extra = {"finetuning_task": "MNLI"}
    model = make_classifier(tmp_path / "hf", "mnli", extra=extra)
    records = table(model, tmp_path, tmp_path / "out", "--methods=uniform")
    assert [(r["method"], r["metric"], r["examples"]) for r in records] == [
        ("full precision", "matched", 10), ("full precision", "mismatched", 10),
        ("uniform", "matched", 10), ("uniform", "mismatched", 10),
    ]  # fmt: skip
    source = "data_dir:MNLI/dev_matched.tsv, data_dir:MNLI/dev_mismatched.tsv"
    assert {r["data_source"] for r in records} == {source}
    # An export directory `hf` goes by the name of the run.
    assert {r["model"] for r in records} == {tmp_path.name}
    # The matched rows are entailment, the mismatched contradiction: both at once no
    # constant answer gets right.
    assert records[0]["value"] + records[1]["value"] <= 100 * 10 / 5


def test_the_plain_command_has_the_documented_defaults():
    config = GlueConfig()
    assert (config.bits, config.seeds, config.basis) == (("4",), 1, ("hadamard",))
    assert (config.tasks, config.data_dir, config.max_length) == ((), "", 128)
    assert config.model.endswith("minilm-glue")


def test_several_widths_are_rows_of_one_table(given, tmp_path, capsys):
    flags = ("--bits=4,3", "--methods=nf4-g64,uniform", "--tasks=sst2")
    command = arguments(given.root / "bert-sst2", given.data, tmp_path, *flags)
    assert main(command) == 0
    printed = capsys.readouterr().out
    (mark,) = re.findall(r"^nf4-g64 \[(\d)\] +3((?: +-){6})$", printed, re.MULTILINE)
    assert f"[{mark[0]}] NF4 exists at 4 bits only" in printed
