"""Slots: shared memory, page aligned, cleared by their request rows alone."""

from __future__ import annotations

import gc
import mmap
import os

import numpy as np
import pytest

from flame_jax.packing import Bucket, Layout, SlotLayout, slot_layout
from flame_jax.pda.staging import Slot, SlotBusy, State
from flame_jax.schema import Block, Feature, FeatureSchema

SCHEMA = FeatureSchema(
    blocks=(Block("a"), Block("b")),
    item_features=(Feature("year", "numeric"),),
    user_features=(Feature("age", "categorical", 3),),
)


@pytest.fixture
def layout() -> SlotLayout:
    return slot_layout(SCHEMA, Layout(align=8, max_requests=3), Bucket(64, 24))


def test_a_new_slot_is_zero_and_as_large_as_its_layout(layout: SlotLayout) -> None:
    slot = Slot(layout)
    assert slot.words.dtype == np.int32
    assert slot.words.shape == (layout.words,)
    assert not slot.words.any()


def test_a_slot_starts_on_a_page(layout: SlotLayout) -> None:
    assert Slot(layout).words.ctypes.data % mmap.PAGESIZE == 0


def test_a_second_mapping_of_the_slot_sees_and_makes_its_changes(layout: SlotLayout) -> None:
    slot = Slot(layout)
    other = np.frombuffer(mmap.mmap(slot.fd, layout.words * 4), np.int32)
    slot.fill()["item.year"][5] = 1.5
    assert layout.views(other)["item.year"][5] == 1.5
    layout.views(other)["rows"][2] = 7
    assert layout.views(slot.words)["rows"][2].tolist() == [7] * 7


def test_two_slots_of_one_layout_share_nothing(layout: SlotLayout) -> None:
    one, other = Slot(layout), Slot(layout)
    for field in one.fill().values():
        field.fill(1)
    assert not other.words.any()


def test_filling_forgets_the_requests_and_leaves_every_other_word(layout: SlotLayout) -> None:
    slot = Slot(layout)
    for field in slot.fill().values():
        field.fill(3)
    expected = slot.words.copy()
    slot.release()
    layout.views(expected)["rows"][:] = 0
    slot.fill()
    np.testing.assert_array_equal(slot.words, expected)


def test_a_slot_goes_through_its_states_and_refuses_every_other_order(layout: SlotLayout) -> None:
    steps = ("fill", "launch", "finish", "release")
    allowed = {
        State.FREE: {"fill": State.FILLING, "release": State.FREE},
        State.FILLING: {"launch": State.IN_FLIGHT, "release": State.FREE},
        State.IN_FLIGHT: {"finish": State.DONE},
        State.DONE: {"release": State.FREE},
    }
    for before, ways in {State.FREE: 0, State.FILLING: 1, State.IN_FLIGHT: 2, State.DONE: 3}.items():
        for step in steps:
            slot = Slot(layout)
            for taken in steps[:ways]:
                getattr(slot, taken)()
            assert slot.state is before
            if step in allowed[before]:
                getattr(slot, step)()
                assert slot.state is allowed[before][step]
            else:
                with pytest.raises(SlotBusy):
                    getattr(slot, step)()
                assert slot.state is before


def test_a_slot_in_flight_can_not_be_written_to(layout: SlotLayout) -> None:
    slot = Slot(layout)
    fields = slot.fill()
    fields["time"][0, 0] = 5
    words = slot.launch()
    before = words.copy()
    for field in fields.values():
        with pytest.raises(ValueError, match="read-only"):
            field[...] = 7
    with pytest.raises(ValueError, match="read-only"):
        words[0] = 7
    slot.finish()
    with pytest.raises(ValueError, match="read-only"):
        fields["time"][0, 0] = 7
    np.testing.assert_array_equal(words, before)
    slot.release()
    slot.fill()["time"][0, 0] = 7
    assert layout.views(slot.words)["time"][0, 0] == 7


def test_a_slot_is_not_handed_to_programs_that_this_one_starts(layout: SlotLayout) -> None:
    assert not os.get_inheritable(Slot(layout).fd)


def test_a_slot_that_is_gone_holds_no_file_descriptor(layout: SlotLayout) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        Slot(layout)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
