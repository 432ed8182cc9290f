"""The comparison of models: what is compared, and the page that is made of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import quality as module
from bench.quality import MODELS, run, save, validation_aucs, variants
from bench.quality_page import NOTES, write_page
from flame_jax.commandline import load
from flame_jax.config import Config
from flame_jax.data import completejourney, movielens
from flame_jax.data.known import DATASETS
from flame_jax.models.serving import served_specs
from flame_jax.packing import Bucket, Extent, fits, slot_layout

STORED = {"ml-100k": movielens.STORE_SCHEMA, "completejourney": completejourney.STORE_SCHEMA}


@pytest.mark.parametrize("dataset", sorted(DATASETS))
def test_every_variant_reads_as_many_events_and_batches_as_many_requests(dataset: str) -> None:
    base = load(["--config", DATASETS[dataset].config], prog="test")
    assert base.schema.store_fingerprint() == STORED[dataset].store_fingerprint()
    compared = variants(base)
    assert tuple(compared) == MODELS
    chunk = base.train.chunk * (1 + base.train.negatives)
    held = []
    for name, config in compared.items():
        assert config.model.name == name
        assert config.schema.block_length * len(config.schema.blocks) == 2 * base.schema.block_length
        assert (config.train.epochs, config.train.candidates) == (base.train.epochs, base.train.candidates)
        assert (config.model.width, config.model.layers) == (base.model.width, base.model.layers)
        bucket = Bucket(config.train.tokens, config.train.candidates)
        slot_layout(config.schema, config.layout, bucket)
        full = Extent(config.schema.history_rows, chunk)
        held.append(max(n for n in range(1, config.layout.max_requests + 1) if fits([full] * n, bucket, config.layout)))
        served_specs(config.model, config.schema, 100)
    assert max(held) <= 1.3 * min(held)


def quality(auc: float) -> dict[str, Any]:
    return {
        "auc": auc,
        "user_auc": 0.5,
        "user_auc_low": 0.4,
        "user_auc_high": 0.6,
        "log_loss": 0.3,
        "users": 4,
        "events": 9,
    }


def figures(model: str, auc: float) -> dict[str, Any]:
    return {"tasks": {"like": {"models": {"item mean": quality(0.6), model: quality(auc)}}}}


def test_the_page_shows_means_and_spreads_and_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    saved = {
        "dataset": "ml-100k",
        "device": "abacus",
        "commit": "c0ffee",
        "versions": {"jax": "1"},
        "budget": {"width": 8, "layers": 1, "epochs": 2},
        "flops": {"climber": 7_400_000},
        "learning_rates": {"climber": 0.001},
        "validation_auc": {"climber": {"0.001": 0.71, "0.002": 0.70}},
        "runs": {"climber": [figures("climber", auc) for auc in (0.7, 0.8, 0.75)]},
    }
    (tmp_path / "quality_ml-100k").mkdir()
    (tmp_path / "quality_ml-100k" / "quality.json").write_text(json.dumps(saved))
    page = tmp_path / "page.md"
    write_page(tmp_path, page)
    text = page.read_text()
    assert "| climber | 7 | 0.001 | 0.7500 (0.7000 .. 0.8000) | 0.5000 | 0.3000 |" in text
    assert "| item mean |  |  | 0.6000 | 0.5000 | 0.3000 |" in text
    assert "| climber | 0.7100 | 0.7000 |" in text
    assert "abacus, commit c0ffee" in text
    page.write_text(f"old figures\n\n{NOTES}\n\nClimber rises.\n")
    write_page(tmp_path, page)
    assert page.read_text() == f"{text}\n{NOTES}\n\nClimber rises.\n"


def test_validation_figures_are_those_of_the_rates_tried(tmp_path: Path) -> None:
    for folder, auc in (("a_b_rate0.1", 0.6), ("a_b_rate0.2", 0.7), ("a_b_seed0", 0.9)):
        (tmp_path / folder / "checkpoint").mkdir(parents=True)
        (tmp_path / folder / "checkpoint" / "quality.json").write_text(json.dumps(figures("a b", auc)))
    assert validation_aucs(tmp_path, ["a b", "other"], "like") == {"a b": {"0.1": 0.6, "0.2": 0.7}, "other": {}}


def test_the_committed_page_is_that_of_the_committed_figures(tmp_path: Path) -> None:
    page = Path("docs/quality.md")
    copy = tmp_path / "quality.md"
    copy.write_text(page.read_text())
    write_page(Path("bench/results"), copy)
    assert copy.read_text() == page.read_text()


def test_a_finished_run_is_taken_as_it_is_and_one_of_other_settings_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def trains(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(json.loads(Path(command[-1]).read_text())["train"]["checkpoint"])
        folder.mkdir()
        (folder / "quality.json").write_text(json.dumps(figures("climber", 0.7)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", trains)
    for _ in range(2):
        assert run(tmp_path / "a", Config()) == figures("climber", 0.7)
    assert len(commands) == 1
    assert commands[0][1:3] == ["-m", "flame_jax.train"]
    with pytest.raises(SystemExit, match="other settings"):
        run(tmp_path / "a", module.with_training(Config(), epochs=99))
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(SystemExit, match="other settings"):
        run(tmp_path / "a", Config())


def test_a_run_that_fails_ends_the_comparison_and_names_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails: subprocess.CompletedProcess[str] = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: fails)
    with pytest.raises(SystemExit, match=r"a/log ends with status 3"):
        run(tmp_path / "a", Config())


def test_figures_of_models_that_were_not_trained_again_stay(tmp_path: Path) -> None:
    path = tmp_path / "quality_x" / "quality.json"

    def of(model: str, **changed: object) -> dict[str, Any]:
        about = {"dataset": "x", "budget": {"epochs": 2}, "device": "abacus", "versions": {}, "commit": model}
        parts = {part: {model: 1} for part in ("flops", "learning_rates", "validation_auc", "runs")}
        return about | parts | changed

    save(path, of("a"))
    save(path, of("b"))
    assert json.loads(path.read_text())["runs"] == {"a": 1, "b": 1}
    with pytest.raises(SystemExit, match="another budget or machine for a"):
        save(path, of("b", budget={"epochs": 3}))
    assert json.loads(path.read_text())["budget"] == {"epochs": 2}
