"""Checkpoints on disk: safetensors files by bounded reads and writes, packed tensors.

The format is specified in `docs/format.md`.
"""

from kashin_jax.io.checkpoint import Checkpoint as Checkpoint
from kashin_jax.io.checkpoint import join_files as join_files
from kashin_jax.io.checkpoint import open_checkpoint as open_checkpoint
from kashin_jax.io.checkpoint import read_config as read_config
from kashin_jax.io.dtypes import DTYPES as DTYPES
from kashin_jax.io.dtypes import RANKS as RANKS
from kashin_jax.io.dtypes import TensorSpec as TensorSpec
from kashin_jax.io.files import atomic_path as atomic_path
from kashin_jax.io.files import read_json as read_json
from kashin_jax.io.files import write_json as write_json
from kashin_jax.io.format import Described as Described
from kashin_jax.io.header import Entry as Entry
from kashin_jax.io.index import check_weight_map as check_weight_map
from kashin_jax.io.index import write_index as write_index
from kashin_jax.io.packed import describe as describe
from kashin_jax.io.packed import expected_specs as expected_specs
from kashin_jax.io.packed import from_leaves as from_leaves
from kashin_jax.io.packed import leaf_specs as leaf_specs
from kashin_jax.io.packed import to_leaves as to_leaves
from kashin_jax.io.safetensors import Sink as Sink
from kashin_jax.io.safetensors import TensorFile as TensorFile
from kashin_jax.io.safetensors import copy_bytes as copy_bytes
from kashin_jax.io.safetensors import hash_file as hash_file
from kashin_jax.io.safetensors import read_header as read_header
from kashin_jax.io.safetensors import read_rows as read_rows
from kashin_jax.io.safetensors import read_tensor as read_tensor
from kashin_jax.io.schema import SCHEMA_VERSION as SCHEMA_VERSION
from kashin_jax.io.shards import MAX_SHARD_BYTES as MAX_SHARD_BYTES
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
from kashin_jax.io.shards import write_stored as write_stored
from kashin_jax.io.writer import FileRecord as FileRecord
from kashin_jax.io.writer import TensorWriter as TensorWriter
from kashin_jax.io.writer import open_writer as open_writer
from kashin_jax.io.writer import write_tensors as write_tensors

__all__ = [
    "DTYPES",
    "MAX_SHARD_BYTES",
    "RANKS",
    "SCHEMA_VERSION",
    "Checkpoint",
    "Described",
    "Entry",
    "FileRecord",
    "PlannedTensor",
    "Sink",
    "TensorFile",
    "TensorSpec",
    "TensorWriter",
    "atomic_path",
    "check_weight_map",
    "copy_bytes",
    "describe",
    "expected_specs",
    "from_leaves",
    "hash_file",
    "join_files",
    "leaf_specs",
    "open_checkpoint",
    "open_shard",
    "open_writer",
    "plan_packed",
    "plan_plain",
    "plan_shards",
    "quantization_config",
    "read_config",
    "read_header",
    "read_json",
    "read_rows",
    "read_tensor",
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
