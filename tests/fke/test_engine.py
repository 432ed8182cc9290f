"""Engines: the scores of the model, from an artifact that fits."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from flame_jax.fke.artifact import Artifact, ArtifactError, executable_name
from flame_jax.fke.compile import CompileCounter
from flame_jax.fke.engine import Engine
from flame_jax.models.serving import rank_function
from flame_jax.packing import Bucket, Extent, slot_layout
from tests import tiny


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model"
    tiny.save_artifact(path)
    return path


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture(scope="module")
def engine(pristine: Path) -> Engine:
    return Engine(Artifact(pristine), tiny.device())


@cache
def plain(bucket: Bucket) -> Any:
    slot = slot_layout(tiny.SCHEMA, tiny.LAYOUT, bucket)
    return jax.jit(rank_function(tiny.MODEL, tiny.SCHEMA, tiny.LAYOUT, slot, tiny.ITEMS + 1))


@pytest.mark.parametrize("bucket", tiny.BUCKETS, ids=str)
@pytest.mark.parametrize("extents", [[(16, 7)], [(3, 2), (0, 1), (8, 5)]], ids=str)
def test_scores_are_those_of_the_plain_model(extents: list[tuple[int, int]], bucket: Bucket, engine: Engine) -> None:
    if sum(-(-h // 8) * 8 for h, _ in extents) + sum(-(-c // 8) * 8 for _, c in extents) > bucket.tokens:
        extents = extents[:2]
    words, _ = tiny.packed_slot(bucket, [Extent(*extent) for extent in extents], seed=5)
    with jax.default_matmul_precision("highest"):
        right = np.asarray(plain(bucket)(list(tiny.random_weights(3).values()), words))
    scores = np.asarray(engine.launch(bucket, words))
    assert scores.dtype == np.float32
    assert scores.shape == (bucket.candidates, len(tiny.SCHEMA.tasks))
    np.testing.assert_allclose(scores, right, rtol=1e-6, atol=1e-7)
    assert (scores > 0).all()
    assert (scores < 1).all()


def test_batches_in_flight_together_get_their_own_scores(engine: Engine) -> None:
    bucket = tiny.BUCKETS[0]
    slots = [tiny.packed_slot(bucket, [Extent(5, 4)], seed=seed)[0] for seed in range(6)]
    alone = [np.asarray(engine.launch(bucket, words)) for words in slots]
    together = [engine.launch(bucket, words) for words in slots]
    assert all(a.tobytes() == np.asarray(b).tobytes() for a, b in zip(alone, together, strict=True))
    assert len({a.tobytes() for a in alone}) == len(slots)


def test_nothing_compiles_once_an_engine_is_loaded(pristine: Path) -> None:
    counter = CompileCounter()
    engine = Engine(Artifact(pristine), tiny.device())
    engine.warm()
    for bucket in tiny.BUCKETS:
        engine.launch(bucket, tiny.packed_slot(bucket, [Extent(5, 4)])[0]).block_until_ready()
    assert counter.count == 0


def test_an_engine_knows_its_model_and_vocabulary(engine: Engine) -> None:
    assert engine.manifest.version == "7"
    assert engine.vocabularies.items.rows == tiny.ITEMS + 1
    assert set(engine.slots) == set(tiny.BUCKETS)


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        Engine(Artifact(folder), tiny.device()).warm()
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


def change(folder: Path, *keys: str, value: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    inner = manifest
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["platform", "device_kind", "jaxlib"])
def test_an_artifact_for_something_else_is_refused(name: str, folder: Path) -> None:
    change(folder, "target", name, value="other")
    assert f"{name} 'other'" in refusal(folder)


@pytest.mark.parametrize("name", [executable_name(bucket) for bucket in tiny.BUCKETS])
def test_a_damaged_executable_is_refused_by_name(name: str, folder: Path) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    assert name in refusal(folder)


@pytest.mark.parametrize("data", [b"", b"junk", b"I1\n.", b"\x80\x04N."], ids=repr)
def test_an_executable_of_junk_whose_hash_is_right_is_refused_by_its_bucket(data: bytes, folder: Path) -> None:
    tiny.forge(folder, executable_name(tiny.BUCKETS[1]), data)
    assert str(tiny.BUCKETS[1]) in refusal(folder)


def test_an_executable_that_runs_a_command_is_refused_without_running_it(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    evil = b"cos\nsystem\n(Vtouch " + str(marker).encode() + b"\ntR."
    tiny.forge(folder, executable_name(tiny.BUCKETS[0]), evil)
    assert "os.system" in refusal(folder)
    assert not marker.exists()


def test_the_executable_of_another_bucket_is_refused_even_if_its_hash_is_right(folder: Path) -> None:
    tiny.forge(folder, executable_name(tiny.BUCKETS[0]), tiny.executables()[tiny.BUCKETS[1]])
    refusal(folder)


def forge_weights(folder: Path, weights: dict[str, np.ndarray]) -> None:
    tiny.forge(folder, "weights.safetensors", safetensors.numpy.save(weights))


def test_weights_that_miss_one_have_one_too_many_or_one_of_another_shape_are_refused(folder: Path) -> None:
    weights = dict(tiny.random_weights(3))
    gone, *_, odd = weights
    del weights[gone]
    weights["more"] = np.ones(3, np.float32)
    weights[odd] = np.ones((5, 5, 5), np.float32)
    forge_weights(folder, weights)
    text = refusal(folder)
    assert all(name in text for name in (gone, "more", odd, "(5, 5, 5)"))


@pytest.mark.parametrize("dtype", [np.float16, np.int32])
def test_weights_of_another_type_are_refused(dtype: Any, folder: Path) -> None:
    forge_weights(folder, {name: value.astype(dtype) for name, value in tiny.random_weights(3).items()})
    refusal(folder)


def test_a_vocabulary_of_another_size_is_refused(folder: Path) -> None:
    np.save(folder / "vocabulary.npy", tiny.ITEM_IDS[:-1])
    tiny.forge(folder, "vocabulary.npy", (folder / "vocabulary.npy").read_bytes())
    assert "item" in refusal(folder)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model", "width"), 32),
        (("model", "width"), 16.5),
        (("model", "layers"), 2),
        (("model", "heads"), "2"),
        (("schema", "actions"), 6),
        (("layout", "max_requests"), 5),
        (("buckets",), [[64, 32], [128, 32]]),
    ],
    ids=str,
)
def test_a_manifest_that_does_not_describe_what_is_there_is_refused(
    keys: tuple[str, ...], value: Any, folder: Path
) -> None:
    change(folder, *keys, value=value)
    refusal(folder)
