"""What every importer raises."""

from __future__ import annotations


class DataError(Exception):
    """A log can't be imported; the message is one clear line for whoever has the log."""
