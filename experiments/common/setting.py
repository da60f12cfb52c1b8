"""What the figures share: the seed, the model's layers, and which of them is hard."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import jax
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments.common.flag_values import short_model_name
from kashin_jax import BasisSpec, KroneckerBasis, kashin_decompose, make_pair
from kashin_jax.models.loading import load_opt
from kashin_jax.pipeline import path_key, selected_kernels

__all__ = ["PAPER_LAYERS", "Setting", "layer_basis", "survey"]

PAPER_LAYERS = (
    "decoder/layers/0/fc1",
    "decoder/layers/0/self_attn/q_proj",
    "decoder/layers/3/fc2",
)
"""fc1 and q_proj are those of Figure 3; the follow-up names fc2 as a failure."""

SURVEY_FAMILY = "hadamard"
SURVEY_STEPS = 100
SURVEY_RTOL = 1e-6
EARLY_STEPS = 4

Kernels = Mapping[str, Float[Array, "_ _"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Loaded and measured when first asked for, then kept.

    Attributes:
      model: Directory or hub id of an OPT checkpoint.
      seed: Of everything random.
    """

    model: str
    seed: int

    @property
    def key(self) -> Key[Array, ""]:
        """The root of all keys."""
        return jax.random.key(self.seed)

    @property
    def model_name(self) -> str:
        """As the titles have it."""
        return short_model_name(self.model)

    @cached_property
    def kernels(self) -> Kernels:
        """Every linear layer of the model, `[in, out]`.

        Raises:
          CheckpointError: If the checkpoint is missing or damaged.
        """
        return selected_kernels(load_opt(self.model).model)

    @cached_property
    def survey(self) -> list[dict[str, Any]]:
        """How every layer converges, hardest first."""
        return survey(self.kernels, self.key)

    @property
    def hard_layer(self) -> str:
        """The layer with the largest residual left."""
        return self.survey[0]["layer"]

    @property
    def lossy_layer(self) -> str:
        """The layer with the largest residual after the steps that 4 bits pay for.

        A code of b bits loses about as much as b steps leave.
        """
        return max(self.survey, key=lambda r: r["early_residual"])["layer"]

    @property
    def good_layer(self) -> str:
        """The paper's q_proj, or in another model the easiest layer."""
        usual = PAPER_LAYERS[1]
        return usual if usual in self.kernels else self.survey[-1]["layer"]


def layer_basis(
    key: Key[Array, ""], layer: str, family: str, kernel: Float[Array, "m n"]
) -> KroneckerBasis:
    """The pair of bases of a layer: the same in every figure."""
    m, n = kernel.shape
    return make_pair(BasisSpec(family, family), path_key(key, layer), (m, n))


def survey(
    kernels: Kernels,
    key: Key[Array, ""],
    *,
    family: str = SURVEY_FAMILY,
    max_steps: int = SURVEY_STEPS,
) -> list[dict[str, Any]]:
    """Decomposes every layer in one basis; one record each, largest residual first.

    Args:
      kernels: The layers.
      key: Root of the keys.
      family: Of both bases.
      max_steps: Greedy steps at the most.
    """

    @jax.jit
    def residuals(kernel: Float[Array, "m n"], basis: KroneckerBasis) -> Any:
        run = partial(kashin_decompose, kernel, basis, rtol=SURVEY_RTOL)
        full, early = run(max_steps=max_steps), run(max_steps=EARLY_STEPS)
        return full.residual, full.num_steps, full.converged, early.residual

    records = []
    for layer, kernel in tqdm(kernels.items(), "layers", disable=None, leave=False):
        basis = layer_basis(key, layer, family, kernel)
        residual, steps, converged, early = jax.device_get(residuals(kernel, basis))
        records.append({
            "part": "survey", "layer": layer, "shape": list(kernel.shape),
            "family": family, "max_steps": max_steps, "rtol": SURVEY_RTOL,
            "residual": float(residual), "steps": int(steps),
            "converged": bool(converged), "early_steps": EARLY_STEPS,
            "early_residual": float(early),
        })  # fmt: skip
    # Within the tolerance the steps tell which layer was harder.
    return sorted(
        records, key=lambda r: (max(r["residual"], SURVEY_RTOL), r["steps"]),
        reverse=True,
    )  # fmt: skip
