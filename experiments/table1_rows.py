"""The rows of Table 1: l1 ratios of a basis, and the rates that they predict."""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from kashin_jax.bases import Basis, make_basis
from kashin_jax.theory import (
    eigenvector_ratios,
    rate_from_constant,
    search_worst_case,
    structured_starts,
    trace_greedy,
)

__all__ = ["STEPS_OF_RATE", "measure_row"]

# At .603 per step 16 steps end at 3e-4, far above the rounding of float32.
STEPS_OF_RATE = 16
_EIGENVECTOR_STARTS = 4


class _Measured(NamedTuple):
    """One value per seed."""

    bound: Float[Array, " seeds"]
    gaussian_rate: Float[Array, " seeds"]
    worst_rate: Float[Array, " seeds"]
    slowest_step: Float[Array, " seeds"]


def measure_row(
    key: Key[Array, ""], family: str, n: int, *, seeds: int, starts: int, steps: int
) -> dict[str, Any]:
    """One basis at one size; numbers that depend on the seed are lists of `seeds`.

    Args:
      key: Of bases and vectors; the vectors are the same for every family.
      family: Which basis.
      n: Its size.
      seeds: Bases drawn.
      starts: Of the search, Gaussian ones and e_i + Q e_j, so many of each; also the
        Gaussian vectors whose rate is measured.
      steps: Of each descent.
    """
    start = time.perf_counter()
    bases_key, draws_key = jax.random.split(key)
    bases = [_drawn(k, family, n) for k in jax.random.split(bases_key, seeds)]
    # One that has no arrays is the same for every key.
    different = bases if jax.tree.leaves(bases) else bases[:1]
    parts = [eigenvector_ratios(basis, n) for basis in different]
    parts *= seeds // len(different)
    eigenvectors = [np.resize(p.vectors, (_EIGENVECTOR_STARTS, n)) for p in parts]
    draws = jax.random.normal(draws_key, (seeds, starts, n), jnp.float32)
    measured = _measure(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *bases),
        draws,
        jnp.asarray(np.stack(eigenvectors), jnp.float32),
        steps=steps,
    )
    bounds = np.asarray(measured.bound, np.float64).tolist()
    return {
        "family": family,
        "n": n,
        "seeds": seeds,
        "starts": starts,
        "steps": steps,
        "eigenvector_minimum": [float(p.ratios.min()) for p in parts],
        "eigenvector_mean": [float(p.ratios.mean()) for p in parts],
        "constant_bound": bounds,
        "gamma": [rate_from_constant(min(bound, 1.0)) for bound in bounds],
        "gaussian_rate": measured.gaussian_rate.tolist(),
        "worst_rate": measured.worst_rate.tolist(),
        "slowest_step": measured.slowest_step.tolist(),
        "seconds": time.perf_counter() - start,
    }


@partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: Key[Array, ""], family: str, n: int) -> Basis:
    return make_basis(family, key, n)


@partial(jax.jit, static_argnames=("steps",))
def _measure(
    bases: Any,
    draws: Float[Array, "seeds s n"],
    eigenvectors: Float[Array, "seeds e n"],
    *,
    steps: int,
) -> _Measured:
    count, n = draws.shape[1:]

    def of_seed(basis: Any, draws: Array, eigenvectors: Array) -> _Measured:
        structured = structured_starts(basis, n=n, count=count)
        starts = jnp.concatenate([draws, structured, eigenvectors])
        worst = search_worst_case(basis, starts, steps=steps)
        trace = jax.vmap(lambda x: trace_greedy(x, basis, steps=STEPS_OF_RATE))
        residuals = trace(jnp.concatenate([worst.x[None], draws])).residuals
        rates = residuals[:, -1] ** jnp.float32(1 / STEPS_OF_RATE)
        slowest = jnp.max(residuals[0, 1:] / residuals[0, :-1])
        return _Measured(worst.ratio, jnp.mean(rates[1:]), rates[0], slowest)

    return jax.vmap(of_seed)(bases, draws, eigenvectors)
