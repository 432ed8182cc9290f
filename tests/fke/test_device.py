"""Targets: what a machine is, what differs, what is described."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from flame_jax.fke import device as module
from flame_jax.fke.device import UnknownDevice, cpu_features, described_device, described_devices, target_of
from flame_jax.fke.target import Target
from tests import tiny

H100 = Target("cuda", "NVIDIA H100 80GB HBM3", "9.0", "0.11.2", "jax-cuda13-pjrt 0.11.2")


def test_this_machine_is_described_by_what_it_is() -> None:
    here = target_of(tiny.device())
    assert here.platform == "cpu"
    assert here.compute_capability == here.plugin == ""
    assert here.jaxlib == importlib.metadata.version("jaxlib")
    assert platform.machine() in here.cpu_features
    assert len(here.cpu_features) > 1
    assert here.misfit(here) is None
    assert here.missing_features(here) == []


def test_every_flag_of_the_cpu_is_recorded() -> None:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat")))
    assert set(flags.partition(":")[2].split()) < set(cpu_features())


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("platform", "cpu", "built for platform 'cuda', this process has 'cpu'"),
        ("compute_capability", "8.0", "built for compute capability '9.0', this process has '8.0'"),
        ("jaxlib", "0.12.0", "built for jaxlib '0.11.2', this process has '0.12.0'"),
        ("plugin", "", "built for plugin 'jax-cuda13-pjrt 0.11.2', this process has ''"),
    ],
)
def test_what_differs_is_said_of_both_sides(field: str, value: str, said: str) -> None:
    misfit = H100.misfit(Target(**asdict(H100) | {field: value}))
    assert misfit is not None
    assert said in misfit


def test_devices_of_one_capability_fit_each_other() -> None:
    assert H100.misfit(replace(H100, device_kind="NVIDIA H200")) is None


def test_instruction_sets_that_are_not_used_do_not_matter() -> None:
    small, large = replace(H100, cpu_features=("avx", "x86_64")), replace(H100, cpu_features=("avx", "avx2", "x86_64"))
    assert small.missing_features(large) == []
    assert large.missing_features(small) == ["avx2"]


def test_the_h100_is_described() -> None:
    assert "h100" in described_devices()
    text = (module._DESCRIPTIONS / "h100.txtpb").read_text()
    assert "core_count: 132" in text
    assert 'platform_name: "CUDA"' in text


def test_without_the_plugin_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_plugin", lambda name: "")
    with pytest.raises(UnknownDevice, match="pip install --no-deps jax-cuda13-plugin==") as caught:
        described_device("h100")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "H100", "../h100", "h100.txtpb"])
def test_an_unknown_device_is_refused_by_those_there_are(name: str) -> None:
    with pytest.raises(UnknownDevice, match="there is h100"):
        described_device(name)
