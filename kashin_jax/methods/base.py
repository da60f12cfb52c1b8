"""Quantization methods: what one is, how it is registered, and its name in JSON.

A method is a frozen dataclass of static choices that says how a matrix is encoded:

    @register("sign")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Sign(Method):
        bits: int = 1

        def encode(self, weight, key):
            return Encoded(AffineTensor(...))

Once registered, it has a name in rules, on the command line and in checkpoints.
Packages can name a module that registers methods by the entry point group
`kashin_jax.methods`; it is imported before names are looked up.
"""

import dataclasses
import functools
import importlib.metadata
import math
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, Float16, Key, UInt32

from kashin_jax.bases import BasisSpec, seed_from_key
from kashin_jax.errors import UsageError
from kashin_jax.tensors import QuantizedTensor
from kashin_jax.tensors.blocks import resolve_block_shape

__all__ = [
    "DEFAULT_NAME",
    "Encoded",
    "Method",
    "add_method",
    "config_from_json",
    "config_to_json",
    "is_traced",
    "method_names",
    "register",
    "require_method",
    "split_key",
]

DEFAULT_NAME = "kashin-joint"
"""The method where none is named: joint coding; the 2024 paper's is `kashin`."""

M = TypeVar("M", bound="type[Method]")


class Encoded(NamedTuple):
    """A packed matrix, and how its decomposition went.

    Attributes:
      tensor: The packed matrix.
      decomposition: Residuals, steps and verdicts of a decomposition; None for methods
        without one.
    """

    tensor: QuantizedTensor
    decomposition: dict[str, Array] | None = None


