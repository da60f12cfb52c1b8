"""Configurations as JSON: a method's name and the fields of its dataclass."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kashin_jax.bases import BasisSpec
from kashin_jax.errors import UsageError
from kashin_jax.methods.configs import (
    HQQ,
    NF4,
    RTN,
    ChannelKMeans,
    KMeans,
    Method,
    RotatedKMeansConfig,
    RotatedRTNConfig,
    Uniform,
)
from kashin_jax.methods.joint.coder import JointKashin
from kashin_jax.methods.kashin import GreedyKashin

__all__ = ["METHOD_NAMES", "config_from_json", "config_to_json"]

_CLASSES: Mapping[str, type[Method]] = MappingProxyType(
    {
        "kashin-joint": JointKashin,
        "kashin": GreedyKashin,
        "uniform": Uniform,
        "k-means": KMeans,
        "k-means-channel": ChannelKMeans,
        "rtn": RTN,
        "nf4": NF4,
        "hqq": HQQ,
        "rotate-rtn": RotatedRTNConfig,
        "rotate-k-means": RotatedKMeansConfig,
    }
)
_NAMES = {cls: name for name, cls in _CLASSES.items()}

METHOD_NAMES: tuple[str, ...] = tuple(_CLASSES)


def config_to_json(config: Method) -> dict[str, Any]:
    """`{"method": ..., "bits": ..., ...}`, every field written out."""
    fields = {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
    }
    return {"method": _NAMES[type(config)], **fields}


def config_from_json(
    content: Mapping[str, Any], default: Method | None = None
) -> Method:
    """Inverts `config_to_json`; fields that are not there have their defaults.

    Args:
      content: A method and fields of it.
      default: Gives the method, and, where the method is the same, the other fields.

    Raises:
      UsageError: If the method or a field is unknown, or a value cannot work; names
        both.
    """
    fields = dict(content)
    same = _NAMES[type(default)] if default is not None else METHOD_NAMES[0]
    method = fields.pop("method", same)
    if not isinstance(method, str) or method not in _CLASSES:
        raise UsageError(
            f"`method` must be one of {', '.join(METHOD_NAMES)}. Got {method!r}."
        )
    cls = _CLASSES[method]
    known = {field.name: field.type for field in dataclasses.fields(cls)}
    if unknown := sorted(fields.keys() - known.keys()):
        raise UsageError(
            f"Method {method} has no field {unknown[0]!r}; it has "
            f"{', '.join(sorted(known))}."
        )
    try:
        values = {
            name: _parsed(name, value, known[name]) for name, value in fields.items()
        }
        if default is not None and type(default) is cls:
            return dataclasses.replace(default, **values)
        return cls(**values)
    # beartype's complaints, where it checks types, are TypeErrors too.
    except (TypeError, ValueError) as error:
        raise UsageError(f"Method {method}: {str(error).splitlines()[0]}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, BasisSpec):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _parsed(name: str, value: Any, kind: Any) -> Any:
    """A value of JSON as the field's type has it; ValueError if it cannot be one."""
    kinds = typing.get_args(kind) or (kind,)
    if isinstance(value, str) and BasisSpec in kinds:
        return BasisSpec.parse(value)
    if isinstance(value, list) and any(typing.get_origin(k) is tuple for k in kinds):
        if len(value) == 2 and all(type(side) is int and side > 0 for side in value):
            return tuple(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # A JSON writer may have made 3 of 3.0, or the other way round.
        if int in kinds and math.isfinite(value) and value == int(value):
            return int(value)
        if float in kinds:
            return float(value)
    elif type(value) in kinds:
        return value
    raise ValueError(f"`{name}` cannot be {value!r}.")
