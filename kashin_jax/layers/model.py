"""Whole models: which linears are quantized, and the model with them replaced."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from kashin_jax.layers.linear import KashinLinear
from kashin_jax.quantized import (
    DEFAULT_CONFIG,
    QuantizationReport,
    Quantized,
    QuantizerConfig,
    quantize,
)

__all__ = [
    "QuantizedModel",
    "Select",
    "default_select",
    "quantize_model",
    "replace_kernels",
    "selected_kernels",
]

# What language models and classifiers call their heads.
_HEADS = frozenset({"lm_head", "classifier", "pre_classifier"})

Model = TypeVar("Model", bound=nnx.Module)
Select = Callable[[str], bool]
QuantizeLayer = Callable[[str, Array], tuple[Quantized, QuantizationReport]]


class QuantizedModel(NamedTuple):
    """A model with packed layers, and what each of them lost.

    Attributes:
      model: Shares every other parameter with the model it was made from.
      reports: By path of the layer, such as `decoder/layers/0/fc1`.
    """

    model: Any
    reports: dict[str, QuantizationReport]


def default_select(path: str) -> bool:
    """Every linear but those of the output head, as in the published tables."""
    return not _HEADS & set(path.split("/"))


def quantize_model(
    model: Model,
    config: QuantizerConfig = DEFAULT_CONFIG,
    key: Key[Array, ""] | None = None,
    *,
    select: Select = default_select,
    quantize_layer: QuantizeLayer | None = None,
) -> QuantizedModel:
    """Replaces the selected `nnx.Linear` layers of any NNX model by `KashinLinear`.

    Embeddings, norms and everything that is not exactly an `nnx.Linear` stay as they
    are. Each layer has a key folded from its path, so adding a layer leaves the codes
    of the others unchanged; a layer that occurs twice is quantized once and stays
    shared.

    Args:
      model: Not changed.
      config: The method and its static choices, the same for all layers.
      key: Root key; `jax.random.key(0)` when None.
      select: Called with the path of every linear; true quantizes.
      quantize_layer: Called as `(path, kernel)` in place of `quantize`, by callers that
        keep finished layers; None quantizes with `config` and the layer's key.

    Returns:
      The new model and a report per layer.

    Raises:
      ValueError: If nothing is selected, or a selected kernel is not a matrix.
      NonFiniteError: If a selected kernel holds NaN or infinity; names its path.
    """
    kernels = selected_kernels(model, select)
    root = jax.random.key(0) if key is None else key

    def default_layer(path: str, kernel: Array) -> tuple[Any, QuantizationReport]:
        return quantize(kernel, config, path_key(root, path), path=path)

    run = default_layer if quantize_layer is None else quantize_layer
    done = {
        path: run(path, kernel)
        for path, kernel in tqdm(
            kernels.items(), desc="layers", unit="layer", disable=None, leave=False
        )
    }

    def swap(parts: tuple[Any, ...], node: Any) -> Any:
        path = _join(parts)
        if path not in done or type(node) is not nnx.Linear:
            return node
        return KashinLinear(
            done[path][0], node.bias, dtype=node.dtype, precision=node.precision
        )

    quantized = nnx.recursive_map(swap, model)
    return QuantizedModel(
        quantized, {path: report for path, (_, report) in done.items()}
    )


def path_key(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """The key of one layer: a function of the root key and its path alone."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def selected_kernels(
    model: nnx.Module, select: Select = default_select
) -> dict[str, Float[Array, "m n"]]:
    """Kernels of the selected `nnx.Linear` layers by path, in a fixed order.

    Raises:
      ValueError: If nothing is selected, or a selected kernel is not a matrix.
    """
    linears = {
        _join(parts): node
        for parts, node in nnx.iter_graph(model)
        if type(node) is nnx.Linear
    }
    kernels = {
        path: linears[path].kernel.get_value()
        for path in sorted(linears, key=_natural)
        if select(path)
    }
    if not kernels:
        raise ValueError(
            f"No layer is selected: the model has {len(linears)} nnx.Linear layers and "
            "`select` accepts none of them."
        )
    for path, kernel in kernels.items():
        if kernel.ndim != 2:
            raise ValueError(
                f"`{path}/kernel` has shape {kernel.shape}, as under nnx.vmap or "
                "nnx.scan; only matrices can be quantized. Let `select` leave it out."
            )
    return kernels


def replace_kernels(model: Model, kernels: Mapping[str, Array]) -> Model:
    """A copy of the model with other dense kernels; the rest is shared.

    Raises:
      ValueError: If a path names no kernel of the model, or one of another shape.
    """
    graphdef, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    paths = {_join(parts[:-1]): parts for parts in flat if parts[-1] == "kernel"}
    for path, kernel in kernels.items():
        if path not in paths:
            raise ValueError(
                f"`{path}` is no layer with a kernel. `selected_kernels` lists paths "
                "of this model's linears."
            )
        variable = flat[paths[path]]
        if kernel.shape != variable.get_value().shape:
            raise ValueError(
                f"`{path}/kernel` has shape {variable.get_value().shape}; the new one "
                f"has {kernel.shape}. Give kernels as [in, out]."
            )
        flat[paths[path]] = variable.replace(kernel)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _join(parts: tuple[Any, ...]) -> str:
    return "/".join(map(str, parts))


def _natural(path: str) -> list[tuple[int, str]]:
    # Layer 10 comes after layer 9.
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split("/")]
