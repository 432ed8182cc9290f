"""Every model under one budget, on the data sets that training knows: `python -m bench.quality --jobs 2`.

Learning rates are chosen on the validation slice, one for each model; the test slice is scored with those, by several
seeds. Each run is a `python -m flame_jax.train` of its own; a run that has finished is not repeated. The figures go to
`--out`, the page `docs/quality.md` is made of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.environment import describe
from bench.quality_page import write_page
from flame_jax.commandline import load
from flame_jax.config import Config, HstuConfig
from flame_jax.data.known import DATASETS
from flame_jax.models.cost import request_cost
from flame_jax.schema import Block

PROG = "python -m bench.quality"
MODELS = (
    "climber",
    "climber without adaptive layer",
    "climber without fusion",
    "transformer",
    "hstu dlrm_v3",
    "hstu recsys_examples",
    "hstu research",
)
RATES = (0.0005, 0.001, 0.002)
CANDIDATES = 100
"""Of the request whose cost is shown beside the quality."""
TIME_ROWS = 1025
"""Rows of DLRMv3's time table: two years at sqrt(minutes)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, save the figures, write the page."""
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--dataset", action="append", choices=sorted(DATASETS), help="default: all of them")
    add("--model", action="append", choices=MODELS, help="train only these variants; default: all of them")
    add("--seeds", type=int, default=3)
    add("--rates", type=float, nargs="+", default=RATES, help="learning rates tried on the validation slice")
    add("--jobs", type=int, default=1, help="runs at once")
    add("--work", default="runs/quality", metavar="DIR", help="checkpoints and logs")
    add("--out", default="bench/results", metavar="DIR", help="one folder of figures for each data set")
    add("--page", default="docs/quality.md", metavar="FILE")
    add("--commit", help="of this checkout, where git can't tell")
    add("--page-only", action="store_true", help="train nothing: write the page of the figures in --out")
    add("--set", nargs=argparse.REMAINDER, default=[], help="settings for every run, as flags of flame_jax.train")
    args = parser.parse_args(argv)
    for name in args.dataset or sorted(DATASETS):
        if not args.page_only:
            command = shlex.join([*PROG.split(), *(sys.argv[1:] if argv is None else argv)])
            save(Path(args.out) / f"quality_{name}" / "quality.json", compare(name, args, command))
    write_page(Path(args.out), Path(args.page))


