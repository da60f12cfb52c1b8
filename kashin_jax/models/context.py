"""How long the windows may be that a language model is good for.

A checkpoint may have more positions than it was trained at: then `asset.json` beside
it says so, as `{"trained_context": 512}`.
"""

from pathlib import Path

from kashin_jax.errors import CheckpointError
from kashin_jax.io import read_json
from kashin_jax.models.loading import LoadedModel

__all__ = ["MOST_TOKENS", "context_of", "own_context", "trained_context"]

MOST_TOKENS = 2048
"""Of a window where nobody says: what tables of perplexity have. The logits of one
window of 131,072 tokens, as Llama 3.1 has positions for, take 67 GB."""


def own_context(loaded: LoadedModel) -> int:
    """Tokens of a window that a model has positions for, and was trained at.

    At most `MOST_TOKENS` where the checkpoint does not say what it was trained at.

    Raises:
      CheckpointError: If `asset.json` is there and does not say.
    """
    return context_of(loaded.directory, loaded.config.context_length)


def context_of(model_directory: str | Path, limit: int) -> int:
    """The same of a checkpoint that is not loaded.

    Args:
      model_directory: Where it lies.
      limit: Tokens that it has positions for.

    Raises:
      CheckpointError: If `asset.json` is there and does not say.
    """
    return min(trained_context(model_directory) or MOST_TOKENS, limit)


def trained_context(model_directory: str | Path) -> int | None:
    """The sequence length a checkpoint was trained at, if `asset.json` records it.

    Raises:
      CheckpointError: If that file does not say.
    """
    path = Path(model_directory) / "asset.json"
    if not path.is_file():
        return None
    found = read_json(path).get("trained_context")
    if not isinstance(found, int) or isinstance(found, bool) or found < 2:
        raise CheckpointError(
            f"{path}: has no whole number `trained_context`; restore or delete it."
        )
    return found
