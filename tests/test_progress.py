"""What long work says where nobody watches: a line now and then, in whole lines."""

import io
import time

from kashin_jax import progress
from kashin_jax.progress import progress_bar


def run(monkeypatch, pause):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", pause)
    with progress_bar(3_000_000, "weights", initial=1_000_000) as bar:
        for _ in range(4):
            time.sleep(0.01)
            bar.set_postfix_str("layers.0.fc1.weight", refresh=False)
            bar.update(500_000)
    return stream.getvalue()


def test_a_log_gets_lines_without_carriage_returns(monkeypatch):
    text = run(monkeypatch, 1e-3)
    lines = text.splitlines()
    assert "\r" not in text and len(lines) >= 2
    assert lines[0].startswith("50% of 3.00M weights, ")
    assert lines[-1].endswith("layers.0.fc1.weight")


def test_work_of_less_than_a_minute_says_nothing(monkeypatch):
    assert run(monkeypatch, 60) == ""
