"""Page-locked slots: the device copies them itself, where it would otherwise wait for a copy that the driver makes.

The one module that uses what JAX 0.11.2 keeps to itself for this, `Client.dma_map` and `dma_unmap`.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from enum import StrEnum

import jax
import numpy as np

from flame_jax.pda.staging import SharedMemory, Slot

log = logging.getLogger(__name__)


class Memory(StrEnum):
    """What the device reads slots from."""

    IN_PLACE = "in place"  # the device is the CPU
    PAGE_LOCKED = "page-locked"
    PAGEABLE = "pageable"


class PageLock:
    """Locks slots for one device.

    Attributes:
        memory: chosen once, when this is made, and logged.
    """

    def __init__(self, device: jax.Device) -> None:
        self._client = device.client
        self.memory = Memory.IN_PLACE if device.platform == "cpu" else self._choose()

    def _choose(self) -> Memory:
        page = SharedMemory(mmap.PAGESIZE, "flame-page-lock")
        address = np.frombuffer(page.memory, np.int8).ctypes.data
        try:
            self._client.dma_map(address, mmap.PAGESIZE)
        except jax.errors.JaxRuntimeError as error:
            log.warning("slots are pageable, and are copied twice: %s", str(error).split("\n", 1)[0])
            return Memory.PAGEABLE
        self._client.dma_unmap(address)
        log.info("slots are page-locked")
        return Memory.PAGE_LOCKED

    def lock(self, slot: Slot) -> None:
        """Lock a slot for as long as it lives, where slots are locked.

        Raises:
            jax.errors.JaxRuntimeError: no more memory can be locked.
        """
        if self.memory is Memory.PAGE_LOCKED:
            address = slot.words.ctypes.data
            self._client.dma_map(address, slot.words.nbytes)
            # When the process ends the driver does it, and may be gone before the slot.
            weakref.finalize(slot, self._client.dma_unmap, address).atexit = False
