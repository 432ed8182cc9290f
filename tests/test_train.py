"""Training on a tiny store of planted preferences."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from flame_jax import train as module
from flame_jax.config import Config
from flame_jax.data.errors import DataError
from flame_jax.data.known import DATASETS, KnownDataset
from flame_jax.models.checkpoint import Checkpoint, CheckpointError, CheckpointFolder, load_checkpoint
from flame_jax.models.climber import Climber
from flame_jax.models.serving import load_weights
from flame_jax.packing import Bucket
from flame_jax.pda.lmdb_store import LmdbStore, LmdbWriter
from flame_jax.request import History
from flame_jax.train import Slice, cuts, main, report, train
from flame_jax.training.baselines import Biases, BiasModel, item_mean
from flame_jax.training.examples import Dataset, Packer, split_points
from flame_jax.training.loop import predict
from tests import tiny


@pytest.fixture(scope="module")
def run() -> tiny.Run:
    return tiny.trained_run()


@pytest.fixture(scope="module")
def dataset(run: tiny.Run) -> Dataset:
    return load(run.config.store.path)


def load(path: str) -> Dataset:
    store = LmdbStore(path, tiny.SCHEMA)
    dataset = Dataset(store, tiny.SCHEMA, {"like": [3, 4], "love": [4]})
    store.close()
    return dataset


def with_histories(dataset: Dataset, change: Any) -> Dataset:
    """A copy of a data set whose histories are `change(number, history)`."""
    changed = copy.copy(dataset)
    changed.users = [
        (key, record._replace(history=change(number, record.history)))
        for number, (key, record) in enumerate(dataset.users)
    ]
    return changed


def trained(config: Config, dataset: Dataset) -> tuple[Slice, dict[str, np.ndarray], Checkpoint]:
    with CheckpointFolder(config.train.checkpoint) as folder:
        held, scores, _ = train(config, dataset, folder)
    return held, scores, load_checkpoint(config.train.checkpoint)


def assert_same_weights(one: Checkpoint, other: Checkpoint) -> None:
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        np.testing.assert_allclose(value, other.weights[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_loss_falls_and_the_planted_preference_is_found(run: tiny.Run) -> None:
    quarter = len(run.losses) // 4
    assert np.mean(run.losses[-quarter:]) < 0.6 * np.mean(run.losses[:quarter])
    like = json.loads((Path(run.config.train.checkpoint) / "quality.json").read_text())["tasks"]["like"]
    assert like["models"]["climber"]["user_auc"] > like["models"]["user + item"]["user_auc"] + 0.2


def test_the_table_names_every_model_and_the_file_holds_its_figures(run: tiny.Run, dataset: Dataset) -> None:
    lines = run.printed.splitlines()
    names = ["item mean", "user + item", "climber"]
    assert lines[0] == "task like"
    assert [line.split("  ")[0].strip() for line in lines[2:5]] == names
    quality = json.loads((Path(run.config.train.checkpoint) / "quality.json").read_text())
    assert quality["slice"] == "test"
    assert list(quality["tasks"]) == ["like", "love"]
    like = quality["tasks"]["like"]
    assert list(like["models"]) == names
    held = int((dataset.lengths() - split_points(dataset.lengths(), 0.2)).sum())
    assert {figures["events"] for figures in like["models"].values()} == {held}
    assert list(like["user_auc_difference"]) == names[:2]
    for mean, low, high in like["user_auc_difference"].values():
        assert low <= mean <= high
    for name, figures in like["models"].items():
        (line,) = (line for line in lines[2:5] if line.startswith(name))
        assert f"{figures['auc']:.4f}" in line


def test_the_checkpoint_holds_the_training_items_and_both_descriptions(run: tiny.Run, dataset: Dataset) -> None:
    checkpoint = load_checkpoint(run.config.train.checkpoint)
    stops = split_points(dataset.lengths(), 0.2)
    seen = {int(i) for (_, r), stop in zip(dataset.users, stops, strict=True) for i in r.history.item_ids[:stop]}
    assert set(checkpoint.vocabularies.items.keys.tolist()) == seen
    assert checkpoint.step == run.config.train.epochs
    checkpoint.check_fits(tiny.MODEL, tiny.SCHEMA, run.config.train.checkpoint)


def test_an_interrupted_run_goes_on_to_the_same_weights(run: tiny.Run, dataset: Dataset, tmp_path: Path) -> None:
    config = retarget(run.config, tmp_path)

    class Killed(CheckpointFolder):
        def save(self, checkpoint: Checkpoint) -> None:
            super().save(checkpoint)
            if checkpoint.step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Killed(config.train.checkpoint) as folder:
        train(config, dataset, folder)
    assert load_checkpoint(config.train.checkpoint).step == 2
    with tiny.recorded_losses() as losses:
        _, _, resumed = trained(config, dataset)
    assert len(losses) < len(run.losses)
    np.testing.assert_allclose(losses, run.losses[-len(losses) :], rtol=1e-5)
    whole = load_checkpoint(run.config.train.checkpoint)
    assert resumed.step == whole.step
    assert_same_weights(resumed, whole)
    for one, other in zip(resumed.optimizer, whole.optimizer, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


def retarget(config: Config, folder: Path, **changed: Any) -> Config:
    """The same configuration with another checkpoint folder."""
    settings = dataclasses.replace(config.train, checkpoint=str(folder / "checkpoint"), **changed)
    return dataclasses.replace(config, train=settings)


@pytest.fixture
def finished(run: tiny.Run, tmp_path: Path) -> Config:
    """A configuration whose checkpoint is a copy of the finished run's."""
    shutil.copytree(run.config.train.checkpoint, tmp_path / "checkpoint")
    return retarget(run.config, tmp_path)


