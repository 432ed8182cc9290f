"""The training loop: packed batches in, weights out, one checkpoint an epoch."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from flame_jax.config import Config
from flame_jax.models.checkpoint import Checkpoint, CheckpointError, CheckpointFolder
from flame_jax.models.params import Column
from flame_jax.models.ranker import Ranker
from flame_jax.models.serving import flat_weights, load_weights, unpack
from flame_jax.schema import feature_field
from flame_jax.training.examples import Batch, Negatives, Packer, held_out_examples, sample_examples
from flame_jax.training.negatives import NegativeSampler
from flame_jax.vocabulary import UNKNOWN_ROW, Vocabularies

_FREE = ("checkpoint", "epochs", "tiles_at_once")
"""Settings of training that may change when it is resumed."""
_SHOW_EVERY = 20
"""Steps between two looks at the loss: each waits for the device."""


def fit(
    config: Config,
    model: Ranker,
    vocabularies: Vocabularies,
    packer: Packer,
    trained: np.ndarray,
    negatives: NegativeSampler | None,
    folder: CheckpointFolder,
) -> int:
    """Train `model` in place for the epochs that the newest checkpoint has not seen yet.

    Args:
        trained: int64[users], events of each user that are trained on.
        negatives: draws new negatives for each epoch, beside those events.

    Returns:
        Steps of the first epoch; the others take as many but for the random cuts.
    """
    settings = config.train

    def draw(epoch: int) -> tuple[list[Any], Negatives | None]:
        """The epoch's groups of examples and its negatives."""
        random = np.random.default_rng((settings.seed, epoch))
        drawn = None if negatives is None else negatives.draw(settings.negatives, random)
        examples = sample_examples(
            trained, packer.moments, chunk=settings.chunk, min_history=settings.min_history, random=random
        )
        return packer.groups(examples, drawn), drawn

    steps = len(draw(0)[0])
    if not steps:
        raise ValueError("no user has an event to train on")
    optimizer = make_optimizer(config, steps * settings.epochs)
    state = optimizer.init(nnx.state(model, nnx.Param))
    fixed = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _FREE}
    begun = 0
    if (checkpoint := folder.latest()) is not None:
        checkpoint.check_fits(config.model, config.schema, folder.path)
        check_resumable(checkpoint, fixed, vocabularies, folder.path, len(jax.tree.leaves(state)))
        check_columns(checkpoint, flat_weights(model), folder.path)
        load_weights(model, checkpoint.weights)
        state = jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(leaf) for leaf in checkpoint.optimizer])
        begun = checkpoint.step
    if begun >= settings.epochs:
        print(f"checkpoint {folder.path} has all {settings.epochs} epochs: nothing to train")
        return steps
    graph, *parts = nnx.split(model, nnx.Param, Column)
    weights, columns = parts
    step = make_step(config, partial(nnx.merge, graph), columns, optimizer, packer)
    for epoch in range(begun, settings.epochs):
        groups, drawn = draw(epoch)
        bar = tqdm(groups, desc=f"epoch {epoch + 1}/{settings.epochs}", unit="batch", mininterval=_bar_seconds())
        total = jnp.zeros(())
        key = jax.random.key(settings.seed * 1000 + epoch)
        for number, group in enumerate(bar, start=1):
            batch = packer.pack(group, drawn)
            weights, state, loss = step(weights, state, batch, jax.random.fold_in(key, number))
            total += loss
            if number % _SHOW_EVERY == 0 or number == len(groups):
                bar.set_postfix(loss=f"{float(total) / number:.4f}", refresh=False)
        nnx.update(model, weights)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        folder.save(
            Checkpoint(epoch + 1, config.model, config.schema, vocabularies, flat_weights(model), leaves, fixed)
        )
    return steps


def _bar_seconds() -> float:
    """Between two states of a progress bar: in a log each is a line."""
    return 0.1 if sys.stderr.isatty() else 10.0


def check_resumable(
    checkpoint: Checkpoint, fixed: dict[str, Any], vocabularies: Vocabularies, path: Path, leaves: int
) -> None:
    """Raise CheckpointError, naming what differs, unless training may go on from a checkpoint.

    Args:
        fixed: the settings that decide what is trained on.
        leaves: arrays in the optimiser's state.
    """
    if len(checkpoint.optimizer) != leaves:
        raise CheckpointError(
            f"checkpoint {path} can't be resumed: it holds no state of this optimiser (weights brought from elsewhere?)"
        )
    changed = [f"train.{name}" for name, value in fixed.items() if checkpoint.training.get(name) != value]
    theirs = {"items": checkpoint.vocabularies.items, **checkpoint.vocabularies.features}
    ours = {"items": vocabularies.items, **vocabularies.features}
    changed += [f"the vocabulary of {name}" for name in ours if not np.array_equal(theirs[name].keys, ours[name].keys)]
    if changed:
        raise CheckpointError(
            f"checkpoint {path} can't be resumed, for {', '.join(changed)} changed: remove the folder, or name another "
            f"train.checkpoint, to train anew"
        )