def save(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures of one data set; those of models that were not trained now stay, if nothing else differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        earlier = json.loads(path.read_text())
        same = all(earlier.get(name) == figures[name] for name in ("dataset", "budget", "device", "versions"))
        if left := [name for name in earlier["runs"] if name not in figures["runs"]]:
            if not same:
                raise SystemExit(
                    f"{PROG}: error: {path} has figures of another budget or machine for {', '.join(left)}"
                )
            for part in ("flops", "learning_rates", "validation_auc", "runs"):
                figures[part] = earlier[part] | figures[part]
    path.write_text(json.dumps(figures, indent=1) + "\n")


def variants(base: Config) -> dict[str, Config]:
    """The compared models: as many history events, batches and epochs, the same width and depth."""
    length = base.schema.block_length * len(base.schema.blocks)
    found = {
        "climber": base,
        "climber without adaptive layer": _climber(base, adaptive=False),
        "climber without fusion": _climber(base, fusion=False),
        "transformer": _one_block(base, "transformer", length),
    }
    for variant in ("dlrm_v3", "recsys_examples", "research"):
        rows = length * (2 if variant == "recsys_examples" else 1)
        one = _one_block(base, "hstu", length, interleave=variant == "recsys_examples")
        options = HstuConfig(
            variant=variant,
            value_dim=base.model.head_dim,
            attention_divisor=rows,
            time_rows=TIME_ROWS if variant == "dlrm_v3" else 0,
            bias_positions=rows,
        )
        position_rows = 0 if variant == "research" else rows + 1
        found[f"hstu {variant}"] = replace(one, model=replace(one.model, hstu=options, position_rows=position_rows))
    return {name: replace(c, model=replace(c.model, name=name)) for name, c in found.items()}


def _climber(base: Config, **changed: bool) -> Config:
    return replace(base, model=replace(base.model, climber=replace(base.model.climber, **changed)))


def _one_block(base: Config, architecture: str, length: int, *, interleave: bool = False) -> Config:
    """A model that reads one block of `length` events; its slots have room for as many requests as the base's."""
    schema = replace(base.schema, blocks=(Block("all"),), block_length=length, interleave=interleave)
    model = replace(base.model, architecture=architecture, position_rows=length + 1)  # type: ignore[arg-type]
    longer = schema.history_rows // base.schema.history_rows
    histories = (base.train.tokens - base.train.candidates) * longer
    return replace(
        base, schema=schema, model=model, train=replace(base.train, tokens=base.train.candidates + histories)
    )


def compare(dataset: str, args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Train every variant of one data set, `args.jobs` runs at once."""
    known = DATASETS[dataset]
    base = load(["--config", known.config, *args.set], prog=PROG)
    known.ensure(base.store.path)
    models = {name: c for name, c in variants(base).items() if not args.model or name in args.model}
    work = Path(args.work) / dataset

    def run_all(title: str, runs: dict[str, Config]) -> dict[str, Any]:
        with ThreadPoolExecutor(args.jobs) as pool:
            done = pool.map(lambda item: run(work / item[0], item[1]), runs.items())
            return dict(zip(runs, tqdm(done, desc=f"{dataset}: {title}", total=len(runs)), strict=True))

    rates = dict.fromkeys(models, args.rates[0])
    task = base.schema.tasks[0]
    if len(args.rates) > 1:
        tried = run_all(
            "learning rates",
            {
                _folder(name, f"rate{rate}"): with_training(c, learning_rate=rate, validation=True)
                for name, c in models.items()
                for rate in args.rates
            },
        )
        for name in models:
            auc = {r: _auc(tried[_folder(name, f"rate{r}")], task, name) for r in args.rates}
            rates[name] = max(auc, key=auc.__getitem__)
    tested = run_all(
        "test",
        {
            _folder(name, f"seed{seed}"): with_training(c, learning_rate=rates[name], seed=seed)
            for seed in range(args.seeds)
            for name, c in models.items()
        },
    )
    return describe(command, args.commit) | {
        "dataset": dataset,
        "budget": asdict(base.train) | {"width": base.model.width, "layers": base.model.layers},
        "flops": {
            name: request_cost(c.model, c.schema, c.schema.history_rows, CANDIDATES).layers
            for name, c in models.items()
        },
        "learning_rates": rates,
        "validation_auc": validation_aucs(work, list(models), task),
        "runs": {name: [tested[_folder(name, f"seed{seed}")] for seed in range(args.seeds)] for name in models},
    }


def validation_aucs(work: Path, models: Sequence[str], task: str) -> dict[str, dict[str, float]]:
    """AUC of the first task by model and learning rate, of the rates that were tried."""
    found: dict[str, dict[str, float]] = {}
    for name in models:
        start = _folder(name, "rate")
        runs = sorted(work.glob(f"{start}*/checkpoint/quality.json"))
        rates = {path.parent.parent.name.removeprefix(start): json.loads(path.read_text()) for path in runs}
        found[name] = {rate: _auc(figures, task, name) for rate, figures in rates.items()}
    return found


def _folder(name: str, run_name: str) -> str:
    return f"{name.replace(' ', '_')}_{run_name}"


def _auc(figures: dict[str, Any], task: str, name: str) -> float:
    auc: float = figures["tasks"][task]["models"][name]["auc"]
    return auc


def with_training(config: Config, **changed: object) -> Config:
    """The configuration with other settings of training."""
    return replace(config, train=replace(config.train, **changed))  # type: ignore[arg-type]


def run(folder: Path, config: Config) -> dict[str, Any]:
    """Train in a process of its own, unless it was done before, and return its figures."""
    figures = folder / "checkpoint" / "quality.json"
    config = with_training(config, checkpoint=str(folder / "checkpoint"))
    settings = json.dumps(asdict(config))
    saved = folder / "config.json"
    if (saved.exists() or figures.exists()) and not (saved.exists() and saved.read_text() == settings):
        raise SystemExit(f"{PROG}: error: {folder} holds a run of other settings: remove it, or name another --work")
    if not figures.exists():
        folder.mkdir(parents=True, exist_ok=True)
        saved.write_text(settings)
        command = [sys.executable, "-m", "flame_jax.train", "--config", str(saved)]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with (folder / "log").open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if done.returncode:
            raise SystemExit(f"{PROG}: error: {folder / 'log'} ends with status {done.returncode}")
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


if __name__ == "__main__":
    main()
