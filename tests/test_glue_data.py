"""GLUE's files in its own layout and in the plain one, whole and damaged."""

import hashlib

import numpy as np
import pytest

from experiments.classification.data import load_examples
from experiments.classification.tasks import GLUE_TASKS, TASKS
from kashin_jax.errors import DataError, UsageError

MNLI_HEADER = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
)
MNLI_FILLING = "63735\t63735n\tslate\t( x )\t( y )\t(ROOT x)\t(ROOT y)"
# Two rows of each task as the files of GLUE's release have them.
RELEASE = {
    "cola": (
        "CoLA/dev.tsv",
        "gj04\t1\t\tThe sailors rode the breeze.\ngj04\t0\t*\tThey drank the pub.\n",
        ("The sailors rode the breeze.", "They drank the pub."),
        None,
        [1, 0],
    ),
    "sst2": (
        "SST-2/dev.tsv",
        "sentence\tlabel\nit 's a \" charming journey . \t1\nbleak \t0\n",
        ("it 's a \" charming journey . ", "bleak "),
        None,
        [1, 0],
    ),
    "qqp": (
        "QQP/dev.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "7\t8\t9\tWhy?\tWhy not?\t0\n8\t1\t2\tHow?\tIn what way?\t1\n",
        ("Why?", "How?"),
        ("Why not?", "In what way?"),
        [0, 1],
    ),
    "qnli": (
        "QNLI/dev.tsv",
        "index\tquestion\tsentence\tlabel\n"
        "0\tWho?\tShe did.\tentailment\n1\tWho?\tIt rained.\tnot_entailment\n",
        ("Who?", "Who?"),
        ("She did.", "It rained."),
        [0, 1],
    ),
    "mnli": (
        "MNLI/dev_mismatched.tsv",
        MNLI_HEADER
        + f"0\t{MNLI_FILLING}\tIt is new.\tIt is old.\tneutral\tcontradiction\n"
        + f"1\t{MNLI_FILLING}\tIt is new.\tIt shines.\tneutral\tneutral\n",
        ("It is new.", "It is new."),
        ("It is old.", "It shines."),
        [2, 1],
    ),
    "rte": (
        "RTE/dev.tsv",
        "index\tsentence1\tsentence2\tlabel\n"
        '0\tDana said "no.\tShe spoke.\tnot_entailment\n1\tA b.\tA.\tentailment\n',
        ('Dana said "no.', "A b."),
        ("She spoke.", "A."),
        [1, 0],
    ),
    "stsb": (
        "STS-B/dev.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\t"
        "sentence1\tsentence2\tscore\n"
        "0\tmain\tMSRvid\t2012\t0\tnone\tnone\tA man.\tA boy.\t5.000\n"
        "1\tmain\tMSRvid\t2012\t1\tnone\tnone\tA dog.\tA car.\t0.4\n",
        ("A man.", "A dog."),
        ("A boy.", "A car."),
        [5.0, 0.4],
    ),
    "mrpc": (
        "MRPC/dev.tsv",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        '1\t70\t71\tHe said "yes".\tHe agreed.\r\n0\t1\t2\tA.\t"B.\r\n',
        ('He said "yes".', "A."),
        ("He agreed.", '"B.'),
        [1, 0],
    ),
    "wnli": (
        "WNLI/dev.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tIt hid.\tIt was.\t1\n1\tC.\tD.\t0\n",
        ("It hid.", "C."),
        ("It was.", "D."),
        [1, 0],
    ),
}


