"""Names of version 0.1, for one release: each warns and leads to the new one.

Public names and import paths that README and documentation showed. They go in 0.3.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["CHECKPOINTS", "LAYERS", "QUANTIZED", "REMOVED_IN", "TOP", "forwarding"]

REMOVED_IN = "0.3"

_METHODS = {
    "JointConfig": "methods.JointKashin",
    "KashinConfig": "methods.GreedyKashin",
    "UniformConfig": "methods.Uniform",
    "RTNConfig": "methods.RTN",
    "HQQConfig": "methods.HQQ",
    "NF4Config": "methods.NF4",
    "KMeansConfig": "methods.KMeans",
    "ChannelKMeansConfig": "methods.ChannelKMeans",
    "RotatedRTNConfig": "deprecated.rotated_rtn",
    "RotatedKMeansConfig": "deprecated.rotated_kmeans",
}
_LAYERS = {
    "KashinLinear": "layers.QuantizedLinear",
    "KashinEmbed": "layers.QuantizedEmbed",
    "KashinDense": "layers.QuantizedDense",
}

TOP: Mapping[str, str] = MappingProxyType({**_METHODS, **_LAYERS})
"""Old names of `kashin_jax`, and where they lead."""

LAYERS: Mapping[str, str] = MappingProxyType(
    _LAYERS
    | {
        name: f"pipeline.{name}"
        for name in (
            "LayerPlan", "LayerReport", "Plan", "QuantizedModel", "QuantizedParams",
            "allocate_widths", "default_select", "dequantize_params", "outliers",
            "path_key", "plan_model", "plan_params", "quantize_model",
            "quantize_params", "replace_kernels", "report_table", "selected_kernels",
        )
    }
)  # fmt: skip
"""Old names of `kashin_jax.layers`."""

QUANTIZED: Mapping[str, str] = MappingProxyType(
    _METHODS
    | {
        "METHOD_NAMES": "deprecated.all_names",
        "Quantized": "tensors.QuantizedTensor",
        "QuantizerConfig": "methods.Method",
        "derive_basis": "deprecated.derive_basis",
        "derive_rotation": "deprecated.derive_rotation",
    }
    | {
        name: f"methods.{name}"
        for name in (
            "DEFAULT_CONFIG", "QuantizationReport", "config_from_json",
            "config_to_json", "encode", "quantize", "require_finite",
        )
    }
    | {
        name: f"tensors.{name}"
        for name in (
            "AffineTensor", "CodebookTensor", "QuantizedTensor", "bits_per_weight",
            "dequantize", "matmul", "stored_bits",
        )
    }
    | {
        name: f"pipeline.{name}"
        for name in (
            "DEFAULT_SKIPS", "SHARED_INPUTS", "Rule", "Rules", "rules_from_json",
            "rules_to_json",
        )
    }
)  # fmt: skip
"""Old names of `kashin_jax.quantized`."""

CHECKPOINTS: Mapping[str, str] = MappingProxyType(
    {"open_source": "io.open_checkpoint"}
    | {
        name: f"pipeline.{name}"
        for name in (
            "REPORT_NAME", "Inspection", "StreamResult", "TensorRow",
            "dequantize_checkpoint", "inspect_checkpoint", "load_quantized",
            "packed_layers", "plan_checkpoint", "quantize_checkpoint",
        )
    }
)  # fmt: skip
"""Old names of `kashin_jax.checkpoints`."""

# What stands in a warning, where it is not the place that the name leads to.
_SHOWN = {
    "deprecated.rotated_rtn": "methods.Rotated(RTN(...))",
    "deprecated.rotated_kmeans": "methods.Rotated(KMeans(...))",
    "deprecated.all_names": "methods.method_names()",
    "deprecated.derive_basis": "tensors.QuantizedTensor.derive_bases().basis",
    "deprecated.derive_rotation": "tensors.QuantizedTensor.derive_bases().rotation",
}


def forwarding(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose old names lead elsewhere.

    Args:
      module: What the warning calls it.
      names: Where each leads, below `kashin_jax`.
    """

    def lookup(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        target = names[name]
        warnings.warn(
            f"`{module}.{name}` is now `kashin_jax.{_SHOWN.get(target, target)}`; the "
            f"old name goes in kashin_jax {REMOVED_IN}.",
            DeprecationWarning,
            stacklevel=3 if module == "kashin_jax" else 2,
        )
        package, _, own = target.rpartition(".")
        found = getattr(importlib.import_module(f"kashin_jax.{package}"), own)
        return found() if target == "deprecated.all_names" else found

    return lookup


def rotated_rtn(
    *, bits: int = 4, group_size: int | None = 64, basis: Any = None
) -> Any:
    """Makes `Rotated(RTN(...))` from the arguments of the old `RotatedRTNConfig`."""
    from kashin_jax.methods import RTN, Rotated

    inner = RTN(bits=bits, group_size=group_size)
    return Rotated(inner) if basis is None else Rotated(inner, basis)


def rotated_kmeans(*, bits: int = 4, num_restarts: int = 4, basis: Any = None) -> Any:
    """Makes `Rotated(KMeans(...))` from the arguments of `RotatedKMeansConfig`."""
    from kashin_jax.methods import KMeans, Rotated

    inner = KMeans(bits=bits, num_restarts=num_restarts)
    return Rotated(inner) if basis is None else Rotated(inner, basis)


def all_names() -> tuple[str, ...]:
    """Names of all methods, as the old constant `METHOD_NAMES` listed them."""
    from kashin_jax.methods import method_names

    return method_names()


def derive_basis(tensor: Any) -> Any:
    """Derives Q1 and Q2 of a packed matrix, as the old function of this name did."""
    return tensor.derive_bases().basis


def derive_rotation(tensor: Any) -> Any:
    """Derives the rotation of a packed matrix, as the old function of this name did."""
    return tensor.derive_bases().rotation
