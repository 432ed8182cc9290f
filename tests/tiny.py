"""A tiny schema, model, store, checkpoint and artifact, so that tests compile in a second or two."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from flame_jax import train
from flame_jax.config import Config, ExportConfig, HeadConfig, ModelConfig, TrainConfig
from flame_jax.feature_config import StoreConfig
from flame_jax.fke.artifact import Artifact
from flame_jax.fke.build import Builder, build
from flame_jax.fke.compile import compiled_anew, lower_program
from flame_jax.fke.device import platform_of
from flame_jax.fke.manifest import Manifest, executable_name, portable_name
from flame_jax.fke.writer import write_artifact
from flame_jax.models.checkpoint import Checkpoint, CheckpointFolder
from flame_jax.models.climber import Climber
from flame_jax.models.serving import flat_weights
from flame_jax.packing import Bucket, Extent, Layout, SlotLayout, place, slot_layout
from flame_jax.pda.lmdb_store import LmdbWriter
from flame_jax.pda.records import UserRecord, feature_row, item_dtype
from flame_jax.pda.store import Fetched
from flame_jax.record import BlockEvents, RecordLayout
from flame_jax.request import History, RankRequest
from flame_jax.schema import Block, Feature, FeatureSchema
from flame_jax.training import loop
from flame_jax.vocabulary import Vocabularies, Vocabulary
from tests.compiling import compiling

USERS, ITEMS, ACTIONS = 30, 40, 5

SCHEMA = FeatureSchema(
    tasks=("like", "love"),
    scenarios=("home", "search"),
    actions=ACTIONS,
    blocks=(Block("all"), Block("liked", (3, 4))),
    block_length=16,
    item_features=(Feature("genres", "bits", 5), Feature("decade", "numeric")),
    user_features=(Feature("age", "categorical", 3), Feature("height", "numeric")),
    context_features=(Feature("hour", "categorical", 24),),
)
MODEL = ModelConfig(width=16, layers=1, heads=2, head_dim=8, ffn=32, head=HeadConfig(2, 8, 4))
LAYOUT = Layout(align=8, max_requests=4)
BUCKETS = (Bucket(32, 16), Bucket(64, 32))

ITEM_IDS = np.array([1000 + 7 * i if i % 3 else 2**40 + i for i in range(ITEMS)], np.int64)
"""External ids; some of them don't fit 32 bits."""

GENRES = np.where(np.arange(ITEMS) % 2, 0b00101, 0b00010) | np.where(np.arange(ITEMS) % 3, 0, 0b01000)
"""Of each item; the first two bits tell its parity."""


def config(folder: Path, **changed: object) -> Config:
    """A whole configuration whose folders lie in `folder`."""
    settings: dict[str, object] = {
        "checkpoint": str(folder / "checkpoint"),
        "label_actions": {"like": [3, 4], "love": [4]},
        "epochs": 8,
        "learning_rate": 0.02,
        "tokens": 256,
        "candidates": 64,
        "chunk": 8,
        "min_history": 3,
        "dropout": 0.0,  # each random mask adds a second to the compilation
        "unknown_rate": 0.05,
    }
    return Config(
        store=StoreConfig(path=str(folder / "store")),
        schema=SCHEMA,
        layout=Layout(align=8, max_requests=16),
        model=MODEL,
        train=TrainConfig(**(settings | changed)),  # type: ignore[arg-type]
        export=ExportConfig(artifact=str(folder / "artifact"), version="7", buckets=BUCKETS),
    )


def write_config(settings: Config, path: Path) -> str:
    """Write a configuration as a file that `--config` reads, and return its name."""
    path.write_text(json.dumps(dataclasses.asdict(settings)))
    return str(path)


