"""Strict numerics for every test: no silent promotion of dtypes or ranks."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_numerics():
    """Promotion that a reader cannot see is an error while a test runs."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
