"""Where GLUE's examples come from: the user's files, the embedded ones, the hub."""

import types

import numpy as np
import pytest

from experiments.classification import data
from experiments.classification.data import embedded_tasks, has_files, load_examples
from experiments.classification.tasks import GLUE_TASKS, TASKS
from kashin_jax.errors import DataError


def written(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")


def test_a_data_dir_that_is_none_is_refused(tmp_path):
    with pytest.raises(DataError, match="`--data_dir`=.*nowhere is not a folder"):
        load_examples(TASKS["sst2"], "dev", tmp_path / "nowhere")


def test_the_embedded_files_are_found_and_whole():
    assert embedded_tasks() == ("sentiment-amazon", "sentiment-nyt")
    for name in embedded_tasks():
        found = load_examples(TASKS[name], TASKS[name].evaluation_splits[0])
        # As many of either side, none rated close to neither.
        assert (len(found.first), int((found.labels > 0).sum())) == (1000, 500)
        assert 1 <= np.abs(found.labels).min() and np.abs(found.labels).max() <= 4
        assert len(set(found.labels.tolist())) > 20
        assert found.source == "embedded"


def test_a_file_of_the_user_comes_before_the_embedded_one(tmp_path):
    written(tmp_path, "sst2/dev.tsv", "sentence\tlabel\nfine\t1\n")
    assert load_examples(TASKS["sst2"], "dev", tmp_path).first == ("fine",)
    written(tmp_path, "sentiment/nyt.tsv", "id\trating\tsentence\n1\t2.5\tfine\n")
    assert load_examples(TASKS["sentiment-nyt"], "nyt", tmp_path).first == ("fine",)
    other = load_examples(TASKS["sentiment-amazon"], "amazon", tmp_path)
    assert other.source == "embedded"


def test_glue_may_lie_in_a_folder_of_its_own_beside_other_texts(tmp_path):
    for folder in ("sst2", "SST-2"):
        place = tmp_path / folder
        written(place, f"glue/{folder}/dev.tsv", "sentence\tlabel\nfine\t1\n")
        assert has_files(TASKS["sst2"], place)
        found = load_examples(TASKS["sst2"], "dev", place)
        assert found.source == f"data_dir:glue/{folder}/dev.tsv"
    assert not has_files(TASKS["rte"], place)


def test_an_embedded_file_that_is_gone_is_an_error_and_not_asked_for(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "EMBEDDED", tmp_path)
    with pytest.raises(DataError, match=r"sentiment/nyt\.tsv` is missing; restore it"):
        load_examples(TASKS["sentiment-nyt"], "nyt")


class HubTable(dict):
    """Columns by name, with the features that `datasets` gives beside them."""

    def __init__(self, names, columns):
        super().__init__(columns)
        self.features = {"label": types.SimpleNamespace(names=list(names))}


@pytest.fixture
def fake_hub(monkeypatch):
    """A hub that is reachable if `online` is set."""
    hub = types.SimpleNamespace(online=True, asked=[], tables={})

    def dataset_info(self, repository, timeout):
        if not hub.online:
            raise OSError("no route to host")

    def load_dataset(repository, config, split, revision, data_files):
        assert (revision, data_files) == (None, None)
        hub.asked.append((repository, config, split))
        return hub.tables[config]

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return hub


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_the_hub_gives_what_is_in_no_file(name, fake_hub, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "EMBEDDED", tmp_path)
    task = TASKS[name]
    # Column names of the hub's data card.
    columns = {
        "qqp": ("question1", "question2"),
        "mnli": ("premise", "hypothesis"),
        "qnli": ("question", "sentence"),
    }.get(name, ("sentence1", "sentence2") if task.is_pair else ("sentence",))
    fake_hub.tables[name] = {c: [f"{c} a ", f"{c} b"] for c in columns} | {
        "label": [3.25, 0.5] if task.is_regression else [1, 0]
    }
    split = task.evaluation_splits[-1]
    found = load_examples(task, split)
    hub_split = "validation_mismatched" if name == "mnli" else "validation"
    assert fake_hub.asked == [("nyu-mll/glue", name, hub_split)]
    assert found.first == (f"{columns[0]} a ", f"{columns[0]} b")
    assert (found.second is not None) == task.is_pair
    assert found.labels.tolist() == fake_hub.tables[name]["label"]
    assert found.source == "nyu-mll/glue"
    fake_hub.tables[name]["label"] = [0, 0]
    assert load_examples(task, split).sha256 != found.sha256


def test_train_is_asked_of_the_hub_under_its_own_name(fake_hub):
    fake_hub.tables["rte"] = HubTable(
        TASKS["rte"].labels, {"sentence1": ["a"], "sentence2": ["b"], "label": [1]}
    )
    assert load_examples(TASKS["rte"], "train").labels.tolist() == [1]
    assert fake_hub.asked == [("nyu-mll/glue", "rte", "train")]


def test_a_hub_with_another_order_of_labels_is_refused(fake_hub):
    columns = {"sentence1": ["a"], "sentence2": ["b"], "label": [1]}
    fake_hub.tables["rte"] = HubTable(["not_entailment", "entailment"], columns)
    with pytest.raises(DataError, match="not_entailment, entailment instead of entail"):
        load_examples(TASKS["rte"], "dev")


def test_a_hub_with_other_columns_is_an_error_that_says_what_to_do(fake_hub):
    fake_hub.tables["cola"] = {"text": ["a"], "label": [1]}
    with pytest.raises(
        DataError, match=r"cannot be loaded .* \(KeyError\); put the fi"
    ):
        load_examples(TASKS["cola"], "dev")


def test_an_empty_text_of_the_hub_is_kept_as_published_numbers_have_it(fake_hub):
    columns = {"sentence1": ["a"], "sentence2": [""], "label": [1]}
    fake_hub.tables["rte"] = columns
    assert load_examples(TASKS["rte"], "dev").second == ("",)


def test_hidden_labels_of_the_hub_are_refused(fake_hub):
    fake_hub.tables["cola"] = {"sentence": ["a", "b"], "label": [1, -1]}
    with pytest.raises(
        DataError, match="nyu-mll/glue` cola dev row 1 has the label -1"
    ):
        load_examples(TASKS["cola"], "dev")


def test_offline_the_error_says_which_file_to_put_where(tmp_path, fake_hub):
    fake_hub.online = False
    with pytest.raises(DataError, match=r"`RTE/dev.tsv` is missing .*`--data_dir` nam"):
        load_examples(TASKS["rte"], "dev")
    with pytest.raises(DataError, match=rf"`{tmp_path}/RTE/dev.tsv` is missing"):
        load_examples(TASKS["rte"], "dev", tmp_path)
    assert fake_hub.asked == []
