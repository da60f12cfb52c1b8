"""What a family of bases does to one layer: quality over seeds, and cost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from experiments.common.timing import median_seconds
from experiments.convergence.sweep import stack_bases
from kashin_jax import GreedyKashin, KroneckerBasis, kashin_decompose
from kashin_jax.bases import cost, key_from_seed, seed_from_key
from kashin_jax.methods.kashin import KashinCode, kashin_code

__all__ = ["Ablation", "SeededBases", "ablate", "cost_fields", "seeded_bases"]

# Never reached: the number of steps is the same for all bases.
_RTOL = 1e-30
_TIMED_STEPS = 5


class Ablation(NamedTuple):
    """One family on one layer; an entry for each seed.

    Attributes:
      residual: Relative to the layer, after the decomposition.
      steps: Greedy steps taken.
      converged: Whether the residual is within the tolerance.
      u_level: `sqrt(N) |u|_inf / |x|_2`.
      v_level: The same for v, in the coordinates of the basis.
      relative_squared_error: Of the layer decoded from its codes.
    """

    residual: Float[Array, " s"]
    steps: Int[Array, " s"]
    converged: Bool[Array, " s"]
    u_level: Float[Array, " s"]
    v_level: Float[Array, " s"]
    relative_squared_error: Float[Array, " s"]


class SeededBases(NamedTuple):
    """Bases stacked over seeds, and a key for the codebook of each."""

    bases: Any
    codebook_keys: Key[Array, " s"]


def seeded_bases(
    family: str, keys: Key[Array, " s"], shape: tuple[int, int]
) -> SeededBases:
    """The bases and codebook keys that `quantize` takes from each of these keys."""
    halves = jax.vmap(jax.random.split)(keys)
    basis_keys = jax.vmap(lambda key: key_from_seed(seed_from_key(key)))(halves[:, 0])
    return SeededBases(stack_bases(family, basis_keys, shape), halves[:, 1])


def ablate(
    kernel: Float[Array, "m n"], seeded: SeededBases, config: GreedyKashin
) -> Ablation:
    """Decomposes and quantizes one layer in every basis of the stack, by one `vmap`.

    The errors are those that `quantize` reports. As in `quantize` the stages are
    compiled one by one: what depends on the basis once for a family and a shape, the
    clustering once for a size of layer, the same for all families with random parts.

    Args:
      kernel: The layer; must be finite.
      seeded: As made by `seeded_bases`.
      config: The paper's method; its `basis` is not read, `seeded` has the bases.
    """
    shape = (kernel.shape[0], kernel.shape[1])

    def of_seed(basis: KroneckerBasis, key: Key[Array, ""]) -> Ablation:
        code = kashin_code(kernel, basis, key, config, shape)
        return Ablation(
            residual=code.residual[0, 0],
            steps=code.num_steps[0, 0],
            converged=code.converged[0, 0],
            u_level=code.max_u[0, 0],
            v_level=code.max_v[0, 0],
            relative_squared_error=_error_of_code(kernel, basis, code),
        )

    return jax.vmap(of_seed)(*seeded)


@jax.jit
def _error_of_code(
    kernel: Float[Array, "m n"], basis: KroneckerBasis, code: KashinCode
) -> Float[Array, ""]:
    pairs = code.scale[0, 0] * code.centroids[code.codes]
    lost = kernel - pairs[..., 0] - basis.synthesis(pairs[..., 1])
    return jnp.sum(jnp.square(lost)) / jnp.sum(jnp.square(kernel))


def cost_fields(
    family: str, kernel: Float[Array, "m n"], seeded: SeededBases, repeats: int
) -> dict[str, float]:
    """Fields of a record: arithmetic, memory and time of one pair of bases.

    `flops_per_step` counts the one analysis and the one synthesis of a greedy step,
    `basis_bytes` the arrays in memory. On disk every basis is a seed of 8 bytes.

    Args:
      family: Of both bases.
      kernel: The layer.
      seeded: Bases of which the first is timed.
      repeats: Timed calls, of which the median counts; compilation does not.
    """
    m, n = kernel.shape
    left, right = cost(family, m), cost(family, n)
    first = jax.tree.map(lambda leaf: leaf[0], seeded.bases)
    seconds = median_seconds(lambda: _fixed_steps(kernel, first), repeats)
    return {
        "flops_per_step": 2 * (left.flops * n + right.flops * m),
        "basis_bytes": left.parameter_bytes + right.parameter_bytes,
        "stored_basis_bytes": 8,
        "ms_per_step": 1e3 * seconds / _TIMED_STEPS,
    }


@jax.jit
def _fixed_steps(kernel: Float[Array, "m n"], basis: KroneckerBasis) -> Any:
    return kashin_decompose(kernel, basis, rtol=_RTOL, max_steps=_TIMED_STEPS)
