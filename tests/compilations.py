"""What XLA compiles while something runs."""

import logging
import re

import jax


def compiled_programs(caplog, run):
    """Names of the programs compiled by `run()`, which finds none kept."""
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, "jax"):
        run()
    return re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
