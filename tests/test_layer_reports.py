"""Reports of layers, and which of them are outliers."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kashin_jax import RTN, GreedyKashin, bits_per_weight, quantize_model
from kashin_jax.pipeline import LayerReport, outliers, report_table

FAST = {"num_restarts": 1, "sample": 256, "codebook_steps": 10, "polish_steps": 2}
KEY = jax.random.key(0)


def report(error, config=RTN(bits=4)):  # noqa: B008
    return LayerReport(jnp.float32(error**2), None, (8, 8), config, 256, 0.5)


def reports(errors, **options):
    return {f"layers/{i}": report(e, **options) for i, e in enumerate(errors)}


def test_a_report_says_what_was_lost_and_stored():
    model = nnx.Sequential(nnx.Linear(32, 16, rngs=nnx.Rngs(0)))
    kernel = np.asarray(model.layers[0].kernel.get_value(), np.float64)
    result = quantize_model(model, GreedyKashin(bits=2, **FAST), KEY)
    (found,) = result.reports.values()
    tensor = result.model.layers[0].kernel.get_value()
    lost = np.linalg.norm(kernel - np.asarray(tensor.decode())) / np.linalg.norm(kernel)
    assert found.relative_error == pytest.approx(lost, rel=1e-4)
    assert found.bits_per_weight == bits_per_weight(tensor)
    assert found.residual == pytest.approx(float(found.decomposition["residual"][0, 0]))
    assert 0 < found.residual <= GreedyKashin().rtol
    # |x|_2 <= |u|_2 + |v|_2, and no vector is longer than sqrt(N) times its level.
    assert 1 - found.residual <= sum(found.linf_levels) < 4
    assert found.seconds > 0 and found.shape == (32, 16)


def test_methods_without_factors_have_no_residual_and_no_levels():
    model = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    (found,) = quantize_model(model, RTN()).reports.values()
    assert found.residual is None and found.linf_levels is None


def test_a_layer_that_lost_much_more_is_an_outlier():
    errors = [0.10, 0.11, 0.095, 0.105, 0.1, 0.3]
    assert outliers(reports(errors)) == ["layers/5"]
    assert outliers(reports([1e-6 * e for e in errors])) == ["layers/5"]


def test_layers_that_lost_less_or_about_as_much_are_none():
    assert outliers(reports([0.1, 0.11, 0.095, 0.105, 0.1, 0.001])) == []
    assert outliers(reports([0.1] * 5 + [0.105])) == []
    assert outliers(reports([0.1] * 5 + [0.12])) == ["layers/5"]


def test_few_layers_and_zero_errors_say_nothing():
    assert outliers(reports([0.1, 0.1, 0.1, 0.9])) == []
    assert outliers(reports([0.0] * 5 + [0.1])) == []
    assert outliers({}) == []


def test_layers_are_compared_with_those_of_their_method_only():
    fine = {f"fine/{i}": report(0.01, RTN(bits=8)) for i in range(6)}
    coarse = {f"coarse/{i}": report(0.3, RTN(bits=2)) for i in range(3)}
    assert outliers(fine | coarse) == []
    assert outliers(fine | {"x": report(0.3, RTN(bits=8))}) == ["x"]


def test_outliers_are_named_in_a_warning(caplog):
    rngs = nnx.Rngs(0)
    model = nnx.List([nnx.Linear(512, 8, rngs=rngs) for _ in range(6)])
    kernel = model[3].kernel
    usual = kernel.get_value()
    # One weight of every channel takes the grid's range: 22 standard deviations.
    kernel.set_value(usual.at[0].set(22 / 512**0.5))
    method = RTN(bits=4, group_size=None)
    with caplog.at_level(logging.WARNING, "kashin_jax"):
        quantize_model(model, method)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "1 of 6 layers" in record.getMessage()
    assert "their method: 3 (0." in record.getMessage()
    caplog.clear()
    kernel.set_value(usual)
    quantize_model(model, method)
    assert not caplog.records


def test_the_table_has_a_line_per_layer_and_the_totals():
    kashin = report(0.1)._replace(
        decomposition={
            "residual": jnp.array([[1e-4, 3e-4]]),
            "max_u": jnp.array([[1.0, 2.0]]),
            "max_v": jnp.array([[1.5, 1.0]]),
        }
    )
    lines = report_table({"a": kashin, "b/long": report(0.25)}).splitlines()
    assert [len(line) for line in lines] == [len(lines[0])] * 4
    assert lines[1].split() == [
        "a", "rtn", "4", "0.1", "0.0003", "2", "1.5", "4.000", "0.5",
    ]  # fmt: skip
    assert lines[2].split() == ["b/long", "rtn", "4", "0.25", "4.000", "0.5"]
    assert lines[3].split() == ["2", "layers", "4.000", "1.0"]
    assert math.isclose(kashin.residual, 3e-4, rel_tol=1e-6)
