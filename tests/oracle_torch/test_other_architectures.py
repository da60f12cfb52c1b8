"""Any directory of Hugging Face: quantized, decoded, and loaded by transformers again.

Reads what a tensor is off the module that holds it, which our table and patterns have
to guess from names.
"""

import logging

import numpy as np
import pytest
from families import FAMILIES, outputs, random_model

from kashin_jax.io import open_checkpoint
from kashin_jax.methods import RTN
from kashin_jax.models.tensor_roles import is_bias, tensor_roles
from kashin_jax.pipeline import Rules, dequantize_checkpoint, quantize_checkpoint

pytestmark = [pytest.mark.oracle]

BITS = 8
OTHER_FILES = {
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "{}",
    "LICENSE": "as is",
    "tokenizer.json": "{}",
}


@pytest.fixture(scope="module", params=FAMILIES)
def trip(request, tmp_path_factory):
    """A model, and the directories of its checkpoint there and back again."""
    directory = tmp_path_factory.mktemp(request.param)
    model = random_model(request.param)
    model.save_pretrained(directory / "source", max_shard_size="40KB")
    for name, text in OTHER_FILES.items():
        (directory / "source" / name).write_text(text)
    rules = Rules(config=RTN(bits=BITS, group_size=8))
    result = quantize_checkpoint(directory / "source", directory / "small", rules)
    dequantize_checkpoint(directory / "small", directory / "back")
    return model, result, directory


def relative(found, expected):
    gap = np.float64(found) - np.float64(expected)
    return np.linalg.norm(gap) / np.linalg.norm(np.float64(expected))


def test_files_names_and_types_come_back(trip):
    _, _, directory = trip
    before, after = (open_checkpoint(directory / name) for name in ("source", "back"))
    assert after.places == before.places and len(before.files) > 1
    assert all(after.spec(name) == before.spec(name) for name in before.names())
    names = [{p.name for p in (directory / d).iterdir()} for d in ("source", "back")]
    assert names[0] == names[1] >= OTHER_FILES.keys()


def test_errors_are_those_that_were_reported(trip):
    """In the orientation of the source, and none in what was left alone."""
    _, result, directory = trip
    before, after = (open_checkpoint(directory / name) for name in ("source", "back"))
    assert result.reports
    for name in before.names():
        found, expected = after.load(name), before.load(name)
        if name not in result.reports:
            np.testing.assert_array_equal(found, expected, name)
            continue
        reported = result.reports[name].relative_squared_error
        lost = relative(found, expected) ** 2
        assert 0 < lost < 1e-3 and lost == pytest.approx(float(reported), rel=1e-3)


def test_transformers_loads_it_and_computes_nearly_the_same(trip):
    model, _, directory = trip
    again, info = type(model).from_pretrained(
        directory / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert not info["mismatched_keys"]
    expected, found = outputs(model), outputs(again.float().eval())
    assert 0 < relative(found, expected) < 0.05


def modules_of(model):
    """The module of every parameter, by its name in the state."""
    for prefix, module in model.named_modules():
        for name, value in module.named_parameters(recurse=False):
            yield f"{prefix}.{name}" if prefix else name, module, value


def fault(role, module, is_input_first):
    """What a role gets wrong about the parameter of a module; None if nothing."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear | Conv1D):
        if role.is_transposed == isinstance(module, Conv1D) and role.kind == "linear":
            return "is transposed the other way"
    elif role.kind == "linear" and type(module).__name__ not in BARE:
        return f"is of a {type(module).__name__}, not a linear"
    if role.kind == "experts" and role.is_transposed == is_input_first:
        return "is a stack the other way round"
    return None


# Parameters that are matrices without a module of their own, by the module that has it.
BARE = (
    "QuantLinear",
    "Gemma3MultiModalProjector",
    "T5Gemma2MultiModalProjector",
    "DbrxExpertGLU",
)
# Of families whose experts are [experts, in, out], says the code that multiplies.
INPUTS_FIRST = (
    "GptOssExperts",
    "OpenAIPrivacyFilterExperts",
    "AriaExperts",
    "Llama4TextExperts",
)


def all_models():
    """A model without weights of every family that transformers makes by defaults."""
    import torch
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    logging.disable(logging.CRITICAL)
    try:
        for model_type, make in CONFIG_MAPPING.items():
            try:
                config = make()
                with torch.device("meta"):
                    yield model_type, config, MODEL_MAPPING[type(config)](config)
            # Families without defaults, without such a model, or with more to install.
            except Exception:
                continue
    finally:
        logging.disable(logging.NOTSET)


def test_roles_are_those_of_the_modules_in_every_family():
    count, faults = 0, []
    for model_type, config, model in all_models():
        roles = tensor_roles(config.to_dict())
        count += 1
        for name, module, value in modules_of(model):
            if value.ndim < 2 or is_bias(name):
                continue
            first = type(module).__name__ in INPUTS_FIRST
            if found := fault(roles.of(name, value.shape), module, first):
                faults.append(f"{model_type}: {name} {found}")
    assert count > 300
    assert not faults
