"""An item table that stays in host memory: its rows come with the batch, and nothing else changes."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

from flame_jax.config import Config, DispatchConfig, ModelConfig
from flame_jax.dso.executor import Executor
from flame_jax.dso.lanes import Lane, hand_over_hot_rows, make_lanes
from flame_jax.dso.scheduler import BROKEN
from flame_jax.dso.work import Done, Status
from flame_jax.export import main
from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.engine import Engine
from flame_jax.fke.manifest import ITEM_TABLE
from flame_jax.host_table import host_table
from flame_jax.models.serving import host_item_table, rank_function, served_slot, served_weights
from flame_jax.pda.assembler import Assembler
from flame_jax.pda.hot_rows import SAMPLE, Held, HotRows
from flame_jax.pda.page_lock import PageLock
from flame_jax.record import Piece
from flame_jax.server.live import LiveModel
from tests import tiny
from tests.further import cpu_clients
from tests.models.test_rankers import BUCKET, CASES, LAYOUT, LENGTH, ROWS, requests_of, weights_of
from tests.packed import pack

Type = Literal["float32", "bfloat16"]
Place = Literal["device", "host"]
PLACES: tuple[Place, ...] = ("device", "host")


@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["climber", "hstu recsys_examples"])
def test_scores_are_those_of_the_table_on_the_device(name: str, table_dtype: Type) -> None:
    case = CASES[name]
    requests = requests_of(name, [(LENGTH, 5, 20), (3, 0, 17), (0, 2, 1)], np.random.default_rng(3))
    scores = []
    for place in PLACES:
        model = dataclasses.replace(case.config, table_dtype=table_dtype, item_table=place)
        table = host_item_table(model, weights_of(name))
        assert (table is None) == (place == "device")
        packed = pack(case.schema, LAYOUT, BUCKET, requests, dirt=np.random.default_rng(0), item_table=table)
        slot = served_slot(model, case.schema, LAYOUT, BUCKET)
        assert slot.words == len(packed.words)
        weights = served_weights(model, weights_of(name))
        assert ("item" in weights) == (place == "device")
        function = jax.jit(rank_function(model, case.schema, LAYOUT, slot, ROWS))
        whole = np.asarray(function([jax.numpy.asarray(w) for w in weights.values()], packed.words))
        assert np.isfinite(whole).all()
        firsts = [where.candidate_start - (BUCKET.tokens - BUCKET.candidates) for where in packed.places]
        found = [whole[at : at + len(r.candidates)] for at, r in zip(firsts, requests, strict=True)]
        scores.append(np.concatenate(found))
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["climber", "hstu recsys_examples"])
def test_rows_that_the_device_holds_change_no_bit(name: str, table_dtype: Type) -> None:
    case, count = CASES[name], 9
    model = dataclasses.replace(case.config, table_dtype=table_dtype, item_table="host", hot_rows=count)
    table, weights = host_item_table(model, weights_of(name)), served_weights(model, weights_of(name))
    assert table is not None
    assert list(weights)[-1] == "hot"
    requests = requests_of(name, [(LENGTH, 5, 20), (3, 0, 17), (0, 2, 1)], np.random.default_rng(3))
    function = jax.jit(rank_function(model, case.schema, LAYOUT, served_slot(model, case.schema, LAYOUT, BUCKET), ROWS))
    random, scores, filled = np.random.default_rng(4), list[np.ndarray](), np.zeros(0, bool)
    for choice in (None, np.arange(count), random.choice(ROWS, count, replace=False)):
        places = None if choice is None else np.full(ROWS, -1, np.int32)
        held = weights["hot"]
        if places is not None and choice is not None:
            places[choice] = np.arange(count)
            held = table[choice].view(held.dtype)
        packed = pack(case.schema, LAYOUT, BUCKET, requests, item_table=table, hot=True, places=places)
        if choice is None:
            filled = packed.fields["hot"] < 0
        from_device = filled & (packed.fields["hot"] >= 0)
        assert from_device.any() == (choice is not None)
        packed.fields["embedding"][from_device] = -1  # no number, in either type
        given = [jax.numpy.asarray(w) for w in [*weights.values()][:-1]] + [jax.numpy.asarray(held)]
        whole = np.asarray(function(given, packed.words))
        firsts = [where.candidate_start - (BUCKET.tokens - BUCKET.candidates) for where in packed.places]
        scores.append(
            np.concatenate([whole[at : at + len(r.candidates)] for at, r in zip(firsts, requests, strict=True)])
        )
    assert np.isfinite(scores[0]).all()
    assert scores[0].tobytes() == scores[1].tobytes() == scores[2].tobytes()


def test_hot_rows_are_of_a_table_in_host_memory() -> None:
    with pytest.raises(ValueError, match="host"):
        ModelConfig(hot_rows=3)


def test_a_width_that_no_whole_words_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        ModelConfig(width=15, table_dtype="bfloat16", item_table="host")


def exported(config: Config, folder: Path, place: Place, table_dtype: Type = "float32", hot_rows: int = 0) -> Artifact:
    name = f"{place}_{table_dtype}_{hot_rows}"
    model = dataclasses.replace(config.model, item_table=place, table_dtype=table_dtype, hot_rows=hot_rows)
    export = dataclasses.replace(config.export, artifact=str(folder / name), buckets=tiny.BUCKETS[:1])
    whole = dataclasses.replace(config, layout=tiny.LAYOUT, model=model, export=export)
    main(["build", "--config", tiny.write_config(whole, folder / f"{name}.yaml")])
    return Artifact(folder / name)


def scores_of(artifact: Artifact, user: int) -> np.ndarray:
    """Through assembler, slot and executable, as the server does."""
    engine = Engine(artifact, tiny.device())
    assembler = Assembler(tiny.SCHEMA, engine.vocabularies, host_table(engine.item_table, threads=2))
    request, fetched = tiny.request_of(user)
    executor = Executor(engine, tiny.BUCKETS[0], assembler.layout, tiny.LAYOUT, PageLock(engine.device))
    executor.fill([Piece(assembler.assemble(request, fetched).record, 2, 10)])
    executor.launch()
    return executor.scores()[0].values


def test_where_the_table_lies_is_chosen_at_export_and_changes_no_score(tmp_path: Path) -> None:
    config = tiny.trained_run().config
    device, host = (exported(config, tmp_path, place) for place in PLACES)
    assert ITEM_TABLE in host.manifest.files
    assert ITEM_TABLE not in device.manifest.files
    for place in PLACES:
        small = exported(config, tmp_path, place, "bfloat16")
        np.testing.assert_allclose(scores_of(small, 3), scores_of(device, 3), atol=0.02)
        assert not np.array_equal(scores_of(small, 3), scores_of(device, 3))
        modes = {path.name: path.stat().st_mode & 0o777 for path in small.path.iterdir()}
        assert len(set(modes.values())) == 1, "files that another user may not read"
    for user in (3, 4):
        np.testing.assert_allclose(scores_of(host, user), scores_of(device, user), rtol=1e-5, atol=1e-7)
    table = Engine(host, tiny.device()).item_table
    assert isinstance(table, np.memmap), "a table larger than memory must not be read whole"
    damaged = bytearray((host.path / ITEM_TABLE).read_bytes())
    damaged[-1] ^= 1
    (host.path / ITEM_TABLE).write_bytes(damaged)
    with pytest.raises(ArtifactError, match="does not match its hash"):
        Engine(host, tiny.device())
    (host.path / ITEM_TABLE).unlink()
    with pytest.raises(ArtifactError, match=ITEM_TABLE):
        Engine(host, tiny.device())


def test_an_executor_scores_the_same_while_other_rows_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact with hot rows, from export to scores, with a new choice before, between and after its steps."""
    artifact = exported(tiny.trained_run().config, tmp_path, "host", hot_rows=5)
    engines = [Engine(artifact, tiny.device()) for _ in range(4)]
    engines[0].warm()
    table = engines[0].item_table
    assert table is not None
    assembler = Assembler(tiny.SCHEMA, engines[0].vocabularies, host_table(table, threads=2))

    def executor(engine: Engine, hot: HotRows | None = None) -> Executor:
        return Executor(engine, tiny.BUCKETS[0], assembler.layout, tiny.LAYOUT, PageLock(engine.device), hot)

    first = engines[1].hand_over_hot_rows()
    assert first is not None
    hot, random, chosen = HotRows(table, {tiny.device(): first}), np.random.default_rng(0), set[bytes]()
    plain, changing = executor(engines[0]), executor(engines[1], hot)

    def another() -> None:
        for _ in range(200):
            hot.seen([random.choice(tiny.ITEMS, 5).astype(np.int32).repeat(40)])
        hot.renew()
        chosen.add(hot.held.places.tobytes())

    for user in (3, 4, 3, 5):
        piece = Piece(assembler.assemble(*tiny.request_of(user)).record, 0, 10)
        right = scored(plain, piece)
        for step in (partial(changing.fill, [piece]), changing.launch):
            another()
            step()
        another()
        assert changing.scores()[0].values.tobytes() == right.tobytes()
    assert len(chosen) > 3
    assert engines[1].reloaded(hot.held).golden_difference == engines[0].golden_difference

    lanes_hold_the_same_rows(artifact, piece, right)

    small, counting = Piece(piece.record, 2, 3), HotRows(table, {tiny.device(): first})
    counted = executor(engines[1], counting)
    for one in [piece] * (SAMPLE - 1) + [small] * (SAMPLE + 1):
        scored(counted, one)
    assert sum(counting.counted) == 2 * sum(len(items) for items in assembler.layout.items(small)), "no leftovers"

    asyncio.run(served_while_rows_change(engines[2], piece, right, monkeypatch))
    monkeypatch.setattr("flame_jax.server.live.Executor", lambda *_: 1 / 0)
    asyncio.run(failing_to_load(engines[3]))


