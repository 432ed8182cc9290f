"""Settings that must be in place before JAX is imported, and no time limits on Hypothesis' examples."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Every warpgroup of an interpreted kernel blocks a thread of this pool, which is as large as the machine has cores.
os.environ.setdefault("PJRT_NPROC", "8")

# The processes of a run, servers too, compile the same small programs over and over: initial weights, training steps.
# They share a cache of its own, whose folder the run's first process makes and removes.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="flame-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

COMPILED_QUICKLY = {"bench", "models", "pallas_kernels", "training"}
"""Folders whose tests check mathematics, or a program's logic, and no program as it is shipped."""

settings.register_profile("flame", deadline=None)  # timings pass and fail nothing
settings.load_profile("flame")


@pytest.fixture(scope="module", autouse=True)
def optimization(request: pytest.FixtureRequest) -> Iterator[None]:
    """XLA's default between modules, where fixtures of the whole run are made."""
    from tests.compiling import compiling

    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    with compiling(quickly=folder in COMPILED_QUICKLY):
        yield


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that nobody changes."""
    from tests import tiny

    path = tmp_path_factory.mktemp("pristine") / "model"
    tiny.save_artifact(path)
    return path
