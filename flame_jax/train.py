"""`python -m flame_jax.train --config FILE`: train a ranker on a store's events, beside honest baselines."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from flame_jax.baselines import BiasModel, fit_bias_model, item_mean
from flame_jax.config import Config, load, refuse
from flame_jax.evaluation import Quality, difference_interval, evaluate, table
from flame_jax.examples import Batch, Dataset, Example, Packer, sample_examples, split_points
from flame_jax.models.checkpoint import Checkpoint, CheckpointError, CheckpointFolder
from flame_jax.models.ranker import Ranker
from flame_jax.models.registry import make_ranker
from flame_jax.models.serving import flat_weights, load_weights, unpack
from flame_jax.packing import Bucket
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.store import StoreError
from flame_jax.vocabulary import Vocabulary

PROG = "python -m flame_jax.train"

ITEM_MEAN_STRENGTH = 2.0
BIAS_MODEL_C = 1.0
"""Both chosen by log loss on the validation slice of MovieLens-100K."""


class Split(NamedTuple):
    """Columns of one slice of events: int64[n] users (by number) and item ids, bool[n] labels of the first task."""

    users: np.ndarray
    items: np.ndarray
    labels: np.ndarray


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, print and save the quality table."""
    config = load(argv, prog=PROG)
    if importlib.util.find_spec("sklearn") is None:
        refuse(PROG, "training needs scikit-learn: pip install 'flame-jax[demo]'", status=1)
    try:
        store = LmdbStore(config.store.path, config.schema)
        dataset = Dataset(store, config.schema)
        store.close()
        with CheckpointFolder(config.train.checkpoint) as folder:
            report(config, *train(config, dataset, folder))
    except (StoreError, CheckpointError, ValueError, OSError) as error:
        refuse(PROG, str(error), status=1)
    except KeyboardInterrupt:
        refuse(PROG, "interrupted; run again to go on from the last finished epoch", status=130)