def user_history(user: int) -> History:
    """20 to 29 events: items of the user's own parity are liked, the others are not; some times tie."""
    random = np.random.default_rng(user)
    count = 20 + user % 10
    items = random.choice(ITEMS, count, replace=False)
    liked = items % 2 == user % 2
    actions = np.where(liked, random.integers(3, 5, count), random.integers(0, 3, count)).astype(np.int32)
    times = np.sort(1_000_000_000 + random.integers(0, 15, count) * 3600)
    return History(ITEM_IDS[items], actions, times.astype(np.int64))


def write_store(path: Path, *, ids: np.ndarray = ITEM_IDS) -> None:
    """A store of planted preferences, `ids` being the items' external ids."""
    rows = np.zeros(ITEMS, item_dtype(SCHEMA))
    rows["id"], rows["genres"], rows["decade"] = ids, GENRES, np.arange(ITEMS) / 100
    renamed = dict(zip(ITEM_IDS.tolist(), ids.tolist(), strict=True))
    with LmdbWriter(path, SCHEMA) as writer:
        writer.put_items(rows, {int(ids[0]): "The First"})
        writer.put_users(
            (
                f"u{user:02d}",
                dataclasses.replace(
                    history := user_history(user),
                    item_ids=np.array([renamed[i] for i in history.item_ids.tolist()], np.int64),
                ),
                feature_row(SCHEMA.user_features, {"age": user % 2, "height": 0.15 + user / 1000}),
            )
            for user in range(USERS)
        )
        writer.finish("tiny")


def model(seed: int = 0, vocabulary: int = ITEMS + 1) -> Climber:
    """A model of random weights."""
    return Climber(MODEL, SCHEMA, vocabulary, rngs=nnx.Rngs(seed))


def vocabulary() -> Vocabulary:
    """Every item of the store."""
    return Vocabulary(ITEM_IDS)


def vocabularies() -> Vocabularies:
    """The schema has no id features."""
    return Vocabularies(vocabulary(), {})


def checkpoint(step: int = 1, seed: int = 0) -> Checkpoint:
    """A checkpoint of random weights."""
    weights = {name: np.asarray(value) for name, value in random_weights(seed).items()}
    optimizer = [np.array(step, np.int32), np.arange(6, dtype=np.float32).reshape(2, 3)]
    return Checkpoint(step, MODEL, SCHEMA, vocabularies(), weights, optimizer)


def save_checkpoint(path: Path, *steps: int) -> None:
    """Save checkpoints of random weights, seeded by their steps."""
    with CheckpointFolder(path) as folder:
        for step in steps:
            folder.save(checkpoint(step, seed=step))


@cache
def random_weights(seed: int) -> dict[str, np.ndarray]:
    """Name -> array of a model whose biases and norms are random too."""
    random = np.random.default_rng(seed)
    return {
        name: (value + 0.05 * random.normal(size=value.shape)).astype(np.float32)
        for name, value in flat_weights(model(seed)).items()
    }


@cache
def compiled(bucket: Bucket) -> jax.stages.Compiled:
    """The executable of a bucket."""
    with compiled_anew():
        return lower_program(built()[1][portable_name(bucket)], device()).compile()


def executables() -> dict[Bucket, bytes]:
    """Every bucket's executable, serialised."""
    return {bucket: built()[1][executable_name(bucket)] for bucket in BUCKETS}


