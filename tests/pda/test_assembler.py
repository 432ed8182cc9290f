"""From requests to records, against a reference that goes through the events one at a time."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.packing import MAX_TIME
from flame_jax.pda.assembler import Assembled, Assembler
from flame_jax.pda.records import (
    UserRecord,
    feature_row,
    item_dtype,
)
from flame_jax.pda.store import Fetched
from flame_jax.request import FeatureReport, History, RankRequest
from flame_jax.schema import Block, Feature, FeatureSchema
from flame_jax.vocabulary import Vocabularies, Vocabulary
from tests.test_schema import schemas

Value = int | float
Row = dict[str, Value]

KNOWN = [3, 5, 2**32 + 5, 2**63 - 1]
ITEM_IDS = st.sampled_from([*KNOWN, 0, 4, 2**32 + 3, 2**40])
VOCABULARIES = Vocabularies(Vocabulary(np.array(KNOWN, np.int64)), {})
KEYS = st.sampled_from([-1, 0, *KNOWN, 2**40 + 1])
EMBEDDING_ROWS = {key: row for row, key in enumerate(KNOWN, start=1)}


def vocabularies(schema: FeatureSchema) -> Vocabularies:
    """Every id feature knows the keys that are known item ids too."""
    named = [f"{group}.{f.name}" for group, f in schema.features if f.kind == "id"]
    return Vocabularies(VOCABULARIES.items, dict.fromkeys(named, VOCABULARIES.items))


class Event(NamedTuple):
    """One event of a user."""

    item: int
    action: int
    time: int


class Case(NamedTuple):
    """A request, what the store answers, and both again as plain Python values."""

    request: RankRequest
    fetched: Fetched
    stored: list[Event] | None
    inline: list[Event] | None
    user: Row
    context: Row
    items: list[Row]


def history(events: list[Event]) -> History:
    return History(
        np.array([event.item for event in events], np.int64),
        np.array([event.action for event in events], np.int32),
        np.array([event.time for event in events], np.int64),
    )


def rows(features: tuple[Feature, ...]) -> st.SearchStrategy[Row]:
    one: dict[str, st.SearchStrategy[Value]] = {
        f.name: st.floats(width=32, allow_nan=False, allow_infinity=False)
        if f.kind == "numeric"
        else KEYS
        if f.kind == "id"
        else st.integers(0, f.limit - 1)
        for f in features
    }
    return st.fixed_dictionaries(one)


@st.composite
def cases(draw: st.DrawFn, schema: FeatureSchema) -> Case:
    times = st.sampled_from([0, 1, 99, 100, 101, 2**30, MAX_TIME])
    events = st.lists(st.builds(Event, ITEM_IDS, st.integers(0, schema.actions - 1), times), max_size=30)
    in_order = events.map(lambda found: sorted(found, key=lambda event: event.time))
    stored = draw(st.none() | in_order)
    inline = draw(st.none() | in_order)
    candidates = draw(st.lists(ITEM_IDS, min_size=1, max_size=6))
    found = [draw(st.booleans()) for _ in candidates]
    stored_features = tuple(f for f in schema.item_features if f.source != "request")
    sent_features = tuple(f for f in schema.item_features if f.source == "request" and draw(st.booleans()))
    items = [draw(rows(stored_features)) if here else missing(stored_features) for here in found]
    sent = [draw(rows(sent_features)) for _ in candidates]
    table = np.zeros(len(candidates), item_dtype(schema))
    table["id"] = candidates
    for at, item in enumerate(items):
        for name, value in item.items():
            table[name][at] = value
    user = draw(rows(schema.user_features))
    context = draw(rows(schema.context_features))
    return Case(
        request=RankRequest(
            user="u",
            candidates=np.array(candidates, np.int64),
            scenario=draw(st.integers(0, len(schema.scenarios) - 1)),
            request_time=draw(times),
            history=None if inline is None else history(inline),
            context=context,
            item_features={f.name: np.array([one[f.name] for one in sent], f.stored_dtype) for f in sent_features},
        ),
        fetched=Fetched(
            None if stored is None else UserRecord(history(stored), feature_row(schema.user_features, user)),
            table,
            np.array(found),
        ),
        stored=stored,
        inline=inline,
        user=user if stored is not None else missing(schema.user_features),
        context=context,
        items=[missing(schema.item_features) | a | b for a, b in zip(items, sent, strict=True)],
    )


def missing(features: tuple[Feature, ...]) -> Row:
    return {f.name: -1 if f.kind == "id" else 0 for f in features}


def word(feature: Feature, value: Value) -> int:
    """The int32 that carries a feature's bits."""
    if feature.kind == "id":
        value = EMBEDDING_ROWS.get(int(value), 0)
    packed = struct.pack("<f", value) if feature.kind == "numeric" else struct.pack("<i", value)
    bits: int = struct.unpack("<i", packed)[0]
    return bits


def reference(schema: FeatureSchema, case: Case) -> tuple[list[int], FeatureReport]:
    """The record's words in their documented order, and the report."""
    request = case.request
    seen: list[list[Event]] = []
    truncated = False
    for block in schema.blocks:
        kept: list[Event] = []
        for event in case.inline if case.inline is not None else case.stored or []:
            if event.time <= request.request_time and (not block.actions or event.action in block.actions):
                kept.append(event)
                if len(kept) > schema.block_length:
                    del kept[0]
                    truncated = True
        seen.append(kept)
    candidates = request.candidates.tolist()
    words = [len(candidates), request.scenario, request.request_time, *map(len, seen)]
    words += [word(f, case.user[f.name]) for f in schema.user_features]
    words += [word(f, case.context[f.name]) for f in schema.context_features]
    for kept in seen:
        words += [EMBEDDING_ROWS.get(event.item, 0) for event in kept]
        words += [event.action for event in kept]
        words += [event.time for event in kept]
    words += [EMBEDDING_ROWS.get(item, 0) for item in candidates]
    for feature in schema.item_features:
        if feature.source == "table":
            continue
        words += [word(feature, item[feature.name]) for item in case.items]
    report = FeatureReport(
        unknown_user=case.stored is None and case.inline is None,
        truncated_history=truncated,
        unknown_items=sum(item not in EMBEDDING_ROWS for item in candidates),
        missing_items=sum(not here for here in case.fetched.found.tolist()),
    )
    return words, report


