"""The finished study on the terminal and on the disk."""

from collections.abc import Sequence
from pathlib import Path

from experiments.common.flag_values import command_line
from experiments.common.results import atomic_path, write_results
from experiments.common.tables import Record, aligned_table, markdown_table
from experiments.depth.config import DepthConfig
from experiments.depth.drawing import draw
from experiments.depth.table import (
    SUMMARY_COLUMNS,
    setting_columns,
    setting_rows,
    summary_rows,
)

__all__ = ["present", "title_of"]

_ENOUGH = (
    "Enough: the fewest steps, or the loosest tolerance, whose value is worse than the "
    "best at any depth by no more than the standard deviation over seeds at the best, "
    "or by no more than 1 % of it."
)
_ALL = "All settings"


def present(config: DepthConfig, records: Sequence[Record], out: Path) -> None:
    """Prints the tables; adds to depth.jsonl, writes depth.md and depth.png.

    Args:
      config: The flags.
      records: All of the study.
      out: An existing directory.
    """
    summary, settings = summary_rows(records), setting_rows(records)
    columns = setting_columns(records)
    facts = _facts(config, records)
    print("\n".join(facts) + "\n\n" + aligned_table(summary, SUMMARY_COLUMNS))
    print(f"\n{_ALL} (* enough):\n{aligned_table(settings, columns)}")
    title = title_of(records)
    written = write_results(
        out, "depth", records, SUMMARY_COLUMNS, rows=summary, title=title, facts=facts,
        command=command_line("depth", config, always=("bits",)),
        appendix=f"## {_ALL}\n`*` marks enough.\n\n{markdown_table(settings, columns)}",
    )  # fmt: skip
    picture = out / "depth.png"
    figure = draw(records, title)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, bbox_inches="tight", pad_inches=0.08)
    print(f"\nWritten: {written.jsonl}, {written.markdown}, {picture}")


def title_of(records: Sequence[Record]) -> str:
    """Models, and the seeds where there are several."""
    models = ", ".join(dict.fromkeys(record["model"] for record in records))
    seeds = {record["seed"] for record in records} - {None}
    spread = f", mean ± standard deviation of {len(seeds)} seeds" * (len(seeds) > 1)
    return f"{models}: quality against the depth of the decomposition{spread}"


def _facts(config: DepthConfig, records: Sequence[Record]) -> list[str]:
    last = records[-1]
    subjects = dict.fromkeys(
        f"Model {r['model']}: {r['data']}, {r['examples']:,} examples or predictions; "
        f"{r['protocol']}."
        for r in records
    )
    return [
        *subjects,
        f"The paper's method, basis {config.basis}: `--steps` end at the tolerance "
        f"{config.rtol:g}, `--rtols` after {config.max_steps} steps.",
        _ENOUGH,
        "Steps and residuals are means over layers, sizes are stored bits, `seconds` "
        "is quantization time on this device, compilation included.",
        f"{last['device']}, jax {last['jax_version']}, kashin_jax "
        f"{last['kashin_jax_version']}.",
    ]
