"""What the README promises is run and compared, not believed."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end of table -->", re.DOTALL)


@pytest.mark.heavy
def test_the_library_examples_run_as_they_stand(capsys):
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 2
    names: dict = {}
    for code in examples:
        exec(compile(code, "README.md", "exec"), names)
    assert names["y"].shape == (8, 1536)
    assert names["dense"].shape == (384, 1536)
    assert 4 < names["bits_per_weight"](names["packed"]) < 4.07
    assert names["logits"].shape == (8, 10)
    assert len(names["reports"]) == 2
    assert set(names["mixed_reports"]) == {f"layers/{i}" for i in range(5)}
    assert "layers/2" in capsys.readouterr().out


def test_every_table_is_the_one_in_the_result_file():
    tables = TABLE.findall(README)
    assert tables
    for file, pasted in tables:
        result = (ROOT / file).read_text(encoding="utf-8")
        rows = [line for line in pasted.splitlines() if line.startswith("|")]
        assert len(rows) > 2
        assert "\n".join(rows) in result


def test_the_main_table_scores_the_whole_text_with_every_method():
    [(file, _), *_] = TABLE.findall(README)
    lines = (ROOT / file).with_suffix(".jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["method"] for record in records} >= {
        "full precision", "kashin", "kashin-authors", "kashin-joint", "uniform",
        "k-means", "rtn-channel", "rtn-g128", "nf4-g64", "hqq-g64", "rotate-rtn-g64",
        "k-means-channel", "rotate-k-means",
    }  # fmt: skip
    assert {record["text_sha256"][:12] for record in records} == {"173c87a53759"}
    assert all(record["tokens"] > 320_000 for record in records)


@pytest.mark.parametrize("target", ["run", "test"])
def test_both_commands_are_make_targets(target):
    makefile = (ROOT / "Makefile").read_text()
    assert f"    make {target}\n" in README
    assert re.search(rf"^{target}: setup", makefile, re.MULTILINE)


def test_every_path_that_is_named_exists():
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(
        r"\b(?:experiments|results|notebooks|tests|kashin_jax|benchmarks)/[\w./-]+\w",
        text,
    )
    missing = [path for path in named if not (ROOT / path).exists()]
    assert named and not missing
