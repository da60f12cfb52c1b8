"""The files that go along with the weights of a checkpoint into a new directory."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kashin_jax.io import atomic_path
from kashin_jax.pipeline.report import REPORT_NAME

__all__ = ["copy_other_files"]

# Weights in any form, and what optimizers keep.
_WEIGHTS = frozenset({
    ".safetensors", ".bin", ".msgpack", ".h5", ".pt", ".pth", ".ot", ".ckpt", ".npz",
    ".onnx", ".onnx_data", ".gguf", ".ggml", ".pb", ".tflite", ".mlmodel", ".nemo",
})  # fmt: skip
# Read by the loader of classifiers, as tokenizers are by theirs.
_HEADS = "heads.safetensors"
# Written anew.
_OWN = frozenset({"config.json", REPORT_NAME})


def copy_other_files(source: Path, target: Path) -> None:
    """Copies tokenizer, licence, settings: whatever is no weights of the model.

    Subfolders go along without their weights; whole where `modules.json` names them,
    since they are parts of the model then. Hidden files stay, and so do folders that
    hold a quantized checkpoint of their own, and the target itself.
    """
    modules = _modules(source)
    for path in _files(source, target.resolve()):
        name = path.relative_to(source)
        if name.parts[0] not in modules and (
            str(name) in _OWN or _is_weights(path.name)
        ):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target / name) as temporary:
            shutil.copyfile(path, temporary)


def _files(source: Path, target: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(source):
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and (here / name).resolve() != target
            and not (here / name / REPORT_NAME).exists()
        )
        for name in sorted(names):
            if not name.startswith(".") and (here / name).is_file():
                yield here / name


def _is_weights(name: str) -> bool:
    if name == _HEADS:
        return False
    # Shards of some formats end in a number, those of ONNX in `.onnx.data` too.
    suffixes = {f".{part.split('-')[0]}" for part in name.split(".")[-2:]}
    return Path(name).suffix in _WEIGHTS or (
        name.endswith((".index.json", ".onnx.data", ".ckpt.index", ".ckpt.meta"))
        or (".data" in suffixes and ".ckpt" in suffixes)
    )


def _modules(source: Path) -> frozenset[str]:
    """Folders of the modules that sentence-transformers chains."""
    path = source / "modules.json"
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else []
        return frozenset(each["path"] for each in found if each["path"])
    # Somebody else's file, copied whatever it holds.
    except (ValueError, RecursionError, LookupError, TypeError):
        return frozenset()
