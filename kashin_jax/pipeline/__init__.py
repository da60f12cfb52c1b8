"""Whole models quantized: NNX models, trees of parameters, checkpoints on disk."""

from kashin_jax.pipeline.allocate import allocate_widths as allocate_widths
from kashin_jax.pipeline.calibration import Calibration as Calibration
from kashin_jax.pipeline.calibration import calibration_windows as calibration_windows
from kashin_jax.pipeline.calibration_examples import (
    CalibrationExamples as CalibrationExamples,
)
from kashin_jax.pipeline.calibration_text import CalibrationText as CalibrationText
from kashin_jax.pipeline.calibration_text import calibration_text as calibration_text
from kashin_jax.pipeline.checkpoint import StreamResult as StreamResult
from kashin_jax.pipeline.checkpoint import (
    dequantize_checkpoint as dequantize_checkpoint,
)
from kashin_jax.pipeline.checkpoint import quantize_checkpoint as quantize_checkpoint
from kashin_jax.pipeline.checkpoint_plan import plan_checkpoint as plan_checkpoint
from kashin_jax.pipeline.inspecting import Inspection as Inspection
from kashin_jax.pipeline.inspecting import TensorRow as TensorRow
from kashin_jax.pipeline.inspecting import inspect_checkpoint as inspect_checkpoint
from kashin_jax.pipeline.loading import load_quantized as load_quantized
from kashin_jax.pipeline.loading import packed_layers as packed_layers
from kashin_jax.pipeline.loading import packed_tensors as packed_tensors
from kashin_jax.pipeline.nnx import QuantizedModel as QuantizedModel
from kashin_jax.pipeline.nnx import plan_model as plan_model
from kashin_jax.pipeline.nnx import quantize_model as quantize_model
from kashin_jax.pipeline.nnx import replace_kernels as replace_kernels
from kashin_jax.pipeline.nnx import selected_kernels as selected_kernels
from kashin_jax.pipeline.params import QuantizedParams as QuantizedParams
from kashin_jax.pipeline.params import dequantize_params as dequantize_params
from kashin_jax.pipeline.params import plan_params as plan_params
from kashin_jax.pipeline.params import quantize_params as quantize_params
from kashin_jax.pipeline.paths import path_key as path_key
from kashin_jax.pipeline.plan import LayerPlan as LayerPlan
from kashin_jax.pipeline.plan import Plan as Plan
from kashin_jax.pipeline.plan import packed_size as packed_size
from kashin_jax.pipeline.refine import Gain as Gain
from kashin_jax.pipeline.refine import Refinement as Refinement
from kashin_jax.pipeline.refine import RefinementReport as RefinementReport
from kashin_jax.pipeline.refine import refine_model as refine_model
from kashin_jax.pipeline.refined_checkpoint import (
    RefinedCheckpoint as RefinedCheckpoint,
)
from kashin_jax.pipeline.refined_checkpoint import (
    refine_checkpoint as refine_checkpoint,
)
from kashin_jax.pipeline.report import REPORT_NAME as REPORT_NAME
from kashin_jax.pipeline.report import CalibrationReport as CalibrationReport
from kashin_jax.pipeline.report import CalibrationSeconds as CalibrationSeconds
from kashin_jax.pipeline.report import LayerReport as LayerReport
from kashin_jax.pipeline.report import calibration_seconds as calibration_seconds
from kashin_jax.pipeline.report import outliers as outliers
from kashin_jax.pipeline.report import report_table as report_table
from kashin_jax.pipeline.rules import DEFAULT_SKIPS as DEFAULT_SKIPS
from kashin_jax.pipeline.rules import SHARED_INPUTS as SHARED_INPUTS
from kashin_jax.pipeline.rules import Rule as Rule
from kashin_jax.pipeline.rules import Rules as Rules
from kashin_jax.pipeline.rules import default_select as default_select
from kashin_jax.pipeline.rules import rules_from_json as rules_from_json
from kashin_jax.pipeline.rules import rules_to_json as rules_to_json

__all__ = [
    "DEFAULT_SKIPS",
    "REPORT_NAME",
    "SHARED_INPUTS",
    "Calibration",
    "CalibrationExamples",
    "CalibrationReport",
    "CalibrationSeconds",
    "CalibrationText",
    "Gain",
    "Inspection",
    "LayerPlan",
    "LayerReport",
    "Plan",
    "QuantizedModel",
    "QuantizedParams",
    "RefinedCheckpoint",
    "Refinement",
    "RefinementReport",
    "Rule",
    "Rules",
    "StreamResult",
    "TensorRow",
    "allocate_widths",
    "calibration_seconds",
    "calibration_text",
    "calibration_windows",
    "default_select",
    "dequantize_checkpoint",
    "dequantize_params",
    "inspect_checkpoint",
    "load_quantized",
    "outliers",
    "packed_layers",
    "packed_size",
    "packed_tensors",
    "path_key",
    "plan_checkpoint",
    "plan_model",
    "plan_params",
    "quantize_checkpoint",
    "quantize_model",
    "quantize_params",
    "refine_checkpoint",
    "refine_model",
    "replace_kernels",
    "report_table",
    "rules_from_json",
    "rules_to_json",
    "selected_kernels",
]