def written(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rte(root, *rows, header="index\tsentence1\tsentence2\tlabel"):
    content = "".join(f"{line}\n" for line in (header, *rows))
    written(root, "RTE/dev.tsv", content)
    return load_examples(TASKS["rte"], "dev", root)


def test_the_files_of_the_release_cover_all_tasks():
    assert set(RELEASE) == set(GLUE_TASKS)


@pytest.mark.parametrize("name", RELEASE)
def test_every_task_is_read_in_the_layout_of_its_release(name, tmp_path):
    file, content, first, second, labels = RELEASE[name]
    written(tmp_path, file, content)
    split = file.split("/")[1].removesuffix(".tsv")
    found = load_examples(TASKS[name], split, tmp_path)
    assert (found.first, found.second) == (first, second)
    is_score = name == "stsb"
    assert found.labels.dtype == (np.float32 if is_score else np.int32)
    assert np.array_equal(found.labels, np.asarray(labels, found.labels.dtype))
    assert found.source == f"data_dir:{file}"
    assert found.sha256 == hashlib.sha256(content.encode()).hexdigest()
    assert found.num_skipped == 0


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_every_task_is_read_in_the_plain_layout(name, tmp_path):
    task = TASKS[name]
    texts = "sentence1\tsentence2" if task.is_pair else "sentence"
    header = f"{texts}\t{'score' if task.is_regression else 'label'}\tidx\n"
    row = "One .\tTwo ." if task.is_pair else "One ."
    written(tmp_path, f"{name}/train.tsv", f"{header}{row}\t1\t0\n{row}\t0\t1")
    found = load_examples(task, "train", tmp_path)
    assert found.first == ("One .", "One .")
    assert found.second == (("Two .", "Two .") if task.is_pair else None)
    assert found.labels.tolist() == [1, 0]
    assert found.source == f"data_dir:{name}/train.tsv"


def test_line_separators_inside_a_text_are_text(tmp_path):
    found = rte(tmp_path, "0\ta\u2028b\x85c\x0b\td\re\t0")
    assert (found.first, found.second) == (("a\u2028b\x85c\x0b",), ("d\re",))


def test_labels_are_names_in_any_case_or_their_numbers(tmp_path):
    found = rte(tmp_path, "0\ta\tb\t1", "1\ta\tb\tNot_Entailment", "2\ta\tb\t0")
    assert found.labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1\ta\tb", "line 3 has 3 cells instead of 4"),
        ("1\ta\tb\t0\tc", "line 3 has 5 cells instead of 4"),
        ("", "line 3 has 1 cells instead of 4"),
        ("1\t\tb\t0", "line 3 has an empty text"),
        ("1\ta\t \t0", "line 3 has an empty text"),
        ("1\ta\tb\t2", r"line 3 has the label '2'; RTE knows 0 \(entailment\), 1 \("),
        ("1\ta\tb\t", "line 3 has the label ''"),
        ("1\ta\tb\tneutral", "line 3 has the label 'neutral'"),
        ("1\ta\tb\t0.0", "line 3 has the label '0.0'"),
        ("1\ta\tb\t-1", "line 3 has the label -1: hidden"),
    ],
)
def test_a_malformed_row_is_an_error_that_names_its_line(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"RTE/dev.tsv` {message}") as caught:
        rte(tmp_path, "0\ta\tb\t0", row, "2\ta\tb\t0")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("score", ["5.1", "-0.1", "nan", "inf", "five", ""])
def test_a_score_outside_the_range_is_an_error_that_names_its_line(tmp_path, score):
    written(tmp_path, "stsb/dev.tsv", f"sentence1\tsentence2\tscore\na\tb\t{score}\n")
    with pytest.raises(DataError, match=f"line 2 has the score '{score}', not a numb"):
        load_examples(TASKS["stsb"], "dev", tmp_path)


def test_hidden_scores_are_refused(tmp_path):
    written(tmp_path, "stsb/dev.tsv", "sentence1\tsentence2\tscore\na\tb\t-1\n")
    with pytest.raises(DataError, match="line 2 has the label -1: hidden"):
        load_examples(TASKS["stsb"], "dev", tmp_path)


