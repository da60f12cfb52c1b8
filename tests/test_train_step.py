"""Training: optimizer, step, loop and checkpoints, on functions that cost nothing."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from flax import nnx
from tiny_training import ASSETS, config_of, sample_text

from experiments.train import bpe
from experiments.train.corpus import ShuffledStream, TextSource, load_corpus
from experiments.train.distill import language_loss
from experiments.train.loop import LoopParts, stop_signals, train
from experiments.train.optimizer import decays, warmup_linear
from experiments.train.recipe import (
    TrainConfig,
    loop_settings,
    recipe_optimizer,
    recipe_schedule,
)
from experiments.train.step import (
    StepMetrics,
    TrainState,
    init_state,
    make_trainer,
    train_step,
)
from experiments.train.stored import Checkpoints, RunLog
from experiments.train_lm import init_params, model_graph, read_windows
from kashin_jax.errors import NonFiniteError
from kashin_jax.models.loading import load_opt


class _Counter:
    """A stream and a trainer that only count."""

    def __init__(self):
        self.batched = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read(self, start, length):
        return np.arange(start, start + length, dtype=np.int32)

    def step(self, state, batch):
        zero = jnp.zeros(())
        loss = jnp.where(state.step == 5, jnp.nan, zero)
        return state._replace(step=state.step + 1), StepMetrics(loss, zero)


def _count(tmp_path, config, validate=None):
    counter, log = _Counter(), RunLog(tmp_path / "log.jsonl", done_steps=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = TrainState({"x": jnp.zeros(2)}, {}, jnp.int32(0))
    try:
        parts = LoopParts(
            trainer=counter,
            schedule=recipe_schedule(config),
            read_batch=functools.partial(read_windows, config, counter),
            checkpoints=checkpoints,
            log=log,
            validate=validate,
        )
        return train(loop_settings(config), parts, state)
    finally:
        checkpoints.close()


def _step(loss_fn, optimizer):
    options = {"key": jax.random.key(0), "loss_fn": loss_fn, "optimizer": optimizer}
    return jax.jit(functools.partial(train_step, **options))


def test_the_learning_rate_rises_in_a_line_and_falls_on_a_cosine():
    schedule = recipe_schedule(
        config_of(learning_rate=2e-3, warmup_steps=300, steps=9000, final_fraction=0.05)
    )
    middle = 2e-3 * (0.05 + 0.95 * 0.5)
    expected = {0: 2e-3 / 300, 300: 2e-3, 4650: middle, 9000: 1e-4}
    for step, rate in expected.items():
        assert schedule(step) == pytest.approx(rate, rel=1e-4)
    assert schedule(149) < schedule(150) < schedule(300) > schedule(400)


@pytest.mark.parametrize(
    ("warmup_steps", "rates"),
    [
        (0, {0: 3e-5, 5: 1.5e-5, 9: 3e-6, 10: 0.0}),
        (4, {0: 0.0, 1: 7.5e-6, 4: 3e-5, 7: 1.5e-5, 9: 5e-6, 10: 0.0}),
    ],
)
def test_the_learning_rate_rises_from_zero_and_falls_to_zero_in_lines(
    warmup_steps, rates
):
    schedule = warmup_linear(peak=3e-5, warmup_steps=warmup_steps, steps=10)
    for step, rate in rates.items():
        assert schedule(step) == pytest.approx(rate, rel=1e-5, abs=1e-12)


def test_the_model_decays_kernels_and_embeddings_only():
    config = config_of()
    params = jax.eval_shape(lambda: init_params(config, config.model_config(300)))
    marked, _ = jax.tree_util.tree_flatten_with_path(decays(params))
    names = {jax.tree_util.keystr(path).split("'")[-2]: flag for path, flag in marked}
    assert names == {"kernel": True, "embedding": True, "bias": False, "scale": False}


def test_without_a_gradient_matrices_shrink_and_vectors_stay():
    optimizer = recipe_optimizer(
        config_of(learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
    )
    params = {"kernel": jnp.full((3, 2), 4.0), "bias": jnp.full((2,), 4.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 4.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)


def test_every_token_of_the_stream_is_predicted_once():
    config = config_of(batch_size=6, context=16, grad_accumulation=3)
    batches = [read_windows(config, _Counter(), step) for step in range(2)]
    assert batches[0].shape == (3, 2, 17)
    targets = np.concatenate([batch[:, :, 1:].ravel() for batch in batches])
    np.testing.assert_array_equal(targets, np.arange(1, 2 * 96 + 1))
    np.testing.assert_array_equal(batches[0][:, :, :-1] + 1, batches[0][:, :, 1:])


def test_a_step_in_parts_is_the_step_of_the_whole_batch():
    def loss_fn(params, frozen, tokens, key):
        predicted = params["table"][tokens[:, :-1]]
        return jnp.mean((predicted - tokens[:, 1:].astype(jnp.float32)) ** 2)

    optimizer = recipe_optimizer(config_of())
    rows = np.random.default_rng(0).integers(0, 9, (4, 5)).astype(np.int32)
    params = {"table": jnp.linspace(0.0, 9.0, 9)}
    results = []
    for parts in (1, 2, 4):
        state = TrainState(params, optimizer.init(params), jnp.int32(0))
        batch = rows.reshape(parts, -1, 5)
        results.append(_step(loss_fn, optimizer)(state, batch))
    expected = np.mean((np.linspace(0, 9, 9)[rows[:, :-1]] - rows[:, 1:]) ** 2)
    assert results[0][1].loss == pytest.approx(expected, rel=1e-5)
    assert all(int(state.step) == 1 for state, _ in results)
    for whole, *parts in zip(*map(jax.tree.leaves, results), strict=True):
        for part in parts:
            np.testing.assert_allclose(whole, part, rtol=1e-5)


def test_frozen_arrays_reach_the_loss_and_are_neither_trained_nor_stored():
    def loss_fn(params, frozen, batch, key):
        return jnp.mean(params["x"] * frozen["scale"] * batch["rows"])

    optimizer = optax.sgd(0.5)
    frozen = {"scale": jnp.float32(3.0)}
    trainer = make_trainer(loss_fn, optimizer, seed=0, frozen=frozen)
    fresh = init_state({"x": jnp.float32(1.0)}, optimizer, trainer.replicated)
    batch = {"rows": jnp.full((2, 4), 2.0)}
    state, metrics = trainer.step(fresh, batch)
    assert metrics.loss == 6.0
    assert metrics.grad_norm == 6.0
    assert state.params["x"] == 1.0 - 0.5 * 6.0
    assert jax.tree.structure(state.params) == jax.tree.structure({"x": 0})
    assert frozen["scale"] == 3.0


def test_every_step_and_every_part_drops_other_units():
    def loss_fn(params, frozen, tokens, key):
        return params["x"] * jax.random.uniform(key)

    optimizer = recipe_optimizer(config_of())
    params = {"x": jnp.float32(1.0)}
    losses = []
    for step in (0, 1):
        for parts in (1, 2):
            state = TrainState(params, optimizer.init(params), jnp.int32(step))
            batch = np.zeros((parts, 1, 2), np.int32)
            _, metrics = _step(loss_fn, optimizer)(state, batch)
            losses.append(float(metrics.loss))
    assert len(set(losses)) == 4


def test_the_embedded_weights_have_the_loss_that_their_logits_give(tmp_path):
    """And about that of ASSETS.md, the logarithm of 29.31, which is of more windows."""
    text_file = tmp_path / "text.txt"
    text_file.write_text(sample_text(), "utf-8")
    config = TrainConfig(text_file=("t",), out="o", dtype="float32", batch_size=2)
    tokenizer = bpe.load_tokenizer(ASSETS / "opt-wiki-18m")
    corpus = load_corpus(TextSource((text_file,), "", 0.0, 0), tokenizer, tmp_path)
    batch = jnp.asarray(read_windows(config, ShuffledStream(corpus, seed=0), 0)[0])
    loaded = load_opt(str(ASSETS / "opt-wiki-18m"))
    graphdef = model_graph(config, loaded.config, training=False)
    params = nnx.state(loaded.model, nnx.Param)
    loss = jax.jit(language_loss(graphdef))(params, (), batch, jax.random.key(0))
    logits = nnx.jit(lambda model, ids: model(ids))(loaded.model, batch[:, :-1])
    logs = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=2)
    chosen = np.take_along_axis(logs, np.asarray(batch)[:, 1:, None], axis=2)
    assert loss == pytest.approx(-chosen.mean(), rel=1e-4)
    assert loss == pytest.approx(3.378, abs=0.3)


def test_a_state_is_not_saved_once_the_loss_is_not_finite(tmp_path):
    config = config_of(checkpoint_every=2, log_every=100)
    with pytest.raises(NonFiniteError, match="by step 6"):
        _count(tmp_path, config)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4"]


def test_a_signal_lets_the_step_end_and_leaves_its_checkpoint(tmp_path):
    def interrupt(step, params):
        signal.raise_signal(signal.SIGTERM)
        return {}

    config = config_of(eval_every=3, checkpoint_every=100)
    assert int(_count(tmp_path, config, interrupt).step) == 4
    assert os.listdir(tmp_path / "checkpoints") == ["4"]


def test_a_first_signal_asks_and_a_second_one_insists():
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is usual


def test_a_checkpoint_holds_the_state_bit_for_bit(tmp_path):
    params = {"a": jnp.float32([[1 / 3, -0.0], [1e-45, 3e38]]), "b": jnp.zeros(3)}
    moments = recipe_optimizer(config_of()).init(params)
    state = TrainState(params, moments, jnp.int32(7))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    blank = jax.tree.map(jnp.zeros_like, state)
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    restored = checkpoints.restore_latest(blank, one_device)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for saved, found in zip(*map(jax.tree.leaves, (state, restored)), strict=True):
        assert saved.dtype == found.dtype
        assert np.asarray(saved).tobytes() == np.asarray(found).tobytes()
