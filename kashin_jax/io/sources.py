"""Opening what is to be quantized: safetensors, or Flax's msgpack files.

Flax's files are seen as the PyTorch checkpoint of the same model: `fc1/kernel` as the
transpose `fc1.weight`. What is quantized from either copy is then the same, and what is
made of it again is read by `transformers`, which no longer reads Flax's names.
"""

from collections.abc import Mapping
from pathlib import Path

from kashin_jax.errors import CheckpointError
from kashin_jax.io.checkpoint import (
    Checkpoint,
    join_files,
    open_checkpoint,
    read_config,
)
from kashin_jax.io.dtypes import RANKS
from kashin_jax.io.files import read_json
from kashin_jax.io.flax_files import FlaxArray, find_arrays
from kashin_jax.io.header import Entry
from kashin_jax.io.index import check_weight_map
from kashin_jax.io.names import parse_stored_name
from kashin_jax.io.safetensors import TensorFile
from kashin_jax.io.tensor_files import choose_weights, find_weights

__all__ = ["open_source"]


def open_source(directory: str | Path) -> Checkpoint:
    """Opens a directory of safetensors or else of Flax's files; reads no arrays.

    Raises:
      CheckpointError: As `open_checkpoint`; if a file of Flax is damaged, or a kernel
        in it is no matrix.
    """
    directory = Path(directory)
    present = directory.iterdir() if directory.is_dir() else ()
    chosen = choose_weights({path.name for path in present})
    if chosen is None or chosen.suffix != ".msgpack":
        return open_checkpoint(directory)
    config = read_config(directory)
    files = {path.name: _flax_file(path) for path in find_weights(directory)}
    if chosen.sharded:
        index = directory / chosen.entry
        places = read_json(index)["weight_map"]
        renamed = {parse_stored_name(k, "").name: v for k, v in places.items()}
        check_weight_map(renamed, files, index)
    return join_files(directory, config, files, {})


def _flax_file(path: Path) -> TensorFile:
    entries: dict[str, Entry] = {}
    for name, array in find_arrays(path).items():
        renamed = parse_stored_name(name, "").name
        if renamed in entries:
            raise CheckpointError(
                f"{path}: `{name}` and another array are both `{renamed}`; save the "
                "model again."
            )
        entries[renamed] = _entry(array, name, path)
    # In the order of a safetensors file of the same arrays, so that shards are alike.
    order = sorted(entries, key=lambda name: (-RANKS[entries[name].dtype], name))
    metadata: Mapping[str, str] = {}
    return TensorFile(path, {name: entries[name] for name in order}, metadata)


def _entry(array: FlaxArray, name: str, path: Path) -> Entry:
    is_kernel = name.rsplit("/", 1)[-1] == "kernel"
    if is_kernel and len(array.shape) != 2:
        raise CheckpointError(
            f"{path}: `{name}` has {len(array.shape)} axes, and only kernels of linear "
            "layers have a place in other formats; save the model as safetensors."
        )
    start, stop = array.pieces[0][0], array.pieces[-1][1]
    shape = array.shape[::-1] if is_kernel else array.shape
    pieces = array.pieces if len(array.pieces) > 1 else ()
    return Entry(array.dtype, shape, start, stop, pieces, is_kernel)
