"""What learned angles gain over random ones on layers of a checkpoint.

    python -m experiments.learn_butterfly
    python -m experiments.learn_butterfly --families=givens --losses=error --bits=3
    python -m experiments.learn_butterfly --layers=decoder/layers/0/fc1 --steps=300

A pair of bases, one per side of the layer, starts at random angles. Adam then moves the
angles to minimise a loss on that layer: `l1`, minus the l1 ratio of the coefficients,
which Kashin's algorithm wants large; or `error`, the squared error of the coefficients
rounded to 2^bits levels for the whole layer. It prints one row per layer, family and
loss, adds to learn_butterfly.jsonl in `--out`, and writes learn_butterfly.md.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float
from tqdm import tqdm

from experiments.common.flags import (
    GIVEN,
    POSITIVE,
    POSITIVE_COUNT,
    check_flags,
    command_line,
    flag,
    run_program,
    short_model_name,
)
from experiments.common.results import environment_fields, prepare_output, write_results
from experiments.common.tables import Column, aligned_table, fixed, increase
from experiments.common.text import ASSETS
from kashin_jax import BasisSpec, KroneckerBasis, make_pair
from kashin_jax.bases.learn import (
    LearnedBasis,
    Loss,
    angles_of,
    l1_loss,
    l1_ratio,
    learn_angles,
    scalar_error,
    with_angles,
)
from kashin_jax.codebooks.gaussian import lloyd_max_levels
from kashin_jax.codebooks.line import fit_scalars
from kashin_jax.errors import DataError, UsageError
from kashin_jax.models.loading import load_language_model
from kashin_jax.pipeline import path_key, selected_kernels

__all__ = ["COLUMNS", "LearnButterflyConfig", "main", "run"]

FAMILIES = ("butterfly", "butterfly3", "givens")
LOSSES = ("l1", "error")
ANGLE_BITS = 16
DB_PER_BIT = 20 * math.log10(2)


def _some(names: tuple[str, ...]) -> Any:
    return (lambda x: x and set(x) <= set(names), f"a list of: {', '.join(names)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnButterflyConfig:
    """A table; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    model: str = flag(
        str(ASSETS / "opt-wiki-18m"), "Directory or hub id of a language model.", GIVEN
    )
    layers: tuple[str, ...] = flag(
        (
            "decoder/layers/0/self_attn/q_proj",
            "decoder/layers/0/self_attn/v_proj",
            "decoder/layers/7/self_attn/out_proj",
        ),
        "List of layers.",
        GIVEN,
    )
    families: tuple[str, ...] = flag(
        ("butterfly", "butterfly3"), f"List of: {', '.join(FAMILIES)}.", _some(FAMILIES)
    )
    losses: tuple[str, ...] = flag(LOSSES, "List of: l1, error.", _some(LOSSES))
    bits: int = flag(
        2, "Code width of the error, 1 to 8.", (lambda x: 1 <= x <= 8, "in [1, 8]")
    )
    steps: int = flag(100, "Steps of Adam.", POSITIVE_COUNT)
    learning_rate: float = flag(
        0.05, "Radians of the first step; falls to 0 as a cosine.", POSITIVE
    )
    seed: int = flag(
        0,
        "Seed of the random angles.",
        (lambda x: 0 <= x < 2**31, "in [0, 2147483647]"),
    )
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)


def run(config: LearnButterflyConfig) -> int:
    """Makes, prints and writes the table; returns the exit code.

    Raises:
      UsageError: If it is a classifier, a layer is not in the model, or the output
        cannot be written.
      CheckpointError: If the model is missing or damaged.
      DataError: If a layer is zero.
    """
    out = prepare_output(config.out)
    model = load_language_model(config.model).model
    kernels = _chosen(config, selected_kernels(model))
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    # One object for all rows: another one would compile anew.
    optimizer = optax.adam(schedule)
    cases = list(itertools.product(kernels, config.families, config.losses))
    with jax.default_matmul_precision("highest"):
        records = [
            _row(config, path, kernels[path], family, loss, optimizer)
            for path, family, loss in tqdm(cases, unit="row", disable=None)
        ]
    _present(config, records, out)
    return 0


def _chosen(
    config: LearnButterflyConfig, kernels: Mapping[str, Float[Array, "_ _"]]
) -> dict[str, Float[Array, "_ _"]]:
    chosen = {}
    for path in config.layers:
        if path not in kernels:
            raise UsageError(
                f"`--layers`: {path} is no layer of {short_model_name(config.model)}. "
                f"There are {', '.join(list(kernels)[:6])}, ..."
            )
        if not jnp.any(kernels[path]):
            raise DataError(f"`{path}` is all zero: no basis can matter. Leave it out.")
        chosen[path] = kernels[path]
    return chosen


