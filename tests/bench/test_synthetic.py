"""Random stores fit the schema they are made for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.synthetic import write_store
from flame_jax.pda.assembler import Assembler
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.request import RankRequest
from flame_jax.vocabulary import Vocabularies, Vocabulary
from tests.server.live import ITEMS, KEYS, SCHEMA


def test_every_user_and_item_can_be_ranked(tmp_path: Path) -> None:
    write_store(tmp_path / "store", SCHEMA, ITEMS, users=5, events=100)
    store = LmdbStore(tmp_path / "store", SCHEMA)
    assembler = Assembler(SCHEMA, Vocabularies(Vocabulary(ITEMS), {n: Vocabulary(k) for n, k in KEYS.items()}))
    assert list(store.users()) == [f"u{n}" for n in range(5)]
    for user in store.users():
        request = RankRequest(user, ITEMS, scenario=0, request_time=2**31 - 1)
        assembled = assembler.assemble(request, store.read(user, ITEMS))
        assert assembled.report.missing_items == assembled.report.unknown_items == 0
        assert assembler.layout.extent(assembled.record).history == SCHEMA.block_length
    assert np.array_equal(np.sort(store.item_ids()), np.sort(ITEMS))
    store.close()
