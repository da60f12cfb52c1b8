"""A model run block by block, with an ear at the inputs of its layers."""

import enum
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Float, Int, Key

from kashin_jax.errors import UsageError
from kashin_jax.pipeline.each_batch import Call
from kashin_jax.pipeline.moments import half_moments
from kashin_jax.pipeline.paths import at_path, join, put_at_path

__all__ = [
    "BlockRunner",
    "EncoderInputs",
    "Measure",
    "Program",
    "PulledBack",
    "Stage",
    "Tokens",
    "Undisturbed",
    "find_blocks",
    "run_block",
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


def find_blocks(model: nnx.Module, paths: Collection[str]) -> str:
    """The path of the list of blocks that most of some layers are in.

    Raises:
      UsageError: If the model has no `nnx.List` of modules that holds any.
    """
    counts = {}
    for parts, node in nnx.iter_graph(model):
        if isinstance(node, nnx.List) and len(node):
            path = join(parts)
            counts[path] = sum(each.startswith(f"{path}/") for each in paths)
    if not any(counts.values()):
        raise UsageError(
            "Calibration runs a model block by block, and this one has no nnx.List of "
            "blocks with layers to quantize. Leave calibration out."
        )
    # Of lists within each other the outermost.
    return max(counts, key=lambda path: (counts[path], -len(path)))


@dataclass(frozen=True)
class _Outline:
    """What a block would give, as shapes and types, for what it is called with.

    Those of equal blocks are equal, as they are static of programs: a second model of
    the same shapes compiles nothing.
    """

    graphdef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    structure: Any

    @classmethod
    def of(cls, block: nnx.Module) -> "_Outline":
        graphdef, state = nnx.split(block)
        leaves, structure = jax.tree.flatten(state)
        shapes = (jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        return cls(graphdef, tuple(shapes), structure)

    def __call__(self, x: Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def call(leaves: tuple[Array, ...]) -> Any:
            state = jax.tree.unflatten(self.structure, leaves)
            return nnx.merge(self.graphdef, state)(x, *args, **kwargs)

        return jax.eval_shape(call, self.leaves)


class _Stop(nnx.Module):
    """Stands where a block was: says what it was called with, and changes nothing."""

    def __init__(self, index: int, outline: _Outline) -> None:
        self.index, self.outline = index, outline
        self.tell: Callable[..., None] | None = None
        # Gives what the last block gave; nothing is changed without.
        self.give: Callable[[], Array] | None = None

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        if self.tell is not None:
            self.tell(self.index, x, args, kwargs)
        if self.give is not None:
            x = self.give()
        given = self.outline(x, args, kwargs)
        if not isinstance(given, tuple):
            return x
        _, *rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), given)
        return (x, *rest)


class _Ear(nnx.Module):
    """Stands around a layer and calls it: tells its input, or changes its outputs."""

    def __init__(
        self,
        path: str,
        inner: Any,
        tell: Callable[[str, Array], None] | None = None,
        change: Callable[[str, Array], Array] | None = None,
    ) -> None:
        self.path, self.inner, self.tell, self.change = path, inner, tell, change

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        if self.tell is not None:
            self.tell(self.path, x)
        y = self.inner(x, *args, **kwargs)
        return y if self.change is None else self.change(self.path, y)


class _Call(NamedTuple):
    # What a block is called with besides hidden states.
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Measure(enum.Enum):
    """What is taken of the gradient with respect to a layer's outputs."""

    SQUARES = "squares"
    """Its mean square, for every token."""
    MOMENTS = "moments"
    """The half of the sum of g g^T over tokens, as `half_moments` has it."""


class PulledBack(NamedTuple):
    """The gradient of a loss in front of a block, and what was taken at its layers.

    Attributes:
      gradient: With respect to hidden states in front of the block.
      measured: Of every wanted layer that was called.
    """

    gradient: Float[Array, "b t d"]
    measured: dict[str, Float[Array, "..."]]


class Undisturbed(NamedTuple):
    """A batch in the network in full precision.

    Attributes:
      block: The original one.
      x: Hidden states in front of it.
    """

    block: nnx.Module
    x: Float[Array | np.ndarray, "b t d"]


class BlockRunner:
    """Runs one block of a model at a time.

    A block is called with hidden states and whatever the model hands to it, and gives
    new hidden states, alone or as the first of a tuple. Blocks of one structure that
    are called with the same, all of most models, share their compiled programs.
    """

    def __init__(
        self, model: nnx.Module, blocks: str, like: Tokens | None = None
    ) -> None:
        """Runs nothing yet.

        Args:
          model: Called with token ids `[b, t]`, or with `EncoderInputs`. Not changed.
          blocks: Path of the list of its blocks.
          like: What batches are like; None for token ids alone.
        """
        self.path = blocks
        self.blocks = list(at_path(model, blocks))
        shell = nnx.clone(model, variables=False)
        stops = [_Stop(i, _Outline.of(block)) for i, block in enumerate(self.blocks)]
        put_at_path(shell, blocks, nnx.List(stops))
        self._graphdef, self.state = nnx.split(shell)
        small = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        self._like = small if like is None else jax.tree.map(lambda _: small, like)
        calls = jax.eval_shape(
            partial(_kinds, self._graphdef, blocks), self.state, self._like
        )
        # Blocks that are called with the same arrays: the first one stands for all.
        self._kinds = [int(kind.shape[0]) for kind in calls]

    def first(self, tokens: Tokens) -> Float[Array, "b t d"]:
        """Hidden states in front of the first block."""
        return self.first_call()(_on_device(tokens))

    def first_call(self) -> Call:
        """As `first`, for many batches of `tokens`."""
        return Call(_first, (self._graphdef, self.path), (self.state,))

    def stages(self, index: int, wanted: Collection[str]) -> list[Stage]:
        """Layers of a block by the input that they read, in the order of their calls.

        Args:
          index: Of the block.
          wanted: Paths within the block. Those that are never called are in no stage;
            nor are those called twice, which read two inputs.

        Raises:
          UsageError: If layers are called where their inputs cannot be had.
        """
        graphdef, state = nnx.split(self.blocks[index])
        found: list[Stage] = []
        first = partial(_first, self._graphdef, self.path)
        x = jax.eval_shape(first, self.state, self._like)
        program = self.program(index, graphdef, tuple(sorted(wanted)))

        def listen(*arrays: Any) -> list[Array]:
            inputs, stages = _heard(program, *arrays)
            found.extend(stages)
            return inputs

        jax.eval_shape(listen, self.state, state, self._like, x)
        calls = Counter(path for stage in found for path in stage)
        once = [tuple(path for path in stage if calls[path] == 1) for stage in found]
        return [stage for stage in once if stage]

    def outputs(
        self,
        index: int,
        block: nnx.Module,
        tokens: Tokens,
        x: Float[Array | np.ndarray, "b t d"],
    ) -> Float[Array, "b t d"]:
        """Hidden states behind a block, or a changed copy of it.

        Args:
          index: Of the block.
          block: It, or what stands for it.
          tokens: Of the batch.
          x: Hidden states in front of it.
        """
        return self.outputs_call(index, block)(_on_device(tokens), x)

    def outputs_call(self, index: int, block: nnx.Module) -> Call:
        """As `outputs`, for many batches of `tokens, x`."""
        graphdef, state = nnx.split(block)
        return Call(_outputs, (self.program(index, graphdef),), (self.state, state))

    def moments(
        self,
        index: int,
        block: nnx.Module,
        stages: Sequence[Stage],
        tokens: Tokens,
        x: Float[Array | np.ndarray, "b t d"],
        weights: Sequence[Float[np.ndarray, "*b"]] | None = None,
        undisturbed: Undisturbed | None = None,
    ) -> Mapping[Stage, Float[Array, "r c"]]:
        """Sums of x x^T over all tokens, x the input of each stage; halves of them.

        Padding, where there is a mask, counts nothing.

        Args:
          index: Of the block.
          block: It, or what stands for it.
          stages: From `stages`.
          tokens: Of the batch.
          x: Hidden states in front of it.
          weights: Of every token in the sum, for each stage; None weighs all alike.
          undisturbed: Makes the sums of (x, d) in place of x, d being what is missing
            in x of the same input in full precision.
        """
        original, full = undisturbed or (None, None)
        call = self.moments_call(index, block, stages, original)
        found = call(_on_device(tokens), x, weights, full)
        return dict(zip(stages, found, strict=True))

    def moments_call(
        self,
        index: int,
        block: nnx.Module,
        stages: Sequence[Stage],
        original: nnx.Module | None = None,
    ) -> Call:
        """As `moments`, a list of them, for many batches.

        Args:
          index: Of the block.
          block: It, or what stands for it.
          stages: From `stages`.
          original: The block in full precision, where batches have hidden states of
            that, too.

        Returns:
          Called with `tokens, x, weights, full`, the last of them hidden states in full
          precision, or None.

        Raises:
          UsageError: If there is a mask, and a layer's input is not `[b, t, m]`.
        """
        graphdef, state = nnx.split(block)
        wanted = tuple(stage[0] for stage in stages)
        program = self.program(index, graphdef, wanted)
        other = None if original is None else nnx.split(original)[1]
        return Call(_moments, (program,), (self.state, state, other))

    def loss_gradient(
        self,
        tokens: Tokens,
        x: Float[Array | np.ndarray, "b t d"],
        key: Key[Array, ""],
    ) -> Float[Array, "b t d"]:
        """The gradient of the model's loss with respect to what the last block gives.

        The loss is the cross entropy, summed over tokens, of next tokens that are drawn
        from the model's own predictions.

        Args:
          tokens: Of the batch.
          x: Hidden states behind the last block.
          key: Of the draw.

        Raises:
          UsageError: If the model does not give logits `[b, t, v]`.
        """
        return _loss_gradient(
            self._graphdef, self.path, self.state, _on_device(tokens), x, key
        )

    def pulled_back(
        self,
        index: int,
        wanted: Collection[str],
        tokens: Tokens,
        x: Float[Array | np.ndarray, "b t d"],
        gradient: Float[Array, "b t d"],
        measure: Measure,
    ) -> "PulledBack":
        """Takes the gradient of a loss from behind a block to its front.

        Args:
          index: Of the block.
          wanted: Paths of layers within it.
          tokens: Of the batch.
          x: Hidden states in front of it.
          gradient: With respect to those behind it.
          measure: Taken of the gradient at every layer.
        """
        graphdef, state = nnx.split(self.blocks[index])
        program = self.program(index, graphdef, tuple(wanted))
        return _pulled_back(
            program, measure, self.state, state, _on_device(tokens), x, gradient
        )

    def program(
        self, index: int, block: Any, wanted: tuple[str, ...] = ()
    ) -> "Program":
        """What is static of a pass through a block.

        Args:
          index: Of the block.
          block: Graph of it, or of what stands for it.
          wanted: Paths within it of layers whose inputs are listened to.
        """
        return Program(self._graphdef, block, self.path, self._kinds[index], wanted)


class Program(NamedTuple):
    """All that is static of a pass through a block; from `BlockRunner.program`."""

    shell: Any
    block: Any
    path: str
    kind: int
    wanted: tuple[str, ...]


@partial(jax.jit, static_argnums=(0, 1))
def _first(graphdef: Any, path: str, state: Any, tokens: Any) -> Float[Array, "b t d"]:
    return _calls(graphdef, path, state, tokens)[0]


def _kinds(graphdef: Any, path: str, state: Any, tokens: Any) -> Any:
    """For every block an array as long as the index of the first one called alike."""
    _, calls = _calls(graphdef, path, state, tokens)
    seen: dict[Any, int] = {}
    kinds = []
    for i, call in enumerate(calls):
        leaves, structure = jax.tree.flatten(call)
        same = (structure, tuple(map(id, leaves)))
        kinds.append(jnp.zeros(seen.setdefault(same, i)))
    return kinds


def _on_device(tokens: Tokens) -> Any:
    return jax.tree.map(jnp.asarray, tokens)


def _call(model: Any, tokens: Any) -> Any:
    """The model's outputs."""
    if not isinstance(tokens, EncoderInputs):
        return model(tokens)
    given = {"attention_mask": tokens.mask, "token_type_ids": tokens.token_types}
    return model(tokens.ids, **{k: v for k, v in given.items() if v is not None})


def _calls(
    graphdef: Any, path: str, state: Any, tokens: Any
) -> tuple[Array, list[_Call]]:
    """Hidden states in front of the blocks, and what each block is called with."""
    model = nnx.merge(graphdef, state)
    found: list[tuple[Array, _Call]] = []

    def tell(index: int, x: Array, args: Any, kwargs: Any) -> None:
        found.append((x, _Call(args, kwargs)))

    for stop in at_path(model, path):
        stop.tell = tell
    _call(model, tokens)
    return found[0][0], [call for _, call in found]


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
    call = _calls(program.shell, program.path, shell, tokens)[1][program.kind]
    found = block(x, *call.args, **call.kwargs)
    return found[0] if isinstance(found, tuple) else found


def _heard(
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
        put_at_path(block, path, _Ear(path, at_path(block, path), tell=tell))
    run_block(program, shell, block, tokens, x)
    return [x for x, _ in found.values()], [tuple(e) for _, e in found.values()]


@partial(jax.jit, static_argnums=0)
def _outputs(program: Program, shell: Any, state: Any, tokens: Any, x: Any) -> Array:
    block = nnx.merge(program.block, state)
    return run_block(program, shell, block, tokens, x)


def _read(program: Program, shell: Any, state: Any, tokens: Any, x: Any) -> list[Array]:
    """What every wanted layer reads, in float32."""
    inputs, stages = _heard(program, shell, state, tokens, x)
    by_layer = {
        path: x for x, stage in zip(inputs, stages, strict=True) for path in stage
    }
    return [by_layer[path].astype(jnp.float32) for path in program.wanted]


@partial(jax.jit, static_argnums=0)
def _moments(
    program: Program,
    shell: Any,
    state: Any,
    original: Any,
    tokens: Any,
    x: Any,
    weights: Any,
    full: Any,
) -> list[Array]:
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


@partial(jax.jit, static_argnums=(0, 1))
def _loss_gradient(
    graphdef: Any, path: str, state: Any, tokens: Any, x: Any, key: Key[Array, ""]
) -> Float[Array, "b t d"]:
    def loss(x: Array) -> Array:
        model = nnx.merge(graphdef, state)
        *_, last = at_path(model, path)
        last.give = lambda: x
        logits = _call(model, tokens)
        if logits.ndim != 3:
            raise UsageError(
                "`weighting` by gradients is for models that predict a next token for "
                f"every token, and this one gives an array of shape {logits.shape}. "
                "Leave it out."
            )
        # Nothing follows on the last token of a window.
        scores = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(scores))
        return -jnp.sum(jnp.take_along_axis(scores, drawn[..., None], axis=-1))

    return jax.grad(loss)(x)


@partial(jax.jit, static_argnums=(0, 1))
def _pulled_back(
    program: Program,
    measure: Measure,
    shell: Any,
    state: Any,
    tokens: Any,
    x: Any,
    gradient: Array,
) -> PulledBack:
    def run(x: Array, extra: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        block = nnx.merge(program.block, state)
        given: dict[str, Array] = {}

        def change(path: str, y: Array) -> Array:
            given[path] = y
            return y + extra[path] if path in extra else y

        for path in program.wanted:
            put_at_path(block, path, _Ear(path, at_path(block, path), change=change))
        return run_block(program, shell, block, tokens, x), given

    # Zeros that are added to outputs: their gradients are those of the outputs.
    outputs = jax.eval_shape(lambda x: run(x, {})[1], x)
    zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), outputs)
    _, pull = jax.vjp(lambda x, extra: run(x, extra)[0], x, zeros)
    before, gradients = pull(gradient)
    take = half_moments if measure is Measure.MOMENTS else _mean_squares
    return PulledBack(before, {path: take(each) for path, each in gradients.items()})


def _mean_squares(gradient: Float[Array, "*b n"]) -> Float[Array, "*b"]:
    return jnp.mean(jnp.square(gradient.astype(jnp.float32)), axis=-1)
