"""The import path of version 0.1; `pipeline` has its names."""

from kashin_jax.deprecated import CHECKPOINTS, forwarding

__getattr__ = forwarding(__name__, CHECKPOINTS)
