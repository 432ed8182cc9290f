"""One batch, twice: packed as the engine reads it, and regular as baselines do; the same requests and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from bench.artifacts import untrained
from bench.threads import lowering_processes
from flame_jax.config import Config
from flame_jax.fke.golden import whole
from flame_jax.models.serving import rank_function, served_slot, served_specs, served_weights
from flame_jax.packing import Bucket, Extent
from flame_jax.pallas_kernels.kernels import REFERENCE, Kernels
from flame_jax.record import BlockEvents, RecordLayout

NOW = 1_700_000_000
YEAR = 365 * 86400


class Run(NamedTuple):
    """One way to compute a batch.

    Attributes:
        launch: starts one forward pass and returns its output, still on its way; the first call compiles what
            `compile` did not.
        wait: until an output is there.
        scores: float32[requests, candidates, tasks] of an output, on the host (of the layers alone: their output).
        compile: may be called beside other runs' before the first launch; does nothing where launching compiles.
    """

    launch: Callable[[], Any]
    wait: Callable[[Any], Any]
    scores: Callable[[Any], np.ndarray]
    compile: Callable[[], object]


@dataclass(frozen=True)
class Regular:
    """B requests of h history rows in each block and c candidates.

    Attributes:
        items: int32[blocks, B, h + c], rows of the item table.
        actions: int32[blocks, B, h + c].
        times: int32[blocks, B, h], ascending.
        request_time: int32[B].
        scenario: int32[B].
    """

    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray
    request_time: np.ndarray
    scenario: np.ndarray

    @property
    def history(self) -> int:
        """Rows of history in each block (h)."""
        return int(self.times.shape[2])

    @property
    def candidates(self) -> int:
        """Of each request (c)."""
        return int(self.items.shape[2]) - self.history


@dataclass(frozen=True)
class Inputs:
    """A batch and the model that scores it.

    Attributes:
        weights: trained weights by name, float32.
        regular: the batch for baselines.
        bucket: the smallest that holds the batch.
        words: int32[words], the packed slot of the same batch.
        places: rows of float32[C_max, tasks] that belong to each request.
    """

    config: Config
    weights: Mapping[str, np.ndarray]
    regular: Regular
    bucket: Bucket
    words: np.ndarray
    places: list[slice]


def make_inputs(
    config: Config,
    requests: int,
    history: int,
    candidates: int,
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
) -> Inputs:
    """Random requests, all of one size.

    Args:
        history: events of every block.
        weights: of the model; random ones if left out.

    Raises:
        ValueError: baselines don't have this model, or the requests don't fit its blocks or a slot.
    """
    check(config, history)
    weights = untrained(config).weights if weights is None else weights
    regular = random_batch(config, requests, history, candidates, len(weights["item"]), seed)
    return Inputs(config, weights, regular, *pack(config, regular))


def check(config: Config, history: int) -> None:
    """Raise ValueError for what only the engine has, and for a history that its blocks would cut."""
    model, schema = config.model, config.schema
    if schema.features or schema.interleave or model.item_table == "host":
        raise ValueError("baselines read plain tokens: no side features, no interleaving, no item table in host memory")
    whole_climber = model.architecture == "climber" and model.climber.adaptive and model.climber.fusion
    if not whole_climber and (model.architecture, model.hstu.variant) != ("hstu", "dlrm_v3"):
        raise ValueError("there are baselines of Climber without ablations and of HSTU's dlrm_v3 only")
    if not 0 < history <= schema.block_length:
        raise ValueError(f"a block holds 1 to {schema.block_length} events (schema.block_length), not {history}")


def random_batch(config: Config, requests: int, history: int, candidates: int, items: int, seed: int) -> Regular:
    """Requests over an item table of `items` rows."""
    random, schema = np.random.default_rng(seed), config.schema
    shape = (len(schema.blocks), requests)
    rows = random.integers(0, items, (*shape, history + candidates), dtype=np.int32)
    rows[:, :, history:] = rows[:1, :, history:]  # every block ranks the same candidates
    actions = np.full((*shape, history + candidates), schema.actions, np.int32)
    actions[:, :, :history] = random.integers(0, schema.actions, (*shape, history))
    times = np.sort(NOW - random.integers(0, YEAR, (*shape, history)), axis=-1).astype(np.int32)
    request_time = (NOW + random.integers(0, 86400, requests)).astype(np.int32)
    scenario = random.integers(0, len(schema.scenarios), requests).astype(np.int32)
    return Regular(rows, actions, times, request_time, scenario)


def pack(config: Config, batch: Regular) -> tuple[Bucket, np.ndarray, list[slice]]:
    """The bucket, slot and places of `Inputs`."""
    count, layout = batch.items.shape[1], config.layout
    extent = layout.aligned_extent(Extent(batch.history, batch.candidates))
    bucket = Bucket(count * (extent.history + extent.candidates), count * extent.candidates)
    slot = served_slot(config.model, config.schema, layout, bucket)
    words = np.zeros(slot.words, np.int32)
    records = RecordLayout(config.schema)
    pieces = [whole(encode(records, batch, row), records) for row in range(count)]
    return bucket, words, records.fill(slot.views(words), pieces, bucket, layout)


def encode(records: RecordLayout, batch: Regular, request: int) -> np.ndarray:
    """The record of one request."""
    h = batch.history
    columns = (batch.items[:, request, :h], batch.actions[:, request, :h], batch.times[:, request])
    return records.encode(
        scenario=int(batch.scenario[request]),
        request_time=int(batch.request_time[request]),
        request_words=np.zeros(0, np.int32),
        blocks=[BlockEvents(*block) for block in zip(*columns, strict=True)],
        candidates=batch.items[0, request, h:],
        item_columns=[],
    )


def packed_run(inputs: Inputs, kernels: Kernels = REFERENCE) -> Run:
    """The engine's own program over the packed slot, its weights and slot on the device."""
    config, vocabulary = inputs.config, len(inputs.weights["item"])
    slot = served_slot(config.model, config.schema, config.layout, inputs.bucket)
    function = rank_function(config.model, config.schema, config.layout, slot, vocabulary, kernels)
    weights = jax.device_put(list(served_weights(config.model, inputs.weights).values()))
    words = jax.device_put(inputs.words)

    @cache
    def program() -> Any:
        if kernels == REFERENCE:
            return jax.jit(function).lower(weights, words).compile()
        with lowering_processes(1) as process:
            portable = process.submit(exported, config, vocabulary, inputs.bucket, kernels).result()
        return jax.jit(jax.export.deserialize(bytearray(portable)).call).lower(weights, words).compile()

    def scores(output: jax.Array) -> np.ndarray:
        flat = np.asarray(output)
        return np.stack([flat[rows] for rows in inputs.places])

    return Run(lambda: program()(weights, words), jax.block_until_ready, scores, program)


def exported(config: Config, vocabulary: int, bucket: Bucket, kernels: Kernels) -> bytes:
    """The engine's program for a GPU in portable form: Pallas takes its time over it, in Python."""
    slot = served_slot(config.model, config.schema, config.layout, bucket)
    function = rank_function(config.model, config.schema, config.layout, slot, vocabulary, kernels)
    weights = list(served_specs(config.model, config.schema, vocabulary).values())
    words = jax.ShapeDtypeStruct((slot.words,), np.int32)
    return bytes(jax.export.export(jax.jit(function), platforms=["cuda"])(weights, words).serialize())
