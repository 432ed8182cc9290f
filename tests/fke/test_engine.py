"""Engines: the scores of the model, from an artifact that fits."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickletools
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from flame_jax.fke import engine as module
from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.build import build
from flame_jax.fke.compile import CompileCounter, compiled_anew, deserialize, serialize
from flame_jax.fke.device import target_of
from flame_jax.fke.engine import Engine
from flame_jax.fke.manifest import executable_name, portable_name
from flame_jax.models.serving import rank_function
from flame_jax.packing import Bucket, Extent, place, slot_layout
from flame_jax.record import RecordLayout
from tests import tiny


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


def test_an_engine_made_anew_scores_the_same_with_the_same_weights(pristine: Path) -> None:
    engine = Engine(Artifact(pristine), tiny.device())
    engine.warm()
    again = engine.reloaded()
    assert all(one is other for one, other in zip(engine.weights, again.weights, strict=True))
    assert again.golden_difference == engine.golden_difference
    words = tiny.packed_slot(tiny.BUCKETS[0], [Extent(8, 5)], seed=6)[0]
    assert again.run(tiny.BUCKETS[0], words).tobytes() == engine.run(tiny.BUCKETS[0], words).tobytes()
    assert again._executables[tiny.BUCKETS[0]] is not engine._executables[tiny.BUCKETS[0]]


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


@pytest.mark.parametrize("name", ["platform", "compute_capability", "jaxlib", "plugin"])
def test_an_artifact_for_something_else_is_refused_by_both_sides_and_the_way_out(name: str, folder: Path) -> None:
    here = getattr(target_of(tiny.device()), name)
    change(folder, "target", name, value="other")
    line = refusal(folder)
    assert f"built for {name.replace('_', ' ')} 'other', this process has {here!r}" in line
    assert f"build --from {folder} --platform cpu" in line


def test_an_artifact_of_a_sibling_device_loads_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, "target", "device_kind", value="NVIDIA H300")
    Engine(Artifact(folder), tiny.device())
    assert "tuned for NVIDIA H300" in caplog.text


def test_executables_for_another_cpu_are_compiled_anew_and_score_the_same(
    folder: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    change(folder, "target", "cpu_features", value=[*target_of(tiny.device()).cpu_features, "avx999", "amx9"])
    other = Engine(Artifact(folder), tiny.device())
    other.warm()
    assert set(other.recompiled) == set(tiny.BUCKETS)
    assert engine.recompiled == []
    assert "lacks amx9, avx999" in caplog.text
    words, _ = tiny.packed_slot(tiny.BUCKETS[1], [Extent(12, 9)])
    np.testing.assert_allclose(other.run(tiny.BUCKETS[1], words), engine.run(tiny.BUCKETS[1], words), rtol=1e-6)


def test_an_executable_that_the_cpus_loader_refuses_is_compiled_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[bytes] = []

    def refusing(payload: bytes, weights: int, device: jax.Device) -> jax.stages.Compiled:
        if not refused:
            refused.append(payload)
            raise jax.errors.JaxRuntimeError("Target machine feature +avx999 is not supported on the host machine")
        return deserialize(payload, weights, device)

    monkeypatch.setattr(module, "deserialize", refusing)
    other = Engine(Artifact(folder), tiny.device())
    assert len(other.recompiled) == 1
    other.warm()


def test_a_program_of_junk_is_refused_when_it_is_needed(folder: Path) -> None:
    change(folder, "target", "cpu_features", value=["avx999"])
    tiny.forge(folder, portable_name(tiny.BUCKETS[0]), b"junk" * 50)
    assert "program of bucket t32_c16" in refusal(folder)


def golden_of(folder: Path) -> dict[str, np.ndarray]:
    return dict(Artifact(folder).tensors("golden.safetensors"))


def test_golden_scores_are_those_of_the_plain_model(pristine: Path) -> None:
    golden = golden_of(pristine)
    layout = RecordLayout(tiny.SCHEMA)
    bucket = tiny.BUCKETS[1]
    for number in range(len(golden) // 2):
        record, scores = golden[f"record.{number}"], golden[f"scores.{number}"]
        slot = slot_layout(tiny.SCHEMA, tiny.LAYOUT, bucket)
        words = np.zeros(slot.words, np.int32)
        (where,) = place([layout.extent(record)], bucket, tiny.LAYOUT)
        layout.write(slot.views(words), 0, where, record, 0, len(scores))
        with jax.default_matmul_precision("highest"):
            right = np.asarray(plain(bucket)(list(tiny.random_weights(3).values()), words))
        first = where.candidate_start - (bucket.tokens - bucket.candidates)
        np.testing.assert_allclose(scores, right[first : first + len(scores)], rtol=1e-5)
        assert np.ptp(scores) > 1e-3


@pytest.mark.parametrize("number", [0, -1])
def test_golden_scores_that_are_not_met_are_refused(number: int, folder: Path, pristine: Path) -> None:
    golden = golden_of(folder)
    name = f"scores.{number % (len(golden) // 2)}"
    golden[name] = golden[name].copy()
    p = golden[name][0, 1]
    golden[name][0, 1] = 1 / (1 + (1 - p) / p * np.exp(-0.2))  # its logit is 0.2 more
    tiny.forge(folder, "golden.safetensors", safetensors.numpy.save(golden))
    line = refusal(folder)
    every = np.concatenate([v.ravel() for k, v in golden_of(pristine).items() if k.startswith("scores")])
    off = 0.2 / np.std(np.log(every / (1 - every)))
    said = re.search(r"scores are (\S+) of their spread off, beyond the tolerance of 0.005", line)
    assert said is not None
    assert float(said[1]) == pytest.approx(off, rel=0.1)


def test_other_weights_of_the_right_shape_are_refused_by_the_golden_set(folder: Path) -> None:
    forge_weights(folder, tiny.random_weights(4))
    assert "golden" in refusal(folder)


def test_weights_that_are_not_numbers_are_refused_by_the_golden_set(folder: Path) -> None:
    weights = {name: value.copy() for name, value in tiny.random_weights(3).items()}
    weights["item"][:] = np.nan
    forge_weights(folder, weights)
    assert "scores are inf of their spread off" in refusal(folder)


def with_bias(weights: dict[str, np.ndarray], logit: float) -> dict[str, np.ndarray]:
    return weights | {"head/logit_b": np.full_like(weights["head/logit_b"], logit)}


@pytest.fixture(scope="module", params=["highest", "default"])
def rare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a model whose every probability is about a thousandth."""
    folder = tmp_path_factory.mktemp("rare")
    settings = dataclasses.replace(tiny.config(folder), layout=tiny.LAYOUT)
    export = dataclasses.replace(settings.export, buckets=tiny.BUCKETS[:1], matmul_precision=request.param)
    checkpoint = dataclasses.replace(tiny.checkpoint(), weights=with_bias(dict(tiny.random_weights(3)), -7.0))
    build(dataclasses.replace(settings, export=export), checkpoint, tiny.builder())
    path = Path(settings.export.artifact)
    assert Artifact(path).tensors("golden.safetensors")["scores.0"].max() < 0.01
    return path


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w | {name: np.zeros_like(value) for name, value in w.items() if name.startswith("layers/")},
        lambda w: w | {"item": w["item"][np.random.default_rng(0).permutation(len(w["item"]))]},
        lambda w: with_bias({n: v[::-1].copy() for n, v in w.items()}, -7.0),
        lambda w: with_bias(w, -30.0),
        lambda w: with_bias(w, -7.5),
        lambda w: w | {"action": np.zeros_like(w["action"])},
    ],
    ids=["no layers", "items shuffled", "every tensor reversed", "all zero", "less", "no actions"],
)
def test_a_wrong_model_of_rare_clicks_is_refused(spoil: Any, rare: Path, tmp_path: Path) -> None:
    """Probabilities of a thousandth lie within any tolerance of each other; their logits do not."""
    folder = Path(shutil.copytree(rare, tmp_path / "model"))
    forge_weights(folder, spoil(with_bias(dict(tiny.random_weights(3)), -7.0)))
    assert "of their spread off" in refusal(folder)


