"""The greedy algorithm and the bases, dense and in float64, from the paper's text."""

import numpy as np
import scipy.fft
import scipy.linalg


def greedy_vector(x, q, tol, max_steps):
    """`x ~ u + q v` for an `x` of unit norm; returns u, v, residual and steps."""
    r, u, v, steps = x.copy(), np.zeros_like(x), np.zeros_like(x), 0
    while np.linalg.norm(r) >= tol and steps < max_steps:
        y = q.T @ r
        if np.abs(r).sum() > np.abs(y).sum():
            step = np.abs(r).sum() / x.size * np.sign(r)
            u, r = u + step, r - step
        else:
            step = np.abs(y).sum() / x.size * np.sign(y)
            v, r = v + step, r - q @ step
        steps += 1
    return u, v, x - u - q @ v, steps


def greedy_matrix(x, q1, q2, tol, max_steps):
    """`x ~ u + q1 v q2^T` for an `x` of unit Frobenius norm."""
    r, u, vh, steps = x.copy(), np.zeros_like(x), np.zeros_like(x), 0
    while np.linalg.norm(x - u - vh) >= tol and steps < max_steps:
        y = q1.T @ r @ q2
        if np.abs(r).sum() > np.abs(y).sum():
            step = np.abs(r).sum() / x.size * np.sign(r)
            u = u + step
        else:
            step = np.abs(y).sum() / x.size * q1 @ np.sign(y) @ q2.T
            vh = vh + step
        r = r - step
        steps += 1
    return u, q1.T @ vh @ q2, x - u - vh, steps


def dense_basis(family, basis, n):
    """Q of a library basis, from its stored signs and other people's transforms."""
    f = scipy.fft.dct(np.eye(n), axis=0, norm="ortho")  # f @ x is the DCT-II of x
    if family == "identity":
        return np.eye(n)
    if family == "dct":
        return f.T
    if family == "sign-dct":
        return f.T @ (np.asarray(basis.signs, float)[:, None] * f)
    if family == "haar":
        return np.asarray(basis.matrix, float)
    return np.asarray(basis.signs, float)[:, None] * dense_hadamard(n)


def dense_hadamard(n):
    """The documented length rule."""
    power = (n & -n).bit_length() - 1
    odd = n >> power
    if power >= 2 and odd > 1 and all((4 * odd - 1) % d for d in range(2, 2 * odd)):
        core, order = paley(4 * odd - 1), 4 * odd
        return np.kron(core, scipy.linalg.hadamard(n // order)) / np.sqrt(n)
    core = scipy.fft.dct(np.eye(odd), axis=0, norm="ortho")
    return np.kron(core, scipy.linalg.hadamard(2**power)) / np.sqrt(2**power)


def paley(q):
    """Paley's first construction from Legendre symbols by Euler's criterion."""
    chi = [0] + [1 if pow(a, (q - 1) // 2, q) == 1 else -1 for a in range(1, q)]
    skew = [[0] + [1] * q]
    for i in range(q):
        skew.append([-1] + [chi[(j - i) % q] for j in range(q)])
    return np.array(skew, float) + np.eye(q + 1)
