"""What a classifier is calibrated with: its task's training set, or a text.

Development sets are refused: what they show must not be known when they are scored.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.classification.data import load_examples
from experiments.classification.evaluation import load_classifier_tokenizer
from experiments.classification.tasks import Task
from experiments.common.calibration import NamedCalibration, calibration_source
from kashin_jax.errors import UsageError
from kashin_jax.io import open_checkpoint
from kashin_jax.models import LoadedClassifier
from kashin_jax.pipeline import CalibrationExamples

__all__ = ["TRAIN", "load_task_calibration", "text_sentences"]

TRAIN = "train"
"""The task's own training set."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z])")


class _Texts(NamedTuple):
    name: str
    first: Sequence[str]
    second: Sequence[str] | None
    sha256: str


def load_task_calibration(
    task: Task,
    loaded: LoadedClassifier,
    given: str,
    count: int,
    *,
    data_dir: Path | None,
    max_length: int,
    scored: Collection[str],
) -> NamedCalibration:
    """Reads and tokenizes what `--calibration` names, as the task's examples are.

    Args:
      task: Sentences of a text become its single texts, or two by two its pairs.
      loaded: The classifier.
      given: `TRAIN`, or what `calibration_source` reads.
      count: Tokens to use.
      data_dir: The user's folder.
      max_length: Tokens of an example; longer ones are cut.
      scored: SHA-256 of the evaluation files.

    Raises:
      UsageError: If the task has no training set, the text is one that is scored, or
        `count` is less than two examples.
      DataError: If the file is missing, malformed or too short.
    """
    if given == TRAIN:
        texts = _training_set(task, data_dir)
    else:
        name, text, sha256 = calibration_source(
            given, open_checkpoint(loaded.directory), data_dir
        )
        first, second = text_sentences(text), None
        if task.is_pair:
            first, second = first[: len(first) // 2 * 2 : 2], first[1::2]
        texts = _Texts(name, first, second, sha256)
    if texts.sha256 in scored:
        raise UsageError(
            f"`--calibration={given}` is a file that is scored; name another text."
        )
    tokenizer = load_classifier_tokenizer(loaded.directory, loaded.config, max_length)
    examples = CalibrationExamples(
        examples=tokenizer.encode(texts.first, texts.second, max_length=max_length),
        pad_id=loaded.config.pad_token_id,
        count=count,
    )
    # Refuses a text that is too short before any work.
    examples.calibration(0)
    return NamedCalibration(name=texts.name, text=examples, text_sha256=texts.sha256)


def _training_set(task: Task, data_dir: Path | None) -> _Texts:
    if TRAIN not in task.splits:
        raise UsageError(
            f"`--calibration={TRAIN}`: {task.title} has no training set; leave the "
            "task out by `--tasks`, or name a text."
        )
    found = load_examples(task, TRAIN, data_dir)
    return _Texts(TRAIN, found.first, found.second, found.sha256)


def text_sentences(text: str) -> list[str]:
    """The sentences of a text, line by line; headings `= ... =` are none."""
    lines = (line.strip() for line in text.splitlines())
    return [
        sentence
        for line in lines
        if line and not (line.startswith("= ") and line.endswith(" ="))
        for sentence in _SENTENCE_END.split(line)
    ]
