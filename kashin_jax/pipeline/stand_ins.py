"""Modules that stand where blocks and layers were, to hear what those read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

__all__ = ["Ear", "Outline", "Stop"]


@dataclass(frozen=True)
class Outline:
    """What a block would give, as shapes and types, for what it is called with.

    Those of equal blocks are equal, as they are static of programs: a second model of
    the same shapes compiles nothing.
    """

    graphdef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    structure: Any

    @classmethod
    def of(cls, block: nnx.Module) -> "Outline":
        graphdef, state = nnx.split(block)
        leaves, structure = jax.tree.flatten(state)
        shapes = (jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        return cls(graphdef, tuple(shapes), structure)

    def __call__(self, x: Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def call(leaves: tuple[Array, ...]) -> Any:
            state = jax.tree.unflatten(self.structure, leaves)
            return nnx.merge(self.graphdef, state)(x, *args, **kwargs)

        return jax.eval_shape(call, self.leaves)


class Stop(nnx.Module):
    """Stands where a block was: says what it was called with, and changes nothing."""

    def __init__(self, index: int, outline: Outline) -> None:
        self.index, self.outline = index, outline
        self.tell: Callable[..., None] | None = None
        # Gives what the last block gave; nothing is changed without.
        self.give: Callable[[], Array] | None = None

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        given = self.outline(x, args, kwargs)
        rest = given[1:] if isinstance(given, tuple) else ()
        rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
        if self.tell is not None:
            # A value of its own: what was read behind a block, or in front of it.
            new = x + jnp.zeros((), x.dtype)
            self.tell(self.index, x, (args, kwargs), (new, rest))
            x = new
        if self.give is not None:
            x = self.give()
        return (x, *rest) if isinstance(given, tuple) else x


class Ear(nnx.Module):
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