@pytest.mark.parametrize(
    ("name", "header", "message"),
    [
        ("rte", "index\tsentence1\tsentence2", "no column `label`; RTE needs"),
        ("qqp", "id\tqid1\tqid2\tquestion1\tquestion2", "no column `is_duplicate`"),
        ("qqp", "sentence1\tlabel", "no column `sentence2`.*`sentence1`, `sen"),
        ("sst2", "it 's charming\t1", "no column `sentence`; SST-2 needs a header"),
        ("rte", "index sentence1 sentence2 label", "no column `sentence1`"),
    ],
)
def test_a_missing_column_is_an_error_that_names_it(tmp_path, name, header, message):
    written(tmp_path, f"{name}/dev.tsv", f"{header}\n0\ta\tb\t0\n")
    with pytest.raises(DataError, match=f"dev.tsv` line 1 has {message}"):
        load_examples(TASKS[name], "dev", tmp_path)


def test_cola_without_its_four_columns_is_refused(tmp_path):
    written(tmp_path, "CoLA/dev.tsv", "gj04\t1\tNo star.\n")
    with pytest.raises(DataError, match="line 1 has 3 cells instead of 4"):
        load_examples(TASKS["cola"], "dev", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"index\tsentence1\tsentence2\tlabel\n", "holds no examples"),
        (b"sentence1\tsentence2\tlabel\ncaf\xe9\tb\t0\n", "is not UTF-8 text"),
    ],
)
def test_a_file_without_examples_is_an_error_that_names_it(tmp_path, content, message):
    written(tmp_path, "rte/dev.tsv", content)
    with pytest.raises(DataError, match=f"rte/dev.tsv` {message}"):
        load_examples(TASKS["rte"], "dev", tmp_path)


def qqp(root, *rows):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    written(root, "QQP/dev.tsv", "\n".join([header, *rows]))
    return load_examples(TASKS["qqp"], "dev", root)


def test_the_few_damaged_rows_of_qqp_are_skipped_and_counted(tmp_path):
    sound = ["0\t1\t2\tWhy?\tWhy not?\t1"] * 1000
    found = qqp(tmp_path, *sound, "0\t1\t2\tWhy", *sound, "0\t1\t2\tHow?\t\t0")
    assert (len(found.first), len(found.labels), found.num_skipped) == (2001, 2001, 1)
    # The hub keeps its empty texts.
    assert found.second is not None and found.second[-1] == ""
    with pytest.raises(DataError, match="line 12 has 4 cells instead of 6"):
        qqp(tmp_path, *sound[:10], "0\t1\t2\tWhy", *sound[:980])


def test_a_split_without_public_labels_is_refused():
    with pytest.raises(UsageError, match="train, dev. Got `split`=test"):
        load_examples(TASKS["rte"], "test")
    with pytest.raises(UsageError, match="train, dev_matched, dev_mismatched. Got"):
        load_examples(TASKS["mnli"], "dev")
    with pytest.raises(UsageError, match="Amazon reviews has labels for amazon. Got"):
        load_examples(TASKS["sentiment-amazon"], "train")


def rated(root, *rows):
    written(root, "sentiment/nyt.tsv", "\n".join(["id\trating\tsentence", *rows]))
    return load_examples(TASKS["sentiment-nyt"], "nyt", root)


def test_rated_sentences_keep_their_ratings(tmp_path):
    found = rated(
        tmp_path, "1_1\t-1\tDull, they say.", '1_2\t3.25\t"Fine" \u2028 it is.'
    )
    assert found.first == ("Dull, they say.", '"Fine" \u2028 it is.')
    assert found.second is None
    assert found.labels.dtype == np.float32 and found.labels.tolist() == [-1, 3.25]
    assert found.source == "data_dir:sentiment/nyt.tsv"


@pytest.mark.parametrize(
    ("rating", "says"),
    [
        ("0", "has the rating 0, neither negative nor positive"),
        ("4.5", "has the score '4.5', not a number from -4 to 4"),
        ("nan", "has the score 'nan', not a number"),
        ("good", "has the score 'good', not a number"),
    ],
)
def test_a_rating_without_a_class_is_an_error_that_names_its_line(
    tmp_path, rating, says
):
    with pytest.raises(DataError, match=rf"nyt\.tsv` line 3 {says}"):
        rated(tmp_path, "1\t2\tFine.", f"2\t{rating}\tWell.")
