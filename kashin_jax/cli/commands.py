"""What the subcommands of `kashin` do; each returns an exit code."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kashin_jax.cli.calibrate import TOKENS, print_calibrated, read_calibration
from kashin_jax.cli.evaluate import language_model, read_text, run_eval
from kashin_jax.errors import UsageError
from kashin_jax.io import open_checkpoint, quantized_before, read_json
from kashin_jax.methods import JointKashin, config_from_json
from kashin_jax.models.chat import chat_prompt
from kashin_jax.models.generation import generate, stop_tokens
from kashin_jax.models.tokenizer import load_tokenizer
from kashin_jax.pipeline import (
    Inspection,
    Plan,
    Refinement,
    Rules,
    calibration_text,
    dequantize_checkpoint,
    inspect_checkpoint,
    plan_checkpoint,
    quantize_checkpoint,
    refine_checkpoint,
    rules_from_json,
)
from kashin_jax.pipeline.allocate import JOINT_ERRORS
from kashin_jax.pipeline.calibration import calibration_rules
from kashin_jax.pipeline.mixed_widths import mixed_checkpoint_rules
from kashin_jax.pipeline.role_counts import count_roles
from kashin_jax.pipeline.table import aligned

__all__ = [
    "run_dequantize",
    "run_eval",
    "run_generate",
    "run_inspect",
    "run_quantize",
    "run_refine",
]


def run_quantize(
    src: str,
    dst: str,
    *,
    bits: int | float | None,
    method: str | None,
    rules: str | None,
    settings: Sequence[tuple[str, Any]],
    skip: Sequence[str],
    seed: int,
    max_shard_size: int,
    calibration: str | None,
    calibration_tokens: int | None,
    calibration_weighting: str,
    calibration_asymmetric: bool,
    dry_run: bool,
    force: bool,
    restart: bool,
) -> int:
    """Quantizes a checkpoint, or prints what would become of it."""
    budget = bits if _is_budget(bits, method) else None
    # Of a budget any width will do: layers get their own.
    width = min(JOINT_ERRORS) if budget else bits
    chosen = _rules({"bits": width, "method": method, **dict(settings)}, rules, skip)
    source = open_checkpoint(src)
    if types := quantized_before(source.config):
        print(
            f"{src} holds {types}: weights that were quantized once are quantized "
            "again. Errors are counted from what they decode to, and grids like theirs "
            "look better than they are.",
            file=sys.stderr,
        )
    text = read_calibration(
        source, calibration, calibration_tokens, calibration_weighting,
        calibration_asymmetric, seed,
    )  # fmt: skip
    if dry_run:
        if text is not None:
            chosen = calibration_rules(chosen, text.weighting)
        if budget is not None:
            chosen, widths = mixed_checkpoint_rules(source, chosen, budget, seed)
            print(widths)
        plan = plan_checkpoint(source, chosen)
        print(count_roles(source))
        _print_plan(plan)
        return 0
    result = quantize_checkpoint(
        src,
        dst,
        chosen,
        seed=seed,
        budget=budget,
        max_shard_bytes=max_shard_size,
        exist_ok=True,
        replace=_replaced(force, restart),
        announce=lambda source: print(count_roles(source), flush=True),
        calibration=text,
    )
    if result.is_old:
        print(f"Already done: {dst} holds the result of this command.")
    elif result.resumed:
        print(f"{result.resumed} shards were finished already.")
    if result.widths is not None:
        print(result.widths)
    print_calibrated(result.reports)
    # The run knows why tensors stay.
    found = inspect_checkpoint(dst, verify=False)
    _print_totals(found._replace(coverage=result.coverage))
    return 0


def _replaced(force: bool, restart: bool) -> Literal["finished", "unfinished"] | None:
    if force:
        return "finished"
    return "unfinished" if restart else None


def _is_budget(bits: int | float | None, method: str | None) -> bool:
    """Whether a width is none of joint coding's, but one that they have on average."""
    if bits is None or method not in (None, JointKashin.name) or bits in JOINT_ERRORS:
        return False
    return min(JOINT_ERRORS) < bits < max(JOINT_ERRORS)


def _rules(fields: Mapping[str, Any], file: str | None, skip: Sequence[str]) -> Rules:
    given = {name: value for name, value in fields.items() if value is not None}
    default = config_from_json(given)
    content: dict[str, Any] = {} if file is None else _read_rules(Path(file))
    if "config" in content and given:
        raise UsageError(
            f"{file}: has a `config`, which --bits, --method and --set would "
            "contradict; leave one of them out."
        )
    found = rules_from_json(content, default)
    return dataclasses.replace(found, skip=(*found.skip, *skip))


def _read_rules(path: Path) -> dict[str, Any]:
    text = path.read_text("utf-8").lstrip() if path.is_file() else ""
    if curly := sorted(set(text) & set("\u201c\u201d\u2018\u2019")):
        raise UsageError(
            f"{path}: has the quotes {' '.join(curly)}, which a word processor makes; "
            'JSON takes " alone.'
        )
    if text.startswith("["):
        try:
            return {"rules": json.loads(text)}
        # Nesting of some thousand levels ends in a RecursionError.
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: is not valid JSON ({error}).") from error
    return dict(read_json(path))


