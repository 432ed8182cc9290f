"""Processor time of dispatching: all of it is real but lanes, which take an H100's time and compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from bench.artifacts import ITEMS
from bench.dso.load import Load
from bench.dso.simulate import LAYOUT, PAPER, SLOWER, measured
from bench.dso.systems import emulated
from bench.dso.traffic import paper
from flame_jax.commandline import load

LOADS = (0.5, 0.9)


def measure(progress: Callable[[str], None], *, seconds: float) -> dict[str, Any]:
    """The paper's mix in full size on 1, 2 and 4 lanes: at saturation, and at parts of it."""
    config = replace(load(["--config", "configs/climber_long.yaml"], prog="bench.dso"), layout=LAYOUT)
    mix, rows = paper(len(config.schema.blocks)), list[dict[str, Any]]()
    for lanes in SLOWER:
        system = emulated(config, measured(PAPER, lanes), lanes, jax.devices("cpu")[0])
        sends = Load(system, mix, ITEMS)
        most = sends.closed(512, seconds)
        rows.append({"lanes": lanes, "load": "most"} | most._asdict())
        for share in LOADS:
            rows.append({"lanes": lanes, "load": share} | sends.open(share * most.answered, seconds)._asdict())
        system.stop()
        progress(f"{lanes} lanes: {most.host_us_per_batch:.0f} us a batch of {most.requests_per_batch:.1f} requests")
    return {"host": rows}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| lanes | load | requests/s | requests a batch | us a batch | us a request to hand in | mean ms | P99 ms |"
    ]
    lines.append("|" + "---|" * 8)
    lines += [
        f"| {r['lanes']} | {r['load']} | {r['answered']:,.0f} | {r['requests_per_batch']:.1f} "
        f"| {r['host_us_per_batch']:.0f} | {r['host_us_per_request']:.1f} | {r['ms']['mean']:.2f} "
        f"| {r['ms']['p99']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)
