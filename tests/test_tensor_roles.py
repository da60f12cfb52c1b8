"""What the tensors of a checkpoint are taken for: the table, and defaults."""

import json

import numpy as np
import pytest
import safetensors.numpy

from kashin_jax.cli import main
from kashin_jax.errors import CheckpointError
from kashin_jax.io import open_checkpoint
from kashin_jax.methods import RTN
from kashin_jax.models.tensor_roles import FAMILIES, tensor_roles
from kashin_jax.pipeline import Rule, Rules, dequantize_checkpoint, quantize_checkpoint
from kashin_jax.pipeline.original_shards import ORIGINAL_INDEX
from kashin_jax.pipeline.role_counts import count_roles

SQUARE, STACK = (8, 8), (2, 8, 8)
IMAGE = "model.embed_tokens_extend.image_embed."
# A tensor that only its family's row tells right, and what it is.
SPECIAL = {
    "gpt2": ("h.0.attn.c_attn.weight", SQUARE, "linear", False),
    "openai-gpt": ("h.0.attn.c_attn.weight", SQUARE, "linear", False),
    "decision_transformer": ("encoder.h.0.mlp.c_fc.weight", SQUARE, "linear", False),
    "imagegpt": ("transformer.h.0.mlp.c_proj.weight", SQUARE, "linear", False),
    "clvp": ("model.decoder.layers.0.mlp.c_fc.weight", SQUARE, "linear", False),
    "clvp_decoder": ("layers.0.mlp.c_fc.weight", SQUARE, "linear", False),
    "gpt_oss": ("model.layers.0.mlp.experts.down_proj", STACK, "experts", False),
    "openai_privacy_filter": ("l.0.mlp.experts.down_proj", STACK, "experts", False),
    "llama4": ("l.0.feed_forward.experts.down_proj", STACK, "experts", False),
    "llama4_text": ("l.0.feed_forward.experts.down_proj", STACK, "experts", False),
    "aria": ("model.layers.0.mlp.experts.down_proj", STACK, "experts", False),
    "aria_text": ("layers.0.mlp.experts.down_proj", STACK, "experts", False),
    "muse_spark": ("layers.0.mlp.experts.gate_up_proj", (2, 16, 8), "experts", True),
    "muse_spark_text": ("l.0.mlp.experts.gate_up_proj", (2, 16, 8), "experts", True),
    "mamba": ("backbone.layers.0.mixer.dt_proj.weight", SQUARE, "step", True),
    "falcon_mamba": ("backbone.layers.0.mixer.dt_proj.weight", SQUARE, "step", True),
    "jamba": ("model.layers.0.mamba.dt_proj.weight", SQUARE, "step", True),
    "eomt": ("query.weight", SQUARE, "embedding", True),
    "eomt_dinov3": ("query.weight", SQUARE, "embedding", True),
    "videomt": ("query.weight", SQUARE, "embedding", True),
    "sam3": ("detr_decoder.reference_points.weight", SQUARE, "embedding", True),
    "sam3_lite_text": ("d.reference_points.weight", SQUARE, "embedding", True),
    "gemma3": ("projector.mm_input_projection_weight", SQUARE, "linear", False),
    "shieldgemma2": ("projector.mm_input_projection_weight", SQUARE, "linear", False),
    "t5gemma2": ("projector.mm_input_projection_weight", SQUARE, "linear", False),
    "ctrl": ("transformer.w.weight", SQUARE, "embedding", True),
    "dbrx": ("transformer.blocks.0.ffn.experts.mlp.w2", SQUARE, "linear", False),
    "funnel": ("encoder.blocks.0.0.attention.q_head.weight", SQUARE, "linear", True),
    "jetmoe": ("model.layers.0.mlp.input_linear.weight", STACK, "experts", True),
    "phi4_multimodal": (f"{IMAGE}layers.0.mlp.fc1.weight", SQUARE, "linear", True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_the_table_tells_what_names_do_not(family):
    name, shape, kind, is_transposed = SPECIAL[family]
    config = {"model_type": family, "hidden_size": 16}
    role = tensor_roles(config).of(name, shape)
    assert (role.kind, role.is_matrix) == (kind, True)
    assert role.is_transposed == is_transposed
    default = tensor_roles({"model_type": "unheard-of", "hidden_size": 16})
    assert default.of(name, shape)[:4] != role[:4]


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("mask_decoder.mask_tokens.weight", SQUARE, "embedding"),
        ("fine_acoustics.input_embeds_layers.3.weight", SQUARE, "embedding"),
        ("quantizer.quantizers.0.codebook.weight", SQUARE, "embedding"),
        ("model.visual_embeddings_table.weight", SQUARE, "embedding"),
        ("model.layers.0.mlp.experts.3.w1.weight", SQUARE, "linear"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8), "router"),
        ("backbone.layers.0.mixer.conv1d.weight", (8, 1, 4), "convolution"),
        ("backbone.layers.0.mixer.A_log", SQUARE, "other"),
        ("vit.embeddings.cls_token", (1, 1, 8), "embedding"),
        ("model.layers.0.mlp.experts.down_proj_bias", SQUARE, "bias"),
        ("rwkv.blocks.0.attention.time_decay", (8,), "vector"),
        ("encoder.block.0.layer.0.layer_norm.weight", (8,), "norm"),
    ],
)
def test_names_tell_in_most_families(name, shape, kind):
    assert tensor_roles({}).of(name, shape).kind == kind


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    """A family that does not run here, in two files."""
    directory = tmp_path_factory.mktemp("mamba") / "source"
    directory.mkdir()
    rng = np.random.default_rng(0)
    block = "backbone.layers.0"
    shapes = {
        "one": {"backbone.embeddings.weight": (96, 32), f"{block}.norm.weight": (32,)},
        "two": {
            f"{block}.mixer.in_proj.weight": (128, 32),
            f"{block}.mixer.dt_proj.weight": (64, 32),
            f"{block}.mixer.conv1d.weight": (64, 1, 4),
        },
    }
    places = {}
    for file, tensors in shapes.items():
        values = {name: rng.normal(size=s).astype("f") for name, s in tensors.items()}
        safetensors.numpy.save_file(values, directory / f"{file}.safetensors")
        places |= dict.fromkeys(tensors, f"{file}.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": places})
    (directory / "model.safetensors.index.json").write_text(index)
    (directory / "config.json").write_text('{"model_type": "mamba"}')
    for name in ("chat_template.jinja", "preprocessor_config.json", "LICENSE"):
        (directory / name).write_text("{}")
    return directory


