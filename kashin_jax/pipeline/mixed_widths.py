"""Code widths that differ from layer to layer, under a total budget of stored bits.

They follow how much a model's predictions suffer from errors in each layer, which takes
no data: the text is the model's own, sampled from it. Each layer in turn is coded at 2
bits, all others left as they are, and the distributions of the next token are compared
with those of the whole model. Where the model does not run here, widths follow the
squared errors of weights instead.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import Checkpoint
from kashin_jax.methods import JointKashin
from kashin_jax.models.generation import CausalLM, generate
from kashin_jax.models.loading import load_model
from kashin_jax.models.registry import ARCHITECTURES
from kashin_jax.pipeline.allocate import JOINT_ERRORS, allocate_widths
from kashin_jax.pipeline.checkpoint_plan import plan_checkpoint, stored_kernel
from kashin_jax.pipeline.nnx import replace_kernels
from kashin_jax.pipeline.plan import Choice, Plan, packed_size
from kashin_jax.pipeline.resume import KeptNumbers
from kashin_jax.pipeline.rules import Rule, Rules
from kashin_jax.pipeline.run import LayerQuantizer
from kashin_jax.progress import progress_bar
from kashin_jax.tensors import dequantize

__all__ = [
    "LENGTH",
    "WINDOWS",
    "Widths",
    "layer_sensitivities",
    "mixed_checkpoint_rules",
    "mixed_layers",
    "mixed_rules",
    "mixed_widths",
    "probe",
    "sampled_text",
    "squared_norm",
    "why_it_does_not_run",
]

Width = int | float

WINDOWS = 4
"""Sampled texts."""

LENGTH = 256
"""Tokens of each, if the model has so many positions."""


class Widths(NamedTuple):
    """Who got which width, and by what.

    Attributes:
      bits: By path of the layer.
      criterion: What errors in a layer were weighed by, in a few words.
    """

    bits: Mapping[str, Width]
    criterion: str

    def __str__(self) -> str:
        found = list(self.bits.values())
        counts = (f"{found.count(w)} at {w}" for w in sorted(set(found)))
        return f"Bits of layers, by {self.criterion}: {', '.join(counts)}."


def probe(config: JointKashin) -> JointKashin:
    """How layers are coded to measure what their errors do."""
    return dataclasses.replace(config, bits=min(JOINT_ERRORS), effort="fast")


def sampled_text(model: CausalLM, key: Key[Array, ""]) -> Int[Array, "w t"]:
    """Texts drawn from the model itself at temperature 1, each from its first token."""
    begin = model.config.bos_token_id
    prompts = jnp.full((WINDOWS, 1), 0 if begin is None else begin, jnp.int32)
    length = min(LENGTH, model.config.context_length)
    return generate(model, prompts, max_new_tokens=length - 1, temperature=1.0, key=key)


def layer_sensitivities(
    model: Any,
    coded: Mapping[str, Callable[[], tuple[Float[Array, "m n"], float]]],
    key: Key[Array, ""],
    done: Sequence[float] = (),
    keep: Callable[[float], None] = lambda value: None,
) -> dict[str, float]:
    """Divergence of the next-token distributions per relative squared error.

    For each layer the mean Kullback-Leibler divergence, in nats, of the whole model's
    distribution from that of the model with this layer decoded, over the relative
    squared error of the layer; 0 for a layer without error.

    Args:
      model: A language model in full precision.
      coded: Of every layer, gives what is decoded of it, coded at a width at which
        errors tell, and its relative squared error. Called for one layer at a time.
      key: Of the sampled text.
      done: What an interrupted call found of the first layers.
      keep: Called with what is found of each further one.
    """
    found = list(done)
    rest = list(coded.items())[len(found) :]
    if rest:
        tokens = sampled_text(model, key)
        graphdef, state = nnx.split(model)
        whole = _log_probabilities(graphdef, state, tokens)
    total, label = len(coded), "sensitivity"
    with progress_bar(total, "layers", initial=len(found), desc=label) as progress:
        for path, decoded in rest:
            kernel, error = decoded()
            graphdef, state = nnx.split(replace_kernels(model, {path: kernel}))
            divergence = float(_divergence(graphdef, state, tokens, whole))
            # Rounding may leave a divergence of zero slightly below it.
            value = max(divergence, 0.0) / error if error > 0 else 0.0
            keep(value)
            found.append(value)
            progress.update(1)
    return dict(zip(coded, found, strict=True))


@partial(jax.jit, static_argnums=0)
def _log_probabilities(
    graphdef: Any, state: Any, tokens: Int[Array, "w t"]
) -> Float[Array, "w t v"]:
    logits = nnx.merge(graphdef, state)(tokens)
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


# One compilation for all layers: parameters are arguments.
@partial(jax.jit, static_argnums=0)
def _divergence(
    graphdef: Any,
    state: Any,
    tokens: Int[Array, "w t"],
    whole: Float[Array, "w t v"],
) -> Float[Array, ""]:
    other = _log_probabilities(graphdef, state, tokens)
    return jnp.mean(optax.losses.kl_divergence_with_log_targets(other, whole))


@jax.jit
def squared_norm(kernel: Float[Array, "*stack m n"]) -> Float[Array, ""]:
    """The sum of squares: what a relative squared error of 1 is of the weights'."""
    return jnp.sum(jnp.square(kernel.astype(jnp.float32)))


