"""Passes through a model whose blocks are stood in for, as compiled programs."""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Float, Int

from kashin_jax.errors import UsageError
from kashin_jax.pipeline.moments import half_moments
from kashin_jax.pipeline.paths import at_path, put_at_path
from kashin_jax.pipeline.stand_ins import Ear

__all__ = [
    "EncoderInputs",
    "Program",
    "Stage",
    "Tokens",
    "block_outputs",
    "call_model",
    "first_states",
    "heard_inputs",
    "kinds_of_calls",
    "on_device",
    "run_block",
    "stage_moments",
]

Stage = tuple[str, ...]
"""Paths within a block of layers that read the same input, in the order of calls."""


class EncoderInputs(NamedTuple):
    """What an encoder is called with: token ids, and what goes with them.

    Attributes:
      ids: Token ids.
      mask: 1 for tokens, 0 for padding; the model's argument `attention_mask`. None
        gives none.
      token_types: The model's argument `token_type_ids`; None gives none.
    """

    ids: Int[Array | np.ndarray, "b t"]
    mask: Int[Array | np.ndarray, "b t"] | None = None
    token_types: Int[Array | np.ndarray, "b t"] | None = None


Tokens = Int[np.ndarray, "b t"] | EncoderInputs
"""A batch: token ids alone, or with what an encoder is called with besides."""


class Program(NamedTuple):
    """All that is static of a pass through a block; from `BlockRunner.program`."""

    shell: Any
    block: Any
    path: str
    kind: int
    wanted: tuple[str, ...]


class _Call(NamedTuple):
    """A call of a block, or of what stands for it.

    Attributes:
      block: Its index.
      x: Hidden states in front of it.
      given: What it is called with besides, by place and by name.
      found: What it gives: hidden states, and the rest.
    """

    block: int
    x: Array
    given: tuple[tuple[Any, ...], dict[str, Any]]
    found: tuple[Array, Any]


@partial(jax.jit, static_argnums=(0, 1))
def first_states(
    graphdef: Any, path: str, state: Any, tokens: Any
) -> Float[Array, "b t d"]:
    """Hidden states in front of the first block."""
    return _calls(graphdef, path, state, tokens)[0].x


def kinds_of_calls(graphdef: Any, path: str, state: Any, tokens: Any) -> Any:
    """For every block an array as long as the index of the first one called alike.

    Raises:
      UsageError: If blocks are not called one after the other with nothing in between.
    """
    calls = _calls(graphdef, path, state, tokens)
    blocks = len(at_path(nnx.merge(graphdef, state), path))
    in_order = [call.block for call in calls] == list(range(blocks))
    follow = all(b.x is a.found[0] for a, b in itertools.pairwise(calls))
    found = {id(leaf) for call in calls for leaf in jax.tree.leaves(call.found)}
    read = {id(leaf) for call in calls for leaf in jax.tree.leaves(call.given)}
    if not (in_order and follow) or found & read:
        raise UsageError(
            f"{path}: blocks run one by one here, each with the hidden states that the "
            "one before it gives, and this model does more between them (even a "
            "sharding constraint is more), leaves some out, or hands on what else they "
            "give. Do that within the blocks; or leave calibration out, and refine "
            "with `block_epochs=0`."
        )
    seen: dict[Any, int] = {}
    kinds = []
    for i, call in enumerate(calls):
        leaves, structure = jax.tree.flatten(call.given)
        same = (structure, tuple(map(id, leaves)))
        kinds.append(jnp.zeros(seen.setdefault(same, i)))
    return kinds


def on_device(tokens: Tokens) -> Any:
    """A batch as arrays of JAX."""
    return jax.tree.map(jnp.asarray, tokens)


def call_model(model: Any, tokens: Any) -> Any:
    """The model's outputs."""
    if not isinstance(tokens, EncoderInputs):
        return model(tokens)
    given = {"attention_mask": tokens.mask, "token_type_ids": tokens.token_types}
    return model(tokens.ids, **{k: v for k, v in given.items() if v is not None})


