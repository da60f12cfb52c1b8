"""Where evaluation texts come from: the user's folder, the repository, the hub."""

import gzip
import json
import types

import numpy as np
import pytest

from experiments.common import corpora
from experiments.common.calibration import CORPORA
from experiments.common.corpora import DATASETS
from experiments.common.text import load_text
from kashin_jax.errors import DataError
from kashin_jax.models.tokenizer import TokenizedText

PTB = ["no it was n't <unk> monday", "the index fell N points"]
C4 = [f"Text {i}\nof two lines." for i in range(1105)]
WIKITEXT_ROWS = ["", " = Title = \n", "", " Text . \n"]
WIKITEXT_RAW = " \n = Title = \n \n Text . \n"
FROM_HUB = {
    "wikitext2": WIKITEXT_RAW,
    "wikitext2-gptq": "\n\n = Title = \n\n\n\n\n Text . \n",
    "lambada": "One two three",
    "ptb": "no it was n't <unk> monday the index fell N points",
    "c4": " ".join(C4[:1100]),
}
FILES = {
    "wikitext2": "wikitext2/wiki.test.raw",
    "wikitext2-gptq": "wikitext2/wiki.test.raw",
    "lambada": "lambada/lambada_test.jsonl",
    "ptb": "ptb/ptb.test.txt",
    "c4": "c4/c4-validation.00000-of-00008.json.gz",
}


class Characters:
    """One token for each character."""

    bos_id = 0
    vocab_size = 0x110000

    def encode(self, text):
        return np.asarray([ord(c) for c in text], np.int32)

    def encode_with_bytes(self, text):
        sizes = [len(c.encode()) for c in text]
        return TokenizedText(self.encode(text), np.asarray(sizes, np.int32))

    def decode(self, ids, *, skip_special=False):
        return "".join(map(chr, ids.tolist()))


