"""A store, an artifact of an untrained Climber, and real server processes over them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from flame_jax.config import Config, ExportConfig, HeadConfig, ModelConfig
from flame_jax.feature_config import StoreConfig
from flame_jax.fke.build import Builder
from flame_jax.fke.build import build as build_artifact
from flame_jax.models.checkpoint import Checkpoint
from flame_jax.models.climber import Climber
from flame_jax.models.serving import flat_weights
from flame_jax.packing import Layout
from flame_jax.pda.lmdb_store import LmdbWriter
from flame_jax.pda.records import feature_row, item_dtype
from flame_jax.request import History
from flame_jax.schema import Block, Feature, FeatureSchema
from flame_jax.vocabulary import Vocabularies, Vocabulary
from tests.packed import EPOCH

SCHEMA = FeatureSchema(
    tasks=("like", "share"),
    scenarios=("home", "search"),
    actions=4,
    blocks=(Block("all"), Block("liked", (2, 3))),
    block_length=40,
    item_features=(
        Feature("genre", "categorical", 5),
        Feature("year", "numeric"),
        Feature("maker", "id", 6),
        Feature("weight", "numeric", 0, "table"),
        Feature("price", "numeric", 0, "request"),
        Feature("shelf", "id", 8, "request"),
    ),
    user_features=(Feature("age", "categorical", 7), Feature("city", "id", 4)),
    context_features=(Feature("hour", "categorical", 24), Feature("speed", "numeric"), Feature("campaign", "id", 5)),
)
MODEL = ModelConfig(name="tiny", width=16, layers=2, heads=2, head_dim=8, ffn=32, head=HeadConfig(2, 12, 8))
LAYOUT = Layout(align=8, max_requests=6)
LADDER = ((64, 24), (160, 96), (256, 192))

ITEMS = np.array([*range(1, 200), 2**31 + 7, 2**40 + 1], np.int64)
"""What the store holds; the vocabulary lacks the multiples of ten."""
USERS = 30
KEYS = {
    "item.maker": np.array([4, 2**40, 77], np.int64),
    "item.shelf": np.array([9, 2**33], np.int64),
    "user.city": np.array([500, 501, 502, 503], np.int64),
    "context.campaign": np.array([1, 2**50], np.int64),
}
"""What the vocabularies of id features hold."""


@dataclass(frozen=True)
class Files:
    """What a server is started from."""

    store: Path
    artifact: Path
    weights: dict[str, np.ndarray]
    vocabularies: Vocabularies
    histories: dict[str, History]
    items: np.ndarray
    user_features: dict[str, np.ndarray]

    def flags(self) -> list[str]:
        return ["--store.path", str(self.store), "--export.artifact", str(self.artifact)]


def write_store(
    path: Path, random: np.random.Generator
) -> tuple[dict[str, History], np.ndarray, dict[str, np.ndarray]]:
    histories, features = {}, {}
    for number in range(USERS):
        length = 0 if number == 0 else int(random.integers(1, 90))
        times = EPOCH + np.sort(random.integers(0, 10**6, length))
        actions = random.integers(0, SCHEMA.actions, length).astype(np.int32)
        histories[f"u{number}"] = History(random.choice(ITEMS, length), actions, times)
        features[f"u{number}"] = feature_row(
            SCHEMA.user_features, {"age": int(random.integers(7)), "city": 498 + int(random.integers(7))}
        )
    rows = np.zeros(len(ITEMS), item_dtype(SCHEMA))
    rows["id"] = ITEMS
    rows["genre"] = random.integers(0, 5, len(ITEMS))
    rows["year"], rows["weight"] = random.normal(size=(2, len(ITEMS)))
    rows["maker"] = random.choice([-1, 3, *KEYS["item.maker"]], len(ITEMS))
    with LmdbWriter(path, SCHEMA) as writer:
        writer.put_items(rows, {int(i): f"Title {i}" for i in ITEMS[:50]})
        writer.put_users((key, history, features[key]) for key, history in histories.items())
        writer.finish("synthetic")
    return histories, rows, features


def build(folder: Path, ladder: tuple[tuple[int, int], ...] = LADDER) -> Files:
    """Write a store and export an untrained model with every weight away from its initial value."""
    random = np.random.default_rng(0)
    histories, rows, features = write_store(folder / "store", random)
    vocabulary = Vocabulary(ITEMS[ITEMS % 10 != 0])
    initial = flat_weights(Climber(MODEL, SCHEMA, vocabulary.rows, rngs=nnx.Rngs(0)))
    weights = {name: w + 0.2 * random.normal(size=w.shape).astype(np.float32) for name, w in initial.items()}
    stored = {int(row["id"]): row["weight"] for row in rows}
    weights["columns/item.weight"] = np.array([0.0, *(stored[key] for key in vocabulary.keys.tolist())], np.float32)
    vocabularies = Vocabularies(vocabulary, {name: Vocabulary(keys) for name, keys in KEYS.items()})
    config = Config(
        store=StoreConfig(str(folder / "store")),
        schema=SCHEMA,
        layout=LAYOUT,
        model=MODEL,
        export=ExportConfig(artifact=str(folder / "artifact"), version="7", buckets=ladder),
    )
    checkpoint = Checkpoint(1, MODEL, SCHEMA, vocabularies, weights, [])
    build_artifact(config, checkpoint, Builder(jax.devices()[0], progress=False))
    return Files(folder / "store", folder / "artifact", weights, vocabularies, histories, rows, features)


def with_ladder(files: Files, folder: Path, ladder: tuple[tuple[int, int], ...]) -> Files:
    """The same model (of these weights) and store, exported for other buckets."""
    config = Config(
        schema=SCHEMA,
        layout=LAYOUT,
        model=MODEL,
        export=ExportConfig(artifact=str(folder / "artifact"), version="7", buckets=ladder),
    )
    checkpoint = Checkpoint(1, MODEL, SCHEMA, files.vocabularies, files.weights, [])
    build_artifact(config, checkpoint, Builder(jax.devices()[0], progress=False))
    return replace(files, artifact=folder / "artifact")


def publish(artifact: Path, folder: Path) -> None:
    """Copy an artifact to where its folder's name is its version; it appears whole."""
    partial = folder.with_name(f".{folder.name}")
    shutil.copytree(artifact, partial)
    manifest = json.loads((partial / "manifest.json").read_text())
    (partial / "manifest.json").write_text(json.dumps(manifest | {"version": folder.name}))
    partial.rename(folder)


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