def _calls(graphdef: Any, path: str, state: Any, tokens: Any) -> list[_Call]:
    """What each block is called with, in the order of calls."""
    model = nnx.merge(graphdef, state)
    found: list[_Call] = []

    for stop in at_path(model, path):
        stop.tell = lambda *call: found.append(_Call(*call))
    call_model(model, tokens)
    return found


def run_block(
    program: Program, shell: Any, block: Any, tokens: Any, x: Array
) -> Float[Array, "b t d"]:
    """New hidden states, within a program that is traced; differentiable.

    Args:
      program: From `BlockRunner.program`.
      shell: The runner's `state`.
      block: The block itself.
      tokens: Of the batch.
      x: Hidden states in front of it.
    """
    calls = _calls(program.shell, program.path, shell, tokens)
    args, kwargs = calls[program.kind].given
    found = block(x, *args, **kwargs)
    return found[0] if isinstance(found, tuple) else found


def heard_inputs(
    program: Program, shell: Any, state: Any, tokens: Any, x: Array
) -> tuple[list[Array], list[Stage]]:
    """The inputs of the wanted layers, and who reads each of them."""
    block = nnx.merge(program.block, state)
    found: dict[int, tuple[Array, list[str]]] = {}
    outside = get_opaque_trace_state()

    def tell(path: str, x: Array) -> None:
        if get_opaque_trace_state() != outside:
            raise UsageError(
                f"{program.path}: a block calls its layer {path} inside of a program "
                "of its own (`jax.lax` control flow, `remat`, `jit`, `vmap`), where "
                "what it reads cannot be had. Call it outside; or do not calibrate."
            )
        found.setdefault(id(x), (x, []))[1].append(path)

    for path in program.wanted:
        put_at_path(block, path, Ear(path, at_path(block, path), tell=tell))
    run_block(program, shell, block, tokens, x)
    return [x for x, _ in found.values()], [tuple(e) for _, e in found.values()]


@partial(jax.jit, static_argnums=0)
def block_outputs(
    program: Program, shell: Any, state: Any, tokens: Any, x: Any
) -> Float[Array, "b t d"]:
    """Hidden states behind a block."""
    block = nnx.merge(program.block, state)
    return run_block(program, shell, block, tokens, x)


def _read(program: Program, shell: Any, state: Any, tokens: Any, x: Any) -> list[Array]:
    """What every wanted layer reads, in float32."""
    inputs, stages = heard_inputs(program, shell, state, tokens, x)
    by_layer = {
        path: x for x, stage in zip(inputs, stages, strict=True) for path in stage
    }
    return [by_layer[path].astype(jnp.float32) for path in program.wanted]


@partial(jax.jit, static_argnums=0)
def stage_moments(
    program: Program,
    shell: Any,
    state: Any,
    original: Any,
    tokens: Any,
    x: Any,
    weights: Any,
    full: Any,
) -> list[Float[Array, "r c"]]:
    """The sum of x x^T for every wanted layer, see `BlockRunner.moments_call`."""
    rows = _read(program, shell, state, tokens, x)
    if full is not None:
        wanted = _read(program, shell, original, tokens, full)
        rows = [
            jnp.concatenate([x, y - x], axis=-1)
            for x, y in zip(rows, wanted, strict=True)
        ]
    if isinstance(tokens, EncoderInputs) and tokens.mask is not None:
        rows = [
            _without_padding(x, jnp.asarray(tokens.mask), f"{program.path}/*/{path}")
            for path, x in zip(program.wanted, rows, strict=True)
        ]
    if weights is not None:
        # Half of a weight for each of the two factors.
        rows = [
            x * jnp.sqrt(weight)[..., None]
            for x, weight in zip(rows, weights, strict=True)
        ]
    return [half_moments(x) for x in rows]


def _without_padding(
    x: Float[Array, "*b m"], mask: Int[Array, "b t"], path: str
) -> Float[Array, "b t m"]:
    if x.shape[:-1] != mask.shape:
        raise UsageError(
            f"`{path}` reads an array of shape {x.shape}, in which a mask of shape "
            f"{mask.shape} does not tell what is padding. Leave the layer out, or give "
            "windows without padding and no mask."
        )
    return jnp.where(mask[..., None] != 0, x, 0)
