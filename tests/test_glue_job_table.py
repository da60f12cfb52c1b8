"""Lines, published values and bars of GLUE's table, from made-up records."""

import pytest

from experiments.classification.plot import plot_glue
from experiments.classification.tasks import GLUE_TASKS, TASKS
from experiments.common.methods import (
    FULL_PRECISION,
    GLUE_METHODS,
    METHODS,
    choose_methods,
)
from experiments.common.published import published_glue
from experiments.common.tables import aligned_table
from experiments.glue import glue_columns, table_rows
from kashin_jax.models.bert import ClassifierConfig

RTE, STSB, MRPC = TASKS["rte"], TASKS["stsb"], TASKS["mrpc"]
BERT = ClassifierConfig(
    model_type="bert", vocab_size=30522, hidden_size=768, num_hidden_layers=12,
    num_attention_heads=12, intermediate_size=3072,
)  # fmt: skip
ROBERTA = ClassifierConfig(
    model_type="roberta", vocab_size=50265, hidden_size=768, num_hidden_layers=12,
    num_attention_heads=12, intermediate_size=3072, max_position_embeddings=514,
    pad_token_id=1, type_vocab_size=1,
)  # fmt: skip


def record(method=FULL_PRECISION, bits=32, **fields):
    """A record with every field; without a task, of a method that does not exist."""
    return {
        "method": method, "bits": bits, "stored_bits_per_weight": float(bits),
        "task": "rte", "metric": "accuracy", "value": 60.0, "seed": None,
        "basis": None, "relative_error": None, "converged_share": None,
        "quantize_seconds": None, "published": None, "weights_sha256": "a",
        "note": f"About {method}.", **fields,
    }  # fmt: skip


def test_a_cell_is_the_mean_and_the_standard_deviation_of_seeds():
    # Of 60, 61 and 65: mean 62, squares 4 + 1 + 9 = 14, over n - 1 = 2, root 2.65.
    records = [
        record("kashin", 4, seed=seed, value=value)
        for seed, value in enumerate((60.0, 61.0, 65.0))
    ]
    (row,) = table_rows([RTE], records)
    assert (row["rte"], row["seeds"]) == ("62.00±2.6", 3)


def test_seeds_that_agree_have_a_spread_of_zero_and_one_seed_has_none():
    twice = [record("kashin", 4, seed=seed) for seed in (0, 1)]
    assert table_rows([RTE], twice)[0]["rte"] == "60.00±0.0"
    (once,) = table_rows([RTE], [record("kashin", 4, seed=0)])
    assert (once["rte"], once["seeds"]) == ("60.00", 1)
    (fixed,) = table_rows([RTE], [record("uniform", 4)])
    assert (fixed["rte"], fixed["seeds"]) == ("60.00", None)


def test_a_task_of_two_metrics_has_both_in_the_paper_s_order():
    records = [
        record(task="mrpc", metric=metric, value=value)
        for metric, value in (("f1", 88.814), ("accuracy", 84.306))
    ]
    (row,) = table_rows([RTE, MRPC], records)
    assert (row["rte"], row["mrpc"]) == (None, "84.31 / 88.81")


def test_sizes_and_errors_are_means_over_checkpoints_not_over_metrics():
    # Two checkpoints, the second with two metrics: (10 + 20) / 2, not 50 / 3.
    fields = {"relative_error": 10.0, "quantize_seconds": 1.0}
    second = {
        "relative_error": 20.0, "quantize_seconds": 3.0, "weights_sha256": "b",
        "task": "stsb",
    }  # fmt: skip
    records = [
        record("uniform", 4, **fields),
        record("uniform", 4, **second, metric="pearson"),
        record("uniform", 4, **second, metric="spearman"),
    ]
    (row,) = table_rows([RTE, STSB], records)
    assert (row["relative_error"], row["quantize_seconds"]) == (15.0, 2.0)


def test_a_method_that_does_not_exist_at_a_width_is_dashes_and_a_reason():
    absent = dict.fromkeys(
        ("task", "metric", "value", "stored_bits_per_weight", "weights_sha256")
    )
    records = [record(), record("nf4-g64", 3, **absent, note="NF4 exists at 4 bits.")]
    rows = table_rows([RTE], records)
    *_, line, first, second = aligned_table(rows, glue_columns([RTE], records)).split(
        "\n"
    )
    assert line.split() == ["nf4-g64", "[2]", "3", *"-" * 6]
    assert (first, second) == ("[1] About full precision.", "[2] NF4 exists at 4 bits.")


