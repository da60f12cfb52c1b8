"""Packed tensors as named arrays and a description, as `docs/format.md` has it.

A description is JSON: `type`, `is_transposed`, `layout` and `leaves`, the last a map
from leaves to their types; and `stack` for equal matrices in one tensor. Everything
that the format demands of it is checked before any leaf is read.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped

from kashin_jax.bases import FAMILIES, BasisSpec
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io.files import shown
from kashin_jax.io.safetensors import TensorSpec
from kashin_jax.packing import packed_size
from kashin_jax.tensors import (
    AffineTensor,
    CodebookTensor,
    KashinTensor,
    KashinVectorTensor,
    QuantizedTensor,
)
from kashin_jax.tensors.grouped import GroupLayout
from kashin_jax.tensors.kashin import KashinLayout
from kashin_jax.tensors.kashin_vectors import VectorLayout
from kashin_jax.tensors.levels import product_bits

__all__ = [
    "METADATA_KEY",
    "SCHEMA_VERSION",
    "TYPES",
    "Described",
    "check_schema",
    "describe",
    "from_leaves",
    "leaf_specs",
    "parse_description",
    "schema_of",
    "to_leaves",
]

SCHEMA_VERSION = 3
"""Newest version of the format; readers refuse newer ones. See `schema_of`."""

METADATA_KEY = "kashin_jax"
"""Where a shard's metadata describe its packed tensors, as JSON in text."""

TYPES: Mapping[str, Any] = MappingProxyType(
    {
        "kashin": KashinTensor,
        "affine": AffineTensor,
        "codebook": CodebookTensor,
        "kashin-vectors": KashinVectorTensor,
    }
)
"""Packed tensors by the name that files give their type."""

Layout = KashinLayout | GroupLayout | VectorLayout
"""What a description has under that name."""

_KEYS = {"type", "is_transposed", "layout", "leaves"}
# The first versions that have them.
_SINCE = {"kashin-vectors": 3}
# Of layouts, but seen in the leaves rather than stored.
_DERIVED = frozenset({"v_bits"})
_FLOATS = frozenset(
    {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
)
_MAX_SIDE = 2**31
# Numbers in a dense factor of a derived basis: this many, or so many per weight. A
# small file must not announce a basis that fills the memory.
_BASIS_FLOOR, _BASIS_PER_WEIGHT = 2**26, 128


def check_schema(version: Any, where: str) -> None:
    """Raises CheckpointError unless this library reads a schema version."""
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{where}: `schema_version` cannot be {shown(version)}; copy or download "
            "it again."
        )
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{where}: has schema version {version}, but this kashin_jax reads up to "
            f"{SCHEMA_VERSION}; upgrade kashin_jax."
        )


def schema_of(descriptions: Iterable[Mapping[str, Any]]) -> int:
    """The oldest version that has what is described, so that old readers read it.

    Stacks came with version 2, vectors with version 3.
    """
    needed = (
        max(_SINCE.get(each["type"], 1), 2 if "stack" in each else 1)
        for each in descriptions
    )
    return max(needed, default=1)


class Stream(NamedTuple):
    """A leaf of packed codes: their width, and how many."""

    bits: int
    codes: int

    @property
    def spec(self) -> TensorSpec:
        """Type and shape of the leaf."""
        return TensorSpec("uint8", (packed_size(self.codes, self.bits),))


