"""Rotary positions: how fast each pair of coordinates of a head turns, and the turning.

Frequencies are computed while a program is traced. Two kinds of scaling depend on the
length of the text; they take that of the sequence, or of the cache, so that a token's
keys are the same whenever they are looked at.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models.config_fields import Numbers, read_fields

__all__ = [
    "FULL",
    "SLIDING",
    "Angles",
    "Rope",
    "angles",
    "frequencies",
    "read_ropes",
    "rotate",
]

# Kinds of layers.
FULL, SLIDING = "full_attention", "sliding_attention"

# What a kind of scaling cannot do without.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of a layer; field names are those of Hugging Face.

    Attributes:
      rope_type: One of default, linear, dynamic, llama3, yarn and longrope.
      rope_theta: Base of the speeds: pair i of r/2 turns by theta**(-2i/r) a token.
      partial_rotary_factor: Part of a head that is turned, its first coordinates.
      factor: How many times longer texts may be than those of the first training.
      original_max_position_embeddings: Tokens of the longest text of that training;
        those of the model when None.
      attention_factor: What turned queries and keys are multiplied by (yarn, longrope);
        follows from `factor` when None.
      beta_fast: Turns within the original length above which a pair is left alone.
      beta_slow: Turns below which it is slowed by all of `factor`.
      mscale: Of yarn's `attention_factor`, with `mscale_all_dim`.
      mscale_all_dim: See `mscale`.
      truncate: Whether yarn rounds the bounds between pairs outwards.
      low_freq_factor: Llama 3: turns below which a pair is slowed by all of `factor`.
      high_freq_factor: Llama 3: turns above which it is left alone.
      short_factor: Longrope: what wavelengths are multiplied by within the original
        length, one number for each pair.
      long_factor: The same beyond it.

    References:
      Su et al., "RoFormer" (2021), arXiv:2104.09864. Peng et al., "YaRN" (2023),
      arXiv:2309.00071. Ding et al., "LongRoPE" (2024), arXiv:2402.13753. Grattafiori et
      al., "The Llama 3 herd of models" (2024), arXiv:2407.21783.
    """

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: Numbers = None
    long_factor: Numbers = None

    def __post_init__(self) -> None:
        if self.rope_type not in _NEEDED:
            raise UsageError(
                f"`rope_type` is {self.rope_type!r}; known are {', '.join(_NEEDED)}. "
                "`kashin quantize` takes the model all the same; run it elsewhere."
            )
        for name in _NEEDED[self.rope_type]:
            if not getattr(self, name):
                raise UsageError(f"`rope_type` {self.rope_type!r} needs `{name}`.")
        for name in ("rope_theta", "factor", "original_max_position_embeddings"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"`{name}` of a rope must be positive. Got {value}.")
        if not 0 < self.partial_rotary_factor <= 1:
            raise UsageError(
                "`partial_rotary_factor` must lie in (0, 1]. Got "
                f"{self.partial_rotary_factor}."
            )

    def rotated(self, head_dim: int) -> int:
        """Coordinates of a head that are turned.

        Raises:
          UsageError: If they are not pairs, or there is not a factor for each pair.
        """
        size = int(head_dim * self.partial_rotary_factor)
        if size < 2 or size % 2:
            raise UsageError(
                f"A rope turns pairs of coordinates; of `head_dim`={head_dim} it would "
                f"turn {size}."
            )
        for name in ("short_factor", "long_factor"):
            found = getattr(self, name)
            if found is not None and len(found) != size // 2:
                raise UsageError(
                    f"`{name}` must have {size // 2} numbers, one for each pair of "
                    f"coordinates. Got {len(found)}."
                )
        return size

    def reach(self, positions: int) -> int:
        """Tokens of the longest text, of a model with so many positions.

        Linear and dynamic scaling lengthen what the configuration says; of the others
        it says the length that was reached.
        """
        factor = self.factor or 1.0
        if self.rope_type in ("linear", "dynamic"):
            return int(positions * factor)
        if self.rope_type == "yarn":
            original = self.original_max_position_embeddings or positions
            return max(positions, int(original * factor))
        return positions

    def to_dict(self) -> dict[str, Any]:
        """The object that a `config.json` has under `rope_parameters`."""
        fields = dataclasses.asdict(self)
        named = {name: fields[name] for name in ("rope_type", "rope_theta")}
        plain = dataclasses.asdict(Rope())
        return named | {k: v for k, v in fields.items() if v != plain[k]}


