"""Checkpoints by name: a directory or a download from the hub, and its weights."""

import fnmatch
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from kashin_jax.errors import CheckpointError
from kashin_jax.io.gguf import gguf_directory

__all__ = ["WeightFiles", "checkpoint_directory", "find_weights"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TIMEOUT_SECONDS = 10.0
_SMALL_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "heads.safetensors",
]
# What goes along with the weights, in folders too. Not `*`: a repository may hold the
# same weights in several formats.
_ALONG = ("*.json", "*.jsonl", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.md",
          "*.py", "LICENSE*", "NOTICE*")  # fmt: skip

# What a directory may hold in place of weights that are read; the first pattern found
# decides.
_UNREAD = (
    (".kashin_quantize.json", "an unfinished run; repeat its command to finish it"),
    (
        "adapter_*",
        "an adapter (LoRA and its like), which is no model; merge it into its base "
        "model, by `merge_and_unload` of peft, and name what that saves",
    ),
    (
        "model_index.json",
        "a pipeline of diffusers; name the folder of a part that has model.safetensors",
    ),
    (
        "diffusion_pytorch_model*",
        "a model of diffusers, which is not read; rename its file to model.safetensors "
        "if it is one",
    ),
    (
        "model-*-of-*.safetensors",
        "shards without their index; copy or download model.safetensors.index.json",
    ),
    ("*.gguf", "a GGUF file; name the file itself, as a path that ends in .gguf"),
    ("*.onnx", "an ONNX file; name the original model, in safetensors"),
    (
        "*.h5",
        "weights of TensorFlow; convert them to model.safetensors, by `from_tf=True` "
        "of transformers before version 5",
    ),
    (
        "_CHECKPOINT_METADATA",
        "a checkpoint of Orbax; restore it, and quantize its parameters by "
        "`quantize_params`",
    ),
    ("*.pt*", "a pickle of PyTorch; save the model as model.safetensors"),
    ("*.ckpt*", "a checkpoint of a trainer; save the model as model.safetensors"),
    ("*.safetensors", "a file of another name; rename it to model.safetensors"),
)


class WeightFiles(NamedTuple):
    """Which files hold the weights: one, or what an index lists."""

    stem: str
    suffix: str
    is_sharded: bool

    @property
    def single(self) -> str:
        """The one file."""
        return f"{self.stem}{self.suffix}"

    @property
    def index_file(self) -> str:
        """The file that says in which shard a tensor is."""
        return f"{self.single}.index.json"

    @property
    def entry(self) -> str:
        """The file that shows that these are the weights."""
        return self.index_file if self.is_sharded else self.single

    @property
    def patterns(self) -> list[str]:
        """Glob patterns of all files involved."""
        shards = f"{self.stem}-*-of-*{self.suffix}"
        return [self.entry, shards] if self.is_sharded else [self.entry]


_PREFERENCE = [
    WeightFiles(stem, suffix, is_sharded)
    for stem, suffix in (
        ("model", ".safetensors"),
        ("flax_model", ".msgpack"),
        ("pytorch_model", ".bin"),
    )
    for is_sharded in (False, True)
]


def _choose_weights(names: Collection[str]) -> WeightFiles | None:
    """The preferred weights among file names: safetensors, msgpack, then torch."""
    return next((files for files in _PREFERENCE if files.entry in names), None)


def find_weights(directory: Path) -> WeightFiles:
    """The preferred weights of a directory; CheckpointError if there are none."""
    found = _choose_weights({path.name for path in directory.iterdir()})
    if found is None:
        if other := _unread(path.name for path in directory.iterdir()):
            raise CheckpointError(
                f"{directory}: holds no weights that are read, but {other}."
            )
        expected = ", ".join(f.single for f in _PREFERENCE if not f.is_sharded)
        raise CheckpointError(
            f"{directory}: holds no weights; put one of {expected} (or its shards and "
            "index) there."
        )
    return found


def _unread(names: Iterable[str]) -> str | None:
    """What files are that are no weights to us, and what can be done; None if unknown.

    Heads alone are none: they belong to an encoder.
    """
    known = sorted(set(names) - {"heads.safetensors"})
    for pattern, meaning in _UNREAD:
        if found := fnmatch.filter(known, pattern):
            return f"{found[0]}, {meaning}"
    return None


def checkpoint_directory(path_or_id: str | Path) -> Path:
    """The local directory of a checkpoint, downloaded first where it must be.

    Only one set of weights is fetched, safetensors before msgpack before torch. Without
    a connection an earlier download is used. A GGUF file has a directory in a cache,
    see `gguf_directory`.

    Args:
      path_or_id: A directory, a GGUF file, or a hub id such as `facebook/opt-125m`.

    Raises:
      CheckpointError: If there is no such directory and nothing could be downloaded;
        says which files to put where. If a GGUF file cannot be read.
      UsageError: If what reads a GGUF file is not installed.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.exists():
        return gguf_directory(path)
    if path.exists():
        if path.suffix in (".onnx", ".h5"):
            raise CheckpointError(f"{path_or_id}: is {_unread([path.name])}.")
        raise CheckpointError(
            f"{path_or_id}: is a file; pass the directory that holds the checkpoint."
        )
    if not _HUB_ID.fullmatch(name := str(path_or_id)):
        raise CheckpointError(f"{path_or_id}: no such directory; check the path.")
    return _from_hub(name)


def _from_hub(hub_id: str) -> Path:
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise _unavailable(hub_id, "huggingface_hub is not installed") from error
    # The client lets the exceptions of whatever it is built on through, so the clauses
    # below are broad.
    try:
        info = hub.HfApi().model_info(hub_id, timeout=_TIMEOUT_SECONDS)
    except hub.errors.RepositoryNotFoundError as error:
        raise _unavailable(hub_id, "the hub has no such public model") from error
    except Exception as error:
        try:
            return Path(hub.snapshot_download(hub_id, local_files_only=True))
        except (OSError, ValueError):
            reason = f"the hub cannot be reached ({type(error).__name__})"
            raise _unavailable(hub_id, reason) from error
    names = {file.rfilename for file in info.siblings or []}
    files = _choose_weights(names)
    if files is None:
        other = _unread(names)
        raise CheckpointError(
            f"{hub_id}: the hub's copy has no weights to load"
            + (f", but {other}." if other else ".")
        )
    # Indices go with their own weights only: beside others they would be believed.
    along = {name for pattern in _ALONG for name in fnmatch.filter(names, pattern)}
    along = {name for name in along if not name.endswith(".index.json")}
    wanted = [*_SMALL_FILES, *sorted(along), *files.patterns]
    try:
        return Path(hub.snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:
        reason = f"its download failed ({type(error).__name__})"
        raise _unavailable(hub_id, reason) from error


def _unavailable(hub_id: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{hub_id}: no such directory, and {reason}; download config.json, "
        f"tokenizer.json and model.safetensors of https://huggingface.co/{hub_id} into "
        "a directory and pass its path."
    )