class Described(NamedTuple):
    """A description that was found sound.

    Attributes:
      type: One of `TYPES`.
      is_transposed: Whether the tensor of that name was `[out, in]` in the checkpoint
        that was quantized, the transposed matrix.
      layout: Static part of the tensor.
      specs: Type and shape of every leaf, from the layout and the leaves' types alone.
      streams: The leaves that are packed codes, of one matrix.
      stack: Leading axes of all leaves, where equal matrices are one tensor.
    """

    type: str
    is_transposed: bool
    layout: Layout
    specs: Mapping[str, TensorSpec]
    streams: Mapping[str, Stream]
    stack: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor of that name before quantizing."""
        m, n = self.layout.shape
        return (*self.stack, *((n, m) if self.is_transposed else (m, n)))


def _layout_to_json(layout: Layout) -> dict[str, Any]:
    """The fields of a layout; bases as text, groups no longer than the matrix."""
    content: dict[str, Any] = {}
    for name in _stored_fields(type(layout)):
        value = getattr(layout, name)
        if isinstance(value, BasisSpec):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, float) and value == int(value):
            value = int(value)
        content[name] = value
    if content.get("group_size") is not None:
        # One group either way, and readers need not guard against huge ones.
        content["group_size"] = min(content["group_size"], layout.shape[0])
    return content


def parse_description(content: Any, where: str) -> Described:
    """Checks a description and derives its leaves; allocates nothing.

    Args:
      content: Parsed JSON of any origin.
      where: Begins every message; names the tensor.

    Raises:
      CheckpointError: If a field is missing, unknown or cannot be; names it.
    """
    try:
        _require(isinstance(content, Mapping), "description", content)
        is_known = content.keys() in (_KEYS, _KEYS | {"stack"})
        _require(is_known, "fields of the description", list(content))
        stack = _stack(content["stack"]) if "stack" in content else ()
        kind, is_transposed = content["type"], content["is_transposed"]
        _require(isinstance(kind, str) and kind in TYPES, "type", kind)
        _require(type(is_transposed) is bool, "is_transposed", is_transposed)
        leaves = content["leaves"]
        _require(isinstance(leaves, Mapping), "leaves", leaves)
        layout: Layout
        if kind == "kashin":
            layout = kashin = _kashin_layout(content["layout"])
            specs, streams = _kashin_specs(kashin, leaves)
        elif kind == "kashin-vectors":
            layout = vectors = _vector_layout(content["layout"])
            specs, streams = _vector_specs(vectors)
        else:
            layout = group = _group_layout(content["layout"])
            derive = _affine_specs if kind == "affine" else _codebook_specs
            specs, streams = derive(group, leaves)
        expected = {leaf: spec.dtype for leaf, spec in specs.items()}
        _require(dict(leaves) == expected, "leaves", leaves)
    except ValueError as error:
        raise CheckpointError(
            f"{where}: {error}; quantize it again, or copy or download the file again."
        ) from error
    stacked = {
        leaf: TensorSpec(spec.dtype, (*stack, *spec.shape))
        for leaf, spec in specs.items()
    }
    return Described(kind, is_transposed, layout, stacked, streams, stack)


def _stack(content: Any) -> tuple[int, ...]:
    _require(isinstance(content, list | tuple) and len(content) > 0, "stack", content)
    sizes = all(type(s) is int and 1 <= s <= _MAX_SIDE for s in content)
    _require(sizes, "stack", content)
    return tuple(content)


def _require(is_sound: bool, name: str, value: Any) -> None:
    if not is_sound:
        raise ValueError(f"`{name}` cannot be {shown(value)}")


def _kashin_layout(content: Any) -> KashinLayout:
    _require_fields(content, KashinLayout)
    shape = _pair(content, "shape")
    block_shape, bits = _pair(content, "block_shape"), content["bits"]
    divides = not (shape[0] % block_shape[0] or shape[1] % block_shape[1])
    _require(divides, "block_shape", block_shape)
    _require(_is_width(bits), "bits", bits)
    half = bits != int(bits)
    # Rows of odd index are coded apart, in every block alike.
    _require(not half or block_shape[0] % 2 == 0, "block_shape", block_shape)
    basis = _basis(content, "basis", shape, block_shape)
    if basis is None:
        raise ValueError("`basis` cannot be None")
    return KashinLayout(
        shape=shape,
        block_shape=block_shape,
        bits=float(bits) if half else int(bits),
        basis=basis,
        dtype=_float_name(content),
        rotation=_basis(content, "rotation", shape, block_shape),
    )


def _is_width(bits: Any) -> bool:
    if type(bits) is int:
        return 1 <= bits <= 8
    # Both codebooks of a half width are counted by one code of 8 bits.
    return type(bits) is float and 1 < bits < 7 and (2 * bits) % 2 in (0, 1)


def _group_layout(content: Any) -> GroupLayout:
    _require_fields(content, GroupLayout)
    shape = _pair(content, "shape")
    size, bits = content["group_size"], content["bits"]
    fits = size is None or (type(size) is int and 1 <= size <= shape[0])
    _require(fits, "group_size", size)
    _require(type(bits) is int and 1 <= bits <= 8, "bits", bits)
    return GroupLayout(
        shape=shape,
        group_size=size,
        bits=bits,
        basis=_basis(content, "basis", shape, shape),
        dtype=_float_name(content),
    )


def _vector_layout(content: Any) -> VectorLayout:
    _require_fields(content, VectorLayout)
    shape = _pair(content, "shape")
    axis, bits = content["axis"], content["bits"]
    _require(type(axis) is int and axis in (0, 1), "axis", axis)
    _require(type(bits) is int and 2 <= bits <= 8, "bits", bits)
    return VectorLayout(
        shape=shape,
        axis=axis,
        bits=bits,
        basis=_basis(content, "basis", shape, shape),
        dtype=_float_name(content),
    )


def _require_fields(content: Any, cls: type[Layout]) -> None:
    _require(isinstance(content, Mapping), "layout", content)
    known = content.keys() == set(_stored_fields(cls))
    _require(known, "fields of `layout`", list(content))


def _stored_fields(cls: type[Layout]) -> list[str]:
    names = (field.name for field in dataclasses.fields(cls))
    return [name for name in names if name not in _DERIVED]


def _pair(content: Mapping[str, Any], name: str) -> tuple[int, int]:
    value = content[name]
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    _require(is_pair, name, value)
    _require(all(type(s) is int and 1 <= s <= _MAX_SIDE for s in value), name, value)
    return value[0], value[1]


def _float_name(content: Mapping[str, Any]) -> str:
    name = content["dtype"]
    _require(isinstance(name, str) and name in _FLOATS, "dtype", name)
    return name


def _basis(
    content: Mapping[str, Any],
    name: str,
    shape: tuple[int, int],
    block_shape: tuple[int, int],
) -> BasisSpec | None:
    text = content[name]
    if text is None:
        return None
    sides = text.split(":") if isinstance(text, str) else []
    is_known = len(sides) in (1, 2) and all(side in FAMILIES for side in sides)
    _require(is_known, name, text)
    spec = BasisSpec.parse(text)
    limit = max(_BASIS_FLOOR, _BASIS_PER_WEIGHT * math.prod(shape))
    for family, side in zip((spec.left, spec.right), block_shape, strict=True):
        if _dense_side(family, side) ** 2 > limit:
            raise ValueError(
                f"`{name}` {text} needs a dense matrix of side "
                f"{_dense_side(family, side)} for a tensor of shape {shape}"
            )
    return spec


def _dense_side(family: str, side: int) -> int:
    """Side of the largest dense matrix that a basis is made of, rounded up."""
    if family == "haar":
        return side
    # At most Paley's matrix of order 4 c, c being the odd part.
    return 4 * (side // (side & -side)) if family == "hadamard" else 0


def _kashin_specs(
    layout: KashinLayout, leaves: Mapping[str, Any]
) -> tuple[dict[str, TensorSpec], dict[str, Stream]]:
    (m, n), (height, width) = layout.shape, layout.block_shape
    coarse, pairs = layout.coarse_bits, 2**layout.fine_bits
    streams = {"packed_codes": Stream(layout.fine_bits, m * n)}
    if coarse is not None:
        streams["packed_codes"] = Stream(layout.fine_bits, m // 2 * n)
        streams["packed_coarse"] = Stream(coarse, m // 2 * n)
        pairs += 2**coarse
    specs = {leaf: stream.spec for leaf, stream in streams.items()} | {
        "centroids": TensorSpec("float32", (pairs, 2)),
        "scale": TensorSpec("float32", (m // height, n // width)),
        "seed": TensorSpec("uint32", (2,)),
    }
    for leaf, side in (("in_scale", m), ("out_scale", n)):
        if leaf in leaves:
            specs[leaf] = TensorSpec("float16", (side,))
    return specs, streams


def _group_specs(
    layout: GroupLayout,
) -> tuple[dict[str, TensorSpec], dict[str, Stream]]:
    m, n = layout.shape
    streams = {"packed_codes": Stream(layout.bits, m * n)}
    scale = TensorSpec("float32", (1, 1, 1))
    if layout.group_size is not None:
        scale = TensorSpec("float16", (-(-m // layout.group_size), 1, n))
    specs = {"packed_codes": streams["packed_codes"].spec, "scale": scale}
    if layout.basis is not None:
        specs["seed"] = TensorSpec("uint32", (2,))
    return specs, streams


def _affine_specs(
    layout: GroupLayout, leaves: Mapping[str, Any]
) -> tuple[dict[str, TensorSpec], dict[str, Stream]]:
    specs, streams = _group_specs(layout)
    specs["zero"] = specs["scale"]
    if leaves.get("zero") == "uint8" and layout.group_size is not None:
        streams["zero"] = Stream(layout.bits, math.prod(specs["scale"].shape))
        specs["zero"] = streams["zero"].spec
    return specs, streams


def _codebook_specs(
    layout: GroupLayout, leaves: Mapping[str, Any]
) -> tuple[dict[str, TensorSpec], dict[str, Stream]]:
    specs, streams = _group_specs(layout)
    if "levels" not in leaves:
        # NF4, whose levels are fixed.
        _require(layout.bits == 4, "bits", layout.bits)
    elif leaves["levels"] == "float16":
        specs["levels"] = TensorSpec("float16", (2**layout.bits, layout.shape[1]))
    else:
        specs["levels"] = TensorSpec("float32", (2**layout.bits,))
    return specs, streams


def _vector_specs(
    layout: VectorLayout,
) -> tuple[dict[str, TensorSpec], dict[str, Stream]]:
    (m, n), vectors = layout.shape, layout.shape[1 - layout.axis]
    streams = {"packed_codes": Stream(layout.bits, m * n)}
    specs = {
        "packed_codes": streams["packed_codes"].spec,
        "u_levels": TensorSpec("float16", (2 ** (layout.u_bits - 1), vectors)),
        "v_levels": TensorSpec("float16", (2 ** (layout.v_bits - 1), vectors)),
        "seed": TensorSpec("uint32", (2,)),
    }
    return specs, streams


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
        leaf: TensorSpec(np.dtype(value.dtype).name, _stored_shape(tensor, value))
        for leaf, value in tensor.leaves().items()
        if value is not None
    }


def _stored_shape(tensor: Any, leaf: Any) -> tuple[int, ...]:
    """Codes, all that is uint8, are stored as one stream for every matrix."""
    if np.dtype(leaf.dtype) != np.uint8:
        return tuple(leaf.shape)
    stack = tensor.full_shape[:-2]
    return (*stack, math.prod(leaf.shape[len(stack) :]))


def to_leaves(tensor: QuantizedTensor) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays that are stored, by the name of their field.

    Raises:
      UsageError: If it is of no type that can be stored.
    """
    fields, specs = tensor.leaves(), leaf_specs(tensor)
    return {
        leaf: np.asarray(fields[leaf]).reshape(spec.shape)
        for leaf, spec in specs.items()
    }


