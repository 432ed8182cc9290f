"""Who serves whom: users split between two versions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.server.errors import RankError, Refusal
from flame_jax.server.models import STEPS, user_step
from tests.server.shelf import Desk, refused, run, settle


def test_a_rollback_ends_a_split() -> None:
    async def test(desk: Desk) -> None:
        await desk.reloader.split("3", 0.5)
        await desk.reloader.rollback()
        assert desk.roles() == {"1": "active"}
        await settle()
        assert await desk.statuses() == {"1": "active", "2": "withdrawn", "3": "withdrawn"}

    run(["1", "2", "3"], test, version="2")


def test_calls_before_the_promotion_do_not_count_on_trial() -> None:
    async def test(desk: Desk) -> None:
        await desk.reloader.split("2", 0.5)
        canary = desk.models.canary
        assert canary is not None
        desk.fail(canary, 1, ok=1000)
        await desk.reloader.load("2")
        assert desk.models.active is canary
        desk.fail(canary, 5)
        assert desk.roles() == {"1": "active"}

    run(["1", "2"], test, version="1")


def test_a_failing_canary_is_dropped() -> None:
    async def test(desk: Desk) -> None:
        assert desk.models.canary is not None
        desk.fail(desk.models.canary, 5)
        assert desk.roles() == {"1": "active"}
        await settle()
        assert (await desk.statuses())["2"] == "bad"

    run(["1", "2"], test, canary="2", canary_share=0.1)


def test_nothing_is_taken_while_users_are_split_and_an_ended_split_sticks() -> None:
    async def test(desk: Desk) -> None:
        desk.shelf.held["3"] = "first"
        await desk.reloader.poll()
        assert desk.roles() == {"1": "active", "2": "canary"}
        await desk.reloader.split("2", 0.5)
        assert desk.shelf.loads == ["1", "2"], "another share of the same version is no load"
        assert desk.models.share == STEPS // 2
        for bad in (float("nan"), float("inf"), -0.1, 1.0001, 0.00001):
            with refused(Refusal.BAD_SHARE):
                await desk.reloader.split("2", bad)
        with refused(Refusal.NO_SPLIT):
            await desk.reloader.split("3", 0)
        with refused(Refusal.IS_ACTIVE):
            await desk.reloader.split("1", 0.5)
        await desk.reloader.split("", 0)
        with refused(Refusal.NO_SPLIT):
            await desk.reloader.split("", 0)
        del desk.shelf.held["3"]
        await desk.reloader.poll()
        await settle()
        assert await desk.statuses() == {"1": "active", "2": "withdrawn"}

    run(["1", "2"], test, canary="2", canary_share=0.1)


def test_the_canary_and_the_standby_become_what_is_asked_without_a_load() -> None:
    async def test(desk: Desk) -> None:
        await desk.reloader.load("2")
        assert desk.roles() == {"2": "active", "1": "standby"}
        await desk.reloader.load("1")
        assert desk.roles() == {"1": "active", "2": "standby"}
        await desk.reloader.split("2", 0.3)
        assert desk.roles() == {"1": "active", "2": "canary"}
        await desk.reloader.load("2")
        assert desk.roles() == {"2": "active", "1": "standby"}
        assert desk.shelf.loads == ["1", "2"]
        desk.shelf.held["2"] = "another manifest"
        await desk.reloader.load("2")
        assert desk.shelf.loads == ["1", "2", "2"]

    run(["1", "2"], test, version="1")


def test_a_named_version_is_served_by_that_version_while_it_is_live() -> None:
    async def test(desk: Desk) -> None:
        await desk.reloader.load("2")
        for name in ("1", "2"):
            assert desk.models.route(name, "anybody").version == name
        with pytest.raises(RankError):
            desk.models.route("3", "anybody")
        first = desk.models.standby
        assert first is not None
        first.in_flight = 1
        desk.models.end_standby()
        with pytest.raises(RankError):
            desk.models.route("1", "anybody")
        first.in_flight = 0
        await settle()

    run(["1", "2", "3"], test, version="1")


@settings(max_examples=30)
@given(small=st.integers(1, STEPS), large=st.integers(1, STEPS))
def test_a_share_is_kept_and_growing_it_moves_nobody_back(small: int, large: int) -> None:
    small, large = sorted((small, large))
    steps = np.array([user_step(f"user {n}") for n in range(20_000)])
    assert set(np.flatnonzero(steps < small)) <= set(np.flatnonzero(steps < large))
    spread = 4.5 * np.sqrt(large / STEPS * (1 - large / STEPS) / len(steps)) + 1e-9
    assert abs((steps < large).mean() - large / STEPS) <= spread


def test_a_users_step_is_the_same_everywhere() -> None:
    """Worked out with `b2sum -l 64`: the first 8 bytes, little-endian, modulo 10,000."""
    assert [user_step(user) for user in ("u3", "42", "é")] == [4291, 6983, 9963]


def test_two_shares_route_their_users() -> None:
    async def test(desk: Desk) -> None:
        await desk.reloader.split("2", 0.3)
        users = [f"u{n}" for n in range(500)]
        first = [desk.models.route("", user).version for user in users]
        assert first == ["2" if user_step(user) < 3000 else "1" for user in users]
        for share, version in ((0.4291, "1"), (0.4292, "2")):  # u3 has step 4291
            await desk.reloader.split("2", share)
            assert desk.models.route("", "u3").version == version
        await desk.reloader.split("2", 1.0)
        assert {desk.models.route("", user).version for user in users} == {"2"}

    run(["1", "2"], test, version="1")
