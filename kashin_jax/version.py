"""The version of the library, from its metadata or the source tree it lies in."""

import importlib.metadata
import tomllib
from pathlib import Path

__all__ = ["library_version"]


def library_version() -> str:
    """The version; `0+unknown` for a package that was copied without its project."""
    try:
        return importlib.metadata.version("kashin_jax")
    except importlib.metadata.PackageNotFoundError:
        path = Path(__file__).parent.parent / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text("utf-8"))["project"]
        is_ours = project["name"].replace("-", "_") == "kashin_jax"
        return str(project["version"]) if is_ours else "0+unknown"
    except (OSError, ValueError, LookupError):
        return "0+unknown"
