"""Hidden states beyond a bound: read back bit by bit, and never in a named file."""

import errno
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest

from kashin_jax.errors import UsageError
from kashin_jax.pipeline.hidden_states import HiddenStates

NONE, SOME, ALL = 0, 2 * 3 * 4 * 4, 2**20


def arrays(count, dtype, seed=0):
    rng = np.random.default_rng(seed)
    found = [rng.standard_normal((3, 4)).astype(dtype) for _ in range(count)]
    # Neither of them is equal to itself, or tells its sign, as a number.
    found[-1][0, :2] = np.nan, -0.0
    return found


def same(states, expected):
    assert len(states) == len(expected)
    for index, array in enumerate(expected):
        found = states[index]
        assert found.dtype == array.dtype and found.shape == array.shape
        assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("held", [NONE, SOME, ALL])
def test_arrays_come_back_bit_by_bit(held, dtype, tmp_path, monkeypatch):
    """Guards places in the file that would overlap when arrays are replaced."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    states, expected = HiddenStates(held), arrays(5, dtype)
    for array in expected:
        states.append(array)
    same(states, expected)
    assert not list(tmp_path.iterdir()), "the file has no name"
    for index in (3, 0, 4, 1):
        expected[index] = arrays(1, dtype, seed=index)[0]
        states[index] = expected[index]
    same(states, expected)
    expected[2] = np.zeros((7, 9), dtype)
    states[2] = expected[2]
    same(states, expected)
    while expected:
        assert states.pop().tobytes() == expected.pop().tobytes()
        same(states, expected)
    states.append(arrays(1, dtype)[0])
    same(states, arrays(1, dtype))
    states.close()
    assert not len(states)


def test_no_more_than_the_bound_is_in_memory():
    states = HiddenStates(SOME)
    for array in arrays(5, np.float32):
        states.append(array)
    held = [isinstance(place, np.ndarray) for place in states._places]
    assert held == [True, True, False, False, False]
    states.close()


def test_a_full_disk_names_the_directory_and_the_remedy(monkeypatch, tmp_path):
    class Full:
        def seek(self, start):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(UsageError, match=r"cannot take 48 bytes .* TMPDIR") as raised:
        HiddenStates(NONE).append(arrays(1, np.float32)[0])
    assert str(tmp_path) in str(raised.value)