def describe(tensor: Any, *, is_transposed: bool) -> dict[str, Any]:
    """Describes a packed tensor as JSON: what a reader must know beside its leaves.

    Args:
      tensor: A packed tensor or a stack of them, or what `jax.eval_shape` gives.
      is_transposed: Whether the tensor of that name was `[out, in]` in the original
        checkpoint, that is `decode().T`.

    Raises:
      UsageError: If it is of no type that can be stored, or no reader would accept it.
    """
    specs = leaf_specs(tensor)
    content = {
        "type": _type_name(tensor),
        "is_transposed": is_transposed,
        "layout": _layout_to_json(tensor.layout),
        "leaves": {leaf: specs[leaf].dtype for leaf in sorted(specs)},
    }
    if stack := specs["packed_codes"].shape[:-1]:
        content["stack"] = list(stack)
    try:
        described = parse_description(content, "tensor")
        _check_specs(described, specs, "tensor")
    except CheckpointError as error:
        raise UsageError(f"This tensor cannot be stored ({error}).") from error
    return content


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
      name: The tensor, for messages.

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
    arrays = {leaf: jax.device_put(np.asarray(each)) for leaf, each in leaves.items()}
    tensor: QuantizedTensor = TYPES[described.type].from_leaves(layout, arrays)
    return tensor


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
        if used and (value[..., -1] >> used).any():
            fault = "has fill bits other than 0 in its last byte"
    elif value.dtype != np.uint32 and not np.isfinite(value).all():
        fault = "holds NaN or infinity"
    if fault:
        raise CheckpointError(
            f"{where}: {fault}; quantize it again, or copy or download the file again."
        )
