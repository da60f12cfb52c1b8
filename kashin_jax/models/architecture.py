"""What the loader, the saver and the pipeline have to know of an architecture."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx

from kashin_jax.models.config_fields import TokenIds
from kashin_jax.models.names import Names

__all__ = [
    "Architecture",
    "Config",
    "LanguageConfig",
    "ParamPath",
    "abstract_state",
]

ParamPath = tuple[Any, ...]


@runtime_checkable
class Config(Protocol):
    """A frozen dataclass that describes a model as `config.json` does."""

    @property
    def model_type(self) -> str:
        """The `model_type` in `config.json`."""
        ...

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], source: str) -> "Config":
        """Reads `config.json`; CheckpointError names `source` and the field."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`, `architectures` included."""
        ...


@runtime_checkable
class LanguageConfig(Config, Protocol):
    """The configuration of a language model."""

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens of the longest text that has positions."""
        ...

    @property
    def pad_token_id(self) -> int | None:
        """Token used as padding, if there is one."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """Token that starts a text, if there is one."""
        ...

    @property
    def eos_token_id(self) -> TokenIds:
        """Token that ends a text, or several of which any does."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """An entry of the registry.

    Attributes:
      model_type: As in `config.json`.
      config: Class of the configuration, a `Config`.
      model: Class of the model: `model(config, rngs=, dtype=, param_dtype=)`.
      names: From our paths to published names, and back.
      tied: Path of the output matrix, and of the embedding that takes its place where
        `tie_word_embeddings` is set; None for models without.
      tied_by_default: Whether it is tied where `tie_word_embeddings` is left out.
      head: Module of a classifier's head, of which a checkpoint may hold several; None
        for language models.
      fresh: Modules that are drawn where a classifier gets a fresh head, if the
        checkpoint does not hold them.
    """

    model_type: str
    config: type[Any]
    model: Callable[..., nnx.Module]
    names: Names
    tied: tuple[ParamPath, ParamPath] | None = None
    tied_by_default: bool = False
    head: str | None = None
    fresh: frozenset[str] = frozenset()


def abstract_state(
    model: Callable[..., nnx.Module], config: Any, dtype: np.dtype
) -> tuple[Any, Any]:
    """Structure of a model, and its variables with shapes for values.

    Drawing random weights would cost more than reading the real ones.

    Args:
      model: Class of the model; made of a configuration, `rngs` and two dtypes.
      config: Its architecture.
      dtype: Type of parameters and activations.
    """
    graphdef, state = _abstract_state(model, config, dtype)
    # Variables of the caller's own: the values of some are set later.
    return graphdef, jax.tree.map(lambda shape: shape, state)


@functools.lru_cache(maxsize=8)
def _abstract_state(
    model: Callable[..., nnx.Module], config: Any, dtype: np.dtype
) -> tuple[Any, Any]:
    """Kept, since tracing a model takes longer than reading a small one."""
    return nnx.split(
        nnx.eval_shape(
            lambda: model(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
        )
    )
