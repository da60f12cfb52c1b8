"""Names of version 0.1 still lead to what they were, and say what to write instead."""

import importlib

import pytest

import kashin_jax
from kashin_jax import RTN, BasisSpec, KMeans, Rotated, deprecated

OLD = [
    (module, name)
    for module, names in (
        ("kashin_jax", deprecated.TOP),
        ("kashin_jax.layers", deprecated.LAYERS),
        ("kashin_jax.quantized", deprecated.QUANTIZED),
        ("kashin_jax.checkpoints", deprecated.CHECKPOINTS),
    )
    for name in names
]


@pytest.mark.parametrize(("module", "name"), OLD)
def test_an_old_name_works_and_warns_with_the_new_one_and_when_it_goes(module, name):
    with pytest.warns(DeprecationWarning, match=rf"`{module}.{name}` is now") as caught:
        found = getattr(importlib.import_module(module), name)
    assert found is not None
    assert f"goes in kashin_jax {deprecated.REMOVED_IN}" in str(caught[0].message)


def test_old_names_are_those_of_the_things_that_took_their_place():
    with pytest.warns(DeprecationWarning):
        assert kashin_jax.RTNConfig is RTN
        assert kashin_jax.RotatedRTNConfig(bits=3) == Rotated(
            RTN(bits=3, group_size=64)
        )
        haar = BasisSpec.parse("haar")
        config = kashin_jax.RotatedKMeansConfig(bits=2, basis=haar)
    assert config == Rotated(KMeans(bits=2), haar)


def test_what_never_was_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = kashin_jax.Nothing
