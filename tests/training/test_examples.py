"""Training examples: split by time, every event a candidate once, packed as the server packs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_jax.packing import Bucket, Layout
from flame_jax.pda.lmdb_store import LmdbStore, LmdbWriter
from flame_jax.pda.records import feature_row, item_dtype
from flame_jax.request import History
from flame_jax.training.examples import Batch, Dataset, Example, Packer, sample_examples, split_points
from flame_jax.vocabulary import Vocabularies, Vocabulary
from tests import tiny

LABELS = {"like": [3, 4], "love": [4]}
BUCKET = Bucket(128, 64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("examples") / "store"
    tiny.write_store(path)
    return load(path)


def load(path: Path) -> Dataset:
    store = LmdbStore(path, tiny.SCHEMA)
    dataset = Dataset(store, tiny.SCHEMA, LABELS)
    store.close()
    return dataset


@pytest.fixture(scope="module")
def packer(dataset: Dataset) -> Packer:
    return Packer(dataset, tiny.vocabularies(), tiny.LAYOUT, BUCKET)


def test_the_data_set_is_what_the_store_holds(dataset: Dataset) -> None:
    assert [key for key, _ in dataset.users] == [f"u{user:02d}" for user in range(tiny.USERS)]
    assert dataset.lengths().tolist() == [20 + user % 10 for user in range(tiny.USERS)]
    for user, (_, record) in enumerate(dataset.users):
        assert record.history.item_ids.tolist() == tiny.user_history(user).item_ids.tolist()
        assert record.features["age"] == user % 2


@given(st.lists(st.integers(0, 1000), min_size=1), st.floats(0, 1))
def test_what_is_kept_and_what_is_held_out_make_up_a_history(lengths: list[int], fraction: float) -> None:
    whole = np.array(lengths, np.int64)
    kept = split_points(whole, fraction)
    assert ((kept >= 0) & (kept <= whole)).all()
    assert (abs((whole - kept) - whole * fraction) < 1 + 1e-6).all()


def test_the_held_out_share_is_rounded_down() -> None:
    assert split_points(np.array([0, 1, 4, 5, 9, 10, 100]), 0.2).tolist() == [0, 1, 4, 4, 8, 8, 80]


@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(0, 10),
    st.integers(0, 2**31),
)
def test_every_training_event_is_a_candidate_once_and_has_its_history(
    stops: list[int], chunk: int, min_history: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    times = [np.sort(random.integers(0, 20, stop)) for stop in stops]
    moments = [np.searchsorted(t, t) for t in times]
    examples = sample_examples(np.array(stops), moments, chunk=chunk, min_history=min_history, random=random)
    for user, stop in enumerate(stops):
        covered = sorted(at for e in examples if e.user == user for at in range(e.start, e.stop))
        assert covered == list(range(max(0, min(min_history, stop - 1)), stop))
    for example in examples:
        assert 0 < example.stop - example.start <= chunk
        clock = times[example.user].tolist()
        assert clock[: example.seen] == [t for t in clock if t < clock[example.start]]


def test_chunks_differ_between_epochs_but_not_between_runs() -> None:
    stops = np.array([50, 60, 70])

    def epoch(seed: int) -> list[Example]:
        moments = [np.arange(stop) for stop in stops]
        return sample_examples(stops, moments, chunk=8, min_history=3, random=np.random.default_rng(seed))

    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2)
    assert all(isinstance(example.user, int) for example in epoch(1))


def candidates_of(batch: Batch) -> Iterator[tuple[Example, int, int]]:
    for example, first, _ in batch.examples:
        for at in range(example.start, example.stop):
            yield example, at, first + at - example.start


def epoch_batches(dataset: Dataset, packer: Packer, stops: np.ndarray) -> list[Batch]:
    random = np.random.default_rng(0)
    return batches_of(packer, sample_examples(stops, dataset.moments(), chunk=8, min_history=3, random=random))


def batches_of(packer: Packer, examples: list[Example]) -> list[Batch]:
    return [packer.pack(group) for group in packer.groups(examples)]


def test_packed_batches_are_what_a_naive_reading_of_the_histories_gives(dataset: Dataset, packer: Packer) -> None:
    stops = split_points(dataset.lengths(), 0.2)
    vocabulary, blocks = tiny.vocabulary(), tiny.SCHEMA.blocks
    seen: list[tuple[int, int]] = []
    for batch in epoch_batches(dataset, packer, stops):
        fields = packer.slot.views(batch.words)
        for row, (example, first, count) in enumerate(batch.examples):
            history = tiny.user_history(example.user)
            features = dataset.users[example.user][1].features
            words = fields["rows"][row]
            tokens = first + BUCKET.tokens - BUCKET.candidates
            assert count == example.stop - example.start
            assert words[1:5].tolist() == [tokens, count, 0, history.timestamps[example.start]]
            assert fields["user.age"][row] == features["age"]
            assert fields["user.height"][row] == features["height"]
            assert fields["context.hour"][row] == 0
            for number, block in enumerate(blocks):
                actions = block.actions or range(tiny.ACTIONS)
                past = [at for at in range(example.seen) if history.actions[at] in actions]
                past = past[-tiny.SCHEMA.block_length :]
                assert words[5 + number] == len(past)
                where = slice(words[0], words[0] + len(past))
                assert fields["item"][number, where].tolist() == vocabulary.lookup(history.item_ids[past]).tolist()
                assert fields["action"][number, where].tolist() == history.actions[past].tolist()
                assert fields["time"][number, where].tolist() == history.timestamps[past].tolist()
        for example, at, row in candidates_of(batch):
            history = tiny.user_history(example.user)
            item = history.item_ids[at]
            number = tiny.ITEM_IDS.tolist().index(item)
            token = row + BUCKET.tokens - BUCKET.candidates
            assert (fields["item"][:, token] == vocabulary.lookup(np.array([item]))).all()
            assert (fields["action"][:, token] == tiny.ACTIONS).all()
            assert fields["item.genres"][row] == tiny.GENRES[number]
            assert fields["item.decade"][row] == np.float32(number / 100)
            assert batch.labels[row].tolist() == [history.actions[at] in (3, 4), history.actions[at] == 4]
            assert batch.mask[row] == 1
            seen.append((example.user, at))
    assert len(seen) == len(set(seen))
    assert set(seen) == {(user, at) for user, stop in enumerate(stops) for at in range(3, stop)}


def test_mask_and_labels_are_zero_on_rows_without_a_candidate(dataset: Dataset, packer: Packer) -> None:
    for batch in epoch_batches(dataset, packer, dataset.lengths()):
        taken = [row for _, _, row in candidates_of(batch)]
        assert batch.mask.sum() == len(taken) == len(set(taken))
        empty = np.setdiff1d(np.arange(BUCKET.candidates), taken)
        assert not batch.mask[empty].any()
        assert not batch.labels[empty].any()
        rows = packer.slot.views(batch.words)["rows"]
        assert (rows[:, 2] > 0).sum() == len(batch.examples)


def test_nothing_held_out_is_in_any_training_batch(dataset: Dataset, packer: Packer) -> None:
    """The time of an event outlives packing, so a held-out one would show by its time even without its id."""
    stops = split_points(dataset.lengths(), 0.3)
    for batch in epoch_batches(dataset, packer, stops):
        fields = packer.slot.views(batch.words)
        for row, (example, _, _) in enumerate(batch.examples):
            history = tiny.user_history(example.user)
            held = set(tiny.vocabulary().lookup(history.item_ids[stops[example.user] :]).tolist())
            start, _, _, _, request_time, *lengths = fields["rows"][row].tolist()
            for block, length in enumerate(lengths):
                assert not held & set(fields["item"][block, start : start + length].tolist())
                assert (fields["time"][block, start : start + length] <= request_time).all()
        for example, at, _ in candidates_of(batch):
            assert at < stops[example.user]


def test_a_candidate_is_never_in_its_own_history_even_when_times_tie(tmp_path: Path) -> None:
    times = np.full(10, 5, np.int64)
    history = History(tiny.ITEM_IDS[:10], np.full(10, 4, np.int32), times)
    small = write(tmp_path, {"a": history})
    for start in range(10):
        example = Example(0, start, start, 10)
        request, _ = small.request(example, history.item_ids[start:])
        assert request.history is not None
        assert request.history.item_ids.tolist() == tiny.ITEM_IDS[:start].tolist()
        packer = Packer(small, tiny.vocabularies(), tiny.LAYOUT, BUCKET)
        (batch,) = batches_of(packer, [example])
        rows = packer.slot.views(batch.words)["rows"]
        assert rows[0, 5:].tolist() == [start, start]


def write(
    tmp_path: Path, users: dict[str, History], *, items: np.ndarray = tiny.ITEM_IDS, name: str = "store"
) -> Dataset:
    rows = np.zeros(len(items), item_dtype(tiny.SCHEMA))
    rows["id"], rows["genres"], rows["decade"] = items, 3, 1.5
    with LmdbWriter(tmp_path / name, tiny.SCHEMA) as writer:
        writer.put_items(rows)
        writer.put_users((key, history, feature_row(tiny.SCHEMA.user_features, {})) for key, history in users.items())
        writer.finish("test")
    return load(tmp_path / name)


@pytest.mark.parametrize("missing", [0, 3, 9])
def test_an_item_without_a_record_has_features_of_zero_as_it_has_when_served(missing: int, tmp_path: Path) -> None:
    ids = np.arange(10, 20, dtype=np.int64)
    history = History(ids, np.full(10, 4, np.int32), np.arange(10, dtype=np.int64))
    small = write(tmp_path, {"a": history}, items=np.delete(ids, missing))
    request, fetched = small.request(Example(0, 0, 0, 10), ids)
    store = LmdbStore(tmp_path / "store", tiny.SCHEMA)
    served = store.read("a", request.candidates)
    store.close()
    assert not served.found[missing]
    assert fetched.found.tolist() == served.found.tolist()
    for feature in ("id", "genres", "decade"):
        assert fetched.items[feature].tolist() == served.items[feature].tolist()


def test_an_event_of_an_item_outside_the_vocabulary_is_packed_as_unknown(dataset: Dataset) -> None:
    few = Vocabulary(tiny.ITEM_IDS[:5])
    packer = Packer(dataset, Vocabularies(few, {}), tiny.LAYOUT, BUCKET)
    (batch,) = batches_of(packer, [Example(0, 10, 10, 20)])
    fields = packer.slot.views(batch.words)
    history = tiny.user_history(0)
    ((_, first, _),) = batch.examples
    tokens = slice(first + BUCKET.tokens - BUCKET.candidates, None)
    assert fields["item"][0, tokens][:10].tolist() == few.lookup(history.item_ids[10:20]).tolist()


def test_batches_are_filled_in_order_and_none_is_empty(dataset: Dataset, packer: Packer) -> None:
    examples = sample_examples(
        dataset.lengths(), dataset.moments(), chunk=8, min_history=3, random=np.random.default_rng(3)
    )
    batches = batches_of(packer, examples)
    assert [example for batch in batches for example, _, _ in batch.examples] == examples
    assert all(0 < len(batch.examples) <= tiny.LAYOUT.max_requests for batch in batches)
    assert packer.groups([]) == []


def test_batches_share_no_memory(dataset: Dataset, packer: Packer) -> None:
    one, two = batches_of(packer, [Example(user, 3, 3, 20) for user in range(8)])[:2]
    for a, b in ((one.words, two.words), (one.labels, two.labels), (one.mask, two.mask)):
        assert not np.shares_memory(a, b)


def test_an_example_that_no_slot_holds_is_refused(dataset: Dataset) -> None:
    packer = Packer(dataset, tiny.vocabularies(), Layout(align=8, max_requests=4), Bucket(32, 8))
    with pytest.raises(ValueError, match="do not fit"):
        batches_of(packer, [Example(0, 3, 3, 15)])


def test_labels_follow_the_order_of_tasks(dataset: Dataset) -> None:
    actions = tiny.user_history(4).actions[:20]
    labels = dataset.candidates(4, 0, 20, None).labels
    assert labels.dtype == np.float32
    assert labels[:, 0].tolist() == (actions >= 3).astype(float).tolist()
    assert labels[:, 1].tolist() == (actions == 4).astype(float).tolist()
