"""What an unfinished run leaves behind, so that it goes on and never meets another."""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from kashin_jax.errors import UsageError
from kashin_jax.io import Checkpoint, read_json, write_json
from kashin_jax.pipeline.rules import Rules, rules_to_json

__all__ = ["claim_directory", "fingerprint", "release_directory"]

_STATE = ".kashin_quantize.json"


def fingerprint(source: Checkpoint, rules: Rules, seed: int, shard_bytes: int) -> str:
    """A digest of everything that the bytes of the result depend on.

    Of the source it sees names, sizes, times of change and headers: hashing the data
    would read all of it once more.
    """
    files = []
    for name, file in source.files.items():
        status = file.path.stat()
        entries = [(key, *spec) for key, spec in file.specs.items()]
        files.append([name, status.st_size, status.st_mtime_ns, entries])
    content = {
        "files": files,
        "config": dict(source.config),
        "rules": rules_to_json(rules),
        "seed": seed,
        "shard_bytes": shard_bytes,
        "kashin_jax": importlib.metadata.version("kashin_jax"),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
    }
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def claim_directory(directory: Path, digest: str) -> None:
    """Makes a directory that of one run, or goes on with it if it already is.

    What a killed process left half-written is removed.

    Raises:
      UsageError: If it is another run's, or holds something else.
    """
    state = directory / _STATE
    if state.exists():
        if (found := read_json(state).get("fingerprint")) != digest:
            raise UsageError(
                f"{directory}: holds an unfinished run with other weights, rules, "
                f"seed, shards or versions ({str(found)[:12]}, not {digest[:12]}). "
                "Repeat its command, or remove the directory."
            )
        _remove(directory.glob(".*.partial"))
        return
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: is a file; name a directory.")
    if directory.exists():
        # Killed before it could say whose directory this is.
        _remove(directory.glob(f".{_STATE}.*.partial"))
        if any(directory.iterdir()):
            raise UsageError(
                f"{directory}: is not empty; name a directory that does not exist."
            )
    directory.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"fingerprint": digest}
    write_json(state, content)


def release_directory(directory: Path) -> None:
    """Marks the run as finished."""
    (directory / _STATE).unlink(missing_ok=True)


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)
