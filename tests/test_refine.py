"""Refinement: what decodes codes learns, codes stay; judged on windows held out."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interruptions import Calls
from test_calibration import GPTQ, files, windows
from tiny_checkpoint import VOCABULARY, edit_tensors, make_checkpoint, row, table
from tiny_classifier import make_classifier

from kashin_jax import JointKashin, quantize
from kashin_jax.cli import main
from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.io import open_checkpoint
from kashin_jax.layers import QuantizedLinear
from kashin_jax.layers.packed import pack
from kashin_jax.models.loading import load_language_model
from kashin_jax.pipeline import (
    REPORT_NAME,
    Refinement,
    inspect_checkpoint,
    load_quantized,
    quantize_checkpoint,
    quantize_model,
    refine_checkpoint,
    refine_model,
    refined_checkpoint,
)
from kashin_jax.pipeline.paths import at_path
from kashin_jax.pipeline.refinable import take_apart
from kashin_jax.pipeline.report import read_report

TEXT = windows(count=16)
# 14 windows to learn from in batches of 4.
SHORT = Refinement(block_epochs=1, epochs=1, rate=1e-3, batch_tokens=4 * TEXT.shape[1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """By round-to-nearest at two bits; not to be changed."""
    target = tmp_path_factory.mktemp("quantized") / "packed"
    quantize_checkpoint(tiny, target, GPTQ)
    return target


@pytest.fixture(scope="module")
def refined(tiny, packed, tmp_path_factory):
    """Not to be changed."""
    target = tmp_path_factory.mktemp("refined") / "refined"
    return refine_checkpoint(packed, target, tiny, TEXT, SHORT)


def test_every_stage_loses_less_on_windows_that_were_held_out(refined):
    gains = refined.gains
    for gain in (*gains.blocks, gains.whole):
        assert gain.after < gain.before


def test_codes_stay_and_what_decodes_them_moves(packed, refined):
    before, after = open_checkpoint(packed), open_checkpoint(refined.directory)
    assert before.names() == after.names()
    moved = set()
    for name in before.names():
        old, new = before.load(name), after.load(name)
        if not before.is_packed(name):
            assert old.dtype == new.dtype
            if not np.array_equal(old, new):
                moved.add(name.split(".")[-1])
                assert old.ndim == 1
            continue
        assert old.layout == new.layout
        for leaf, value in old.leaves().items():
            same = np.array_equal(value, new.leaves()[leaf])
            assert same == (leaf in ("packed_codes", "zero", "seed")), leaf
            assert value is None or value.dtype == new.leaves()[leaf].dtype
    assert moved == {"weight", "bias"}
    sizes = [inspect_checkpoint(each).packed_bits for each in (packed, after.directory)]
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_the_file_is_the_model_and_says_what_it_is(packed, tiny, refined):
    model, _ = refine_model(
        load_quantized(packed).model, load_language_model(tiny).model, TEXT, SHORT
    )
    found = load_quantized(refined.directory).model
    # Vectors are stored in half precision, as the original has them.
    np.testing.assert_allclose(
        found(jnp.asarray(TEXT[:2])), model(jnp.asarray(TEXT[:2])), atol=2e-2
    )
    config = open_checkpoint(refined.directory).quantization
    assert config["refined"] is True
    written = read_report(refined.directory / REPORT_NAME)
    before = read_report(packed / REPORT_NAME)
    assert written.keys() == before.keys()
    name = next(iter(written))
    assert written[name].relative_squared_error != before[name].relative_squared_error


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tiny, packed, refined, tmp_path, monkeypatch
):
    """Guards moments of the optimizer, refined blocks, and hidden states on disk."""
    calls = Calls(refined_checkpoint.write_tensors)
    # Both blocks are done, all together is not.
    calls.interrupted_at = 3
    monkeypatch.setattr(refined_checkpoint, "write_tensors", calls)
    run = partial(
        refine_checkpoint, packed, tmp_path / "r", tiny, refinement=SHORT, held_bytes=0
    )
    with pytest.raises(KeyboardInterrupt):
        run(windows=TEXT)
    with pytest.raises(UsageError, match="other text or refinement"):
        run(windows=windows(seed=1))
    calls.interrupted_at = None
    run(windows=TEXT)
    assert files(tmp_path / "r") == files(refined.directory)
    assert not list((tmp_path / "r").glob(".refined-*"))


@pytest.mark.slow
def test_a_stage_that_brings_nothing_is_undone(tiny, packed):
    """Guards "never worse": steps so large that everything is destroyed."""
    model = load_quantized(packed).model
    wild = dataclasses.replace(SHORT, block_rate=30.0, rate=30.0)
    found, gains = refine_model(model, load_language_model(tiny).model, TEXT, wild)
    for gain in (*gains.blocks, gains.whole):
        assert not gain.after < gain.before
    before, after = nnx.state(model), nnx.state(found)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_blocks_that_share_a_layer_learn_end_to_end_alone(tiny, caplog):
    """Guards a layer in two blocks against becoming two."""
    original = load_language_model(tiny).model
    original.decoder.layers[1].fc1 = original.decoder.layers[0].fc1
    model = quantize_model(original, rules=GPTQ).model
    short = dataclasses.replace(SHORT, epochs=0)
    found, gains = refine_model(model, original, TEXT, short)
    assert found.decoder.layers[0].fc1 is found.decoder.layers[1].fc1
    assert gains.blocks == ()
    assert "Blocks 0, 1 of decoder/layers have parts in common" in caplog.text


def test_scales_in_common_and_products_of_levels_stay_such():
    """Guards what a reader assumes: one array for layers that share, u x v levels."""

    class Pair(nnx.Module):
        def __init__(self):
            weights = jax.random.normal(jax.random.key(0), (2, 16, 32))
            scale = jnp.linspace(0.5, 2, 16).astype(jnp.float16)
            known, config = {}, JointKashin(bits=2, effort="fast")
            tensors = [
                quantize(w, config, jax.random.key(1))[0].replace(in_scale=scale)
                for w in weights
            ]
            self.first, self.second = (
                QuantizedLinear(pack(tensor, known)) for tensor in tensors
            )

        def __call__(self, x):
            return self.first(x) + self.second(x)

    model = Pair()
    assert model.first.inputs is model.second.inputs
    parts = take_apart(model)
    x = jnp.ones((3, 16))

    def loss(params):
        return jnp.sum(jnp.square(parts.structure.model(params, parts.frozen)(x) - 1))

    gradient = jax.grad(loss)(parts.params)
    moved = [
        p - 0.01 * jnp.sign(g) for p, g in zip(parts.params, gradient, strict=True)
    ]
    found = parts.model(moved)
    scales = [e.kernel.get_value().in_scale for e in (found.first, found.second)]
    np.testing.assert_array_equal(*scales)
    old = model.first.kernel.get_value()
    assert not np.array_equal(scales[0], old.in_scale)
    new = found.first.kernel.get_value()
    grid = new.centroids.reshape(-1, 2**new.layout.v_bits, 2)
    assert not np.array_equal(new.centroids, old.centroids)
    assert (grid[..., 0] == grid[:, :1, 0]).all()
    assert (grid[..., 1] == grid[:1, :, 1]).all()
    np.testing.assert_allclose(found(x), parts.structure.model(moved, parts.frozen)(x))


def test_vectors_are_rounded_to_what_a_file_will_hold(packed):
    """Guards what is judged: norms of bfloat16 models move by a step or two."""
    model = load_quantized(packed).model
    path = "decoder/final_layer_norm/scale"
    parts = take_apart(model, {path: "bfloat16"})
    put_together = jax.jit(lambda params: nnx.state(parts.model(params)))
    moved = nnx.clone(model)
    nnx.update(moved, put_together([each + 1e-3 for each in parts.params]))
    for name, is_rounded in ((path, True), (path.replace("scale", "bias"), False)):
        value = at_path(moved, name).get_value()
        assert value.dtype == jnp.float32
        rounded = value.astype(jnp.bfloat16).astype(jnp.float32)
        assert bool((value == rounded).all()) == is_rounded


def test_wrong_use_is_an_error_that_names_the_remedy(tiny, packed, tmp_path):
    target = tmp_path / "r"
    with pytest.raises(UsageError, match="quantize it first"):
        refine_checkpoint(tiny, target, tiny, TEXT)
    with pytest.raises(UsageError, match="is quantized itself"):
        refine_checkpoint(packed, target, packed, TEXT)
    with pytest.raises(UsageError, match="two windows"):
        refine_checkpoint(packed, target, tiny, TEXT[:1])
    with pytest.raises(UsageError, match="windows of one token"):
        refine_checkpoint(packed, target, tiny, TEXT[:, :1])
    with pytest.raises(UsageError, match="is read from"):
        refine_checkpoint(packed, packed.parent, tiny, TEXT, replace="finished")
    other = make_classifier(tmp_path / "classifier", "sst2")
    with pytest.raises(UsageError, match="cannot be refined|has shape"):
        refine_checkpoint(packed, target, other, TEXT)
    with pytest.raises(UsageError, match=f"no token {VOCABULARY}"):
        refine_checkpoint(packed, target, tiny, TEXT + VOCABULARY - TEXT.max())
    assert not (target / "config.json").exists()
    with pytest.raises(UsageError, match="block_epochs"):
        Refinement(block_epochs=0, epochs=0)
    with pytest.raises(UsageError, match="`rate` must be positive"):
        Refinement(rate=float("nan"))


def test_weights_that_are_not_finite_end_in_an_error(tiny, packed, tmp_path):
    broken = make_checkpoint(tmp_path / "broken")

    def spoil(tensors):
        name = next(name for name in tensors if name.endswith("norm.bias"))
        tensors[name] = np.full_like(tensors[name], np.nan)

    edit_tensors(broken, spoil)
    with pytest.raises(NonFiniteError, match=r"norm\.bias"):
        refine_checkpoint(packed, tmp_path / "r", broken, TEXT, SHORT)


def test_the_command_refines_and_says_what_it_brought(tiny, packed, tmp_path, capsys):
    text = tiny.with_suffix(".txt")
    command = ["refine", str(packed), str(tiny), str(tmp_path / "r")]
    command += [f"--calibration={text}", "--calibration-tokens=256"]
    command += ["--block-epochs=0", "--epochs=1", "--text-weight=0.25"]
    assert main(command) == 0
    assert "End to end:" in capsys.readouterr().out
    assert main(command) == 0
    assert "Already done" in capsys.readouterr().out
    assert main([*command, "--seed=1"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--seed=1", "--force"]) == 0
    assert main([*command, "--text-weight=1.5"]) == 2


@pytest.mark.slow
def test_the_main_job_has_refined_rows_and_their_control(tiny, tmp_path):
    """Guards the control: the text's own tokens teach a full-precision model, too."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.with_suffix(".txt").read_text()[::-1])
    flags = [f"--calibration={text}", "--calibration_tokens=256"]
    flags += ["--bits=3", "--methods=gptq-g128,gptq-g128-refined"]
    records = table(tiny, tmp_path / "out", *flags)
    names = ["full precision", "full precision, refined", "gptq-g128"]
    assert [r["method"] for r in records] == [*names, "gptq-g128-refined"]
    refined, before = (row(records, f"gptq-g128{end}") for end in ("-refined", ""))
    assert refined["stored_bits_per_weight"] == before["stored_bits_per_weight"]
    assert refined["perplexity"] != before["perplexity"]
    assert refined["refinement"]["text_weight"] == Refinement().text_weight
    control = row(records, "full precision, refined")
    full = row(records, "full precision")
    assert control["stored_bits_per_weight"] == full["stored_bits_per_weight"]
    assert control["perplexity"] < full["perplexity"]