def read_ropes(
    content: Mapping[str, Any], source: str, *, local_theta: float | None = None
) -> tuple[Rope, Rope | None]:
    """Reads the ropes of a `config.json`, which have had four places there.

    Args:
      content: The parsed JSON object, with the family's defaults in place.
      source: Where it came from, for error messages.
      local_theta: Base of the rope of layers with a window, in families in which these
        have their own.

    Returns:
      The rope, and that of layers with a window.

    Raises:
      CheckpointError: If a value is of the wrong type or not supported; names `source`
        and the field.
    """
    scaling = _object(content, "rope_scaling", source)
    parameters = _object(content, "rope_parameters", source)
    nested = {
        name: _object(parameters, name, source)
        for name in (FULL, SLIDING)
        if name in parameters
    }
    common = {
        name: content[name]
        for name in ("rope_theta", "partial_rotary_factor")
        if content.get(name) is not None
    }
    own = common | (scaling or (nested.get(FULL, {}) if nested else parameters))
    kind = own.get("rope_type", own.get("type"))
    # Phi-3 had other names for it, of which one is another's.
    if kind in ("su", "yarn") and "long_factor" in own:
        own["rope_type"] = kind = "longrope"
    original = "original_max_position_embeddings"
    if original in content and kind in ("llama3", "yarn", "longrope"):
        own[original] = content[original]
    local = None
    if local_theta is not None:
        theta = content.get("rope_local_base_freq", local_theta)
        local = _read({"rope_theta": theta} | nested.get(SLIDING, {}), source)
    return _read(own, source), local


