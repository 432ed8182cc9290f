"""The comparison of models: what is compared, and the page that is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from bench.quality import validation_aucs, variants
from bench.quality_page import NOTES, write_page
from flame_jax.config import load
from flame_jax.data import completejourney, movielens
from flame_jax.data.known import DATASETS
from flame_jax.models.registry import make_ranker
from flame_jax.packing import Bucket, Extent, fits, slot_layout

STORED = {"ml-100k": movielens.STORE_SCHEMA, "completejourney": completejourney.STORE_SCHEMA}


@pytest.mark.parametrize("dataset", sorted(DATASETS))
def test_every_variant_reads_as_many_events_and_batches_as_many_requests(dataset: str) -> None:
    base = load(["--config", DATASETS[dataset].config], prog="test")
    assert base.schema.store_fingerprint() == STORED[dataset].store_fingerprint()
    compared = variants(base)
    assert len(compared) == 7
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
        model = nnx.eval_shape(lambda c=config: make_ranker(c.model, c.schema, 100, rngs=nnx.Rngs(0)))
        size = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        assert size > 0
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
    for run, auc in (("a_b_rate0.1", 0.6), ("a_b_rate0.2", 0.7), ("a_b_seed0", 0.9)):
        (tmp_path / run / "checkpoint").mkdir(parents=True)
        (tmp_path / run / "checkpoint" / "quality.json").write_text(json.dumps(figures("a b", auc)))
    assert validation_aucs(tmp_path, ["a b", "other"], "like") == {"a b": {"0.1": 0.6, "0.2": 0.7}, "other": {}}


def test_the_committed_page_is_that_of_the_committed_figures(tmp_path: Path) -> None:
    page = Path("docs/quality.md")
    copy = tmp_path / "quality.md"
    copy.write_text(page.read_text())
    write_page(Path("bench/results"), copy)
    assert copy.read_text() == page.read_text()