def written(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def user(tmp_path):
    """A folder with every file, in the layout of its source, as the hub's rows are."""
    written(tmp_path, FILES["wikitext2"], WIKITEXT_RAW.encode())
    written(tmp_path, FILES["lambada"], jsonl(["One two", "three"]))
    # Mikolov's lines begin and end with a space.
    written(tmp_path, FILES["ptb"], "".join(f" {line} \n" for line in PTB).encode())
    written(tmp_path, FILES["c4"], gzip.compress(jsonl(C4), mtime=0))
    return tmp_path


@pytest.fixture
def fake_hub(monkeypatch):
    """A hub that is reachable if `online` is set, with rows as they are there."""
    hub = types.SimpleNamespace(online=True, asked=[])
    tables = {
        "Salesforce/wikitext": {"text": WIKITEXT_ROWS},
        "EleutherAI/lambada_openai": {"text": ["One two", "three"]},
        "ptb-text-only/ptb_text_only": {"sentence": PTB},
        "allenai/c4": {"text": C4},
    }

    def dataset_info(self, repository, timeout):
        if not hub.online:
            raise OSError("no route to host")

    def load_dataset(repository, config, split, revision, data_files):
        hub.asked.append((repository, config, split, revision, data_files))
        return tables[repository]

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return hub


def test_the_hub_gives_what_neither_folder_nor_repository_has(tmp_path, fake_hub):
    for data_dir in (tmp_path, None):
        read = {name: DATASETS[name].read(data_dir) for name in FROM_HUB}
        assert read == FROM_HUB
    assert set(map(repr, fake_hub.asked)) == {
        repr(("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None, None)),
        repr(("EleutherAI/lambada_openai", "default", "test", None, None)),
        repr((
            "ptb-text-only/ptb_text_only", None, "test", "refs/convert/parquet",
            {"test": "penn_treebank/test/0000.parquet"},
        )),
        repr((
            "allenai/c4", None, "validation", None,
            {"validation": "en/c4-validation.00000-of-00008.json.gz"},
        )),
    }  # fmt: skip


def test_training_texts_come_from_the_hub_or_a_folder(tmp_path, fake_hub):
    """Guards the split that is asked for: test text in calibration would be a leak."""
    hub = {name: read(None) for name, read in CORPORA.items()}
    assert hub == {"wikitext2": WIKITEXT_RAW, "c4": "\n\n".join(C4)}
    assert set(map(repr, fake_hub.asked)) == {
        repr(("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None, None)),
        repr((
            "allenai/c4", None, "train", None,
            {"train": "en/c4-train.00000-of-01024.json.gz"},
        )),
    }  # fmt: skip
    written(tmp_path, "wikitext2/wiki.train.raw", b"Words.\n")
    content = gzip.compress(jsonl(["One", "two"]), mtime=0)
    written(tmp_path, "c4/c4-train.00000-of-01024.json.gz", content)
    found = {name: read(tmp_path) for name, read in CORPORA.items()}
    assert found == {"wikitext2": "Words.\n", "c4": "One\n\ntwo"}


def test_files_of_the_user_give_the_same_text_and_the_hub_is_not_asked(user, fake_hub):
    assert {name: DATASETS[name].read(user) for name in FROM_HUB} == FROM_HUB
    assert fake_hub.asked == []


def test_c4_may_lie_unpacked(user):
    packed = user / FILES["c4"]
    written(user, FILES["c4"].removesuffix(".gz"), gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert DATASETS["c4"].read(user) == FROM_HUB["c4"]


def test_the_embedded_text_never_asks_the_hub(tmp_path, fake_hub):
    assert corpora.wiki_vital(tmp_path) == corpora.wiki_vital(None)
    assert fake_hub.asked == []


def test_a_text_of_the_user_comes_before_the_embedded_one(tmp_path):
    written(tmp_path, "wiki_vital/test.txt", b"mine")
    assert corpora.wiki_vital(tmp_path) == "mine"


@pytest.mark.parametrize("dataset", FROM_HUB)
def test_offline_one_line_says_which_file_to_put_where(tmp_path, fake_hub, dataset):
    """No other text may be scored under the name of the one that is missing."""
    fake_hub.online = False
    for data_dir, file in (
        (tmp_path, tmp_path / FILES[dataset]),
        (None, FILES[dataset]),
    ):
        with pytest.raises(DataError) as error:
            load_text(dataset, Characters(), context=8, data_dir=data_dir)
        line = str(error.value)
        assert line.startswith(f"`{file}` is missing and `") and "\n" not in line
        assert line.endswith(
            "cannot be loaded from the hub (OSError); put the file into a folder that "
            "`--data_dir` names or go online."
        )
    assert fake_hub.asked == []


def test_a_data_dir_that_is_none_is_refused(tmp_path, fake_hub):
    for name in DATASETS:
        with pytest.raises(DataError, match="`--data_dir`=.*nowhere is not a folder"):
            DATASETS[name].read(tmp_path / "nowhere")
    assert fake_hub.asked == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not gzip", "cannot be read"),
        (gzip.compress(jsonl(C4), mtime=0)[:200], "cannot be read"),
        (gzip.compress(b"", mtime=0) , "is empty"),
        (gzip.compress(jsonl(C4[:2]) + b"{", mtime=0), "line 3 is not JSON"),
        (gzip.compress(b"\xff\n", mtime=0), "cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_c4_file_is_an_error_that_names_it(user, content, says):
    written(user, FILES["c4"], content)
    with pytest.raises(DataError, match=rf"json\.gz` {says}"):
        DATASETS["c4"].read(user)


def test_c4_is_cut_to_256_windows(user):
    """As in GPTQ, whatever the length of a window; all of PTB is scored."""
    text = load_text("c4", Characters(), context=16, data_dir=user)
    assert text.windows().tokens.shape == (256, 16)
    assert "the first 256 kept, last partial window dropped" in text.protocol
    assert text.notes == (
        "Published numbers use windows of 2048 tokens; these have 16 and cannot be "
        "compared with them.",
    )
    text = load_text("ptb", Characters(), context=16, data_dir=user)
    assert text.windows().tokens.shape == (51 // 16, 16)
