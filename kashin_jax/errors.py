"""Errors that a user can cause and mend; programs turn them into one line.

Everything here is a `ValueError`, so library users need not know these names.
"""

__all__ = ["CheckpointError", "DataError", "NonFiniteError", "UsageError"]


class UsageError(ValueError):
    """A flag, option or argument has a value that cannot work."""


class CheckpointError(ValueError):
    """A model file is missing, damaged, or not what its configuration says."""


class DataError(ValueError):
    """Evaluation data is missing, empty or malformed."""


class NonFiniteError(ValueError):
    """A weight holds NaN or infinity; the message names its path."""
