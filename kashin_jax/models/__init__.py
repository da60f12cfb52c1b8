"""Models in Flax NNX, and loaders for their published checkpoints."""

from kashin_jax.models.generation import generate as generate
from kashin_jax.models.loading import LoadedModel as LoadedModel
from kashin_jax.models.loading import load_opt as load_opt
from kashin_jax.models.opt import KVCache as KVCache
from kashin_jax.models.opt import OPTConfig as OPTConfig
from kashin_jax.models.opt import OPTForCausalLM as OPTForCausalLM
from kashin_jax.models.saving import save_opt as save_opt

__all__ = [
    "KVCache",
    "LoadedModel",
    "OPTConfig",
    "OPTForCausalLM",
    "generate",
    "load_opt",
    "save_opt",
]
