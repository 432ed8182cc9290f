"""How much of the time a GPU runs something, as its driver sees it."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_QUERY = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", "0", "-lms", "200"]


@contextmanager
def gpu_busy() -> Iterator[list[float]]:
    """The part of the time inside for which the GPU ran a kernel, in a list that is empty where there is none."""
    found: list[float] = []
    if shutil.which(_QUERY[0]) is None:
        yield found
        return
    sampling = subprocess.Popen(_QUERY, stdout=subprocess.PIPE, text=True)
    try:
        yield found
    finally:
        sampling.terminate()
        lines = sampling.communicate()[0].split()
        samples = [float(line) / 100 for line in lines[1:] if line.isdigit()]  # the first is of before
        if samples:
            found.append(statistics.mean(samples))
