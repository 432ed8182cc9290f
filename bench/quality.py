"""`python -m bench.quality --config FILE --out DIR`: the quality table of a trained checkpoint, as a result file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench.environment import describe
from flame_jax.config import load


def main(argv: Sequence[str] | None = None) -> None:
    """Stamp what `flame_jax.train` saved beside the checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, metavar="DIR")
    args = parser.parse_args(argv)
    config = load(["--config", args.config], prog="bench.quality")
    figures = json.loads((Path(config.train.checkpoint) / "quality.json").read_text())
    result = describe(f"python -m flame_jax.train --config {args.config}") | figures
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "quality.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
