"""Page-locked slots: the device copies them itself, where it would otherwise wait for a copy that the driver makes."""

from __future__ import annotations

import logging
import mmap
import weakref
from enum import StrEnum

import jax
import numpy as np

from flame_jax import pjrt
from flame_jax.pda.staging import SharedMemory, Slot

log = logging.getLogger(__name__)


class Memory(StrEnum):
    """What the device reads slots from."""

    IN_PLACE = "in place"  # the device is the CPU
    PAGE_LOCKED = "page-locked"
    PAGEABLE = "pageable"


class PageLock:
    """Locks slots for one device, as one client sees it.

    Attributes:
        memory: chosen once, when this is made, and logged.
    """

    def __init__(self, device: jax.Device) -> None:
        self._device = device
        self.memory = Memory.IN_PLACE if device.platform == "cpu" else self._choose()

    def _choose(self) -> Memory:
        page = SharedMemory(mmap.PAGESIZE, "flame-page-lock")
        address = np.frombuffer(page.memory, np.int8).ctypes.data
        try:
            pjrt.lock_memory(self._device, address, mmap.PAGESIZE)
        except (pjrt.Unsupported, jax.errors.JaxRuntimeError) as error:
            log.warning("slots are pageable, and are copied twice: %s", str(error).split("\n", 1)[0])
            return Memory.PAGEABLE
        pjrt.unlock_memory(self._device, address)
        log.info("slots are page-locked")
        return Memory.PAGE_LOCKED

    def lock(self, slot: Slot) -> None:
        """Lock a slot for as long as it lives, where slots are locked.

        Raises:
            jax.errors.JaxRuntimeError: no more memory can be locked.
        """
        if self.memory is Memory.PAGE_LOCKED:
            address = slot.words.ctypes.data
            pjrt.lock_memory(self._device, address, slot.words.nbytes)
            # When the process ends the driver does it, and may be gone before the slot.
            weakref.finalize(slot, pjrt.unlock_memory, self._device, address).atexit = False