def mixed_widths(
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    sensitivities: Mapping[str, float],
    config: JointKashin,
    budget: Width,
) -> dict[str, Width]:
    """The width of every layer.

    Args:
      shapes: Shape and type of every layer's matrix, or stack of them, by path.
      sensitivities: What a relative squared error of 1 costs, by path.
      config: The method at any width.
      budget: Stored bits per weight of all these layers together.

    Raises:
      ValueError: If the budget is too small for the narrowest width.
    """
    widths = list(JOINT_ERRORS)
    configs = [dataclasses.replace(config, bits=width) for width in widths]
    return allocate_widths(
        {path: math.prod(shape) for path, (shape, _) in shapes.items()},
        {path: [_overhead(*each, c) for c in configs] for path, each in shapes.items()},
        sensitivities,
        widths,
        list(JOINT_ERRORS.values()),
        budget,
    )


def _overhead(shape: tuple[int, ...], dtype: str, config: JointKashin) -> Width:
    """Bits stored beside the codes; infinite where the layer cannot have the width."""
    (m, n), count = shape[-2:], math.prod(shape[:-2])
    try:
        size = packed_size((m, n), dtype, config)
    except ValueError:
        return math.inf
    return count * (size - config.bits * m * n)


def mixed_layers(plan: Plan, rules: Rules) -> list[Choice]:
    """The layers that share a budget: all that no rule of their own speaks about."""
    return [
        layer.choice
        for layer in plan.quantized
        if not any(map(rules.names, layer.choice.candidate.paths))
    ]


def mixed_rules(
    rules: Rules, layers: Collection[Choice], widths: Mapping[str, Width]
) -> Rules:
    """Rules that give every layer its width: one rule for each width.

    Args:
      rules: They come first.
      layers: From `mixed_layers`.
      widths: By the first path of each of them.
    """
    added = []
    for width in sorted(set(widths.values())):
        own = [each for each in layers if widths[each.path] == width]
        paths = (re.escape(path) for each in own for path in each.candidate.paths)
        config = rules.config.with_fields({"bits": width})
        added.append(Rule(f"^({'|'.join(paths)})$", config))
    return dataclasses.replace(rules, rules=(*rules.rules, *added))


def mixed_checkpoint_rules(
    source: Checkpoint,
    rules: Rules,
    budget: int | float,
    seed: int = 0,
    kept: KeptNumbers | None = None,
) -> tuple[Rules, Widths]:
    """Gives every layer that no rule names a width under a budget of stored bits.

    Where the architecture is a language model that runs here, errors are weighed by
    what they do to its predictions, see `layer_sensitivities`, for which it is loaded
    in float32. Elsewhere the sum of the squared errors of all weights is lowered.

    Args:
      source: The checkpoint.
      rules: Their `config` is joint coding, of any width.
      budget: Stored bits per weight of these layers together.
      seed: Of the sampled text, and of the codes.
      kept: What an interrupted call measured.

    Returns:
      Rules with a rule for each width behind those given, and who got which.

    Raises:
      UsageError: If the method is another one, or the budget is too small.
    """
    config = rules.config
    if not isinstance(config, JointKashin):
        raise UsageError(
            f"`budget` is for joint coding, which has widths from 2 to 5 bits. Got "
            f"the method {config.name}."
        )
    # The narrowest, as nothing is known yet.
    rules = dataclasses.replace(rules, config=probe(config))
    layers = mixed_layers(plan_checkpoint(source, rules), rules)
    felt, criterion = _sensitivities(source, rules, layers, seed, kept)
    shapes = {c.path: (c.candidate.shape, c.candidate.dtype) for c in layers}
    try:
        bits = mixed_widths(shapes, felt, config, budget)
    except ValueError as error:
        raise UsageError(str(error)) from None
    rules = dataclasses.replace(rules, config=config)
    return mixed_rules(rules, layers, bits), Widths(bits, criterion)


def why_it_does_not_run(
    source: Checkpoint, *, takes_encoders: bool = False
) -> str | None:
    """Why a checkpoint is no language model that runs here; None if it is one.

    Args:
      source: The checkpoint.
      takes_encoders: Whether a classifier, or its encoder, will do, too.
    """
    architecture = ARCHITECTURES.get(str(source.config.get("model_type")))
    does_not = f"the model does not {'run' if takes_encoders else 'generate'} here"
    if architecture is None or (architecture.head is not None and not takes_encoders):
        return does_not
    try:
        architecture.config.from_dict(source.config, "config.json")
    except CheckpointError as error:
        return f"{does_not} ({error})"
    return None


def _sensitivities(
    source: Checkpoint,
    rules: Rules,
    layers: Sequence[Choice],
    seed: int,
    kept: KeptNumbers | None,
) -> tuple[dict[str, float], str]:
    """What an error in each layer costs, and what that is measured by."""
    if (why := why_it_does_not_run(source)) is not None:
        norms = {c.path: float(squared_norm(stored_kernel(source, c))) for c in layers}
        return norms, f"squared errors of weights, as {why}"
    root = jax.random.key(seed)
    quantizer = LayerQuantizer(layers, rules, root, lambda c: stored_kernel(source, c))

    def decoded(choice: Choice) -> tuple[Array, float]:
        tensor, report = quantizer(choice)
        return dequantize(tensor, "float32"), float(report.relative_squared_error)

    felt = layer_sensitivities(
        load_model(source).model,
        {choice.path: partial(decoded, choice) for choice in layers},
        root,
        kept.load() if kept else (),
        kept.append if kept else lambda value: None,
    )
    return felt, "what their errors do to predictions"
