"""What is loaded when, and what it replaces: polling, commands, rollback."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.fke.repository import RepositoryError, Version
from flame_jax.server.errors import CommandRefused, Refusal
from flame_jax.server.live import LoadError
from tests.server.shelf import Desk, FakeLive, Shelf, refused, run, settle


def test_the_newest_is_served_and_its_successor_is_taken() -> None:
    async def test(desk: Desk) -> None:
        assert desk.roles() == {"10": "active"}
        desk.shelf.held["11"] = "first"
        await desk.reloader.poll()
        assert desk.roles() == {"11": "active", "10": "standby"}
        desk.shelf.held["8"] = "first"
        desk.models.end_standby()
        await desk.reloader.poll()
        assert desk.roles() == {"11": "active"}, "an older version is none to take"
        assert desk.shelf.loads == ["10", "11"]
        assert desk.shelf.beside == [False, True], "only what is loaded while calls are answered takes its time"
        assert desk.count("flame_reloads_total", result="ok") == 1

    run(["9", "10"], test)


def test_bad_versions_are_skipped_counted_and_tried_again_only_when_they_change() -> None:
    async def test(desk: Desk) -> None:
        desk.shelf.bad = {"3": "NaN weights"}
        desk.shelf.held |= {"2": "first", "3": "first"}
        await desk.reloader.poll()
        assert desk.roles() == {"2": "active", "1": "standby"}
        desk.models.end_standby()
        for _ in range(3):
            await desk.reloader.poll()
        assert desk.shelf.loads == ["1", "3", "2"]
        assert desk.count("flame_bad_versions_total") == 1
        (row,) = [row for row in (await desk.state()).versions if row.version == "3"]
        assert (row.status, row.reason) == ("bad", "NaN weights")
        desk.shelf.bad.clear()
        await desk.reloader.poll()
        assert desk.models.active.version == "2"
        desk.shelf.held["3"] = "repaired"
        await desk.reloader.poll()
        assert desk.models.active.version == "3"

    run(["1"], test)


def test_a_start_names_every_version_tried() -> None:
    async def start(desk: Desk) -> None:
        desk.shelf.bad = {"1": "no hash", "2": "no weights"}
        await desk.reloader.start()

    for config in ({}, {"version": "2"}, {"canary": "2", "canary_share": 0.5}):
        with pytest.raises(LoadError) as caught:
            asyncio.run(start(Desk(Shelf("1", "2"), **config)))
        assert ("no weights" in str(caught.value)) == ("canary" not in config)
        assert ("no hash" in str(caught.value)) == ("version" not in config)
    with pytest.raises(LoadError, match=r"server\.version: model m has no version '5'; it has 2, 1"):
        asyncio.run(start(Desk(Shelf("1", "2"), version="5")))
    with pytest.raises(LoadError, match=r"server\.canary: model m has no version '5'"):
        asyncio.run(start(Desk(Shelf("1", "2"), canary="5", canary_share=0.5)))


def test_a_pin_holds_against_newer_versions_until_it_is_lifted() -> None:
    async def test(desk: Desk) -> None:
        assert desk.roles() == {"2": "active"}
        await desk.reloader.poll()
        assert (await desk.state()).pinned == "2"
        assert desk.roles() == {"2": "active"}
        await desk.reloader.load("1")
        desk.models.end_standby()
        await desk.reloader.poll()
        assert desk.roles() == {"1": "active"}
        await desk.reloader.load("")
        assert (await desk.state()).pinned == ""
        assert desk.roles() == {"3": "active", "1": "standby"}

    run(["1", "2", "3"], test, version="2")


def test_a_command_for_what_is_not_there_or_bad_changes_nothing() -> None:
    async def test(desk: Desk) -> None:
        desk.shelf.bad = {"1": "torn"}
        await desk.reloader.split("3", 0.25)
        for name in ("4", "../2", "", "x" * 1000):
            with refused(Refusal.UNKNOWN_VERSION):
                await (desk.reloader.load(name) if name else desk.reloader.split("", 0.5))
        assert desk.roles() == {"2": "active", "3": "canary"}
        with refused(Refusal.BAD_VERSION):
            await desk.reloader.load("1")
        assert desk.models.active.version == "2"
        assert (await desk.state()).pinned == "2"
        assert desk.count("flame_reloads_total", result="failed") == 1

    run(["1", "2", "3"], test, version="2")


def test_the_standby_goes_when_its_time_is_over() -> None:
    async def test(desk: Desk) -> None:
        first = desk.models.active
        desk.shelf.held["2"] = "first"
        await desk.reloader.poll()
        first.in_flight = 1
        await asyncio.sleep(0.1)
        await settle()
        assert desk.roles() == {"2": "active"}
        assert (await desk.statuses())["1"] == "draining"
        assert isinstance(first, FakeLive)
        assert first.stops == 0, "a call is still being answered"
        first.in_flight = 0
        await settle()
        assert first.stops == 1
        assert await desk.statuses() == {"2": "active", "1": "available"}

    run(["1"], test, rollback_seconds=0.05)


def test_rollback_is_instant_while_the_standby_lasts_and_sticks() -> None:
    async def test(desk: Desk) -> None:
        desk.shelf.held["2"] = "first"
        await desk.reloader.poll()
        await desk.reloader.rollback()
        assert desk.roles() == {"1": "active"}
        assert desk.shelf.loads == ["1", "2"]
        await desk.reloader.poll()
        assert (await desk.statuses())["2"] == "withdrawn"
        assert desk.models.active.version == "1"
        desk.shelf.held["3"] = "first"
        await desk.reloader.poll()
        assert desk.models.active.version == "3"
        await desk.reloader.load("2")
        assert desk.models.active.version == "2"
        assert "withdrawn" not in (await desk.statuses()).values()
        assert desk.count("flame_rollbacks_total", reason="command") == 1

    run(["1"], test)


def test_rollback_loads_the_newest_good_older_version_when_nothing_stands_by() -> None:
    async def test(desk: Desk) -> None:
        desk.shelf.bad = {"8": "torn"}
        await desk.reloader.rollback()
        assert desk.roles() == {"7": "active"}, "what was left on purpose is not kept to go back to"
        await desk.reloader.rollback()
        assert desk.roles() == {"6": "active"}
        with refused(Refusal.NO_OLDER_VERSION):
            await desk.reloader.rollback()
        await desk.reloader.poll()
        assert desk.roles() == {"6": "active"}
        assert desk.count("flame_rollbacks_total", reason="command") == 2

    run(["6", "7", "8", "9"], test)


def test_a_rollback_moves_the_pin() -> None:
    async def test(desk: Desk) -> None:
        await desk.reloader.rollback()
        await desk.reloader.poll()
        assert (desk.models.active.version, desk.reloader.pinned) == ("1", "1")
        await desk.reloader.load("3")
        await desk.reloader.rollback()
        await desk.reloader.poll()
        assert (desk.models.active.version, desk.reloader.pinned) == ("1", "1")

    run(["1", "2", "3"], test, version="2")


def test_a_version_that_fails_on_trial_is_left_and_not_taken_again() -> None:
    async def test(desk: Desk) -> None:
        desk.shelf.held["2"] = "first"
        await desk.reloader.poll()
        second = desk.models.active
        desk.fail(second, 4)
        assert desk.models.active is second, "four failures are too few to judge by"
        desk.fail(second, 1)
        assert desk.roles() == {"1": "active"}
        await desk.reloader.poll()
        assert desk.models.active.version == "1"
        assert (await desk.statuses())["2"] in ("draining", "bad")
        assert desk.count("flame_rollbacks_total", reason="failing") == 1
        assert desk.count("flame_bad_versions_total") == 1

    run(["1"], test)


def test_half_of_the_calls_failing_is_not_more_than_half() -> None:
    async def test(desk: Desk) -> None:
        desk.shelf.held["2"] = "first"
        await desk.reloader.poll()
        second = desk.models.active
        desk.fail(second, 20, ok=20)
        assert desk.models.active is second
        desk.fail(second, 1)
        assert desk.models.active.version == "1"

    run(["1"], test)


def test_failures_after_the_trial_or_of_the_version_before_change_nothing() -> None:
    async def test(desk: Desk) -> None:
        first = desk.models.active
        desk.fail(first, 50)
        assert desk.roles() == {"1": "active"}
        desk.shelf.held["2"] = "first"
        await desk.reloader.poll()
        desk.fail(first, 50)
        assert desk.roles() == {"2": "active", "1": "standby"}
        desk.models.end_standby()
        desk.fail(desk.models.active, 50)
        assert desk.roles() == {"2": "active"}

    run(["1"], test)


def test_a_dead_dispatcher_ends_its_version_and_only_without_another_the_process() -> None:
    async def test(desk: Desk) -> None:
        await desk.reloader.split("2", 0.5)
        assert desk.models.canary is not None
        desk.reloader.died(desk.models.canary)
        assert desk.roles() == {"1": "active"}
        assert (await desk.state()).pinned == "1"
        await desk.reloader.load("3")
        assert desk.models.standby is not None
        desk.reloader.died(desk.models.standby)
        assert desk.roles() == {"3": "active"}
        await desk.reloader.load("1")
        desk.reloader.died(desk.models.active)
        assert desk.roles() == {"3": "active"}
        assert desk.count("flame_rollbacks_total", reason="died") == 1
        assert desk.dead == 0
        desk.reloader.died(desk.models.active)
        assert desk.dead == 1

    run(["1", "2", "3"], test, version="1")


def test_no_more_than_two_versions_are_loaded_at_once() -> None:
    async def test(desk: Desk) -> None:
        for command in (desk.reloader.load("2"), desk.reloader.split("3", 0.5), desk.reloader.load("4")):
            desk.shelf.gate.clear()
            loading = asyncio.create_task(command)
            await settle()
            assert len(desk.roles()) == 1, "what was there makes room"
            desk.shelf.gate.set()
            await loading
            assert len(desk.roles()) == 2
        assert desk.roles() == {"4": "active", "2": "standby"}
        await desk.reloader.split("3", 0.5)
        desk.shelf.gate.clear()
        rolling = asyncio.create_task(desk.reloader.rollback())
        await settle()
        assert desk.roles() == {"4": "active"}
        desk.shelf.gate.set()
        await rolling

    run(["1", "2", "3", "4"], test, version="1")


def test_two_commands_at_once_take_turns() -> None:
    async def test(desk: Desk) -> None:
        desk.shelf.gate.clear()
        commands = [asyncio.create_task(desk.reloader.load(name)) for name in ("2", "3", "2")]
        await settle()
        assert desk.shelf.loads == ["1", "2"]
        assert desk.roles() == {"1": "active"}
        await desk.reloader.poll()
        desk.shelf.gate.set()
        await asyncio.gather(*commands)
        assert desk.shelf.together == 1
        assert desk.roles() == {"2": "active", "3": "standby"}
        assert desk.shelf.loads == ["1", "2", "3"]

    run(["1", "2", "3"], test, version="1")


def test_a_repository_that_goes_away_and_comes_back_is_looked_through_again(caplog: pytest.LogCaptureFixture) -> None:
    async def test(desk: Desk) -> None:
        right = desk.shelf.versions
        errors = itertools.chain([RepositoryError("gone")] * 3, [ZeroDivisionError("a bug")])

        def failing(newer_than: str | None = None) -> list[Version]:
            if error := next(errors, None):
                raise error
            return right(newer_than)

        desk.shelf.versions = failing  # type: ignore[method-assign]
        desk.shelf.held["2"] = "first"
        watching = asyncio.create_task(desk.reloader.watch())
        for _ in range(1000):
            if desk.models.active.version == "2":
                break
            await asyncio.sleep(0.01)
        watching.cancel()
        assert desk.models.active.version == "2"
        assert caplog.text.count("gone; what is loaded stays served") == 1
        assert "a bug" in caplog.text

    run(["1"], test, poll_seconds=0.01)


def test_what_is_loaded_while_the_server_drains_is_dropped() -> None:
    async def test(desk: Desk) -> None:
        desk.shelf.gate.clear()
        loading = asyncio.create_task(desk.reloader.load("2"))
        await settle()
        desk.reloader.close()
        desk.shelf.gate.set()
        with refused(Refusal.DRAINING):
            await loading
        with refused(Refusal.DRAINING):
            await desk.reloader.load("2")
        assert desk.models.active.version == "1"

    run(["1", "2"], test, version="1")


COMMANDS = st.lists(
    st.one_of(
        st.tuples(st.just("load"), st.sampled_from(["", "1", "2", "3", "4", "9"])),
        st.tuples(st.just("split"), st.sampled_from(["", "1", "2", "3"]), st.sampled_from([0, 0.2, 1.0, 7.0])),
        st.tuples(st.sampled_from(["rollback", "poll", "fail", "die", "window"])),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(commands=COMMANDS)
def test_whatever_is_commanded_one_version_is_active_and_no_two_roles_share_a_model(commands: list[Any]) -> None:
    async def test(desk: Desk) -> None:
        desk.shelf.bad = {"4": "torn"}
        for name, *arguments in commands:
            before = desk.dead
            if name == "fail":
                desk.fail(desk.models.active, 6)
            elif name == "die":
                alone = desk.models.standby is None
                desk.reloader.died(desk.models.active)
                assert desk.dead - before == alone
            elif name == "window":
                desk.models.end_standby()
            else:
                with contextlib.suppress(CommandRefused):
                    await getattr(desk.reloader, name)(*arguments)
            live = [live for live, _ in desk.models]
            assert len(set(map(id, live))) == len(live)
            assert (desk.models.share > 0) == (desk.models.canary is not None)
            assert desk.reloader.pinned in ("", desk.models.active.version)
            assert "4" not in desk.roles()
            assert len(desk.roles()) <= 3
        for _ in itertools.repeat(None, 50):
            if not desk.models.draining:
                break
            await asyncio.sleep(0.01)
        assert not desk.models.draining
        assert await desk.models.stop()

    run(["1", "2", "3", "4"], test, version="2")
