"""The text of `kashin quantize --calibration`, and what is said of its effect."""

from collections.abc import Mapping
from pathlib import Path

from kashin_jax.cli.evaluate import read_text
from kashin_jax.errors import UsageError
from kashin_jax.io import Checkpoint
from kashin_jax.pipeline import Calibration, LayerReport, calibration_text
from kashin_jax.pipeline.report import calibration_seconds, kept_without

__all__ = ["TOKENS", "print_calibrated", "read_calibration"]

TOKENS = 131_072
"""Of a calibration text, unless said otherwise."""


def read_calibration(
    source: Checkpoint,
    file: str | None,
    count: int | None,
    weighting: str,
    is_asymmetric: bool,
    seed: int,
) -> Calibration | None:
    """The calibration that the flags ask for, if any.

    Args:
      source: The checkpoint.
      file: UTF-8 text.
      count: Tokens to use; None for `TOKENS`.
      weighting: Of errors, or `none`.
      is_asymmetric: Whether layers make up for what earlier ones lost.
      seed: Of the draw of windows.

    Raises:
      UsageError: If the model does not run here, `count` is too small, or there is a
        way to calibrate without a file, or one that a classifier does not have.
      DataError: If the file is no UTF-8 text, or too short.
    """
    kind = None if weighting == "none" else weighting
    if file is not None:
        text = calibration_text(source, read_text(Path(file)), count or TOKENS)
        return text.calibration(seed, kind, is_asymmetric)
    if count is not None:
        raise UsageError("`--calibration-tokens` needs `--calibration`.")
    if kind is not None:
        raise UsageError("`--calibration-weighting` needs `--calibration`.")
    if is_asymmetric:
        raise UsageError("`--calibration-asymmetric` needs `--calibration`.")
    return None


def print_calibrated(reports: Mapping[str, LayerReport]) -> None:
    """Prints what calibration brought, and the layers that keep the code without."""
    found = [each.calibration for each in reports.values() if each.calibration]
    if not found:
        return
    mean = sum(each.output_error for each in found) / len(found)
    free = sum(each.data_free_error for each in found) / len(found)
    print(
        f"{len(found)} layers calibrated: on held-out text their outputs lose "
        f"{mean:.4f} of their squares, {free:.4f} without."
    )
    if (spent := calibration_seconds(reports)) is not None:
        print(
            f"Statistics took {spent.statistics:.1f} s, coding {spent.coding:.1f} s, "
            f"compilation {spent.compilation:.1f} s."
        )
    if without := kept_without(reports):
        names = ", ".join(without)
        print(f"{len(without)} keep the code without, which loses no more: {names}.")
