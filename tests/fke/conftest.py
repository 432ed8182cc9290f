from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))