def cuts(config: Config, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Per user: where training ends and where evaluation ends (validation or test slice)."""
    lengths = dataset.lengths()
    test = split_points(lengths, config.train.test_fraction)
    if config.train.validation:
        return split_points(test, config.train.test_fraction), test
    return test, lengths


def columns(dataset: Dataset, starts: np.ndarray, stops: np.ndarray, actions: Sequence[int]) -> Split:
    """Flatten events [start, stop) of every user."""
    users, items, labels = [], [], []
    for number, ((_, record), start, stop) in enumerate(zip(dataset.users, starts, stops, strict=True)):
        users.append(np.full(stop - start, number, np.int64))
        items.append(record.history.item_ids[start:stop])
        labels.append(np.isin(record.history.actions[start:stop], actions))
    return Split(np.concatenate(users), np.concatenate(items), np.concatenate(labels))


def train(config: Config, dataset: Dataset, folder: CheckpointFolder) -> tuple[Split, dict[str, np.ndarray]]:
    """Train, resuming from the newest checkpoint.

    Returns:
        The held-out slice, and probability per event of the model and of both baselines, by name.
    """
    settings = config.train
    check_trainable(config)
    trained, ends = cuts(config, dataset)
    if (widest := int((ends - trained).max(initial=0))) > settings.candidates:
        raise ValueError(f"train.candidates is {settings.candidates}, a user has {widest} held-out events")
    first_task = settings.label_actions[config.schema.tasks[0]]
    past = columns(dataset, np.zeros_like(trained), trained, first_task)
    held = columns(dataset, trained, ends, first_task)
    bias_model = fit_bias_model(past.users, past.items, past.labels, regularisation_c=BIAS_MODEL_C)

    vocabulary = Vocabulary(np.unique(past.items))
    model = make_ranker(config.model, config.schema, vocabulary.rows, rngs=nnx.Rngs(settings.seed))
    start_from_biases(model, vocabulary, bias_model)
    bucket = Bucket(settings.tokens, settings.candidates)
    packer = Packer(dataset, vocabulary, config.layout, bucket, settings.label_actions)
    fit(config, model, vocabulary, packer, trained, folder)

    scores = predict(config, model, packer, trained, ends)
    return held, {
        "item mean": item_mean(past.items, past.labels, held.items, strength=ITEM_MEAN_STRENGTH),
        "user + item": bias_model.predict(held.users, held.items),
        config.model.name: scores,
    }


def check_trainable(config: Config) -> None:
    """Raise ValueError for labels that can't be made; warn of inputs that a store's events can't train."""
    labels = config.train.label_actions
    if missing := set(config.schema.tasks) - set(labels):
        raise ValueError(f"train.label_actions lacks the tasks {sorted(missing)}")
    if bad := {action for actions in labels.values() for action in actions if not 0 <= action < config.schema.actions}:
        raise ValueError(f"train.label_actions names actions {sorted(bad)} outside [0, {config.schema.actions})")
    if config.schema.context_features or len(config.schema.scenarios) > 1:
        print(
            "warning: a store's events carry no context and no scenario: the weights of schema.context_features and "
            "of scenarios beyond the first stay untrained",
            file=sys.stderr,
        )


def start_from_biases(model: Ranker, vocabulary: Vocabulary, biases: BiasModel) -> None:
    """Begin where the logistic model ends: its item biases and intercept, for the first task."""
    item_bias = np.array(model.item_bias[...])
    item_bias[vocabulary.lookup(biases.item.keys), 0] = biases.item.values
    item_bias[0] = 0.0
    model.item_bias[...] = jnp.asarray(item_bias)
    logit_b = np.array(model.head["logit_b"][...])
    logit_b[0] = biases.intercept
    model.head["logit_b"][...] = jnp.asarray(logit_b)


def fit(
    config: Config,
    model: Ranker,
    vocabulary: Vocabulary,
    packer: Packer,
    trained: np.ndarray,
    folder: CheckpointFolder,
) -> None:
    """Train `model` in place for the epochs that the newest checkpoint has not seen yet."""
    settings = config.train
    sample = partial(sample_examples, trained, chunk=settings.chunk, min_history=settings.min_history)
    examples = sample(random=np.random.default_rng(settings.seed))
    if not examples:
        raise ValueError("no user has an event to train on")
    steps = sum(1 for _ in packer.batches(examples))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.cosine_onecycle_schedule(steps * settings.epochs, settings.learning_rate, pct_start=0.2),
            weight_decay=settings.weight_decay,
            mask=decayed,
        ),
    )
    graph, weights = nnx.split(model)
    state = optimizer.init(weights)
    begun = 0
    fixed = {
        name: value for name, value in dataclasses.asdict(settings).items() if name not in ("checkpoint", "epochs")
    }
    if (checkpoint := folder.latest()) is not None:
        checkpoint.check_fits(config.model, config.schema, folder.path)
        check_resumable(checkpoint, fixed, vocabulary, folder.path)
        load_weights(model, checkpoint.weights)
        weights = nnx.state(model)
        state = jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(leaf) for leaf in checkpoint.optimizer])
        begun = checkpoint.step

    if begun >= settings.epochs:
        print(f"checkpoint {folder.path} has all {settings.epochs} epochs: nothing to train")
        return
    step = make_step(config, graph, optimizer, packer)
    for epoch in range(begun, settings.epochs):
        random = np.random.default_rng((settings.seed, epoch))
        batches = list(packer.batches(sample(random=random)))
        bar = tqdm(batches, desc=f"epoch {epoch + 1}/{settings.epochs}", unit="batch")
        total, seen = 0.0, 0
        key = jax.random.key(settings.seed * 1000 + epoch)
        for number, batch in enumerate(bar):
            weights, state, loss = step(weights, state, batch, jax.random.fold_in(key, number))
            total, seen = total + float(loss), seen + 1
            bar.set_postfix(loss=f"{total / seen:.4f}")
        nnx.update(model, weights)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        weights_now = flat_weights(model)
        folder.save(Checkpoint(epoch + 1, config.model, config.schema, vocabulary, weights_now, leaves, fixed))


def check_resumable(checkpoint: Checkpoint, fixed: dict[str, Any], vocabulary: Vocabulary, path: Path) -> None:
    """Raise CheckpointError, naming what differs, unless training may go on from a checkpoint."""
    changed = [f"train.{name}" for name, value in fixed.items() if checkpoint.training.get(name) != value]
    if not np.array_equal(checkpoint.vocabulary.keys, vocabulary.keys):
        changed.append("the store's items")
    if changed:
        raise CheckpointError(
            f"checkpoint {path} can't be resumed, for {', '.join(changed)} changed: remove the folder to train anew"
        )


