"""A language model run block by block, with an ear at the inputs of its layers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kashin_jax.errors import UsageError
from kashin_jax.pipeline.moments import half_moments
from kashin_jax.pipeline.paths import join

__all__ = ["BlockRunner", "Program", "Stage", "find_blocks", "run_block"]

Stage = tuple[str, ...]
"""Paths within a block of layers that read the same input, in the order of calls."""


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


# What a block would give, as shapes and types, for what it is called with.
_Outline = Callable[[Array, tuple[Any, ...], dict[str, Any]], Any]


class _Stop(nnx.Module):
    """Stands where a block was: says what it was called with, and changes nothing."""

    def __init__(self, index: int, outline: _Outline) -> None:
        self.index, self.outline = index, outline
        self.tell: Callable[..., None] | None = None

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        if self.tell is not None:
            self.tell(self.index, x, args, kwargs)
        given = self.outline(x, args, kwargs)
        if not isinstance(given, tuple):
            return x
        _, *rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), given)
        return (x, *rest)


def _outline(block: nnx.Module) -> _Outline:
    graphdef, state = nnx.split(block)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)

    def outline(x: Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return jax.eval_shape(
            lambda state: nnx.merge(graphdef, state)(x, *args, **kwargs), shapes
        )

    return outline


class _Ear(nnx.Module):
    """Stands around a layer: says what it was called with, and calls it."""

    def __init__(self, path: str, inner: Any, tell: Callable[[str, Any], None]) -> None:
        self.path, self.inner, self.tell = path, inner, tell

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        self.tell(self.path, x)
        return self.inner(x, *args, **kwargs)


class _Call(NamedTuple):
    # What a block is called with besides hidden states.
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockRunner:
    """Runs one block of a language model at a time.

    A block is called with hidden states and whatever the model hands to it, and gives
    new hidden states, alone or as the first of a tuple. Blocks of one structure that
    are called with the same, all of most models, share their compiled programs.
    """

    def __init__(self, model: nnx.Module, blocks: str) -> None:
        """Runs nothing yet.

        Args:
          model: Called with token ids `[b, t]`. Not changed.
          blocks: Path of the list of its blocks.
        """
        self.path = blocks
        self.blocks = list(_at(model, blocks))
        shell = nnx.clone(model, variables=False)
        stops = [_Stop(i, _outline(block)) for i, block in enumerate(self.blocks)]
        _put_at(shell, blocks, nnx.List(stops))
        self._graphdef, self.state = nnx.split(shell)
        calls = jax.eval_shape(
            partial(_kinds, self._graphdef, blocks),
            self.state,
            jax.ShapeDtypeStruct((1, 2), jnp.int32),
        )
        # Blocks that are called with the same arrays: the first one stands for all.
        self._kinds = [int(kind.shape[0]) for kind in calls]

    def first(self, tokens: Int[np.ndarray, "b t"]) -> Float[Array, "b t d"]:
        """Hidden states in front of the first block."""
        return _first(self._graphdef, self.path, self.state, jnp.asarray(tokens))

    def stages(self, index: int, wanted: Collection[str]) -> list[Stage]:
        """Layers of a block by the input that they read, in the order of their calls.

        Args:
          index: Of the block.
          wanted: Paths within the block. Those that are never called are in no stage.
        """
        graphdef, state = nnx.split(self.blocks[index])
        found: list[Stage] = []
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        first = partial(_first, self._graphdef, self.path)
        x = jax.eval_shape(first, self.state, tokens)
        program = self.program(index, graphdef, tuple(sorted(wanted)))

        def listen(*arrays: Any) -> list[Array]:
            inputs, stages = _heard(program, *arrays)
            found.extend(stages)
            return inputs

        jax.eval_shape(listen, self.state, state, tokens, x)
        return found

    def outputs(
        self,
        index: int,
        block: nnx.Module,
        tokens: Int[np.ndarray, "b t"],
        x: Float[Array | np.ndarray, "b t d"],
    ) -> Float[Array, "b t d"]:
        """Hidden states behind a block, or a changed copy of it.

        Args:
          index: Of the block.
          block: It, or what stands for it.
          tokens: Of the batch.
          x: Hidden states in front of it.
        """
        graphdef, state = nnx.split(block)
        program = self.program(index, graphdef)
        return _outputs(program, self.state, state, jnp.asarray(tokens), x)

    def moments(
        self,
        index: int,
        block: nnx.Module,
        stages: Sequence[Stage],
        tokens: Int[np.ndarray, "b t"],
        x: Float[Array | np.ndarray, "b t d"],
    ) -> Mapping[Stage, Float[Array, "r c"]]:
        """Sums of x x^T over all tokens, x the input of each stage; halves of them.

        Args:
          index: Of the block.
          block: It, or what stands for it.
          stages: From `stages`.
          tokens: Of the batch.
          x: Hidden states in front of it.
        """
        graphdef, state = nnx.split(block)
        wanted = tuple(stage[0] for stage in stages)
        program = self.program(index, graphdef, wanted)
        found = _moments(program, self.state, state, jnp.asarray(tokens), x)
        return dict(zip(stages, found, strict=True))

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
def _first(
    graphdef: Any, path: str, state: Any, tokens: Int[Array, "b t"]
) -> Float[Array, "b t d"]:
    return _calls(graphdef, path, state, tokens)[0]


def _kinds(graphdef: Any, path: str, state: Any, tokens: Int[Array, "b t"]) -> Any:
    """For every block an array as long as the index of the first one called alike."""
    _, calls = _calls(graphdef, path, state, tokens)
    seen: dict[Any, int] = {}
    kinds = []
    for i, call in enumerate(calls):
        leaves, structure = jax.tree.flatten(call)
        same = (structure, tuple(map(id, leaves)))
        kinds.append(jnp.zeros(seen.setdefault(same, i)))
    return kinds


def _calls(
    graphdef: Any, path: str, state: Any, tokens: Int[Array, "b t"]
) -> tuple[Array, list[_Call]]:
    """Hidden states in front of the blocks, and what each block is called with."""
    model = nnx.merge(graphdef, state)
    found: list[tuple[Array, _Call]] = []

    def tell(index: int, x: Array, args: Any, kwargs: Any) -> None:
        found.append((x, _Call(args, kwargs)))

    for stop in _at(model, path):
        stop.tell = tell
    model(tokens)
    return found[0][0], [call for _, call in found]


def run_block(
    program: Program, shell: Any, block: Any, tokens: Array, x: Array
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
    program: Program, shell: Any, state: Any, tokens: Array, x: Array
) -> tuple[list[Array], list[Stage]]:
    """The inputs of the wanted layers, and who reads each of them."""
    block = nnx.merge(program.block, state)
    found: dict[int, tuple[Array, list[str]]] = {}

    def tell(path: str, x: Array) -> None:
        found.setdefault(id(x), (x, []))[1].append(path)

    for path in program.wanted:
        _put_at(block, path, _Ear(path, _at(block, path), tell))
    run_block(program, shell, block, tokens, x)
    return [x for x, _ in found.values()], [tuple(e) for _, e in found.values()]


@partial(jax.jit, static_argnums=0)
def _outputs(program: Program, shell: Any, state: Any, tokens: Array, x: Any) -> Array:
    block = nnx.merge(program.block, state)
    return run_block(program, shell, block, tokens, x)


@partial(jax.jit, static_argnums=0)
def _moments(
    program: Program, shell: Any, state: Any, tokens: Array, x: Any
) -> list[Array]:
    inputs, stages = _heard(program, shell, state, tokens, x)
    by_layer = {
        path: x for x, stage in zip(inputs, stages, strict=True) for path in stage
    }
    return [half_moments(by_layer[path]) for path in program.wanted]


def _at(model: Any, path: str) -> Any:
    for name in path.split("/"):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def _put_at(model: Any, path: str, new: Any) -> None:
    above, _, name = path.rpartition("/")
    holder = _at(model, above) if above else model
    if name.isdigit():
        holder[int(name)] = new
    else:
        setattr(holder, name, new)
