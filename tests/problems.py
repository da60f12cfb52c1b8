"""Test matrices: easy, heavy-tailed, degenerate and hostile ones."""

import numpy as np


def rng(seed=0):
    return np.random.default_rng(seed)


def gaussian(m, n, seed=0):
    return rng(seed).standard_normal((m, n)).astype(np.float32)


def student_t(m, n, seed=0):
    """Three degrees of freedom: no fourth moment."""
    return rng(seed).standard_t(3, (m, n)).astype(np.float32)


def outlier_columns(m, n, seed=0):
    x = gaussian(m, n, seed)
    x[:, rng(seed + 1).choice(n, min(4, n), replace=False)] *= 30
    return x


def scattered_outliers(m, n, seed=0):
    x = gaussian(m, n, seed)
    x.flat[rng(seed + 1).choice(m * n, max(1, m * n // 200), replace=False)] *= 100
    return x


def zero(m, n, seed=0):
    return np.zeros((m, n), np.float32)


def constant(m, n, seed=0):
    return np.full((m, n), -0.3, np.float32)


def diagonal(m, n, seed=0):
    return np.eye(m, n, dtype=np.float32) * gaussian(m, n, seed)


def sparse(m, n, seed=0):
    return gaussian(m, n, seed) * (rng(seed + 1).random((m, n)) < 0.02)


def huge(m, n, seed=0):
    return gaussian(m, n, seed) * np.float32(1e30)


def tiny(m, n, seed=0):
    return gaussian(m, n, seed) * np.float32(1e-30)


def counter_example(m, right, i=0, j=0):
    """e_i (Q2 e_j)^T, hard for every pair of bases: Q2 is the dense `right`."""
    x = np.zeros((m, right.shape[0]), np.float32)
    x[i] = right[:, j]
    return x


EASY = {"gaussian": gaussian, "student_t": student_t, "huge": huge, "tiny": tiny}
HARD = {
    "outlier_columns": outlier_columns,
    "scattered_outliers": scattered_outliers,
    "diagonal": diagonal,
    "sparse": sparse,
}
TRIVIAL = {"zero": zero, "constant": constant}
ALL = EASY | HARD | TRIVIAL
