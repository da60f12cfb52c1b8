"""Packed tensors as named arrays and a description, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io.dtypes import TensorSpec
from kashin_jax.io.files import shown
from kashin_jax.io.format import (
    TYPES,
    Described,
    Stream,
    layout_to_json,
    parse_description,
)
from kashin_jax.tensors import QuantizedTensor
from kashin_jax.tensors.kashin import KashinLayout
from kashin_jax.tensors.levels import product_bits

__all__ = ["describe", "expected_specs", "from_leaves", "leaf_specs", "to_leaves"]


def leaf_specs(tensor: Any) -> dict[str, TensorSpec]:
    """Type and shape of every leaf, by the name of its field.

    Args:
      tensor: A packed tensor, or what `jax.eval_shape` gives for one, so that a header
        is known before anything is quantized.

    Raises:
      UsageError: If it is of no type that can be stored.
    """
    _type_name(tensor)
    return {
        leaf: TensorSpec(np.dtype(value.dtype).name, tuple(value.shape))
        for leaf, value in _fields(tensor).items()
        if leaf != "layout" and value is not None
    }


def to_leaves(tensor: QuantizedTensor) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays that are stored, by the name of their field.

    Raises:
      UsageError: If it is of no type that can be stored.
    """
    fields = _fields(tensor)
    return {leaf: np.asarray(fields[leaf]) for leaf in leaf_specs(tensor)}


def describe(tensor: Any, *, is_transposed: bool) -> dict[str, Any]:
    """What a reader must know beside the leaves, as JSON.

    Args:
      tensor: A packed tensor, or what `jax.eval_shape` gives for one.
      is_transposed: Whether the tensor of that name was `[out, in]` in the original
        checkpoint, that is `decode().T`.

    Raises:
      UsageError: If it is of no type that can be stored, or no reader would accept it.
    """
    specs = leaf_specs(tensor)
    content = {
        "type": _type_name(tensor),
        "is_transposed": is_transposed,
        "layout": layout_to_json(tensor.layout),
        "leaves": {leaf: specs[leaf].dtype for leaf in sorted(specs)},
    }
    try:
        described = parse_description(content, "tensor")
        _check_specs(described, specs, "tensor")
    except CheckpointError as error:
        raise UsageError(f"This tensor cannot be stored ({error}).") from error
    return content


def expected_specs(description: Any, name: str = "tensor") -> dict[str, TensorSpec]:
    """Type and shape of every leaf that belongs to a description.

    Raises:
      CheckpointError: If the description is damaged; names `name` and the field.
    """
    return dict(parse_description(description, shown(name)).specs)


def from_leaves(
    description: Any,
    leaves: Mapping[str, Shaped[np.ndarray, "..."]],
    *,
    name: str = "tensor",
) -> QuantizedTensor:
    """Rebuilds a packed tensor, trusting neither argument.

    Args:
      description: Parsed JSON as `describe` made it.
      leaves: Arrays by the name of their field.
      name: Of the tensor, for messages.

    Raises:
      CheckpointError: If the description is damaged, a leaf is missing, unknown or of
        another type or shape than the description demands, fill bits are not zero, or
        a scale, level or centroid is not finite; names the tensor and the leaf.
    """
    described = parse_description(description, shown(name))
    found = {
        leaf: TensorSpec(np.dtype(value.dtype).name, tuple(value.shape))
        for leaf, value in leaves.items()
    }
    _check_specs(described, found, shown(name))
    for leaf, value in leaves.items():
        _check_values(
            np.asarray(value), described.streams.get(leaf), shown(f"{name}.{leaf}")
        )
    layout = described.layout
    if isinstance(layout, KashinLayout):
        v_bits = product_bits(np.asarray(leaves["centroids"]), layout.fine_bits)
        layout = dataclasses.replace(layout, v_bits=v_bits)
    cls = TYPES[described.type]
    fields = {field.name: None for field in dataclasses.fields(cls)} | {
        leaf: jax.device_put(np.asarray(value)) for leaf, value in leaves.items()
    }
    tensor: QuantizedTensor = cls(**fields | {"layout": layout})
    return tensor


def _fields(tensor: Any) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(tensor))
    return {name: getattr(tensor, name) for name in names}


def _type_name(tensor: Any) -> str:
    for name, cls in TYPES.items():
        if type(tensor) is cls:
            return name
    raise UsageError(
        f"A {type(tensor).__name__} cannot be stored; quantize a matrix, and pass its "
        "packed tensor."
    )


def _check_specs(
    described: Described, found: Mapping[str, TensorSpec], where: str
) -> None:
    for leaf in sorted(described.specs.keys() | found.keys()):
        expected, actual = described.specs.get(leaf), found.get(leaf)
        if expected != actual:
            raise CheckpointError(
                f"{where}: leaf {shown(leaf)} must be {_text(expected)} by the "
                f"description. Got {_text(actual)}; quantize it again, or copy or "
                "download the file again."
            )


def _text(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else f"{spec.dtype} {shown(spec.shape)}"


def _check_values(
    value: Shaped[np.ndarray, "..."], stream: Stream | None, where: str
) -> None:
    fault = None
    if stream is not None:
        used = stream.codes * stream.bits % 8
        if used and int(value[-1]) >> used:
            fault = "has fill bits other than 0 in its last byte"
    elif value.dtype != np.uint32 and not np.isfinite(value).all():
        fault = "holds NaN or infinity"
    if fault:
        raise CheckpointError(
            f"{where}: {fault}; quantize it again, or copy or download the file again."
        )