class Server:
    """A server process that has said READY."""

    def __init__(self, process: subprocess.Popen[str], ready: str, log: Path) -> None:
        self.process, self.ready, self.log = process, ready, log
        self.about = dict(part.split("=", 1) for part in ready.split()[1:])

    @property
    def target(self) -> str:
        return self.about["grpc"]

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric over its labels, or over those given."""
        with urllib.request.urlopen(f"http://{self.about['metrics']}/metrics") as page:
            text = page.read().decode()
        found = re.findall(rf"^{name}(?:\{{([^}}]*)\}})? (\S+)$", text, re.MULTILINE)
        assert found or labels, f"no metric {name}"
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(float(value) for shown, value in found if all(w in shown for w in wanted))

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "flame_jax.server", *flags]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}


def to_end(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A server that does not start, once it has ended."""
    around = {**environment(), **variables}
    return subprocess.run(command(*flags), capture_output=True, text=True, timeout=120, env=around)


def serving(files: Files, log: Path, *flags: str) -> contextlib.AbstractContextManager[Server]:
    """A server of these files on free ports, see `running`."""
    return running(log, *files.flags(), "--server.port", "0", "--server.metrics_port", "0", *flags)


@contextlib.contextmanager
def running(log: Path, *flags: str) -> Iterator[Server]:
    """A server whose log goes to a file. Ended by SIGTERM, which must exit 0."""
    with log.open("w") as stderr:
        process = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment())
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            assert ready.startswith("READY "), log.read_text()
            server = Server(process, ready, log)
            yield server
            assert server.stop() == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