def test_a_finished_run_is_only_evaluated_again(run: tiny.Run, dataset: Dataset, finished: Config) -> None:
    with tiny.recorded_losses() as losses:
        held, scores, checkpoint = trained(finished, dataset)
    assert losses == []
    assert_same_weights(checkpoint, load_checkpoint(run.config.train.checkpoint))
    figures = report(finished, held, scores, 5)
    quality = json.loads((Path(run.config.train.checkpoint) / "quality.json").read_text())
    for task, expected in quality["tasks"].items():
        found = figures["tasks"][task]["models"]["climber"]["auc"]
        assert found == pytest.approx(expected["models"]["climber"]["auc"], abs=1e-6)


def test_a_checkpoint_of_other_items_is_refused(finished: Config, tmp_path: Path) -> None:
    """As many items, but others: each id would read another item's weights."""
    tiny.write_store(tmp_path / "other", ids=tiny.ITEM_IDS + 1)
    with pytest.raises((CheckpointError, ValueError)):
        trained(finished, load(str(tmp_path / "other")))


@pytest.mark.parametrize("changed", [{"validation": True}, {"test_fraction": 0.3}], ids=str)
def test_a_checkpoint_that_has_seen_the_held_out_events_is_not_reported_on_them(
    changed: dict[str, Any], dataset: Dataset, finished: Config
) -> None:
    settings = dataclasses.replace(finished.train, **changed)
    config = dataclasses.replace(finished, train=settings)
    stops, _ = cuts(config, dataset)
    assert (stops < cuts(finished, dataset)[0]).any()
    kept = {int(i) for (_, r), stop in zip(dataset.users, stops, strict=True) for i in r.history.item_ids[:stop]}
    assert len(kept) == tiny.ITEMS, "else the sizes alone would tell"
    with pytest.raises((CheckpointError, ValueError)):
        trained(config, dataset)


def test_validation_is_the_newest_share_of_what_training_would_otherwise_see(run: tiny.Run, dataset: Dataset) -> None:
    settings = dataclasses.replace(run.config.train, validation=True)
    stops, ends = cuts(dataclasses.replace(run.config, train=settings), dataset)
    whole_stops, whole_ends = cuts(run.config, dataset)
    assert ends.tolist() == whole_stops.tolist()
    assert whole_ends.tolist() == dataset.lengths().tolist()
    assert stops.tolist() == split_points(whole_stops, 0.2).tolist()
    assert (stops < ends).all()


@pytest.mark.parametrize("negatives", [0, 2])
def test_nothing_about_the_test_events_reaches_a_validation_run(
    negatives: int, run: tiny.Run, dataset: Dataset, tmp_path: Path
) -> None:
    test = split_points(dataset.lengths(), 0.2)

    def rewrite(number: int, history: History) -> History:
        stop = test[number]
        items, actions, times = history.item_ids.copy(), history.actions.copy(), history.timestamps.copy()
        items[stop:] = items[0]
        actions[stop:] = 4 - actions[stop:]
        times[stop:] += 10**6
        return History(items, actions, times)

    runs = []
    for name, data in (("one", dataset), ("two", with_histories(dataset, rewrite))):
        # So long a period that every event's negatives could be any other event's item.
        settings = {"epochs": 1, "validation": True, "negatives": negatives, "negative_period": 2**31}
        runs.append(trained(retarget(run.config, tmp_path / name, **settings), data))
    (held, scores, checkpoint), (other_held, other_scores, other_checkpoint) = runs
    assert all(np.array_equal(a, b) for a, b in zip(held, other_held, strict=True))
    for name in scores:
        np.testing.assert_allclose(scores[name], other_scores[name], rtol=1e-5)
    assert_same_weights(checkpoint, other_checkpoint)
    events = int((test - split_points(test, 0.2)).sum())
    assert events <= len(held.users) <= events * (1 + negatives)


