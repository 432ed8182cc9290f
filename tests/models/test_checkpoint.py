"""Checkpoints: everything comes back, and what can't be read is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_jax.models.checkpoint import Checkpoint, CheckpointError, CheckpointFolder, load_checkpoint
from flame_jax.schema import Feature
from tests import tiny

# Orbax closes its event loop while reads of a damaged checkpoint are still under way.
pytestmark = pytest.mark.filterwarnings("ignore:.*Exception ignored in:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1, 2 and 5, saved one after the other."""
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    tiny.save_checkpoint(path, 1, 2, 5)
    return path


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def assert_same(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert found.step == expected.step
    assert found.model == expected.model
    assert found.schema == expected.schema
    assert found.vocabularies.items.keys.dtype == np.int64
    assert found.vocabularies.items.keys.tolist() == expected.vocabularies.items.keys.tolist()
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert found.weights[name].dtype == np.float32
        assert np.array_equal(found.weights[name], value), name
    assert len(found.optimizer) == len(expected.optimizer)
    for one, other in zip(found.optimizer, expected.optimizer, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.array_equal(one, other)


def one_line(error: CheckpointError) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


def test_the_newest_checkpoint_comes_back_whole(pristine: Path) -> None:
    assert_same(load_checkpoint(pristine), tiny.checkpoint(5, seed=5))
    assert_same(load_checkpoint(str(pristine)), tiny.checkpoint(5, seed=5))


def test_ids_beyond_32_bits_come_back(pristine: Path) -> None:
    assert load_checkpoint(pristine).vocabularies.items.keys.max() > 2**40


def test_the_newest_two_are_kept(pristine: Path) -> None:
    assert sorted(os.listdir(pristine)) == ["2", "5"]


def test_a_folder_opened_again_goes_on_where_it_was(folder: Path) -> None:
    with CheckpointFolder(folder) as opened:
        assert_same(opened.latest(), tiny.checkpoint(5, seed=5))
        opened.save(tiny.checkpoint(10, seed=10))
        assert_same(opened.latest(), tiny.checkpoint(10, seed=10))
    assert_same(load_checkpoint(folder), tiny.checkpoint(10, seed=10))
    assert sorted(os.listdir(folder)) == ["10", "5"]


def test_the_older_one_takes_over_when_the_newest_is_removed(folder: Path) -> None:
    shutil.rmtree(folder / "5")
    assert_same(load_checkpoint(folder), tiny.checkpoint(2, seed=2))


def test_a_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    with CheckpointFolder(tmp_path / "new") as folder:
        assert folder.latest() is None


def test_a_relative_path_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder.parent)
    assert load_checkpoint(folder.name).step == 5


def stray(path: Path) -> None:
    (path / "notes" / "deep").mkdir(parents=True)
    (path / "notes.txt").write_text("not a checkpoint")


@pytest.mark.parametrize(
    "make",
    [lambda path: None, lambda path: path.mkdir(), stray, lambda path: path.write_text("a file")],
    ids=["nothing", "an empty folder", "another folder", "a file"],
)
def test_where_there_is_no_checkpoint_one_line_says_what_to_do(make: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "model"
    make(path)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"flame_jax\.train") as caught:
        load_checkpoint(path)
    assert str(path) in one_line(caught.value)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_file_cannot_be_trained_into(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(CheckpointError) as caught:
        CheckpointFolder(tmp_path / "model")
    assert str(tmp_path / "model") in one_line(caught.value)


def test_a_folder_named_like_a_step_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model" / "12").mkdir(parents=True)
    (tmp_path / "model" / "12" / "photo.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "model")
    assert str(tmp_path / "model") in one_line(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt"])
def test_a_damaged_checkpoint_is_refused(name: str, damage: str, folder: Path) -> None:
    file = folder / "5" / name
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert str(folder) in one_line(caught.value)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "width", 0),
        ("model", "width", "wide"),
        ("model", "colour", "red"),
        ("schema", "actions", 0),
        ("schema", "colour", "red"),
        ("schema", "item_features", [{"name": 5, "kind": "numeric"}]),
        ("schema", "blocks", [{}]),
    ],
)
def test_a_checkpoint_of_an_unknown_description_is_refused(section: str, field: str, value: Any, folder: Path) -> None:
    file = folder / "5" / "_CHECKPOINT_METADATA"
    about = json.loads(file.read_text())
    about["custom_metadata"][section][field] = value
    file.write_text(json.dumps(about))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert str(folder) in one_line(caught.value)


def test_a_checkpoint_fits_the_configuration_it_was_made_for(pristine: Path) -> None:
    load_checkpoint(pristine).check_fits(tiny.MODEL, tiny.SCHEMA, pristine)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "width", 32),
        ("model", "dtype", "bfloat16"),
        ("model", "name", "other"),
        ("schema", "tasks", ("love", "like")),
        ("schema", "block_length", 17),
        ("schema", "blocks", tiny.SCHEMA.blocks[:1]),
        ("schema", "item_features", (*tiny.SCHEMA.item_features, Feature("more", "numeric"))),
        ("schema", "scenarios", ("search", "home")),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_field(
    section: str, field: str, value: Any, pristine: Path
) -> None:
    model, schema = tiny.MODEL, tiny.SCHEMA
    if section == "model":
        model = dataclasses.replace(model, **{field: value})
    else:
        schema = dataclasses.replace(schema, **{field: value})
    with pytest.raises(CheckpointError, match=rf"{section}\.{field}") as caught:
        load_checkpoint(pristine).check_fits(model, schema, pristine)
    assert str(pristine) in one_line(caught.value)
