"""How hard XLA tries, in tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

_FLAG = "jax_disable_most_optimizations"


@contextmanager
def compiling(*, quickly: bool) -> Iterator[None]:
    """Whether XLA leaves out what takes most of a compilation's time."""
    before = jax.config.values[_FLAG]
    jax.config.update(_FLAG, quickly)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        jax.config.update(_FLAG, before)  # type: ignore[no-untyped-call]
