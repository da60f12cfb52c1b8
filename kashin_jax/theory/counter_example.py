"""Why the matrix form has no dimension-free bound: e_i (Q2 e_j)^T.

For X = a b^T the l1 norms of X and of Q1^T X Q2 are products, |a|_1 |b|_1 and
|Q1^T a|_1 |Q2^T b|_1. With a = e_i and b = Q2 e_j either product has a factor 1, so the
ratio is at most 1 / sqrt(min(m, n)) for every Q1 and Q2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from kashin_jax.bases import BasisSpec, KroneckerBasis, make_basis, make_pair
from kashin_jax.decomposition import Frame
from kashin_jax.theory.greedy_trace import trace_greedy
from kashin_jax.theory.l1_bound import l1_ratio

__all__ = ["FORMS", "FormCourse", "compare_forms", "rank_one_counter_example"]

FORMS = ("kronecker", "rows", "vector")
"""Q1^T X Q2; X Q2, each row on its own; one basis of R^(mn) for the whole block."""


class FormCourse(NamedTuple):
    """How one form of the decomposition fares on the counter-example of one size.

    Attributes:
      form: One of `FORMS`.
      n: Side of the square block.
      ratio: l1 ratio of what is decomposed first, a bound of the form's constant.
      residuals: Residuals of the whole block after 0, 1, 2, ... steps.
      levels: Larger level of the two factors after as many steps.
    """

    form: str
    n: int
    ratio: float
    residuals: Float[Array, " k"]
    levels: Float[Array, " k"]


def rank_one_counter_example(
    basis: KroneckerBasis, shape: tuple[int, int], i: int, j: int
) -> Float[Array, "m n"]:
    """The block e_i (Q2 e_j)^T of unit norm, hard for this pair of bases.

    Raises:
      ValueError: If `i` or `j` is not an index of a block of that shape.
    """
    m, n = shape
    if not (0 <= i < m and 0 <= j < n):
        raise ValueError(
            f"`i`, `j` must be indices of a {m} x {n} block. Got {i}, {j}."
        )
    row = basis.right.synthesis(jax.nn.one_hot(j, n, dtype=jnp.float32))
    return jnp.outer(jax.nn.one_hot(i, m, dtype=jnp.float32), row)


def compare_forms(
    key: Key[Array, ""],
    sizes: Sequence[int],
    *,
    steps: int,
    family: str = "haar",
    vector_family: str = "sign-dct",
) -> list[FormCourse]:
    """The greedy course on the counter-example for each form and size.

    The Kronecker pair is drawn from `family`, and the example is made for it. The rows
    form takes the right side alone and is exact on the empty rows. The vector form
    needs a basis of R^(n^2) with a fast transform.

    Args:
      key: Draws the bases.
      sizes: Sides of square blocks.
      steps: Greedy steps of each course.
      family: Family of both sides of the pair.
      vector_family: Family of the vector form.

    Returns:
      One course per size and form.

    Raises:
      ValueError: If a family is unknown, a size is below 1, or `steps < 1`.
    """
    courses = []
    for n in sizes:
        pair_key, vector_key = jax.random.split(jax.random.fold_in(key, n))
        pair = make_pair(BasisSpec(family, family), pair_key, (n, n))
        block = rank_one_counter_example(pair, (n, n), n // 3, n // 2)
        whole = make_basis(vector_family, vector_key, n * n)
        # All energy is in one row, whose own norm is that of the block; its level is
        # so many times smaller in units of the block.
        of_row = jnp.float32(n**0.5)
        problems: list[tuple[str, Array, Frame, Array]] = [
            ("kronecker", block, pair, jnp.float32(1)),
            ("rows", block[n // 3], pair.right, of_row),
            ("vector", block.ravel(), whole, jnp.float32(1)),
        ]
        for form, x, basis, unit in problems:
            trace = trace_greedy(x, basis, steps=steps)
            levels = unit * jnp.maximum(trace.u_levels, trace.v_levels)
            ratio = float(l1_ratio(basis, x))
            courses.append(FormCourse(form, n, ratio, trace.residuals, levels))
    return courses
