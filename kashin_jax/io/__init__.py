"""Bytes on disk: files, safetensors, the format of packed tensors, checkpoints.

The format is specified in `docs/format.md`.
"""

from kashin_jax.io.checkpoint import Checkpoint as Checkpoint
from kashin_jax.io.checkpoint import open_checkpoint as open_checkpoint
from kashin_jax.io.files import atomic_path as atomic_path
from kashin_jax.io.files import hash_file as hash_file
from kashin_jax.io.files import make_directory as make_directory
from kashin_jax.io.files import read_json as read_json
from kashin_jax.io.files import write_json as write_json
from kashin_jax.io.format import SCHEMA_VERSION as SCHEMA_VERSION
from kashin_jax.io.format import Described as Described
from kashin_jax.io.format import describe as describe
from kashin_jax.io.format import from_leaves as from_leaves
from kashin_jax.io.format import leaf_specs as leaf_specs
from kashin_jax.io.format import to_leaves as to_leaves
from kashin_jax.io.gguf import quantized_before as quantized_before
from kashin_jax.io.hub import checkpoint_directory as checkpoint_directory
from kashin_jax.io.safetensors import DTYPES as DTYPES
from kashin_jax.io.safetensors import Sink as Sink
from kashin_jax.io.safetensors import TensorFile as TensorFile
from kashin_jax.io.safetensors import TensorSpec as TensorSpec
from kashin_jax.io.safetensors import TensorWriter as TensorWriter
from kashin_jax.io.safetensors import open_safetensors as open_safetensors
from kashin_jax.io.safetensors import open_writer as open_writer
from kashin_jax.io.safetensors import write_tensors as write_tensors
from kashin_jax.io.shards import MAX_SHARD_BYTES as MAX_SHARD_BYTES
from kashin_jax.io.shards import FileRecord as FileRecord
from kashin_jax.io.shards import PlannedTensor as PlannedTensor
from kashin_jax.io.shards import open_shard as open_shard
from kashin_jax.io.shards import plan_packed as plan_packed
from kashin_jax.io.shards import plan_plain as plan_plain
from kashin_jax.io.shards import plan_shards as plan_shards
from kashin_jax.io.shards import quantization_config as quantization_config
from kashin_jax.io.shards import record_file as record_file
from kashin_jax.io.shards import save_checkpoint as save_checkpoint
from kashin_jax.io.shards import shard_names as shard_names
from kashin_jax.io.shards import write_config as write_config
from kashin_jax.io.shards import write_index as write_index
from kashin_jax.io.shards import write_stored as write_stored

__all__ = [
    "DTYPES",
    "MAX_SHARD_BYTES",
    "SCHEMA_VERSION",
    "Checkpoint",
    "Described",
    "FileRecord",
    "PlannedTensor",
    "Sink",
    "TensorFile",
    "TensorSpec",
    "TensorWriter",
    "atomic_path",
    "checkpoint_directory",
    "describe",
    "from_leaves",
    "hash_file",
    "leaf_specs",
    "make_directory",
    "open_checkpoint",
    "open_safetensors",
    "open_shard",
    "open_writer",
    "plan_packed",
    "plan_plain",
    "plan_shards",
    "quantization_config",
    "quantized_before",
    "read_json",
    "record_file",
    "save_checkpoint",
    "shard_names",
    "to_leaves",
    "write_config",
    "write_index",
    "write_json",
    "write_stored",
    "write_tensors",
]