def test_bases_are_a_column_and_rows_of_their_own_where_there_are_several():
    records = [
        record(),
        record("kashin", 4, basis="hadamard", seed=0, value=1.0),
        record("kashin", 4, basis="haar", seed=0, value=2.0),
    ]
    titles = [column.title for column in glue_columns([RTE], records)]
    assert titles[:3] == ["method", "bits", "basis"]
    assert [row["rte"] for row in table_rows([RTE], records)] == [
        "60.00", "1.00", "2.00"
    ]  # fmt: skip
    assert "basis" not in [c.title for c in glue_columns([RTE], records[:2])]


# Copied by hand from Table 3 of arXiv 2404.09737: a few of each row.
PAPER = {
    (ROBERTA, FULL_PRECISION): {"cola": (59.06,), "stsb": (89.65, 89.49)},
    (ROBERTA, "uniform"): {"qqp": (36.82, 53.82), "mrpc": (68.38, 81.22)},
    (ROBERTA, "k-means"): {"sst2": (92.77,), "rte": (55.23,), "mrpc": (71.32, 75.77)},
    (ROBERTA, "kashin"): {"mnli": (86.41, 85.51), "mrpc": (83.08, 87.10)},
    (BERT, FULL_PRECISION): {"qqp": (90.66, 87.39), "wnli": (42.25,)},
    (BERT, "uniform"): {"stsb": (-0.21, -0.25), "cola": (1.24,), "wnli": (49.3,)},
    (BERT, "k-means"): {"qnli": (88.01,), "mrpc": (34.55, 8.87), "wnli": (54.92,)},
    (BERT, "kashin"): {"cola": (59.65,), "rte": (63.53,), "mrpc": (84.80, 89.31)},
}


@pytest.mark.parametrize(("config", "method"), PAPER, ids=str)
def test_published_values_are_the_paper_s(config, method):
    for task, expected in PAPER[config, method].items():
        found = tuple(
            published_glue(config, method, 4, task, metric)
            for metric in TASKS[task].metrics
        )
        assert found == expected


@pytest.mark.parametrize("method", [FULL_PRECISION, "uniform", "k-means", "kashin"])
@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=lambda c: c.model_type)
def test_the_paper_has_every_metric_of_every_task(config, method):
    values = [
        published_glue(config, method, 4, task.name, metric)
        for task in map(TASKS.get, GLUE_TASKS)
        for metric in task.metrics
    ]
    assert len(values) == 13 and None not in values


SMALL = ClassifierConfig(
    model_type="bert", vocab_size=30522, hidden_size=384, num_hidden_layers=6,
    num_attention_heads=12, intermediate_size=1536,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "method", "bits", "task", "metric"),
    [
        (BERT, "kashin", 3, "rte", "accuracy"),
        (BERT, "rtn-g128", 4, "rte", "accuracy"),
        (BERT, "kashin", 4, "rte", "f1"),
        (BERT, "kashin", 4, "sentiment-nyt", "accuracy"),
        (SMALL, "kashin", 4, "rte", "accuracy"),
        (SMALL, FULL_PRECISION, 16, "rte", "accuracy"),
    ],
)
def test_nothing_else_has_a_published_value(config, method, bits, task, metric):
    assert published_glue(config, method, bits, task, metric) is None


def test_full_precision_is_the_paper_s_in_whatever_precision_it_is_stored():
    for bits in (16, 32):
        assert published_glue(BERT, FULL_PRECISION, bits, "rte", "accuracy") == 64.98