@settings(max_examples=120)
@given(schemas(), st.data())
def test_a_record_and_its_report_are_those_of_the_reference(schema: FeatureSchema, data: st.DataObject) -> None:
    case = data.draw(cases(schema))
    assembled = Assembler(schema, vocabularies(schema)).assemble(case.request, case.fetched)
    words, report = reference(schema, case)
    assert assembled.record.tolist() == words
    assert assembled.report == report


@settings(max_examples=50)
@given(schemas(), st.data())
def test_an_assembler_keeps_nothing_of_one_request_for_the_next(schema: FeatureSchema, data: st.DataObject) -> None:
    first, second = data.draw(cases(schema)), data.draw(cases(schema))
    used = Assembler(schema, vocabularies(schema))
    used.assemble(first.request, first.fetched)
    again = used.assemble(second.request, second.fetched)
    alone = Assembler(schema, vocabularies(schema)).assemble(second.request, second.fetched)
    assert again.record.tolist() == alone.record.tolist()
    assert again.report == alone.report


SCHEMA = FeatureSchema(
    actions=3,
    blocks=(Block("all"), Block("bought", (2,))),
    block_length=2,
    user_features=(Feature("age", "categorical", 9),),
    context_features=(Feature("hour", "categorical", 24),),
)


def assemble(
    stored: list[Event] | None,
    inline: list[Event] | None = None,
    *,
    time: int = 100,
    candidates: tuple[int, ...] = (3,),
    found: tuple[bool, ...] = (True,),
    context: dict[str, int | float] | None = None,
) -> Assembled:
    request = RankRequest(
        user="u",
        candidates=np.array(candidates, np.int64),
        scenario=0,
        request_time=time,
        history=None if inline is None else history(inline),
        context=context or {},
    )
    user = None if stored is None else UserRecord(history(stored), feature_row(SCHEMA.user_features, {"age": 5}))
    items = np.zeros(len(candidates), item_dtype(SCHEMA))
    return Assembler(SCHEMA, VOCABULARIES).assemble(request, Fetched(user, items, np.array(found)))


def head(assembled: Assembled) -> list[int]:
    """Count, scenario, time, two lengths, age and hour."""
    found: list[int] = assembled.record[:7].tolist()
    return found


def test_events_later_than_the_request_are_not_seen_and_those_of_its_second_are() -> None:
    events = [Event(3, 0, 99), Event(5, 2, 100), Event(2**63 - 1, 0, 101)]
    assert assemble(events).record.tolist() == [1, 0, 100, 2, 1, 5, 0, 1, 2, 0, 2, 99, 100, 2, 2, 100, 1]
    assert not assemble(events).report.truncated_history, "an event in the future is not one left out"


def test_each_block_keeps_its_own_newest_events() -> None:
    events = [Event(3, 2, 1), Event(5, 2, 2), Event(2**32 + 5, 2, 3), Event(3, 0, 4), Event(5, 0, 5)]
    assembled = assemble(events)
    assert assembled.record[7:].tolist() == [1, 2, 0, 0, 4, 5, 2, 3, 2, 2, 2, 3, 1]
    assert assembled.report.truncated_history


def test_a_full_block_is_not_a_truncated_one() -> None:
    assembled = assemble([Event(3, 2, 1), Event(5, 2, 2)])
    assert head(assembled)[3:5] == [2, 2]
    assert not assembled.report.truncated_history


def test_an_inline_history_replaces_the_stores_and_leaves_the_users_features() -> None:
    assembled = assemble([Event(3, 2, 1)], inline=[Event(5, 0, 7)])
    assert assembled.record.tolist() == [1, 0, 100, 1, 0, 5, 0, 2, 0, 7, 1]


def test_an_empty_inline_history_replaces_the_stores_too() -> None:
    assert head(assemble([Event(3, 2, 1)], inline=[]))[3:6] == [0, 0, 5]


def test_a_user_without_history_anywhere_is_scored_cold_and_reported() -> None:
    assembled = assemble(None)
    assert head(assembled) == [1, 0, 100, 0, 0, 0, 0]
    assert assembled.report.unknown_user


@pytest.mark.parametrize("inline", [[], [Event(5, 0, 7)]])
def test_an_unknown_user_who_brings_a_history_is_not_reported(inline: list[Event]) -> None:
    assembled = assemble(None, inline=inline)
    assert head(assembled)[5] == 0
    assert not assembled.report.unknown_user


def test_unknown_and_missing_candidates_are_counted_with_their_repeats() -> None:
    ids, found = (3, 3, 4, 4, 2**32 + 3, 5), (True, True, True, False, False, False)
    assembled = assemble([], candidates=ids, found=found)
    assert assembled.record[-6:].tolist() == [1, 1, 0, 0, 0, 2]
    assert assembled.report == FeatureReport(
        unknown_user=False, truncated_history=False, unknown_items=3, missing_items=3
    )


def test_context_comes_from_the_request_and_is_zero_unless_sent() -> None:
    assert head(assemble([], context={"hour": 23}))[6] == 23
    assert head(assemble([]))[6] == 0
