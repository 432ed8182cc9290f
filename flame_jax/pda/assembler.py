"""From a validated request and its features to one compact record."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flame_jax.pda.records import feature_row
from flame_jax.pda.store import Fetched
from flame_jax.record import BlockEvents, RecordLayout
from flame_jax.request import FeatureReport, History, RankRequest
from flame_jax.schema import Feature, FeatureSchema, default_rows, feature_field, record_dtype
from flame_jax.vocabulary import UNKNOWN_ROW, Vocabularies


class Assembled(NamedTuple):
    """A record (`flame_jax.record`) and what to report about its features."""

    record: np.ndarray
    report: FeatureReport


class Assembler:
    """Turns requests of one model into records.

    Args:
        item_table: see `RecordLayout`.
    """

    def __init__(self, schema: FeatureSchema, vocabularies: Vocabularies, item_table: np.ndarray | None = None) -> None:
        vocabularies.check(schema)
        self._schema, self._vocabularies = schema, vocabularies
        self.layout = RecordLayout(schema, item_table)
        self._cold_user = default_rows(schema.user_features, record_dtype(schema.user_features), ())
        self._selects = [np.isin(np.arange(schema.actions), b.actions or range(schema.actions)) for b in schema.blocks]

    def assemble(self, request: RankRequest, fetched: Fetched) -> Assembled:
        """Build the record of one request.

        An inline history replaces the store's; the user's features still come from the store. Events later
        than the request's time are left out, and each block keeps its newest `block_length` events.
        """
        user = fetched.user
        history = request.history if request.history is not None else user.history if user else History.empty()
        blocks, truncated = self._extract(history, request.request_time)
        values = {
            "user": user.features if user else self._cold_user,
            "context": feature_row(self._schema.context_features, request.context),
        }
        words, item_columns = [], []
        for group, feature in self._schema.slot_features:
            if group != "item":
                words.append(self._words(group, feature, values[group][feature.name]))
            elif feature.source == "request":
                item_columns.append(self._words(group, feature, self._sent(request, feature)))
            else:
                item_columns.append(self._words(group, feature, fetched.items[feature.name]))
        candidates = self._vocabularies.items.lookup(request.candidates)
        record = self.layout.encode(
            scenario=request.scenario,
            request_time=request.request_time,
            request_words=np.array(words, np.int32),
            blocks=blocks,
            candidates=candidates,
            item_columns=item_columns,
        )
        report = FeatureReport(
            unknown_user=user is None and request.history is None and not fetched.user_lost,
            truncated_history=truncated,
            unknown_items=int(np.count_nonzero(candidates == UNKNOWN_ROW)),
            missing_items=int(np.count_nonzero(~fetched.found)),
            degraded=fetched.degraded,
        )
        return Assembled(record, report)

    def _words(self, group: str, feature: Feature, values: np.ndarray) -> np.ndarray:
        """Stored values as the int32 words that travel: rows of ids, bits of floats."""
        if feature.kind == "id":
            return self._vocabularies.features[feature_field(group, feature)].lookup(values)
        return values.view(np.int32)

    def _sent(self, request: RankRequest, feature: Feature) -> np.ndarray:
        """[C] of a feature that comes with the candidates, defaults when it was left out."""
        sent = request.item_features.get(feature.name)
        return np.full(len(request.candidates), feature.default, feature.stored_dtype) if sent is None else sent

    def _extract(self, history: History, request_time: int) -> tuple[list[BlockEvents], bool]:
        """Multi-scale sequence extraction: per block the newest events of its strategy."""
        past = int(np.searchsorted(history.timestamps, request_time, side="right"))
        actions = history.actions[:past]
        length, truncated, blocks = self._schema.block_length, False, []
        for select in self._selects:
            chosen = np.flatnonzero(select[actions])
            truncated |= len(chosen) > length
            chosen = chosen[-length:]
            blocks.append(
                BlockEvents(
                    self._vocabularies.items.lookup(history.item_ids[chosen]),
                    actions[chosen],
                    history.timestamps[chosen].astype(np.int32),
                )
            )
        return blocks, truncated
