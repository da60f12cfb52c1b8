"""Packed tensors as leaves and a description: whole ones return, others are refused."""

import json
import tracemalloc

import jax
import numpy as np
import pytest
from storage_tensors import CONFIGS, SHAPE, packed

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import (
    describe,
    from_leaves,
    leaf_specs,
    to_leaves,
)
from kashin_jax.io.format import parse_description
from kashin_jax.methods import encode
from kashin_jax.tensors import stored_bits


def stored(name):
    """Description, through JSON, and leaves."""
    tensor = packed(name)
    content = json.loads(json.dumps(describe(tensor, is_transposed=False)))
    return content, to_leaves(tensor)


def specs_of(description):
    return dict(parse_description(description, "'tensor'").specs)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tensor_of_every_method_returns_bit_by_bit(name):
    tensor = packed(name)
    back = from_leaves(*stored(name))
    assert type(back) is type(tensor)
    assert stored_bits(back) == stored_bits(tensor)
    for leaf, value in to_leaves(tensor).items():
        kept = to_leaves(back)[leaf]
        assert kept.dtype == value.dtype and kept.tobytes() == value.tobytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_header_is_known_before_anything_is_quantized(name):
    tensor = packed(name)
    weight = jax.ShapeDtypeStruct(SHAPE, "float32")
    struct, _ = jax.eval_shape(lambda w, k: encode(w, k, CONFIGS[name]), weight,
                               jax.random.key(0))  # fmt: skip
    assert leaf_specs(struct) == leaf_specs(tensor)
    description = describe(struct, is_transposed=True)
    assert description == describe(tensor, is_transposed=True)
    assert specs_of(description) == leaf_specs(tensor)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_type_that_the_matrix_had_is_kept(dtype):
    tensor = packed("uniform", dtype)
    back = from_leaves(describe(tensor, is_transposed=False), to_leaves(tensor))
    assert back.dtype == dtype and back.layout == tensor.layout


def test_layouts_return_equal():
    for name in CONFIGS.keys() - {"rtn", "rotate-rtn"}:
        assert from_leaves(*stored(name)).layout == packed(name).layout


def test_a_group_longer_than_the_matrix_becomes_as_long():
    assert CONFIGS["rtn"].group_size > SHAPE[0]
    back = from_leaves(*stored("rtn"))
    assert back.layout.group_size == SHAPE[0]
    assert (back.decode() == packed("rtn").decode()).all()


def test_only_packed_tensors_can_be_described():
    with pytest.raises(UsageError, match="A dict cannot be stored"):
        describe({}, is_transposed=False)
    with pytest.raises(UsageError, match="cannot be stored"):
        leaf_specs(np.zeros((2, 2)))


def test_what_no_reader_would_accept_is_not_described():
    tensor = packed("kashin")
    with pytest.raises(UsageError, match="leaf 'scale' must be float32"):
        describe(tensor.replace(scale=tensor.scale[0]), is_transposed=False)


# ---- descriptions

