"""Calibration with texts, layers and files that nothing was made for."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_feedback import (
    INPUTS,
    KEY,
    METHODS,
    OUTPUTS,
    correlated_moments,
    gaussian,
)
from tiny_checkpoint import (
    CONTEXT,
    LINEARS,
    VOCABULARY,
    edit_tensors,
    make_checkpoint,
)

from kashin_jax import RTN, JointKashin, Rules, quantize_model
from kashin_jax.cli import main
from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.pipeline import Calibration, quantize_checkpoint
from kashin_jax.pipeline.calibrated_model import _best_code, _Heard
from kashin_jax.pipeline.calibration import require_windows
from kashin_jax.pipeline.moments import Moments, half_moments
from kashin_jax.pipeline.token_weights import _of_mean_one

DAMPINGS = (0.01, 0.1)


def rows(count=96, seed=0, inputs=INPUTS):
    """Inputs of a layer, with a few strong directions."""
    root = np.linalg.cholesky(correlated_moments(inputs) + 1e-3 * np.eye(inputs))
    return np.random.default_rng(seed).standard_normal((count, inputs)) @ root.T


def spiked(size):
    x = rows()
    x[5, 7] = size
    return x


def dead(x):
    x[:, ::2] = 0
    return x


# Inputs to learn from, and those that are held out.
TEXTS = {
    "one token": lambda: (rows(1), rows(40, 1)),
    "fewer tokens than inputs": lambda: (rows(9), rows(40, 1)),
    "every second input dead": lambda: (dead(rows()), dead(rows(40, 1))),
    "inputs dead until held out": lambda: (dead(rows()), rows(40, 1)),
    "constant": lambda: (np.ones((40, INPUTS)), np.ones((9, INPUTS))),
    "constant, at the end of float32": lambda: (
        1e18 * np.ones((40, INPUTS)),
        1e18 * np.ones((9, INPUTS)),
    ),
    "nothing": lambda: (np.zeros((9, INPUTS)), np.zeros((9, INPUTS))),
    "nothing learned": lambda: (np.zeros((9, INPUTS)), rows(40, 1)),
    "nothing held out": lambda: (rows(), np.zeros((9, INPUTS))),
    "a spike of 1e4": lambda: (spiked(1e4), rows(40, 1)),
    "a spike of 1e18": lambda: (spiked(1e18), rows(40, 1)),
    "a spike of 1e18 held out": lambda: (rows(), spiked(1e18)),
    "huge": lambda: (1e15 * rows(), 1e15 * rows(40, 1)),
    "tiny": lambda: (1e-15 * rows(), 1e-15 * rows(40, 1)),
    "too tiny": lambda: (1e-30 * rows(), 1e-30 * rows(40, 1)),
    "condition 1e12": lambda: tuple(
        x * np.logspace(-6, 0, INPUTS) for x in (rows(), rows(40, 1))
    ),
    "another language": lambda: (rows(), np.flip(rows(40, 1), 1) + 3),
}


def heard(x):
    # Of one size, which is one program; zeros add nothing.
    padded = np.zeros((96, x.shape[1]), np.float32)
    padded[: len(x)] = x
    return Moments.none(x.shape[1]).plus(half_moments(jnp.asarray(padded)), len(x))


def best_code(name, weight, learned, held_out, dampings=DAMPINGS):
    both = _Heard(heard(learned), heard(held_out)).mean()
    return _best_code(weight, METHODS[name], KEY, "a layer", both, dampings, None)


def lost(weight, x, tensor):
    """`|x (W - W_q)|^2 / |x W|^2` in float64."""
    weight = np.asarray(weight, np.float64)
    whole = np.square(x @ weight).sum()
    rest = np.square(x @ (weight - np.asarray(tensor.decode(), np.float64))).sum()
    return rest / whole if whole else 0.0


@pytest.mark.parametrize("name", METHODS)
def test_no_text_makes_a_code_worse_than_without(name):
    """Guards the choice: what is held out loses no more, and the report says how much.

    All texts in one test: what it takes to compile is the same.
    """
    weight = gaussian()
    free, _, _ = best_code(name, weight, *TEXTS["nothing"]())
    better = []
    for text, made in TEXTS.items():
        learned, held_out = made()
        tensor, report, found = best_code(name, weight, learned, held_out)
        assert np.isfinite(np.asarray(tensor.decode())).all(), text
        assert np.isfinite(report.relative_squared_error), text
        own, without = (lost(weight, held_out, each) for each in (tensor, free))
        assert own <= without * (1 + 1e-4), text
        assert 0 <= found.output_error <= found.data_free_error, text
        if text != "too tiny":
            expected = [own, without]
            np.testing.assert_allclose(found[:2], expected, rtol=0.01, err_msg=text)
        better += [text] if own < 0.99 * without else []
    # And of text that is like the one held out something is learned.
    assert {"huge", "tiny", "every second input dead", "condition 1e12"} <= {*better}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", METHODS)
def test_moments_that_are_no_numbers_make_no_code_worse(name, bad):
    """Guards the choice once more, behind the check of what layers read."""
    weight = gaussian()
    learned = heard(rows())
    learned.half[3, 5] = bad
    both = _Heard(learned, heard(rows(40, 1))).mean()
    tensor, _, found = _best_code(
        weight, METHODS[name], KEY, "a layer", both, (0.1,), None
    )
    assert 0 < found.output_error <= found.data_free_error
    assert np.isfinite(np.asarray(tensor.decode())).all()


@pytest.mark.parametrize("kind", ["rank one", "half dead", "a spike", "nothing"])
def test_no_second_moments_of_gradients_make_a_code_worse(kind):
    """Guards factors of the side of outputs, which have no held-out part."""
    outputs = np.diag(np.full(OUTPUTS, 1.0))
    if kind == "rank one":
        outputs = np.ones((OUTPUTS, OUTPUTS))
    if kind == "half dead":
        outputs[::2] = 0
    if kind == "a spike":
        outputs[3, 3] = 1e8
    if kind == "nothing":
        outputs[...] = 0
    both = _Heard(heard(rows()), heard(rows(40, 1))).mean()
    tensor, _, found = _best_code(
        gaussian(), METHODS["joint"], KEY, "a layer", both, (0.1,),
        jnp.asarray(outputs, jnp.float32),
    )  # fmt: skip
    assert 0 <= found.output_error <= found.data_free_error
    assert np.isfinite(np.asarray(tensor.decode())).all()
    assert (found.damping is None) == (kind == "nothing")


@pytest.mark.parametrize("learned", [0.0, 1e-3, 1e4])
@pytest.mark.parametrize("held_out", [0.0, 1e-3, 1e4])
def test_no_errors_of_earlier_layers_make_a_code_worse(learned, held_out):
    """Guards the regression on what is read: of none, and of more than there is."""
    pairs = []
    for x, size, seed in ((rows(), learned, 2), (rows(40, 1), held_out, 3)):
        pairs.append(np.concatenate([x, size * rows(len(x), seed)], axis=1))
    tensor, _, found = best_code("gptq", gaussian(), *pairs)
    assert 0 < found.output_error <= found.data_free_error
    assert np.isfinite(np.asarray(tensor.decode())).all()


def hollow(weight):
    """With rows and columns of zeros."""
    return weight.at[::5].set(0.0).at[:, ::7].set(0.0)


@pytest.mark.parametrize("name", METHODS)
def test_any_weights_are_coded_no_worse_than_without(name):
    """Guards products that leave float32: squares of 1e20, and of 1e-25."""
    learned, held_out = rows(), rows(40, 1)
    half_scales = METHODS[name].has_half_scales
    sizes = [1e2, 1e-2] if half_scales else [1e20, 1e-25]
    for weight in (hollow(gaussian()), *(size * gaussian() for size in sizes)):
        tensor, _, found = best_code(name, weight, learned, held_out)
        own = lost(weight, held_out, tensor)
        np.testing.assert_allclose(found.output_error, own, rtol=0.01)
        assert found.damping is not None and own < 0.9 * found.data_free_error


@pytest.mark.parametrize(
    ("name", "shape"),
    [("gptq", (1, 5)), ("gptq", (5, 1))]
    + [
        pytest.param(name, shape, marks=pytest.mark.slow)
        for name in METHODS
        for shape in ((1, 5), (1, 1), (5, 1), (17, 13), (129, 3), (48, 272))
        if name != "gptq" or min(shape) > 1
    ],
)
def test_matrices_of_any_shape_are_coded(name, shape):
    """Guards groups and blocks that do not divide a matrix, or are all of it."""
    weight = gaussian(*shape)
    learned, held_out = rows(inputs=shape[0]), rows(40, 1, shape[0])
    tensor, report, found = best_code(name, weight, learned, held_out)
    assert tensor.decode().shape == shape
    assert np.isfinite(report.relative_squared_error)
    own = lost(weight, held_out, tensor)
    np.testing.assert_allclose(found.output_error, own, rtol=0.01, atol=1e-6)
    assert own <= found.data_free_error * 1.01 + 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bytes(name):
    found = [best_code(name, gaussian(), rows(), rows(40, 1))[0] for _ in range(2)]
    leaves = [jax.tree.leaves(tensor) for tensor in found]
    for first, second in zip(*leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


def test_gradients_too_small_for_float32_weigh_tokens_all_the_same():
    """Guards a mean that is zero in float32 and not in float64."""
    squares = [np.zeros(1000, np.float32), np.zeros(1000, np.float32)]
    squares[0][3] = 1e-45
    weights = _of_mean_one("a layer", squares)
    assert all(np.isfinite(each).all() for each in weights)
    np.testing.assert_allclose(weights[0][3], 2000)


WIDTH = 8


class Mixture(nnx.Module):
    """Experts, each of which reads zeros in place of tokens that are another one's."""

    def __init__(self, rngs):
        self.router = nnx.Linear(WIDTH, 3, use_bias=False, rngs=rngs)
        self.experts = nnx.List(
            nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(3)
        )
        self.twice = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.never = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        scores = self.router(x).at[..., 2].set(-jnp.inf)
        chosen = jnp.argmax(scores, axis=-1)
        for i, expert in enumerate(self.experts):
            x = x + expert(jnp.where((chosen == i)[..., None], x, 0.0))
        return x + self.twice(jnp.tanh(self.twice(x)))