def _row(
    config: LearnButterflyConfig,
    path: str,
    kernel: Float[Array, "m n"],
    family: str,
    loss: str,
    optimizer: optax.GradientTransformation,
) -> dict[str, Any]:
    key, shape = path_key(jax.random.key(config.seed), path), kernel.shape
    pair = make_pair(BasisSpec(family, family), key, (shape[0], shape[1]))
    start = time.perf_counter()
    learned: LearnedBasis = jax.block_until_ready(
        learn_angles(pair, kernel, _loss(config, loss), optimizer, config.steps)
    )
    seconds = time.perf_counter() - start
    stored = _as_stored(learned.basis)
    angles = sum(leaf.size for leaf in jax.tree.leaves(angles_of(pair)))
    before, after = (_error(basis, kernel, config.bits) for basis in (pair, stored))
    gain, overhead = 10 * math.log10(before / after), ANGLE_BITS * angles / kernel.size
    return {
        "model": short_model_name(config.model),
        "layer": path, "family": family, "loss": loss, "bits": config.bits,
        "steps": config.steps, "learning_rate": config.learning_rate,
        "seed": config.seed, "angles": angles, "weights": kernel.size,
        "l1_random": float(l1_ratio(pair, kernel)),
        "l1_learned": float(l1_ratio(stored, kernel)),
        "error_unrotated": _error(None, kernel, config.bits),
        "error_random": before, "error_learned": after,
        "gain_db": gain, "angle_bits_per_weight": overhead,
        "net_gain_db": gain - DB_PER_BIT * overhead, "seconds": seconds,
        **environment_fields(),
    }  # fmt: skip


def _loss(config: LearnButterflyConfig, name: str) -> Loss:
    if name == "l1":
        return l1_loss
    return Partial(scalar_error, jnp.asarray(lloyd_max_levels(2**config.bits)))


def _as_stored(pair: KroneckerBasis) -> KroneckerBasis:
    """The pair with its angles, brought to one turn, as float16 keeps them."""

    def rounded(angles: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        turn = jnp.arctan2(jnp.sin(angles), jnp.cos(angles))
        return turn.astype(jnp.float16).astype(angles.dtype)

    return with_angles(pair, jax.tree.map(rounded, angles_of(pair)))


def _error(
    pair: KroneckerBasis | None, kernel: Float[Array, "m n"], bits: int
) -> float:
    """Relative squared error of the best scalar code found, one for the whole layer."""
    y = (kernel if pair is None else pair.analysis(kernel)).reshape(-1)
    unit = y / jnp.sqrt(jnp.mean(jnp.square(y)))
    fit = fit_scalars(
        jax.random.key(0), unit, 2**bits, num_restarts=1, rtol=1e-4, max_steps=300
    )
    return float(fit.inertia)


COLUMNS = (
    Column("layer", "layer"),
    Column("family", "family"),
    Column("loss", "loss"),
    Column("l1_random", "l1 ratio, random", fixed(4)),
    Column("l1_learned", "learned", fixed(4)),
    Column("error_unrotated", "rel. sq. error, unrotated", fixed(5)),
    Column("error_random", "random", fixed(5)),
    Column("error_learned", "learned", fixed(5)),
    Column("gain_db", "gain, dB", increase),
    Column("angle_bits_per_weight", "angles, bits/weight", fixed(3)),
    Column("net_gain_db", "net, dB", increase),
    Column("seconds", "seconds", fixed(1)),
)


def _present(
    config: LearnButterflyConfig, records: list[dict[str, Any]], out: Path
) -> None:
    first, name = records[0], short_model_name(config.model)
    facts = [
        f"Layers of {name}; {config.steps} steps of Adam from {config.learning_rate} "
        f"radians; seed {config.seed}.",
        "l1 ratio: max(|X|_1, |Q^T X|_1) / (sqrt(N) |X|_2); .798 for Gaussian entries.",
        f"Errors of {config.bits}-bit Lloyd-Max codes of the coefficients, one "
        "codebook per layer, fitted again after learning.",
        f"Learned angles are rounded to float16 and counted at {ANGLE_BITS} bits; "
        f"random ones follow from a seed. Net: the gain less {DB_PER_BIT:.2f} dB for "
        "each bit.",
        f"{first['device']}, jax {first['jax_version']}, kashin_jax "
        f"{first['kashin_jax_version']}. Seconds with compilation.",
    ]
    print("\n".join(facts) + "\n\n" + aligned_table(records, COLUMNS))
    written = write_results(
        out, "learn_butterfly", records, COLUMNS,
        title=f"{name}: learned against random angles", facts=facts,
        command=command_line("learn_butterfly", config, always=("bits",)),
    )  # fmt: skip
    print(f"\nWritten: {written.jsonl}, {written.markdown}")


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("learn_butterfly", __doc__, LearnButterflyConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
