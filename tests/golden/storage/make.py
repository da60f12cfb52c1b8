"""Writes v1/ to v3/, quantized checkpoints, and in each what it stands for.

Plain NumPy: nothing of JAX, of safetensors or of the library is used, so that the files
freeze the format of `docs/format.md`, of which this is a second implementation. They
must load for ever; a new schema version gets a directory of its own.

    python tests/golden/storage/make.py
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SEED = np.array([20240409, 97370412], np.uint32)
CODES = {"uint8": "U8", "uint32": "U32", "float16": "F16", "float32": "F32"}
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
RNG = np.random.default_rng(7)


def threefry(key, count):
    """Threefry-2x32, 20 rounds: Salmon et al., "Parallel random numbers" (2011)."""
    key = [int(word) for word in key]
    keys = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x = [(count[i] + keys[i]) % 2**32 for i in range(2)]
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x[0] = (x[0] + x[1]) % 2**32
            x[1] = ((x[1] << turn | x[1] >> (32 - turn)) % 2**32) ^ x[0]
        x[0] = (x[0] + keys[(group + 1) % 3]) % 2**32
        x[1] = (x[1] + keys[(group + 2) % 3] + group + 1) % 2**32
    return x


def signs(key, n):
    """The sign is minus where the top bit of `hi ^ lo` of the counter's block is 1."""
    words = [threefry(key, (0, i)) for i in range(n)]
    return np.array([-1.0 if (hi ^ lo) >> 31 else 1.0 for hi, lo in words])


def sylvester(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def paley(order):
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    h = np.eye(order)
    h[0, 1:] += 1
    h[1:, 0] -= 1
    for i in range(q):
        for j in range(q):
            if i != j:
                h[i + 1, j + 1] += 1 if (j - i) % q in squares else -1
    return h


def dct(n):
    k, i = np.mgrid[:n, :n]
    c = np.cos(np.pi * k * (2 * i + 1) / (2 * n)) * math.sqrt(2 / n)
    c[0] /= math.sqrt(2)
    return c


def hadamard(key, n):
    """diag(signs) (core (x) Sylvester), orthonormal."""
    power = 0
    while n >> power & 1 == 0:
        power += 1
    odd = n >> power
    order = 4 * odd
    is_prime = order > 4 and all((order - 1) % d for d in range(2, order - 1))
    core = np.ones((1, 1))
    if odd > 1 and power >= 2 and is_prime:
        core, power = paley(order) / math.sqrt(order), power - 2
    elif odd > 1:
        core = dct(odd)
    h = np.kron(core, sylvester(2**power) / math.sqrt(2**power))
    return signs(key, n)[:, None] * h


def pair(key, shape):
    """Q1 and Q2 for blocks of a shape."""
    return [hadamard(threefry(key, (0, i)), shape[i]) for i in range(2)]


def pack(codes, bits):
    stream = "".join(f"{code:0{bits}b}"[::-1] for code in codes.reshape(-1))
    return np.array(
        [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)], np.uint8
    )


def described(kind, layout, leaves, is_transposed=False):
    types = {leaf: value.dtype.name for leaf, value in leaves.items()}
    return {
        "type": kind, "is_transposed": is_transposed, "layout": layout, "leaves": types,
    }  # fmt: skip


