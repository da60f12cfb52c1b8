"""What the tensors of a checkpoint are: a table of families, and defaults otherwise.

Which are matrices of linear layers, and in which orientation they are stored; which are
heads, embeddings, norms or routers, that published tables leave in full precision. Most
families need no row: their names tell. `make oracle-torch` compares what is said here
with the modules of every family that transformers has.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from kashin_jax.models.names import TABLES, LayerName, Names
from kashin_jax.models.registry import ARCHITECTURES, names_of

__all__ = [
    "DEFAULT_KINDS",
    "FAMILIES",
    "QUANTIZED_KINDS",
    "FamilyRoles",
    "TensorRole",
    "TensorRoles",
    "default_kind",
    "has_names",
    "is_bias",
    "is_outer",
    "tensor_roles",
]

DEFAULT_KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # By what they are. A head is whatever turns the last features into answers.
        "head": (
            r"(^|/)((\w+_)?head|(\w+_)?classifier|score|qa_outputs|\w*logits(_\w+)?)(/|$)",
            r"(^|/)(embed_out|output_layer|vocab_projector|dense_prediction|to_logits)(/|$)",
            r"(^|/)(predictions/decoder|seq_relationship|predict_(state|action|return))(/|$)",
            # Names that blocks have, too: heads at the top alone.
            r"^(proj_out|decoder|output|unembed(ding)?)$",
        ),
        "embedding": (
            rf"(^|[/_])({TABLES}|embed_out)(/|$)",
            r"(^|/)(relative_(attention|position)_bias|rel_pos_bias|position_bias)(/|$)",
            # Learned rows that take the place of tokens.
            r"(^|/)(\w+_tokens?|codebook|query_feat|queries_features)$",
            r"(^|/)(\w*embeddings_table|(input|position)_embeds_layers?(/\d+)?)$",
        ),
        "norm": (r"(^|[/_])(norm|layer_?norm|rms_?norm|ln(_\w+)?)(/|$)",),
        # Who gets a token hangs on small differences of a few numbers. Not `gate_proj`.
        "router": (r"(^|/)((\w+_)?router|gate|shared_expert_gate)(/|$)",),
    }
)
"""What stays in full precision unless a rule names it, by patterns of paths."""

QUANTIZED_KINDS = ("linear", "experts")
"""Kinds that are quantized unless a rule says otherwise."""

# What holds a matrix, by its last name: PyTorch's, Flax's, Flax's of embeddings.
_MATRICES = ("weight", "kernel", "embedding")
# Experts in one array, an axis for them in front: `experts.gate_up_proj` and Granite's
# `block_sparse_moe.input_linear.weight`.
_EXPERTS = r"(^|[./])(experts|block_sparse_moe)[./]"
_OUTPUT = re.compile(r"(^|[./])(down_proj|w2|wo|output_linear)([./]|$)")


class TensorRole(NamedTuple):
    """What a tensor is.

    Attributes:
      kind: One of `QUANTIZED_KINDS` or `DEFAULT_KINDS`, or `step` (time steps of state
        spaces), `convolution`, `bias`, `vector`, `other`.
      path: Of its layer, as rules name it.
      is_transposed: Whether its matrices are stored as `[out, in]`.
      is_matrix: Whether it is a matrix or a stack of them, which could be packed.
      by_table: Whether the family's row says the kind, and no default.
      is_outer: Whether it belongs to an embedding or a head.
    """

    kind: str
    path: str
    is_transposed: bool
    is_matrix: bool
    by_table: bool
    is_outer: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyRoles:
    """What is different in a family of models; patterns are searched for in paths.

    Attributes:
      kinds: A pattern and the kind of what it is found in; the first one decides.
      inputs_first: Matrices that are `[in, out]`, though not called `kernel`.
      matrices: Parameters that are matrices, though not called `weight`.
      experts: Stacks of experts beside those that are called so.
      experts_inputs_first: Whether stacks are `[experts, in, out]`; None leaves it to
        the number of hidden features.
    """

    kinds: Sequence[tuple[str, str]] = ()
    inputs_first: str | None = None
    matrices: str | None = None
    experts: str | None = None
    experts_inputs_first: bool | None = None


# Their Conv1D calls a matrix `weight` and stores it as [in, out]. Heads are linears.
_CONV1D = FamilyRoles(inputs_first=r"(^|/)(c_attn|c_proj|c_fc|q_attn)$")
_INPUTS_FIRST = FamilyRoles(experts_inputs_first=True)
_OUTPUTS_FIRST = FamilyRoles(experts_inputs_first=False)
# A few features become the step of every channel, which is exponentiated.
_STATE_SPACE = FamilyRoles(kinds=((r"(^|/)dt_proj$", "step"),))
_QUERIES = FamilyRoles(kinds=((r"^query$", "embedding"),))
_REFERENCES = FamilyRoles(kinds=((r"(^|/)reference_points$", "embedding"),))
_SIGLIP_PROJECTOR = FamilyRoles(
    matrices=r"(^|/)mm_input_projection_weight$",
    inputs_first=r"(^|/)mm_input_projection_weight$",
)

FAMILIES: Mapping[str, FamilyRoles] = MappingProxyType(
    dict.fromkeys(("gpt2", "openai-gpt", "decision_transformer", "imagegpt"), _CONV1D)
    | dict.fromkeys(("clvp", "clvp_decoder"), _CONV1D)
    | dict.fromkeys(("gpt_oss", "openai_privacy_filter"), _INPUTS_FIRST)
    | dict.fromkeys(("llama4", "llama4_text", "aria", "aria_text"), _INPUTS_FIRST)
    # Its experts work on fewer features than its blocks.
    | dict.fromkeys(("muse_spark", "muse_spark_text"), _OUTPUTS_FIRST)
    | dict.fromkeys(("mamba", "falcon_mamba", "jamba"), _STATE_SPACE)
    | dict.fromkeys(("eomt", "eomt_dinov3", "videomt"), _QUERIES)
    | dict.fromkeys(("sam3", "sam3_lite_text"), _REFERENCES)
    | dict.fromkeys(("gemma3", "shieldgemma2", "t5gemma2"), _SIGLIP_PROJECTOR)
    | {
        "ctrl": FamilyRoles(kinds=((r"^(transformer/)?w$", "embedding"),)),
        # All experts of a layer below each other: w1 and v1 [experts x out, in], w2
        # [experts x in, out].
        "dbrx": FamilyRoles(
            matrices=r"/experts/mlp/(w1|v1|w2)$", inputs_first=r"/experts/mlp/w2$"
        ),
        # Attention, no head.
        "funnel": FamilyRoles(kinds=((r"/attention/[qkv]_head$", "linear"),)),
        "jetmoe": FamilyRoles(experts=r"/mlp/(input|output)_linear$"),
        # Encoders of images and sounds below a module that is called an embedding.
        "phi4_multimodal": FamilyRoles(
            kinds=((
                r"^embed_tokens_extend/.*(/(layers|encoders)/\d+/|"
                r"/img_projection_|/(up|down)_proj_for_)",
                "linear",
            ),)
        ),
    }
)  # fmt: skip
"""By `model_type`, of a model or of one of those that it is made of."""


def default_kind(path: str) -> str | None:
    """The kind of `DEFAULT_KINDS` that a path is of; None if it is of none."""
    for kind, patterns in DEFAULT_KINDS.items():
        if any(re.search(pattern, path) for pattern in patterns):
            return kind
    return None


def is_outer(kind: str | None) -> bool:
    """Whether a layer is one of those that a share of a model leaves out of account."""
    return kind in ("head", "embedding")


def is_bias(name: str) -> bool:
    """Whether a stored tensor is added, however many axes it has, by its name.

    Biases of experts have two, and GPT-2's mask, which is called one, has four.
    """
    return re.search(r"(^|[./_])bias$", name) is not None


@dataclasses.dataclass(frozen=True)
class TensorRoles:
    """Tells what the tensors of one checkpoint are.

    Attributes:
      names: How its stored names lead to paths of layers.
      families: Rows of the table, by `model_type`.
      hidden: The number of hidden features; None if its configuration has none.
    """

    names: Names
    families: Mapping[str, FamilyRoles]
    hidden: int | None

    def of(self, name: str, shape: Sequence[int]) -> TensorRole:
        """What a tensor is.

        Args:
          name: As stored.
          shape: Of the array in the original checkpoint.
        """
        layer = self._layer(name, shape)
        path, is_transposed = layer or (name.replace(".", "/"), False)
        found, by_table = self._kind(path)
        if layer is None:
            kind = _rest(name, shape, found)
        else:
            kind = found or ("linear" if len(shape) == 2 else "experts")
        is_matrix = layer is not None
        return TensorRole(
            kind, path, is_transposed, is_matrix, by_table, is_outer(found)
        )

    def _kind(self, path: str) -> tuple[str | None, bool]:
        for pattern, kind in self._all("kinds"):
            if re.search(pattern, path):
                return kind, True
        return default_kind(path), False

    def _layer(self, name: str, shape: Sequence[int]) -> LayerName | None:
        """Path and orientation of a matrix or a stack of them; None for all others."""
        last = name.replace("/", ".").rsplit(".", 1)[-1]
        is_bare = last not in _MATRICES
        layer = self.names.layer(f"{name}.weight" if is_bare else name)
        if len(shape) == 3 and (
            re.search(_EXPERTS, name) or self._found("experts", layer.path)
        ):
            return layer._replace(is_transposed=self._stack_is_transposed(name, shape))
        if len(shape) != 2 or (is_bare and not self._found("matrices", layer.path)):
            return None
        if layer.is_transposed and self._found("inputs_first", layer.path):
            return layer._replace(is_transposed=False)
        return layer

    def _stack_is_transposed(self, name: str, shape: Sequence[int]) -> bool:
        """Whether experts are `[experts, out, in]`.

        Where no table says it, the number of hidden features tells in most cases: some
        families are published the one way and kept in memory the other. Where that
        does not tell, either, they are taken to be as nearly all are.
        """
        for row in self.families.values():
            if row.experts_inputs_first is not None:
                return not row.experts_inputs_first
        # Of the last two axes the one that is the hidden features.
        sides = [axis for axis in (1, 2) if shape[axis] == self.hidden]
        inputs = 2 if _OUTPUT.search(name) is None else 1
        return len(sides) != 1 or sides[0] == inputs

    def _found(self, field: str, path: str) -> bool:
        return any(re.search(pattern, path) for pattern in self._all(field))

    def _all(self, field: str) -> Iterator[Any]:
        for row in self.families.values():
            if (value := getattr(row, field)) is not None:
                yield from [value] if isinstance(value, str) else value


def _rest(name: str, shape: Sequence[int], kind: str | None) -> str:
    """The kind of a tensor that is no matrix."""
    if is_bias(name):
        return "bias"
    if len(shape) < 2:
        return "norm" if kind == "norm" else "vector"
    last = name.replace("/", ".").rsplit(".", 1)[-1]
    if len(shape) > 2 and last in _MATRICES:
        return "convolution"
    return kind if kind == "embedding" else "other"


def tensor_roles(config: Mapping[str, Any]) -> TensorRoles:
    """What tells the roles of a checkpoint's tensors.

    Args:
      config: Content of its `config.json`; may be empty.
    """
    parts = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    types = [str(part.get("model_type", "")) for part in parts]
    rows = {each: FAMILIES[each] for each in types if each in FAMILIES}
    return TensorRoles(names_of(types[0]), rows, _hidden_size(config))


def has_names(config: Mapping[str, Any]) -> bool:
    """Whether the model runs here, so that its names are known one by one."""
    return str(config.get("model_type")) in ARCHITECTURES


def _hidden_size(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(part.get("hidden_size"), int):
            return int(part["hidden_size"])
    return None
