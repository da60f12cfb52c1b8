"""Loading OPT checkpoints that lie in Hugging Face's layout."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kashin_jax.errors import CheckpointError
from kashin_jax.io import open_checkpoint
from kashin_jax.models.names import (
    StoredName,
    opt_name,
    parse_stored_name,
    tensor_name,
)
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM
from kashin_jax.models.reading import (
    abstract_state,
    check_dtype,
    load_variables,
    present,
)
from kashin_jax.models.saving import save_opt

__all__ = ["LoadedModel", "load_opt", "save_opt"]

_HEAD = ("lm_head", "kernel")
_EMBEDDING = ("decoder", "embed_tokens", "embedding")
# Left in some conversions from fairseq; a version number, not a weight.
_IGNORED = frozenset({"decoder.version"})


class LoadedModel(NamedTuple):
    """A model and where it came from.

    Attributes:
      model: In evaluation mode.
      config: Its architecture.
      stored_dtype: NumPy name of the precision that most of the weights are stored in,
        such as `float16`.
      directory: Where the checkpoint lies; its tokenizer is there too.
    """

    model: OPTForCausalLM
    config: OPTConfig
    stored_dtype: str
    directory: Path


def load_opt(
    path_or_id: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    absent: Collection[str] = (),
) -> LoadedModel:
    """Loads an OPT checkpoint, tensor by tensor.

    Reads `model.safetensors`, else `flax_model.msgpack`, else `pytorch_model.bin` (the
    last needs torch), whole or in shards with an index.

    Args:
      path_or_id: A directory, or a hub id, which is downloaded.
      dtype: Of parameters and activations: float32, bfloat16 or float16.
      absent: Stored names of tensors that the files hold in a form of their own, as
        NAME.LEAF; they are left out, and their variables stay shapes.

    Returns:
      The model, ready for evaluation.

    Raises:
      CheckpointError: If the checkpoint cannot be found or read, is of another
        architecture, or has missing, unexpected or mis-shaped tensors.
      NonFiniteError: If a weight is NaN or infinite, or overflows `dtype`.
      UsageError: If `dtype` is not supported.
    """
    dtype = check_dtype(dtype)
    checkpoint = open_checkpoint(path_or_id)
    directory = checkpoint.directory
    source = str(directory / "config.json")
    if not checkpoint.config:
        raise CheckpointError(f"{source}: is missing; copy or download it.")
    config = OPTConfig.from_dict(checkpoint.config, source)
    graphdef, state = abstract_state(OPTForCausalLM, config, dtype)
    targets = dict(nnx.to_flat_state(state))
    if config.tie_word_embeddings:
        # The head is stored all the same by some, and then has to be the embedding.
        head_shape = (config.embedding_size, config.vocab_size)
        targets[_HEAD] = nnx.Param(jax.ShapeDtypeStruct(head_shape, dtype))
    by_name = {tensor_name(path): (path, targets[path]) for path in targets}
    left = {parse_stored_name(name).name for name in absent}
    loaded, stored_dtype = load_variables(
        checkpoint.files.values(), by_name, present(_parse, absent), dtype
    )
    loaded |= {by_name[name][0]: by_name[name][1] for name in left & by_name.keys()}
    if config.tie_word_embeddings and (head := loaded.pop(_HEAD, None)) is not None:
        # What is packed has no values here; quantizing has tied or refused it.
        if not left & {tensor_name(_HEAD), tensor_name(_EMBEDDING)}:
            _check_tied(directory, head[...], loaded.get(_EMBEDDING))
    missing = [path for path, _ in nnx.to_flat_state(state) if path not in loaded]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} tensors are missing, the first is "
            f"`{min(map(opt_name, missing))}`; use the weights published with "
            "config.json."
        )
    model = nnx.merge(graphdef, nnx.from_flat_state(loaded))
    return LoadedModel(model, config, stored_dtype, directory)


def _parse(stored: str) -> StoredName | None:
    parsed = parse_stored_name(stored)
    return None if parsed.name in _IGNORED else parsed


def _check_tied(
    directory: Path, head: Float[Array, "e vocab"], embedding: nnx.Variable | None
) -> None:
    if embedding is not None and not jnp.array_equal(head.T, embedding[...]):
        raise CheckpointError(
            f"{directory}: `lm_head.weight` differs from the token embedding that "
            "config.json ties it to; set `tie_word_embeddings` to false there."
        )