LINE = (
    "Tensors by the table of `mamba`: 1 linear; in full precision unless a rule names "
    "them: 1 embedding, 1 norm, 1 time step, 1 convolution."
)


def test_what_tensors_are_is_printed_before_the_work(mamba, tmp_path, capsys):
    arguments = ["quantize", str(mamba), str(tmp_path / "q"), "--method=rtn"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[0] == LINE
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == LINE
    # A command that does nothing explains nothing.
    assert main(arguments) == 0
    assert LINE not in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "q")]) == 0
    assert LINE in capsys.readouterr().out.splitlines()
    assert main([*arguments, "--skip=nothing_so_called"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({"model_type": "opt"}, "the names of `opt`, which runs here"),
        ({"model_type": "foo"}, "defaults, `foo` having no table of its own"),
        ({}, "defaults, config.json naming no `model_type`"),
        ({"x": {"model_type": "gpt2"}}, "the table of `gpt2`"),
    ],
)
def test_where_roles_are_known_from_is_said(tmp_path, config, source):
    tensors = {"layers.0.fc1.weight": np.zeros((4, 4), np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = count_roles(open_checkpoint(tmp_path))
    assert (found.source, found.counts) == (source, {"linear": 1})
    assert str(found).endswith("1 linear; in full precision unless a rule names them: "
                               "none.")  # fmt: skip


def test_a_rule_may_name_what_the_table_leaves_alone(mamba, tmp_path):
    reports = quantize_checkpoint(mamba, tmp_path / "a", Rules(config=RTN())).reports
    assert list(reports) == ["backbone.layers.0.mixer.in_proj.weight"]
    rules = Rules(config=RTN(), rules=[Rule("dt_proj", RTN())])
    reports = quantize_checkpoint(mamba, tmp_path / "b", rules).reports
    assert len(reports) == 2


def test_every_file_comes_back_under_its_name(mamba, tmp_path):
    quantize_checkpoint(mamba, tmp_path / "q", Rules(config=RTN()))
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d")
    before, after = open_checkpoint(mamba), open_checkpoint(tmp_path / "d")
    assert after.places == before.places
    names = {path.name for path in (tmp_path / "d").iterdir()}
    assert names == {path.name for path in mamba.iterdir()}
    dequantize_checkpoint(tmp_path / "q", tmp_path / "e", max_shard_bytes=10**9)
    assert list(open_checkpoint(tmp_path / "e").files) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "x.bin", 3])
def test_files_that_are_none_are_refused(mamba, tmp_path, name):
    quantize_checkpoint(mamba, tmp_path / "q", Rules(config=RTN()))
    index = tmp_path / "q" / ORIGINAL_INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["backbone.embeddings.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"names no file of `backbone.embed"):
        dequantize_checkpoint(tmp_path / "q", tmp_path / "d")
    assert not (tmp_path / "d").exists()
