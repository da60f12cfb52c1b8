"""Functions that count their calls and are interrupted in one of them."""

import pytest

from experiments.common import quantized_layers


class Calls:
    """Counts calls of a function and interrupts one of them."""

    def __init__(self, function):
        self.function, self.count, self.interrupted_at = function, 0, None

    def __call__(self, *args, **kwargs):
        self.count += 1
        if self.count == self.interrupted_at:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)


@pytest.fixture
def quantize(monkeypatch):
    calls = Calls(quantized_layers.quantize)
    monkeypatch.setattr(quantized_layers, "quantize", calls)
    return calls
