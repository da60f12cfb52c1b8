"""Training from the command line: log, export, resumption, bad input."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import ASSETS, arguments, config_of, sample_text

from experiments import train_lm
from experiments.common.results import read_jsonl
from experiments.train.recipe import TrainConfig, recipe_optimizer, recipe_schedule
from experiments.train.step import TrainState, init_state
from experiments.train.stored import Checkpoints
from experiments.train_lm import init_params, main, run
from kashin_jax.evaluation import make_windows, perplexity, window_nll
from kashin_jax.models.loading import load_language_model, load_opt
from kashin_jax.models.tokenizer import load_tokenizer

# A whole program on tiny models; its parts have tests of their own.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sample_text(), "utf-8")
    return path


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    config = config_of(
        text_file=(str(text_file),),
        out=str(out),
        cache_dir=str(out / "cache"),
        eval_file=str(ASSETS / "wiki_vital" / "valid.txt"),
        eval_every=4,
        eval_tokens=70,
    )
    assert run(config).export == out / "hf"
    return config, out


def test_the_loss_falls_and_the_log_says_how(finished):
    config, out = finished
    records = [record for record in read_jsonl(out / "log.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 4, 6, 8]
    assert records[0]["loss"] == pytest.approx(math.log(8192), rel=0.01)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert records[-1]["tokens"] == 8 * 4 * 16
    schedule = recipe_schedule(config)
    assert records[2]["learning_rate"] == pytest.approx(float(schedule(3)), rel=1e-5)
    assert all(record["tokens_per_second"] > 0 for record in records)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_of_a_finished_run_becomes_records_with_the_recipe(finished, tmp_path):
    config, out = finished
    keep = dataclasses.replace(config, results=str(tmp_path / "results"))
    run(keep)
    run(keep)
    records = read_jsonl(tmp_path / "results" / "train_lm.jsonl")
    log = read_jsonl(out / "log.jsonl")
    assert [r["step"] for r in records] == [line["step"] for line in log]
    for record, line in zip(records, log, strict=True):
        assert record.items() >= line.items()
        assert record["kind"] in ("training", "validation")
        assert record["config"]["steps"] == config.steps
        assert record["config"]["text_file"] == [Path(config.text_file[0]).name]
        assert "/" not in record["config"]["eval_file"]


def test_the_export_loads_and_has_the_validated_perplexity(finished):
    config, out = finished
    loaded = load_opt(str(out / "hf"))
    assert loaded.config.to_dict() == config.model_config(8192).to_dict()
    assert loaded.stored_dtype == "float16"
    assert json.loads((out / "hf" / "asset.json").read_text())["trained_context"] == 16

    tokenizer = load_tokenizer(out / "hf")
    ids = tokenizer.encode(Path(config.eval_file).read_text("utf-8"))[:69]
    windows = make_windows(np.r_[tokenizer.bos_id, ids], context=16, drop_last=False)
    tokens, scored = jnp.asarray(windows.tokens), jnp.asarray(windows.scored)
    nlls = window_nll(loaded.model(tokens), tokens, scored)
    record = [r for r in read_jsonl(out / "log.jsonl") if "validation_loss" in r][-1]
    assert record["step"] == 8
    assert record["validation_predictions"] == windows.scored.sum() == 65
    value = perplexity(np.asarray(nlls, np.float64), windows)
    assert record["validation_perplexity"] == pytest.approx(value, rel=1e-3)


def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(
    finished, text_file, tmp_path, capsys
):
    flags = arguments(text_file=text_file, out=tmp_path, cache_dir=tmp_path / "cache")
    assert main([*flags, "--stop_after=3"]) == 3
    assert "Stopped after 3 of 8 steps" in capsys.readouterr().out
    assert not (tmp_path / "hf").exists()
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    assert main(flags) == 0
    config, out = finished
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (out / "hf" / name).read_bytes()
    steps = [record["step"] for record in read_jsonl(tmp_path / "log.jsonl")]
    assert steps == [1, 2, 4, 6, 8]
    assert main(flags) == 0, "a finished run may be asked for again"


def test_a_llama_learns_from_an_opt_and_the_best_one_is_kept(
    finished, tmp_path, capsys, monkeypatch
):
    """Guards teacher, start, export and end of a run with patience, also resumed."""
    config, out = finished
    values = {
        "text_file": config.text_file[0],
        "cache_dir": config.cache_dir,
        "eval_file": config.eval_file,
        "eval_every": 2,
        "architecture": "llama",
        "teacher": out / "hf",
        "start": "teacher",
        "kv_heads": 1,
        "ffn_dim": 24,
        "patience": 1,
        "learning_rate": 1e-3,
    }
    flags = arguments(**values)
    seen = {}

    def validate(step, params):
        seen[step] = np.asarray(params["embed_tokens"]["embedding"][...])
        return {"validation_loss": {2: 5.0, 4: 4.0}.get(step, 4.5)}

    monkeypatch.setattr(train_lm, "make_validator", lambda *args: validate)
    assert main([*flags, f"--out={tmp_path / 'a'}"]) == 0
    assert sorted(seen) == [2, 4, 6]
    records = read_jsonl(tmp_path / "a" / "log.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    # A random one begins at .9 of the logarithm of 8,192 or more.
    assert losses[0] < 2
    loaded = load_language_model(tmp_path / "a" / "hf")
    assert loaded.config.model_type == "llama"
    assert loaded.config.num_key_value_heads == 1
    kept = np.asarray(loaded.model.embed_tokens.embedding[...])
    np.testing.assert_array_equal(kept, seen[4].astype(np.float16))
    assert not np.array_equal(kept, seen[6].astype(np.float16))

    flags.append(f"--out={tmp_path / 'b'}")
    assert main([*flags, "--stop_after=3"]) == 3
    assert main(flags) == 0
    weights = [tmp_path / name / "hf" / "model.safetensors" for name in "ab"]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert main(flags) == 0, "a finished run may be asked for again"

    flags = [*flags[:-1], f"--out={tmp_path / 'c'}"]
    assert main([*flags, f"--teacher={tmp_path / 'a' / 'hf'}"]) == 2
    assert "is of the architecture llama; give `--start=random`" in (
        capsys.readouterr().err
    )


def test_a_damaged_checkpoint_is_named(finished, tmp_path, capsys):
    config, out = finished
    shutil.copytree(out, tmp_path / "copy")
    file = max((tmp_path / "copy" / "checkpoints" / "8").rglob("d/*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    flags = arguments(
        text_file=config.text_file[0], out=tmp_path / "copy", cache_dir=config.cache_dir
    )
    assert main(flags) == 1
    message = capsys.readouterr().err
    assert (
        "checkpoints/8` is damaged; remove it" in message and message.count("\n") == 1
    )


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(
    finished, tmp_path, capsys
):
    config, _ = finished
    params = init_params(config, config.model_config(8192))
    state = init_state(params, recipe_optimizer(config))
    nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state.params)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(TrainState(nothing, state.opt_state, jnp.int32(5)))
    checkpoints.close()
    flags = arguments(
        text_file=config.text_file[0], out=tmp_path, cache_dir=config.cache_dir
    )
    assert main(flags) == 1
    message = capsys.readouterr().err
    assert "stopped being finite by step 6" in message and message.count("\n") == 1
    assert os.listdir(tmp_path / "checkpoints") == ["5"]
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_two_devices_share_the_batch_and_learn_the_same(finished, tmp_path):
    config, out = finished
    flags = arguments(text_file=config.text_file[0], cache_dir=config.cache_dir)
    flags += [f"--out={tmp_path}", "--stop_after=2"]
    script = (
        "import sys; from experiments.train_lm import main; flags = sys.argv[1:]; "
        "assert main([*flags, '--batch_size=3']) == 2; sys.exit(main(flags))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *flags],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert "does not divide over 2 devices" in done.stderr
    mine = read_jsonl(tmp_path / "log.jsonl")
    theirs = read_jsonl(out / "log.jsonl")[:2]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in mine] == pytest.approx(
            [r[key] for r in theirs], rel=1e-4
        )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"context": 25}, "`--context`=25 exceeds `--max_positions`=24"),
        ({"heads": 3}, "`--heads`=3 must divide `--hidden_size`=16"),
        ({"grad_accumulation": 3}, "`--grad_accumulation`=3 must divide"),
        ({"warmup_steps": 8}, "`--warmup_steps`=8 must be below `--steps`=8"),
        ({"dtype": "float16"}, "`--dtype` must be bfloat16 or float32"),
        ({"dropout": 1.0}, "`--dropout` must be in [0, 1)"),
        ({"learning_rate": "nan"}, "`--learning_rate` must be positive"),
        ({"batch_size": 0}, "`--batch_size` must be at least 1"),
        ({"vocab_size": 259}, "`--vocab_size` must be 0 or at least 260"),
        ({"steps": "many"}, "--steps=many"),
        ({"speed": 3}, "speed"),
        ({"out": ""}, "`--out` must be given"),
        ({"out": "/dev/null/run"}, "`--out=/dev/null/run` cannot be written"),
        ({"cache_dir": "/dev/null/c"}, "`--cache_dir=/dev/null/c` cannot be written"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    changes, named, text_file, tmp_path, capsys
):
    good = {"text_file": text_file, "out": tmp_path / "o", "cache_dir": tmp_path / "c"}
    assert main(arguments(**good | changes)) == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1
    assert not list(tmp_path.glob("c/*"))


@pytest.mark.parametrize(
    ("content", "changes", "named"),
    [
        (None, {}, "text.txt` cannot be read (No such file or directory)"),
        (b"", {}, "text.txt` is empty"),
        (b" \n\n \n", {}, "text.txt` holds no text"),
        (b"A caf\xe9.\n" * 9, {}, "text.txt` is not UTF-8"),
        (b"Too short.", {}, "too few for one window; lower `--context`=16"),
        (b"Enough text. " * 9, {"tokenizer": "no/where"}, "no/where/tokenizer.json`"),
        (b"Enough text. " * 9, {"vocab_size": 5000}, "lower `--vocab_size`=5000"),
        (b"Enough text. " * 9, {"eval_file": "no.txt"}, "`no.txt` cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_exit_code_1(
    content, changes, named, tmp_path, capsys
):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    good = {"text_file": text, "out": tmp_path / "o", "cache_dir": tmp_path / "c"}
    assert main(arguments(**good | changes)) == 1
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1


def test_the_directory_of_another_run_is_refused(finished, tmp_path, capsys):
    config, out = finished
    good = {"text_file": config.text_file[0], "out": out, "cache_dir": tmp_path}
    assert main(arguments(**good | {"seed": 1})) == 1
    assert "holds a run with `seed`=0, not 1" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text("Some other text, long enough for one window of sixteen. " * 3)
    assert main(arguments(**good | {"text_file": other})) == 1
    assert "with `text_and_tokenizer`=" in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(field.name in text for field in dataclasses.fields(TrainConfig))