def record(layout: RecordLayout, random: np.random.Generator, history: int, candidates: int) -> np.ndarray:
    """A record of random content: `history` events in the first block, half of them in the second."""
    blocks = [
        BlockEvents(
            random.integers(0, ITEMS + 1, count).astype(np.int32),
            random.integers(0, ACTIONS, count).astype(np.int32),
            np.sort(random.integers(0, 10**6, count)).astype(np.int32),
        )
        for count in (history, history // 2)
    ]
    height = np.array([1.8], np.float32).view(np.int32)[0]
    return layout.encode(
        scenario=int(random.integers(2)),
        request_time=10**6 + 5,
        request_words=np.array([random.integers(3), height, random.integers(24)], np.int32),
        blocks=blocks,
        candidates=random.integers(0, ITEMS + 1, candidates).astype(np.int32),
        item_columns=[
            random.integers(0, 32, candidates).astype(np.int32),
            random.normal(size=candidates).astype(np.float32).view(np.int32),
        ],
    )


def packed_slot(bucket: Bucket, extents: list[Extent], seed: int = 0) -> tuple[np.ndarray, SlotLayout]:
    """The words of a slot that holds random requests of these extents."""
    slot, layout = slot_layout(SCHEMA, LAYOUT, bucket), RecordLayout(SCHEMA)
    random = np.random.default_rng(seed)
    words = np.zeros(slot.words, np.int32)
    for row, (extent, where) in enumerate(zip(extents, place(extents, bucket, LAYOUT), strict=True)):
        written = record(layout, random, *extent)
        layout.write(slot.views(words), row, where, written, 0, extent.candidates)
    return words, slot


def temporary_folder() -> Path:
    """A folder for what several test modules share; it goes away with the process."""
    folder = Path(tempfile.mkdtemp(prefix="flame-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclasses.dataclass(frozen=True)
class Run:
    """One whole training run through the command line.

    Attributes:
        config_file: what `--config` takes.
        losses: of every step.
        printed: on stdout.
    """

    config: Config
    config_file: str
    losses: list[float]
    printed: str


@cache
@compiling(quickly=False)  # by whichever test comes first, and other runs are compared with it to a few bits
def trained_run() -> Run:
    """Train on a store of planted preferences; its folders must not be changed."""
    folder = temporary_folder()
    settings = config(folder)
    write_store(folder / "store")
    file, printed = write_config(settings, folder / "config.yaml"), io.StringIO()
    with recorded_losses() as losses, contextlib.redirect_stdout(printed):
        train.main(["--config", file])
    return Run(settings, file, losses, printed.getvalue())


@contextlib.contextmanager
def recorded_losses() -> Iterator[list[float]]:
    """Collect the loss of every training step."""
    losses: list[float] = []
    real = loop.make_step

    def recording(*args: Any) -> Any:
        step = real(*args)

        def run(*inputs: Any) -> Any:
            out = step(*inputs)
            losses.append(float(out[2]))
            return out

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", recording)
        yield losses


def request_of(user: int) -> tuple[RankRequest, Fetched]:
    """A request of a user of `write_store` for the first ten items, and what the store answers."""
    rows = np.zeros(10, item_dtype(SCHEMA))
    rows["id"], rows["genres"], rows["decade"] = ITEM_IDS[:10], GENRES[:10], np.arange(10) / 100
    record = UserRecord(user_history(user), feature_row(SCHEMA.user_features, {"age": user % 2, "height": 0.2}))
    request = RankRequest(f"u{user:02d}", ITEM_IDS[:10], scenario=0, request_time=2 * 10**9)
    return request, Fetched(record, rows, np.ones(10, bool))


def device() -> jax.Device:
    """What tests run on."""
    return jax.devices()[0]


def platform() -> str:
    """The test device's platform, in an artifact's words."""
    return platform_of(device())


@cache
def built() -> tuple[Manifest, dict[str, bytes]]:
    """An artifact of random weights: its manifest, and the bytes of every other file."""
    settings = dataclasses.replace(config(temporary_folder()), layout=LAYOUT)
    manifest = build(settings, checkpoint(seed=3), builder())
    artifact = Artifact(settings.export.artifact)
    return manifest, {name: artifact.read(name) for name in manifest.files}


def builder() -> Builder:
    """For the test device."""
    return Builder(device(), progress=False)


def save_artifact(path: Path, *, files: dict[str, bytes] | None = None, **changed: Any) -> Manifest:
    """Write the artifact of `built`, some of its files and of its manifest's fields being others."""
    manifest, content = built()
    return write_artifact(path, dataclasses.replace(manifest, **changed), content | (files or {}))


def forge(folder: Path, name: str, data: bytes) -> None:
    """Replace one file of an artifact and put its new hash into the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / name).write_bytes(data)
