"""The text that rows are calibrated with: a file, or the embedded one."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.common.corpora import ASSETS, c4_train, read_utf8, wikitext2_train
from experiments.common.methods import RowKind
from experiments.common.text_documents import split_documents
from kashin_jax.io import Checkpoint, read_json
from kashin_jax.pipeline import (
    Calibration,
    CalibrationExamples,
    CalibrationText,
    calibration_text,
)

__all__ = [
    "CORPORA",
    "DEFAULT",
    "NamedCalibration",
    "calibration_source",
    "load_calibration",
    "unseen_documents",
]

DEFAULT = "default"
"""The split of `wiki_vital` for calibration, which shares no article with the test."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NamedCalibration:
    """A text for calibration, as results have it.

    Attributes:
      name: Of the text.
      text: Its tokens.
      text_sha256: Of its UTF-8 bytes.
    """

    name: str
    text: CalibrationText | CalibrationExamples
    text_sha256: str

    def draw(self, method: RowKind, seed: int) -> Calibration:
        """What a row of a kind is calibrated with; other parts of it for every seed."""
        return self.text.calibration(seed, method.weighting, method.is_asymmetric)

    def record_fields(self, method: RowKind | None = None) -> dict[str, Any]:
        """The fields of a result that say what it was calibrated with, and how.

        Args:
          method: The kind of its row; None for one that only learned from the text.
        """
        fields: dict[str, Any] = {
            "calibration": self.name,
            "calibration_tokens": self.text.count,
            "calibration_sha256": self.text_sha256,
        }
        if method is not None and method.weighting is not None:
            fields["calibration_weighting"] = method.weighting
        if method is not None and method.is_asymmetric:
            fields["calibration_asymmetric"] = True
        return fields


CORPORA: Mapping[str, Callable[[Path | None], str]] = {
    "wikitext2": wikitext2_train,
    "c4": c4_train,
}
"""Training texts that published tables are calibrated with, by name."""


def load_calibration(
    given: str,
    source: Checkpoint,
    count: int,
    data_dir: Path | None = None,
) -> NamedCalibration:
    """Reads and tokenizes the text of `--calibration`; checks that it is long enough.

    Args:
      given: See `calibration_source`.
      source: The model's checkpoint.
      count: Tokens to use.
      data_dir: See `calibration_source`.

    Raises:
      UsageError: If `count` is less than two windows.
      DataError: If the file is missing, empty, malformed or too short.
      CheckpointError: If `asset.json` cannot be read.
    """
    name, text, sha256 = calibration_source(given, source, data_dir)
    return NamedCalibration(
        name=name, text=calibration_text(source, text, count), text_sha256=sha256
    )


def calibration_source(
    given: str, source: Checkpoint, data_dir: Path | None = None
) -> tuple[str, str, str]:
    """The text of `--calibration`: its name in results, itself, and its SHA-256.

    Of the default text only those documents are taken that the model was not trained
    on, where its `asset.json` says so.

    Args:
      given: A UTF-8 file, `DEFAULT`, or a name of `CORPORA`.
      source: The model's checkpoint.
      data_dir: The user's folder, for the texts of `CORPORA`; the hub has them, too.

    Raises:
      DataError: If the file is missing, empty or malformed.
      CheckpointError: If `asset.json` cannot be read.
    """
    if given == DEFAULT:
        text = read_utf8(ASSETS / "wiki_vital/calibration.txt")
        left = unseen_documents(source, text)
        name = "wiki_vital/calibration"
        name, text = (name, text) if left is None else (f"{name}, odd documents", left)
    elif given in CORPORA:
        name, text = f"{given}/train", CORPORA[given](data_dir)
    else:
        name, text = f"text_file:{Path(given).name}", read_utf8(Path(given))
    return name, text, _sha256(text)


def unseen_documents(source: Checkpoint, text: str) -> str | None:
    """Documents 1, 3, 5 ... of a text, in its layout, if a model has seen the others.

    Models that `experiments.train_lm` trained on an `--even_file` name it by its hash
    in `asset.json`.

    Args:
      source: The model's checkpoint.
      text: Of documents with an empty line between two.

    Returns:
      What is left; None if the model was not trained on half of the text.
    """
    record = source.directory / "asset.json"
    seen = read_json(record).get("even_documents_of", {}) if record.is_file() else {}
    if _sha256(text) not in seen:
        return None
    documents = list(split_documents(text.split("\n")))
    return "\n\n".join(documents[1::2]) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
