"""The embedded files are the ones that the tables of results were made with."""

import hashlib
import json
import re

import pytest

from experiments.text import ASSETS, trained_context
from kashin_jax.errors import CheckpointError

ROW = re.compile(r"\| `([^`]+)` \| [^|]+ \| ([\d,]+) \| `([0-9a-f]{64})` \|")
TABLE = {
    name: (int(size.replace(",", "")), sha256)
    for name, size, sha256 in ROW.findall((ASSETS / "ASSETS.md").read_text())
}
MODELS = {"opt-wiki-18m": 512, "minilm-glue": 128}


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", TABLE)
def test_an_asset_has_the_size_and_checksum_of_the_table(name):
    path = ASSETS / name
    assert (path.stat().st_size, sha256_of(path)) == TABLE[name]


def test_the_table_lists_every_asset():
    files = {
        path.relative_to(ASSETS).as_posix()
        for path in ASSETS.rglob("*")
        if path.is_file()
    }
    assert files == {*TABLE, "ASSETS.md", ".gitattributes"}


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
    assert trained_context(model) == MODELS[name] < config["max_position_embeddings"]


def test_a_checkpoint_without_the_record_has_no_trained_context(tmp_path):
    assert trained_context(tmp_path) is None


@pytest.mark.parametrize("content", ["{}", "[]", '{"trained_context": null}', "{", " "])
def test_a_damaged_record_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "asset.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"asset\.json"):
        trained_context(tmp_path)
