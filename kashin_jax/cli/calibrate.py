"""What `kashin quantize --calibration` says of its effect."""

from collections.abc import Mapping

from kashin_jax.pipeline import LayerReport
from kashin_jax.pipeline.report import kept_without

__all__ = ["print_calibrated"]


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
