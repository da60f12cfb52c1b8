"""The import path of version 0.1; its names are in methods, tensors and pipeline."""

from kashin_jax.deprecated import QUANTIZED, forwarding

__getattr__ = forwarding(__name__, QUANTIZED)
