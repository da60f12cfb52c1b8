"""Paths of layers: how they are written, sorted, and turned into keys."""

import zlib
from collections.abc import Iterable
from typing import Any

import jax
from jaxtyping import Array, Key

__all__ = ["at_path", "join", "natural", "path_key", "put_at_path"]


def join(parts: Iterable[Any]) -> str:
    """`decoder/layers/0/fc1` of its parts."""
    return "/".join(map(str, parts))


def at_path(model: Any, path: str) -> Any:
    """What stands at a path below a module."""
    for name in path.split("/"):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def put_at_path(model: Any, path: str, new: Any) -> None:
    """Puts something else at a path below a module."""
    above, _, name = path.rpartition("/")
    holder = at_path(model, above) if above else model
    if name.isdigit():
        holder[int(name)] = new
    else:
        setattr(holder, name, new)


def natural(path: str) -> list[tuple[int, str]]:
    """Sorting key by which layer 10 comes after layer 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split("/")]


def path_key(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """The key of one layer: a function of the root key and its path alone."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
