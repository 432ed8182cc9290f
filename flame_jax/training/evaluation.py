"""How good a ranking is: AUC, per-user AUC with a bootstrap interval over users, and log loss. No JAX.

The per-user AUC is the unweighted mean of each user's own AUC, over the users who have both labels: a user
whose test events all carry one label ranks nothing and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

INTERVAL = (2.5, 97.5)
"""Percentiles between which a 95% interval lies."""


class UserAucs(NamedTuple):
    """The AUC of each user who has both labels.

    Attributes:
        users: int64[U], ascending, without repeats.
        aucs: float64[U] in [0, 1]; a tie between a positive and a negative counts one half.
    """

    users: NDArray[np.int64]
    aucs: NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """What one model scores on one set of labelled events.

    Attributes:
        auc: over all events at once.
        user_auc: unweighted mean AUC over the counted users.
        user_auc_low: lower end of the 95% bootstrap interval of `user_auc`.
        user_auc_high: its upper end.
        log_loss: mean over all events, in nats.
        users: users counted in `user_auc`: those with both labels.
        events: all events, those of users left out of `user_auc` included.
    """

    auc: float
    user_auc: float
    user_auc_low: float
    user_auc_high: float
    log_loss: float
    users: int
    events: int


def per_user_auc(users: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> UserAucs:
    """The AUC of each user over that user's own events; users with one label only are left out.

    Args:
        users: int[N], any ids, in any order.
        labels: bool[N], or 0 and 1.
        scores: float[N]; only their order within a user matters. Infinities are allowed.

    Returns:
        The users with both labels and their AUCs, possibly none.

    Raises:
        ValueError: the arrays are not one-dimensional and of one length, a label is neither 0 nor 1, or a
            score is NaN.
    """
    ids, truth, values = _events(users, labels, scores)
    order = np.lexsort((values, ids))
    ids, truth, values = ids[order], truth[order], values[order]
    new_user = _starts(ids)
    tie_start = np.flatnonzero(new_user | _starts(values))
    user_start = np.flatnonzero(new_user)
    user_of_tie = np.cumsum(new_user)[tie_start] - 1

    # Each run of equal scores wins against every negative below it and half of those within it.
    positives, negatives = _run_sums(truth, tie_start), _run_sums(~truth, tie_start)
    user_positives, user_negatives = _run_sums(truth, user_start), _run_sums(~truth, user_start)
    below = np.cumsum(negatives) - negatives - (np.cumsum(user_negatives) - user_negatives)[user_of_tie]
    wins = np.bincount(user_of_tie, weights=positives * (below + 0.5 * negatives), minlength=len(user_start))

    pairs = user_positives * user_negatives
    both = pairs > 0
    return UserAucs(ids[user_start][both].astype(np.int64), wins[both] / pairs[both])


def evaluate(
    users: ArrayLike, labels: ArrayLike, probabilities: ArrayLike, *, seed: int = 0, resamples: int = 1000
) -> Quality:
    """Every figure for one model on one set of events.

    Args:
        users: int[N], any ids, in any order.
        labels: bool[N], or 0 and 1.
        probabilities: float32[N] or float64[N] in [0, 1], of the label being true. The log loss clips them to
            [eps, 1 - eps], eps being that of their dtype, so that a rounded 0 or 1 costs a finite amount.
        seed: of the bootstrap; the same seed and users give the same interval.
        resamples: number of bootstrap resamples, each as many users as are counted, drawn with replacement.

    Raises:
        ValueError: the arrays are not one-dimensional and of one length, a label is neither 0 nor 1, a
            probability is NaN or outside [0, 1], no user has both labels, or `resamples` is less than 1.
    """
    from sklearn.metrics import log_loss, roc_auc_score  # of the extra `demo`, needed only here

    _, truth, values = _events(users, labels, probabilities)
    if np.any((values < 0) | (values > 1)):
        raise ValueError(f"probabilities must lie in [0, 1], not [{values.min()}, {values.max()}]")
    aucs = per_user_auc(users, labels, probabilities).aucs
    low, high = _bootstrap(aucs, seed, resamples)
    return Quality(
        auc=float(roc_auc_score(truth, values)),
        user_auc=float(aucs.mean()),
        user_auc_low=low,
        user_auc_high=high,
        log_loss=float(log_loss(truth, values, labels=[False, True])),
        users=len(aucs),
        events=len(truth),
    )


def difference_interval(
    users: ArrayLike, labels: ArrayLike, ours: ArrayLike, theirs: ArrayLike, *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float, float]:
    """How much higher our per-user AUC is than theirs on the same events, paired by user.

    Args:
        users: int[N], any ids, in any order.
        labels: bool[N], or 0 and 1.
        ours: float[N], scores of our model.
        theirs: float[N], scores of the other; the two need not share a scale.
        seed: of the bootstrap over users.
        resamples: number of bootstrap resamples.

    Returns:
        Mean difference of the users' AUCs (ours - theirs) and the ends of its 95% bootstrap interval.

    Raises:
        ValueError: the arrays are not one-dimensional and of one length, a label is neither 0 nor 1, a score
            is NaN, no user has both labels, or `resamples` is less than 1.
    """
    # Which users have both labels depends on the labels alone, so the two results align.
    differences = per_user_auc(users, labels, ours).aucs - per_user_auc(users, labels, theirs).aucs
    low, high = _bootstrap(differences, seed, resamples)
    return float(differences.mean()), low, high


def table(rows: dict[str, Quality]) -> str:
    """The figures as an aligned table in plain text: a header, then a line for each model, in order; no last newline.

    Args:
        rows: the figures by the model's name.
    """
    header = ("model", "AUC", "user AUC", "95% interval", "log loss", "users", "events")
    cells = [header, *((name, *_cells(quality)) for name, quality in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells)
    return "\n".join("  ".join(line) for line in lines)


def _cells(quality: Quality) -> tuple[str, ...]:
    interval = f"{quality.user_auc_low:.4f} .. {quality.user_auc_high:.4f}"
    figures = (f"{quality.auc:.4f}", f"{quality.user_auc:.4f}", interval, f"{quality.log_loss:.4f}")
    return (*figures, str(quality.users), str(quality.events))


def _events(users: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[Any], ...]:
    """The three as arrays, labels as bool, checked."""
    ids, truth, values = np.asarray(users), np.asarray(labels), np.asarray(scores)
    if ids.ndim != 1 or not ids.shape == truth.shape == values.shape:
        raise ValueError(f"users {ids.shape}, labels {truth.shape} and scores {values.shape} must be of one length")
    if not np.all((truth == 0) | (truth == 1)):
        raise ValueError("labels must be 0 or 1")
    if np.any(np.isnan(values)):
        raise ValueError("scores must not be NaN")
    return ids, truth.astype(np.bool_), values


def _starts(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a run of equal values starts."""
    return np.concatenate([np.ones(min(len(values), 1), np.bool_), values[1:] != values[:-1]])


def _run_sums(flags: NDArray[np.bool_], starts: NDArray[np.intp]) -> NDArray[np.int64]:
    """How many flags are set in each run."""
    sums: NDArray[np.int64] = np.add.reduceat(flags, starts, dtype=np.int64)
    return sums


def _bootstrap(values: NDArray[np.float64], seed: int, resamples: int) -> tuple[float, float]:
    """Ends of the 95% percentile interval of the mean, the values resampled with replacement."""
    if len(values) == 0:
        raise ValueError("no user has both labels")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    random = np.random.default_rng(seed)
    means = [values[random.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, INTERVAL)
    return float(low), float(high)
