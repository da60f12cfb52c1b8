"""Every code block of the guides runs as it stands, page by page, on tiny models."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import jax
import pytest
import tiny_finetuning
from tiny_checkpoint import make_checkpoint

from kashin_jax.cli import main
from kashin_jax.methods import config_from_json, config_to_json, method_names

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ROOT / "docs" / "guides"
RULES = (GUIDES / "rules.md").read_text("utf-8")
BLOCK = re.compile(r'^```(\w+)(?: title="(\S+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)
SCORED = re.compile(
    r" perplexity, \d\.\d+ bits per byte, \d+ predictions, context 64, begins with ",
    re.MULTILINE,
)
# What a guide takes as given. Readers have a trained model there.
SMALL_RUN = "--epochs=0.2 --batch_size=16 --max_length=24 --checkpoint_every=100"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A language model, a text, an encoder and a task, by the names of the guides."""
    folder = tmp_path_factory.mktemp("guides")
    make_checkpoint(folder / "model")
    (folder / "model.txt").rename(folder / "text.txt")
    return folder


@pytest.fixture
def here(given, tmp_path, monkeypatch):
    """An empty directory in which those names are found."""
    for path in given.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(line):
    """Runs a command of a shell block in this process; returns its exit code."""
    words = shlex.split(line, comments=True)
    if words[0] == "kashin":
        return main(words[1:])
    assert words[:2] == ["python", "-m"], f"no test runs `{line}`"
    program = importlib.import_module(words[2])
    return program.main([*words[3:], *shlex.split(SMALL_RUN)])


def run_page(name):
    """Runs the blocks of a page in order; returns its names and what was printed."""
    names = {"__name__": name}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for kind, title, code in BLOCK.findall((GUIDES / name).read_text("utf-8")):
            if kind == "python":
                exec(compile(code, name, "exec"), names)
            elif kind in ("json", "yaml"):
                Path(title).write_text(code, "utf-8")
            else:
                assert kind == "sh", f"{name} has a block of the kind {kind}"
                for line in code.splitlines():
                    assert run_command(line) == 0, line
    return names, printed.getvalue()


def test_no_block_of_a_guide_is_left_out():
    """Guards the tests below against blocks that they would not see."""
    for path in GUIDES.glob("*.md"):
        text = path.read_text("utf-8")
        fences = len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE))
        assert fences == 2 * len(BLOCK.findall(text)) > 0, path.name


@pytest.mark.slow
def test_the_guide_of_flax_models_runs(here):
    names, printed = run_page("flax.md")
    assert set(names["result"].reports) == {"up", "down"}
    assert "Quantized: " in printed and "stays" in printed
    # Both ways of Linen are one product.
    assert jax.numpy.allclose(names["y"], names["same"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_guide_of_checkpoints_runs(here):
    names, printed = run_page("checkpoint.md")
    assert "Already done: small" in printed
    assert len(SCORED.findall(printed)) == 2
    assert len(names["matrices"]) == 12


def test_the_guide_of_rules_runs_and_file_and_python_agree(here):
    names, printed = run_page("rules.md")
    assert "skipped by the rules" in printed
    ours, file = names["rules"], names["same_as_the_file"]
    for path in ("layers/0/fc1", "layers/0/fc2", "layers/1/self_attn/v_proj"):
        assert ours.config_for(path) == file.config_for(path)


def test_the_guide_of_saving_runs(here):
    run_page("saving.md")
    assert (here / "quantized-safetensors" / "model.safetensors").is_file()


def test_the_guide_of_choosing_runs(here):
    _, printed = run_page("choosing.md")
    assert len(SCORED.findall(printed)) == 2


def test_the_guide_of_evaluating_runs(here, monkeypatch):
    # Not where the user's own data sets are.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", here / "cache")
    _, printed = run_page("evaluating.md")
    assert len(SCORED.findall(printed.replace("stride 32, ", ""))) == 2
    assert "stride 32" in printed
    assert re.search(r"^last_word +acc +0 +2 ", printed, re.MULTILINE)


@pytest.mark.slow
def test_the_guide_of_fine_tuning_runs(here):
    tiny_finetuning.write_model(here / "encoder")
    tiny_finetuning.write_tasks(here / "glue")
    # Optax counts its steps in int32 and raises floats to that power.
    with jax.numpy_dtype_promotion("standard"):
        run_page("finetuning.md")
    assert (here / "refined" / "quantized" / "model.safetensors").is_file()


def test_the_page_of_rules_names_every_method_and_field():
    for name in method_names():
        (row,) = re.findall(rf"^\| `{name}` \| (.*)$", RULES, re.MULTILINE)
        fields = config_to_json(config_from_json({"method": name}))
        assert re.findall(r"`(\w+)`(?= )", row)[0] == "bits"
        missing = [f for f in fields if f != "method" and f"`{f}`" not in row]
        assert missing == [], name
        described = RULES.split("| field | meaning |\n|---|---|\n| `bits`")[1]
        assert [f for f in fields if f not in ("method", "bits")
                and f"`{f}`" not in described] == []  # fmt: skip
