"""Golden bytes of the storage format, from Python's big integers alone.

`python tests/golden/packing/make.py` writes `b<bits>.bin` for the codes of `codes`.
"""

import pathlib

HERE = pathlib.Path(__file__).parent
COUNT = 37


def codes(bits: int) -> list[int]:
    """37 codes, so that the last byte is partial at every width but 8."""
    return [(97 * i * i + 31 * i + 5) % 2**bits for i in range(COUNT)]


def pack(values: list[int], bits: int) -> bytes:
    stream = sum(value << (i * bits) for i, value in enumerate(values))
    return stream.to_bytes(-(-len(values) * bits // 8), "little")


if __name__ == "__main__":
    for width in range(1, 9):
        (HERE / f"b{width}.bin").write_bytes(pack(codes(width), width))
