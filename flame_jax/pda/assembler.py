"""From a validated request and its features to one compact record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from flame_jax.host_table import HostTable
from flame_jax.pda.store import Fetched
from flame_jax.record import BlockEvents, RecordLayout
from flame_jax.request import FeatureReport, History, RankRequest
from flame_jax.schema import Feature, FeatureSchema, default_rows, feature_field, record_dtype
from flame_jax.vocabulary import Vocabularies, Vocabulary
from flame_jax.workspace import BufferPool, Workspace

_Events = slice | np.ndarray
"""Numbers of events, rising: of all from one on, or int64[n]."""


class Assembled(NamedTuple):
    """A record (`flame_jax.record`) and what to report about its features."""

    record: np.ndarray
    report: FeatureReport


class Assembler:
    """Turns requests of one model into records, in one thread.

    Args:
        item_table: see `RecordLayout`.
        pool: whose memory records are made in; who is done with one gives it back.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        vocabularies: Vocabularies,
        item_table: HostTable | None = None,
        pool: BufferPool | None = None,
    ) -> None:
        vocabularies.check(schema)
        self._pool, self._space = pool, Workspace()
        self._schema, self._vocabularies = schema, vocabularies
        self.layout = RecordLayout(schema, item_table)
        self._cold_user = default_rows(schema.user_features, record_dtype(schema.user_features), ())
        every = set(range(schema.actions))
        self._selects = [
            np.isin(np.arange(schema.actions), block.actions) if set(block.actions or every) != every else None
            for block in schema.blocks
        ]
        travelling = [
            (group, f, vocabularies.features.get(feature_field(group, f))) for group, f in schema.slot_features
        ]
        self._request_features = [each for each in travelling if each[0] != "item"]
        self._item_features = [(f, known) for group, f, known in travelling if group == "item"]

    def assemble(self, request: RankRequest, fetched: Fetched) -> Assembled:
        """Build the record of one request.

        An inline history replaces the store's; the user's features still come from the store. Events later
        than the request's time are left out, and each block keeps its newest `block_length` events.
        """
        user = fetched.user
        history = request.history if request.history is not None else user.history if user else History.empty()
        past = int(np.searchsorted(history.timestamps, request.request_time, side="right"))
        chosen, truncated = self._choose(history.actions[:past])
        # Blocks share events: from the first one that any of them reads on, all are looked up at once.
        first = min((_start(events, past) for events in chosen), default=past)
        wanted = past - first + len(request.candidates)
        ids, rows = self._space.array("ids", wanted, np.int64), self._space.array("rows", wanted, np.int32)
        np.concatenate([history.item_ids[first:past], request.candidates], out=ids)
        self._vocabularies.items.look_up(ids, rows, self._space)
        candidates = rows[past - first :]
        times = self._space.array("times", past - first, np.int32)
        times[:] = history.timestamps[first:past]
        record = self.layout.encode(
            scenario=request.scenario,
            request_time=request.request_time,
            request_words=self._request_words(user.features if user else self._cold_user, request.context),
            blocks=[
                BlockEvents(rows[(own := _behind(first, events))], history.actions[events], times[own])
                for events in chosen
            ],
            candidates=candidates,
            item_columns=[self._column(feature, keys, request, fetched.items) for feature, keys in self._item_features],
            pool=self._pool,
        )
        report = FeatureReport(
            unknown_user=user is None and request.history is None and not fetched.user_lost,
            truncated_history=truncated,
            unknown_items=len(candidates) - int(np.count_nonzero(candidates)),
            missing_items=len(fetched.found) - int(np.count_nonzero(fetched.found)),
            degraded=fetched.degraded,
        )
        return Assembled(record, report)

    def _choose(self, actions: np.ndarray) -> tuple[list[_Events], bool]:
        """Multi-scale sequence extraction: per block the newest events of its strategy; whether any were left out."""
        length, truncated = self._schema.block_length, False
        chosen: list[_Events] = []
        for select in self._selects:
            if select is None:
                chosen.append(slice(max(0, len(actions) - length), len(actions)))
                truncated |= len(actions) > length
            else:
                told = select.take(actions)
                events = np.flatnonzero(told)
                chosen.append(events[-length:])
                truncated |= len(events) > length
        return chosen, truncated

    def _request_words(self, user: np.ndarray, context: Mapping[str, int | float]) -> np.ndarray:
        """int32[features of the user and the context]: rows of ids, bits of floats."""
        words = np.empty(len(self._request_features), np.int32)
        for at, (group, feature, keys) in enumerate(self._request_features):
            value = user[feature.name] if group == "user" else context.get(feature.name, feature.default)
            if feature.kind == "numeric":
                words.view(np.float32)[at] = value
            else:
                words[at] = value if keys is None else keys.lookup(np.array([value]))[0]
        return words

    def _column(
        self, feature: Feature, keys: Vocabulary | None, request: RankRequest, stored: np.ndarray
    ) -> np.ndarray:
        """int32[C] of an item feature: rows of ids, bits of floats; defaults where it was not sent."""
        values = stored[feature.name] if feature.source != "request" else request.item_features.get(feature.name)
        if values is None:
            values = np.full(len(request.candidates), feature.default, feature.stored_dtype)
        if keys is None:
            return values.view(np.int32)
        rows = self._space.array(f"rows of {feature.name}", len(values), np.int32)
        keys.look_up(values, rows, self._space)
        return rows


def _start(events: _Events, past: int) -> int:
    """The first of these events; `past` where there is none."""
    if isinstance(events, slice):
        return int(events.start)
    return int(events[0]) if len(events) else past


def _behind(first: int, events: _Events) -> _Events:
    """The same events, counted from `first`."""
    return slice(events.start - first, events.stop - first) if isinstance(events, slice) else events - first
