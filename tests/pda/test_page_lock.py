"""Slots on their way to a device: locked for as long as they live where the platform can, and as before where not."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from flame_jax.packing import Bucket, Layout, SlotLayout, slot_layout
from flame_jax.pda import page_lock
from flame_jax.pda.page_lock import Memory, PageLock
from flame_jax.pda.staging import Slot
from flame_jax.schema import FeatureSchema


class Client:
    """Counts what is locked; refuses as told."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.refusal: str | None = None

    def dma_map(self, address: int, size: int) -> None:
        assert address not in self.locked
        if self.refusal is not None:
            raise jax.errors.JaxRuntimeError(self.refusal)
        self.locked[address] = size

    def dma_unmap(self, address: int) -> None:
        del self.locked[address]


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def layout() -> SlotLayout:
    return slot_layout(FeatureSchema(), Layout(align=8, max_requests=3), Bucket(64, 24))


def locks_of(client: Client) -> PageLock:
    device: Any = SimpleNamespace(platform="gpu", client=client)
    return PageLock(device)


def test_slots_are_locked_until_they_are_gone(client: Client, layout: SlotLayout) -> None:
    locks = locks_of(client)
    assert locks.memory is Memory.PAGE_LOCKED
    assert not client.locked
    slots = [Slot(layout) for _ in range(3)]
    for slot in slots:
        locks.lock(slot)
    assert client.locked == {slot.words.ctypes.data: layout.words * 4 for slot in slots}
    words = slots[0].words
    del slots[:2], slot
    gc.collect()
    assert list(client.locked) == [slots[0].words.ctypes.data]
    assert not words.any()
    slots.clear()
    gc.collect()
    assert not client.locked


def test_a_platform_that_can_not_lock_is_told_once_and_works(
    client: Client, layout: SlotLayout, caplog: pytest.LogCaptureFixture
) -> None:
    client.refusal = "UNIMPLEMENTED: DmaMap is not supported.\nmore"
    with caplog.at_level(logging.INFO):
        locks = locks_of(client)
        for _ in range(3):
            locks.lock(Slot(layout))
    assert locks.memory is Memory.PAGEABLE
    (line,) = [r.getMessage() for r in caplog.records if r.name == page_lock.__name__]
    assert "pageable" in line
    assert "DmaMap is not supported." in line
    assert "more" not in line
    assert not client.locked


def test_a_jax_that_can_not_lock_is_told_and_works(layout: SlotLayout, caplog: pytest.LogCaptureFixture) -> None:
    device: Any = SimpleNamespace(platform="gpu", client=object())
    locks = PageLock(device)
    locks.lock(Slot(layout))
    assert locks.memory is Memory.PAGEABLE
    assert "lacks Client.dma_map" in caplog.text


def test_memory_that_can_not_be_locked_any_more_is_an_error(client: Client, layout: SlotLayout) -> None:
    locks = locks_of(client)
    client.refusal = "RESOURCE_EXHAUSTED"
    with pytest.raises(jax.errors.JaxRuntimeError, match="EXHAUSTED"):
        locks.lock(Slot(layout))


def test_the_cpu_reads_a_slot_where_it_is(layout: SlotLayout, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        locks = PageLock(jax.devices("cpu")[0])
    assert locks.memory is Memory.IN_PLACE
    assert not [r for r in caplog.records if r.name == page_lock.__name__]
    locks.lock(Slot(layout))
