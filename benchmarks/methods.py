"""The methods whose products are timed, by name: those of the tables, in more bases."""

from collections.abc import Mapping
from types import MappingProxyType

from experiments.common.methods import JOINT, METHODS, Width
from kashin_jax import BasisSpec
from kashin_jax.methods import Method

__all__ = ["TIMED", "method_config"]

_BOTH = BasisSpec("hadamard", "hadamard")
_LEFT = BasisSpec("hadamard", "identity")
_HAAR = BasisSpec("haar", "haar")
_OTHERS = (
    "rtn-channel", "rtn-g128", "hqq-g64", "nf4-g64", "uniform", "k-means",
    "k-means-channel", "rotate-k-means", "rotate-rtn-g64",
)  # fmt: skip

TIMED: Mapping[str, tuple[str, BasisSpec]] = MappingProxyType(
    {
        JOINT: (JOINT, _BOTH),
        f"{JOINT}-left": (JOINT, _LEFT),
        "kashin": ("kashin", _BOTH),
        "kashin-left": ("kashin", _LEFT),
        "kashin-haar": ("kashin", _HAAR),
        **{name: (name, _BOTH) for name in _OTHERS},
    }
)
"""`left`: a basis on the side of the inputs alone; else both, Hadamard's or Haar's."""


def method_config(name: str, bits: Width) -> Method | None:
    """The method at a width; None where it does not exist."""
    method, basis = TIMED[name]
    if basis == _HAAR and bits != 4:
        return None  # one width is enough for a basis that is not held to a target
    try:
        return METHODS[method].make(bits, basis, 1e-3, 100)
    except ValueError:
        return None
