"""What Python is asked for by a process that serves."""

from __future__ import annotations

import gc
import sys

from flame_jax.interpreter import SWITCH_INTERVAL, settle


def test_a_settled_process_collects_no_more_what_is_there_and_hands_pythons_lock_over_soon() -> None:
    before = sys.getswitchinterval()
    try:
        settle()
        assert gc.get_freeze_count() > 10_000
        assert sys.getswitchinterval() == SWITCH_INTERVAL
    finally:
        sys.setswitchinterval(before)
        gc.unfreeze()
