"""Work at once: what leaves the interpreter, such as XLA's compilation, in threads; Pallas' lowering in processes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import jax


def together[K: Hashable, T](tasks: Mapping[K, Callable[[], T]]) -> tuple[dict[K, T], dict[K, str]]:
    """Do all tasks at once, as far as the cores go.

    Returns:
        What each task gave, and of those that failed the error in words.
    """
    made: dict[K, T] = {}
    failed: dict[K, str] = {}
    with ThreadPoolExecutor() as pool:
        waiting = {name: pool.submit(task) for name, task in tasks.items()}
        for name, future in waiting.items():
            try:
                made[name] = future.result()
            except Exception as error:
                failed[name] = told(error)
    return made, failed


def told(error: Exception) -> str:
    """An error in a line; compilers end theirs with what matters."""
    text = str(error)
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:100] + ' ... ' + text[-200:]}"


def lowering_processes(count: int | None = None) -> ProcessPoolExecutor:
    """Processes, one per core by default, that lower programs for a GPU which this process uses."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_without_gpu)


def _without_gpu() -> None:
    jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call]