def kashin(shape, block, bits, rotation=None, scales=False, is_transposed=False):
    (m, n), (height, width), fine = shape, block, math.ceil(bits)
    half, first = bits < fine, 2**fine
    pairs = first + half * first // 2
    codes = RNG.integers(0, first, shape)
    leaves = {}
    if half:
        codes[1::2] = first + RNG.integers(0, first // 2, codes[1::2].shape)
        leaves["packed_coarse"] = pack(codes[1::2] - first, fine - 1)
    leaves |= {
        "packed_codes": pack(codes[0::2] if half else codes, fine),
        "centroids": RNG.normal(size=(pairs, 2)).astype(np.float32),
        "scale": RNG.uniform(0.5, 2, (m // height, n // width)).astype(np.float32),
        "seed": SEED,
    }
    if scales:
        leaves["in_scale"] = RNG.uniform(0.5, 2, m).astype(np.float16)
        leaves["out_scale"] = RNG.uniform(0.5, 2, n).astype(np.float16)
    q1, q2 = pair(SEED, block)
    r1, r2 = pair(threefry(SEED, (0, 1)), block)
    w = np.zeros(shape)
    for r in range(m // height):
        for c in range(n // width):
            part = np.s_[r * height : (r + 1) * height, c * width : (c + 1) * width]
            uv = leaves["centroids"].astype(float)[codes[part]]
            uv = uv * float(leaves["scale"][r, c])
            w[part] = uv[..., 0] + q1 @ uv[..., 1] @ q2.T
            if rotation:
                w[part] = r1 @ w[part] @ r2.T
    if scales:
        w *= leaves["in_scale"].astype(float)[:, None] * leaves["out_scale"]
    layout = {
        "shape": shape, "block_shape": block, "bits": bits, "basis": "hadamard",
        "dtype": "float32", "rotation": rotation,
    }  # fmt: skip
    return described("kashin", layout, leaves, is_transposed), leaves, w


def groups(shape, size, bits, basis):
    m, n = shape
    codes = RNG.integers(0, 2**bits, shape)
    count = 1 if size is None else -(-m // size)
    scale = RNG.uniform(0.5, 2, (1, 1, 1) if size is None else (count, 1, n))
    leaves = {
        "packed_codes": pack(codes, bits),
        "scale": scale.astype(np.float32 if size is None else np.float16),
    }
    layout = {
        "shape": shape, "group_size": size, "bits": bits, "basis": basis,
        "dtype": "float32",
    }  # fmt: skip
    if basis:
        leaves["seed"] = SEED
    row = np.arange(m) // (size or m)
    return codes, leaves, layout, row


def unrotated(w, basis):
    q1, q2 = pair(SEED, w.shape)
    return q1 @ w @ q2.T if basis else w


def affine(shape, size, bits, zeros, basis=None):
    codes, leaves, layout, row = groups(shape, size, bits, basis)
    scale = leaves["scale"].astype(float)
    if zeros == "uint8":
        zero = RNG.integers(0, 2**bits, scale.shape)
        leaves["zero"] = pack(zero, bits)
    else:
        leaves["zero"] = RNG.uniform(-1, 2**bits, scale.shape).astype(zeros)
        zero = leaves["zero"].astype(float)
    w = scale[row, 0] * (codes - zero[row, 0])
    return described("affine", layout, leaves), leaves, unrotated(w, basis)


def codebook(shape, size, bits, levels, basis=None):
    codes, leaves, layout, row = groups(shape, size, bits, basis)
    if levels is None:
        values = NF4[codes]
    elif levels == "float32":
        leaves["levels"] = np.sort(RNG.normal(size=2**bits)).astype(np.float32)
        values = leaves["levels"].astype(float)[codes]
    else:
        table = np.sort(RNG.normal(size=(2**bits, shape[1])), axis=0)
        leaves["levels"] = table.astype(np.float16)
        values = np.take_along_axis(leaves["levels"].astype(float), codes, axis=0)
    w = leaves["scale"].astype(float)[row, 0] * values
    return described("codebook", layout, leaves), leaves, unrotated(w, basis)


def vectors(shape, axis, bits, basis=None, is_transposed=False):
    m, n = shape
    v_bits = bits // 2
    u_bits = bits - v_bits
    codes = RNG.integers(0, 2**bits, shape)
    leaves = {"packed_codes": pack(codes, bits), "seed": SEED}
    values = []
    for name, own, width in (
        ("u_levels", codes >> v_bits, u_bits),
        ("v_levels", codes % 2**v_bits, v_bits),
    ):
        count = 2 ** (width - 1)
        table = np.sort(RNG.uniform(0.5, 2, (count, shape[1 - axis])), axis=0)
        leaves[name] = table.astype(np.float16)
        vector = np.indices(shape)[1 - axis]
        size = leaves[name].astype(float)[own % count, vector]
        values.append(np.where(own >= count, size, -size))
    u, v = values
    c = dct(shape[axis])
    key = threefry(threefry(SEED, (0, 1)), (0, axis))
    p = c.T @ np.diag(signs(key, shape[axis])) @ c
    w = u + (v @ p.T if axis else p @ v)
    layout = {
        "shape": shape, "axis": axis, "bits": bits, "basis": basis, "dtype": "float32",
    }  # fmt: skip
    kind = described("kashin-vectors", layout, leaves, is_transposed)
    return kind, leaves, unrotated(w, basis)


def stack(*matrices):
    """Equal matrices as one tensor: all leaves have an axis in front."""
    (description, first, _), *_ = matrices
    leaves = {leaf: np.stack([ls[leaf] for _, ls, _ in matrices]) for leaf in first}
    w = np.stack([w for _, _, w in matrices])
    return description | {"stack": [len(matrices)]}, leaves, w


def write_shard(path, packed, plain, version):
    """A safetensors file with larger types first; gives its names and data bytes."""
    arrays = {
        f"{k}.{leaf}": v for k, (_, ls, _) in packed.items() for leaf, v in ls.items()
    }
    arrays |= plain
    content = {
        "schema_version": version,
        "tensors": {k: d for k, (d, _, _) in packed.items()},
    }
    header = {"__metadata__": {"format": "pt", "kashin_jax": json.dumps(content)}}
    data = b""
    for name in sorted(arrays, key=lambda name: (-arrays[name].itemsize, name)):
        value = arrays[name]
        stop = len(data) + value.nbytes
        header[name] = {
            "dtype": CODES[value.dtype.name],
            "shape": value.shape,
            "data_offsets": [len(data), stop],
        }
        data += value.astype(value.dtype.newbyteorder("<")).tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return list(arrays), len(data)


def main():
    first = {
        "kashin": kashin((8, 16), (4, 8), 3),
        "joint": kashin((12, 24), (12, 24), 4, "hadamard", scales=True),
        "joint-half": kashin(
            (24, 10), (12, 5), 2.5, "hadamard", scales=True, is_transposed=True
        ),
    }
    second = {
        "affine-whole-zeros": affine((10, 6), 4, 3, "uint8"),
        "affine-half-zeros": affine((8, 6), 4, 2, "float16"),
        "affine-tensor": affine((7, 5), None, 4, "float32"),
        "affine-rotated": affine((12, 10), 6, 5, "uint8", "hadamard"),
        "codebook-nf4": codebook((10, 6), 4, 4, None),
        "codebook-tensor": codebook((5, 7), None, 3, "float32", "hadamard"),
        "codebook-channel": codebook((9, 4), None, 2, "float16"),
    }
    plain = {"bias": np.arange(6, dtype=np.float32) / 4}
    write_checkpoint(1, [(first, {}), (second, plain)])
    stacks = {
        "experts": stack(*(kashin((8, 10), (4, 5), 3) for _ in range(3))),
        "experts-half": stack(*(
            kashin((12, 5), (4, 5), 2.5, "hadamard", scales=True, is_transposed=True)
            for _ in range(2)
        )),
        "affine": stack(*(affine((5, 3), 2, 3, "uint8") for _ in range(2))),
    }  # fmt: skip
    write_checkpoint(2, [(stacks, plain)])
    third = {
        "columns": vectors((10, 6), 0, 4),
        "rows": vectors((7, 5), 1, 3, is_transposed=True),
        "rotated": vectors((12, 10), 1, 4, "hadamard"),
        "experts": stack(*(vectors((6, 5), 0, 5) for _ in range(2))),
    }
    write_checkpoint(3, [(third, plain)])


def write_checkpoint(version, shards):
    directory = HERE / f"v{version}"
    directory.mkdir(exist_ok=True)
    weight_map, hashes, total, count = {}, {}, 0, len(shards)
    for i, (packed, beside) in enumerate(shards, 1):
        name = "model" if count == 1 else f"model-0000{i}-of-0000{count}"
        path = directory / f"{name}.safetensors"
        names, size = write_shard(path, packed, beside, version)
        weight_map |= dict.fromkeys(names, path.name)
        hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        total += size
    metadata = {"total_size": total, "sha256": hashes}
    index = {"metadata": metadata, "weight_map": weight_map}
    every = {k: w for packed, _ in shards for k, (_, _, w) in packed.items()}
    quantization = {
        "quant_method": "kashin", "schema_version": version, "library_version": "0.1.0",
        "rules": {}, "seed": 0, "tensors": {"packed": len(every), "plain": 1},
    }  # fmt: skip
    config = {"model_type": "none", "quantization_config": quantization}
    decoded = {k: w.round(7).tolist() for k, w in every.items()}
    for name, content in (
        ("model.safetensors.index.json", index),
        ("config.json", config),
        ("decoded.json", decoded),
    ):
        (directory / name).write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
