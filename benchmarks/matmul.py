"""Products with packed matrices against dense ones: time, bytes, share of bandwidth.

    python -m benchmarks.matmul
    python -m benchmarks.matmul --blocks=square-4096 --methods=kashin-joint --bits=4
    python -m benchmarks.matmul --blocks=square-4096 --bits=4 --breakdown

All matrices of a block of a transformer are multiplied in one compiled program, one
after the other: a single product would measure its dispatch. Codes are random, which
changes no time. The dense product that the others are compared with is the faster of
`x @ K` and `x @ W.T`, in float32. Bandwidth is what a dense product with one row of x
reads, or a copy reads and writes, whichever is more.

Methods named alone are XLA's programs. `METHOD by kernel` is the CPU kernel of
docs/kernels.md, where there is one: it takes turns with the dense products, and its
record has the ratio of the least times, that of the medians and the machine's load.

Prints a table and adds a record per row to bench_matmul.jsonl in `--out` as it goes;
the same command goes on where an earlier one stopped. Half an hour on two CPU cores.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.alternating import time_in_turn
from benchmarks.blocks import BLOCKS, chain, random_layers, transposed
from benchmarks.methods import TIMED, method_config
from experiments.common.flags import (
    check_flags,
    chosen_names,
    flag,
    parse_numbers,
    parse_widths,
    run_program,
)
from experiments.common.result_files import RESULT_FILES
from experiments.common.results import (
    environment_fields,
    merge_records,
    prepare_output,
    read_jsonl,
    record_key,
)
from experiments.common.tables import Column, aligned_table, fixed, share
from kashin_jax import matmul, stored_bits
from kashin_jax.bases import KroneckerBasis
from kashin_jax.bases.identity import IdentityBasis
from kashin_jax.methods import Method
from kashin_jax.tensors import Bases, KashinTensor, Prepared
from kashin_jax.tensors.kernels import report
from kashin_jax.tensors.products import MANY_ROWS, ProductOptions, kernels_of

__all__ = ["main"]

Row = dict[str, Any]
ARTIFACT = "bench_matmul"
_PARTS = ("decode", "product", "transform")
_STREAMED = (2**13, 2**14)  # 512 MiB as float32, more than caches hold


class _Through(NamedTuple):
    """No transform, but not known to be none: keeps the ways of a two-sided basis."""

    def analysis(
        self, x: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        return x

    def synthesis(
        self, y: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        return y


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulConfig:
    """What is multiplied, and how often."""

    blocks: tuple[str, ...] = flag(("all",), f"all, or some of {', '.join(BLOCKS)}.")
    methods: tuple[str, ...] = flag(("all",), f"all, or some of {', '.join(TIMED)}.")
    bits: tuple[str, ...] = flag(
        ("2", "3", "4", "5"), "Code widths, as a list; halves for joint coding alone."
    )
    rows: tuple[str, ...] = flag(
        ("1", "8", "64", "512"), "Rows of activations, as a list."
    )
    breakdown: bool = flag(True, "Whether to time decode, transform and product.")
    xla: bool = flag(True, "Whether to time the programs of XLA.")
    kernel: bool = flag(True, "Whether to time the CPU kernel.")
    repeats: int = flag(5, "Timed runs.", (lambda x: x >= 1, "at least 1"))
    seconds: float = flag(
        4.0,
        "Most seconds for the timed calls of one case.",
        (lambda x: x > 0, "positive"),
    )
    out: str = flag("runs", "Directory of the results.", (bool, "given"))

    def __post_init__(self) -> None:
        check_flags(self)


def run(config: MatmulConfig) -> int:
    """Times every combination that has no record yet; returns the exit code."""
    out = prepare_output(config.out)
    path = out / f"{ARTIFACT}.jsonl"
    names = chosen_names("methods", config.methods, TIMED)
    widths = parse_widths("bits", config.bits, 1, 8)
    rows = parse_numbers("rows", config.rows, 1, 2**16)
    known = {_key(record) for record in read_jsonl(path)}
    for block in chosen_names("blocks", config.blocks, BLOCKS):
        if config.kernel and report().instruction_set is not None:
            for name, bits in itertools.product(names, widths):
                quantizer = method_config(name, bits)
                own = f"{name} by kernel"
                missing = [r for r in rows if _cell(block, own, bits, r) not in known]
                if quantizer is not None and missing:
                    head = {"block": block, "method": own, "bits": bits}
                    for found in _by_kernel(block, quantizer, missing, config):
                        merge_records(out, ARTIFACT, [head | found])
        cells = [
            (name, bits, quantizer, missing)
            for name, bits in itertools.product(names, widths)
            if config.xla
            and (quantizer := method_config(name, bits)) is not None
            and (
                missing := [r for r in rows if _cell(block, name, bits, r) not in known]
            )
        ]
        if cells:
            baseline = _dense(block, rows, config)
            merge_records(out, ARTIFACT, baseline)
            fastest = {r: _fastest(baseline, r) for r in rows}
            for name, bits, quantizer, missing in cells:
                for found in _packed(block, quantizer, missing, config):
                    ratio = found["milliseconds"] / fastest[found["rows"]]
                    head = {"block": block, "method": name, "bits": bits}
                    record = head | found | {"times_dense": ratio}
                    merge_records(out, ARTIFACT, [record])
        shown = [r for r in read_jsonl(path) if r["block"] == block]
        print(f"\n{block}\n\n{aligned_table(shown, COLUMNS)}")
    return 0


def _key(record: Row) -> tuple[Any, ...]:
    return record_key(record, RESULT_FILES[ARTIFACT].key)


def _cell(block: str, method: str, bits: float, rows: int) -> tuple[Any, ...]:
    """The key that a record of this device would have."""
    own = {"block": block, "method": method, "bits": bits, "rows": rows}
    return _key(own | environment_fields())


def _fastest(records: list[Row], rows: int) -> float:
    return min(
        r["milliseconds"] for r in records if r["rows"] == rows and r["bits"] == 32
    )


def _seconds(run: Callable[[], Any], config: MatmulConfig) -> float:
    """The least of several runs: others on the machine only make them longer."""
    jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < config.repeats and sum(times) < config.seconds:
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def _activations(rows: int, features: int) -> Float[Array, "r m"]:
    return jax.random.normal(jax.random.key(rows), (rows, features))


def _dense(block: str, rows: list[int], config: MatmulConfig) -> list[Row]:
    """Both layouts in float32 and bfloat16."""
    found = []
    shapes = BLOCKS[block]
    for dtype, bits in ((jnp.float32, 32), (jnp.bfloat16, 16)):
        for name in ("x @ K", "x @ W.T"):
            is_kernel = name == "x @ K"
            layers = [
                jax.random.normal(jax.random.key(0), s if is_kernel else s[::-1], dtype)
                for s in shapes
            ]
            times = jnp.matmul if is_kernel else transposed
            run = jax.jit(functools.partial(chain, product=times))
            size = sum(w.nbytes for w in layers)
            for r in rows:
                x = _activations(r, shapes[0][0]).astype(dtype)
                seconds = _seconds(functools.partial(run, x, layers), config)
                head = {"block": block, "method": f"dense {name}", "bits": bits}
                found.append(head | _measured(r, seconds, size, config))
    return found


def _measured(rows: int, seconds: float, size: int, config: MatmulConfig) -> Row:
    return {
        "rows": rows,
        "milliseconds": 1e3 * seconds,
        "megabytes": size / 1e6,
        "bandwidth_share": size / seconds / _bandwidth(config),
    } | environment_fields()


@functools.lru_cache(maxsize=1)
def _bandwidth(config: MatmulConfig) -> float:
    """Bytes per second that this machine moves."""
    a = jnp.ones(_STREAMED, jnp.float32)
    x = jnp.ones((1, len(a)), jnp.float32)
    read = _seconds(functools.partial(jax.jit(jnp.matmul), x, a), config)
    copied = _seconds(functools.partial(jax.jit(lambda a: a + 1), a), config)
    return max(a.nbytes / read, 2 * a.nbytes / copied)


def _packed(
    block: str, quantizer: Method, rows: list[int], config: MatmulConfig
) -> Iterator[Row]:
    layers = random_layers(BLOCKS[block], quantizer)
    size = sum(stored_bits(layer.tensor) for layer in layers) // 8

    def timed(r: int, layers: list[Prepared], many_rows: int) -> float:
        product = functools.partial(_product, many_rows=many_rows)
        run = jax.jit(functools.partial(chain, product=product))
        x = _activations(r, BLOCKS[block][0][0])
        return _seconds(functools.partial(run, x, layers), config)

    many = MANY_ROWS
    for r in rows:
        seconds = timed(r, layers, many)
        record = _measured(r, seconds, size, config)
        if config.breakdown:
            shortcut = r == 1 or r >= many
            plain = [_without_transforms(layer, shortcut) for layer in layers]
            untransformed = timed(r, plain, many)
            # One row, decoded in the way that so many are.
            decode = timed(1, plain, 1 if r >= many else many)
            parts = decode, untransformed - decode, seconds - untransformed
            for name, part in zip(_PARTS, parts, strict=True):
                record[f"{name}_milliseconds"] = max(0.0, 1e3 * part)
        yield record


def _product(
    x: Float[Array, "r m"], layer: Prepared, many_rows: int
) -> Float[Array, "r n"]:
    """By XLA, whatever kernels there are for this platform."""
    (_, by_xla), *_ = kernels_of(type(layer.tensor))
    options = ProductOptions(many_rows=many_rows)
    return by_xla(x, layer.tensor, layer.bases, options).astype(x.dtype)


def _by_kernel(
    block: str, quantizer: Method, rows: list[int], config: MatmulConfig
) -> Iterator[Row]:
    """The kernel's times beside those of dense products, which take turns with it."""
    shapes = BLOCKS[block]
    layers = random_layers(shapes, quantizer)
    size = sum(stored_bits(layer.tensor) for layer in layers) // 8
    dense = [jax.random.normal(jax.random.key(0), shape) for shape in shapes]
    products: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "x @ K": (jnp.matmul, dense),
        "x @ W.T": (transposed, [w.T.copy() for w in dense]),
        "kernel": (matmul, layers),
    }
    for r in rows:
        x = _activations(r, shapes[0][0])
        programs = {}
        for name, (product, own) in products.items():
            run = jax.jit(functools.partial(chain, product=product))
            programs[name] = functools.partial(run, x, own)
        times, load = time_in_turn(programs, config.repeats, config.seconds)
        best = min(times["x @ K"].best, times["x @ W.T"].best)
        median = min(times["x @ K"].median, times["x @ W.T"].median)
        own_times = times["kernel"]
        yield _measured(r, own_times.best, size, config) | {
            "median_milliseconds": 1e3 * own_times.median,
            "dense_milliseconds": 1e3 * best,
            "times_dense": own_times.best / best,
            "median_times_dense": own_times.median / median,
            "instruction_set": report().instruction_set,
            "load": load,
        }