def test_the_paper_s_row_stands_behind_ours():
    def ours(method, bits, **fields):
        return [
            record(
                method, bits, task="mrpc", metric=metric, value=80.0, **fields,
                published=published_glue(BERT, method, bits, "mrpc", metric),
            )
            for metric in MRPC.metrics
        ]  # fmt: skip

    seeds = [r for seed in (0, 1) for r in ours("kashin", 4, seed=seed)]
    records = [*ours(FULL_PRECISION, 16), *seeds, *ours("rtn-g128", 4)]
    rows = table_rows([RTE, MRPC], records)
    assert [(r["method"], r["bits"], r["mrpc"]) for r in rows] == [
        ("full precision", 16, "80.00 / 80.00"),
        ("full precision, published", 32, "84.31 / 88.81"),
        ("kashin", 4, "80.00±0.0 / 80.00±0.0"),
        ("kashin, published", 4, "84.80 / 89.31"),
        ("rtn-g128", 4, "80.00 / 80.00"),
    ]
    assert rows[3]["rte"] is None
    assert "arXiv 2404.09737" in rows[3]["note"]


def test_all_stands_for_the_paper_s_rows_and_then_the_controls():
    chosen = choose_methods(("all",), GLUE_METHODS)
    assert list(chosen) == [
        "uniform", "k-means", "kashin", "rtn-g128", "nf4-g64", "rotate-k-means"
    ]  # fmt: skip
    assert all(chosen[name] is METHODS[name] for name in chosen)
    named = choose_methods(("kashin", "uniform", "rtn-channel"), GLUE_METHODS)
    assert list(named) == ["uniform", "kashin", "rtn-channel"]
    more = choose_methods(("kashin-authors", "all"), GLUE_METHODS)
    assert list(more) == [*GLUE_METHODS, "kashin-authors"]


def drawn(widths, methods=("uniform", "kashin"), seeds=(0, 1)):
    values = {"rte": ("accuracy",), "stsb": ("pearson", "spearman")}
    cells = [(task, metric) for task, names in values.items() for metric in names]
    full = [record(task=task, metric=metric) for task, metric in cells]
    return full + [
        record(
            method, bits, task=task, metric=metric, seed=seed,
            value=70.0 - 40 * seed - bits,
        )
        for bits in widths for method in methods for seed in seeds
        for task, metric in cells
    ]  # fmt: skip


@pytest.mark.parametrize(
    "records",
    [
        drawn([4]),
        drawn([2, 3, 4, 6], GLUE_METHODS, seeds=(0,)),
        drawn([]),
        [*drawn([4]), record("nf4-g64", 3, task=None, metric=None, value=None)],
        [record(value=-12.0), record("uniform", 4, value=-0.25)],
        [record(), record("nf4-g64", 4, task=None, metric=None, value=None)],
    ],
    ids=["one width", "widths", "no method", "no value at a width", "negative", "none"],
)
def test_a_figure_is_a_whole_png_whatever_the_values(tmp_path, records):
    path = tmp_path / "figure.png"
    plot_glue(records, [RTE, STSB], path, title="A title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


def bars(monkeypatch, tmp_path, records):
    """Height and whisker of each bar by label, panel by panel."""
    from matplotlib.axes import Axes

    panels = {}
    original = Axes.bar

    def bar(self, x, height, *args, label, **kwargs):
        found = panels.setdefault(id(self), {})
        found[label] = (height, kwargs.get("yerr"))
        return original(self, x, height, *args, label=label, **kwargs)

    monkeypatch.setattr(Axes, "bar", bar)
    plot_glue(records, [RTE], tmp_path / "figure.png", title="")
    return list(panels.values())


def test_bars_are_means_and_whiskers_reach_the_extremes(monkeypatch, tmp_path):
    records = [
        record("kashin", 4, seed=seed, value=value)
        for seed, value in enumerate((60.0, 61.0, 65.0))
    ]
    (panel,) = bars(monkeypatch, tmp_path, [*records, record("uniform", 4)])
    assert panel == {"kashin": ([62.0], [(2.0,), (3.0,)]), "uniform": ([60.0], None)}


def test_bars_of_two_bases_are_told_apart(monkeypatch, tmp_path):
    records = [
        record("kashin", 4, basis=basis, seed=0, value=value)
        for basis, value in (("hadamard", 60.0), ("haar", 50.0))
    ]
    (panel,) = bars(monkeypatch, tmp_path, [*records, record("uniform", 4)])
    assert panel == {
        "kashin, hadamard": ([60.0], None),
        "kashin, haar": ([50.0], None),
        "uniform": ([60.0], None),
    }
