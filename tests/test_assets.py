"""The embedded files are the ones that the tables of results were made with."""

import hashlib
import itertools
import json
import re
import shutil

import pytest

from experiments.assets.make_texts import recorded_sha256
from experiments.common.calibration import load_calibration, unseen_documents
from experiments.common.text import ASSETS
from experiments.common.text_documents import split_documents
from experiments.train.corpus import TextSource
from experiments.train.stored import write_asset
from kashin_jax.errors import CheckpointError
from kashin_jax.io import open_checkpoint
from kashin_jax.models.context import trained_context

ROW = re.compile(r"\| `([^`]+)` \| [^|]+ \| ([\d,]+) \| `([0-9a-f]{64})` \|")
TABLE = {
    name: (int(size.replace(",", "")), sha256)
    for name, size, sha256 in ROW.findall((ASSETS / "ASSETS.md").read_text())
}
MODELS = {"opt-wiki-18m": 512, "llama-wiki-12m": 512, "minilm-glue": 128}


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", TABLE)
def test_an_asset_has_the_size_and_checksum_of_the_table(name):
    path = ASSETS / name
    assert (path.stat().st_size, sha256_of(path)) == TABLE[name]


def test_the_program_that_makes_the_texts_reads_the_table_as_the_test_does():
    assert recorded_sha256() == {name: sha256 for name, (_, sha256) in TABLE.items()}


def test_the_table_lists_every_asset():
    files = {
        path.relative_to(ASSETS).as_posix()
        for path in ASSETS.rglob("*")
        if path.is_file()
    }
    code = {name for name in files if name.endswith((".py", ".pyc"))}
    assert files - code == {*TABLE, "ASSETS.md", ".gitattributes"}


def test_test_and_validation_articles_are_new_to_the_model_and_to_calibration():
    """A title in two splits, or in the training text, would flatter a quantizer."""
    folder = ASSETS / "wiki_vital"
    splits = {
        name: set(
            re.findall(r"^ = (.+) = $", (folder / f"{name}.txt").read_text(), re.M)
        )
        for name in ("test", "valid", "calibration")
    }
    assert {name: len(titles) for name, titles in splits.items()} == {
        "test": 2554, "valid": 1755, "calibration": 4498
    }  # fmt: skip
    assert len(set.union(*splits.values())) == 8807
    seen = (folder / "seen_titles.txt").read_text("utf-8").splitlines()
    assert len(seen) == 327 and set(seen) <= splits["calibration"]


def test_documents_that_a_model_was_trained_on_are_not_for_its_calibration(tmp_path):
    """Guards statistics of memorized text: of halves, and of a record not written."""
    path = ASSETS / "wiki_vital" / "calibration.txt"
    text = path.read_text("utf-8")
    names = ("llama-wiki-12m", "opt-wiki-18m")
    llama, opt = (open_checkpoint(ASSETS / name) for name in names)
    assert unseen_documents(opt, text) is None
    assert unseen_documents(llama, text.replace("a", "b")) is None
    left = unseen_documents(llama, text)
    trained = list(TextSource((), "", 0.0, 0, (path,)).documents())
    documents = list(split_documents(left.split("\n")))
    assert len(documents) == len(trained) == 4498 / 2
    assert not set(documents) & set(trained)
    pairs = zip(trained, documents, strict=True)
    assert "\n\n".join(itertools.chain(*pairs)) + "\n" == text
    found = load_calibration("default", llama, 1024)
    assert found.name == "wiki_vital/calibration, odd documents"
    assert found.text_sha256 == hashlib.sha256(left.encode()).hexdigest()
    shutil.copytree(llama.directory, tmp_path / "new")
    write_asset(tmp_path / "new", name="new", context=64, even_files=[path])
    assert unseen_documents(open_checkpoint(tmp_path / "new"), text) == left
    write_asset(tmp_path / "new", name="new", context=64, even_files=[])
    assert unseen_documents(open_checkpoint(tmp_path / "new"), text) is None


def test_git_leaves_the_bytes_of_assets_alone():
    assert "* -text" in (ASSETS / ".gitattributes").read_text().splitlines()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_records_its_checksums_and_trained_context(name):
    model = ASSETS / name
    recorded = json.loads((model / "asset.json").read_text())
    assert recorded["sha256"] == {
        path.name: sha256_of(path)
        for path in model.iterdir()
        if path.name != "asset.json"
    }
    config = json.loads((model / "config.json").read_text())
    assert trained_context(model) == MODELS[name] <= config["max_position_embeddings"]


def test_a_checkpoint_without_the_record_has_no_trained_context(tmp_path):
    assert trained_context(tmp_path) is None


@pytest.mark.parametrize("content", ["{}", "[]", '{"trained_context": null}', "{", " "])
def test_a_damaged_record_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "asset.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"asset\.json"):
        trained_context(tmp_path)
