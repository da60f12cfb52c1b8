"""Whole checkpoints on disk: quantized, undone, inspected and loaded."""

from kashin_jax.checkpoints.inspecting import Inspection as Inspection
from kashin_jax.checkpoints.inspecting import TensorRow as TensorRow
from kashin_jax.checkpoints.inspecting import inspect_checkpoint as inspect_checkpoint
from kashin_jax.checkpoints.loading import load_quantized as load_quantized
from kashin_jax.checkpoints.loading import packed_layers as packed_layers
from kashin_jax.checkpoints.plan import LayerPlan as LayerPlan
from kashin_jax.checkpoints.plan import Plan as Plan
from kashin_jax.checkpoints.plan import plan_checkpoint as plan_checkpoint
from kashin_jax.checkpoints.reports import REPORT_NAME as REPORT_NAME
from kashin_jax.checkpoints.sources import open_source as open_source
from kashin_jax.checkpoints.streaming import StreamResult as StreamResult
from kashin_jax.checkpoints.streaming import (
    dequantize_checkpoint as dequantize_checkpoint,
)
from kashin_jax.checkpoints.streaming import quantize_checkpoint as quantize_checkpoint

__all__ = [
    "REPORT_NAME",
    "Inspection",
    "LayerPlan",
    "Plan",
    "StreamResult",
    "TensorRow",
    "dequantize_checkpoint",
    "inspect_checkpoint",
    "load_quantized",
    "open_source",
    "packed_layers",
    "plan_checkpoint",
    "quantize_checkpoint",
]
