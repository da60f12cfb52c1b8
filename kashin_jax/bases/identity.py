"""The standard basis: for one-sided Kronecker pairs and as a control."""

from typing import NamedTuple

from jaxtyping import Array, Float, Key

__all__ = ["IdentityBasis", "make_identity"]


class IdentityBasis(NamedTuple):
    """Q = I, any length."""

    def analysis(
        self, x: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        return x

    def synthesis(
        self, y: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        return y


def make_identity(key: Key[Array, ""], n: int) -> IdentityBasis:
    """The identity; `key` and `n` are not used."""
    return IdentityBasis()