def test_scores_line_up_with_the_held_out_events(run: tiny.Run, dataset: Dataset, finished: Config) -> None:
    held, scores, checkpoint = trained(finished, dataset)
    stops = split_points(dataset.lengths(), 0.2)
    at = 0
    for number, (_, record) in enumerate(dataset.users):
        count = len(record.history) - stops[number]
        assert (held.users[at : at + count] == number).all()
        assert held.items[at : at + count].tolist() == record.history.item_ids[stops[number] :].tolist()
        actions = record.history.actions[stops[number] :].tolist()
        assert held.labels[at : at + count].tolist() == [[a >= 3, a == 4] for a in actions]
        at += count
    assert at == len(held.users)
    past = [
        (r.history.item_ids[:s], r.history.actions[:s] >= 3) for (_, r), s in zip(dataset.users, stops, strict=True)
    ]
    items, labels = (np.concatenate(column) for column in zip(*past, strict=True))
    np.testing.assert_allclose(scores["item mean"][:, 0], item_mean(items, labels, held.items, strength=2.0))
    assert all(len(values) == at and np.isfinite(values).all() for values in scores.values())
    # One user alone is scored as in company: each score went to its own event.
    model = Climber(tiny.MODEL, tiny.SCHEMA, checkpoint.vocabularies.items.rows, rngs=nnx.Rngs(0))
    load_weights(model, checkpoint.weights)
    packer = Packer(
        dataset,
        checkpoint.vocabularies,
        finished.layout,
        Bucket(finished.train.tokens, finished.train.candidates),
    )
    only = np.where(np.arange(tiny.USERS) == 17, stops, dataset.lengths())
    alone = predict(finished, model, packer, only, dataset.lengths(), None)
    np.testing.assert_allclose(alone, scores["climber"][held.users == 17], rtol=1e-5)


def test_the_model_starts_where_the_logistic_model_ends() -> None:
    model, ids = tiny.model(0), np.sort(tiny.ITEM_IDS)[::2]
    biases = BiasModel(
        0.75, Biases(np.arange(3), np.ones(3, np.float32)), Biases(ids, np.arange(1, len(ids) + 1, dtype=np.float32))
    )
    other = BiasModel(-1.5, Biases(np.arange(3), np.ones(3, np.float32)), Biases(ids[:1], np.full(1, 9, np.float32)))
    module.start_from_biases(model, tiny.vocabulary(), [biases, other])
    start = np.asarray(model.item_bias[...])
    assert start[0].tolist() == [0.0, 0.0]
    assert start[1::2, 0].tolist() == list(range(1, len(ids) + 1))
    assert not start[2::2, 0].any()
    assert start[1, 1] == 9
    assert np.count_nonzero(start[:, 1]) == 1
    assert np.asarray(model.head["logit_b"][...]).tolist() == [0.75, -1.5]


