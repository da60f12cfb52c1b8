"""Files of llama.cpp as checkpoints in Hugging Face's layout.

A file is read once for what is small: configuration, tokenizer and the places of its
tensors, which go into a directory of a cache. Matrices are decoded from the file itself
whenever they are asked for.
"""

from kashin_jax.io.gguf.directory import gguf_directory as gguf_directory
from kashin_jax.io.gguf.directory import open_gguf as open_gguf
from kashin_jax.io.gguf.layout import quantized_before as quantized_before

__all__ = ["gguf_directory", "open_gguf", "quantized_before"]
