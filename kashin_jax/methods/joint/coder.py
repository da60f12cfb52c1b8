"""Joint Kashin coding: both factors searched for together, with a codebook each."""

import dataclasses
import math
from collections.abc import Iterable
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int, Key, UInt8

from kashin_jax.bases import BasisSpec, KroneckerBasis, key_from_seed, make_pair
from kashin_jax.methods.base import Encoded, Method, register, split_key
from kashin_jax.methods.joint.anneal import anneal
from kashin_jax.methods.joint.feedback import Search, code_with_feedback
from kashin_jax.methods.joint.few_values import few_values_code
from kashin_jax.methods.joint.scales import (
    as_half,
    common_input_scale,
    expansion,
    input_scale,
    relative_rms,
)
from kashin_jax.methods.joint.schedules import SPLITS, Split
from kashin_jax.methods.joint.words import (
    Levels,
    all_pairs,
    decode_words,
    levels_of_pairs,
    pair_codes,
)
from kashin_jax.tensors import KashinTensor, QuantizedTensor
from kashin_jax.tensors.blocks import from_blocks, resolve_block_shape, to_blocks
from kashin_jax.tensors.kashin import KashinLayout, make_rotation, pack_rows

__all__ = ["EFFORTS", "JointCode", "JointKashin", "joint_block_shape", "joint_code"]

EFFORTS = {"fast": 50, "default": 200, "max": 1600}
"""Steps of the annealing; the error falls little from `default` on."""

_BLOCK_SIZE = 4096
# Rows of blocks: without feedback squares; with it, low ones.
_BLOCK_HEIGHT, _FEEDBACK_HEIGHT = 64, 16

# Weights coded at a time, and weights that levels are fitted to where there are more.
# The coder takes up to 7 times its part beside the matrix, half a GB at most.
_PART, _SAMPLE = 2**24, 2**22


