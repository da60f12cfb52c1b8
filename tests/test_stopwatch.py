"""Seconds of phases: compilation apart, and no listener left behind."""

import threading

import jax
import pytest
from jax.monitoring import record_event_time_span

from kashin_jax.pipeline.stopwatch import Stopwatch

COMPILED = "/jax/core/compile/backend_compile_duration"


def test_jax_tells_what_it_compiled_and_programs_within_others_count_once():
    watch = Stopwatch()
    with watch.phase("work"):
        jax.jit(lambda x: 2 * x + 1)(1.0)
    phases, compiled = watch.lap()
    assert compiled > 0 and phases.keys() == {"work"}
    with watch.phase("work"):
        record_event_time_span(COMPILED, 1.0, 2.0)
        record_event_time_span(COMPILED, 11.0, 12.0)
        record_event_time_span(COMPILED, 13.0, 14.0)
        record_event_time_span(COMPILED, 10.0, 15.0)
        record_event_time_span("/another/event", 20.0, 30.0)
    assert watch.lap() == ({"work": 0.0}, 6.0)


def test_what_other_threads_and_other_phases_compile_is_not_counted():
    """Guards against a listener that outlives its phase, as after an error."""
    watch = Stopwatch()
    with pytest.raises(KeyError), watch.phase("failed"):
        record_event_time_span(COMPILED, 0.0, 5.0)
        raise KeyError
    assert watch.lap() == ({"failed": 0.0}, 5.0)
    tell = threading.Thread(target=record_event_time_span, args=(COMPILED, 0.0, 7.0))
    with watch.phase("work"):
        tell.start()
        tell.join()
    record_event_time_span(COMPILED, 0.0, 9.0)
    assert watch.lap()[1] == 0.0