def lanes_hold_the_same_rows(artifact: Artifact, piece: Piece, right: np.ndarray) -> None:
    """Lanes of two clients: one choice of rows for both, in the same memory, whichever lane a batch takes."""
    lanes = make_lanes(Engine(artifact, tiny.device()), 2, [tiny.device()], memory=0.05, clients=cpu_clients())
    table = lanes[0].engine.item_table
    assert table is not None
    records = Assembler(tiny.SCHEMA, lanes[0].engine.vocabularies, host_table(table, threads=2)).layout
    hot = HotRows(table, hand_over_hot_rows(lanes))
    executors = [
        Executor(lane.engine, tiny.BUCKETS[0], records, tiny.LAYOUT, PageLock(lane.device), hot) for lane in lanes
    ]
    for chosen in (range(5), range(20, 25), range(7, 12)):
        for _ in range(200):
            hot.seen([np.array(chosen, np.int32).repeat(40)])
        assert hot.renew() is (chosen.start > 0)
        assert np.flatnonzero(hot.held.places >= 0).tolist() == [*chosen]
        assert set(hot.held.rows) == {lane.device for lane in lanes}
        assert len({rows.unsafe_buffer_pointer() for rows in hot.held.rows.values()}) == 1
        for executor in executors:
            assert scored(executor, piece).tobytes() == right.tobytes()


