"""Checkpoints as one safetensors file: bit-equal both ways, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.models import interchange
from flame_jax.models.checkpoint import Checkpoint, CheckpointError, CheckpointFolder, load_checkpoint
from flame_jax.models.interchange import is_checkpoint_file, load_safetensors, save_safetensors
from flame_jax.schema import Feature
from flame_jax.vocabulary import Vocabularies, Vocabulary
from tests import tiny

TRAINING = {"learning_rate": 0.1, "label_actions": {"like": [3, 4]}, "validation": False}


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    assert (found.step, found.model, found.schema) == (expected.step, expected.model, expected.schema)
    assert found.training == expected.training
    assert_same_bits(found.vocabularies.items.keys, expected.vocabularies.items.keys)
    assert found.vocabularies.features.keys() == expected.vocabularies.features.keys()
    for name, vocabulary in expected.vocabularies.features.items():
        assert_same_bits(found.vocabularies.features[name].keys, vocabulary.keys)
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert_same_bits(found.weights[name], value)
    for one, other in zip(found.optimizer, expected.optimizer, strict=True):
        assert_same_bits(one, other)


def checkpoint() -> Checkpoint:
    """The file knows nothing of models, so a few weights do."""
    random = np.random.default_rng(5)
    weights = {
        "item": random.normal(size=(tiny.ITEMS + 1, 16)).astype(np.float32),
        "layers/qkv_w": random.normal(size=(1, 2, 16, 48)).astype(np.float32),
    }
    optimizer = [np.array(5, np.int32), np.arange(6, dtype=np.float32).reshape(2, 3)]
    return Checkpoint(5, tiny.MODEL, tiny.SCHEMA, tiny.vocabularies(), weights, optimizer, TRAINING)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Random bits of a random type and shape, so that NaN payloads, -0.0 and subnormals occur; at times strided."""
    dtype = np.dtype(draw(st.sampled_from(["f4", "f2", "f8", "i4", "i8", "u1"])))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    data = draw(st.binary(min_size=(count := int(np.prod(shape)) * dtype.itemsize), max_size=count))
    array = np.frombuffer(data, dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


@settings(max_examples=60)
@given(
    weights=st.dictionaries(st.sampled_from(["item", "layers/w", "features/item.é", "z"]), arrays(), max_size=4),
    optimizer=st.lists(arrays(), max_size=12),
    ids=st.sets(st.integers(0, 2**63 - 1), max_size=5),
    step=st.integers(0, 2**40),
)
def test_any_checkpoint_comes_back_to_the_bit(
    weights: dict[str, np.ndarray], optimizer: list[np.ndarray], ids: set[int], step: int
) -> None:
    vocabulary = Vocabulary(np.array(sorted(ids), np.int64))
    schema = dataclasses.replace(tiny.SCHEMA, item_features=(Feature("maker", "id", 5),))
    vocabularies = Vocabularies(vocabulary, {"item.maker": Vocabulary(np.array(sorted(ids)[1:], np.int64))})
    saved = Checkpoint(step, tiny.MODEL, schema, vocabularies, weights, optimizer, TRAINING)
    with TemporaryDirectory() as folder:
        save_safetensors(saved, f"{folder}/a.safetensors")
        assert os.listdir(folder) == ["a.safetensors"]
        assert_same(load_safetensors(f"{folder}/a.safetensors"), saved)


def test_nan_payloads_and_negative_zeros_survive(tmp_path: Path) -> None:
    bits = np.array([0x7FC00123, 0xFFC00001, 0x80000000, 0x7F800000], np.uint32)
    odd = dataclasses.replace(checkpoint(), weights={"w": bits.view(np.float32)})
    save_safetensors(odd, tmp_path / "a.safetensors")
    assert load_safetensors(tmp_path / "a.safetensors").weights["w"].view(np.uint32).tolist() == bits.tolist()


def test_more_optimiser_leaves_than_ten_keep_their_order(tmp_path: Path) -> None:
    many = dataclasses.replace(checkpoint(), optimizer=[np.array(i, np.int32) for i in range(120)])
    save_safetensors(many, tmp_path / "a.safetensors")
    assert [int(leaf) for leaf in load_safetensors(tmp_path / "a.safetensors").optimizer] == list(range(120))


def test_folder_to_file_to_folder_is_the_same_to_the_bit(tmp_path: Path) -> None:
    with CheckpointFolder(tmp_path / "one") as folder:
        folder.save(checkpoint())
    save_safetensors(load_checkpoint(tmp_path / "one"), tmp_path / "a.safetensors")
    with CheckpointFolder(tmp_path / "two") as folder:
        folder.save(load_safetensors(tmp_path / "a.safetensors"))
    assert_same(load_checkpoint(tmp_path / "two"), checkpoint())


def test_anybody_can_read_it(tmp_path: Path) -> None:
    """The format by hand: header length, JSON header, bytes."""
    save_safetensors(checkpoint(), tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["flame_jax"])
    assert (about["format"], about["step"], about["model"]["width"]) == (1, 5, tiny.MODEL.width)
    begin, end = header["layers/qkv_w"]["data_offsets"]
    expected = checkpoint().weights["layers/qkv_w"]
    assert header["layers/qkv_w"]["shape"] == list(expected.shape)
    assert data[8 + length + begin : 8 + length + end] == expected.tobytes()
    assert header["vocabulary"]["dtype"] == "I64"
    assert header["optimizer/00000"]["shape"] == []


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_text("older")

    def fail(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(interchange, "_sync", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        save_safetensors(checkpoint(), tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_text() == "older"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="can't be written"):
        save_safetensors(checkpoint(), tmp_path / "file" / "a.safetensors")


@pytest.mark.parametrize("name", ["vocabulary", "optimizer/00003"])
def test_weights_under_the_files_own_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=name):
        save_safetensors(
            dataclasses.replace(checkpoint(), weights={name: np.ones(2, np.float32)}), tmp_path / "a.safetensors"
        )


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_safetensors(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.fixture(scope="module")
def parts() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and description of a good file."""
    with TemporaryDirectory() as folder:
        save_safetensors(checkpoint(), f"{folder}/a.safetensors")
        with safetensors.safe_open(f"{folder}/a.safetensors", framework="numpy") as file:
            return file.get_tensors(), json.loads(file.metadata()["flame_jax"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": 2}, "format 1"),
        ({"format": None}, "format 1"),
        ({"step": -1}, "step"),
        ({"step": True}, "step"),
        ({"step": "5"}, "step"),
        ({"training": [1]}, "training"),
        ({"model": {}}, "head"),
        ({"model": None}, "can't be read"),
        ({"schema": {"colour": "red"}}, "colour"),
    ],
    ids=str,
)
def test_a_bad_description_is_refused(
    changed: dict[str, Any], said: str, parts: tuple[dict[str, np.ndarray], dict[str, Any]], tmp_path: Path
) -> None:
    text = json.dumps(parts[1] | changed)
    safetensors.numpy.save_file(parts[0], tmp_path / "a.safetensors", metadata={"flame_jax": text})
    assert said in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000], ids=["empty", "{", "[]", "3", "deep"])
def test_a_description_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    safetensors.numpy.save_file({}, tmp_path / "a.safetensors", metadata={"flame_jax": text})
    refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (None, "no vocabulary"),
        (np.array([3, 2], np.int64), "ascending"),
        (np.array([2, 2], np.int64), "ascending"),
        (np.array([-2, 2], np.int64), "non-negative"),
        (np.array([2, 3], np.int32), "int64"),
        (np.array([[2, 3]], np.int64), "int64"),
    ],
    ids=str,
)
def test_a_bad_vocabulary_is_refused(
    ids: np.ndarray | None, said: str, parts: tuple[dict[str, np.ndarray], dict[str, Any]], tmp_path: Path
) -> None:
    tensors = {name: value for name, value in parts[0].items() if name != "vocabulary"}
    tensors |= {} if ids is None else {"vocabulary": ids}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"flame_jax": json.dumps(parts[1])})
    assert said in refusal(tmp_path / "a.safetensors")


def test_a_lost_optimiser_leaf_is_noticed(parts: tuple[dict[str, np.ndarray], dict[str, Any]], tmp_path: Path) -> None:
    tensors = {name: value for name, value in parts[0].items() if name != "optimizer/00000"}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"flame_jax": json.dumps(parts[1])})
    assert "optimizer/00000" in refusal(tmp_path / "a.safetensors")


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    save_safetensors(checkpoint(), tmp_path / "good.safetensors")
    assert is_checkpoint_file(tmp_path / "good.safetensors")
    data = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "junk").write_bytes(b"\xff" * 100)
    (tmp_path / "short").write_bytes(data[:-1])
    safetensors.numpy.save_file({"w": np.ones(2, np.float32)}, tmp_path / "plain")
    for name in ("junk", "short", "plain", "missing"):
        assert not is_checkpoint_file(tmp_path / name)
        refusal(tmp_path / name)
    assert "flame_jax metadata" in refusal(tmp_path / "plain")
