"""The 2024 paper's code: decompose greedily, then cluster the pairs (u, v)."""

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from kashin_jax.bases import BasisSpec, KroneckerBasis, key_from_seed, make_pair
from kashin_jax.codebooks import assign_pairs, fit_pairs
from kashin_jax.decomposition import KashinDecomposition, kashin_decompose
from kashin_jax.methods.base import Encoded, Method, register, split_key
from kashin_jax.tensors import KashinTensor
from kashin_jax.tensors.blocks import from_blocks, resolve_block_shape, to_blocks
from kashin_jax.tensors.kashin import KashinLayout, pack_rows

__all__ = [
    "GreedyKashin",
    "KashinCode",
    "cluster_factors",
    "decompose_blocks",
    "kashin_code",
]


@register("kashin")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GreedyKashin(Method):
    """The 2024 paper's method, with the settings of its OPT experiments as defaults.

    Attributes:
      bits: Code width `b` in 1..8; the codebook holds exactly `2**b` pairs.
      basis: Families of Q1 and Q2. The paper used QR of a Gaussian, here `haar`; the
        default is faster and stores as few bits.
      block_shape: Blocks decomposed independently with one scale each; `None`, as in
        the paper, is the whole matrix.
      rtol: Stop the decomposition at this relative residual.
      max_steps: Greedy steps allowed.
      num_restarts: k-means++ starts; the codebook of least inertia wins. Many starts
        on few points: on opt-wiki-18m at 4 bits the relative squared error is .0192
        with 4 starts on 16384 points, .0179 with 50 on 8192, .0176 with 50 on 4096.
      sample: Points the starts are compared on.
      codebook_rtol: Dimensionless tolerance of Lloyd's algorithm.
      codebook_steps: Lloyd steps on the sample.
      polish_steps: Lloyd steps on all points afterwards.
    """

    bits: int = 4
    basis: BasisSpec = BasisSpec("hadamard", "hadamard")
    block_shape: tuple[int, int] | None = None
    rtol: float = 1e-6
    max_steps: int = 200
    num_restarts: int = 50
    sample: int = 4096
    codebook_rtol: float = 1e-3
    codebook_steps: int = 100
    polish_steps: int = 20

    has_half_scales: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("max_steps", "num_restarts", "sample", "codebook_steps")
        for name in (*counts, "polish_steps"):
            if not getattr(self, name) >= 1:
                raise ValueError(
                    f"`{name}` must be at least 1. Got {getattr(self, name)}."
                )
        for name in ("rtol", "codebook_rtol"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"`{name}` must be positive. Got {getattr(self, name)}."
                )

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if a matrix does not divide into the blocks."""
        resolve_block_shape(shape, self.block_shape)

    def encode(self, weight: Float[Array, "m n"], key: Key[Array, ""]) -> Encoded:
        """Encodes a matrix; the key seeds bases and codebook."""
        block_shape = resolve_block_shape(weight.shape, self.block_shape)
        seed, codebook_key = split_key(key)
        basis = make_pair(self.basis, key_from_seed(seed), block_shape)
        code = kashin_code(weight, basis, codebook_key, self, block_shape)
        layout = KashinLayout(
            shape=(weight.shape[0], weight.shape[1]),
            block_shape=block_shape,
            bits=self.bits,
            basis=self.basis,
            dtype=weight.dtype.name,
        )
        packed, _ = pack_rows(code.codes, layout)
        tensor = KashinTensor(packed, code.centroids, code.scale, seed, layout)
        verdict = code._asdict()
        del verdict["codes"], verdict["centroids"]
        return Encoded(tensor, verdict)


class KashinCode(NamedTuple):
    """Codes, centroids and scales that the coder found, before they are packed.

    Attributes:
      codes: Index of a pair for every weight.
      centroids: The pairs (u, v), for blocks of unit root-mean-square.
      scale: Root-mean-square of every block, in the units of the weight.
      residual: Relative residual of every block's decomposition.
      num_steps: Greedy steps of every block.
      converged: Whether every block's residual is within `rtol`.
      max_u: Largest entry of u: the l-infinity level, sqrt(N) |u|_inf / |x|_2.
      max_v: The same for v.
    """

    codes: UInt8[Array, "m n"]
    centroids: Float[Array, "k 2"]
    scale: Float[Array, "r c"]
    residual: Float[Array, "r c"]
    num_steps: Int[Array, "r c"]
    converged: Bool[Array, "r c"]
    max_u: Float[Array, "r c"]
    max_v: Float[Array, "r c"]


def kashin_code(
    weight: Float[Array, "m n"],
    basis: KroneckerBasis,
    key: Key[Array, ""],
    config: GreedyKashin,
    block_shape: tuple[int, int],
) -> KashinCode:
    """Decomposes every block and clusters all pairs of the matrix together.

    Compiled in stages, so that the loop's buffers are gone before the codebook's are
    made, and the factors before they are clustered, which needs a copy of them: 6.7
    times the float32 size of the matrix at the most, 8.3 as one program.

    Args:
      weight: Matrix of any scale; must be finite.
      basis: The pair of bases of one block, shared by all blocks.
      key: Seeds the codebook; the decomposition is deterministic.
      config: Static choices.
      block_shape: Resolved by `resolve_block_shape`.

    Source: Merkulov et al. (2024), arXiv 2404.09737; one index of b bits addresses a
    pair, so 4 bits are 16 pairs.
    """
    u, v, *verdict = decompose_blocks(weight, basis, config, block_shape)
    scale, residual, num_steps, converged = verdict
    grid = u.shape
    max_u, max_v, flat_u, flat_v = _flattened(u, v)
    del u, v
    codes, centroids = _cluster_points(flat_u, flat_v, key, config)
    return KashinCode(
        codes=_in_matrix(codes, grid),
        centroids=centroids,
        scale=scale,
        residual=residual,
        num_steps=num_steps,
        converged=converged,
        max_u=max_u,
        max_v=max_v,
    )


@jax.jit
def _flattened(
    u: Float[Array, "r c bm bn"], v: Float[Array, "r c bm bn"]
) -> tuple[
    Float[Array, "r c"], Float[Array, "r c"], Float[Array, " p"], Float[Array, " p"]
]:
    """Levels of every block, and the factors flat.

    So that matrices of equal size share the compiled fit.
    """
    max_u, max_v = (jnp.max(jnp.abs(factor), axis=(2, 3)) for factor in (u, v))
    return max_u, max_v, u.reshape(-1), v.reshape(-1)


@partial(jax.jit, static_argnames="grid")
def _in_matrix(
    codes: UInt8[Array, " p"], grid: tuple[int, int, int, int]
) -> UInt8[Array, "m n"]:
    return from_blocks(codes.reshape(grid))


def decompose_blocks(
    weight: Float[Array, "m n"],
    basis: KroneckerBasis,
    config: GreedyKashin,
    block_shape: tuple[int, int],
) -> KashinDecomposition:
    """`kashin_decompose` of every block; leaves gain the axes of the grid in front.

    Compiled once for all tolerances, numbers of steps and widths.
    """
    return _decompose_blocks(weight, basis, config.rtol, config.max_steps, block_shape)


@partial(jax.jit, static_argnames="block_shape")
def _decompose_blocks(
    weight: Float[Array, "m n"],
    basis: KroneckerBasis,
    rtol: float | Float[Array, ""],
    max_steps: int | Int[Array, ""],
    block_shape: tuple[int, int],
) -> KashinDecomposition:
    def decompose(block: Float[Array, "bm bn"]) -> KashinDecomposition:
        return kashin_decompose(block, basis, rtol=rtol, max_steps=max_steps)

    if block_shape == weight.shape:
        # Without `vmap`: a batched loop keeps a second copy of every factor.
        single = decompose(weight)
        return jax.tree.map(lambda leaf: leaf[None, None], single)
    return jax.vmap(jax.vmap(decompose))(to_blocks(weight, block_shape))


def cluster_factors(
    u: Float[Array, "r c bm bn"],
    v: Float[Array, "r c bm bn"],
    key: Key[Array, ""],
    config: GreedyKashin,
) -> tuple[UInt8[Array, "m n"], Float[Array, "k 2"]]:
    """Codes of all weights in the order of the matrix, and the codebook."""
    codes, centroids = _cluster_points(u.reshape(-1), v.reshape(-1), key, config)
    return _in_matrix(codes, u.shape), centroids


def _cluster_points(
    u: Float[Array, " p"],
    v: Float[Array, " p"],
    key: Key[Array, ""],
    config: GreedyKashin,
) -> tuple[UInt8[Array, " p"], Float[Array, "k 2"]]:
    book = fit_pairs(
        key,
        u,
        v,
        2**config.bits,
        num_restarts=config.num_restarts,
        sample=config.sample,
        rtol=config.codebook_rtol,
        max_steps=config.codebook_steps,
        polish_steps=config.polish_steps,
    )
    codes, _ = assign_pairs(u, v, book.centroids)
    return codes, book.centroids