@register("kashin-joint")
@dataclasses.dataclass(frozen=True, kw_only=True)
class JointKashin(Method):
    """Joint coding: searches for both rounded factors together; the default method.

    Attributes:
      bits: Code width, 2 to 5 in steps of a half; `SPLITS` says how u and v share it.
      basis: Families of Q1 and Q2.
      block_shape: Shape of the blocks, each searched alone with a scale of its own;
        None takes the divisors nearest to 64 x 64, since long blocks code better, or
        of another `block_height`.
      effort: One of `EFFORTS`.
      balance: Power of the root-mean-square of an input's weights by which they are
        divided before coding, so that strong inputs are not coded at the cost of weak
        ones in the same block; 0 stores no scale per input.
      rotation: Whether blocks are rotated by a second pair of bases before coding. It
        spreads outliers, which u, in the standard basis, would have to hold: at 3 bits
        and Student's t of 3 degrees of freedom the relative squared error is .0214
        with it and .0404 without.
      unshrink: Power of `<w, w> / <w, w_q>`, taken for every output w, by which it is
        scaled after coding. Levels are means, so what is coded is shorter than what
        was; undoing half of that costs a little error and lowers perplexity at 2 bits
        (35.7 against 36.7, six seeds), not at 3 or more. None: 1/2 below 3 bits, 0
        from there on.
      block_height: Rows of blocks of 4096 weights where `block_shape` is None. Error
        feedback is the finer the fewer they are; `for_feedback` takes 16.
    """

    bits: int | float = 4
    basis: BasisSpec = BasisSpec("hadamard", "hadamard")
    block_shape: tuple[int, int] | None = None
    effort: str = "default"
    balance: float = 1.0
    rotation: bool = True
    unshrink: float | None = None
    block_height: int = 64

    takes_inputs: ClassVar[bool] = True
    has_half_scales: ClassVar[bool] = False
    takes_feedback: ClassVar[bool] = True
    takes_output_feedback: ClassVar[bool] = True
    later_fields: ClassVar[frozenset[str]] = frozenset({"block_height"})

    def __post_init__(self) -> None:
        self._as_python()
        if self.bits not in SPLITS:
            raise ValueError(
                "Joint coding exists at 2 to 5 bits in steps of 0.5. Got "
                f"bits={self.bits}."
            )
        if self.effort not in EFFORTS:
            raise ValueError(
                f"`effort` must be one of {', '.join(EFFORTS)}. Got {self.effort!r}."
            )
        if not 0 <= self.balance <= 1:
            raise ValueError(f"`balance` must lie in [0, 1]. Got {self.balance}.")
        if self.unshrink is not None and not 0 <= self.unshrink <= 1:
            raise ValueError(f"`unshrink` must lie in [0, 1]. Got {self.unshrink}.")
        if not 1 <= self.block_height <= _BLOCK_SIZE:
            raise ValueError(
                f"`block_height` must lie in [1, {_BLOCK_SIZE}]. Got "
                f"{self.block_height}."
            )

    @property
    def split(self) -> Split:
        """How many bits of a code are for u and how many for v."""
        return SPLITS[self.bits]

    @property
    def distortion(self) -> float:
        """About the share of a Gaussian's variance that coding loses."""
        # .0695, .0197, .0050 and .00126 at 2, 3, 4 and 5 bits.
        return 1.3 * 4.0**-self.bits

    @property
    def expansion(self) -> float:
        """The power by which outputs are scaled: `unshrink`, or the width's default."""
        if self.unshrink is not None:
            return self.unshrink
        return 0.5 if self.bits < 3 else 0.0

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if a matrix does not divide into suitable blocks."""
        if len(shape) != 2:
            resolve_block_shape(shape, None)
        resolve_block_shape(shape, joint_block_shape((shape[0], shape[1]), self))

    def encode(
        self,
        weight: Float[Array, "m n"],
        key: Key[Array, ""],
        importance: Float[Array, " m"] | None = None,
        in_scale: Float16[Array, " m"] | None = None,
    ) -> Encoded:
        """Encodes a matrix; the key seeds the bases, the rest as for `joint_code`."""
        shape = weight.shape[0], weight.shape[1]
        block_shape = resolve_block_shape(shape, joint_block_shape(shape, self))
        seed, _ = split_key(key)
        basis = make_pair(self.basis, key_from_seed(seed), block_shape)
        spec = self.basis if self.rotation else None
        rotation = None if spec is None else make_rotation(spec, seed, block_shape)
        code = joint_code(
            weight, basis, rotation, self, block_shape, importance, in_scale
        )
        layout = self._layout(weight, block_shape, spec, self.split.v)
        packed, coarse = pack_rows(code.codes, layout)
        return Encoded(KashinTensor(
            packed, code.centroids, code.scale, seed, layout,
            code.in_scale, code.out_scale, coarse,
        ))  # fmt: skip

    def for_feedback(self) -> "JointKashin":
        """With low and wide blocks, unless their shape was chosen."""
        if self.block_shape is not None or self.block_height != _BLOCK_HEIGHT:
            return self
        return dataclasses.replace(self, block_height=_FEEDBACK_HEIGHT)

    def with_feedback(
        self,
        weight: Float[Array, "m n"],
        free: QuantizedTensor,
        moments: Float[Array, "m m"],
    ) -> KashinTensor:
        """Codes a matrix again with the levels and bases of `free`, see the base."""
        return self._fed(weight, free, moments, None)

    def with_feedback_of_both_sides(
        self,
        weight: Float[Array, "m n"],
        free: QuantizedTensor,
        moments: Float[Array, "m m"],
        out_moments: Float[Array, "n n"],
    ) -> KashinTensor:
        """As `with_feedback`, columns of blocks one after another, see the base."""
        return self._fed(weight, free, moments, out_moments)

    def _fed(
        self,
        weight: Float[Array, "m n"],
        free: QuantizedTensor,
        moments: Float[Array, "m m"],
        out_moments: Float[Array, "n n"] | None,
    ) -> KashinTensor:
        assert isinstance(free, KashinTensor), "a tensor of this method"
        layout = free.layout
        bases = free.derive_bases()
        assert bases.basis is not None, "a Kashin tensor has one"
        search = Search(
            split=self.split,
            steps=EFFORTS[self.effort],
            block_shape=layout.block_shape,
            distortion=self.distortion,
            expansion=self.expansion,
            scales_inputs=free.in_scale is not None,
        )
        levels = levels_of_pairs(free.centroids, self.split)
        code = code_with_feedback(
            weight, moments, levels, bases.basis, bases.rotation, search, out_moments
        )
        packed, coarse = pack_rows(code.codes, layout)
        return free.replace(
            packed_codes=packed,
            packed_coarse=coarse,
            scale=code.scale,
            in_scale=(
                code.in_scale.astype(jnp.float16) if search.scales_inputs else None
            ),
            out_scale=code.out_scale.astype(jnp.float16),
        )

    @property
    def most_values(self) -> int:
        """As many as the narrowest codes tell apart."""
        split = self.split
        return 2 ** (split.u + split.v - split.half)

    def encode_few_values(
        self,
        weight: Float[Array, "m n"],
        values: Float[Array, " k"],
        key: Key[Array, ""],
    ) -> Encoded:
        """Signs, constants and the like: u is the matrix, v is zero, nothing rotated.

        Searched for, a constant would be a single peak of every rotated block, which no
        levels suit: .0186 is lost of it at 4 bits, .0050 of a matrix of two values.
        """
        shape = weight.shape[0], weight.shape[1]
        block_shape = resolve_block_shape(shape, joint_block_shape(shape, self))
        codes, centroids = few_values_code(weight, values, self.split)
        layout = self._layout(weight, block_shape, None, None)
        packed, coarse = pack_rows(codes, layout)
        grid = shape[0] // block_shape[0], shape[1] // block_shape[1]
        return Encoded(KashinTensor(
            packed, centroids, jnp.ones(grid, jnp.float32), split_key(key)[0], layout,
            packed_coarse=coarse,
        ))  # fmt: skip

    def _layout(
        self,
        weight: Float[Array, "m n"],
        block_shape: tuple[int, int],
        rotation: BasisSpec | None,
        v_bits: int | None,
    ) -> KashinLayout:
        return KashinLayout(
            shape=(weight.shape[0], weight.shape[1]),
            block_shape=block_shape,
            bits=self.bits,
            basis=self.basis,
            dtype=weight.dtype.name,
            rotation=rotation,
            v_bits=v_bits,
        )

    def common_input_scale(
        self, weights: Iterable[Float[Array, "*stack m _"]]
    ) -> Float16[Array, "*stack m"] | None:
        """The geometric mean of the scales that each matrix would have alone."""
        return common_input_scale(weights, self.balance) if self.balance else None


class JointCode(NamedTuple):
    """Codes, levels and scales that joint coding found, before they are packed.

    Attributes:
      codes: Index of a pair for every weight.
      centroids: All pairs of a level of u and one of v, that of v changing fastest;
        then the pairs of the rows in which u has one bit fewer, if any do.
      scale: Root-mean-square of every block.
      in_scale: Factor of every input, the mean being about 1; None without balance.
      out_scale: Factor of every output, the mean being about 1.
    """

    codes: UInt8[Array, "m n"]
    centroids: Float[Array, "k 2"]
    scale: Float[Array, "r c"]
    in_scale: Float16[Array, " m"] | None
    out_scale: Float16[Array, " n"]


def joint_block_shape(
    shape: tuple[int, int], config: JointKashin
) -> tuple[int, int] | None:
    """The block shape to use for a matrix: the given one, or near 4096 weights.

    Raises:
      ValueError: If the width is not whole and blocks would have an odd number of rows.
    """
    half = config.split.half
    block_shape = config.block_shape
    if block_shape is None and 0 not in shape:
        step = 2 if half and shape[0] % 2 == 0 else 1
        block_shape = (
            _near_divisor(shape[0], config.block_height, step),
            _near_divisor(shape[1], _BLOCK_SIZE // config.block_height, 1),
        )
    if half and block_shape is not None and block_shape[0] % 2:
        raise ValueError(
            f"At {config.bits} bits every second row of a block has one bit fewer, but "
            f"blocks of a matrix of shape {shape} have {block_shape[0]} rows, an odd "
            "number. Choose another block_shape, or a whole number of bits."
        )
    return block_shape


def _near_divisor(size: int, side: int, step: int) -> int:
    divisors = [d for d in range(step, size + 1, step) if size % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / side)))


class _Part(NamedTuple):
    """The code of some columns of a matrix."""

    codes: UInt8[Array, "m p"]
    scale: Float[Array, "r q"]
    out_scale: Float[Array, " p"]
    levels: Levels


@partial(jax.jit, static_argnames=("config", "block_shape", "part_size"))
def joint_code(
    weight: Float[Array, "m n"],
    basis: KroneckerBasis,
    rotation: KroneckerBasis | None,
    config: JointKashin,
    block_shape: tuple[int, int],
    importance: Float[Array, " m"] | None = None,
    in_scale: Float16[Array, " m"] | None = None,
    levels: Levels | None = None,
    *,
    part_size: int = _PART,
) -> JointCode:
    """Balances inputs and outputs, and searches the words of all blocks.

    A huge matrix is coded in parts of whole outputs, with levels fitted to blocks from
    all of it, so that the memory beside it is bounded.

    Args:
      weight: Matrix of any scale, `[in, out]`; must be finite.
      basis: The pair of bases of one block, shared by all blocks.
      rotation: The pair in which blocks are coded; None for the standard one.
      config: Static choices.
      block_shape: Divides the shape of the matrix.
      importance: Weight of every input in the error, the mean square of what the input
        takes, say. The scales of inputs then are those of least weighted error, and
        `balance` is not used.
      in_scale: To use in place of what `balance` gives, see `common_input_scale`.
      levels: Those of the codes, where they are known; None fits them.
      part_size: Weights coded at a time, one column of blocks at least.
    """
    (m, n), width = weight.shape, block_shape[1]
    peak = jnp.max(jnp.abs(weight)).astype(jnp.float32)
    # Squares of 1e30 leave float32, and fp16 scales are relative.
    x = weight.astype(jnp.float32) / jnp.where(peak > 0, peak, 1.0)
    # Outputs first: a few strong ones would otherwise decide what inputs weigh.
    out_scale = relative_rms(x, axis=0, power=1.0)
    if in_scale is None:
        factor = input_scale(
            x / out_scale[None, :],
            config.balance,
            importance,
            config.distortion,
            block_shape[0],
        )
    else:
        factor = in_scale.astype(jnp.float32)

    def coded(
        w: Float[Array, "m p"], scale: Float[Array, " p"], levels: Levels | None = None
    ) -> _Part:
        y = w.astype(jnp.float32) / jnp.where(peak > 0, peak, 1.0) / scale[None, :]
        y = y if factor is None else y / factor[:, None]
        return _code_part(
            y, basis, rotation, config, block_shape, factor, scale, levels
        )

    taken = _most_columns(m, n, width, part_size)
    if taken == n:
        whole = coded(weight, out_scale, levels)
        parts, levels = jax.tree.map(lambda leaf: leaf[None], whole), whole.levels
    else:
        if levels is None:
            sampled = _most_columns(m, n, width, min(part_size, _SAMPLE))
            grid = jnp.arange(n).reshape(sampled // width, -1, width)
            columns = grid[:, 0].reshape(-1)
            levels = coded(weight[:, columns], out_scale[columns]).levels
        known = levels

        def some(start: Int[Array, ""]) -> _Part:
            w = jax.lax.dynamic_slice_in_dim(weight, start, taken, axis=1)
            scale = jax.lax.dynamic_slice_in_dim(out_scale, start, taken)
            return coded(w, scale, known)

        parts = jax.lax.map(some, jnp.arange(0, n, taken))
    return JointCode(
        codes=jnp.moveaxis(parts.codes, 0, 1).reshape(m, n),
        centroids=all_pairs(levels),
        scale=jnp.moveaxis(parts.scale, 0, 1).reshape(m // block_shape[0], -1) * peak,
        in_scale=None if factor is None else factor.astype(jnp.float16),
        out_scale=parts.out_scale.reshape(-1).astype(jnp.float16),
    )


def _most_columns(m: int, n: int, width: int, part_size: int) -> int:
    """The most columns, whole blocks that divide the matrix, of so many weights."""
    counts = [k for k in range(1, n // width + 1) if n // width % k == 0]
    fitting = [k for k in counts if k * width * m <= part_size]
    return width * max(fitting, default=1)


def _code_part(
    x: Float[Array, "m p"],
    basis: KroneckerBasis,
    rotation: KroneckerBasis | None,
    config: JointKashin,
    block_shape: tuple[int, int],
    in_scale: Float[Array, " m"] | None,
    out_scale: Float[Array, " p"],
    levels: Levels | None,
) -> _Part:
    blocks = to_blocks(x, block_shape)
    if rotation is not None:
        blocks = rotation.analysis(blocks)
    scale = jnp.sqrt(jnp.mean(jnp.square(blocks), axis=(2, 3)))
    unit = blocks / jnp.where(scale > 0, scale, 1.0)[..., None, None]
    words = anneal(
        unit.reshape(-1, *block_shape),
        basis,
        split=config.split,
        steps=EFFORTS[config.effort],
        levels=levels,
    )
    if config.expansion:
        coded = (
            decode_words(words, basis).reshape(blocks.shape) * scale[..., None, None]
        )
        coded = coded if rotation is None else rotation.synthesis(coded)
        gain = expansion(x, from_blocks(coded), in_scale) ** config.expansion
        out_scale = as_half(out_scale * gain)
    codes = from_blocks(pair_codes(words, config.split).reshape(blocks.shape))
    return _Part(codes, scale, out_scale, words.levels)