def _object(content: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    """A JSON object, empty where there is none."""
    value = content.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(
            f"{source}: field `{key}` is {value!r}; expected an object."
        )
    return dict(value or {})


def _read(mapping: Mapping[str, Any], source: str) -> Rope:
    nulls = {name: getattr(Rope(), name) for name in ("rope_type", "rope_theta")}
    content = dict(mapping)
    content.setdefault("rope_type", content.get("type", "default"))
    return read_fields(Rope, content, source, nulls=nulls)


class Angles(NamedTuple):
    """Cosines and sines of every token for every pair of coordinates.

    Attributes:
      cos: Times the attention factor.
      sin: Times the attention factor.
    """

    cos: Float32[Array, "b t 1 pairs"]
    sin: Float32[Array, "b t 1 pairs"]


def angles(
    rope: Rope,
    positions: Int[Array, "b t"],
    *,
    head_dim: int,
    length: int,
    max_positions: int,
) -> Angles:
    """What the queries and keys of some tokens are turned by.

    Args:
      rope: The rope of the layer.
      positions: Of the tokens, from 0.
      head_dim: Width of a head.
      length: Tokens of the text, or slots of the cache.
      max_positions: `max_position_embeddings` of the model.
    """
    speeds, scale = frequencies(
        rope, head_dim=head_dim, length=length, max_positions=max_positions
    )
    turned = positions.astype(jnp.float32)[:, :, None, None] * speeds.reshape(
        1, 1, 1, -1
    )
    return Angles(jnp.cos(turned) * scale, jnp.sin(turned) * scale)


def rotate(
    x: Float[Array, "b t heads head_dim"], by: Angles
) -> Float[Array, "b t heads head_dim"]:
    """Turns pairs of coordinates, half of the turned ones apart; the rest stays."""
    half = by.cos.shape[-1]
    whole = x.astype(jnp.float32)
    first, second, rest = jnp.split(whole, (half, 2 * half), axis=-1)
    turned = (
        first * by.cos - second * by.sin,
        second * by.cos + first * by.sin,
        rest,
    )
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def frequencies(
    rope: Rope, *, head_dim: int, length: int, max_positions: int
) -> tuple[Float32[np.ndarray, " pairs"], float]:
    """Radians a token, of every pair, and the factor of turned queries and keys.

    Args:
      rope: Kind and numbers.
      head_dim: Width of a head.
      length: Tokens of the text: dynamic and longrope follow it.
      max_positions: `max_position_embeddings` of the model.
    """
    size = rope.rotated(head_dim)
    scaled: Callable[[Rope, int, int, int], tuple[np.ndarray, float]]
    scaled = {
        "linear": _linear,
        "dynamic": _dynamic,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
    }.get(rope.rope_type, _default)
    speeds, scale = scaled(rope, size, length, max_positions)
    return speeds.astype(np.float32), scale


def _speeds(theta: float, size: int) -> Float32[np.ndarray, " pairs"]:
    # In float32, as every library computes them: the models were trained so.
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return np.float32(1) / np.float32(theta) ** exponents


def _default(
    rope: Rope, size: int, length: int, max_positions: int
) -> tuple[np.ndarray, float]:
    return _speeds(rope.rope_theta, size), 1.0


def _linear(
    rope: Rope, size: int, length: int, max_positions: int
) -> tuple[np.ndarray, float]:
    return _speeds(rope.rope_theta, size) / np.float32(rope.factor or 1.0), 1.0


def _dynamic(
    rope: Rope, size: int, length: int, max_positions: int
) -> tuple[np.ndarray, float]:
    """A larger base for longer texts, so that the slowest pair spans them."""
    factor = rope.factor or 1.0
    longer = factor * max(length, max_positions) / max_positions - (factor - 1)
    theta = rope.rope_theta * longer ** (size / max(size - 2, 1))
    return _speeds(theta, size), 1.0


def _llama3(
    rope: Rope, size: int, length: int, max_positions: int
) -> tuple[np.ndarray, float]:
    """Slow pairs are slowed, fast ones are not, those between in part."""
    low, high = rope.low_freq_factor or 1.0, rope.high_freq_factor or 4.0
    original = rope.original_max_position_embeddings or max_positions
    speeds = _speeds(rope.rope_theta, size)
    turns = original * speeds / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return speeds * kept + speeds / (rope.factor or 1.0) * (1 - kept), 1.0


def _yarn(
    rope: Rope, size: int, length: int, max_positions: int
) -> tuple[np.ndarray, float]:
    """As Llama 3, with a ramp over pairs in place of one over turns."""
    original = rope.original_max_position_embeddings or max_positions
    factor = rope.factor or max_positions / original

    def pair(turns: float) -> float:
        """The pair that turns so often within the original length."""
        ratio = math.log(original / (turns * 2 * math.pi))
        return size * ratio / (2 * math.log(rope.rope_theta))

    low, high = pair(rope.beta_fast or 32.0), pair(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = low + 0.001 if low == high else high
    slowed = np.clip((np.arange(size // 2) - low) / (high - low), 0, 1)
    speeds = _speeds(rope.rope_theta, size)
    scale = rope.attention_factor
    if scale is None and rope.mscale and rope.mscale_all_dim:
        scale = _sharpened(factor, rope.mscale) / _sharpened(
            factor, rope.mscale_all_dim
        )
    if scale is None:
        scale = _sharpened(factor, 1.0)
    return speeds / factor * slowed + speeds * (1 - slowed), scale


def _sharpened(factor: float, by: float) -> float:
    """Attention over longer texts has to be sharper."""
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


def _longrope(
    rope: Rope, size: int, length: int, max_positions: int
) -> tuple[np.ndarray, float]:
    """Factors that were searched, one for each pair, for short texts and long ones."""
    original = rope.original_max_position_embeddings or max_positions
    factor = rope.factor or max_positions / original
    factors = rope.long_factor if length > original else rope.short_factor
    scale = rope.attention_factor
    if scale is None:
        longer = math.log(factor) / math.log(original) if factor > 1 else 0.0
        scale = math.sqrt(1 + longer)
    return _speeds(rope.rope_theta, size) / np.asarray(factors, np.float32), scale
