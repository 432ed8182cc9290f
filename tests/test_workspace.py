"""Memory used anew: arrays that are out never overlap, and what is given back is taken again."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flame_jax.workspace import BufferPool, Workspace


@given(st.lists(st.one_of(st.integers(0, 300), st.none()), max_size=40), st.randoms())
def test_no_two_arrays_that_are_out_share_memory(steps: list[int | None], random: np.random.Generator) -> None:
    pool, out = BufferPool(), list[tuple[int, np.ndarray]]()
    for number, words in enumerate(steps):
        if words is not None:
            array = pool.take(words)
            assert array.shape == (words,)
            assert array.dtype == np.int32
            array[:] = number
            out.append((number, array))
        elif out:
            pool.give(out.pop(random.randrange(len(out)))[1])  # type: ignore[attr-defined]
    for number, array in out:
        assert (array == number).all()


def test_memory_given_back_is_taken_by_the_next_of_about_its_size() -> None:
    pool = BufferPool()
    first = pool.take(100)
    pool.give(first)
    assert np.shares_memory(pool.take(128), first)
    assert not np.shares_memory(pool.take(128), first)


def test_memory_of_others_is_left_alone() -> None:
    pool = BufferPool()
    others = np.zeros(128, np.int32)
    for array in (others, others[:100], BufferPool().take(100)):
        pool.give(array)
        assert not np.shares_memory(pool.take(100), array)


def test_a_workspace_keeps_one_array_a_name_and_lets_it_grow() -> None:
    space = Workspace()
    small, other = space.array("a", 10, np.int32), space.array("b", 10, np.int64)
    assert np.shares_memory(space.array("a", 3, np.float32), small)
    assert not np.shares_memory(small, other)
    assert space.array("a", 1000, np.int64).shape == (1000,)
