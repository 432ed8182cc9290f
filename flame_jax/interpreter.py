"""What a process that serves asks of Python's interpreter."""

from __future__ import annotations

import gc
import sys

SWITCH_INTERVAL = 5e-4
"""Seconds for which a thread that computes may keep Python's lock from others. Python's own choice is ten times as
long: so long the dispatcher's threads would wait, each time, while calls keep the event loop busy."""


def settle() -> None:
    """Everything is made that stays: garbage collection need not go through it while calls are answered.

    And threads that wait for Python's lock get it soon.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_INTERVAL)
