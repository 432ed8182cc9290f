"""What it costs to bring a batch of 64 KB to the device and scores back, beside JAX's plain way.

The program between is trivial: it adds up what it is given, so that all of it must be there. The ways differ in how the
batch comes to the device, in where the program leaves the scores, and in how they are waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxlib import xla_client

from bench.timing import Launch
from flame_jax.packing import Bucket, Field, SlotLayout
from flame_jax.pda.page_lock import PageLock
from flame_jax.pda.staging import Slot

WORDS = 64 * 1024 // 4
SCORES = (1024, 4)
CALLS, ROUNDS, WARM = 2000, 10, 5
REACH_US = 120.0


def _layout() -> SlotLayout:
    bucket = Bucket(*SCORES)
    int32 = np.dtype(np.int32)
    words = WORDS - 64
    return SlotLayout(bucket, (Field("rows", 0, (1, 64), int32), Field("item", 64, (words,), int32)), WORDS)


def _program(device: jax.Device, to_host: bool) -> jax.stages.Compiled:
    def run(words: jax.Array) -> jax.Array:
        scores = jnp.broadcast_to(words.astype(jnp.float32).sum(), SCORES)
        return jax.device_put(scores, jax.memory.Space.Host) if to_host else scores

    words = jax.device_put(np.zeros(WORDS, np.int32), device)
    return jax.jit(run).lower(words).compile()


def _spun(result: Any) -> np.ndarray:
    while not result.is_ready():
        pass
    return np.asarray(result)


def _yielded(result: Any) -> np.ndarray:
    while not result.is_ready():
        time.sleep(0)
    return np.asarray(result)


def ways(device: jax.Device) -> dict[str, tuple[Launch, Callable[[Any], np.ndarray]]]:
    """Name -> what starts a batch and what waits for its scores."""
    slot, ordinary = Slot(_layout()), np.ones(WORDS, np.int32)
    PageLock(device).lock(slot)
    slot.fill()["item"].fill(1)
    locked = slot.launch()
    plain, pinned = _program(device, False), _program(device, True)
    fields = np.array_split(ordinary, 20)
    join = jax.jit(jnp.concatenate)

    shape, there = jax.core.ShapedArray((WORDS,), np.dtype(np.int32)), jax.sharding.SingleDeviceSharding(device)

    def put() -> Any:
        return xla_client.batched_device_put(shape, there, [locked], [device])

    def one_by_one() -> Any:
        return plain(join([jax.device_put(field, device) for field in fields]))

    return {
        "20 arrays, joined on the device": (one_by_one, np.asarray),
        "plain JAX": (lambda: plain(ordinary), np.asarray),
        "plain, by jax.device_put": (lambda: plain(jax.device_put(ordinary, device)), np.asarray),
        "slot": (lambda: plain(locked), np.asarray),
        "pinned scores": (lambda: pinned(ordinary), np.asarray),
        "slot, pinned scores": (lambda: pinned(locked), np.asarray),
        "slot by batched_device_put, pinned scores": (lambda: pinned(put()), np.asarray),
        "slot, pinned scores, waited for by spinning": (lambda: pinned(locked), _spun),
        "slot, pinned scores, waited for by yielding": (lambda: pinned(locked), _yielded),
    }


def transfers(progress: Callable[[str], None], calls: int = CALLS, rounds: int = ROUNDS) -> dict[str, Any]:
    """A row per way, in turn within a round: microseconds from host to host, and of it until the launch returned."""
    device = jax.devices()[0]
    found = ways(device)
    taken: dict[str, list[float]] = {name: [] for name in found}
    launched: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, (launch, wait) in found.items():
            for number in range(-(-calls // rounds) + WARM):
                begun = time.perf_counter()
                result = launch()
                returned = time.perf_counter()
                scores = wait(result)
                ended = time.perf_counter()
                if number >= WARM:
                    taken[name].append((ended - begun) * 1e6)
                    launched[name].append((returned - begun) * 1e6)
        assert scores[0, 0] == scores[-1, -1] > 0
    rows = []
    for name, us in taken.items():
        p50, p99 = map(float, np.percentile(us, (50, 99)))
        rows.append({"way": name, "p50_us": p50, "p99_us": p99, "launch_us": float(np.median(launched[name]))})
        progress(f"{name}: {p50:.0f} us")
    return {"memory": PageLock(device).memory, "reach_us": REACH_US, "transfers": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows: Sequence[dict[str, Any]] = result["transfers"]
    lines = ["| 64 KB to the device, 16 KB of scores back | us | P99 | of it until the launch returned |"]
    lines += ["|" + "---|" * 4]
    lines += [f"| {r['way']} | {r['p50_us']:.0f} | {r['p99_us']:.0f} | {r['launch_us']:.0f} |" for r in rows]
    return "\n".join(lines)
