"""The text of `kashin quantize --calibration`, and what is said of its effect."""

from collections.abc import Mapping
from pathlib import Path

from kashin_jax.cli.evaluate import read_text
from kashin_jax.io import Checkpoint
from kashin_jax.models.context import context_of
from kashin_jax.models.registry import find_architecture
from kashin_jax.models.tokenizer import check_vocabulary, load_tokenizer
from kashin_jax.pipeline import Calibration, LayerReport, calibration_windows
from kashin_jax.pipeline.calibrated_checkpoint import check_runs
from kashin_jax.pipeline.report import kept_without

__all__ = ["print_calibrated", "read_calibration"]


def read_calibration(
    source: Checkpoint, file: str, count: int, seed: int
) -> Calibration:
    """Windows of a text, as long as the model was trained at.

    Args:
      source: The checkpoint.
      file: UTF-8 text.
      count: Tokens to use.
      seed: Of the draw of windows.

    Raises:
      UsageError: If the model does not run here, or `count` is too small.
      DataError: If the file is no UTF-8 text, or too short.
    """
    check_runs(source)
    tokenizer = load_tokenizer(source.directory)
    architecture = find_architecture(source.config, f"{source.directory}/config.json")
    config = architecture.config.from_dict(source.config, "config.json")
    check_vocabulary(tokenizer, config.vocab_size)
    context = context_of(source.directory, config.context_length)
    tokens = tokenizer.encode(read_text(Path(file)))
    windows = calibration_windows(tokens, context=context, count=count, seed=seed)
    return Calibration(windows=windows)


def print_calibrated(reports: Mapping[str, LayerReport]) -> None:
    """Prints what calibration brought, and the layers that are better off without."""
    found = [each.calibration for each in reports.values() if each.calibration]
    if not found:
        return
    mean = sum(each.output_error for each in found) / len(found)
    free = sum(each.data_free_error for each in found) / len(found)
    print(
        f"{len(found)} layers calibrated: on held-out text their outputs lose "
        f"{mean:.4f} of their squares, {free:.4f} without."
    )
    if without := kept_without(reports):
        print(f"{len(without)} are better off without: {', '.join(without)}.")