def check_columns(checkpoint: Checkpoint, weights: dict[str, np.ndarray], path: Path) -> None:
    """Raise CheckpointError unless a checkpoint's columns are those of the store."""
    for name, weight in weights.items():
        if name.startswith("columns/") and not np.array_equal(checkpoint.weights.get(name, ()), weight):
            raise CheckpointError(
                f"checkpoint {path} can't be resumed, for the store's {name.removeprefix('columns/')} changed: remove "
                f"the folder to train anew"
            )


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients and a one-cycle schedule of `steps`."""
    schedule = optax.cosine_onecycle_schedule(steps, config.train.learning_rate, pct_start=0.2)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=config.train.weight_decay, mask=decayed),
    )


def decayed(weights: Any) -> Any:
    """Which weights decay: matrices and embedding tables, not biases, norms, temperatures."""
    kept = ("_b", "_scale", "_shift", "temperature", "bias")

    def decays(path: Any, _: Any) -> bool:
        group, name = str(path[0].key), str(path[-2].key)
        return group == "features" or not name.endswith(kept)

    return jax.tree.map_with_path(decays, weights)


def make_step(config: Config, merge: Any, columns: Any, optimizer: optax.GradientTransformation, packer: Packer) -> Any:
    """Compile one step: (weights, optimiser state, batch, key) -> (weights, state, loss).

    Args:
        merge: (weights, columns) -> model.
    """
    settings = config.train

    def loss_of(weights: Any, words: jax.Array, labels: jax.Array, mask: jax.Array, key: jax.Array) -> jax.Array:
        forget, key = jax.random.split(key)
        packed = forget_ids(unpack(words, packer.slot), config, forget)
        logits = merge(weights, columns)(
            packed,
            layout=config.layout,
            candidates=settings.candidates,
            drop=Dropout(settings.dropout, key),
            tiles_at_once=settings.tiles_at_once,
        )
        losses = optax.sigmoid_binary_cross_entropy(logits, labels).mean(axis=-1)
        loss: jax.Array = (losses * mask).sum() / mask.sum()
        return loss

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Any, state: Any, words: Any, labels: Any, mask: Any, key: jax.Array) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(weights, words, labels, mask, key)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    def run(weights: Any, state: Any, batch: Batch, key: jax.Array) -> Any:
        return step(weights, state, batch.words, batch.labels, batch.mask, key)

    return run


def forget_ids(packed: dict[str, jax.Array], config: Config, key: jax.Array) -> dict[str, jax.Array]:
    """Put the out-of-vocabulary row in place of some ids, so that it is trained too."""
    ids = ["item", *(feature_field(group, f) for group, f in config.schema.slot_features if f.kind == "id")]
    forgotten = dict(packed)
    for number, name in enumerate(ids):
        chosen = jax.random.bernoulli(jax.random.fold_in(key, number), config.train.unknown_rate, packed[name].shape)
        if name == "item" and config.schema.interleave:
            chosen &= packed[name] >= 0  # a row that holds an action has no item to forget
        forgotten[name] = jnp.where(chosen, UNKNOWN_ROW, packed[name])
    return forgotten


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


def predict(
    config: Config, model: Ranker, packer: Packer, starts: np.ndarray, stops: np.ndarray, negatives: Negatives | None
) -> np.ndarray:
    """float64[n, tasks] probabilities for events [start, stop) of every user and their negatives, in order."""
    graph, weights = nnx.split(model)

    @jax.jit
    def forward(weights: Any, words: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, weights)(
            unpack(words, packer.slot),
            layout=config.layout,
            candidates=config.train.candidates,
            tiles_at_once=config.train.tiles_at_once,
        )
        return jax.nn.sigmoid(logits)

    room = config.train.tokens - config.layout.aligned(config.schema.history_rows)
    room = min(config.train.candidates, room // config.layout.align * config.layout.align)
    most = max(1, room // (1 + config.train.negatives))
    pieces = []
    for group in packer.groups(held_out_examples(starts, stops, packer.moments, most=most), negatives):
        batch = packer.pack(group, negatives)
        scores = np.asarray(forward(weights, batch.words), np.float64)
        pieces += [scores[first : first + count] for _, first, count in batch.examples]
    return np.concatenate([np.empty((0, len(config.schema.tasks))), *pieces])
