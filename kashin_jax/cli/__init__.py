"""The `kashin` command."""

from kashin_jax.cli.program import main as main

__all__ = ["main"]