def test_an_executable_that_xla_refuses_is_compiled_anew(folder: Path, engine: Engine) -> None:
    payload = tiny.executables()[tiny.BUCKETS[0]]
    native = max((arg for _, arg, _ in pickletools.genops(payload) if isinstance(arg, bytes)), key=len)
    junk = payload.replace(native, b"\xff" * len(native))
    tiny.forge(folder, executable_name(tiny.BUCKETS[0]), junk)
    other = Engine(Artifact(folder), tiny.device())
    assert other.recompiled == [tiny.BUCKETS[0]]
    other.warm()


def test_weights_that_score_nothing_are_never_exported(tmp_path: Path) -> None:
    settings = dataclasses.replace(tiny.config(tmp_path), layout=tiny.LAYOUT)
    weights = with_bias(dict(tiny.random_weights(3)), np.nan)
    with pytest.raises(ValueError, match="no probabilities"):
        build(settings, dataclasses.replace(tiny.checkpoint(), weights=weights), tiny.builder())
    assert not Path(settings.export.artifact).exists()


@pytest.mark.parametrize(
    "give",
    [
        lambda scores: scores[:, :1],
        lambda scores: scores[:-1],
        lambda scores: scores.astype(jnp.bfloat16),
        lambda scores: scores.sum(),
        lambda scores: scores > 0.5,
    ],
)
def test_an_executable_that_gives_something_else_is_refused(give: Any, folder: Path) -> None:
    manifest, bucket = Artifact(folder).manifest, tiny.BUCKETS[0]
    slot = slot_layout(tiny.SCHEMA, tiny.LAYOUT, bucket)
    rank = rank_function(tiny.MODEL, tiny.SCHEMA, tiny.LAYOUT, slot, tiny.ITEMS + 1)
    words = np.zeros(slot.words, np.int32)
    lowered = jax.jit(lambda w, x: give(rank(w, x))).lower(list(tiny.random_weights(3).values()), words)
    with compiled_anew():
        compiled = lowered.compile()
    tiny.forge(folder, executable_name(bucket), serialize(compiled))
    assert manifest.buckets[0] == bucket
    assert f"executable of bucket {bucket} gives" in refusal(folder)


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_program_is_refused_in_one_line(seed: int, folder: Path) -> None:
    change(folder, "target", "cpu_features", value=["avx999"])
    name = portable_name(tiny.BUCKETS[0])
    data = bytearray((folder / name).read_bytes())
    random = np.random.default_rng(seed)
    data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    tiny.forge(folder, name, bytes(data))
    with contextlib.suppress(ArtifactError):  # a flip in a name does no harm
        Engine(Artifact(folder), tiny.device()).warm()


@pytest.mark.parametrize(
    "change_one",
    [
        lambda golden: {},
        lambda golden: {"record.0": golden["record.0"]},
        lambda golden: golden | {"record.0": golden["record.0"][:-1]},
        lambda golden: golden | {"record.0": np.array([], np.int32)},
        lambda golden: golden | {"record.0": -golden["record.0"]},
        lambda golden: golden | {"record.0": golden["record.0"].astype(np.float32)},
        lambda golden: golden | {"scores.0": golden["scores.0"][:, :1]},
        lambda golden: golden | {"more": golden["scores.0"]},
    ],
)
def test_a_golden_set_of_junk_is_refused(change_one: Any, folder: Path) -> None:
    tiny.forge(folder, "golden.safetensors", safetensors.numpy.save(change_one(golden_of(folder))))
    assert "golden" in refusal(folder)


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
        (("layout", "max_requests"), 50),
        (("executables",), []),
    ],
    ids=str,
)
def test_a_manifest_that_does_not_describe_what_is_there_is_refused(
    keys: tuple[str, ...], value: Any, folder: Path
) -> None:
    change(folder, *keys, value=value)
    refusal(folder)