def decayed(weights: Any) -> Any:
    """Which weights decay: matrices and embedding tables, not biases, norms, temperatures."""
    kept = ("_b", "_scale", "_shift", "temperature", "bias")

    def decays(path: Any, _: Any) -> bool:
        group, name = str(path[0].key), str(path[-2].key)
        return group == "features" or not name.endswith(kept)

    return jax.tree.map_with_path(decays, weights)


def make_step(config: Config, graph: Any, optimizer: optax.GradientTransformation, packer: Packer) -> Any:
    """Compile one step: (weights, optimiser state, batch, key) -> (weights, state, loss)."""
    settings = config.train

    def loss_of(weights: Any, words: jax.Array, labels: jax.Array, mask: jax.Array, key: jax.Array) -> jax.Array:
        model = nnx.merge(graph, weights)
        packed = unpack(words, packer.slot)
        forget, key = jax.random.split(key)
        unknown = jax.random.bernoulli(forget, settings.unknown_rate, packed["item"].shape)
        packed["item"] = jnp.where(unknown, 0, packed["item"])
        logits = model(
            packed, layout=config.layout, candidates=settings.candidates, drop=Dropout(settings.dropout, key)
        )
        losses = optax.sigmoid_binary_cross_entropy(logits, labels).mean(axis=-1)
        loss: jax.Array = (losses * mask).sum() / mask.sum()
        return loss

    @jax.jit
    def step(weights: Any, state: Any, words: Any, labels: Any, mask: Any, key: jax.Array) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(weights, words, labels, mask, key)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    def run(weights: Any, state: Any, batch: Batch, key: jax.Array) -> Any:
        return step(weights, state, batch.words, batch.labels, batch.mask, key)

    return run


class Dropout:
    """Inverted dropout; every call draws its own mask."""

    def __init__(self, rate: float, key: jax.Array) -> None:
        self._rate, self._key, self._calls = rate, key, 0

    def __call__(self, x: jax.Array) -> jax.Array:
        """Zero a share of x and scale the rest."""
        if not self._rate:
            return x
        self._calls += 1
        keep = jax.random.bernoulli(jax.random.fold_in(self._key, self._calls), 1 - self._rate, x.shape)
        kept: jax.Array = jnp.where(keep, x / (1 - self._rate), 0)
        return kept.astype(x.dtype)


def predict(config: Config, model: Ranker, packer: Packer, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """float64[n] probabilities of the first task for events [start, stop) of every user, in order."""
    graph, weights = nnx.split(model)

    @jax.jit
    def forward(weights: Any, words: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, weights)(
            unpack(words, packer.slot), layout=config.layout, candidates=config.train.candidates
        )
        return jax.nn.sigmoid(logits[:, 0])

    offsets = np.concatenate([[0], np.cumsum(stops - starts)])
    out = np.full(offsets[-1], np.nan)
    examples = [Example(user, int(a), int(b)) for user, (a, b) in enumerate(zip(starts, stops, strict=True)) if a < b]
    for batch in packer.batches(examples):
        scores = np.asarray(forward(weights, batch.words))
        for example, first in batch.examples:
            count = example.stop - example.start
            out[offsets[example.user] : offsets[example.user] + count] = scores[first : first + count]
    return out


def report(config: Config, held: Split, scores: dict[str, np.ndarray]) -> dict[str, Quality]:
    """Print the table, warn of a miss, and save the figures beside the checkpoint."""
    rows = {name: evaluate(held.users, held.labels, p) for name, p in scores.items()}
    print(table(rows))
    ours = config.model.name
    figures: dict[str, Any] = {"slice": "validation" if config.train.validation else "test"}
    figures["models"] = {name: dataclasses.asdict(quality) for name, quality in rows.items()}
    figures["user_auc_difference"] = {}
    for name in rows:
        if name == ours:
            continue
        mean, low, high = difference_interval(held.users, held.labels, scores[ours], scores[name])
        figures["user_auc_difference"][name] = [mean, low, high]
        print(f"per-user AUC, {ours} minus {name}: {mean:+.4f} (95 % interval {low:+.4f} .. {high:+.4f})")
        if rows[ours].auc <= rows[name].auc or high < 0:
            print(f"warning: {ours} does not beat {name} in this run")
    (Path(config.train.checkpoint) / "quality.json").write_text(json.dumps(figures, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