def _without_transforms(layer: Prepared, shortcut: bool) -> Prepared:
    """The layer with bases that do nothing, multiplied in the way it was.

    Args:
      layer: With its bases.
      shortcut: Whether a basis on the side of the inputs alone has ways of its own.
    """
    tensor, basis = layer.tensor, layer.bases.basis
    if not isinstance(tensor, KashinTensor):
        bare = dataclasses.replace(tensor.layout, basis=None)
        return Prepared(tensor.replace(layout=bare, seed=None), Bases())
    bare = dataclasses.replace(tensor.layout, rotation=None)
    is_left = basis is not None and isinstance(basis.right, IdentityBasis)
    right = IdentityBasis() if is_left and shortcut else _Through()
    through = KroneckerBasis(_Through(), right)
    tensor = tensor.replace(layout=bare, in_scale=None, out_scale=None)
    return Prepared(tensor, Bases(through))


COLUMNS = (
    Column("method", "method"),
    Column("bits", "bits"),
    Column("rows", "rows"),
    Column("milliseconds", "ms", fixed(2)),
    Column("times_dense", "times dense", fixed(2)),
    Column("median_times_dense", "of medians", fixed(2)),
    Column("megabytes", "MB read", fixed(1)),
    Column("bandwidth_share", "of bandwidth", share),
    Column("decode_milliseconds", "decode", fixed(2)),
    Column("product_milliseconds", "product", fixed(2)),
    Column("transform_milliseconds", "transform", fixed(2)),
)


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("benchmarks.matmul", __doc__, MatmulConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
