"""Writes golden.json: a stored matrix and what it stands for, in plain NumPy.

Nothing of JAX or of the library is used, so the file freezes the storage format: the
order of bits and blocks, and which signs a seed means.

    python tests/golden/quantized/make.py
"""

import json
from pathlib import Path

import numpy as np

SHAPE, BLOCK, BITS = (8, 16), (4, 8), 3
SEED = (20240409, 97370412)


def threefry(key, count):
    """Threefry-2x32, 20 rounds: Salmon et al., "Parallel random numbers" (2011)."""
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


def basis(key, n):
    """diag(signs) H with Sylvester's orthonormal H."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]]) / np.sqrt(2)
    return signs(key, n)[:, None] * h


def main():
    rng = np.random.default_rng(7)
    codes = rng.integers(0, 2**BITS, SHAPE)
    centroids = np.round(rng.normal(size=(2**BITS, 2)), 3).astype(np.float32)
    grid = SHAPE[0] // BLOCK[0], SHAPE[1] // BLOCK[1]
    scale = np.round(rng.uniform(0.5, 2, grid), 3).astype(np.float32)
    q1 = basis(threefry(SEED, (0, 0)), BLOCK[0])
    q2 = basis(threefry(SEED, (0, 1)), BLOCK[1])
    decoded = np.zeros(SHAPE)
    for r in range(grid[0]):
        for c in range(grid[1]):
            part = np.s_[
                r * BLOCK[0] : (r + 1) * BLOCK[0], c * BLOCK[1] : (c + 1) * BLOCK[1]
            ]
            pair = centroids.astype(np.float64)[codes[part]] * float(scale[r, c])
            decoded[part] = pair[..., 0] + q1 @ pair[..., 1] @ q2.T
    stream = "".join(f"{code:0{BITS}b}"[::-1] for code in codes.reshape(-1))
    packed = [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]
    content = {
        "shape": SHAPE,
        "block_shape": BLOCK,
        "bits": BITS,
        "basis": "hadamard",
        "packed_codes": packed,
        "centroids": centroids.astype(float).round(3).tolist(),
        "scale": scale.astype(float).round(3).tolist(),
        "seed": SEED,
        "decoded": decoded.round(7).tolist(),
    }
    path = Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