class Looped(nnx.Module):
    """Calls a layer from within a program that is traced apart."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return jax.checkpoint(lambda x: x + self.inner(x))(x)


class Model(nnx.Module):
    def __init__(self, block, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List(block(rngs) for _ in range(2))
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def drawn(**fields):
    shape = 8, CONTEXT
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, shape)
    return Calibration(windows=tokens.astype(np.int32), **fields)


@pytest.mark.parametrize(
    "fields",
    [{}]
    + [
        pytest.param(fields, marks=pytest.mark.slow)
        for fields in (
            {"weighting": "gradient"},
            {"weighting": "outputs", "is_asymmetric": True},
        )
    ],
)
def test_experts_that_no_token_reaches_are_coded_without(caplog, fields):
    """Guards layers that read nothing, are never called, or read two things."""
    model = Model(Mixture, nnx.Rngs(0))
    config = RTN(bits=2, group_size=WIDTH)
    if fields.get("weighting") == "outputs":
        config = JointKashin(bits=2, effort="fast", block_height=16)
    rules, text = Rules(config=config), drawn(**fields)
    small, reports = quantize_model(model, rules=rules, calibration=text)
    _, plain = quantize_model(model, rules=rules)
    assert np.isfinite(np.asarray(small(jnp.asarray(text.windows[:1])))).all()
    for index in range(2):
        start = f"blocks/{index}/"
        idle = reports[f"{start}experts/2"]
        assert idle.calibration == (0.0, 0.0, None)
        without = plain[f"{start}experts/2"].relative_squared_error
        assert idle.relative_squared_error == without
        busy = [reports[f"{start}experts/{i}"].calibration for i in (0, 1)]
        assert all(0 < each.output_error <= each.data_free_error for each in busy)
        for name in ("twice", "never"):
            assert reports[start + name].calibration is None
            assert f"{start}{name}" in caplog.text
    assert "4 layers are coded without calibration" in caplog.text


def test_layers_in_programs_of_their_own_are_refused():
    model = Model(Looped, nnx.Rngs(0))
    with pytest.raises(
        UsageError, match="blocks: a block calls its layer inner inside .* Call it"
    ):
        quantize_model(model, RTN(bits=2), calibration=drawn())


def test_tokens_without_an_embedding_are_refused():
    """Guards models in memory, of whose vocabulary nothing is known."""
    model = Model(Mixture, nnx.Rngs(0))
    windows = drawn().windows.copy()
    windows[3, 4] = VOCABULARY
    with pytest.raises(NonFiniteError, match=r"blocks/0/.*use the tokenizer of the"):
        quantize_model(
            model, RTN(bits=2, group_size=WIDTH),
            calibration=Calibration(windows=windows),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (np.zeros((2, 0), np.int32), r"two windows .* shape \(2, 0\)"),
        (np.zeros((2, 4), np.float32), "whole numbers.* float32"),
        (np.full((2, 4), -1, np.int32), "has a token -1"),
    ],
)
def test_what_are_no_windows_is_refused(windows, message):
    # Past the types that tests check.
    with pytest.raises(UsageError, match=message):
        require_windows(windows, "Calibration")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("weighting", [None, "gradient"])
@pytest.mark.parametrize("size", [1e4, 1e18])
def test_a_model_with_one_huge_activation_is_coded(tiny, tmp_path, size, weighting):
    """Guards all layers behind it, of which some read next to nothing else."""
    source = tmp_path / "source"
    shutil.copytree(tiny, source)

    def spiked(tensors):
        name = "model.decoder.layers.0.fc1.bias"
        tensors[name] = tensors[name].astype(np.float32)
        tensors[name][3] = size

    edit_tensors(source, spiked)
    text = Calibration(windows=drawn().windows, weighting=weighting)
    rules = Rules(config=RTN(bits=2, group_size=32))
    found = quantize_checkpoint(source, tmp_path / "out", rules, calibration=text)
    errors = [report.calibration for report in found.reports.values()]
    assert len(errors) == LINEARS
    assert all(0 <= each.output_error <= each.data_free_error for each in errors)
    assert sum(each.damping is not None for each in errors) > LINEARS / 2


def test_windows_longer_than_the_model_reads_are_refused_first(tiny, tmp_path):
    windows = np.zeros((2, 65), np.int32)
    with pytest.raises(UsageError, match="positions for 64 tokens.* have 65. Cut"):
        quantize_checkpoint(
            tiny, tmp_path / "out", Rules(config=RTN(bits=2, group_size=32)),
            calibration=Calibration(windows=windows),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "count", "code", "message"),
    [
        (b"", 256, 1, "Give a longer text"),
        (b"word", 256, 1, "Give a longer text"),
        (b"\x7fELF\x02\x00\xff\xfe" * 999, 256, 1, "is not UTF-8"),
        ("Stra\xdfe ".encode("latin-1") * 999, 256, 1, "is not UTF-8"),
        (None, 256, 1, "Is a directory"),
        (b"word " * 999, 0, 2, "'0' is not a whole number from 1"),
        (b"word " * 999, -1, 2, "'-1' is not a whole number from 1"),
        (b"word " * 999, 127, 2, "two windows of 64"),
        (b"word " * 999, 2**31 - 1, 1, "ask for fewer tokens"),
    ],
)
def test_the_command_refuses_what_is_no_text(
    tiny, tmp_path, capsys, content, count, code, message
):
    """Guards the target, which must not be there for any of it."""
    text = tmp_path / "text.txt"
    text.mkdir() if content is None else text.write_bytes(content)
    out = tmp_path / "out"
    command = ["quantize", str(tiny), str(out), "--method=rtn", "--bits=2"]
    flags = [f"--calibration={text}", f"--calibration-tokens={count}"]
    assert main([*command, *flags]) == code
    *usage, line = capsys.readouterr().err.splitlines()
    assert message in line and (not usage or "usage" in usage[0])
    assert not out.exists()
