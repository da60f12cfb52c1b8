"""Text generation with a key-value cache: greedy, or sampled."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import read_json
from kashin_jax.models.architecture import LanguageConfig
from kashin_jax.models.transformer import KVCache

__all__ = ["CausalLM", "generate", "likeliest", "stop_tokens"]


@runtime_checkable
class CausalLM(Protocol):
    """A language model, an NNX module, that can go on where it stopped reading."""

    @property
    def config(self) -> LanguageConfig:
        """Its architecture."""
        ...

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t vocab"]:
        """Logits of the next token at every position."""
        ...

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `max_length` tokens per row, padding included."""
        ...

    def decode(
        self,
        input_ids: Int[Array, "b t"],
        cache: KVCache,
        attention_mask: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b vocab"], KVCache]:
        """Reads `t` more tokens and predicts the one that follows them."""
        ...


def generate(
    model: CausalLM,
    input_ids: Int[Array, "b t"],
    *,
    attention_mask: Int[Array, "b t"] | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Key[Array, ""] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> Int[Array, "b total"]:
    """Continues every row of a batch of prompts.

    Compiled once per architecture, shape of prompts and `max_new_tokens`; stops early
    once every row has ended. Meant for the outside of `jit`: arguments are checked by
    value.

    Args:
      model: Its training mode is ignored; dropout is off.
      input_ids: Prompts, padded on the left to a common length.
      attention_mask: 1 for real tokens, 0 for padding.
      max_new_tokens: Tokens to add to every row.
      temperature: 0 takes the likeliest token. Otherwise tokens are drawn from the
        softmax of the logits divided by this.
      top_k: Draws from so many of the likeliest tokens only.
      top_p: Draws from the fewest of the likeliest tokens that have at least this
        probability together, of those that `top_k` left.
      key: Random key; needed where `temperature` is above 0.
      eos_token_id: Ends a row; of several tokens any does. What follows is filled
        with the padding token of the model's configuration, or with the first of these
        where that has none.

    Returns:
      The prompts, with `max_new_tokens` more columns.

    Raises:
      UsageError: If a row ends in padding, an id is outside the vocabulary, prompt and
        new tokens exceed the model's positions, `key` is missing, or `top_k` or `top_p`
        is out of range or given without a temperature.

    References:
      Fan et al., "Hierarchical neural story generation" (2018), arXiv:1805.04833, for
      `top_k`; Holtzman et al., "The curious case of neural text degeneration" (2019),
      arXiv:1904.09751, for `top_p`.
    """
    mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
    _check(model, input_ids, mask, max_new_tokens, temperature, key)
    _check_filters(temperature, top_k, top_p)
    copy: Any = nnx.merge(*nnx.split(model))
    copy.eval()
    graphdef, state = nnx.split(copy)
    given = () if eos_token_id is None else np.atleast_1d(eos_token_id)
    # Ids are not negative, so -1 ends no row.
    eos = np.asarray(given if len(given) else [-1])
    fill = eos[0] if (pad := model.config.pad_token_id) is None else pad
    return _generate(
        graphdef,
        state,
        input_ids,
        mask,
        jax.random.key(0) if key is None else key,
        jnp.asarray([temperature, 1.0 if top_p is None else top_p], jnp.float32),
        jnp.asarray(model.config.vocab_size if top_k is None else top_k, jnp.int32),
        jnp.asarray(eos, input_ids.dtype),
        jnp.asarray(fill, input_ids.dtype),
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
        filtered=not (top_k is None and top_p is None),
    )


class _State(NamedTuple):
    step: Int[Array, ""]
    tokens: Int[Array, "b total"]
    newest: Int[Array, " b"]
    ended: Bool[Array, " b"]
    cache: KVCache


_STATIC = ("graphdef", "max_new_tokens", "greedy", "filtered")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _generate(
    graphdef: nnx.GraphDef,
    state: PyTree[Array],
    input_ids: Int[Array, "b t"],
    mask: Int[Array, "b t"],
    key: Key[Array, ""],
    heat: Float[Array, "2"],
    top_k: Int[Array, ""],
    eos: Int[Array, " ends"],
    fill: Int[Array, ""],
    *,
    max_new_tokens: int,
    greedy: bool,
    filtered: bool,
) -> Int[Array, "b total"]:
    model = nnx.merge(graphdef, state)
    b, t = input_ids.shape

    def choose(
        logits: Float[Array, "b vocab"], step: Int[Array, ""], ended: Bool[Array, " b"]
    ) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
        if greedy:
            token = jnp.argmax(logits, axis=-1)
        else:
            step_key = jax.random.fold_in(key, step)
            temperature, top_p = heat
            scaled = logits / temperature
            kept = likeliest(scaled, top_k, top_p) if filtered else scaled
            token = jax.random.categorical(step_key, kept)
        token = jnp.where(ended, fill, token.astype(fill.dtype))
        return token, ended | (token[:, None] == eos[None, :]).any(axis=1)

    def cond_fun(s: _State) -> Bool[Array, ""]:
        return (s.step < max_new_tokens) & ~jnp.all(s.ended)

    def body_fun(s: _State) -> _State:
        logits, cache = model.decode(s.newest[:, None], s.cache)
        token, ended = choose(logits, s.step, s.ended)
        tokens = s.tokens.at[:, t + s.step].set(token)
        return _State(s.step + 1, tokens, token, ended, cache)

    cache = model.init_cache(b, t + max_new_tokens)
    logits, cache = model.decode(input_ids, cache, mask)
    zero = jnp.zeros((), jnp.int32)
    token, ended = choose(logits, zero, jnp.zeros(b, bool))
    tokens = jnp.full((b, t + max_new_tokens), fill, input_ids.dtype)
    tokens = tokens.at[:, :t].set(input_ids).at[:, t].set(token)
    init = _State(zero + 1, tokens, token, ended, cache)
    return jax.lax.while_loop(cond_fun, body_fun, init).tokens


def likeliest(
    logits: Float[Array, "b vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "b vocab"]:
    """Logits of the likeliest tokens, and minus infinity for all others.

    Tokens as likely as the last one that is kept are kept, too.

    Args:
      logits: Unnormalised log-probabilities.
      top_k: How many tokens, at least 1.
      top_p: Probability that the fewest of them have together at least.
    """
    falling = -jnp.sort(-logits, axis=-1)
    falling = jnp.where(jnp.arange(logits.shape[-1])[None] < top_k, falling, -jnp.inf)
    probabilities = jax.nn.softmax(falling, axis=-1)
    # Of the tokens before: the first is kept in any case.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    is_kept = (before < top_p) & (falling > -jnp.inf)
    least = jnp.min(jnp.where(is_kept, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def stop_tokens(directory: str | Path, config: LanguageConfig) -> tuple[int, ...]:
    """The tokens that end a text: those of `generation_config.json`, else the model's.

    Chat models end an answer with another token than a text; only that file says so.

    Args:
      directory: A checkpoint directory, such as `LoadedModel.directory`.
      config: The model's configuration.

    Raises:
      CheckpointError: If the file is damaged.
    """
    path = Path(directory) / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    found = config.eos_token_id if found is None else found
    one = () if found is None else (found,)
    tokens = tuple(found) if isinstance(found, list | tuple) else one
    if not all(isinstance(token, int) for token in tokens):
        raise CheckpointError(
            f"{path}: field `eos_token_id` is {found!r}; expected tokens' numbers."
        )
    return tokens


def _check_filters(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if top_k is not None and top_k < 1:
        raise UsageError(f"`top_k` must be at least 1. Got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"`top_p` must lie in (0, 1]. Got {top_p}.")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise UsageError(
            "`top_k` and `top_p` are for drawing, and `temperature` is 0, which takes "
            "the likeliest token; raise it."
        )


def _check(
    model: CausalLM,
    input_ids: Int[Array, "b t"],
    mask: Int[Array, "b t"],
    max_new_tokens: int,
    temperature: float,
    key: Key[Array, ""] | None,
) -> None:
    config, t = model.config, input_ids.shape[1]
    if max_new_tokens < 1:
        raise UsageError(f"`max_new_tokens` must be at least 1. Got {max_new_tokens}.")
    if t + max_new_tokens > config.context_length:
        raise UsageError(
            f"`max_new_tokens`={max_new_tokens} and a prompt of {t} tokens exceed the "
            f"model's {config.context_length} positions; shorten either."
        )
    if temperature < 0:
        raise UsageError(f"`temperature` must not be negative. Got {temperature}.")
    if temperature > 0 and key is None:
        raise UsageError("`key` is needed where `temperature` is above 0.")
    if not np.all(np.asarray(mask)[:, -1] == 1):
        raise UsageError("`attention_mask` ends in padding; pad prompts on the left.")
    ids = np.asarray(input_ids)
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise UsageError(
            f"`input_ids` must lie in [0, {config.vocab_size}). "
            f"Got {ids.min()} to {ids.max()}."
        )
