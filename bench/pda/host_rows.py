"""Milliseconds to copy the item rows of a batch from a table in host memory, by the number of threads."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from flame_jax.host_table import HostTable

ROWS, WORDS = 20_000_000, 64
"""Of 128 numbers in bfloat16: 5.1 GB."""
TOKENS, BLOCKS = 16384, 2
"""Of a batch: each block has a row for each token."""
THREADS = (1, 2, 4)
BATCHES = 20
STEP = 1 << 18


def write(path: Path, rows: int) -> np.ndarray:
    """A table, mapped from a file; a row's numbers are the row's."""
    np.lib.format.open_memmap(path, "w+", np.int32, (rows, WORDS)).flush()
    table = np.load(path, mmap_mode="r+")
    for at in range(0, rows, STEP):
        table[at : at + STEP] = np.arange(at, min(at + STEP, rows), dtype=np.int32)[:, None]
    return np.asarray(np.load(path, mmap_mode="r"))


def host_rows(progress: Callable[[str], None], rows: int = ROWS) -> dict[str, Any]:
    """A row per way to ask, uniformly or by Zipf's law, and number of threads."""
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
        for name, draw in draws.items():
            batches = [[draw() for _ in range(BLOCKS)] for _ in range(BATCHES)]
            for threads in THREADS:
                with closing(HostTable(table, threads)) as rows_of:
                    taken = []
                    for batch in [*batches, *batches]:  # once for the page tables
                        begun = time.perf_counter()
                        rows_of.copy(list(zip(batch, out, strict=True)))
                        taken.append((time.perf_counter() - begun) * 1e3)
                    assert all((block[:, 0] == items).all() for block, items in zip(out, batch, strict=True))
                milliseconds = float(np.median(taken[BATCHES:]))
                found.append({"asked": name, "threads": threads, "ms": milliseconds})
                progress(f"{name}, {threads} threads: {milliseconds:.2f} ms")
    return {"table_rows": rows, "row_bytes": 4 * WORDS, "copied_rows": BLOCKS * TOKENS, "host_rows": found}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    count = result["copied_rows"]
    lines = [f"| {count} rows asked for | threads | ms | ns a row | GB/s |", "|" + "---|" * 5]
    lines += [
        f"| {r['asked']} | {r['threads']} | {r['ms']:.2f} | {r['ms'] / count * 1e6:.0f} "
        f"| {count * result['row_bytes'] / r['ms'] / 1e6:.1f} |"
        for r in result["host_rows"]
    ]
    return "\n".join(lines)
