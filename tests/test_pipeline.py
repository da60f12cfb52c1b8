"""Models, trees and checkpoints share one pipeline: equal choices, plan and reports."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from quantized_sources import FEW, content, make_source, method

from kashin_jax import RTN, JointKashin, Rule, Rules, quantize_model, quantize_params
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import open_checkpoint
from kashin_jax.models.loading import load_opt
from kashin_jax.pipeline import (
    REPORT_NAME,
    default_select,
    outliers,
    packed_size,
    plan_checkpoint,
    plan_model,
    plan_params,
    quantize_checkpoint,
    report_table,
    run,
    selected_kernels,
)

SHARD = 50_000
STATE = ".kashin_quantize.json"
HEADS = ("score", "qa_outputs", "shared", "lm_head", "classifier", "pre_classifier")


class Heads(nnx.Module):
    """A body of one layer under heads and an embedding of the usual names."""

    def __init__(self, rngs):
        self.body = nnx.Linear(8, 8, rngs=rngs)
        for name in HEADS:
            setattr(self, name, nnx.Linear(8, 8, rngs=rngs))


@pytest.fixture(scope="module")
def heads():
    return Heads(nnx.Rngs(0))


def tree_of(model):
    """The linear layers of a model as a tree of parameters, by their paths."""
    return {
        "/".join(map(str, parts)): {"kernel": node.kernel.get_value()}
        for parts, node in nnx.iter_graph(model)
        if type(node) is nnx.Linear
    }


def chosen(plan):
    return [layer.choice.path for layer in plan.quantized]


def test_a_method_alone_is_rules_with_that_method(heads):
    config, rules = RTN(), Rules(config=RTN())
    assert list(quantize_model(heads, config).reports) == ["body"]
    assert list(quantize_model(heads, rules=rules).reports) == ["body"]
    assert list(quantize_params(tree_of(heads), config).reports) == ["body"]
    assert list(quantize_params(tree_of(heads), rules=rules).reports) == ["body"]
    assert list(selected_kernels(heads)) == ["body"]
    assert str(plan_model(heads, config)) == str(plan_model(heads, rules=rules))
    assert "stays: skipped by default" in str(plan_model(heads, config))
    assert default_select("body") and not any(map(default_select, HEADS))


def test_select_narrows_and_never_brings_back_what_is_skipped(heads):
    """A `select` for one layer more once let heads and embeddings be quantized."""
    assert chosen(plan_model(heads, RTN(), select=lambda path: True)) == ["body"]
    tree = plan_params(tree_of(heads), RTN(), select=lambda path: True)
    assert chosen(tree) == ["body"]
    rules = Rules(config=RTN(), rules=[Rule("score", RTN(bits=8))])
    both = plan_model(heads, rules=rules, select=lambda path: path != "body")
    assert chosen(both) == ["score"]
    with pytest.raises(UsageError, match="Of 7 layers `select` takes none"):
        plan_model(heads, rules=rules, select=lambda path: path == "shared")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Careful(RTN):
    default_skip = ("^body$",)


def test_a_method_may_bring_its_own_default_list():
    rules = Rules(config=Careful())
    assert rules.config_for("body") is None
    assert {rules.config_for(name) for name in HEADS} == {Careful()}
    named = Rules(config=Careful(), rules=[Rule("body", RTN())])
    assert named.config_for("body") == RTN()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("pipeline") / "source", dtype="float32")


def test_models_trees_and_checkpoints_have_one_plan(source):
    rules = Rules(
        config=method("rtn"),
        rules=[
            Rule("fc1", method("kashin-joint", bits=2.5)),
            Rule("q_proj", method("kashin")),
            Rule("v_proj", method("rotate-rtn")),
            Rule("0/fc2", None),
        ],
    )
    model = load_opt(source).model
    plans = [
        plan_model(model, rules=rules),
        plan_params(tree_of(model), rules=rules),
        plan_checkpoint(open_checkpoint(source), rules),
    ]
    found = [
        {
            each.choice.path: (each.choice.config, each.choice.reason, each.stored_bits)
            for each in plan.layers
            if "embed" not in each.choice.path
        }
        for plan in plans
    ]
    assert found[0] == found[1] == found[2] and len(found[0]) == 12
    assert found[0]["decoder/layers/0/fc2"][:2] == (None, "skipped by the rules")
    on_disk = plans[2]
    assert on_disk.bytes_after == sum(tensor.size for tensor in on_disk.tensors)
    names = open_checkpoint(source).names()
    assert [tensor.name for tensor in on_disk.tensors] == names
    assert str(on_disk).count("kashin-joint 2.5") == 2
    size = packed_size((64, 128), "float32", method("kashin-joint", bits=2.5))
    assert size == found[0]["decoder/layers/0/fc1"][2]
    with pytest.raises(ValueError, match="block"):
        packed_size((64, 128), "float32", method("kashin", block_shape=[48, 48]))


@pytest.fixture(scope="module")
def finished(source):
    target = source.parent / "finished"
    return quantize_checkpoint(
        source, target, FEW, max_shard_bytes=SHARD, exist_ok=True
    )


def again(source, finished, **changes):
    options = {"rules": FEW, "max_shard_bytes": SHARD, "exist_ok": True} | changes
    return quantize_checkpoint(source, finished.directory, **options)


def test_reports_of_a_checkpoint_are_those_of_layers(finished):
    assert all(report.seconds > 0 for report in finished.reports.values())
    assert report_table(finished.reports).count("rtn 4") == len(finished.reports) == 2
    assert outliers(finished.reports) == []
    lines = (finished.directory / REPORT_NAME).read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"tensor": name, **report.to_json()}
        for name, report in finished.reports.items()
    ]


def test_a_finished_target_is_returned_without_any_work(source, finished, monkeypatch):
    before = content(finished.directory)
    stamps = {p.name: p.stat().st_mtime_ns for p in finished.directory.iterdir()}
    monkeypatch.setattr(run, "quantize_stack", pytest.fail)
    found = again(source, finished)
    assert found.reports == finished.reports
    shards = [name for name in before if name.endswith(".safetensors")]
    assert found.resumed == len(shards) > 2
    assert content(finished.directory) == before
    after = {p.name: p.stat().st_mtime_ns for p in finished.directory.iterdir()}
    assert after == stamps


def test_only_the_hidden_file_tells_it_from_a_target_that_is_not_to_be_found_again(
    source, finished, tmp_path
):
    quantize_checkpoint(source, tmp_path / "q", FEW, max_shard_bytes=SHARD)
    kept = content(finished.directory)
    assert kept.pop(STATE) and kept == content(tmp_path / "q")


def test_a_finished_target_of_another_call_is_refused(source, finished):
    before = content(finished.directory)
    for changes in ({"seed": 1}, {"rules": Rules(config=RTN())}):
        with pytest.raises(UsageError, match="holds a finished run with other"):
            again(source, finished, **changes)
    with pytest.raises(UsageError, match="is not empty"):
        again(source, finished, exist_ok=False)
    assert content(finished.directory) == before


def test_a_finished_target_that_lost_a_file_is_named(source, finished, tmp_path):
    target = tmp_path / "copied"
    target.mkdir()
    for name, data in content(finished.directory).items():
        (target / name).write_bytes(data)
    result = finished._replace(directory=target)
    assert again(source, result).reports == finished.reports
    lost = min(target.glob("*.safetensors"))
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        again(source, result)


def test_an_interrupted_run_that_is_to_be_found_again_goes_on(
    source, finished, tmp_path, monkeypatch
):
    result = finished._replace(directory=tmp_path / "q")
    with monkeypatch.context() as patched:
        patched.setattr(run, "quantize_stack", interrupted_at_the_second())
        with pytest.raises(KeyboardInterrupt):
            again(source, result)
    assert json.loads((tmp_path / "q" / STATE).read_text()).keys() == {
        "fingerprint",
        "parts",
    }
    found = again(source, result)
    assert 0 < found.resumed and found.reports.keys() == finished.reports.keys()
    assert all(report.seconds > 0 for report in found.reports.values())
    ours, theirs = content(tmp_path / "q"), content(finished.directory)
    del ours[STATE], theirs[STATE]
    assert ours == theirs


def interrupted_at_the_second():
    original, calls = run.quantize_stack, []

    def quantize(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    return quantize


@pytest.mark.parametrize(
    "shape", [(1, 997), pytest.param((997, 1), marks=pytest.mark.slow)]
)
def test_a_matrix_that_packing_would_make_larger_stays(shape, tmp_path):
    """A single row took 21 bits a weight; a single input 260 by k-means."""
    good, odd = np.ones((64, 64), np.float32), np.ones(shape, np.float32)
    for config in (JointKashin(), method("k-means-channel")):
        rules = Rules(config=config)
        tree = {"good": {"kernel": good}, "odd": {"kernel": odd}}
        plan = plan_params(tree, config)
        stays = [each for each in plan.layers if each.choice.config is None]
        for each in stays:
            assert each.choice.reason.startswith("would take ")
            assert each.bytes_after == each.bytes_before
        assert all(each.bytes_after <= each.bytes_before for each in plan.layers)
        assert list(quantize_params(tree, config).reports) == chosen(plan)
        source = tmp_path / f"{config.name}"
        source.mkdir()
        tensors = {"good.weight": good, "odd.weight": odd.T}
        safetensors.numpy.save_file(tensors, source / "model.safetensors")
        same = plan_checkpoint(open_checkpoint(source), rules)
        assert chosen(same) == chosen(plan)
    assert [each.choice.path for each in stays] == (["odd"] if shape[0] == 1 else [])
    with pytest.raises(UsageError, match=r"`odd` would take .* bytes packed"):
        quantize_params({"odd": {"kernel": np.ones((1, 997), np.float32)}}, config)
