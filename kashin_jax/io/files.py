"""Files that appear whole or not at all, and JSON that nobody vouches for."""

import collections
import contextlib
import hashlib
import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kashin_jax.errors import CheckpointError

__all__ = [
    "atomic_path",
    "check_regular",
    "damaged",
    "hash_file",
    "make_directory",
    "parse_json",
    "read_json",
    "shown",
    "unreadable",
    "write_json",
]

_MAX_JSON_BYTES = 100_000_000
# A plain `repr` of deeply nested lists ends in a RecursionError.
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 100


def shown(value: Any) -> str:
    """A value of unknown size and content, short and on one line."""
    text = _BRIEF.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def damaged(path: Path, reason: Exception) -> CheckpointError:
    """The error, in one line, for a file whose content no decoder understands."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    return CheckpointError(
        f"{path}: is truncated or damaged ({text[:100]}); copy or download it again."
    )


def unreadable(path: Path, reason: OSError) -> CheckpointError:
    """The error, in one line, for a file that is missing or cannot be read."""
    if isinstance(reason, FileNotFoundError):
        return CheckpointError(f"{path}: is missing; copy or download it.")
    return CheckpointError(
        f"{path}: cannot be read ({reason.strerror or reason}); copy it again."
    )


def check_regular(path: Path) -> None:
    """Raises CheckpointError for a pipe or device, which may block or never end."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is not a regular file; copy it again.")


def _unwritable(path: Path, reason: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written ({reason.strerror or reason}); free space there or "
        "choose another directory."
    )


def make_directory(path: Path) -> None:
    """Makes a directory where there is none; CheckpointError if it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Lends a temporary path that durably becomes `path` if nothing is raised.

    Otherwise the temporary file is removed and `path` is left as it was.

    Raises:
      CheckpointError: If the file cannot be written, as on a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        if os.name == "posix":  # elsewhere directories cannot be opened
            _sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
      CheckpointError: If the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def write_json(path: Path, content: Any) -> None:
    """Writes JSON durably and in one step; equal content gives equal bytes.

    Raises:
      CheckpointError: If the file cannot be written.
    """
    text = json.dumps(content, indent=2) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 100 MB.

    Raises:
      CheckpointError: If the file is missing, too large, not JSON, not an object, or
        has a key twice.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            data = file.read(min(os.fstat(file.fileno()).st_size, _MAX_JSON_BYTES) + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > _MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: is larger than {_MAX_JSON_BYTES} bytes; it is no file of this "
            "format."
        )
    return parse_json(data, str(path))


def parse_json(data: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object; `where` begins the message if it is none.

    Raises:
      CheckpointError: If the text is not JSON, not an object, or has a key twice.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    # Nesting of some thousand levels ends in a RecursionError.
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(
            f"{where}: is not valid JSON ({reason}); copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{where}: is not a JSON object; copy or download it again."
        )
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        raise ValueError(
            f"the key {shown(max(counts, key=counts.__getitem__))} is there twice"
        )
    return content