MISSING = object()
DESCRIPTIONS = {
    "an unknown type": ("kashin", "type", "KashinTensor"),
    "a type that is a list": ("kashin", "type", ["kashin"]),
    "no type": ("kashin", "type", MISSING),
    "an unknown field": ("kashin", "more", 1),
    "another type's name": ("kashin", "type", "affine"),
    "an orientation that is a number": ("kashin", "is_transposed", 1),
    "no orientation": ("kashin", "is_transposed", MISSING),
    "no layout": ("kashin", "layout", MISSING),
    "a layout that is a list": ("kashin", "layout", []),
    "leaves as a list": ("kashin", "leaves", ["scale"]),
    "an unknown leaf": ("kashin", "leaves.more", "uint8"),
    "a leaf too few": ("kashin", "leaves.seed", MISSING),
    "a leaf of another type": ("kashin", "leaves.scale", "float16"),
    "a leaf's type that is a list": ("affine", "leaves.zero", []),
    "a seed without rotation": ("rtn-groups", "leaves.seed", "uint32"),
    "a rotation without seed": ("rotate-rtn", "leaves.seed", MISSING),
    "NF4 at 3 bits": ("nf4", "layout.bits", 3),
    "learned levels missing at 3 bits": ("k-means", "leaves.levels", MISSING),
    "levels of a strange type": ("k-means", "leaves.levels", "float64"),
    "packed zeros per tensor": ("uniform", "leaves.zero", "uint8"),
    "coarse codes at a whole width": ("joint-half", "layout.bits", 3),
    "no coarse codes at half a width": ("joint", "layout.bits", 3.5),
    "no bits": ("kashin", "layout.bits", MISSING),
    "0 bits": ("kashin", "layout.bits", 0),
    "9 bits": ("kashin", "layout.bits", 9),
    "half a bit": ("joint-half", "layout.bits", 0.5),
    "7.5 bits": ("joint-half", "layout.bits", 7.5),
    "a quarter bit": ("joint-half", "layout.bits", 2.25),
    "bits that are no number": ("joint-half", "layout.bits", float("nan")),
    "bits that are true": ("kashin", "layout.bits", True),
    "bits as text": ("kashin", "layout.bits", "3"),
    "half bits of a control": ("rtn-groups", "layout.bits", 2.5),
    "vectors of half a bit for v": ("kashin-dct", "layout.bits", 1),
    "vectors at half a width": ("kashin-dct", "layout.bits", 4.5),
    "a third axis": ("kashin-dct", "layout.axis", 2),
    "an axis that is false": ("kashin-dct", "layout.axis", False),
    "vectors of rows of another matrix": ("kashin-dct", "layout.axis", 1),
    "a field of the layout too many": ("kashin", "layout.group_size", 1),
    "a shape of one side": ("kashin", "layout.shape", [240]),
    "a shape of three sides": ("kashin", "layout.shape", [24, 10, 1]),
    "a shape that is a number": ("kashin", "layout.shape", 240),
    "a side of zero": ("kashin", "layout.shape", [0, 10]),
    "a negative side": ("kashin", "layout.shape", [-24, -10]),
    "a side that is a fraction": ("kashin", "layout.shape", [24.0, 10]),
    "a side that is true": ("kashin", "layout.shape", [24, True]),
    "a side beyond the limit": ("uniform", "layout.shape", [2**31 + 1, 1]),
    "a shape bomb": ("uniform", "layout.shape", [2**31, 2**31]),
    "a shape bomb in blocks": ("kashin", "layout.shape", [24 * 2**26, 10 * 2**26]),
    "blocks that do not divide": ("kashin", "layout.block_shape", [7, 5]),
    "blocks of nothing": ("kashin", "layout.block_shape", [0, 5]),
    "blocks of odd rows at half bits": ("joint-half", "layout.block_shape", [3, 5]),
    "a group of nothing": ("rtn-groups", "layout.group_size", 0),
    "a group longer than the matrix": ("rtn-groups", "layout.group_size", 25),
    "a group bomb": ("rtn-groups", "layout.group_size", 2**40),
    "no basis": ("kashin", "layout.basis", None),
    "an unknown basis": ("kashin", "layout.basis", "ha\ndamard"),
    "a basis of three": ("kashin", "layout.basis", "dct:dct:dct"),
    "a basis of half": ("kashin", "layout.basis", "dct:"),
    "a basis that is a list": ("kashin", "layout.basis", ["dct", "dct"]),
    "an unknown rotation": ("joint", "layout.rotation", "turn"),
    "an unknown dtype": ("kashin", "layout.dtype", "float31"),
    "a dtype that is whole": ("kashin", "layout.dtype", "int32"),
    "a dtype that is a number": ("kashin", "layout.dtype", 32),
    "lists without end": ("kashin", "layout.dtype", json.loads("[" * 500 + "]" * 500)),
}


def changed(content, path, value):
    *parents, last = path.split(".")
    for parent in parents:
        content = content[parent]
    if value is MISSING:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_hostile_description_is_refused_in_one_line_without_allocating(case):
    name, path, value = DESCRIPTIONS[case]
    description, leaves = stored({"affine": "rtn-groups"}.get(name, name))
    changed(description, path, value)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="^'my tensor'") as caught:
            from_leaves(description, leaves, name="my tensor")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    assert "quantize it again" in message
    assert peak < 2**20


@pytest.mark.parametrize("content", [None, 1, [], "kashin", {}])
def test_a_description_that_is_no_object_of_the_kind_is_refused(content):
    with pytest.raises(CheckpointError, match="description"):
        from_leaves(content, {})


@pytest.mark.parametrize("basis", ["haar", "hadamard"])
def test_a_small_file_cannot_announce_a_dense_basis_that_fills_the_memory(basis):
    description, _ = stored("kashin")
    # 2^20 - 3 is odd: hadamard falls back to a dense factor as large.
    sides = [1, 2**20 - 3]
    description["layout"] |= {"shape": sides, "block_shape": sides, "basis": basis}
    with pytest.raises(CheckpointError, match="needs a dense matrix of side"):
        specs_of(description)
    description["layout"]["basis"] = f"{basis}:dct"
    assert specs_of(description)["seed"] == ("uint32", (2,))


