"""The main job with half widths and total budgets, on the tiny checkpoint."""

import contextlib
import io
import math
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoint import LINEARS, as_in_tests, numbers, row, table, tiny

from experiments.common import perplexity
from experiments.common.quantized_layers import quantized_copy
from kashin_jax import BasisSpec, JointKashin, Rules, quantize
from kashin_jax.models.loading import load_opt
from kashin_jax.pipeline import (
    mixed_widths,
    path_key,
    replace_kernels,
    selected_kernels,
)
from kashin_jax.pipeline.allocate import JOINT_ERRORS
from kashin_jax.pipeline.mixed_widths import layer_sensitivities, probe, sampled_text

__all__ = ["tiny"]  # fixtures

# Quantizing takes longer than compiling does.
# They have a run of their own; `test_allocation.py` is about who gets which width.
pytestmark = [pytest.mark.optimized, pytest.mark.slow]

HADAMARD = BasisSpec.parse("hadamard")
KEY = jax.random.key(0)
# Between 2.5 and 3 bits stored: blocks of 64 x 64 have much beside their codes.
BUDGET = 3.3
FLAGS = (f"--bits=2.5,3,{BUDGET}", "--methods=kashin-joint,rtn-channel")


class Made(NamedTuple):
    """A table with a half width and a budget."""

    records: list[dict[str, Any]]
    printed: str
    out: Path


WIDTHS = (2, 2.5, 3)


@pytest.fixture(scope="module", autouse=True)
def short_texts_and_few_widths():
    """Every width is another program to compile."""
    errors = {width: JOINT_ERRORS[width] for width in WIDTHS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed_widths, "LENGTH", 24)
        patch.setattr(mixed_widths, "JOINT_ERRORS", errors)
        yield


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    with as_in_tests(), contextlib.redirect_stdout(io.StringIO()) as printed:
        records = table(tiny, out, *FLAGS)
    return Made(records, printed.getvalue(), out)


@pytest.fixture
def model(tiny):
    return load_opt(tiny).model


@pytest.fixture
def layers(tiny, tmp_path):
    rules = Rules(config=probe(JointKashin(basis=HADAMARD)))
    found = quantized_copy(load_opt(tiny), rules, 0, tmp_path, "a hash").layers
    return {path: partial(perplexity._decoded, layer) for path, layer in found.items()}


def test_half_widths_are_rows_of_joint_coding_and_dashes_of_others(made):
    joint, rtn = (
        row(made.records, name, bits=2.5) for name in ("kashin-joint", "rtn-channel")
    )
    assert joint["widths"] is None
    assert 2.5 < joint["stored_bits_per_weight"] < 3.3
    assert rtn["perplexity"] is None
    assert "whole numbers of bits only. Got bits=2.5." in rtn["note"]
    assert {file.stem for file in made.out.iterdir()} == {"table2_opt"}


def test_joint_rows_agree_with_dense_weights(made, tiny, tmp_path, model, monkeypatch):
    with jax.default_matmul_precision("highest"):
        kernels = {
            path: quantize(kernel, JointKashin(bits=3), path_key(KEY, path))[0].decode()
            for path, kernel in selected_kernels(model).items()
        }
        dense = replace_kernels(model, kernels)
    monkeypatch.setattr(perplexity, "_quantized_model", lambda *_: dense)
    found = row(table(tiny, tmp_path, FLAGS[1], "--bits=3"), "kashin-joint")
    packed = row(made.records, "kashin-joint", bits=3)["perplexity"]
    assert packed == pytest.approx(found["perplexity"], rel=1e-4)
    assert packed != made.records[0]["perplexity"]


def test_a_budget_is_kept_by_widths_that_differ(made):
    found = row(made.records, "kashin-joint-mixed")
    assert found["bits"] == BUDGET
    assert found["stored_bits_per_weight"] <= BUDGET
    assert len(found["widths"]) == LINEARS
    assert set(found["widths"].values()) <= set(WIDTHS)
    assert len(set(found["widths"].values())) > 1
    assert math.isfinite(found["perplexity"])
    assert "sampled from the model itself" in found["note"]
    line = rf"^kashin-joint-mixed \[\d\] +{BUDGET} "
    assert re.search(line, made.printed, re.MULTILINE)


