"""The (u, v) plane of a layer: its points, their 16 centroids, how well they fit."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from experiments.common.setting import layer_basis
from kashin_jax import BasisSpec, GreedyKashin
from kashin_jax.methods.kashin import cluster_factors, decompose_blocks
from kashin_jax.pipeline import path_key

__all__ = ["BITS", "Clustering", "cluster_layer", "facts_of", "overlap", "range_of"]

BITS = 4


class Clustering(NamedTuple):
    """Points of one layer in one basis, and a record of their numbers.

    Attributes:
      u: First coordinates, for a layer of unit root-mean-square.
      v: Second coordinates.
      record: Everything else.
    """

    u: Float[np.ndarray, " p"]
    v: Float[np.ndarray, " p"]
    record: dict[str, Any]


def cluster_layer(
    kernels: Mapping[str, Float[Array, "_ _"]],
    key: Key[Array, ""],
    layer: str,
    family: str,
    config: GreedyKashin | None = None,
) -> Clustering:
    """Decomposes a layer and clusters its pairs, as the library does.

    Args:
      kernels: Layers by path.
      key: Root of the keys.
      layer: Which of them.
      family: Of both bases.
      config: How; by default 16 centroids and the library's other defaults.
    """
    config = config or GreedyKashin(bits=BITS, basis=BasisSpec(family, family))
    kernel = kernels[layer]
    basis = layer_basis(key, layer, family, kernel)
    shape = kernel.shape[0], kernel.shape[1]
    found = decompose_blocks(kernel, basis, config, shape)
    fit_key = jax.random.fold_in(path_key(key, layer), config.bits)
    codes, centroids = cluster_factors(found.u, found.v, fit_key, config)
    chosen = centroids[codes.astype(jnp.int32)]
    unit = kernel / found.scale[0, 0]
    error = unit - chosen[..., 0] - basis.synthesis(chosen[..., 1])
    u, v = (np.asarray(factor).reshape(-1) for factor in (found.u, found.v))
    flat_codes, book = np.asarray(codes).reshape(-1), np.asarray(centroids)
    counts = np.bincount(flat_codes, minlength=len(book))
    record = {
        "layer": layer, "shape": list(kernel.shape), "family": family,
        "bits": config.bits, "steps": int(found.num_steps[0, 0]),
        "residual": float(found.residual[0, 0]),
        "converged": bool(found.converged[0, 0]),
        "max_u": float(np.abs(u).max()), "max_v": float(np.abs(v).max()),
        "relative_squared_error": float(jnp.mean(jnp.square(error))),
        "overlap": overlap(u, v, book, flat_codes),
        "centroids": book, "shares": counts / counts.sum(),
    }  # fmt: skip
    return Clustering(u, v, record)


def overlap(
    u: Float[np.ndarray, " p"],
    v: Float[np.ndarray, " p"],
    centroids: Float[np.ndarray, "k 2"],
    codes: np.ndarray,
) -> float:
    """Root-mean-square distance to the own centroid, over half that to the next one.

    Half the distance from a centroid to the nearest other is the radius its cluster
    may have without touching another: clearly below 1 the clusters are islands.
    """
    own = np.stack([u, v], axis=1) - centroids[codes]
    between = np.linalg.norm(centroids[:, None] - centroids[None], axis=-1)
    np.fill_diagonal(between, np.inf)
    radius = between.min(axis=1)[codes] / 2
    spread, room = np.mean(np.sum(own**2, axis=1)), np.mean(radius**2)
    return float(np.sqrt(spread / room))


def range_of(clusterings: Sequence[Clustering]) -> float:
    """Limit of both axes: of every clustering and factor 99.9 % of the entries fit."""
    factors = [np.abs(factor) for c in clusterings for factor in (c.u, c.v)]
    return float(1.05 * max(np.percentile(factor, 99.9) for factor in factors))


def facts_of(record: Mapping[str, Any]) -> str:
    """One line of the numbers of a clustering."""
    return (
        f"{record['layer']}, {record['family']}: {record['steps']} steps to "
        f"{record['residual']:.1e}, relative squared error "
        f"{record['relative_squared_error']:.4f}, overlap {record['overlap']:.2f}."
    )
