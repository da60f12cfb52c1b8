"""Dense matrices of the structured bases: products of their factors in NumPy."""

import math
from functools import reduce
from typing import NamedTuple

import numpy as np

from tests import oracle_numpy


class Rotation(NamedTuple):
    """The plane of two coordinates, and the number of its angle."""

    first: int
    second: int
    angle: int


def dense_basis(family, basis, n):
    """Q of a library basis, from its stored arrays."""
    if family not in STRUCTURED:
        return oracle_numpy.dense_basis(family, basis, n)
    return STRUCTURED[family](basis, n)


def product(factors, n):
    return reduce(np.matmul, factors, np.eye(n))


def butterfly_factors(n):
    """The rotations of every factor, first the one with a single block."""
    factors, level = [], 0
    while 2**level < n:
        edges = [math.floor(j * n / 2 ** (level + 1)) for j in range(2 ** (level + 1))]
        edges.append(n)
        blocks = zip(edges[0::2], edges[1::2], edges[2::2], strict=False)
        factors.append([
            Rotation(start + i, middle + i, middle - 1)
            for start, middle, stop in blocks
            for i in range(min(middle - start, stop - middle))
        ])  # fmt: skip
        level += 1
    return factors


def rotated(rotations, angles, n):
    matrix = np.eye(n)
    for a, b, number in rotations:
        c, s = np.cos(angles[number]), np.sin(angles[number])
        matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


def butterfly(basis, n):
    angles = np.asarray(basis.angles, float)
    return product([rotated(f, angles, n) for f in butterfly_factors(n)], n)


def butterfly3(basis, n):
    permutation = np.zeros((n, n))
    permutation[np.arange(n), np.asarray(basis.order)] = 1
    return np.linalg.matrix_power(butterfly(basis, n) @ permutation, 3)


def givens(basis, n):
    layers = zip(np.asarray(basis.order), np.asarray(basis.angles, float), strict=True)
    half = n // 2
    return product(
        [
            rotated([(o[p], o[p + half], p) for p in range(half)], angles, n)
            for o, angles in layers
        ],
        n,
    )


def householder(basis, n):
    normals = np.asarray(basis.normals, float)
    return product([np.eye(n) - 2 * np.outer(y, y) / (y @ y) for y in normals], n)


STRUCTURED = {
    "householder": householder,
    "householder8": householder,
    "givens": givens,
    "butterfly": butterfly,
    "butterfly3": butterfly3,
}
