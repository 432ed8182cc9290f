"""Further clients: made once, with memory that is divided, and arrays that they share without a copy."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jaxlib import _jax, xla_client

from flame_jax import pjrt
from flame_jax.pjrt import Clients, Unsupported, bring, place, same_hardware, share
from tests import tiny
from tests.further import cpu_clients, make_cpu_client

CLIENTS = cpu_clients()


@pytest.fixture
def device() -> jax.Device:
    return tiny.device()


@pytest.fixture
def twin(device: jax.Device) -> jax.Device:
    return CLIENTS.streams(device, 2, 0.1)[1]


def test_a_device_is_seen_by_clients_that_are_made_once(device: jax.Device) -> None:
    clients = cpu_clients()
    assert clients.streams(device, 1, 0.1) == [device]
    first = clients.streams(device, 2, 0.1)
    three = clients.streams(device, 3, 0.1)
    assert three[:2] == first
    assert clients.streams(device, 2, 0.1) == first
    assert len({id(each.client) for each in three}) == 3
    assert all(same_hardware(each, device) for each in three)


def test_threads_that_ask_at_once_get_the_same_clients(device: jax.Device) -> None:
    made, start, got = [], threading.Barrier(8), list[list[jax.Device]]()

    def make(*about: Any) -> Any:
        made.append(about)
        return make_cpu_client(*about)

    clients = Clients({"cpu": make})

    def ask() -> None:
        start.wait()
        got.append(clients.streams(device, 3, 0.1))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [(device, 0.1, 1), (device, 0.1, 2)]
    assert all(each == got[0] for each in got)


def test_on_the_cpu_one_client_is_every_lanes(device: jax.Device, caplog: pytest.LogCaptureFixture) -> None:
    assert pjrt.CLIENTS.streams(device, 3, 0.1) == [device] * 3
    assert caplog.text == ""


@pytest.mark.parametrize("dtype", [np.float32, np.int32, ml_dtypes.bfloat16], ids=str)
def test_an_array_is_shared_without_a_copy(dtype: Any, device: jax.Device, twin: jax.Device) -> None:
    values = np.arange(600).reshape(20, 30).astype(dtype)
    array = jax.device_put(values, device)
    shared = share(array, twin)
    assert shared.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    assert shared.devices() == {twin}
    assert (shared.shape, shared.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(np.asarray(shared), values)
    assert share(jax.device_put(values[:0], device), twin).shape == (0, 30)


def test_a_shared_array_lives_as_long_as_anybody_has_it(device: jax.Device, twin: jax.Device) -> None:
    array = jax.device_put(np.arange(9.0, dtype=np.float32), device)
    alive, shared = weakref.ref(array), share(array, twin)
    del array
    gc.collect()
    np.testing.assert_array_equal(np.asarray(shared), np.arange(9))
    assert alive() is not None
    del shared
    gc.collect()
    assert alive() is None


def test_a_copy_is_not_taken_for_sharing(device: jax.Device, twin: jax.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = jax.device_put(np.arange(3), twin)
    monkeypatch.setattr(_jax, "dlpack_managed_tensor_to_buffer", lambda *_: copied)
    with pytest.raises(Unsupported, match="made a copy"):
        share(jax.device_put(np.arange(3), device), twin)


def test_an_array_comes_to_a_device_by_the_shortest_way(device: jax.Device, twin: jax.Device) -> None:
    array = jax.device_put(np.arange(5), device)
    assert bring(array, device) is array
    assert bring(array, twin).unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    placed = place(np.arange(5), [device, twin])
    assert [each.devices() for each in placed.values()] == [{device}, {twin}]
    assert len({each.unsafe_buffer_pointer() for each in placed.values()}) == 1


NAMES = [(module, name) for module, names in pjrt._NAMES.items() for name in names]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[name for _, name in NAMES])
def test_where_jax_lacks_a_name_there_is_one_lane_and_one_line(
    module: Any, name: str, device: jax.Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(module, name)
    clients = cpu_clients()
    for _ in range(3):
        assert clients.streams(device, 4, 0.1) == [device]
    (line,) = [r.getMessage() for r in caplog.records if r.name == pjrt.__name__]
    assert f"1 of 4 lanes: this version of JAX lacks {module.__name__}.{name}" in line


def test_a_client_that_can_not_be_made_is_done_without(device: jax.Device, caplog: pytest.LogCaptureFixture) -> None:
    def make(*about: Any) -> Any:
        if about[2] > 1:
            raise TypeError("make_c_api_client() takes another argument\nand more")
        return make_cpu_client(*about)

    assert len(Clients({"cpu": make}).streams(device, 4, 0.1)) == 2
    assert "2 of 4 lanes: TypeError: make_c_api_client() takes another argument" in caplog.text
    assert "and more" not in caplog.text


def test_a_client_that_does_not_see_the_memory_is_not_used(
    device: jax.Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pjrt, "share", lambda array, device: jax.device_put(np.zeros(4, np.int32), device))
    assert cpu_clients().streams(device, 2, 0.1) == [device]
    assert "does not see another client's memory" in caplog.text


def test_a_platform_without_further_clients_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tpu: Any = type("Tpu", (), {"platform": "tpu"})()
    assert pjrt.CLIENTS.streams(tpu, 2, 0.1) == [tpu]
    assert "platform tpu" in caplog.text


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What a GPU's plugin is asked for."""
    found: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(xla_client, "make_c_api_client", lambda *of: found.append(of))
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    return found


GPU: Any = SimpleNamespace(platform="gpu", local_hardware_id=3)


def test_a_gpus_further_client_sees_it_alone_and_takes_memory_as_it_needs_it(
    asked: list[tuple[str, dict[str, Any]]],
) -> None:
    pjrt._gpu_client(GPU, 0.05, 4)  # 0.75 + 4 * 0.05 = 0.95
    ((plugin, options),) = asked
    assert plugin == "cuda"
    assert options["visible_devices"] == [3]
    assert options["preallocate"] is False
    assert options["memory_fraction"] == 0.05


def test_memory_that_jaxs_own_client_has_is_not_given_away(
    asked: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Unsupported, match=r"0\.75 of the memory .* 5 further clients of 0\.05"):
        pjrt._gpu_client(GPU, 0.05, 5)
    assert not asked
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    pjrt._gpu_client(GPU, 0.05, 9)
    with pytest.raises(Unsupported, match=r"0\.5 of the memory"):
        pjrt._gpu_client(GPU, 0.05, 10)


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert pjrt.out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying"))
    assert not pjrt.out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: RESOURCE"))


def test_page_locking_that_jax_lacks_is_unsupported() -> None:
    without: Any = SimpleNamespace(client=object())
    with pytest.raises(Unsupported, match="dma_map"):
        pjrt.lock_memory(without, 0, 4096)


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
