"""Which cores a process stays on, by what the machine says of itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_jax.pda import affinity
from flame_jax.pda.affinity import Binding, choose, first_gpu, parse_cores

GPU = "0000:3b:00.0"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two nodes of four cores, the GPU at the second one, and a node of memory alone."""
    for node, cores in ((0, "0-1,4-5"), (1, "2-3,6-7"), (2, "")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cores}\n")
    (tmp_path / "bus/pci/devices" / GPU).mkdir(parents=True)
    (tmp_path / "bus/pci/devices" / GPU / "numa_node").write_text("1\n")
    allow(monkeypatch, range(8))
    return tmp_path


def allow(monkeypatch: pytest.MonkeyPatch, cores: range | set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))


def test_a_process_stays_where_its_gpu_is(machine: Path) -> None:
    found = choose("auto", GPU, machine)
    assert found == Binding(frozenset({2, 3, 6, 7}), f"cores 2-3,6-7 of NUMA node 1, where GPU {GPU} is")


def test_cores_that_it_may_not_use_are_left_out(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, {0, 3})
    assert choose("auto", GPU, machine).cores == frozenset({3})
    allow(monkeypatch, {0, 1})
    assert choose("auto", GPU, machine).cores is None


def test_where_nothing_is_nearer_nothing_is_done(machine: Path) -> None:
    assert choose("auto", None, machine) == Binding(None, "all cores: no GPU is used")
    assert choose("auto", "0000:ff:00.0", machine).cores is None
    (machine / "bus/pci/devices" / GPU / "numa_node").write_text("-1\n")
    assert choose("auto", GPU, machine).cores is None
    (machine / "devices/system/node/node1/cpulist").write_text("\n")
    assert choose("auto", GPU, machine) == Binding(None, "all cores: the machine has one NUMA node")


def test_who_says_where_is_obeyed(machine: Path) -> None:
    assert choose("all", GPU, machine).cores is None
    assert choose("0-2,9", GPU, machine) == Binding(frozenset({0, 1, 2}), "cores 0-2, as told")
    with pytest.raises(ValueError, match="names no core"):
        choose("8-9", GPU, machine)
    for wrong in ("", "a", "1-", "-1", "3-1", "1,,2", "0x1", "1-2-3"):
        with pytest.raises(ValueError, match=r"list of cores|counts down"):
            choose(wrong, GPU, machine)


@given(st.frozensets(st.integers(0, 300), min_size=1))
def test_a_list_that_is_shown_is_read_back(cores: frozenset[int]) -> None:
    assert parse_cores(affinity._shown(cores)) == cores


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "_DRIVER", "libnone.so.1")
    assert first_gpu() is None
