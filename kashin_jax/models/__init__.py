"""Models in Flax NNX, and loaders for their published checkpoints.

An architecture is one file, which ends in its entry, and one line in `registry.py`.
"""

from kashin_jax.models.bert import ClassifierConfig as ClassifierConfig
from kashin_jax.models.bert import SequenceClassifier as SequenceClassifier
from kashin_jax.models.decoder import DecoderForCausalLM as DecoderForCausalLM
from kashin_jax.models.decoder_config import DecoderConfig as DecoderConfig
from kashin_jax.models.generation import generate as generate
from kashin_jax.models.loading import LoadedClassifier as LoadedClassifier
from kashin_jax.models.loading import LoadedModel as LoadedModel
from kashin_jax.models.loading import head_names as head_names
from kashin_jax.models.loading import load_classifier as load_classifier
from kashin_jax.models.loading import load_language_model as load_language_model
from kashin_jax.models.loading import load_model as load_model
from kashin_jax.models.loading import load_opt as load_opt
from kashin_jax.models.opt import OPTConfig as OPTConfig
from kashin_jax.models.opt import OPTForCausalLM as OPTForCausalLM
from kashin_jax.models.saving import save_classifier as save_classifier
from kashin_jax.models.saving import save_model as save_model
from kashin_jax.models.saving import save_opt as save_opt
from kashin_jax.models.transformer import KVCache as KVCache

__all__ = [
    "ClassifierConfig",
    "DecoderConfig",
    "DecoderForCausalLM",
    "KVCache",
    "LoadedClassifier",
    "LoadedModel",
    "OPTConfig",
    "OPTForCausalLM",
    "SequenceClassifier",
    "generate",
    "head_names",
    "load_classifier",
    "load_language_model",
    "load_model",
    "load_opt",
    "save_classifier",
    "save_model",
    "save_opt",
]