def _print_plan(plan: Plan) -> None:
    rows = [["tensor", "layer", "shape", "method", "bits/weight", "bytes"]]
    for layer in plan.layers:
        candidate, config, reason = layer.choice
        what = f"stays: {reason}"
        if config is not None:
            what = f"{config.name}, {config.bits} bits"
        rows.append(
            [
                layer.choice.name,
                layer.choice.path,
                " x ".join(map(str, candidate.shape)),
                what,
                f"{layer.bits_per_weight:.3f}",
                f"{layer.bytes_after:,}",
            ]
        )
    print(aligned(rows, left=4))
    print(plan.coverage)
    packed = sum(layer.bytes_after for layer in plan.quantized)
    print(
        f"{len(plan.quantized)} matrices quantized, "
        f"{len(plan.tensors) - len(plan.quantized)} tensors copied "
        f"({plan.bytes_after - packed:,} bytes); {plan.bytes_after:,} bytes in all."
    )
    plan.coverage.warn()


def run_inspect(src: str, *, verify: bool, as_json: bool) -> int:
    """Lists a checkpoint; exit code 1 if a file has changed."""
    found = inspect_checkpoint(src, verify=verify)
    if as_json:
        print(_as_json(found))
    else:
        print(aligned(_table(found), left=3))
        print(found.roles)
        _print_totals(found)
    if found.damaged:
        names = ", ".join(found.damaged)
        print(f"Changed since they were written: {names}.", file=sys.stderr)
    return 1 if found.damaged else 0


def _table(found: Inspection) -> list[list[str]]:
    rows = [["tensor", "stored as", "shape", "bits/weight", "rel. sq. error"]]
    for row in found.tensors:
        error = row.relative_squared_error
        rows.append([
            row.name, row.form, " x ".join(map(str, row.shape)) or "scalar",
            f"{row.bits_per_weight:.3f}", "-" if error is None else f"{error:.5f}",
        ])  # fmt: skip
    return rows


def _as_json(found: Inspection) -> str:
    bits = {
        "bits_per_weight": found.bits_per_weight,
        "model_bits_per_weight": found.model_bits_per_weight,
    }
    tensors = {"tensors": [row._asdict() for row in found.tensors]}
    left = [part._asdict() for part in found.coverage.left]
    coverage = {"coverage": found.coverage._asdict() | {"left": left}}
    roles = {"roles": found.roles._asdict()}
    content = found._asdict() | bits | tensors | coverage | roles
    return json.dumps(content, indent=2)


def _print_totals(found: Inspection) -> None:
    if found.bits_per_weight is not None:
        print(
            f"{found.packed_weights:,} weights quantized, "
            f"{found.bits_per_weight:.3f} stored bits each."
        )
        print(found.coverage)
    print(
        f"{found.weights:,} weights in {found.disk_bytes:,} bytes, "
        f"{found.model_bits_per_weight:.3f} bits each."
    )
    if found.damaged == ():
        print("Every file is as it was written.")


def run_refine(
    src: str,
    original: str,
    dst: str,
    *,
    calibration: str,
    calibration_tokens: int | None,
    block_epochs: int | None,
    epochs: int | None,
    text_weight: float | None,
    seed: int,
    force: bool,
    restart: bool,
) -> int:
    """Refines a quantized checkpoint."""
    source = open_checkpoint(original)
    text = calibration_text(
        source, read_text(Path(calibration)), calibration_tokens or TOKENS
    ).calibration(seed)
    given: dict[str, Any] = {
        "block_epochs": block_epochs, "epochs": epochs, "text_weight": text_weight
    }  # fmt: skip
    chosen = {name: value for name, value in given.items() if value is not None}
    refinement = Refinement(seed=seed, **chosen)
    found = refine_checkpoint(
        src, dst, original, text.windows, refinement, exist_ok=True,
        replace=_replaced(force, restart),
    )  # fmt: skip
    if found.gains is None:
        print(f"Already done: {dst} holds the result of this command.")
    else:
        print(found.gains)
    _print_totals(inspect_checkpoint(dst, verify=False))
    return 0


def run_dequantize(src: str, dst: str, *, max_shard_size: int | None) -> int:
    """Decodes a checkpoint."""
    dequantize_checkpoint(src, dst, max_shard_bytes=max_shard_size)
    _print_totals(inspect_checkpoint(dst, verify=False))
    return 0


def run_generate(
    src: str,
    prompt: str,
    *,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> int:
    """Prints the prompt and its continuation, or the answer of a chat model."""
    loaded = language_model(src)
    tokenizer = load_tokenizer(loaded.directory)
    if chat:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.encode(chat_prompt(loaded.directory, messages))
        shown = ids.size
    else:
        ids, shown = tokenizer.encode(prompt), 0
        if tokenizer.bos_id is not None:
            ids, shown = np.insert(ids, 0, tokenizer.bos_id), 1
    if not ids.size:
        raise UsageError("The prompt is empty; give at least one word.")
    ends = stop_tokens(loaded.directory, loaded.config)
    found = generate(
        loaded.model,
        jnp.asarray(ids)[None],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        key=jax.random.key(seed),
        eos_token_id=ends,
    )
    text = np.asarray(found[0])
    # What ends the text is no part of it, and what follows is padding.
    (stops,) = np.nonzero(np.isin(text[ids.size :], ends))
    end = ids.size + stops[0] if stops.size else text.size
    print(tokenizer.decode(text[shown:end]))
    return 0
