"""Python as in a server that is ready."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flame_jax.interpreter import settle


@contextmanager
def settled() -> Iterator[None]:
    """Python as in a server that is ready; afterwards as before."""
    before = sys.getswitchinterval()
    settle()
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        gc.unfreeze()
