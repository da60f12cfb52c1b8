"""The version of the format, and where files say which one they have."""

from typing import Any

from kashin_jax.errors import CheckpointError
from kashin_jax.io.files import shown

__all__ = ["METADATA_KEY", "SCHEMA_VERSION", "check_schema"]

SCHEMA_VERSION = 1
"""Of the format; readers refuse newer ones."""

METADATA_KEY = "kashin_jax"
"""Of the text in a shard's metadata that describes its packed tensors."""


def check_schema(version: Any, where: str) -> None:
    """Raises CheckpointError unless this library reads a schema version."""
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{where}: `schema_version` cannot be {shown(version)}; copy or download "
            "it again."
        )
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{where}: has schema version {version}, but this kashin_jax reads up to "
            f"{SCHEMA_VERSION}; upgrade kashin_jax."
        )
