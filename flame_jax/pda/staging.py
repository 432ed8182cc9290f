"""Slots: preallocated host buffers, each holding one packed batch."""

from __future__ import annotations

import mmap
import os
import weakref

import numpy as np

from flame_jax.packing import SlotLayout


class Slot:
    """One packed batch in shared memory (memfd), so that another process can fill it.

    Attributes:
        words: int32[slot words], the whole buffer; page aligned.
        fields: named views on it.
    """

    def __init__(self, layout: SlotLayout) -> None:
        self.layout = layout
        self.fd = os.memfd_create(f"flame-slot-{layout.bucket}", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, layout.words * 4)
        self._memory = mmap.mmap(self.fd, layout.words * 4)
        self.words = np.frombuffer(self._memory, np.int32)
        self.fields = layout.views(self.words)

    def clear(self) -> None:
        """Forget the requests. Token rows keep what they held: no request's row points at them."""
        self.fields["rows"].fill(0)
