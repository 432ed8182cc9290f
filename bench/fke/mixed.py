"""Requests of all lengths in one batch: rows that alignment and buckets waste, and the time of padding them instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from bench.baselines.attention import Flash, SplitSoftmax, cudnn
from bench.fke.cases import AttentionCase
from bench.fke.programs import Maker, bias_given, biased, packed, timed
from bench.fke.roofline import Point
from flame_jax.packing import Bucket, Extent
from flame_jax.pallas_kernels.kernels import Implementation

HISTORY, CANDIDATES = (64, 1024), (16, 512)
"""Smallest and largest, uniform."""
LARGEST = Extent(HISTORY[1], CANDIDATES[1])
REQUESTS = 32
STEP = 1024
"""Rows between one bucket of the ladder and the next."""
DRAWS = 1000
REACH = 1.5
"""Times as fast as padding."""
LIMITS = {"alignment": 0.02, "total": 0.07}
PACKED = "packed"


class Waste(NamedTuple):
    """Token rows of a batch: what the requests have, take when aligned, and what the bucket has that they fit."""

    useful: int
    aligned: int
    bucket: int

    @property
    def alignment(self) -> float:
        """Rows beside the useful ones, as a share of these."""
        return self.aligned / self.useful - 1

    @property
    def total(self) -> float:
        """The same of the whole bucket."""
        return self.bucket / self.useful - 1


def draw(requests: int, random: np.random.Generator) -> tuple[Extent, ...]:
    """Random requests."""
    lengths = [random.integers(low, high + 1, requests).tolist() for low, high in (HISTORY, CANDIDATES)]
    return tuple(Extent(*both) for both in zip(*lengths, strict=True))


def fitting(case: AttentionCase) -> Bucket:
    """The smallest bucket of the ladder that holds a case."""
    return Bucket(*(math.ceil(rows / STEP) * STEP for rows in case.bucket))


def waste(case: AttentionCase) -> Waste:
    """Of a case in the bucket that fits it."""
    return Waste(sum(n + c for n, c in case.extents), case.bucket.tokens, fitting(case).tokens)


def climber(extents: tuple[Extent, ...], align: int) -> AttentionCase:
    """A batch for Climber's attention."""
    return AttentionCase("mixed", 2, 2, 64, softmax=True, extents=extents, align=align)


def spread(requests: int, align: int, draws: int) -> dict[str, dict[str, float]]:
    """Mean and 99th percentile of both shares over random batches."""
    random = np.random.default_rng(1)
    found = [waste(climber(draw(requests, random), align)) for _ in range(draws)]
    shares = {"alignment": [w.alignment for w in found], "total": [w.total for w in found]}
    return {name: {"mean": float(np.mean(x)), "p99": float(np.percentile(x, 99))} for name, x in shares.items()}


def forms(
    extents: tuple[Extent, ...], largest: Extent, implementation: Implementation, kernel: Flash
) -> dict[str, tuple[Maker, int]]:
    """What is timed, by name, and the token rows that it takes."""
    tight, usual = climber(extents, 16), climber(extents, 64)
    padded = climber((largest,) * len(extents), 64)
    bucket = fitting(tight)
    roomy = bucket._replace(tokens=2 * bucket.tokens)
    rows = padded.bucket.tokens
    return {
        PACKED: (partial(packed, tight, implementation, bucket=bucket), bucket.tokens),
        "packed, align 64": (partial(packed, usual, implementation, bucket=fitting(usual)), fitting(usual).tokens),
        "packed, twice the rows": (partial(packed, tight, implementation, bucket=roomy), roomy.tokens),
        "padded, its tiles skipped": (partial(packed, padded, implementation, held=extents), rows),
        "padded": (partial(packed, padded, implementation), rows),
        "padded, XLA split softmax": (partial(biased, padded, SplitSoftmax()), rows),
        "padded, cuDNN with its bias given": (partial(bias_given, padded, kernel), rows),
    }


def mixed(
    progress: Callable[[str], None],
    *,
    extents: tuple[Extent, ...] | None = None,
    largest: Extent = LARGEST,
    implementation: Implementation = "mosaic",
    kernel: Flash = cudnn,
    draws: int = DRAWS,
) -> dict[str, Any]:
    """Rows of the table, shares of waste, and a point of the roofline.

    Args:
        extents: in place of random ones.
        largest: what each is padded to.
        kernel: in cuDNN's place, where there is no GPU.
    """
    extents = extents or draw(REQUESTS, np.random.default_rng(0))
    offered = forms(extents, largest, implementation, kernel)
    milliseconds, failed = timed({name: maker for name, (maker, _) in offered.items()}, progress)
    case, own = climber(extents, 16), milliseconds.get(PACKED)
    here = waste(case)
    rows = [
        {"form": name, "rows": count, "waste": count / here.useful - 1, "ms": ms, "ratio": own and ms / own}
        for name, (_, count) in offered.items()
        if (ms := milliseconds.get(name))
    ]
    point = own and Point("mixed lengths, fused", "attention", True, case.flops, case.bytes, own)._asdict()
    return {
        "mixed": rows,
        "extents": extents,
        "waste": {"alignment": here.alignment, "total": here.total},
        "waste_of_random_batches": spread(len(extents), 16, draws),
        "limits": LIMITS,
        "reach": REACH,
        "failed": failed,
        "points": [point] if point else [],
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: a row per form, then the shares of waste."""
    lines = [f"| mixed lengths | rows | rows wasted | us | times packed (reach {REACH:g}) |", "|" + "---|" * 5]
    for row in result["mixed"]:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        numbers = f"{row['rows']} | {row['waste']:.1%} | {row['ms'] * 1e3:.1f} | {ratio}"
        lines.append(f"| {row['form']} | {numbers} |")
    lines += ["", "| rows wasted, packed | this batch | mean of random ones | p99 | limit |", "|" + "---|" * 5]
    for name, limit in result["limits"].items():
        random = result["waste_of_random_batches"][name]
        shares = (result["waste"][name], random["mean"], random["p99"], limit)
        lines.append(f"| {name} | " + " | ".join(f"{share:.2%}" for share in shares) + " |")
    return "\n".join(lines)
