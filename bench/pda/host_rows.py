"""Milliseconds to copy the item rows of a batch from a table in host memory, by the number of threads.

With hot rows those that the device holds too are looked up first, and only the others are copied.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from flame_jax.host_table import Copy, HostTable, find_held, places_of

ROWS, WORDS = 20_000_000, 64
"""Of 128 numbers in bfloat16: 5.1 GB."""
TOKENS, BLOCKS = 16384, 2
"""Of a batch: each block has a row for each token."""
THREADS = (1, 2, 4)
BATCHES = 20
HOT_SHARES = (0.0, 0.005, 0.05)
"""Of the table's rows, the most popular, that the device holds."""
STEP = 1 << 18


def write(path: Path, rows: int) -> np.ndarray:
    """A table, mapped from a file; a row's numbers are the row's."""
    np.lib.format.open_memmap(path, "w+", np.int32, (rows, WORDS)).flush()
    table = np.load(path, mmap_mode="r+")
    for at in range(0, rows, STEP):
        table[at : at + STEP] = np.arange(at, min(at + STEP, rows), dtype=np.int32)[:, None]
    return np.asarray(np.load(path, mmap_mode="r"))


def host_rows(progress: Callable[[str], None], rows: int = ROWS) -> dict[str, Any]:
    """A row per way to ask, uniformly or by Zipf's law, part of the table that the device holds, and threads."""
    random, found = np.random.default_rng(0), []
    share = 1.0 / np.arange(1, rows + 1)
    below = np.cumsum(share) / share.sum()
    place = random.permutation(rows).astype(np.int32)  # popular items lie anywhere
    draws: dict[str, Callable[[], np.ndarray]] = {
        "uniform": lambda: random.integers(0, rows, TOKENS).astype(np.int32),
        "Zipf 1.0": lambda: place[np.minimum(np.searchsorted(below, random.random(TOKENS)), rows - 1)],
    }
    out = np.empty((BLOCKS, TOKENS, WORDS), np.int32)
    with tempfile.TemporaryDirectory() as folder:
        table = write(Path(folder, "table.npy"), rows)
        for (name, draw), share_held, threads in product(draws.items(), HOT_SHARES, THREADS):
            held = place[: int(rows * share_held)]
            places = places_of(held, rows)
            batches = [[draw() for _ in range(BLOCKS)] for _ in range(BATCHES)]
            with closing(HostTable(table, threads)) as rows_of:
                taken = []
                for batch in [*batches, *batches]:  # once for the page tables
                    begun = time.perf_counter()
                    looked_up = places if len(held) else None
                    copies = [_copy(items, block, looked_up) for items, block in zip(batch, out, strict=True)]
                    rows_of.copy(copies)
                    taken.append((time.perf_counter() - begun) * 1e3)
                    for copy in copies:
                        copied = copy.out if copy.at is None else copy.out[copy.at]
                        assert (copied[:, 0] == copy.rows).all()
            copied_share = sum(len(copy.rows) for copy in copies) / (BLOCKS * TOKENS)
            milliseconds = float(np.median(taken[BATCHES:]))
            found.append(
                {"asked": name, "held": len(held), "copied": copied_share, "threads": threads, "ms": milliseconds}
            )
            progress(f"{name}, {len(held)} held, {threads} threads: {milliseconds:.2f} ms")
    return {"table_rows": rows, "row_bytes": 4 * WORDS, "copied_rows": BLOCKS * TOKENS, "host_rows": found}


def _copy(items: np.ndarray, out: np.ndarray, places: np.ndarray | None) -> Copy:
    """What is to be copied, found as `record` finds it."""
    return Copy(items, out) if places is None else find_held(items, places).copy(items, out)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    count = result["copied_rows"]
    lines = [f"| {count} rows asked for | held on the device | copied | threads | ms | ns a row |", "|" + "---|" * 6]
    lines += [
        f"| {r['asked']} | {r['held']:,} | {r['copied']:.0%} | {r['threads']} | {r['ms']:.2f} "
        f"| {r['ms'] / count * 1e6:.0f} |"
        for r in result["host_rows"]
    ]
    return "\n".join(lines)