def test_a_wide_output_head_with_a_dense_basis_is_no_bomb():
    description, _ = stored("kashin")
    sides = [768, 50272]
    description["layout"] |= {"shape": sides, "block_shape": sides, "basis": "haar"}
    assert specs_of(description)["packed_codes"].shape == (768 * 50272 * 3 // 8,)


# ---- leaves


def damaged(leaf, change):
    return lambda leaves: leaves | {leaf: change(np.array(leaves[leaf]))}


def put(value, at=0):
    def change(array):
        array.reshape(-1)[at] = value
        return array

    return change


LEAVES = {
    "codes cut": ("kashin", "packed_codes", lambda x: x[:-1]),
    "codes too long": ("kashin", "packed_codes", lambda x: np.append(x, x[:1])),
    "codes of another type": ("kashin", "packed_codes", lambda x: x.astype(np.int8)),
    "codes of another rank": ("kashin", "packed_codes", lambda x: x[None]),
    "centroids too many": ("kashin", "centroids", lambda x: np.concatenate([x, x])),
    "centroids too few": ("joint-half", "centroids", lambda x: x[:-1]),
    "centroids of one side": ("kashin", "centroids", lambda x: x[:, :1]),
    "centroids in float64": ("kashin", "centroids", lambda x: x.astype(np.float64)),
    "a centroid that is no number": ("kashin", "centroids", put(np.nan)),
    "an infinite centroid": ("kashin", "centroids", put(-np.inf, 3)),
    "scales of another grid": ("kashin", "scale", lambda x: x.T),
    "an infinite scale": ("kashin", "scale", put(np.inf, 5)),
    "a scale that is no number": ("rtn-groups", "scale", put(np.nan, -1)),
    "scales in float32": ("rtn-groups", "scale", lambda x: x.astype(np.float32)),
    "an infinite scale of an input": ("joint", "in_scale", put(np.inf)),
    "an infinite scale of an output": ("joint", "out_scale", put(np.inf)),
    "scales of inputs for outputs": ("joint", "in_scale", lambda x: x[:10]),
    "seeds of one word": ("kashin", "seed", lambda x: x[:1]),
    "signed seeds": ("kashin", "seed", lambda x: x.astype(np.int32)),
    "coarse codes cut": ("joint-half", "packed_coarse", lambda x: x[:-1]),
    "zeros that are no numbers": ("hqq", "zero", put(np.nan)),
    "zeros cut": ("rtn-groups", "zero", lambda x: x[:-1]),
    "an infinite level": ("k-means", "levels", put(np.inf)),
    "levels too few": ("k-means", "levels", lambda x: x[:-1]),
    "levels of a channel too few": ("k-means-channel", "levels", lambda x: x[:, 1:]),
    "magnitudes too few": ("kashin-dct", "v_levels", lambda x: x[:1]),
    "an infinite magnitude": ("kashin-dct", "u_levels", put(np.inf, 3)),
    "an infinite level of a channel": ("k-means-channel", "levels", put(np.inf, 9)),
}


@pytest.mark.parametrize("case", LEAVES)
def test_a_damaged_leaf_is_refused_in_one_line_that_names_it(case):
    name, leaf, change = LEAVES[case]
    description, leaves = stored(name)
    leaves = damaged(leaf, change)(leaves)
    with pytest.raises(CheckpointError, match=leaf) as caught:
        from_leaves(description, leaves, name="t")
    assert "\n" not in str(caught.value) and "'t" in str(caught.value)


def test_missing_and_unknown_leaves_are_named():
    description, leaves = stored("kashin")
    with pytest.raises(CheckpointError, match="leaf 'more' must be absent"):
        from_leaves(description, leaves | {"more": leaves["seed"]})
    del leaves["seed"]
    with pytest.raises(CheckpointError, match="'seed' must be uint32.*Got absent"):
        from_leaves(description, leaves)


def zeros(name, shape):
    """Sound leaves of a matrix of another shape, all zero."""
    description, _ = stored(name)
    description["layout"] |= {"shape": shape, "block_shape": shape}
    if "group_size" in description["layout"]:
        del description["layout"]["block_shape"]
        description["layout"]["group_size"] = shape[0]
    specs = specs_of(description)
    return description, {k: np.zeros(s.shape, s.dtype) for k, s in specs.items()}


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("rtn-groups", "packed_codes"),
        ("rtn-groups", "zero"),
        ("joint-half", "packed_codes"),
        ("joint-half", "packed_coarse"),
    ],
)
def test_fill_bits_other_than_0_are_refused(name, leaf):
    description, leaves = zeros(name, [6, 3])
    from_leaves(description, leaves)
    bad = damaged(leaf, put(128, -1))(leaves)
    with pytest.raises(CheckpointError, match=f"{leaf}.*fill bits"):
        from_leaves(description, bad)
