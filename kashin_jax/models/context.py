"""How long the windows may be that a language model is good for.

A checkpoint may have more positions than it was trained at: then `asset.json` beside
it says so, as `{"trained_context": 512}`.
"""

from pathlib import Path

from kashin_jax.errors import CheckpointError
from kashin_jax.io import read_json
from kashin_jax.models.loading import LoadedModel

__all__ = ["own_context", "trained_context"]


def own_context(loaded: LoadedModel) -> int:
    """Tokens of the longest window that a model has positions for, and was trained at.

    Raises:
      CheckpointError: If `asset.json` is there and does not say.
    """
    limit: int = loaded.config.max_position_embeddings
    return min(trained_context(loaded.directory) or limit, limit)


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
