"""Checkpoints by name: paths, downloads, and advice where neither is to be had."""

import sys
import types

import pytest
from opt_checkpoints import directory, message, tensors, write

from kashin_jax.models.loading import load_opt

__all__ = ["directory", "tensors"]  # fixtures


def test_a_path_that_does_not_exist_is_not_looked_up(tmp_path):
    path = tmp_path / "nothing"
    assert message(path) == f"{path}: no such directory; check the path."
    path.write_text("")
    assert "is a file; pass the directory" in message(path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's client with the network replaced by a directory."""
    import huggingface_hub

    state = types.SimpleNamespace(
        files=None, wanted=None, directory=None, broken=False, error=ConnectionError
    )

    class Api:
        def model_info(self, hub_id, timeout):
            assert timeout <= 10
            if state.files is None:
                raise state.error
            files = [types.SimpleNamespace(rfilename=name) for name in state.files]
            return types.SimpleNamespace(siblings=files)

    def snapshot_download(hub_id, allow_patterns=None, local_files_only=False):
        if state.directory is None:
            raise FileNotFoundError
        if state.broken and not local_files_only:
            raise TimeoutError
        state.wanted = allow_patterns
        return str(state.directory)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_offline_says_what_to_download_and_where_to_put_it(hub):
    text = message("facebook/opt-125m")
    assert text.startswith("facebook/opt-125m: no such directory, and the hub cannot")
    assert "model.safetensors of https://huggingface.co/facebook/opt-125m" in text
    assert "pass its path" in text


def test_offline_an_earlier_download_is_used(hub, directory, tensors):
    write(directory, tensors)
    hub.directory = directory
    assert load_opt("some/model").directory == directory


@pytest.mark.parametrize(
    ("files", "wanted", "unwanted"),
    [
        (
            ["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"],
            ["model.safetensors"],
            ["pytorch_model.bin", "flax_model.msgpack"],
        ),
        (
            ["flax_model.msgpack", "pytorch_model.bin", "tf_model.h5"],
            ["flax_model.msgpack"],
            ["pytorch_model.bin", "tf_model.h5"],
        ),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
            ["pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"],
            [],
        ),
    ],
)
def test_only_one_set_of_weights_is_downloaded(
    hub, directory, tensors, files, wanted, unwanted
):
    write(directory, tensors)
    hub.directory, hub.files = directory, files
    load_opt("some/model")
    assert set(wanted) <= set(hub.wanted)
    assert {"config.json", "tokenizer.json"} <= set(hub.wanted)
    assert not set(unwanted) & set(hub.wanted)


def test_a_hub_model_without_weights_is_refused(hub, directory):
    hub.directory, hub.files = directory, ["config.json"]
    assert message("some/model") == "some/model: the hub's copy has no weights to load."
    hub.files = ["config.json", "tf_model.h5"]
    assert "to load, but tf_model.h5, weights of TensorFlow; convert" in message("a/b")


UNREAD = {
    "adapter_model.safetensors": "an adapter (LoRA and its like)",
    "adapter_config.json": "an adapter (LoRA and its like)",
    "model_index.json": "a pipeline of diffusers",
    "diffusion_pytorch_model.safetensors": "a model of diffusers",
    "model-00001-of-00002.safetensors": "shards without their index",
    "llama.Q4_K_M.gguf": "a GGUF file",
    "model.onnx": "an ONNX file",
    "tf_model.h5": "weights of TensorFlow",
    "_CHECKPOINT_METADATA": "a checkpoint of Orbax",
    "consolidated.00.pth": "a pickle of PyTorch",
    "last.ckpt": "a checkpoint of a trainer",
    "weights.safetensors": "a file of another name",
    ".kashin_quantize.json": "an unfinished run",
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_named_for_what_it_is(directory, name):
    # All of these were "holds no weights", which many a directory of weights is told.
    (directory / name).write_bytes(b"")
    text = message(directory)
    assert text.startswith(f"{directory}: holds no weights that are read, but {name}, ")
    assert UNREAD[name] in text and "\n" not in text


def test_a_file_of_another_format_is_named_for_what_it_is(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "model.onnx, an ONNX file; name the original" in message(
        tmp_path / "model.onnx"
    )


def test_what_goes_along_with_weights_is_downloaded_too(hub, directory, tensors):
    # From a hub id, quantizing left behind what it copies from a directory.
    write(directory, tensors)
    along = ["generation_config.json", "1_Pooling/config.json", "tokenizer.model",
             "quantization_report.jsonl", "LICENSE", "README.md"]  # fmt: skip
    left = ["model.safetensors.index.json", "onnx/model.onnx", "original/a.pth"]
    hub.directory, hub.files = directory, ["model.safetensors", *along, *left]
    load_opt("some/model")
    assert set(along) <= set(hub.wanted) and not set(left) & set(hub.wanted)


def test_a_download_that_breaks_off_is_not_taken_for_a_checkpoint(hub, directory):
    hub.directory, hub.files, hub.broken = directory, ["model.safetensors"], True
    assert "its download failed (TimeoutError)" in message("some/model")


def test_an_unknown_hub_model_is_said_to_be_unknown(hub, directory):
    import huggingface_hub

    response = types.SimpleNamespace(headers={}, request=None)
    hub.error = huggingface_hub.errors.RepositoryNotFoundError("404", response=response)
    hub.directory = directory
    assert "the hub has no such public model" in message("some/model")


def test_without_the_hub_client_the_advice_is_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    text = message("facebook/opt-125m")
    assert "huggingface_hub is not installed; download config.json" in text
