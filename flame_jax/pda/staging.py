"""Slots: preallocated host buffers, each holding one packed batch."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Mapping
from enum import Enum

import numpy as np

from flame_jax.packing import SlotLayout


class State(Enum):
    """What a slot is doing; it goes through these in order, and then is free again."""

    FREE = "free"
    FILLING = "filling"
    IN_FLIGHT = "in flight"
    DONE = "done"


class SlotBusy(RuntimeError):
    """A slot was to be used out of order: rewritten, say, while a device may still read it."""


class SharedMemory:
    """Memory that another process can map.

    Attributes:
        fd: open for as long as this lives.
        memory: page aligned; lives for as long as anything refers to it.
    """

    def __init__(self, size: int, name: str) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)
        self.memory = mmap.mmap(self.fd, size)


class Slot:
    """One packed batch in shared memory (memfd), so that another process can fill it.

    Its fields can be written while it is filled, and at no other time: then NumPy refuses.

    Attributes:
        state: what it is doing.
        words: int32[slot words], the whole buffer, for reading; page aligned.
    """

    def __init__(self, layout: SlotLayout) -> None:
        self.layout, self.state = layout, State.FREE
        self._shared = SharedMemory(layout.words * 4, f"flame-slot-{layout.bucket}")
        self.fd = self._shared.fd
        writable = np.frombuffer(self._shared.memory, np.int32)
        self._fields = layout.views(writable)
        self.words = writable.view()
        self.words.flags.writeable = False
        self._lock(True)

    def fill(self) -> Mapping[str, np.ndarray]:
        """Begin: named views to write to. The requests that were there are forgotten; token rows keep what they held,
        since no request's row points at them.

        Raises:
            SlotBusy: it is not free.
        """
        self._go(State.FREE, State.FILLING)
        self._lock(False)
        self._fields["rows"].fill(0)
        return self._fields

    def launch(self) -> np.ndarray:
        """What was filled goes to the device: `words`, which must not change until `finish`."""
        self._go(State.FILLING, State.IN_FLIGHT)
        self._lock(True)
        return self.words

    def finish(self) -> None:
        """The device has read it all."""
        self._go(State.IN_FLIGHT, State.DONE)

    def release(self) -> None:
        """Free it: its batch is done, or was given up before it was launched."""
        if self.state is State.IN_FLIGHT:
            raise SlotBusy("a slot in flight can't be freed")
        if self.state is State.FILLING:
            self._lock(True)
        self.state = State.FREE

    def _go(self, before: State, after: State) -> None:
        if self.state is not before:
            raise SlotBusy(f"a slot that is {self.state.value} can't become {after.value}")
        self.state = after

    def _lock(self, locked: bool) -> None:
        for view in self._fields.values():
            view.setflags(write=not locked)