class Method:
    """A quantization method: its choices, and how it encodes a matrix.

    Subclasses are frozen dataclasses whose fields all have defaults, decorated with
    `register`.

    Attributes:
      name: In JSON, on the command line and in tables; `register` sets it.
      default_skip: Patterns of layers to leave in full precision unless a rule names
        them; None for the list that rules have.
      takes_inputs: Whether `encode` takes `importance` and `in_scale`.
      has_half_scales: Whether scales are stored in half precision, so that matrices of
        huge entries cannot be.
      takes_feedback: Whether there is `with_feedback`.
      takes_output_feedback: Whether there is `with_feedback_of_both_sides`.
      later_fields: Fields that came later: at their default they are not written, and
        what was written before they came stays equal.
    """

    if TYPE_CHECKING:

        @property
        def name(self) -> str: ...

        @property
        def bits(self) -> int | float: ...

    default_skip: ClassVar[tuple[str, ...] | None] = None
    takes_inputs: ClassVar[bool] = False
    has_half_scales: ClassVar[bool] = True
    takes_feedback: ClassVar[bool] = False
    takes_output_feedback: ClassVar[bool] = False
    later_fields: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        self._as_python()
        if not 1 <= self.bits <= 8:
            raise ValueError(f"`bits` must lie in [1, 8]. Got bits={self.bits}.")
        size = getattr(self, "group_size", None)
        if size is not None and size < 1:
            raise ValueError(f"`group_size` must be at least 1. Got {size}.")

    def _as_python(self) -> None:
        """Numbers of NumPy, as loops over `np.arange` give them, become Python's."""
        own: Any = self
        for field in dataclasses.fields(own):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError, naming the remedy, if no such matrix can be encoded."""
        resolve_block_shape(shape, None)

    def encode(self, weight: Float[Array, "m n"], key: Key[Array, ""]) -> Encoded:
        """Encodes a finite matrix of any floating type; pure, for `jit` and `vmap`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to encode.")

    @property
    def most_values(self) -> int:
        """Matrices of so many values are coded by `encode_few_values`; 0 for none."""
        return 0

    def encode_few_values(
        self,
        weight: Float[Array, "m n"],
        values: Float[Array, " k"],
        key: Key[Array, ""],
    ) -> Encoded:
        """Encodes a matrix of few values without any loss; pure.

        Args:
          weight: Holds no other values than those.
          values: At most `most_values`, in ascending order, in float32.
          key: As for `encode`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no code for few values.")

    def for_feedback(self) -> "Method":
        """The choices that suit `with_feedback`: these, unless a method has better."""
        return self

    def with_feedback(
        self,
        weight: Float[Array, "m n"],
        free: QuantizedTensor,
        moments: Float[Array, "m m"],
    ) -> QuantizedTensor:
        """Codes a matrix again so that its outputs lose less; pure.

        Args:
          weight: The matrix; must be finite.
          free: What `encode` made of it, without any data. Seeds stay, and so does
            the structure; levels, too, but for the steps of grids and what is of every
            vector.
          moments: Second moments of its inputs, positive definite. Where they are not
            in float32, the result holds NaN, or codes that are of no use.
        """
        raise NotImplementedError(f"{type(self).__name__} has no error feedback.")

    def with_feedback_of_both_sides(
        self,
        weight: Float[Array, "m n"],
        free: QuantizedTensor,
        moments: Float[Array, "m m"],
        out_moments: Float[Array, "n n"],
    ) -> QuantizedTensor:
        """As `with_feedback`, where an error costs as much as outputs matter; pure.

        Args:
          weight: The matrix; must be finite.
          free: What `encode` made of it.
          moments: Second moments of its inputs, positive definite.
          out_moments: G of tr(G E^T H E), positive definite, of any size.
        """
        raise NotImplementedError(f"{type(self).__name__} has no feedback of outputs.")

    def common_input_scale(
        self, weights: Iterable[Float[Array, "*stack m _"]]
    ) -> Float16[Array, "*stack m"] | None:
        """One scale of inputs for matrices that read the same ones; None without.

        Args:
          weights: Finite; taken one at a time.
        """
        return None

    def to_fields(self, also: Collection[str] = ()) -> dict[str, Any]:
        """The static choices as JSON.

        Args:
          also: Of `later_fields` those that are written at their default, too.
        """
        own: Any = self
        quiet = self.later_fields.difference(also)
        return {
            field.name: _plain(value)
            for field in dataclasses.fields(own)
            if (value := getattr(self, field.name)) != field.default
            or field.name not in quiet
        }

    def with_fields(self, content: Mapping[str, Any]) -> "Method":
        """A copy with other choices, given as JSON.

        Raises:
          ValueError: If a field is unknown, or a value cannot work; names it.
        """
        own: Any = self
        known = {field.name: field.type for field in dataclasses.fields(own)}
        if unknown := sorted(content.keys() - known.keys()):
            raise _Unknown(unknown[0], sorted(known))
        values = {
            name: _parsed(name, value, known[name]) for name, value in content.items()
        }
        changed: Method = dataclasses.replace(own, **values)
        return changed


def require_method(config: Any, name: str = "config") -> None:
    """Raises TypeError, naming the remedy, if something is no method.

    Args:
      config: What a caller gave.
      name: Of the argument.
    """
    if not isinstance(config, Method):
        raise TypeError(
            f"`{name}` must be a method such as RTN(bits=4). Got {config!r}; "
            "`config_from_json` makes one of a name and fields."
        )


class _Unknown(ValueError):
    """A field that a method does not have."""

    def __init__(self, field: str, known: list[str]) -> None:
        super().__init__(f"has no field {field!r}; it has {', '.join(known)}.")


# Methods with their default choices, by name.
_METHODS: dict[str, Method] = {}


def register(name: str) -> Callable[[M], M]:
    """Registers a dataclass of choices as the method of a name.

    Args:
      name: Small letters, digits and hyphens.

    Raises:
      ValueError: If another class has the name.
    """

    def registered(cls: M) -> M:
        jax.tree_util.register_static(cls)
        cls.name = name  # type: ignore[assignment, method-assign]
        add_method(cls())
        return cls

    return registered


def add_method(method: Method) -> None:
    """Registers choices under their own name; they are its defaults.

    Raises:
      ValueError: If the name is taken by another class.
    """
    known = _METHODS.setdefault(method.name, method)
    if type(known) is not type(method):
        raise ValueError(
            f"The method {method.name!r} exists already, as {type(known).__name__}; "
            "choose another name."
        )


def method_names() -> tuple[str, ...]:
    """Names of all methods: the default first, the others in alphabetical order."""
    _import_plugins()
    return (DEFAULT_NAME, *sorted(_METHODS.keys() - {DEFAULT_NAME}))


@functools.cache
def _import_plugins() -> None:
    for entry in importlib.metadata.entry_points(group="kashin_jax.methods"):
        entry.load()


def config_to_json(config: Method, also: Collection[str] = ()) -> dict[str, Any]:
    """`{"method": ..., "bits": ..., ...}`, as `Method.to_fields` has them."""
    return {"method": config.name, **config.to_fields(also)}


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
    name = fields.pop("method", DEFAULT_NAME if default is None else default.name)
    if name not in method_names():
        raise UsageError(
            f"`method` must be one of {', '.join(method_names())}. Got {name!r}."
        )
    start = _METHODS[name]
    if default is not None and default.name == name:
        start = default
    try:
        return start.with_fields(fields)
    except _Unknown as error:
        raise UsageError(f"Method {name} {error}") from error
    # beartype's complaints, where it checks types, are TypeErrors too.
    except (TypeError, ValueError) as error:
        raise UsageError(f"Method {name}: {str(error).splitlines()[0]}") from error


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


def is_traced(value: Any) -> bool:
    """Whether an array stands for one that is not known yet, as inside `jit`."""
    # Only where there are data do arrays say where they are.
    return isinstance(value, jax.Array) and not hasattr(value, "sharding")


@jax.jit
def split_key(key: Key[Array, ""]) -> tuple[UInt32[Array, "2"], Key[Array, ""]]:
    """The seed to store, and the key of the codebook."""
    seed_key, codebook_key = jax.random.split(key)
    return seed_from_key(seed_key), codebook_key
