"""`python -m bench.pda MODE [--out DIR]`: what features cost on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from bench import modes
from bench.modes import Mode
from bench.pda import assembly, faults, host_rows, staleness, transfers
from bench.pda import table as ablation
from flame_jax.commandline import load

say = partial(print, flush=True)

MODES = {
    "assembly": Mode("from features to a record, and into a slot", lambda args: assembly.assembly(say), assembly.table),
    "faults": Mode("a store that fails, in the modes of the cache", lambda args: faults.faults(say), faults.table),
    "rows": Mode(
        "rows of an item table in host memory; takes 5 GB of memory and of disk",
        lambda args: host_rows.host_rows(say),
        host_rows.table,
    ),
    "staleness": Mode(
        "what answers without waiting cost in AUC; needs what `make demo` makes",
        lambda args: staleness.staleness(load(["--config", "configs/demo.yaml"], prog="bench.pda"), say),
        staleness.table,
    ),
    "table": Mode(
        "FLAME's Table 3: what the cache and the way to the device are worth; on a GPU with the model, else without",
        lambda args: ablation.ablation(
            load(["--config", "configs/climber_base.yaml"], prog="bench.pda"), say, ablation.Size(seconds=args.seconds)
        ),
        ablation.table,
        lambda result: {"table": ablation.plot(result)},
    ),
    "transfers": Mode(
        "a batch to the device and scores back, beside JAX's plain way",
        lambda args: transfers.transfers(say),
        transfers.table,
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write MODE.json, and a drawing where there is one."""
    parser = argparse.ArgumentParser(prog="python -m bench.pda", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="that each row of --table is measured (%(default)s)"
    )
    modes.run("bench.pda", MODES, parser, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
