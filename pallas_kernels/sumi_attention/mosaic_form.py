"""Everything static about a Mosaic GPU kernel of SUMI attention, and its shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

MASKED = -1e30
"""Logit of a key that a query does not see: finite, so that a row without history stays free of NaN."""


@dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        warpgroups: that compute, 64 query rows each.
        keys: key rows of a step.
        stages: steps in flight.
        heads: of a thread block; None for as many as registers allow.
    """

    warpgroups: int = 2
    keys: int = 64
    stages: int = 2
    heads: int | None = None


@dataclass(frozen=True)
class Form:
    """Everything static about a kernel.

    Attributes:
        together: heads of one thread block.
        scale: of SiLU attention; None for softmax.
        first: token row of the first query row.
        page_rows: of the pages that histories lie in; 0 where they lie among the token rows.
    """

    heads: int
    together: int
    qk_dim: int
    v_dim: int
    scale: float | None
    divisor: float
    biased: bool
    causal: bool
    align: int
    first: int
    dtype: Any
    tiling: Tiling
    interpret: bool
    page_rows: int = 0

    @property
    def softmax(self) -> bool:
        """Whether weights add up to one."""
        return self.scale is None

    @property
    def timed(self) -> bool:
        """Whether there are history rows that a bias needs the logarithms of, pair by pair."""
        return self.biased and not self.page_rows


class Memory(NamedTuple):
    """Shared memory; `w` warpgroups, `s` stages, `n` heads."""

    q: Any  # [w, n, 64, qk_dim]
    own_k: Any  # [w, n, 64, qk_dim]
    own_v: Any  # [w, n, 64, v_dim], then the result
    k: Any  # [s, n, keys, qk_dim]
    v: Any  # [s, n, keys, v_dim]
    own_time: Any  # float32[w, 2, 64], where timed
    key_time: Any  # float32[s, 2, keys], where timed
    key_log: Any  # float32[s, 2, keys], with a bias
    weights: Any  # [w, 64, keys], in the interpreter: it takes both operands from shared memory only
