"""The (u, v) plane of a layer: its points, their 16 centroids, and pictures of both."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from experiments.common.figures import Artifact, Setting, layer_basis
from experiments.common.plots import COLOURS, finish_axes, new_figure
from kashin_jax import BasisSpec, GreedyKashin
from kashin_jax.methods.kashin import cluster_factors, decompose_blocks
from kashin_jax.pipeline import path_key

__all__ = [
    "BITS",
    "Clustering",
    "cluster_layer",
    "clusterings_of",
    "draw_clusterings",
    "draw_plane",
    "facts_of",
    "overlap",
    "range_of",
]

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


BINS = 140
_GRID = 240


def draw_plane(axes: Any, clustering: Clustering, limit: float, *, title: str) -> Any:
    """Draws one clustering; returns the image of the density, for a colour bar.

    Args:
      axes: Where.
      clustering: What.
      limit: Of both axes; the few pairs beyond it are not shown.
      title: Above the axes.
    """
    from matplotlib.colors import LogNorm

    edges = np.linspace(-limit, limit, BINS + 1)
    counts, _, _ = np.histogram2d(clustering.u, clustering.v, [edges, edges])
    share = counts.T / len(clustering.u)
    # An image, not a point each: a layer has 10^5 to 10^7 pairs.
    image = axes.imshow(
        np.ma.masked_equal(share, 0), origin="lower", cmap="Blues", aspect="equal",
        extent=(-limit, limit, -limit, limit), norm=LogNorm(3e-6, 3e-3, clip=True),
        interpolation="nearest",
    )  # fmt: skip
    book = clustering.record["centroids"]
    _draw_borders(axes, book, limit)
    axes.plot(book[:, 0], book[:, 1], "o", ms=4, color=COLOURS[0],
              markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    axes.set_xlim(-limit, limit)
    axes.set_ylim(-limit, limit)
    finish_axes(axes, x="u / rms of the layer", y="v / rms of the layer", title=title)
    axes.grid(False)
    return image


def _draw_borders(axes: Any, book: np.ndarray, limit: float) -> None:
    line = np.linspace(-limit, limit, _GRID)
    points = np.stack(np.meshgrid(line, line), axis=-1)
    nearest = np.argmin(
        np.sum((points[:, :, None] - book[None, None]) ** 2, axis=-1), axis=-1
    )
    for code in range(len(book)):
        cell = nearest == code
        # A cell may lie outside, or be all there is.
        if cell.any() and not cell.all():
            axes.contour(
                line, line, cell.astype(float), [0.5], colors="#7F7F7F", linewidths=0.4
            )


def clusterings_of(
    setting: Setting, cases: Sequence[tuple[str, str]], what: str
) -> Artifact:
    """A figure of some layers, each in a family of bases.

    Args:
      setting: The model and the seed.
      cases: Layers and families, a panel each.
      what: They are, for the title.
    """
    clusterings = [
        cluster_layer(setting.kernels, setting.key, layer, family)
        for layer, family in cases
    ]
    title = f"{setting.model_name}: {what} of the pairs (u, v), 16 centroids"
    records = [clustering.record for clustering in clusterings]
    facts = [facts_of(record) for record in records]
    return Artifact(title, records, draw_clusterings(clusterings, title), facts=facts)


def draw_clusterings(clusterings: Sequence[Clustering], title: str) -> Any:
    """A panel per clustering, each on its own scale."""
    rows = -(-len(clusterings) // 2)
    figure = new_figure(6.6, 0.5 + 3.2 * rows)
    grid = figure.subplots(rows, 2, squeeze=False)
    image = None
    for axes, clustering in zip(grid.flat, clusterings, strict=False):
        record = clustering.record
        place = (
            record["layer"].removeprefix("decoder/layers/").replace("self_attn/", "")
        )
        image = draw_plane(
            axes, clustering, range_of([clustering]),
            title=f"{place}, {record['family']}: residual {record['residual']:.0e},\n"
            f"rel. sq. error {record['relative_squared_error']:.4f}, "
            f"overlap {record['overlap']:.2f}",
        )  # fmt: skip
    for axes in grid.flat[len(clusterings) :]:
        axes.axis("off")
    bar = figure.colorbar(image, ax=grid, shrink=0.6, pad=0.02)
    bar.set_label("share of the pairs in a bin", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure
