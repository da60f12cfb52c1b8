"""Records, tables, partial scores and figures on disk."""

import dataclasses
import datetime
import errno
import json
import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.common.perplexity_table import plot_perplexity
from experiments.common.results import (
    append_jsonl,
    environment_fields,
    merge_records,
    prepare_output,
    read_jsonl,
    record_key,
    remove_work,
    start_work,
    to_json,
    write_jsonl,
    write_results,
)
from experiments.common.resumable import PartialScores, score_resumably
from experiments.common.tables import (
    PERPLEXITY_COLUMNS,
    Column,
    aligned_table,
    fixed,
    increase,
    markdown_table,
    share,
)
from kashin_jax.errors import CheckpointError, DataError, UsageError
from kashin_jax.evaluation import ScoredBatch, make_windows

FULL = {"method": "full precision", "stored_bits_per_weight": 16.0, "perplexity": 25.9}
KASHIN = {
    "method": "Kashin", "bits": 4, "stored_bits_per_weight": 4.0123,
    "perplexity": 27.5, "increase": 1.6, "converged_share": 0.99999,
}  # fmt: skip
NF4 = {"method": "NF4 g64", "bits": 3, "note": "defined for 4 bits only"}
BROKEN = {
    "method": "uniform", "bits": 3, "stored_bits_per_weight": 3.0,
    "perplexity": math.inf, "increase": math.inf,
}  # fmt: skip
RECORDS = [FULL, KASHIN, NF4, {**NF4, "bits": 2}, BROKEN]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False)))
def test_records_survive_writing_and_reading(record):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "r.jsonl"
        write_jsonl(path, [record, record])
        assert read_jsonl(path) == [record, record]


def test_json_lines_are_strict_json_whatever_the_values():
    record = {"a": math.nan, "b": np.float32(0.5), "c": np.int64(3), "d": None,
              "e": jnp.asarray([1.0, -jnp.inf]), "f": {"g": (math.inf,)}}  # fmt: skip
    line = to_json(record)

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(line, parse_constant=refuse) == {
        "a": "nan", "b": 0.5, "c": 3, "d": None, "e": [1.0, "-inf"], "f": {"g": ["inf"]}
    }  # fmt: skip
    assert "\n" not in line


def test_appending_mends_a_line_cut_off_at_any_byte(tmp_path):
    path = tmp_path / "r.jsonl"
    write_jsonl(path, [{"i": 0, "s": "é\n"}, {"i": 1, "s": "x"}])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        append_jsonl(path, {"i": 2})
        # Only the line end may be missing for a record to count as finished.
        finished = (cut >= first - 1) + (cut >= len(whole) - 1)
        assert [r["i"] for r in read_jsonl(path)] == [*range(finished), 2]


def test_a_damaged_line_that_is_not_the_last_is_an_error(tmp_path):
    path = tmp_path / "r.jsonl"
    for damage in ('{"a": 1', "[1]", ""):
        path.write_text(f'{{"a": 0}}\n{damage}\n{{"a": 2}}\n')
        with pytest.raises(DataError, match=r"r\.jsonl` line 2 is not a JSON object"):
            read_jsonl(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "r.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": object()}])
    assert read_jsonl(path) == [{"a": 1}]
    assert list(tmp_path.iterdir()) == [path]


def test_output_directories_are_made(tmp_path):
    assert prepare_output(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "results"):
        with pytest.raises(UsageError, match=f"`--out` {path} cannot be written"):
            prepare_output(path)

    # A read-only file system cannot be had without privileges, nor with them a
    # directory that refuses its owner.
    def read_only(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(UsageError, match=r"\(Read-only file system\); choose another"):
        prepare_output(tmp_path)


def test_environment_names_versions_and_device():
    fields = environment_fields()
    assert set(fields) == {"kashin_jax_version", "jax_version", "device"}
    assert all(fields.values())


def test_markdown_has_dashes_for_missing_values_and_reasons_below():
    lines = markdown_table(RECORDS, PERPLEXITY_COLUMNS).splitlines()
    assert cells(lines[1]) == ["---"] + ["---:"] * 8
    assert cells(lines[2])[:6] == ["full precision", "-", "16.000", "-", "25.90", "-"]
    assert cells(lines[3])[4:8] == ["27.50", "+1.60", "-", "99.9%"]
    assert cells(lines[4])[:3] == ["NF4 g64 [1]", "3", "-"]
    assert cells(lines[5])[:2] == ["NF4 g64 [1]", "2"]
    assert cells(lines[6])[4:6] == ["inf", "+inf"]
    assert lines[7:] == ["", "- [1] defined for 4 bits only"]


def test_terminal_tables_align_numbers_to_the_right():
    lines = aligned_table(RECORDS, PERPLEXITY_COLUMNS).splitlines()
    end = lines[0].index("perplexity") + len("perplexity")
    values = ["25.90", "27.50", "-", "-", "inf"]
    for line, value in zip(lines[2:7], values, strict=True):
        assert line[:end].endswith(" " + value)
    assert lines[3].startswith("Kashin  ")
    assert lines[7:] == ["[1] defined for 4 bits only"]


def test_no_cell_can_break_a_table():
    record = {"method": "a|b\nc", "note": "two\nlines"}
    columns = [Column("method", "method"), Column("bits", "bits")]
    assert markdown_table([record], columns).splitlines()[2:] == [
        "| a\\|b c [1] | - |", "", "- [1] two lines"
    ]  # fmt: skip


def test_different_notes_have_different_marks():
    records = [{"m": "a", "note": "x"}, {"m": "b", "note": "y"}, {"m": "c"}]
    lines = aligned_table(records, [Column("m", "m")]).splitlines()
    assert lines == ["m", "-----", "a [1]", "b [2]", "c", "[1] x", "[2] y"]


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (fixed(2), 29.257, "29.26"),
        (fixed(2), 123456.7, "1.23e+05"),
        (fixed(2), 1e30, "1.00e+30"),
        (fixed(2), math.nan, "nan"),
        (increase, 0.0, "+0.00"),
        (increase, -0.25, "-0.25"),
        (increase, math.nan, "nan"),
        (share, 1.0, "100%"),
        (share, 47 / 48, "97.9%"),
        (share, 0.9996, "99.9%"),
    ],
)
def test_numbers_are_shown_for_readers(show, value, text):
    assert show(value) == text


def test_results_are_written_as_records_and_as_a_page(tmp_path):
    written = write_results(
        tmp_path, "table2_opt", RECORDS, PERPLEXITY_COLUMNS,
        title="OPT", command="python -m x --bits=4", facts=["first", "second"],
    )  # fmt: skip
    assert undated(read_jsonl(written.jsonl)) == RECORDS
    page = written.markdown.read_text()
    assert page.startswith(
        "# OPT\n\n```\npython -m x --bits=4\n```\n\n- first\n- second"
    )
    assert page.endswith("\n\n" + markdown_table(RECORDS, PERPLEXITY_COLUMNS) + "\n")
    assert sorted(tmp_path.iterdir()) == [written.jsonl, written.markdown]


def undated(records):
    """The records without their dates, which have to be there and in ISO's form."""
    return [{k: r[k] for k in r if k != "date"} for r in records if DATE(r["date"])]


DATE = datetime.date.fromisoformat


def test_a_record_replaces_its_like_and_leaves_the_others(tmp_path):
    """Guards against rows lost, or doubled, when a command runs again."""
    merge_records(tmp_path, "table2_opt", RECORDS)
    better = {**KASHIN, "perplexity": 27.0}
    other = {**KASHIN, "seed": 1}
    path = merge_records(tmp_path, "table2_opt", [other, better])
    assert path == tmp_path / "table2_opt.jsonl"
    assert undated(read_jsonl(path)) == [FULL, better, *RECORDS[2:], other]


def test_every_choice_that_is_in_the_key_makes_a_record_of_its_own(tmp_path):
    """Guards against a run that overwrites the numbers of other settings."""
    changed = [{"max_tokens": "all"}, {"rtol": 1e-3}, {"basis": "haar"}, {"seed": 0},
               {"dataset": "lambada"}, {"weights_sha256": "ab"}]  # fmt: skip
    records = [KASHIN, *(KASHIN | own for own in changed)]
    merge_records(tmp_path, "table2_opt", records)
    merge_records(tmp_path, "table2_opt", reversed(records))
    found = undated(read_jsonl(tmp_path / "table2_opt.jsonl"))
    assert found == records


def test_a_date_that_is_known_stays(tmp_path):
    dated = {**FULL, "date": "2024-04-15"}
    path = merge_records(tmp_path, "table2_opt", [dated])
    assert read_jsonl(path) == [dated]


def test_keys_compare_numbers_and_objects_by_value():
    fields = ("bits", "config", "absent")
    keys = {
        record_key({"bits": 4, "config": {"a": 1, "b": [2]}}, fields),
        record_key({"bits": 4.0, "config": {"b": [2], "a": 1}}, fields),
        record_key({"bits": np.int64(4), "config": {"b": (2,), "a": 1}}, fields),
    }
    assert len(keys) == 1
    assert record_key({"bits": 4, "config": {"a": 2}}, fields) not in keys


def _merge_one_by_one(directory, seed, count):
    for number in range(count):
        merge_records(directory, "table2_opt", [{"seed": seed, "bits": number}])


def test_two_programs_that_write_to_one_file_lose_no_record(tmp_path):
    """Guards against a program that puts back what it read before another wrote."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: _merge_one_by_one(tmp_path, seed, 10), range(4)))
    records = read_jsonl(tmp_path / "table2_opt.jsonl")
    assert len({(r["seed"], r["bits"]) for r in records}) == len(records) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["table2_opt.jsonl"]


@dataclasses.dataclass(frozen=True)
class _Flags:
    bits: tuple[str, ...] = ("4",)
    batch_size: int = 4
    out: str = "runs"


def test_unfinished_work_is_found_again_by_what_it_depends_on(tmp_path):
    """Guards against two runs in one directory, and one run in two."""
    work = start_work(tmp_path, _Flags(), leaving=("batch_size",))
    again = _Flags(out="elsewhere", batch_size=1)
    assert start_work(tmp_path, again, leaving=("batch_size",)) == work
    other = start_work(tmp_path, _Flags(bits=("3",)), leaving=("batch_size",))
    assert other != work and work.parent == other.parent == tmp_path / "work"
    assert len(work.name) <= 12
    remove_work(other)
    remove_work(work)
    assert list(tmp_path.iterdir()) == []


FINGERPRINT = {"text_sha256": "ab", "context": 4, "scale": np.float32(0.1)}


def stored(path, batches=((0, [1.5, math.inf]), (2, [0.1]), (3, [2.5e300, 3.0]))):
    store = PartialScores(path, FINGERPRINT)
    for first, nlls in batches:
        store.append(ScoredBatch(first, np.asarray(nlls, np.float64)))
    return store


def test_partial_scores_are_read_back_exactly(tmp_path):
    store = stored(tmp_path / "p.jsonl")
    assert store.load().tolist() == [1.5, math.inf, 0.1, 2.5e300, 3.0]


def test_partial_scores_survive_a_kill_at_any_byte(tmp_path):
    path = tmp_path / "p.jsonl"
    complete = stored(path).load()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        store = PartialScores(path, FINGERPRINT)
        finished = store.load()
        assert finished.size in (0, 2, 3, 5)
        assert np.array_equal(finished, complete[: finished.size])
        store.append(ScoredBatch(finished.size, np.asarray([9.0])))
        assert store.load().tolist() == [*finished, 9.0]


def test_scores_of_another_evaluation_are_refused(tmp_path):
    store = stored(tmp_path / "p.jsonl")
    other = PartialScores(store.path, {**FINGERPRINT, "context": 8, "seed": 1})
    with pytest.raises(UsageError, match=r"p\.jsonl` .*different: context, seed\)"):
        other.load()
    write_jsonl(store.path, [{"some": "other file"}])
    with pytest.raises(UsageError, match="another evaluation"):
        store.load()


def test_the_order_of_a_fingerprint_does_not_matter(tmp_path):
    store = PartialScores.in_directory(tmp_path, FINGERPRINT)
    reordered = dict(reversed(FINGERPRINT.items()))
    assert PartialScores.in_directory(tmp_path, reordered).path == store.path
    other = PartialScores.in_directory(tmp_path, {**FINGERPRINT, "context": 8})
    assert other.path != store.path


def test_a_gap_in_partial_scores_is_an_error(tmp_path):
    store = stored(tmp_path / "p.jsonl", batches=((0, [1.0]), (2, [3.0])))
    with pytest.raises(DataError, match="no scores for window 1; delete it"):
        store.load()


class InterruptedModel:
    """Sums the scored tokens; is interrupted at one of its calls."""

    def __init__(self, interrupt_at=None):
        self.calls = 0
        self.interrupt_at = interrupt_at

    def __call__(self, tokens, scored):
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        return jnp.asarray(np.where(scored, tokens, 0).sum(axis=1), jnp.float32)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4))
def test_an_interrupted_evaluation_goes_on_where_it_stopped(interrupt_at, batch_size):
    windows = make_windows(np.arange(36, dtype=np.int32), context=4, drop_last=False)
    expected = np.where(windows.scored, windows.tokens, 0).sum(axis=1)
    num_batches = -(-9 // batch_size)
    interrupted, resumed = InterruptedModel(interrupt_at), InterruptedModel()
    with tempfile.TemporaryDirectory() as directory:
        store = PartialScores.in_directory(Path(directory), FINGERPRINT)
        options = {"batch_size": batch_size, "progress": None}
        if interrupt_at <= num_batches:
            with pytest.raises(KeyboardInterrupt):
                score_resumably(interrupted, windows, store, **options)
        else:
            score_resumably(interrupted, windows, store, **options)
        nlls = score_resumably(resumed, windows, store, **options)
    assert nlls.tolist() == expected.tolist()
    assert interrupted.calls - (interrupt_at <= num_batches) + resumed.calls == (
        num_batches
    )


def test_more_stored_windows_than_there_are_is_an_error(tmp_path):
    windows = make_windows(np.arange(8, dtype=np.int32), context=4, drop_last=False)
    store = stored(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match="holds 5 windows of 2"):
        score_resumably(InterruptedModel(), windows, store, batch_size=1)


@pytest.mark.parametrize(
    "records",
    [
        RECORDS,
        [FULL],
        [BROKEN, {**BROKEN, "perplexity": math.nan}],
        [FULL, KASHIN, {**KASHIN, "basis": "dct", "perplexity": 1e30}],
        [{**KASHIN, "method": f"m{i}", "perplexity": 30.0 + i} for i in range(14)],
    ],
)
def test_a_figure_is_a_whole_png_whatever_the_values(tmp_path, records):
    path = tmp_path / "figure.png"
    plot_perplexity(records, path, title="title")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n") and b"IEND" in content[-12:]
    assert list(tmp_path.iterdir()) == [path]


def test_a_figure_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        plot_perplexity(RECORDS, tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []
