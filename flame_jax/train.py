"""`python -m flame_jax.train --config FILE`: train a ranker on a store's events, beside honest baselines.

`--dataset NAME` imports a known data set first, if the store isn't there yet, and brings its configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flame_jax.commandline import load, refuse
from flame_jax.config import Config
from flame_jax.data.errors import DataError
from flame_jax.data.known import DATASETS, KnownDataset
from flame_jax.models.checkpoint import CheckpointError, CheckpointFolder
from flame_jax.models.ranker import Ranker
from flame_jax.models.registry import make_ranker
from flame_jax.packing import Bucket
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.store import StoreError
from flame_jax.training.baselines import BiasModel, fit_bias_model, fit_repeat_model, item_mean
from flame_jax.training.evaluation import difference_interval, evaluate, table
from flame_jax.training.examples import Dataset, Negatives, Packer, split_points
from flame_jax.training.lookup import fill_columns, make_vocabularies
from flame_jax.training.loop import fit, predict
from flame_jax.training.negatives import NegativeSampler
from flame_jax.vocabulary import Vocabulary

PROG = "python -m flame_jax.train"

ITEM_MEAN_STRENGTH = 2.0
BIAS_MODEL_C = 1.0
"""Both chosen by log loss on the validation slice of MovieLens-100K."""
BIAS_MODEL_ROWS = 300_000
"""The logistic model is fitted on this many training candidates at most, a random sample: a million take a minute."""

HELD_OUT_SEED = 2**31
"""Seeds the negatives of the held-out slice, the same for every model."""

Scores = dict[str, np.ndarray]
"""float64[n, tasks] probabilities by the name of a model or a baseline."""


class Slice(NamedTuple):
    """Columns of one slice of candidates, events and their negatives.

    Attributes:
        users: int64[n], by number.
        items: int64[n], item ids.
        labels: bool[n, tasks].
        before: int64[n], how often the user had taken the item before.
    """

    users: np.ndarray
    items: np.ndarray
    labels: np.ndarray
    before: np.ndarray


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, print and save the quality table."""
    args, known = take_dataset(list(sys.argv[1:] if argv is None else argv))
    config = load(args, prog=PROG, about=__doc__)
    if importlib.util.find_spec("sklearn") is None:
        refuse(PROG, "training needs scikit-learn: pip install 'flame-jax[demo]'", status=1)
    try:
        check_trainable(config)
        if known is not None:
            known.ensure(config.store.path)
        store = LmdbStore(config.store.path, config.schema)
        dataset = Dataset(store, config.schema, config.train.label_actions)
        store.close()
        with CheckpointFolder(config.train.checkpoint) as folder:
            report(config, *train(config, dataset, folder))
    except (DataError, StoreError, CheckpointError, ValueError, OSError) as error:
        refuse(PROG, str(error), status=1)
    except KeyboardInterrupt:
        refuse(PROG, "interrupted; run again to go on from the last finished epoch", status=130)


def take_dataset(args: list[str]) -> tuple[list[str], KnownDataset | None]:
    """The arguments without `--dataset NAME`, led by its configuration if they name none; and the data set."""
    parser = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset", choices=sorted(DATASETS))
    if not any(arg.split("=")[0] == "--dataset" for arg in args):
        return args, None
    chosen, rest = parser.parse_known_args(args)
    known = DATASETS[chosen.dataset]
    if not any(arg.split("=")[0] == "--config" for arg in rest):
        if not Path(known.config).is_file():
            refuse(
                PROG, f"{known.config}, which goes with {known.name}, is not here: run in a checkout, or name --config"
            )
        rest = ["--config", known.config, *rest]
    return rest, known


def check_trainable(config: Config) -> None:
    """Raise ValueError for labels that can't be made; warn of inputs that a store's events can't train."""
    labels = config.train.label_actions
    if missing := set(config.schema.tasks) - set(labels):
        raise ValueError(f"train.label_actions lacks the tasks {sorted(missing)}")
    if bad := {action for actions in labels.values() for action in actions if not 0 <= action < config.schema.actions}:
        raise ValueError(f"train.label_actions names actions {sorted(bad)} outside [0, {config.schema.actions})")
    if (rows := config.train.chunk * (1 + config.train.negatives)) > config.train.candidates:
        raise ValueError(f"train.candidates is {config.train.candidates}, a chunk and its negatives take {rows}")
    longest = config.layout.aligned(config.schema.history_rows) + config.layout.aligned(rows)
    if longest > config.train.tokens:
        raise ValueError(
            f"train.tokens is {config.train.tokens}, a full history with a chunk and its negatives takes {longest}"
        )
    sent = any(feature.source == "request" for feature in config.schema.item_features)
    if config.schema.context_features or sent or len(config.schema.scenarios) > 1:
        print(
            "warning: a store's events carry nothing that a request brings: the weights of context features, of item "
            "features from the request and of scenarios beyond the first stay untrained",
            file=sys.stderr,
        )


def cuts(config: Config, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Per user: where training ends and where evaluation ends (validation or test slice)."""
    lengths = dataset.lengths()
    test = split_points(lengths, config.train.test_fraction)
    if config.train.validation:
        return split_points(test, config.train.test_fraction), test
    return test, lengths


def columns(dataset: Dataset, starts: np.ndarray, stops: np.ndarray, negatives: Negatives | None) -> Slice:
    """Flatten the candidates of events [start, stop) of every user, in the order of `predict`."""
    parts = []
    for user, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        items, labels = dataset.candidates(user, start, stop, negatives)
        history = dataset.users[user][1].history
        seen = np.searchsorted(history.timestamps, history.timestamps[start]) if start < stop else 0
        taken, counts = np.unique(history.item_ids[:seen], return_counts=True)
        at = np.minimum(np.searchsorted(taken, items), max(len(taken) - 1, 0))
        before = np.where(taken[at] == items, counts[at], 0) if len(taken) else np.zeros(len(items), np.int64)
        parts.append(Slice(np.full(len(items), user), items, labels > 0, before))
    return Slice(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def train(config: Config, dataset: Dataset, folder: CheckpointFolder) -> tuple[Slice, Scores, int]:
    """Train, resuming from the newest checkpoint.

    Returns:
        The held-out slice, the probabilities of the model and of the baselines, and the steps of an epoch.
    """
    settings = config.train
    trained, ends = cuts(config, dataset)
    sampler: NegativeSampler | None = None
    drawn: Negatives | None = None
    held_out: Negatives | None = None
    if settings.negatives:
        histories, period = dataset.histories(), settings.negative_period
        sampler = NegativeSampler(histories, period, trained)
        drawn = sampler.draw(settings.negatives, np.random.default_rng(settings.seed))
        beside = NegativeSampler(histories, period, ends)
        held_out = beside.draw(settings.negatives, np.random.default_rng(HELD_OUT_SEED))
    # Half of the training events stand for the history, so that the baselines see repeats as the test has them.
    past = columns(dataset, np.zeros_like(trained), trained, drawn)
    newer = columns(dataset, trained // 2, trained, drawn)
    held = columns(dataset, trained, ends, held_out)

    vocabularies = make_vocabularies(dataset, past.items)
    model = make_ranker(config.model, config.schema, vocabularies.items.rows, rngs=nnx.Rngs(settings.seed))
    fill_columns(model, dataset, vocabularies)
    biases = fit_biases(past, settings.seed)
    start_from_biases(model, vocabularies.items, biases)
    bucket = Bucket(settings.tokens, settings.candidates)
    packer = Packer(dataset, vocabularies, config.layout, bucket)
    steps = fit(config, model, vocabularies, packer, trained, sampler, folder)

    scores = baselines(past, newer, held, biases)
    return held, scores | {config.model.name: predict(config, model, packer, trained, ends, held_out)}, steps


def fit_biases(past: Slice, seed: int) -> list[BiasModel]:
    """The logistic model of user and item, task by task."""
    chosen = np.arange(len(past.users))
    if len(chosen) > BIAS_MODEL_ROWS:
        chosen = np.random.default_rng(seed).choice(chosen, BIAS_MODEL_ROWS, replace=False)
    users, items = past.users[chosen], past.items[chosen]
    return [fit_bias_model(users, items, truth, regularisation_c=BIAS_MODEL_C) for truth in past.labels[chosen].T]


def baselines(past: Slice, newer: Slice, held: Slice, biases: Sequence[BiasModel]) -> Scores:
    """What the model has to beat, fitted task by task on the training events."""
    by_task: dict[str, list[np.ndarray]] = {"item mean": [], "user + item": []}
    for truth, bias_model in zip(past.labels.T, biases, strict=True):
        by_task["item mean"].append(item_mean(past.items, truth, held.items, strength=ITEM_MEAN_STRENGTH))
        by_task["user + item"].append(bias_model.predict(held.users, held.items))
    if newer.before.any() and held.before.any():
        by_task["times before"] = [fit_repeat_model(newer.before, t).predict(held.before) for t in newer.labels.T]
    return {name: np.stack(columns, axis=1) for name, columns in by_task.items()}


def start_from_biases(model: Ranker, vocabulary: Vocabulary, biases: Sequence[BiasModel]) -> None:
    """Begin where the logistic models end: with their item biases and intercepts, task by task."""
    item_bias, logit_b = np.array(model.item_bias[...]), np.array(model.head["logit_b"][...])
    for task, bias_model in enumerate(biases):
        item_bias[vocabulary.lookup(bias_model.item.keys), task] = bias_model.item.values
        logit_b[task] = bias_model.intercept
    item_bias[0] = 0.0
    model.item_bias[...], model.head["logit_b"][...] = jnp.asarray(item_bias), jnp.asarray(logit_b)


def report(config: Config, held: Slice, scores: Scores, steps: int) -> dict[str, Any]:
    """Print a table for each task, warn of a miss, and save the figures beside the checkpoint."""
    ours = config.model.name
    figures: dict[str, Any] = {
        "slice": "validation" if config.train.validation else "test",
        "steps": steps,
        "tasks": {},
    }
    for task, name in enumerate(config.schema.tasks):
        truth = held.labels[:, task]
        rows = {model: evaluate(held.users, truth, p[:, task]) for model, p in scores.items()}
        differences = {}
        if len(config.schema.tasks) > 1:
            print(f"task {name}")
        print(table(rows))
        for other in rows:
            if other == ours:
                continue
            mean, low, high = difference_interval(held.users, truth, scores[ours][:, task], scores[other][:, task])
            differences[other] = [mean, low, high]
            print(f"per-user AUC, {ours} minus {other}: {mean:+.4f} (95 % interval {low:+.4f} .. {high:+.4f})")
            if rows[ours].auc <= rows[other].auc or high < 0:
                print(f"warning: {ours} does not beat {other} in this run")
        figures["tasks"][name] = {
            "models": {model: dataclasses.asdict(quality) for model, quality in rows.items()},
            "user_auc_difference": differences,
        }
    (Path(config.train.checkpoint) / "quality.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main()
