"""The rows of the perplexity table: the paper's method and its controls."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from kashin_jax import (
    HQQ,
    NF4,
    RTN,
    AlternatingKashin,
    BasisSpec,
    ChannelKMeans,
    GreedyKashin,
    JointKashin,
    KMeans,
    Rotated,
    Uniform,
)
from kashin_jax.errors import UsageError
from kashin_jax.methods import Method
from kashin_jax.methods.joint.schedules import SPLITS
from kashin_jax.pipeline import Refinement

__all__ = [
    "AS_STORED",
    "CALIBRATED_METHODS",
    "FULL_PRECISION",
    "GLUE_CALIBRATED",
    "GLUE_METHODS",
    "JOINT",
    "METHODS",
    "GridRow",
    "RowKind",
    "Width",
    "choose_methods",
    "joint_config",
    "table_grid",
]

FULL_PRECISION = "full precision"
REFINED_CONTROL = "full precision, refined"
AS_STORED = "as stored"
JOINT = "kashin-joint"

Width = int | float

MakeConfig = Callable[[Width, BasisSpec, float, int], Method]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowKind:
    """One kind of row.

    Attributes:
      make: The configuration for a width, a basis, a tolerance and a step limit;
        raises ValueError, with the reason, where the method does not exist.
      note: Group size, type of the scales, and where it comes from.
      has_basis: Whether the basis matters, so that each basis is a row.
      is_random: Whether the seed matters, so that each seed is a row.
      has_limits: Whether tolerance and step limit matter.
      keeps_failures: Whether layers that do not converge stay in full precision.
      mixes_widths: Whether a width between its own is met as a budget of stored bits,
        by widths that differ from layer to layer.
      is_calibrated: Whether layers are coded with a text, by error feedback.
      weighting: What tokens of that text weigh, see `Calibration`.
      is_asymmetric: Whether layers make up for what earlier ones lost, see
        `Calibration`.
      refinement: How what decodes the codes then learns from that text; None for not.
    """

    make: MakeConfig
    note: str
    has_basis: bool = False
    is_random: bool = False
    has_limits: bool = False
    keeps_failures: bool = False
    mixes_widths: bool = False
    is_calibrated: bool = False
    weighting: str | None = None
    is_asymmetric: bool = False
    refinement: Refinement | None = None

    def is_budget(self, bits: Width) -> bool:
        """Whether `bits` is met by mixing widths."""
        own = sorted(SPLITS)
        return self.mixes_widths and own[0] <= bits <= own[-1] and bits not in own

    def choices(
        self, basis: BasisSpec, seed: int, rtol: float, max_steps: int
    ) -> dict[str, str | int | float | None]:
        """Fields of a record beside method and bits; None where one does not matter."""
        return {
            "basis": str(basis) if self.has_basis else None,
            "seed": seed if self.is_random else None,
            "rtol": rtol if self.has_limits else None,
            "max_steps": max_steps if self.has_limits else None,
        }


def _whole(bits: Width) -> int:
    if bits != int(bits):
        raise ValueError(
            f"This method exists at whole numbers of bits only. Got bits={bits}."
        )
    return int(bits)


def _kashin(bits: Width, basis: BasisSpec, rtol: float, max_steps: int) -> Method:
    return GreedyKashin(bits=_whole(bits), basis=basis, rtol=rtol, max_steps=max_steps)


def joint_config(bits: Width, basis: BasisSpec, *_: object) -> JointKashin:
    """The method of the rows of joint coding."""
    return JointKashin(bits=bits, basis=basis)


METHODS: Mapping[str, RowKind] = {
    "kashin": RowKind(
        make=_kashin,
        note="The 2024 paper's method on every layer, converged or not: one codebook "
        "of 2^b float32 pairs and one float32 scale per matrix, bases from a 64-bit "
        "seed.",
        has_basis=True,
        is_random=True,
        has_limits=True,
    ),
    "kashin-authors": RowKind(
        make=_kashin,
        note="As the authors' OPT script does it: layers that did not converge are "
        "left in full precision, and counted so here.",
        has_basis=True,
        is_random=True,
        has_limits=True,
        keeps_failures=True,
    ),
    JOINT: RowKind(
        make=joint_config,
        note="Both factors searched for together, the bits of a code shared by u and "
        "v, blocks of about 64 x 64: one codebook per matrix, a float32 scale per "
        "block, an fp16 scale per input and per output, a 64-bit seed.",
        has_basis=True,
        is_random=True,
        mixes_widths=True,
    ),
    "kashin-dct": RowKind(
        make=lambda bits, *_: AlternatingKashin(bits=_whole(bits)),
        note="The 2026 paper's method without data: every output's column alone, a "
        "sign-DCT basis, steps u, u, v, v, closed-form centres, half of the bits for "
        "either factor: at 4 bits four fp16 magnitudes per column, and a 64-bit seed "
        "per matrix.",
        is_random=True,
    ),
    "uniform": RowKind(
        make=lambda bits, *_: Uniform(bits=_whole(bits)),
        note="Per-tensor min-max grid, one float32 step and offset per matrix.",
    ),
    "k-means": RowKind(
        make=lambda bits, *_: KMeans(bits=_whole(bits)),
        note="Per-tensor 1-D k-means, 2^b float32 levels and one float32 scale per "
        "matrix.",
        is_random=True,
    ),
    "rtn-channel": RowKind(
        make=lambda bits, *_: RTN(bits=_whole(bits), group_size=None),
        note="Round-to-nearest, asymmetric, fp16 step and b-bit zero point per output "
        "channel.",
    ),
    "rtn-g128": RowKind(
        make=lambda bits, *_: RTN(bits=_whole(bits), group_size=128),
        note="Round-to-nearest, asymmetric, fp16 step and b-bit zero point per group "
        "of 128.",
    ),
    "nf4-g64": RowKind(
        make=lambda bits, *_: NF4(bits=_whole(bits)),
        note="NF4, fp16 scale per group of 64, no double quantization.",
    ),
    "hqq-g64": RowKind(
        make=lambda bits, *_: HQQ(bits=_whole(bits)),
        note="HQQ: the zero point fitted by half-quadratic steps, fp16 step and fp16 "
        "zero point per group of 64.",
    ),
    "rotate-rtn-g64": RowKind(
        make=lambda bits, basis, *_: Rotated(
            RTN(bits=_whole(bits), group_size=64), basis
        ),
        note="The Kashin row's bases as a rotation, then round-to-nearest, asymmetric "
        "(RTN + Hadamard): fp16 step and b-bit zero point per group of 64, a 64-bit "
        "seed per matrix.",
        has_basis=True,
        is_random=True,
    ),
    "k-means-channel": RowKind(
        make=lambda bits, *_: ChannelKMeans(bits=_whole(bits)),
        note="1-D k-means per output channel: 2^b fp16 levels per channel, one float32 "
        "scale per matrix.",
        is_random=True,
    ),
    "rotate-k-means": RowKind(
        make=lambda bits, basis, *_: Rotated(KMeans(bits=_whole(bits)), basis),
        note="The Kashin row's bases as a rotation, then per-tensor 1-D k-means: "
        "2^b float32 levels, one float32 scale and a 64-bit seed per matrix.",
        has_basis=True,
        is_random=True,
    ),
}


_FEEDBACK = (
    "Error feedback by second moments of the inputs, with the damping that loses least "
    "on held-out windows, or none where that is best; see docs/calibration.md."
)

_REFINED = (
    "Then scales, levels, biases and norms learn from the same text with the codes "
    "fixed, block by block and end to end; see docs/calibration.md."
)

CALIBRATED_METHODS: Mapping[str, RowKind] = {
    "kashin-joint-calibrated": RowKind(
        make=joint_config,
        note=f"Joint coding, blocks of about 16 x 256, calibrated. {_FEEDBACK}",
        has_basis=True,
        is_random=True,
        is_calibrated=True,
    ),
    "kashin-dct-calibrated": RowKind(
        make=lambda bits, *_: AlternatingKashin(bits=_whole(bits)),
        note="The 2026 paper's method: as kashin-dct with every input's row alone, "
        f"calibrated. {_FEEDBACK}",
        is_random=True,
        is_calibrated=True,
    ),
    "rotate-kashin-dct-calibrated": RowKind(
        make=lambda bits, basis, *_: Rotated(
            AlternatingKashin(bits=_whole(bits)), basis
        ),
        note="The same of a rotated matrix, the 2026 paper's Kashin-DCT+H. "
        f"{_FEEDBACK}",
        has_basis=True,
        is_random=True,
        is_calibrated=True,
    ),
    "gptq-g128": RowKind(
        make=lambda bits, *_: RTN(bits=_whole(bits), group_size=128),
        note=f"GPTQ: round-to-nearest as in rtn-g128, calibrated. {_FEEDBACK}",
        is_random=True,
        is_calibrated=True,
    ),
    "kashin-joint-asymmetric": RowKind(
        make=joint_config,
        note="As kashin-joint-calibrated, every layer being coded for what it would "
        "give in full precision, from what it reads behind quantized layers.",
        has_basis=True,
        is_random=True,
        is_calibrated=True,
        is_asymmetric=True,
    ),
    "gptq-g128-asymmetric": RowKind(
        make=lambda bits, *_: RTN(bits=_whole(bits), group_size=128),
        note="GPTAQ: as gptq-g128, every layer being coded for what it would give in "
        "full precision.",
        is_random=True,
        is_calibrated=True,
        is_asymmetric=True,
    ),
    "kashin-joint-two-sided": RowKind(
        make=joint_config,
        note="As kashin-joint-asymmetric, errors of outputs weighed by the second "
        "moments of the loss's gradient there and fed back, too, as YAQA has it.",
        has_basis=True,
        is_random=True,
        is_calibrated=True,
        weighting="outputs",
        is_asymmetric=True,
    ),
    "kashin-joint-weighted": RowKind(
        make=joint_config,
        note="As kashin-joint-calibrated, tokens weighed by the squared gradient of "
        "the loss with respect to each layer's outputs.",
        has_basis=True,
        is_random=True,
        is_calibrated=True,
        weighting="gradient",
    ),
    "kashin-joint-refined": RowKind(
        make=joint_config,
        note=f"As kashin-joint-calibrated. {_REFINED}",
        has_basis=True,
        is_random=True,
        is_calibrated=True,
        refinement=Refinement(),
    ),
    "kashin-joint-distilled": RowKind(
        make=joint_config,
        note="As kashin-joint-refined, learning end to end from the predictions of the "
        "full precision alone.",
        has_basis=True,
        is_random=True,
        is_calibrated=True,
        refinement=Refinement(text_weight=0.0),
    ),
    "gptq-g128-refined": RowKind(
        make=lambda bits, *_: RTN(bits=_whole(bits), group_size=128),
        note=f"As gptq-g128. {_REFINED}",
        is_random=True,
        is_calibrated=True,
        refinement=Refinement(),
    ),
    "gptq-g128-act-order": RowKind(
        make=lambda bits, *_: RTN(bits=_whole(bits), group_size=128, act_order=True),
        note="GPTQ in order of descending second moments (act-order), steps of groups "
        f"as in rtn-g128, so that no order is stored. {_FEEDBACK}",
        is_random=True,
        is_calibrated=True,
    ),
    "rotate-k-means-calibrated": RowKind(
        make=lambda bits, basis, *_: Rotated(KMeans(bits=_whole(bits)), basis),
        note=f"As rotate-k-means, calibrated. {_FEEDBACK}",
        has_basis=True,
        is_random=True,
        is_calibrated=True,
    ),
}
"""Rows that need a text beside the model."""

# The paper's three rows, then the controls that it lacks.
GLUE_METHODS = (
    "uniform", "k-means", "kashin", "rtn-g128", "nf4-g64", "rotate-k-means",
)  # fmt: skip


GLUE_CALIBRATED: Mapping[str, RowKind] = {
    name: kind
    for name, kind in CALIBRATED_METHODS.items()
    if kind.weighting is None and kind.refinement is None
}
"""Those of them that classifiers have: the others need a loss at every token."""


def choose_methods(
    names: tuple[str, ...],
    everything: tuple[str, ...] = tuple(METHODS),
    *,
    calibrated: Mapping[str, RowKind] | None = None,
) -> dict[str, RowKind]:
    """The named methods in the order of the table.

    Full precision is always the first row and may be named.

    Args:
      names: Of `METHODS`, or `all`.
      everything: What `all` stands for; its order comes before that of `METHODS`.
      calibrated: Of `CALIBRATED_METHODS`, those that there is a text for, which `all`
        then stands for, too; None where there is none.

    Raises:
      UsageError: If a name is unknown or none is given, or there is a text and no
        method for it.
    """
    kinds = {**METHODS, **(calibrated or {})}
    for name in names:
        if name in CALIBRATED_METHODS and calibrated is None:
            raise UsageError(f"`--methods`: `{name}` needs `--calibration`.")
        if name not in {"all", FULL_PRECISION, *kinds}:
            raise UsageError(
                f"`--methods` has no `{name}`. Choose all or from: {', '.join(kinds)}."
            )
    if not names:
        raise UsageError(f"`--methods` is empty. Choose from: {', '.join(kinds)}.")
    everything = (*everything, *(calibrated or ()))
    chosen = {*names, *(everything if "all" in names else ())}
    order = dict.fromkeys((*everything, *kinds))
    found = {name: kinds[name] for name in order if name in chosen}
    if calibrated is not None and not any(m.is_calibrated for m in found.values()):
        raise UsageError(
            f"`--calibration` is for the methods {', '.join(calibrated)}; name one, or "
            "leave it out."
        )
    return found


class GridRow(NamedTuple):
    """The method, width and seed that a row of a table is made from."""

    bits: Width
    name: str
    method: RowKind
    basis: BasisSpec
    seed: int


def table_grid(
    widths: Sequence[Width],
    methods: Mapping[str, RowKind],
    bases: Sequence[BasisSpec],
    seeds: Sequence[int],
) -> Iterator[GridRow]:
    """The rows of a table in order; bases and seeds only where they matter."""
    for bits, (name, method) in itertools.product(widths, methods.items()):
        own_bases = bases[: None if method.has_basis else 1]
        own_seeds = seeds[: None if method.is_random else 1]
        for basis, seed in itertools.product(own_bases, own_seeds):
            yield GridRow(bits, name, method, basis, seed)
