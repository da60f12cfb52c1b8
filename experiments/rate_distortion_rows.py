"""Rows of the rate-distortion table: what one method loses on all matrices."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments.common.methods import JOINT, RowKind
from experiments.common.results import environment_fields
from experiments.common.tables import Record
from experiments.weight_sources import WeightSource
from kashin_jax import BasisSpec, JointKashin, quantize, stored_bits
from kashin_jax.errors import NonFiniteError
from kashin_jax.methods import Method
from kashin_jax.pipeline import path_key

__all__ = ["rate_row", "won_matrices"]

_RTOL = 1e-6
_MAX_STEPS = 200
# Every record has every field, so that a reader of the file needs no special cases.
_ABSENT = dict.fromkeys((
    "stored_bits_per_weight", "mse", "relative_error", "shannon", "gap_db", "seconds",
    "weights_per_second", "matrices",
))  # fmt: skip
# Rivals that store up to this much less are compared at our bits, as if theirs bought
# as much as Shannon allows.
_FEWER_BITS = 0.1


def rate_row(
    source: WeightSource,
    name: str,
    method: RowKind,
    bits: float,
    *,
    seed: int,
    effort: str | None,
) -> dict[str, Any]:
    """One row; a method that does not exist here gives dashes and the reason.

    Args:
      source: What is quantized.
      name: Of the method.
      method: How its configuration is made.
      bits: Code width.
      seed: Of the method.
      effort: Of a joint coder.
    """
    row = {
        "method": name, "bits": bits, **_ABSENT, "effort": effort,
        "source": source.name, "source_sha256": source.sha256, "weights": source.size,
        "seed": seed,
        **environment_fields(),
    }  # fmt: skip
    try:
        quantizer = method.make(bits, BasisSpec.parse("hadamard"), _RTOL, _MAX_STEPS)
        if isinstance(quantizer, JointKashin) and effort is not None:
            # Weight error is what this table is about.
            quantizer = dataclasses.replace(quantizer, effort=effort, unshrink=0.0)
    except ValueError as reason:
        return {**row, "note": str(reason)}
    try:
        measured = _measured(source, quantizer, jax.random.key(seed))
    except NonFiniteError as reason:
        # The source is finite, so it is this method whose scales overflow.
        return {**row, "note": str(reason)}
    return {**row, **measured, "note": method.note}


def _measured(
    source: WeightSource, quantizer: Method, key: Key[Array, ""]
) -> dict[str, Any]:
    stored, lost, energy, seconds = 0, 0.0, 0.0, 0.0
    each: dict[str, float] = {}
    for name, matrix in tqdm(
        source.matrices.items(), unit="matrix", disable=None, leave=False
    ):
        start = time.perf_counter()
        tensor, report = jax.block_until_ready(
            quantize(matrix, quantizer, path_key(key, name), path=name)
        )
        seconds += time.perf_counter() - start
        stored += stored_bits(tensor)
        own = _energy(matrix)
        energy += own
        each[name] = float(report.relative_squared_error)
        lost += own * each[name]
    rate, relative = stored / source.size, lost / energy
    shannon = 4.0**-rate
    return {
        "stored_bits_per_weight": rate,
        "mse": lost / source.size,
        "relative_error": relative,
        "shannon": shannon,
        "gap_db": 10 * math.log10(relative / shannon) if relative else None,
        "seconds": seconds,
        "weights_per_second": source.size / seconds,
        "matrices": each if len(each) > 1 else None,
    }


def _energy(matrix: Float[np.ndarray, "m n"]) -> float:
    return float(np.sum(np.square(matrix, dtype=np.float64)))


def won_matrices(records: Sequence[Record]) -> Iterator[str]:
    """Says on how many matrices the joint coder loses less than each rival.

    Rivals are the rows of the same width. Where one stores fewer bits, by 0.1 at most,
    its error is multiplied by 4^-(difference), which more bits could not better. Rows
    of a single matrix speak for themselves.
    """
    ours = [r for r in records if r["method"] == JOINT and r["matrices"]]
    for our in ours:
        counts = []
        for rival in records:
            if rival["method"] == JOINT or not rival["matrices"]:
                continue
            bits = rival["stored_bits_per_weight"]
            fewer = max(0.0, our["stored_bits_per_weight"] - bits)
            if rival["bits"] != our["bits"] or fewer > _FEWER_BITS:
                continue
            won = sum(
                error < 4.0**-fewer * rival["matrices"][name]
                for name, error in our["matrices"].items()
            )
            at = f"{bits:.2f} bits" + (", error adjusted to ours" if fewer else "")
            counts.append(f"{rival['method']} ({at}) on {won}")
        if counts:
            yield (
                f"{JOINT}, effort {our['effort']}, at "
                f"{our['stored_bits_per_weight']:.2f} stored bits loses less than "
                + ", ".join(counts)
                + f" of {len(our['matrices'])} matrices."
            )
