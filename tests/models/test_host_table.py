"""An item table that stays in host memory: its rows come with the batch, and nothing else changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

from flame_jax.config import Config, ModelConfig
from flame_jax.dso.executor import Executor
from flame_jax.export import main
from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.engine import Engine
from flame_jax.fke.manifest import ITEM_TABLE
from flame_jax.host_table import host_table
from flame_jax.models.serving import host_item_table, rank_function, served_slot, served_weights
from flame_jax.pda.assembler import Assembler
from flame_jax.pda.page_lock import PageLock
from flame_jax.record import Piece
from tests import tiny
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


def test_a_width_that_no_whole_words_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        ModelConfig(width=15, table_dtype="bfloat16", item_table="host")


def exported(config: Config, folder: Path, place: Place, table_dtype: Type = "float32") -> Artifact:
    name = f"{place}_{table_dtype}"
    model = dataclasses.replace(config.model, item_table=place, table_dtype=table_dtype)
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
    return executor.scores()[0]


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