def scored(executor: Executor, piece: Piece) -> np.ndarray:
    executor.fill([piece])
    executor.launch()
    return executor.scores()[0].values


async def served_while_rows_change(
    engine: Engine, piece: Piece, right: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the server serves it: a thread of the live version holds what its calls use."""
    config = dataclasses.replace(Config(), dispatch=DispatchConfig(hot_rows_seconds=0.01))
    live = LiveModel(
        [Lane(engine, 0, engine.device)],
        {bucket: [1e-3] for bucket in engine.manifest.buckets},
        "1",
        config,
        asyncio.get_running_loop(),
        lambda _: None,
    )
    assert live.hot is not None
    try:
        first, until = live.hot.held, time.monotonic() + 20
        while live.hot.held is first or min(live.hot.counted) == 0:
            assert time.monotonic() < until
            assert answered_right(await answer(live, piece), right)
        await lane_is_made_anew(live, piece, right, monkeypatch)
    finally:
        assert live.stop(5.0)
    assert not renewing()


async def lane_is_made_anew(live: LiveModel, piece: Piece, right: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its only lane breaks while other rows are held than at first."""
    checked, warm = [], Engine.warm

    def spy(engine: Engine, held: Held | None = None) -> None:
        warm(engine, held)
        checked.append(engine.golden_difference)

    monkeypatch.setattr(Engine, "warm", spy)
    monkeypatch.setattr(live.engine, "_executables", {})
    for _ in range(BROKEN):
        assert (await answer(live, piece)).status is Status.FAILED
    until = time.monotonic() + 20
    while not live.dispatcher.lanes_alive:
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    assert answered_right(await answer(live, piece), right)
    assert len(checked) == 1
    assert checked[0] <= live.manifest.golden_tolerance


async def answer(live: LiveModel, piece: Piece) -> Done:
    ticket, future = live.inbox.open()
    live.dispatcher.submit(ticket, piece.record, time.monotonic_ns() + 10**10)
    return await future


def answered_right(done: Done, right: np.ndarray) -> bool:
    return done.scores is not None and done.scores.tobytes() == right.tobytes()


async def failing_to_load(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        LiveModel(
            [Lane(engine, 0, engine.device)],
            {bucket: [1e-3] for bucket in engine.manifest.buckets},
            "1",
            Config(),
            asyncio.get_running_loop(),
            lambda _: None,
        )
    assert not renewing(), "a version that could not be loaded renews nothing"


def renewing() -> bool:
    return "flame-hot-rows" in {thread.name for thread in threading.enumerate()}