def test_a_budget_is_a_dash_for_methods_that_mix_no_widths(made):
    found = row(made.records, "rtn-channel", bits=BUDGET)
    assert found["perplexity"] is None and found["widths"] is None
    assert "whole numbers of bits only. Got bits=3.3." in found["note"]


def test_the_same_budget_gives_the_same_row(made, tiny, tmp_path):
    (_, again) = table(tiny, tmp_path, f"--bits={BUDGET}", "--methods=kashin-joint")
    first = row(made.records, "kashin-joint-mixed")
    assert numbers([again]) == numbers([first])


def test_a_budget_below_the_narrowest_width_is_a_dash_and_says_so(tiny, tmp_path):
    found = table(tiny, tmp_path, "--bits=2.001", "--methods=kashin-joint")[1]
    assert found["perplexity"] is None
    assert "`budget`=2.001 bits per weight cannot be met" in found["note"]


def test_the_page_compares_rivals_at_equal_stored_bits(made):
    curve = [
        (r["stored_bits_per_weight"], r["perplexity"])
        for r in made.records
        if r["method"] == "kashin-joint"
    ]
    stored = 3 + 19 / 64  # fp16 step and 3-bit zero point per channel of 64
    bits, values = np.transpose(sorted(curve))
    expected = np.exp(np.interp(stored, bits, np.log(values)))
    heading = "Joint coding at the stored bits of each rival"
    assert f"{heading}:\n" in made.printed
    (page,) = made.out.glob("*.md")
    assert f"## {heading}\n" in page.read_text()
    assert f"{expected:.2f}" in page.read_text().partition(heading)[2]


def test_sampled_texts_begin_as_the_model_expects_and_follow_the_key(model):
    texts = [sampled_text(model, jax.random.key(seed)) for seed in (0, 0, 1)]
    assert texts[0].shape == (mixed_widths.WINDOWS, 24)
    assert np.all(texts[0][:, 0] == model.config.bos_token_id)
    assert jnp.array_equal(texts[0], texts[1])
    assert not jnp.array_equal(texts[0], texts[2])
    assert len(np.unique(texts[0], axis=0)) == mixed_widths.WINDOWS


def test_sensitivities_are_divergences_over_errors(model, layers):
    felt = layer_sensitivities(model, layers, KEY)
    assert list(felt) == list(layers)
    path = "decoder/layers/1/fc1"
    kernel, error = layers[path]()
    tokens = sampled_text(model, KEY)
    run = nnx.jit(lambda model, ids: model(ids))
    p, q = (
        np.asarray(jax.nn.softmax(run(m, tokens)), np.float64)
        for m in (model, replace_kernels(model, {path: kernel}))
    )
    divergence = np.sum(p * np.log(p / q), axis=-1).mean()
    assert felt[path] == pytest.approx(divergence / error, rel=1e-3)


def test_finished_sensitivities_are_not_measured_again(model, layers, monkeypatch):
    calls, kept = [], []
    original = mixed_widths._divergence

    def counting(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(mixed_widths, "_divergence", counting)
    with pytest.raises(KeyboardInterrupt):
        layer_sensitivities(model, layers, KEY, (), kept.append)
    assert len(kept) == 5
    found = layer_sensitivities(model, layers, KEY, tuple(kept), kept.append)
    assert len(calls) == LINEARS + 1 and list(found.values()) == kept
    assert found == layer_sensitivities(model, layers, KEY, kept)
    assert len(calls) == LINEARS + 1


def test_all_layers_share_one_compilation(model, layers):
    before = mixed_widths._divergence._cache_size()
    layer_sensitivities(model, layers, jax.random.key(7))
    assert mixed_widths._divergence._cache_size() <= before + 1
