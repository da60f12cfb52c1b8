"""Functions that count their calls and are interrupted in one of them."""

import pytest

from kashin_jax.pipeline import run


class Calls:
    """Counts calls of a function and interrupts one of them."""

    def __init__(self, function):
        self.function, self.count, self.interrupted_at = function, 0, None

    def __call__(self, *args, **kwargs):
        self.count += 1
        if self.count == self.interrupted_at:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)


def finished_layers(directory):
    """Files of quantized copies below a directory that hold a packed matrix."""
    files = sorted(directory.rglob("*.safetensors"))
    parts = [(file, file.with_name(f".{file.name}.report.jsonl")) for file in files]
    return [file for file, part in parts if part.exists() and part.stat().st_size]


@pytest.fixture
def quantize(monkeypatch):
    calls = Calls(run.quantize_stack)
    monkeypatch.setattr(run, "quantize_stack", calls)
    return calls