def held_out(count: int = 60) -> Slice:
    random = np.random.default_rng(0)
    labels = random.random((count, 2)) < 0.5
    return Slice(np.repeat(np.arange(count // 10), 10), np.arange(count), labels, np.zeros(count, np.int64))


def test_a_model_that_loses_to_a_baseline_is_a_warning_and_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, held = tiny.config(tmp_path), held_out()
    (tmp_path / "checkpoint").mkdir()
    good = np.where(held.labels, 0.9, 0.1)
    figures = report(config, held, {"item mean": np.full((60, 2), 0.5), "user + item": good, "climber": 1 - good}, 5)
    for task in ("like", "love"):
        models = figures["tasks"][task]["models"]
        assert (models["user + item"]["auc"], models["climber"]["auc"]) == (1.0, 0.0)
    printed = capsys.readouterr().out
    assert "warning: climber does not beat user + item" in printed
    assert "warning: climber does not beat item mean" in printed
    assert json.loads((tmp_path / "checkpoint" / "quality.json").read_text()) == figures


def test_a_model_that_wins_is_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, held = tiny.config(tmp_path, validation=True), held_out()
    (tmp_path / "checkpoint").mkdir()
    report(config, held, {"item mean": np.full((60, 2), 0.5), "climber": np.where(held.labels, 0.9, 0.1)}, 5)
    assert "warning" not in capsys.readouterr().out
    assert json.loads((tmp_path / "checkpoint" / "quality.json").read_text())["slice"] == "validation"


def refusal(config: Config, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--config", tiny.write_config(config, folder / "config.yaml")])
    assert ended.value.code in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(module.PROG)]
    assert len(lines) == 1
    return lines[0]


def test_without_a_store_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.config(tmp_path)
    assert config.store.path in refusal(config, tmp_path, capsys)
    assert not (tmp_path / "checkpoint").exists()


def test_a_store_of_another_schema_is_refused(
    run: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(
        run.config, schema=dataclasses.replace(tiny.SCHEMA, user_features=()), model=tiny.MODEL
    )
    assert "schema" in refusal(retarget(config, tmp_path), tmp_path, capsys)


def test_a_checkpoint_of_another_model_is_refused_by_field(
    finished: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(finished, model=dataclasses.replace(tiny.MODEL, ffn=64))
    assert "model.ffn" in refusal(config, tmp_path, capsys)


def test_a_task_without_label_actions_is_refused(
    run: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = retarget(run.config, tmp_path, label_actions={"score": [0]})
    assert "label_actions" in refusal(config, tmp_path, capsys)


def test_a_user_with_more_held_out_events_than_a_batch_holds_is_scored_or_refused_before_training(
    run: tiny.Run, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, begun = retarget(run.config, tmp_path), []
    monkeypatch.setattr(module, "fit", lambda *args: begun.append(args))

    def grow(number: int, history: History) -> History:
        times = 1 if number else 20
        return History(*(np.repeat(c, times) for c in (history.item_ids, history.actions, history.timestamps)))

    long = with_histories(dataset, grow)
    assert long.lengths()[0] - split_points(long.lengths(), 0.2)[0] > config.train.candidates
    try:
        with CheckpointFolder(config.train.checkpoint) as folder:
            held, scores, _ = train(config, long, folder)
    except ValueError:
        assert begun == [], "refused only after the whole training"
    else:
        assert np.isfinite(scores["climber"]).all()
        assert len(scores["climber"]) == len(held.users)


def test_without_scikit_learn_training_names_the_extra_and_help_still_works() -> None:
    probe = "import sys; sys.modules['sklearn'] = None; from flame_jax.train import main; main(sys.argv[1:])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "flame-jax[demo]" in run.stderr
    shown = subprocess.run([sys.executable, "-c", probe, "--help"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    assert "--train.epochs" in shown.stdout


def test_a_known_data_set_brings_its_configuration_and_is_imported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []

    def write(store: str | Path) -> tuple[int, int, int]:
        written.append(Path(store))
        tiny.write_store(Path(store))
        return tiny.USERS, tiny.ITEMS, 0

    config = tiny.config(tmp_path, epochs=1)
    file = tiny.write_config(config, tmp_path / "config.yaml")
    monkeypatch.setitem(DATASETS, "ml-100k", KnownDataset("tiny", write, file))
    for _ in range(2):
        main(["--dataset", "ml-100k", "--train.epochs", "1"])
    assert written == [tmp_path / "store"]
    assert load_checkpoint(config.train.checkpoint).step == 1
    with pytest.raises(SystemExit) as ended:
        main(["--dataset=ml-1m"])
    assert ended.value.code == 2
    assert "ml-1m" in capsys.readouterr().err


def test_a_chunk_with_its_negatives_must_fit_a_batch(
    run: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = retarget(run.config, tmp_path, chunk=20, negatives=3)
    line = refusal(config, tmp_path, capsys)
    assert "train.candidates is 64" in line
    assert "80" in line


def test_weights_brought_from_elsewhere_can_not_be_resumed(
    run: tiny.Run, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = retarget(run.config, tmp_path)
    brought = dataclasses.replace(load_checkpoint(run.config.train.checkpoint), step=0, optimizer=[], training={})
    with CheckpointFolder(config.train.checkpoint) as folder:
        folder.save(brought)
    assert "no state of this optimiser" in refusal(config, tmp_path, capsys)


def test_a_full_history_must_fit_a_batch_beside_a_chunk(
    run: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = retarget(run.config, tmp_path, tokens=16, candidates=16)
    assert "train.tokens is 16, a full history with a chunk and its negatives takes 24" in refusal(
        config, tmp_path, capsys
    )


def test_an_import_that_broke_off_is_begun_again(tmp_path: Path) -> None:
    written: list[str | Path] = []

    def write(store: str | Path) -> tuple[int, int, int]:
        written.append(store)
        tiny.write_store(Path(store))
        return 1, 1, 1

    known = KnownDataset("tiny", write, "unused")
    with LmdbWriter(tmp_path / "store", tiny.SCHEMA):
        pass
    for _ in range(2):
        known.ensure(tmp_path / "store")
    with pytest.raises(DataError, match="holds 'tiny', not 'other'"):
        known._replace(name="other").ensure(tmp_path / "store")
    assert written == [tmp_path / "store"]
