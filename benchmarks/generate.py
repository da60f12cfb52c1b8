"""Tokens per second of OPT models, dense and packed, with the CPU kernel and without.

    python -m benchmarks.generate
    python -m benchmarks.generate --models=opt-1.3b --bits=4 --batch=1

The embedded OPT and random weights of OPT-1.3B's shape continue a prompt; programs take
turns (`benchmarks.alternating`). Weights are random, since times do not depend on them;
embeddings and output heads stay dense, in the type of the activations. Memory is the
bytes of a model's arrays.

Prints a table and adds records to bench_generate.jsonl in `--out`.
"""

import dataclasses
import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.alternating import time_in_turn
from benchmarks.blocks import random_tensor
from benchmarks.methods import method_config
from experiments.common.flags import (
    check_flags,
    chosen_names,
    flag,
    parse_numbers,
    parse_widths,
    run_program,
)
from experiments.common.results import environment_fields, merge_records, prepare_output
from experiments.common.tables import Column, aligned_table, fixed
from kashin_jax.layers import QuantizedLinear
from kashin_jax.models.generation import generate
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM
from kashin_jax.tensors import KashinTensor, register_kernel
from kashin_jax.tensors.kernels import kashin_product, report

__all__ = ["main"]

ARTIFACT = "bench_generate"
MODELS = {
    "opt-wiki-18m": OPTConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=8, ffn_dim=1536,
        num_attention_heads=6, max_position_embeddings=1024,
    ),
    "opt-1.3b": OPTConfig(
        vocab_size=50272, hidden_size=2048, num_hidden_layers=24, ffn_dim=8192,
        num_attention_heads=32, max_position_embeddings=2048,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ByXla(KashinTensor):
    """A packed matrix that XLA multiplies by, whatever kernels there are."""


register_kernel(ByXla, kashin_product, platform="cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which models generate, and how often."""

    models: tuple[str, ...] = flag(("all",), f"all, or some of {', '.join(MODELS)}.")
    bits: tuple[str, ...] = flag(("2", "3", "4", "5"), "Code widths.")
    batch: tuple[str, ...] = flag(("1", "8"), "Prompts that are continued at a time.")
    xla: bool = flag(True, "Whether packed models run without the kernel, too.")
    prompt: int = flag(16, "Tokens of a prompt.", (lambda x: x >= 1, "at least 1"))
    tokens: int = flag(64, "New tokens.", (lambda x: x >= 1, "at least 1"))
    rounds: int = flag(3, "Rounds of all.", (lambda x: x >= 1, "at least 1"))
    out: str = flag("runs", "Directory of the results.", (bool, "given"))

    def __post_init__(self) -> None:
        check_flags(self)


def run(config: GenerateConfig) -> int:
    """Times every model in turn with the others; returns the exit code."""
    out = prepare_output(config.out)
    widths = parse_widths("bits", config.bits, 1, 8)
    found = []
    for name in chosen_names("models", config.models, MODELS):
        models, memory = _models(MODELS[name], widths, config.xla)
        for batch in parse_numbers("batch", config.batch, 1, 2**10):
            ids = jnp.ones((batch, config.prompt), jnp.int32) * 7
            programs: dict[str, Callable[[], Any]] = {
                label: partial(generate, model, ids, max_new_tokens=config.tokens)
                for label, model in models.items()
            }
            times, load = time_in_turn(programs, config.rounds, 0.0)
            dense = times["float32"]
            for label, own in times.items():
                record = {"model": name, "weights": label, "batch": batch}
                record |= {
                    "tokens_per_second": batch * config.tokens / own.best,
                    "median_tokens_per_second": batch * config.tokens / own.median,
                    "times_float32": dense.best / own.best,
                    "median_times_float32": dense.median / own.median,
                    "megabytes": memory[label],
                    "load": load,
                    "instruction_set": report().instruction_set,
                }
                found.append(record | environment_fields())
            merge_records(out, ARTIFACT, found)
        del models
        gc.collect()
    print(aligned_table(found, COLUMNS))
    return 0


def _models(
    config: OPTConfig, widths: list[float], with_xla: bool
) -> tuple[dict[str, OPTForCausalLM], dict[str, float]]:
    """Models by what their weights are, and the megabytes that each takes."""
    make = partial(OPTForCausalLM, config, rngs=nnx.Rngs(0))
    makers: dict[str, Callable[[], OPTForCausalLM]] = {
        "float32": make,
        "bfloat16": partial(make, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
    }
    for bits in widths:
        makers[f"{bits:g} bits by kernel"] = partial(_packed, config, bits, False)
        if with_xla:
            makers[f"{bits:g} bits by XLA"] = partial(_packed, config, bits, True)
    models = {label: maker() for label, maker in makers.items()}
    return models, {label: _megabytes(model) for label, model in models.items()}


def _megabytes(model: OPTForCausalLM) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))) / 1e6


def _packed(config: OPTConfig, bits: float, by_xla: bool) -> OPTForCausalLM:
    """Random codes in place of every matrix but embeddings and head."""
    small = dataclasses.replace(config, num_hidden_layers=1)
    model = OPTForCausalLM(small, rngs=nnx.Rngs(0))
    method = method_config("kashin-joint", int(bits) if bits == int(bits) else bits)
    assert method is not None, "joint codes have all widths"
    first = model.decoder.layers[0]
    layers = []
    for number in range(config.num_hidden_layers):
        layer = nnx.merge(*nnx.split(first))
        for owner in (layer, layer.self_attn):
            for name, child in list(vars(owner).items()):
                if not isinstance(child, nnx.Linear):
                    continue
                shape = (child.in_features, child.out_features)
                tensor = random_tensor(shape, method, number)
                if by_xla:
                    leaves = {**tensor.leaves(), "layout": tensor.layout}
                    tensor = ByXla(**leaves)
                setattr(owner, name, QuantizedLinear.from_linear(child, tensor))
        layers.append(layer)
    model.decoder.layers = nnx.List(layers)
    model.config = config
    return model


COLUMNS = (
    Column("model", "model"),
    Column("weights", "weights"),
    Column("batch", "batch"),
    Column("tokens_per_second", "tokens/s", fixed(1)),
    Column("times_float32", "times float32", fixed(2)),
    Column("median_times_float32", "of medians", fixed(2)),
    Column("megabytes", "MB of arrays", fixed(0)),
)


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("benchmarks.generate", __doc__, GenerateConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
