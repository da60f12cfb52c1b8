"""The storage format: golden bytes, exact round trips, damaged streams refused."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kashin_jax.packing import check_bits, pack_codes, packed_size, unpack_codes

GOLDEN = pathlib.Path(__file__).parent / "golden" / "packing"
WIDTHS = range(1, 9)


def golden_codes(bits):
    return [(97 * i * i + 31 * i + 5) % 2**bits for i in range(37)]


def big_integer_bytes(codes, bits):
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return stream.to_bytes(-(-len(codes) * bits // 8), "little")


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_bytes_equal_the_golden_file(bits):
    stored = (GOLDEN / f"b{bits}.bin").read_bytes()
    codes = jnp.array(golden_codes(bits), jnp.uint8)
    assert pack_codes(codes, bits=bits).tobytes() == stored
    packed = jnp.array(np.frombuffer(stored, np.uint8))
    assert unpack_codes(packed, bits=bits, count=37).tolist() == golden_codes(bits)


@settings(max_examples=25, deadline=None)
@example(bits=1, count=0, seed=0)
@example(bits=7, count=1, seed=0)
@example(bits=3, count=40, seed=0)
@given(st.sampled_from(WIDTHS), st.integers(0, 40), st.integers(0, 99))
def test_packing_round_trips_at_every_width_and_length(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    packed, unpacked = round_trip(codes, bits=bits)
    assert packed.dtype == unpacked.dtype == jnp.uint8
    assert packed.size == packed_size(count, bits)
    assert packed.tobytes() == big_integer_bytes(codes, bits)
    assert np.array_equal(unpacked, codes)


@partial(jax.jit, static_argnames="bits")
def round_trip(codes, *, bits):
    packed = pack_codes(codes, bits=bits)
    return packed, unpack_codes(packed, bits=bits, count=codes.shape[0])


@settings(max_examples=16, deadline=None)
@given(
    st.sampled_from(WIDTHS),
    st.lists(st.integers(0, 255), min_size=11, max_size=11),
)
def test_bits_above_the_width_are_dropped(bits, codes):
    packed = pack_codes(jnp.array(codes, jnp.uint8), bits=bits)
    kept = [code % 2**bits for code in codes]
    assert packed.tobytes() == big_integer_bytes(kept, bits)


def test_at_four_bits_the_low_nibble_comes_first():
    codes = jnp.array([1, 2, 15], jnp.uint8)
    assert pack_codes(codes, bits=4).tolist() == [0x21, 0x0F]


def test_rows_pack_alike_under_vmap_and_jit():
    rows = jax.random.randint(jax.random.key(0), (3, 21), 0, 32, jnp.uint8)
    packed = jax.jit(jax.vmap(lambda row: pack_codes(row, bits=5)))(rows)
    unpack = jax.jit(jax.vmap(lambda row: unpack_codes(row, bits=5, count=21)))
    for row, stream in zip(rows, packed, strict=True):
        assert stream.tobytes() == big_integer_bytes(row, 5)
    assert np.array_equal(unpack(packed), rows)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_truncated_or_overlong_stream_is_refused(bits, change):
    packed = jnp.zeros((packed_size(24, bits) + change,), jnp.uint8)
    with pytest.raises(ValueError, match=f"`packed`.*24 codes of {bits} bits"):
        unpack_codes(packed, bits=bits, count=24)


@pytest.mark.parametrize("bits", [0, 9, -1, 16, True])
def test_widths_outside_one_to_eight_are_refused(bits):
    with pytest.raises(ValueError, match="`bits`"):
        check_bits(bits)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_packing_and_unpacking_refuse_wrong_widths(bits):
    with pytest.raises(ValueError, match="`bits`"):
        pack_codes(jnp.zeros((8,), jnp.uint8), bits=bits)
    with pytest.raises(ValueError, match="`bits`"):
        unpack_codes(jnp.zeros((8,), jnp.uint8), bits=bits, count=8)
