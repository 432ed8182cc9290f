"""What every importer raises."""

from __future__ import annotations

import importlib.util


class DataError(Exception):
    """A log can't be imported; the message is one clear line for whoever has the log."""


def require_pyarrow() -> None:
    """Raise DataError where pyarrow, of the extra `data`, isn't installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError("the importer needs pyarrow: pip install 'flame-jax[data]'")
