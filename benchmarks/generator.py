"""A process that holds one model of random weights and generates when it is asked.

`benchmarks.generate` starts it, with a `Job` as JSON. Every line of standard input is a
number of prompts; every line of standard output says what the process is or how long
they took. A process of its own, so that its memory is that of one model and kernels can
be off in one and on in the next.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.blocks import random_tensor
from benchmarks.methods import method_config
from kashin_jax.layers import QuantizedEmbed, QuantizedLinear
from kashin_jax.methods import Method
from kashin_jax.models.decoder import DecoderForCausalLM
from kashin_jax.models.decoder_config import DecoderConfig
from kashin_jax.models.generation import CausalLM, generate
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM
from kashin_jax.models.rope import Rope
from kashin_jax.tensors.kernels import report

__all__ = ["MODELS", "Job", "main"]

_LLAMA_3 = Rope(
    rope_type="llama3", rope_theta=500_000.0, factor=32.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=8192,
)  # fmt: skip

MODELS = MappingProxyType({
    "opt-wiki-18m": OPTConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=8, ffn_dim=1536,
        num_attention_heads=6, max_position_embeddings=1024,
    ),
    "opt-1.3b": OPTConfig(
        vocab_size=50272, hidden_size=2048, num_hidden_layers=24, ffn_dim=8192,
        num_attention_heads=32, max_position_embeddings=2048,
    ),
    "llama-3.2-1b": DecoderConfig(
        model_type="llama", vocab_size=128256, hidden_size=2048, num_hidden_layers=16,
        intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, max_position_embeddings=131_072, rms_norm_eps=1e-5,
        tie_word_embeddings=True, rope=_LLAMA_3,
        layer_types=("full_attention",) * 16,
    ),
})  # fmt: skip
"""Shapes: of the embedded OPT, and of two checkpoints."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A model and what it is asked for.

    Attributes:
      model: One of `MODELS`.
      dtype: Type of activations, and of weights that are not packed.
      bits: Width of joint codes; None where nothing is packed.
      packs_head: Whether the embedding, which is the head, is packed, too.
      prompt: Tokens of every prompt.
      tokens: New ones.
    """

    model: str
    dtype: str = "float32"
    bits: float | None = None
    packs_head: bool = False
    prompt: int
    tokens: int


def random_model(job: Job) -> CausalLM:
    """The model, of leaves that `quantize` would give: times depend on shapes alone."""
    config: Any = MODELS[job.model]
    kind: Any = OPTForCausalLM if isinstance(config, OPTConfig) else DecoderForCausalLM
    # One layer is drawn, others are copies: a thousand million numbers take a minute.
    few: dict[str, Any] = {"num_hidden_layers": 1}
    if isinstance(config, DecoderConfig):
        few |= {"layer_types": config.layer_types[:1]}
    model = kind(
        dataclasses.replace(config, **few),
        rngs=nnx.Rngs(0), dtype=job.dtype, param_dtype=job.dtype,
    )  # fmt: skip
    body = model.decoder if isinstance(config, OPTConfig) else model
    first, layers = body.layers[0], []
    for number in range(config.num_hidden_layers):
        graph, state = nnx.split(first)
        layer = nnx.merge(graph, jax.tree.map(jnp.copy, state))
        if job.bits is not None:
            _pack_linears(layer, _method(job.bits), number)
        layers.append(layer)
    body.layers = nnx.List(layers)
    if job.bits is not None and job.packs_head:
        embed = body.embed_tokens
        shape = embed.num_embeddings, embed.features
        tensor = random_tensor(shape, _method(job.bits), 0)
        body.embed_tokens = QuantizedEmbed.from_embed(embed, tensor)
    for module in (model, body):
        module.config = config
    found: CausalLM = model
    return found


def _method(bits: float) -> Method:
    method = method_config("kashin-joint", int(bits) if bits == int(bits) else bits)
    assert method is not None, "joint codes have all of these widths"
    return method


def _pack_linears(layer: nnx.Module, method: Method, seed: int) -> None:
    parts = [m for m in vars(layer).values() if isinstance(m, nnx.Module)]
    for owner in (layer, *parts):
        for name, child in list(vars(owner).items()):
            if isinstance(child, nnx.Linear):
                shape = (child.in_features, child.out_features)
                tensor = random_tensor(shape, method, seed)
                setattr(owner, name, QuantizedLinear.from_linear(child, tensor))


def _sizes(model: CausalLM) -> dict[str, float]:
    """Megabytes of all arrays, and of those that every new token reads."""
    sizes = {
        "/".join(map(str, path)): sum(x.nbytes for x in jax.tree.leaves(leaf))
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    read = sum(size for path, size in sizes.items() if "embed_positions" not in path)
    return {"megabytes": sum(sizes.values()) / 1e6, "read_megabytes": read / 1e6}


def _resident() -> float:
    """Megabytes of memory that no file backs; not a number where nobody tells."""
    status = Path("/proc/self/status")
    words = status.read_text().split() if status.exists() else []
    known = "RssAnon:" in words
    return (
        int(words[words.index("RssAnon:") + 1]) * 1024 / 1e6 if known else float("nan")
    )


def main(arguments: list[str]) -> int:
    """Answers lines until there are no more."""
    job = Job(**json.loads(arguments[0]))
    jax.block_until_ready(jnp.zeros(1))
    bare = _resident()
    model = random_model(job)
    print(json.dumps({"bare_megabytes": bare, **_sizes(model)}), flush=True)
    for line in sys.stdin:
        ids = jnp.full((int(line), job.prompt), 7, jnp.int32)
        begun = time.perf_counter()
        jax.block_until_ready(generate(model, ids, max_new_tokens=job.tokens))
        answer = {
            "seconds": time.perf_counter() - begun,
            "resident_megabytes": _resident(),
            "instruction_set": report().instruction_set,
        }
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
